#include "edm2/resample.h"

#include <vector>

#include "common.h"

namespace edm2::torch_ops {
namespace {

using Filter = std::vector<double>;

/// The filter with its sum set to scale (spec 2.11).
Filter normalized(const Filter& filter, double scale, const char* op) {
  EDM2_CHECK(!filter.empty() && filter.size() % 2 == 0, op, "filter", "expected an even number of taps, got ",
             filter.size());
  double sum = 0;
  for (const double tap : filter) sum += tap;
  EDM2_CHECK(sum != 0, op, "filter", "expected taps whose sum is not 0");
  Filter taps(filter);
  for (double& tap : taps) tap = tap / sum * scale;
  return taps;
}

int64_t down_size(int64_t size, size_t taps) {
  const int64_t n = static_cast<int64_t>(taps);
  return (size + 2 * ((n - 1) / 2) - n) / 2 + 1;
}

Tensor resample(const View& x, const Filter& taps, int64_t out_height, int64_t out_width, bool up, const char* op,
                const char* argument) {
  ResampleParams params{};
  params.dtype = cpu_dtype_of(x, op, argument);
  params.batch = x.sizes[0];
  params.channels = x.sizes[1];
  params.height = x.sizes[2];
  params.width = x.sizes[3];
  params.out_height = out_height;
  params.out_width = out_width;
  params.channels_last = x.format == Format::kChannelsLast;
  params.filter = taps.data();
  params.taps = static_cast<int64_t>(taps.size());
  const int64_t sizes[4] = {params.batch, params.channels, out_height, out_width};
  const Tensor y = empty(x, sizes, 4, x.format, x.scalar_type);
  params.x = x.data();
  params.y = y.mutable_data_ptr();
  const int64_t numel = params.batch * params.channels * out_height * out_width;
  const int64_t items = params.batch * (params.channels_last ? out_height : params.channels);
  run_cpu(up ? cpu::resample_up : cpu::resample_down, params, items, up ? numel : x.numel, params.taps > 2 ? 2 : 1);
  return y;
}

View image(const Tensor& t, const char* op, const char* argument) {
  const View view = dense(t);
  EDM2_CHECK(view.dim == 4, op, argument, "expected shape [batch, channels, height, width], got ", view.shape());
  return view;
}

Tensor resample_down(const Tensor& x_, const Filter& filter) {
  const char* op = "resample_down";
  const View x = image(x_, op, "x");
  const Filter taps = normalized(filter, 1, op);
  const int64_t height = down_size(x.sizes[2], taps.size());
  const int64_t width = down_size(x.sizes[3], taps.size());
  EDM2_CHECK(x.sizes[2] > 1 && x.sizes[3] > 1, op, "x", "expected height and width of at least 2, got ", x.shape());
  return resample(x, taps, height, width, false, op, "x");
}

Tensor resample_down_backward(const Tensor& grad_, const Filter& filter, int64_t height, int64_t width) {
  const char* op = "resample_down_backward";
  const View grad = image(grad_, op, "grad");
  const Filter taps = normalized(filter, 1, op);
  EDM2_CHECK(grad.sizes[2] == down_size(height, taps.size()) && grad.sizes[3] == down_size(width, taps.size()), op,
             "grad", "expected the result for height ", height, " and width ", width, ", got shape ", grad.shape());
  return resample(grad, taps, height, width, true, op, "grad");
}

Tensor resample_up(const Tensor& x_, const Filter& filter) {
  const char* op = "resample_up";
  const View x = image(x_, op, "x");
  return resample(x, normalized(filter, 2, op), 2 * x.sizes[2], 2 * x.sizes[3], true, op, "x");
}

Tensor resample_up_backward(const Tensor& grad_, const Filter& filter) {
  const char* op = "resample_up_backward";
  const View grad = image(grad_, op, "grad");
  EDM2_CHECK(grad.sizes[2] % 2 == 0 && grad.sizes[3] % 2 == 0, op, "grad", "expected even height and width, got ",
             grad.shape());
  return resample(grad, normalized(filter, 2, op), grad.sizes[2] / 2, grad.sizes[3] / 2, false, op, "grad");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("resample_down", TORCH_BOX(&resample_down));
  m.impl("resample_down_backward", TORCH_BOX(&resample_down_backward));
  m.impl("resample_up", TORCH_BOX(&resample_up));
  m.impl("resample_up_backward", TORCH_BOX(&resample_up_backward));
}

}  // namespace edm2::torch_ops
