// The arguments of adam_step_ as its kernels take them.
#pragma once

#include <optional>
#include <vector>

#include "edm2/adam_step.h"
#include "weights.h"

namespace edm2::torch_ops {

/// What the schema of adam_step_ says. Lists run parallel to params: weights (whether rows are normalised), gains
/// (index of the parameter that is the weight's gain, or -1), counters (index into nonfinite). emas is profile-major;
/// prepared_of says whose effective weights `prepared` takes.
struct AdamArguments {
  const Tensors& params;
  const OptionalTensors& grads;  // none: a gain that gets its gradient from its weight's
  const Tensors& exp_avgs;
  const Tensors& exp_avg_sqs;
  const Tensors& emas;
  const Tensors& prepared;
  const std::vector<int64_t>& prepared_of;
  const std::vector<int64_t>& weights;
  const std::vector<int64_t>& gains;
  const std::vector<int64_t>& counters;
  const Tensor& scalars;
  const std::optional<Tensor>& loss_scale;
  const Tensor& nonfinite;
  bool effective;
};

/// The same, checked, as descriptors of those parameters that have gradients. Keeps what these point to.
struct AdamDescriptors {
  static constexpr const char* kOp = "adam_step_";

  std::vector<View> params;
  std::vector<View> kept;
  std::vector<std::vector<void*>> emas;  // [params][profiles]
  std::vector<void*> exp_avgs;
  std::vector<void*> exp_avg_sqs;
  std::vector<AdamTensor> tensors;
  std::vector<int64_t> offsets{0};
  std::vector<size_t> gain_of;  // of each descriptor whose gain is stepped with it: index into params
  int64_t profiles;
  const double* scalars;
  const float* loss_scale;

  explicit AdamDescriptors(const AdamArguments& a) {
    const size_t count = a.params.size();
    const auto check_count = [&](size_t got, const char* argument) {
      EDM2_CHECK(got == count, kOp, argument, "expected one entry per parameter, ", count, ", got ", got);
    };
    check_count(a.grads.size(), "grads");
    check_count(a.exp_avgs.size(), "exp_avgs");
    check_count(a.exp_avg_sqs.size(), "exp_avg_sqs");
    check_count(a.weights.size(), "weights");
    check_count(a.gains.size(), "gains");
    check_count(a.counters.size(), "counters");
    EDM2_CHECK(a.prepared.size() == a.prepared_of.size(), kOp, "prepared_of", "expected one entry per prepared weight");
    EDM2_CHECK(a.emas.size() % count == 0, kOp, "emas", "expected a multiple of ", count, " tensors, got ",
               a.emas.size());
    profiles = static_cast<int64_t>(a.emas.size() / count);
    kept.reserve(4 * count + a.emas.size() + 3);
    params.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      params.emplace_back(a.params[i]);
      EDM2_CHECK(params[i].format != Format::kOther, kOp, "params", "expected contiguous or channels_last tensors");
      check_like_first(params[i], "params");
      exp_avgs.push_back(beside(params[i], a.exp_avgs[i], "exp_avgs"));
      exp_avg_sqs.push_back(beside(params[i], a.exp_avg_sqs[i], "exp_avg_sqs"));
      emas.emplace_back();
      for (int64_t k = 0; k < profiles; ++k) {
        emas[i].push_back(beside(params[i], a.emas[static_cast<size_t>(k) * count + i], "emas"));
      }
    }
    scalars = static_cast<const double*>(small(a.scalars, 2 + profiles, ScalarType::Double, "scalars"));
    loss_scale = nullptr;
    if (a.loss_scale) loss_scale = static_cast<const float*>(small(*a.loss_scale, 1, ScalarType::Float, "loss_scale"));
    const View counts(a.nonfinite);
    auto* counter = static_cast<int64_t*>(small(a.nonfinite, counts.numel, ScalarType::Long, "nonfinite"));
    for (size_t i = 0; i < count; ++i) {
      if (!a.grads[i]) continue;
      EDM2_CHECK(a.counters[i] >= 0 && a.counters[i] < counts.numel, kOp, "counters", "out of range: ", a.counters[i]);
      describe(a, i, counter + a.counters[i]);
    }
    for (size_t j = 0; j < a.prepared.size(); ++j) add_prepared(a, j);
  }

  const View& first() const { return params.front(); }
  int64_t numel() const { return offsets.back(); }

 private:
  std::vector<size_t> descriptor_of_;  // parameter -> descriptor + 1

  void check_like_first(const View& view, const char* argument) const {
    check_same_dtype(first(), view, kOp, argument);
    EDM2_CHECK(first().tensor.device() == view.tensor.device(), kOp, argument, "expected all tensors on one device");
  }

  /// Where a tensor like the parameter, in its layout, lies.
  void* beside(const View& param, const Tensor& t, const char* argument) {
    const View& view = kept.emplace_back(t);
    check_like(param, view, kOp, argument);
    check_like_first(view, argument);
    EDM2_CHECK(view.format == param.format, kOp, argument, "expected the parameter's memory format");
    return view.data();
  }

  void* small(const Tensor& t, int64_t numel, ScalarType type, const char* argument) {
    const View& view = kept.emplace_back(t);
    EDM2_CHECK(view.numel == numel && view.scalar_type == type && view.format == Format::kContiguous, kOp, argument,
               "expected ", numel, " elements of ", to_string(type), ", got ", view.numel, " of ",
               to_string(view.scalar_type));
    EDM2_CHECK(first().tensor.device() == t.device(), kOp, argument, "expected a tensor on the parameters' device");
    return view.data();
  }

  void describe(const AdamArguments& a, size_t i, int64_t* counter) {
    const View& param = params[i];
    const View& grad = kept.emplace_back(dense(*a.grads[i], param.format));
    check_like(param, grad, kOp, "grads");
    check_like_first(grad, "grads");
    AdamTensor t = {};
    t.param = param.data();
    t.grad = grad.data();
    t.exp_avg = exp_avgs[i];
    t.exp_avg_sq = exp_avg_sqs[i];
    t.emas = emas[i].data();
    t.nonfinite = counter;
    t.rows = 1;
    t.row_size = param.numel;
    t.inner = 1;
    t.weight = a.weights[i] != 0;
    if (t.weight) {
      EDM2_CHECK(param.dim >= 2, kOp, "params", "expected weights of shape [out, in, ...], got ", param.shape());
      t.rows = param.sizes[0];
      t.row_size = t.rows > 0 ? param.numel / t.rows : 0;
    }
    size_t gain = params.size();
    if (a.gains[i] >= 0) {
      gain = static_cast<size_t>(a.gains[i]);
      EDM2_CHECK(t.weight && gain < params.size() && params[gain].dim == 0, kOp, "gains",
                 "expected the indices of parameters without dimensions, for weights only");
      t.gain = params[gain].data();
      EDM2_CHECK(a.effective != a.grads[gain].has_value(), kOp, "grads", "expected ", a.effective ? "no" : "a",
                 " gradient for a gain");
      t.gain_exp_avg = exp_avgs[gain];
      t.gain_exp_avg_sq = exp_avg_sqs[gain];
      t.gain_emas = emas[gain].data();
    }
    if (descriptor_of_.empty()) descriptor_of_.resize(params.size());
    tensors.push_back(t);
    gain_of.push_back(gain);
    offsets.push_back(offsets.back() + param.numel);
    descriptor_of_[i] = tensors.size();
  }

  void add_prepared(const AdamArguments& a, size_t j) {
    const auto i = static_cast<size_t>(a.prepared_of[j]);
    EDM2_CHECK(i < params.size() && a.grads[i] && a.weights[i] != 0, kOp, "prepared_of",
               "expected the index of a weight with a gradient, got ", a.prepared_of[j]);
    const Weight weight(a.params[i], kOp, "params");
    const View out = effective_of(weight, a.prepared[j], kOp, "prepared");
    EDM2_CHECK(first().tensor.device() == out.tensor.device(), kOp, "prepared", "expected all tensors on one device");
    AdamTensor& t = tensors[descriptor_of_[i] - 1];
    t.prepared = out.data();
    t.prepared_dtype = dtype_of(out.scalar_type, kOp, "prepared");
    t.inner = inner_of(weight, out);
  }
};

}  // namespace edm2::torch_ops
