#include "precondition.h"

namespace edm2::torch_ops {
namespace {

void scale_on_cpu(const PreconditionScaleParams& params, const View& x, const char* op) {
  check_cpu_dtype(params.dtype, op);
  run_cpu(cpu::precondition_scale, params, params.shape.batch * params.shape.pixels, x.numel);
}

void output_on_cpu(const PreconditionOutputParams& params, const View& x, const char* op) {
  check_cpu_dtype(params.dtype, op);
  run_cpu(cpu::precondition_output, params, params.shape.batch * params.shape.pixels, x.numel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("precondition_input", TORCH_BOX((&precondition_input<scale_on_cpu, any_device>)));
  m.impl("precondition_output", TORCH_BOX((&precondition_output<output_on_cpu, any_device>)));
  m.impl("precondition_output_backward", TORCH_BOX((&precondition_output_backward<scale_on_cpu, any_device>)));
}

}  // namespace edm2::torch_ops
