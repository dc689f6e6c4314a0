// What the CPU and the CUDA half of halving with pixel norm share: the ops themselves, down to the launch.
#pragma once

#include "edm2/resample_down_pixel_norm.h"

#include <tuple>

#include "common.h"

namespace edm2::torch_ops {

/// The type of the rms: that in which kernels compute.
inline ScalarType rms_type(const View& x) {
  return x.scalar_type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// y, mp_silu(y) and the rms [batch, height / 2, width / 2]. Run(params, x, elements of y, op) sets the dtype and
/// computes on one kind of device.
template <auto run>
std::tuple<Tensor, Tensor, Tensor> resample_down_pixel_norm(const Tensor& x_, double eps) {
  const char* op = "resample_down_pixel_norm";
  const View x = dense(x_);
  EDM2_CHECK(x.dim == 4, op, "x", "expected shape [batch, channels, height, width], got ", x.shape());
  EDM2_CHECK(x.sizes[2] > 1 && x.sizes[3] > 1, op, "x", "expected height and width of at least 2, got ", x.shape());
  ResampleDownPixelNormParams params{};
  params.batch = x.sizes[0];
  params.channels = x.sizes[1];
  params.height = x.sizes[2];
  params.width = x.sizes[3];
  params.channels_last = x.format == Format::kChannelsLast;
  params.eps = eps;
  const int64_t sizes[4] = {x.sizes[0], x.sizes[1], x.sizes[2] / 2, x.sizes[3] / 2};
  const int64_t rms_sizes[3] = {sizes[0], sizes[2], sizes[3]};
  const Tensor y = empty(x, sizes, 4, x.format, x.scalar_type);
  const Tensor y_silu = empty(x, sizes, 4, x.format, x.scalar_type);
  const Tensor rms = empty(x, rms_sizes, 3, Format::kContiguous, rms_type(x));
  params.x = x.data();
  params.y = address(y);
  params.y_silu = address(y_silu);
  params.rms = address(rms);
  run(params, x, op);
  return {y, y_silu, rms};
}

/// `gradient_like`: a gradient brought to the format of y, on its device, and checked.
template <auto run, auto gradient_like>
Tensor resample_down_pixel_norm_backward(const Tensor& grad, const Tensor& grad_silu, const Tensor& y_,
                                         const Tensor& rms_, double eps, int64_t height, int64_t width) {
  const char* op = "resample_down_pixel_norm_backward";
  const View y = dense(y_);
  EDM2_CHECK(height > 1 && width > 1, op, "height, width", "expected at least 2, got ", height, " and ", width);
  EDM2_CHECK(y.dim == 4 && y.sizes[2] == height / 2 && y.sizes[3] == width / 2, op, "y",
             "expected the result for height ", height, " and width ", width, ", got shape ", y.shape());
  const View grad_y = gradient_like(grad, y, op, "grad");
  const View grad_s = gradient_like(grad_silu, y, op, "grad_silu");
  const View rms = dense(rms_, Format::kContiguous);
  EDM2_CHECK(rms.dim == 3 && rms.sizes[0] == y.sizes[0] && rms.sizes[1] == y.sizes[2] && rms.sizes[2] == y.sizes[3] &&
                 rms.scalar_type == rms_type(y),
             op, "rms", "expected shape [", y.sizes[0], ", ", y.sizes[2], ", ", y.sizes[3], "] and dtype ",
             to_string(rms_type(y)), ", got ", rms.shape(), " and ", to_string(rms.scalar_type));
  ResampleDownPixelNormBackwardParams params{};
  params.batch = y.sizes[0];
  params.channels = y.sizes[1];
  params.height = height;
  params.width = width;
  params.channels_last = y.format == Format::kChannelsLast;
  params.eps = eps;
  const int64_t sizes[4] = {y.sizes[0], y.sizes[1], height, width};
  const Tensor grad_x = empty(y, sizes, 4, y.format, y.scalar_type);
  params.grad_y = grad_y.data();
  params.grad_silu = grad_s.data();
  params.y = y.data();
  params.rms = rms.data();
  params.grad_x = address(grad_x);
  run(params, y, op);
  return grad_x;
}

}  // namespace edm2::torch_ops
