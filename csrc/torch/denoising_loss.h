// What the CPU and the CUDA half of the training loss share: the op itself, down to the launch.
#pragma once

#include "edm2/denoising_loss.h"

#include <tuple>

#include "noisy_image.h"

namespace edm2::torch_ops {

/// A number for each sample.
inline View number_per_sample(const Tensor& t, const View& image, const char* op, const char* argument) {
  const View view = dense(t, Format::kContiguous);
  EDM2_CHECK(view.dim == 1 && view.numel == image.sizes[0], op, argument, "expected shape [", image.sizes[0], "], got ",
             view.shape());
  check_type(view, image.scalar_type, op, argument);
  return view;
}

/// run(params, x, op) computes on one kind of device; check_device(x, tensor, op, argument) raises unless both are on
/// the same.
template <auto run, auto check_device>
std::tuple<Tensor, Tensor, Tensor> denoising_loss(const Tensor& f_, const Tensor& x_, const Tensor& y_,
                                                  const Tensor& sigma_, const Tensor& u_, double sigma_data,
                                                  double scale) {
  const char* op = "denoising_loss";
  const View f = dense(f_);
  const View x = image_view(x_, image_type(f.scalar_type), op, "x");
  check_device(x, f, op, "f");
  check_device(x, View(y_), op, "y");
  check_device(x, View(sigma_), op, "sigma");
  check_device(x, View(u_), op, "u");
  check_same_shape(x, f, op, "f");
  const View y = gradient(y_, x, op, "y");
  const View sigma = number_per_sample(sigma_, x, op, "sigma");
  const View u = number_per_sample(u_, x, op, "u");
  const Tensor loss = empty_like(sigma);
  const Tensor grad_f = empty_like(f);
  const Tensor grad_u = empty_like(u);
  run(DenoisingLossParams{f.data(), x.data(), y.data(), sigma.data(), u.data(), address(loss), address(grad_f),
                          address(grad_u), activation_of(x, op, "x"), f.format == Format::kChannelsLast, sigma_data,
                          scale, dtype_of(f.scalar_type, op, "f")},
      x, op);
  return {loss, grad_f, grad_u};
}

}  // namespace edm2::torch_ops
