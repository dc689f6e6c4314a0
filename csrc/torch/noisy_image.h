// What the ops on noisy images share: images outside the U-Net and the noise levels that belong to them.
#pragma once

#include "common.h"

namespace edm2::torch_ops {

/// The dtype of images outside a U-Net that computes in `type`.
inline ScalarType image_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_type(const View& view, ScalarType type, const char* op, const char* argument) {
  EDM2_CHECK(view.scalar_type == type, op, argument, "expected dtype ", to_string(type), ", got ",
             to_string(view.scalar_type));
}

/// An image [batch, channels, height, width] of the given dtype, in a format the kernels know.
inline View image_view(const Tensor& t, ScalarType type, const char* op, const char* argument) {
  const View view = dense(t);
  EDM2_CHECK(view.dim == 4, op, argument, "expected shape [batch, channels, height, width], got ", view.shape());
  check_type(view, type, op, argument);
  return view;
}

/// Noise levels: one, or one per sample.
inline View levels_view(const Tensor& t, const View& image, const char* op, const char* argument) {
  const View view = dense(t, Format::kContiguous);
  EDM2_CHECK(view.numel == 1 || view.numel == image.sizes[0], op, argument, "expected 1 or ", image.sizes[0],
             " elements, got shape ", view.shape());
  check_type(view, image.scalar_type, op, argument);
  return view;
}

/// CPU tensors are all on one device.
inline void any_device(const View&, const View&, const char*, const char*) {}

/// CPU kernels have no fp16.
inline void check_cpu_dtype(DType dtype, const char* op) {
  EDM2_CHECK(dtype != DType::kFloat16, op, "dtype", "expected float32, float64 or bfloat16 on the CPU, got Half");
}

inline Format format_of(bool channels_last) { return channels_last ? Format::kChannelsLast : Format::kContiguous; }

}  // namespace edm2::torch_ops
