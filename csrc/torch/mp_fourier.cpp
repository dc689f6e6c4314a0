#include "edm2/mp_fourier.h"

#include <tuple>

#include "common.h"

namespace edm2::torch_ops {
namespace {

View vector_of(const Tensor& t, const char* op, const char* argument) {
  const View view = dense(t, Format::kContiguous);
  EDM2_CHECK(view.dim == 1, op, argument, "expected one dimension, got shape ", view.shape());
  return view;
}

/// freqs or phases in the type computed in: fp64 for fp64, else fp32 (spec 2.5).
View buffer_of(const Tensor& t, const View& x, const char* op, const char* argument) {
  const ScalarType type = x.scalar_type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const View view = vector_of(t, op, argument);
  return view.scalar_type == type ? view : View(torch::stable::to(view.tensor, type));
}

Tensor mp_fourier(const Tensor& x_, const Tensor& freqs_, const Tensor& phases_) {
  const char* op = "mp_fourier";
  const View x = vector_of(x_, op, "x");
  const DType dtype = cpu_dtype_of(x, op, "x");
  const View freqs = buffer_of(freqs_, x, op, "freqs");
  const View phases = buffer_of(phases_, x, op, "phases");
  check_same_shape(freqs, phases, op, "phases");
  const int64_t sizes[2] = {x.numel, freqs.numel};
  const Tensor y = empty(x, sizes, 2, Format::kContiguous, x.scalar_type);
  const MPFourierParams params{x.data(), freqs.data(), phases.data(), y.mutable_data_ptr(),
                               x.numel,  freqs.numel,  dtype};
  run_cpu(cpu::mp_fourier, params, x.numel, x.numel * freqs.numel, 2);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mp_fourier_backward(const Tensor& grad_, const Tensor& x_, const Tensor& freqs_,
                                                       const Tensor& phases_) {
  const char* op = "mp_fourier_backward";
  const View x = vector_of(x_, op, "x");
  const DType dtype = cpu_dtype_of(x, op, "x");
  const View freqs = buffer_of(freqs_, x, op, "freqs");
  const View phases = buffer_of(phases_, x, op, "phases");
  check_same_shape(freqs, phases, op, "phases");
  const View grad = dense(grad_, Format::kContiguous);
  EDM2_CHECK(grad.dim == 2 && grad.sizes[0] == x.numel && grad.sizes[1] == freqs.numel, op, "grad", "expected shape [",
             x.numel, ", ", freqs.numel, "], got ", grad.shape());
  check_same_dtype(x, grad, op, "grad");
  const Tensor grad_x = empty_like(x);
  const Tensor grad_freqs = empty_like(freqs);
  const Tensor grad_phases = empty_like(phases);
  const MPFourierBackwardParams params{grad.data(),
                                       x.data(),
                                       freqs.data(),
                                       phases.data(),
                                       grad_x.mutable_data_ptr(),
                                       grad_freqs.mutable_data_ptr(),
                                       grad_phases.mutable_data_ptr(),
                                       x.numel,
                                       freqs.numel,
                                       dtype};
  if (grad.numel == 0) {  // an empty sum is 0
    return {torch::stable::fill_(grad_x, 0), torch::stable::fill_(grad_freqs, 0), torch::stable::fill_(grad_phases, 0)};
  }
  run_cpu(cpu::mp_fourier_backward_x, params, x.numel, grad.numel, 2);
  run_cpu(cpu::mp_fourier_backward_buffers, params, freqs.numel, grad.numel, 2);
  const auto as_given = [](const Tensor& grad_buffer, const Tensor& given) {
    const ScalarType type = given.scalar_type();
    return grad_buffer.scalar_type() == type ? grad_buffer : torch::stable::to(grad_buffer, type);
  };
  return {grad_x, as_given(grad_freqs, freqs_), as_given(grad_phases, phases_)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("mp_fourier", TORCH_BOX(&mp_fourier));
  m.impl("mp_fourier_backward", TORCH_BOX(&mp_fourier_backward));
}

}  // namespace edm2::torch_ops
