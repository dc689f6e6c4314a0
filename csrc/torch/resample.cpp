#include "resample.h"

namespace edm2::torch_ops {
namespace {

Tensor on_cpu(const View& x, const Filter& taps, int64_t out_height, int64_t out_width, bool up, const char* op,
              const char* argument) {
  ResampleParams params = resample_params(x, taps, out_height, out_width);
  params.dtype = cpu_dtype_of(x, op, argument);
  const Tensor y = resampled(x, params);
  params.x = x.data();
  params.y = y.mutable_data_ptr();
  const int64_t numel = params.batch * params.channels * out_height * out_width;
  const int64_t items = params.batch * (params.channels_last ? out_height : params.channels);
  run_cpu(up ? cpu::resample_up : cpu::resample_down, params, items, up ? numel : x.numel, params.taps > 2 ? 2 : 1);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("resample_down", TORCH_BOX(&resample_down<on_cpu>));
  m.impl("resample_down_backward", TORCH_BOX(&resample_down_backward<on_cpu>));
  m.impl("resample_up", TORCH_BOX(&resample_up<on_cpu>));
  m.impl("resample_up_backward", TORCH_BOX(&resample_up_backward<on_cpu>));
}

}  // namespace edm2::torch_ops
