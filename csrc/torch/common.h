// What the torch layer of every op shares: argument checks, memory formats, allocation, threads. Stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

#include "edm2/common.h"

namespace edm2::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Raises RuntimeError "op: argument: message" unless condition holds.
#define EDM2_CHECK(condition, op, argument, ...) STD_TORCH_CHECK(condition, op, ": ", argument, ": ", __VA_ARGS__)

inline std::string to_string(const int64_t* sizes, int64_t dim) {
  std::string text = "[";
  for (int64_t i = 0; i < dim; ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline const char* to_string(ScalarType type) { return torch::headeronly::toString(type); }

inline bool is_meta(const Tensor& t) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type == aoti_torch_device_type_meta();
}

/// Where the elements are. Kernels take null for "not wanted", so a meta tensor, whose elements are nowhere, gets
/// another address.
inline void* address(const Tensor& t) {
  void* const pointer = t.mutable_data_ptr();
  return pointer == nullptr && is_meta(t) ? reinterpret_cast<void*>(uintptr_t{4096}) : pointer;
}

constexpr int64_t kMaxDim = 8;

/// Memory formats the kernels know. A tensor of one pixel per sample counts as contiguous.
enum class Format { kContiguous, kChannelsLast, kOther };

/// Metadata of a tensor, read once, and the tensor itself kept alive.
struct View {
  Tensor tensor;
  const int64_t* sizes;
  int64_t dim;
  int64_t numel;
  ScalarType scalar_type;
  Format format;

  explicit View(const Tensor& t);

  void* data() const { return address(tensor); }
  bool same_shape(const View& other) const {
    if (dim != other.dim) return false;
    for (int64_t i = 0; i < dim; ++i) {
      if (sizes[i] != other.sizes[i]) return false;
    }
    return true;
  }
  std::string shape() const { return to_string(sizes, dim); }
};

/// Dense and, for 4 and 5 dimensions, channels innermost. Strides of dimensions of size 1 mean nothing.
inline bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dim, bool channels_last) {
  int64_t expected = 1;
  const auto fits = [&](int64_t i) {
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
    return true;
  };
  if (channels_last && !fits(1)) return false;
  for (int64_t i = dim - 1; i >= 0; --i) {
    if (!(channels_last && i == 1) && !fits(i)) return false;
  }
  return true;
}

inline View::View(const Tensor& t) : tensor(t) {
  const auto s = t.sizes();
  sizes = s.data();
  dim = static_cast<int64_t>(s.size());
  numel = 1;
  for (int64_t i = 0; i < dim; ++i) numel *= sizes[i];
  scalar_type = t.scalar_type();
  if (numel == 0 || t.is_contiguous()) {
    format = Format::kContiguous;
  } else if ((dim == 4 || dim == 5) && is_dense(sizes, t.strides().data(), dim, true)) {
    format = Format::kChannelsLast;
  } else {
    format = Format::kOther;
  }
}

inline torch::headeronly::MemoryFormat memory_format(Format format, int64_t dim) {
  using torch::headeronly::MemoryFormat;
  if (format != Format::kChannelsLast) return MemoryFormat::Contiguous;
  return dim == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

/// t in a format the kernels know: as it is if contiguous or channels_last, else made contiguous.
inline View dense(const Tensor& t) {
  View view(t);
  return view.format != Format::kOther ? view : View(torch::stable::contiguous(t));
}

/// t in the given format.
inline View dense(const Tensor& t, Format format) {
  View view(t);
  return view.format == format || view.numel == 0 ? view
                                                  : View(torch::stable::contiguous(t, memory_format(format, view.dim)));
}

inline DType dtype_of(ScalarType type, const char* op, const char* argument) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      EDM2_CHECK(false, op, argument, "expected a floating-point tensor, got ", to_string(type));
  }
}

/// The same for CPU kernels, which have no fp16.
inline DType cpu_dtype_of(const View& view, const char* op, const char* argument) {
  const DType dtype = dtype_of(view.scalar_type, op, argument);
  EDM2_CHECK(dtype != DType::kFloat16, op, argument, "expected float32, float64 or bfloat16 on the CPU, got Half");
  return dtype;
}

/// view as [batch, channels, pixels].
inline Activation activation_of(const View& view, const char* op, const char* argument) {
  EDM2_CHECK(view.dim >= 2, op, argument, "expected shape [batch, channels, ...], got ", view.shape());
  int64_t pixels = 1;
  for (int64_t i = 2; i < view.dim; ++i) pixels *= view.sizes[i];
  return {view.sizes[0], view.sizes[1], pixels, view.format == Format::kChannelsLast || pixels == 1};
}

inline void check_same_shape(const View& expected, const View& got, const char* op, const char* argument) {
  EDM2_CHECK(expected.same_shape(got), op, argument, "expected shape ", expected.shape(), ", got ", got.shape());
}

inline void check_same_dtype(const View& expected, const View& got, const char* op, const char* argument) {
  EDM2_CHECK(expected.scalar_type == got.scalar_type, op, argument, "expected dtype ", to_string(expected.scalar_type),
             ", got ", to_string(got.scalar_type));
}

inline void check_like(const View& expected, const View& got, const char* op, const char* argument) {
  check_same_shape(expected, got, op, argument);
  check_same_dtype(expected, got, op, argument);
}

/// A gradient: brought to the format of the tensor it belongs to, then checked against it.
inline View gradient(const Tensor& grad, const View& of, const char* op, const char* argument) {
  const View view = dense(grad, of.format);
  check_like(of, view, op, argument);
  return view;
}

/// An uninitialised tensor on like's device, dense in the given format.
inline Tensor empty(const View& like, const int64_t* sizes, int64_t dim, Format format, ScalarType type) {
  STD_TORCH_CHECK(dim <= kMaxDim, "expected at most ", kMaxDim, " dimensions, got ", dim);
  int64_t strides[kMaxDim];
  int64_t next = 1;
  const auto place = [&](int64_t i) {
    strides[i] = next;
    next *= sizes[i] > 1 ? sizes[i] : 1;
  };
  if (format == Format::kChannelsLast) place(1);
  for (int64_t i = dim - 1; i >= 0; --i) {
    if (!(format == Format::kChannelsLast && i == 1)) place(i);
  }
  int32_t device_type = 0;
  int32_t device_index = 0;
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.tensor.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.tensor.get(), &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

/// An uninitialised tensor like the given one, in its format.
inline Tensor empty_like(const View& like) { return empty(like, like.sizes, like.dim, like.format, like.scalar_type); }

/// Runs kernel(params, begin, end) over [0, items), by several threads only if there are more than 32 Ki elements: less
/// takes a few microseconds, no more than waking a thread. cost: how much more an element costs than a product with its
/// loads and store.
template <class Params>
void run_cpu(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t items, int64_t elements,
             int64_t cost = 1) {
  if (items == 0 || elements == 0) return;
  constexpr int64_t kElementsPerThread = 32768;
  const int64_t per_item = elements * cost / items;
  const int64_t grain = per_item > 0 ? kElementsPerThread / per_item + 1 : kElementsPerThread;
  if (items <= grain) {
    kernel(params, 0, items);
    return;
  }
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

}  // namespace edm2::torch_ops
