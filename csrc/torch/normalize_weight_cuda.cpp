#include <tuple>

#include "cuda_support.h"
#include "weights.h"

namespace edm2::torch_ops {
namespace {

/// The gain's place on the GPU; null without a gain.
const float* gain_on_gpu(const View& w, const std::optional<Tensor>& gain, const char* op, const char* argument) {
  if (!gain) return nullptr;
  const View view(*gain);
  check_same_gpu(w, view, op, argument);
  EDM2_CHECK(view.dim == 0 && view.scalar_type == ScalarType::Float, op, argument,
             "expected a float32 tensor without dimensions on a GPU, got shape ", view.shape(), ", dtype ",
             to_string(view.scalar_type));
  return static_cast<const float*>(view.data());
}

std::vector<Weight> weights_on_gpu(const Tensors& tensors, const char* op) {
  std::vector<Weight> weights = weights_of(tensors, op);
  for (const Weight& w : weights) check_same_gpu(weights.front().view, w.view, op, "weights");
  return weights;
}

/// The type of the result on the GPU.
DType out_dtype_of(ScalarType type, const char* op) {
  const DType dtype = dtype_of(type, op, "dtype");
  EDM2_CHECK(dtype != DType::kFloat64, op, "dtype", "expected float32, float16 or bfloat16 on a GPU, got Double");
  return dtype;
}

void run(const View& first, const Batch<WeightRows>& batch, double eps, bool force, const char* op) {
  const NormalizeWeightParams params{
      batch.tensors.data(), batch.offsets.data(), batch.size(), cuda_dtype_of(first, op, "w"), eps, force};
  run_cuda(first, op, [&](CUstream_st* stream) { return cuda::launch_normalize_weight(params, stream); });
}

Tensor effective(const Weight& w, const float* gain, double factor, double eps, ScalarType type, const char* op) {
  const Tensor out = empty(w.view, w.view.sizes, w.view.dim, w.view.format, type);
  Batch<WeightRows> batch(1);
  batch.add({w.view.data(), address(out), w.rows, w.row_size, 1, gain, factor, out_dtype_of(type, op)});
  run(w.view, batch, eps, false, op);
  return out;
}

Tensor normalize_weight(const Tensor& w_, double eps) {
  const char* op = "normalize_weight";
  const Weight w(w_, op, "w");
  return effective(w, nullptr, 1.0, eps, w.view.scalar_type, op);
}

Tensor effective_weight(const Tensor& w_, const std::optional<Tensor>& gain, double scale, double eps,
                        ScalarType type) {
  const char* op = "effective_weight";
  const Weight w(w_, op, "w");
  return effective(w, gain_on_gpu(w.view, gain, op, "gain"), factor_of(scale, w.row_size), eps, type, op);
}

/// Gradients of weights, and of gains where these are wanted.
struct Gradients {
  Tensors weights;
  Tensors gains;
};

/// The backward for a list of weights with factors but for the gains [same length; null: no gain].
Gradients backward(const Tensors& grads_, const std::vector<Weight>& weights, const std::vector<const float*>& gains,
                   const std::vector<double>& factors, bool gain_gradients, double eps, const char* op,
                   const char* argument) {
  const View& first = weights.front().view;
  Gradients result;
  std::vector<View> grads;
  grads.reserve(weights.size());
  int64_t rows = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_same_gpu(first, View(grads_[i]), op, argument);
    grads.push_back(dense(grads_[i], weights[i].view.format));
    check_same_shape(weights[i].view, grads[i], op, argument);
    check_one_dtype(grads.front(), grads[i], op, argument);
    rows += weights[i].rows;
  }
  std::optional<Tensor> row_dots;
  if (gain_gradients) row_dots = workspace(first, rows);
  auto* dots = gain_gradients ? static_cast<float*>(address(*row_dots)) : nullptr;
  Batch<WeightRowsBackward> batch(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& w = weights[i];
    result.weights.push_back(empty_like(w.view));
    float* grad_gain = nullptr;
    if (gain_gradients) {
      result.gains.push_back(empty(first, nullptr, 0, Format::kContiguous, ScalarType::Float));
      grad_gain = static_cast<float*>(address(result.gains.back()));
    }
    batch.add({grads[i].data(), w.view.data(), address(result.weights.back()), dots, w.rows, w.row_size, gains[i],
               factors[i], grad_gain, factors[i]});
    if (dots != nullptr) dots += w.rows;
  }
  const NormalizeWeightBackwardParams params{batch.tensors.data(),
                                             batch.offsets.data(),
                                             batch.size(),
                                             cuda_dtype_of(first, op, "w"),
                                             cuda_dtype_of(grads.front(), op, argument),
                                             eps};
  run_cuda(first, op, [&](CUstream_st* stream) { return cuda::launch_normalize_weight_backward(params, stream); });
  return result;
}

Tensor normalize_weight_backward(const Tensor& grad, const Tensor& w_, double eps) {
  const char* op = "normalize_weight_backward";
  return backward({grad}, {Weight(w_, op, "w")}, {nullptr}, {1.0}, false, eps, op, "grad").weights[0];
}

std::tuple<Tensor, Tensor> effective_weight_backward(const Tensor& grad, const Tensor& w_,
                                                     const std::optional<Tensor>& gain, double scale, double eps) {
  const char* op = "effective_weight_backward";
  const Weight w(w_, op, "w");
  const float* gain_pointer = gain_on_gpu(w.view, gain, op, "gain");
  const Gradients result = backward({grad}, {w}, {gain_pointer}, {factor_of(scale, w.row_size)}, true, eps, op, "grad");
  return {result.weights[0], result.gains[0]};
}

Tensors effective_weights(const Tensors& tensors, const Tensors& gains, double eps, ScalarType type) {
  const char* op = "effective_weights";
  check_lengths(tensors.size(), gains.size(), op, "gains");
  const std::vector<Weight> weights = weights_on_gpu(tensors, op);
  Tensors outs;
  outs.reserve(weights.size());
  Batch<WeightRows> batch(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& w = weights[i];
    outs.push_back(empty(w.view, w.view.sizes, w.view.dim, w.view.format, type));
    batch.add({w.view.data(), address(outs.back()), w.rows, w.row_size, 1, gain_on_gpu(w.view, gains[i], op, "gains"),
               factor_of(1.0, w.row_size), out_dtype_of(type, op)});
  }
  if (!weights.empty()) run(weights.front().view, batch, eps, false, op);
  return outs;
}

std::tuple<Tensors, Tensors> effective_weights_backward(const Tensors& grads, const Tensors& tensors,
                                                        const Tensors& gains, double eps) {
  const char* op = "effective_weights_backward";
  check_lengths(tensors.size(), gains.size(), op, "gains");
  check_lengths(tensors.size(), grads.size(), op, "grads");
  const std::vector<Weight> weights = weights_on_gpu(tensors, op);
  if (weights.empty()) return {};
  std::vector<const float*> pointers;
  std::vector<double> factors;
  for (size_t i = 0; i < weights.size(); ++i) {
    pointers.push_back(gain_on_gpu(weights[i].view, gains[i], op, "gains"));
    factors.push_back(factor_of(1.0, weights[i].row_size));
  }
  const Gradients result = backward(grads, weights, pointers, factors, true, eps, op, "grads");
  return {result.weights, result.gains};
}

/// Tensors in a format of their own were normalised as copies.
void store_back(const std::vector<Weight>& weights, const Tensors& tensors) {
  for (size_t i = 0; i < weights.size(); ++i) {
    Tensor target = tensors[i];
    if (address(target) != weights[i].view.data()) torch::stable::copy_(target, weights[i].view.tensor);
  }
}

void force_normalize_(const Tensors& tensors, double eps) {
  const char* op = "force_normalize_";
  const std::vector<Weight> weights = weights_on_gpu(tensors, op);
  if (weights.empty()) return;
  Batch<WeightRows> batch(weights.size());
  for (const Weight& w : weights) batch.add({w.view.data(), nullptr, w.rows, w.row_size, 1, nullptr, 1.0, {}});
  run(weights.front().view, batch, eps, true, op);
  store_back(weights, tensors);
}

void prepare_weights(const Tensors& tensors, const OptionalTensors& gains, double eps, bool force,
                     const Tensors& outs_) {
  const char* op = "prepare_weights";
  check_lengths(tensors.size(), gains.size(), op, "gains");
  check_lengths(tensors.size(), outs_.size(), op, "out");
  const std::vector<Weight> weights = weights_on_gpu(tensors, op);
  if (weights.empty()) return;
  std::vector<View> outs;
  outs.reserve(weights.size());
  Batch<WeightRows> batch(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& w = weights[i];
    outs.push_back(effective_of(w, outs_[i], op, "out"));
    check_same_gpu(w.view, outs.back(), op, "out");
    batch.add({w.view.data(), outs.back().data(), w.rows, w.row_size, inner_of(w, outs.back()),
               gain_on_gpu(w.view, gains[i], op, "gains"), factor_of(1.0, w.row_size),
               cuda_dtype_of(outs.back(), op, "out")});
  }
  run(weights.front().view, batch, eps, force, op);
  if (force) store_back(weights, tensors);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
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
