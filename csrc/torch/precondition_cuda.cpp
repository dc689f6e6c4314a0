#include "cuda_support.h"
#include "precondition.h"

namespace edm2::torch_ops {
namespace {

void scale_on_gpu(const PreconditionScaleParams& params, const View& x, const char* op) {
  cuda_dtype_of(x, op, "x");
  run_cuda(x, op, [&](CUstream_st* stream) { return cuda::launch_precondition_scale(params, stream); });
}

void output_on_gpu(const PreconditionOutputParams& params, const View& x, const char* op) {
  cuda_dtype_of(x, op, "x");
  run_cuda(x, op, [&](CUstream_st* stream) { return cuda::launch_precondition_output(params, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("precondition_input", TORCH_BOX((&precondition_input<scale_on_gpu, check_same_gpu>)));
  m.impl("precondition_output", TORCH_BOX((&precondition_output<output_on_gpu, check_same_gpu>)));
  m.impl("precondition_output_backward", TORCH_BOX((&precondition_output_backward<scale_on_gpu, check_same_gpu>)));
}

}  // namespace edm2::torch_ops
