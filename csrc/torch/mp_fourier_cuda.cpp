#include "cuda_support.h"
#include "mp_fourier.h"

namespace edm2::torch_ops {
namespace {

void check_buffers_on_gpu(const Tensor& x, const Tensor& freqs, const Tensor& phases, const char* op) {
  check_same_gpu(View(x), View(freqs), op, "freqs");
  check_same_gpu(View(x), View(phases), op, "phases");
}

Tensor mp_fourier(const Tensor& x, const Tensor& freqs, const Tensor& phases) {
  const char* op = "mp_fourier";
  check_buffers_on_gpu(x, freqs, phases, op);
  const FourierInputs in(x, freqs, phases, op);
  Tensor y;
  const MPFourierParams params = fourier_params(in, cuda_dtype_of(in.x, op, "x"), &y);
  run_cuda(in.x, op, [&](CUstream_st* stream) { return cuda::launch_mp_fourier(params, stream); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mp_fourier_backward(const Tensor& grad_, const Tensor& x, const Tensor& freqs,
                                                       const Tensor& phases) {
  const char* op = "mp_fourier_backward";
  check_buffers_on_gpu(x, freqs, phases, op);
  check_same_gpu(View(x), View(grad_), op, "grad");
  const FourierInputs in(x, freqs, phases, op);
  const View grad = dense(grad_, Format::kContiguous);
  const FourierGradients grads(in);
  const MPFourierBackwardParams params = fourier_backward_params(grad, in, grads, cuda_dtype_of(in.x, op, "x"), op);
  run_cuda(in.x, op, [&](CUstream_st* stream) { return cuda::launch_mp_fourier_backward(params, stream); });
  return grads.as_given(freqs, phases);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("mp_fourier", TORCH_BOX(&mp_fourier));
  m.impl("mp_fourier_backward", TORCH_BOX(&mp_fourier_backward));
}

}  // namespace edm2::torch_ops
