#include "mp_fourier.h"

namespace edm2::torch_ops {
namespace {

Tensor mp_fourier(const Tensor& x, const Tensor& freqs, const Tensor& phases) {
  const char* op = "mp_fourier";
  const FourierInputs in(x, freqs, phases, op);
  Tensor y;
  const MPFourierParams params = fourier_params(in, cpu_dtype_of(in.x, op, "x"), &y);
  run_cpu(cpu::mp_fourier, params, params.batch, params.batch * params.channels, 2);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mp_fourier_backward(const Tensor& grad_, const Tensor& x, const Tensor& freqs,
                                                       const Tensor& phases) {
  const char* op = "mp_fourier_backward";
  const FourierInputs in(x, freqs, phases, op);
  const View grad = dense(grad_, Format::kContiguous);
  const FourierGradients grads(in);
  const MPFourierBackwardParams params = fourier_backward_params(grad, in, grads, cpu_dtype_of(in.x, op, "x"), op);
  if (grad.numel == 0) {
    grads.fill_with_zeros();
  } else {
    run_cpu(cpu::mp_fourier_backward_x, params, params.batch, grad.numel, 2);
    run_cpu(cpu::mp_fourier_backward_buffers, params, params.channels, grad.numel, 2);
  }
  return grads.as_given(freqs, phases);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("mp_fourier", TORCH_BOX(&mp_fourier));
  m.impl("mp_fourier_backward", TORCH_BOX(&mp_fourier_backward));
}

}  // namespace edm2::torch_ops
