#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <tuple>

#include "weights.h"

namespace edm2::torch_ops {
namespace {

double value_of(const Tensor& gain, const char* op, const char* argument) {
  const View view(gain);
  EDM2_CHECK(view.dim == 0, op, argument, "expected a tensor without dimensions, got shape ", view.shape());
  EDM2_CHECK(gain.is_cpu(), op, argument, "expected a tensor on the CPU");
  const void* data = gain.const_data_ptr();
  switch (dtype_of(view.scalar_type, op, argument)) {
    case DType::kFloat32:
      return *static_cast<const float*>(data);
    case DType::kFloat64:
      return *static_cast<const double*>(data);
    case DType::kFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::Half*>(data));
    case DType::kBFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::BFloat16*>(data));
  }
  return 0;
}

void run(const Batch<WeightRows>& batch, DType dtype, double eps, bool force = false) {
  const NormalizeWeightParams params{batch.tensors.data(), batch.offsets.data(), batch.size(), dtype, eps, force};
  run_cpu(cpu::normalize_weight, params, batch.offsets.back(), batch.offsets.back());
}

void run(const Batch<WeightRowsBackward>& batch, DType dtype, DType grad_dtype, double eps) {
  const NormalizeWeightBackwardParams params{
      batch.tensors.data(), batch.offsets.data(), batch.size(), dtype, grad_dtype, eps};
  run_cpu(cpu::normalize_weight_backward, params, batch.offsets.back(), batch.offsets.back());
}

DType out_dtype_of(ScalarType type, const char* op) {
  const DType dtype = dtype_of(type, op, "dtype");
  EDM2_CHECK(dtype != DType::kFloat16, op, "dtype", "expected float32, float64 or bfloat16 on the CPU, got Half");
  return dtype;
}

Tensor normalize_weight(const Tensor& w_, double eps) {
  const char* op = "normalize_weight";
  const Weight w(w_, op, "w");
  const DType dtype = cpu_dtype_of(w.view, op, "w");
  const Tensor out = empty_like(w.view);
  Batch<WeightRows> batch(1);
  batch.add({w.view.data(), out.mutable_data_ptr(), w.rows, w.row_size, 1, nullptr, 1.0, dtype});
  run(batch, dtype, eps);
  return out;
}

/// The gradient of w. row_dots [rows], if wanted, receives <grad, y>.
Tensor backward(const Tensor& grad_, const Weight& w, double factor, double eps, double* row_dots, const char* op) {
  const View grad = dense(grad_, w.view.format);
  check_same_shape(w.view, grad, op, "grad");
  const Tensor grad_w = empty_like(w.view);
  Batch<WeightRowsBackward> batch(1);
  batch.add({grad.data(), w.view.data(), grad_w.mutable_data_ptr(), row_dots, w.rows, w.row_size, nullptr, factor,
             nullptr, 0.0});
  run(batch, cpu_dtype_of(w.view, op, "w"), cpu_dtype_of(grad, op, "grad"), eps);
  return grad_w;
}

Tensor normalize_weight_backward(const Tensor& grad, const Tensor& w_, double eps) {
  const char* op = "normalize_weight_backward";
  return backward(grad, Weight(w_, op, "w"), 1.0, eps, nullptr, op);
}

Tensor effective_weight(const Tensor& w_, const std::optional<Tensor>& gain, double scale, double eps,
                        ScalarType type) {
  const char* op = "effective_weight";
  const Weight w(w_, op, "w");
  const DType out_dtype = out_dtype_of(type, op);
  const double factor = factor_of(scale * (gain ? value_of(*gain, op, "gain") : 1.0), w.row_size);
  const Tensor out = empty(w.view, w.view.sizes, w.view.dim, w.view.format, type);
  Batch<WeightRows> batch(1);
  batch.add({w.view.data(), out.mutable_data_ptr(), w.rows, w.row_size, 1, nullptr, factor, out_dtype});
  run(batch, cpu_dtype_of(w.view, op, "w"), eps);
  return out;
}

/// The gain's gradient (spec 2.6) as a 0-dim tensor: fp64 for fp64 weights, else fp32.
Tensor gain_gradient(const View& w, const double* row_dots, int64_t rows, double factor) {
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) sum += row_dots[i];
  const ScalarType type = w.scalar_type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor grad_gain = empty(w, nullptr, 0, Format::kContiguous, type);
  if (type == ScalarType::Double) {
    *static_cast<double*>(grad_gain.mutable_data_ptr()) = sum * factor;
  } else {
    *static_cast<float*>(grad_gain.mutable_data_ptr()) = static_cast<float>(sum * factor);
  }
  return grad_gain;
}

std::tuple<Tensor, Tensor> effective_weight_backward(const Tensor& grad, const Tensor& w_,
                                                     const std::optional<Tensor>& gain, double scale, double eps) {
  const char* op = "effective_weight_backward";
  const Weight w(w_, op, "w");
  const double factor = factor_of(scale * (gain ? value_of(*gain, op, "gain") : 1.0), w.row_size);
  std::vector<double> row_dots(static_cast<size_t>(w.rows), 0.0);
  const Tensor grad_w = backward(grad, w, factor, eps, row_dots.data(), op);
  return {grad_w, gain_gradient(w.view, row_dots.data(), w.rows, factor_of(scale, w.row_size))};
}

Tensors effective_weights(const Tensors& tensors, const Tensors& gains, double eps, ScalarType type) {
  const char* op = "effective_weights";
  check_lengths(tensors.size(), gains.size(), op, "gains");
  const DType out_dtype = out_dtype_of(type, op);
  const std::vector<Weight> weights = weights_of(tensors, op);
  Batch<WeightRows> batch(weights.size());
  Tensors outs;
  outs.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& w = weights[i];
    outs.push_back(empty(w.view, w.view.sizes, w.view.dim, w.view.format, type));
    batch.add({w.view.data(), outs.back().mutable_data_ptr(), w.rows, w.row_size, 1, nullptr,
               factor_of(value_of(gains[i], op, "gains"), w.row_size), out_dtype});
  }
  if (!weights.empty()) run(batch, cpu_dtype_of(weights.front().view, op, "weights"), eps);
  return outs;
}

std::tuple<Tensors, Tensors> effective_weights_backward(const Tensors& grads_, const Tensors& tensors,
                                                        const Tensors& gains, double eps) {
  const char* op = "effective_weights_backward";
  check_lengths(tensors.size(), gains.size(), op, "gains");
  check_lengths(tensors.size(), grads_.size(), op, "grads");
  const std::vector<Weight> weights = weights_of(tensors, op);
  if (weights.empty()) return {};
  std::vector<View> grads;
  grads.reserve(weights.size());
  Tensors grad_weights, grad_gains;
  size_t rows = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    grads.push_back(dense(grads_[i], weights[i].view.format));
    check_same_shape(weights[i].view, grads[i], op, "grads");
    check_one_dtype(grads.front(), grads[i], op, "grads");
    rows += static_cast<size_t>(weights[i].rows);
  }
  std::vector<double> row_dots(rows, 0.0);
  Batch<WeightRowsBackward> batch(weights.size());
  double* dots = row_dots.data();
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& w = weights[i];
    grad_weights.push_back(empty_like(w.view));
    batch.add({grads[i].data(), w.view.data(), grad_weights.back().mutable_data_ptr(), dots, w.rows, w.row_size,
               nullptr, factor_of(value_of(gains[i], op, "gains"), w.row_size), nullptr, 0.0});
    dots += w.rows;
  }
  run(batch, cpu_dtype_of(weights.front().view, op, "weights"), cpu_dtype_of(grads.front(), op, "grads"), eps);
  dots = row_dots.data();
  for (const Weight& w : weights) {
    grad_gains.push_back(gain_gradient(w.view, dots, w.rows, factor_of(1.0, w.row_size)));
    dots += w.rows;
  }
  return {grad_weights, grad_gains};
}

/// Tensors in a format of their own were normalised as copies.
void store_back(const std::vector<Weight>& weights, const Tensors& tensors) {
  for (size_t i = 0; i < weights.size(); ++i) {
    Tensor target = tensors[i];
    if (target.data_ptr() != weights[i].view.data()) torch::stable::copy_(target, weights[i].view.tensor);
  }
}

void force_normalize_(const Tensors& tensors, double eps) {
  const char* op = "force_normalize_";
  const std::vector<Weight> weights = weights_of(tensors, op);
  if (weights.empty()) return;
  Batch<WeightRows> batch(weights.size());
  for (const Weight& w : weights) batch.add({w.view.data(), nullptr, w.rows, w.row_size, 1, nullptr, 1.0, {}});
  run(batch, cpu_dtype_of(weights.front().view, op, "weights"), eps, true);
  store_back(weights, tensors);
}

void prepare_weights(const Tensors& tensors, const OptionalTensors& gains, double eps, bool force,
                     const Tensors& outs_) {
  const char* op = "prepare_weights";
  check_lengths(tensors.size(), gains.size(), op, "gains");
  check_lengths(tensors.size(), outs_.size(), op, "out");
  const std::vector<Weight> weights = weights_of(tensors, op);
  if (weights.empty()) return;
  std::vector<View> outs;
  outs.reserve(weights.size());
  Batch<WeightRows> batch(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& w = weights[i];
    outs.push_back(effective_of(w, outs_[i], op, "out"));
    const double gain = gains[i] ? value_of(*gains[i], op, "gains") : 1.0;
    batch.add({w.view.data(), outs.back().data(), w.rows, w.row_size, inner_of(w, outs.back()), nullptr,
               factor_of(gain, w.row_size), cpu_dtype_of(outs.back(), op, "out")});
  }
  run(batch, cpu_dtype_of(weights.front().view, op, "weights"), eps, force);
  if (force) store_back(weights, tensors);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("normalize_weight", TORCH_BOX(&normalize_weight));
  m.impl("normalize_weight_backward", TORCH_BOX(&normalize_weight_backward));
  m.impl("effective_weight", TORCH_BOX(&effective_weight));
  m.impl("effective_weight_backward", TORCH_BOX(&effective_weight_backward));
  m.impl("effective_weights", TORCH_BOX(&effective_weights));
  m.impl("effective_weights_backward", TORCH_BOX(&effective_weights_backward));
  m.impl("force_normalize_", TORCH_BOX(&force_normalize_));
  m.impl("prepare_weights", TORCH_BOX(&prepare_weights));
}

}  // namespace edm2::torch_ops
