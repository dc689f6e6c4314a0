#include "sampler_step.h"

namespace edm2::torch_ops {
namespace {

void step_on_cpu(const SamplerStepParams& params, const View& x, const char* op) {
  check_cpu_dtype(params.dtype, op);
  run_cpu(cpu::sampler_step, params, params.shape.batch * params.shape.pixels, x.numel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("sampler_step", TORCH_BOX((&sampler_step<step_on_cpu, any_device>)));
  m.impl("sampler_step_input", TORCH_BOX((&sampler_step_input<step_on_cpu, any_device>)));
}

}  // namespace edm2::torch_ops
