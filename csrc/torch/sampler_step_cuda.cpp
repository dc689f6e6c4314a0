#include "cuda_support.h"
#include "sampler_step.h"

namespace edm2::torch_ops {
namespace {

void step_on_gpu(const SamplerStepParams& params, const View& x, const char* op) {
  cuda_dtype_of(x, op, "x");
  run_cuda(x, op, [&](CUstream_st* stream) { return cuda::launch_sampler_step(params, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("sampler_step", TORCH_BOX((&sampler_step<step_on_gpu, check_same_gpu>)));
  m.impl("sampler_step_input", TORCH_BOX((&sampler_step_input<step_on_gpu, check_same_gpu>)));
}

}  // namespace edm2::torch_ops
