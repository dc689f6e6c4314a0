#include "cuda_support.h"
#include "denoising_loss.h"

namespace edm2::torch_ops {
namespace {

void loss_on_gpu(const DenoisingLossParams& params, const View& x, const char* op) {
  cuda_dtype_of(x, op, "x");
  const Tensor squares = workspace(x, cuda::denoising_loss_workspace(params.shape));
  run_cuda(x, op, [&](CUstream_st* stream) {
    return cuda::launch_denoising_loss(params, static_cast<float*>(address(squares)), stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("denoising_loss", TORCH_BOX((&denoising_loss<loss_on_gpu, check_same_gpu>)));
}

}  // namespace edm2::torch_ops
