#include "cuda_support.h"
#include "resample.h"

namespace edm2::torch_ops {
namespace {

Tensor resample_on_gpu(const View& x, const Filter& taps, int64_t out_height, int64_t out_width, bool up,
                       const char* op, const char* argument) {
  ResampleParams params = resample_params(x, taps, out_height, out_width);
  params.dtype = cuda_dtype_of(x, op, argument);
  EDM2_CHECK(params.taps <= cuda::kMostTaps, op, "filter", "expected at most ", cuda::kMostTaps, " taps on a GPU, got ",
             params.taps);
  const Tensor y = resampled(x, params);
  params.x = x.data();
  params.y = address(y);
  run_cuda(x, op, [&](CUstream_st* stream) {
    return up ? cuda::launch_resample_up(params, stream) : cuda::launch_resample_down(params, stream);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("resample_down", TORCH_BOX(&resample_down<resample_on_gpu>));
  m.impl("resample_down_backward", TORCH_BOX(&resample_down_backward<resample_on_gpu>));
  m.impl("resample_up", TORCH_BOX(&resample_up<resample_on_gpu>));
  m.impl("resample_up_backward", TORCH_BOX(&resample_up_backward<resample_on_gpu>));
}

}  // namespace edm2::torch_ops
