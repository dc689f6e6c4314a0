// What the CPU and the CUDA half of resampling share: the ops themselves, down to the launch.
#pragma once

#include "edm2/resample.h"

#include <vector>

#include "common.h"

namespace edm2::torch_ops {

using Filter = std::vector<double>;

/// The filter with its sum set to scale (spec 2.11).
inline Filter normalized(const Filter& filter, double scale, const char* op) {
  EDM2_CHECK(!filter.empty() && filter.size() % 2 == 0, op, "filter", "expected an even number of taps, got ",
             filter.size());
  double sum = 0;
  for (const double tap : filter) sum += tap;
  EDM2_CHECK(sum != 0, op, "filter", "expected taps whose sum is not 0");
  Filter taps(filter);
  for (double& tap : taps) tap = tap / sum * scale;
  return taps;
}

inline int64_t down_size(int64_t size, size_t taps) {
  const int64_t n = static_cast<int64_t>(taps);
  return (size + 2 * ((n - 1) / 2) - n) / 2 + 1;
}

inline View image(const Tensor& t, const char* op, const char* argument) {
  const View view = dense(t);
  EDM2_CHECK(view.dim == 4, op, argument, "expected shape [batch, channels, height, width], got ", view.shape());
  return view;
}

/// Everything but the pointers and the dtype.
inline ResampleParams resample_params(const View& x, const Filter& taps, int64_t out_height, int64_t out_width) {
  ResampleParams params{};
  params.batch = x.sizes[0];
  params.channels = x.sizes[1];
  params.height = x.sizes[2];
  params.width = x.sizes[3];
  params.out_height = out_height;
  params.out_width = out_width;
  params.channels_last = x.format == Format::kChannelsLast;
  params.filter = taps.data();
  params.taps = static_cast<int64_t>(taps.size());
  return params;
}

/// The output for x, in its format.
inline Tensor resampled(const View& x, const ResampleParams& params) {
  const int64_t sizes[4] = {params.batch, params.channels, params.out_height, params.out_width};
  return empty(x, sizes, 4, x.format, x.scalar_type);
}

/// The op's result: Run(x, taps, out_height, out_width, up, op, name of x) on one kind of device.
using Run = Tensor (*)(const View&, const Filter&, int64_t, int64_t, bool, const char*, const char*);

template <Run run>
Tensor resample_down(const Tensor& x_, const Filter& filter) {
  const char* op = "resample_down";
  const View x = image(x_, op, "x");
  const Filter taps = normalized(filter, 1, op);
  EDM2_CHECK(x.sizes[2] > 1 && x.sizes[3] > 1, op, "x", "expected height and width of at least 2, got ", x.shape());
  return run(x, taps, down_size(x.sizes[2], taps.size()), down_size(x.sizes[3], taps.size()), false, op, "x");
}

template <Run run>
Tensor resample_down_backward(const Tensor& grad_, const Filter& filter, int64_t height, int64_t width) {
  const char* op = "resample_down_backward";
  const View grad = image(grad_, op, "grad");
  const Filter taps = normalized(filter, 1, op);
  EDM2_CHECK(grad.sizes[2] == down_size(height, taps.size()) && grad.sizes[3] == down_size(width, taps.size()), op,
             "grad", "expected the result for height ", height, " and width ", width, ", got shape ", grad.shape());
  return run(grad, taps, height, width, true, op, "grad");
}

template <Run run>
Tensor resample_up(const Tensor& x_, const Filter& filter) {
  const char* op = "resample_up";
  const View x = image(x_, op, "x");
  return run(x, normalized(filter, 2, op), 2 * x.sizes[2], 2 * x.sizes[3], true, op, "x");
}

template <Run run>
Tensor resample_up_backward(const Tensor& grad_, const Filter& filter) {
  const char* op = "resample_up_backward";
  const View grad = image(grad_, op, "grad");
  EDM2_CHECK(grad.sizes[2] % 2 == 0 && grad.sizes[3] % 2 == 0, op, "grad", "expected even height and width, got ",
             grad.shape());
  return run(grad, normalized(filter, 2, op), grad.sizes[2] / 2, grad.sizes[3] / 2, false, op, "grad");
}

}  // namespace edm2::torch_ops
