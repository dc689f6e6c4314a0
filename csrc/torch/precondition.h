// What the CPU and the CUDA half of preconditioning share: the ops themselves, down to the launch.
#pragma once

#include "edm2/precondition.h"

#include "noisy_image.h"

namespace edm2::torch_ops {

/// c_in * x and ones, or c_out * x. run(params, x, op) computes on one kind of device; check_device(x, tensor, op,
/// argument) raises unless both are on the same.
template <auto run, auto check_device>
Tensor scaled(const Tensor& image, const char* argument, const Tensor& sigma_, double sigma_data, ScalarType type,
              bool channels_last, bool input, const char* op) {
  const View x = image_view(image, image_type(type), op, argument);
  check_device(x, View(sigma_), op, "sigma");
  const View sigma = levels_view(sigma_, x, op, "sigma");
  const int64_t sizes[4] = {x.sizes[0], input ? x.sizes[1] + 1 : x.sizes[1], x.sizes[2], x.sizes[3]};
  const Tensor out = empty(x, sizes, 4, format_of(channels_last), type);
  run(PreconditionScaleParams{x.data(), sigma.data(), address(out), activation_of(x, op, argument), channels_last,
                              input, sigma.numel != 1, sigma_data, dtype_of(type, op, "dtype")},
      x, op);
  return out;
}

template <auto run, auto check_device>
Tensor precondition_input(const Tensor& x, const Tensor& sigma, double sigma_data, ScalarType type,
                          bool channels_last) {
  return scaled<run, check_device>(x, "x", sigma, sigma_data, type, channels_last, true, "precondition_input");
}

/// The gradient of F.
template <auto run, auto check_device>
Tensor precondition_output_backward(const Tensor& grad, const Tensor& sigma, double sigma_data, ScalarType type,
                                    bool channels_last) {
  const char* op = "precondition_output_backward";
  return scaled<run, check_device>(grad, "grad", sigma, sigma_data, type, channels_last, false, op);
}

template <auto run, auto check_device>
Tensor precondition_output(const Tensor& x_, const Tensor& f_, const Tensor& sigma_, double sigma_data) {
  const char* op = "precondition_output";
  const View f = dense(f_);
  const View x = image_view(x_, image_type(f.scalar_type), op, "x");
  check_device(x, f, op, "f");
  check_device(x, View(sigma_), op, "sigma");
  check_same_shape(x, f, op, "f");
  const View sigma = levels_view(sigma_, x, op, "sigma");
  const Tensor out = empty_like(x);
  run(PreconditionOutputParams{x.data(), f.data(), sigma.data(), address(out), activation_of(x, op, "x"),
                               f.format == Format::kChannelsLast, sigma.numel != 1, sigma_data,
                               dtype_of(f.scalar_type, op, "f")},
      x, op);
  return out;
}

}  // namespace edm2::torch_ops
