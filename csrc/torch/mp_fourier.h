// What the CPU and the CUDA half of MP-Fourier share: checks, allocation, parameters.
#pragma once

#include "edm2/mp_fourier.h"

#include <tuple>

#include "common.h"

namespace edm2::torch_ops {

/// x, freqs and phases as the kernels take them.
struct FourierInputs {
  View x;
  View freqs;
  View phases;

  FourierInputs(const Tensor& x_, const Tensor& freqs_, const Tensor& phases_, const char* op)
      : x(vector(x_, op, "x")), freqs(buffer(freqs_, op, "freqs")), phases(buffer(phases_, op, "phases")) {
    check_same_shape(freqs, phases, op, "phases");
  }

 private:
  static View vector(const Tensor& t, const char* op, const char* argument) {
    const View view = dense(t, Format::kContiguous);
    EDM2_CHECK(view.dim == 1, op, argument, "expected one dimension, got shape ", view.shape());
    return view;
  }

  /// In the type computed in: fp64 for fp64, else fp32 (spec 2.5).
  View buffer(const Tensor& t, const char* op, const char* argument) const {
    const ScalarType type = x.scalar_type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    const View view = vector(t, op, argument);
    return view.scalar_type == type ? view : View(torch::stable::to(view.tensor, type));
  }
};

inline MPFourierParams fourier_params(const FourierInputs& in, DType dtype, Tensor* y) {
  const int64_t sizes[2] = {in.x.numel, in.freqs.numel};
  *y = empty(in.x, sizes, 2, Format::kContiguous, in.x.scalar_type);
  return {in.x.data(), in.freqs.data(), in.phases.data(), address(*y), in.x.numel, in.freqs.numel, dtype};
}

struct FourierGradients {
  Tensor x;
  Tensor freqs;
  Tensor phases;

  explicit FourierGradients(const FourierInputs& in)
      : x(empty_like(in.x)), freqs(empty_like(in.freqs)), phases(empty_like(in.phases)) {}

  /// An empty sum is 0.
  void fill_with_zeros() const {
    for (Tensor grad : {x, freqs, phases}) torch::stable::fill_(grad, 0);
  }

  /// Those of the buffers in the types that these were given in.
  std::tuple<Tensor, Tensor, Tensor> as_given(const Tensor& freqs_, const Tensor& phases_) const {
    const auto in_type_of = [](const Tensor& grad, const Tensor& given) {
      const ScalarType type = given.scalar_type();
      return grad.scalar_type() == type ? grad : torch::stable::to(grad, type);
    };
    return {x, in_type_of(freqs, freqs_), in_type_of(phases, phases_)};
  }
};

inline MPFourierBackwardParams fourier_backward_params(const View& grad, const FourierInputs& in,
                                                       const FourierGradients& grads, DType dtype, const char* op) {
  EDM2_CHECK(grad.dim == 2 && grad.sizes[0] == in.x.numel && grad.sizes[1] == in.freqs.numel, op, "grad",
             "expected shape [", in.x.numel, ", ", in.freqs.numel, "], got ", grad.shape());
  check_same_dtype(in.x, grad, op, "grad");
  return {grad.data(),          in.x.data(),           in.freqs.data(), in.phases.data(), address(grads.x),
          address(grads.freqs), address(grads.phases), in.x.numel,      in.freqs.numel,   dtype};
}

}  // namespace edm2::torch_ops
