#include "resample_down_pixel_norm.h"

namespace edm2::torch_ops {
namespace {

void forward_on_cpu(ResampleDownPixelNormParams& params, const View& x, const char* op) {
  params.dtype = cpu_dtype_of(x, op, "x");
  run_cpu(cpu::resample_down_pixel_norm, params, cpu::halving_items(params, false), x.numel);
}

void backward_on_cpu(ResampleDownPixelNormBackwardParams& params, const View& y, const char* op) {
  params.dtype = cpu_dtype_of(y, op, "y");
  run_cpu(cpu::resample_down_pixel_norm_backward, params, cpu::halving_items(params, true),
          params.batch * params.channels * params.height * params.width);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("resample_down_pixel_norm", TORCH_BOX(&resample_down_pixel_norm<forward_on_cpu>));
  m.impl("resample_down_pixel_norm_backward",
         TORCH_BOX((&resample_down_pixel_norm_backward<backward_on_cpu, gradient>)));
}

}  // namespace edm2::torch_ops
