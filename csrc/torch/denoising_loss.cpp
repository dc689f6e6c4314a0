#include "denoising_loss.h"

namespace edm2::torch_ops {
namespace {

void loss_on_cpu(const DenoisingLossParams& params, const View& x, const char* op) {
  check_cpu_dtype(params.dtype, op);
  const int64_t batch = params.shape.batch;
  run_cpu(cpu::denoising_loss, params, batch, x.numel > 0 ? x.numel : batch, 2);  // a sample without pixels has a loss
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("denoising_loss", TORCH_BOX((&denoising_loss<loss_on_cpu, any_device>)));
}

}  // namespace edm2::torch_ops
