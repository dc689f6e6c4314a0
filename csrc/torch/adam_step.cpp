#include "adam_arguments.h"

namespace edm2::torch_ops {
namespace {

/// The gain's step, its gradient being the sum of the rows' shares (spec 2.6).
template <class T>
void step_gain(const AdamStepParams& call, const AdamTensor& weight) {
  const auto* dots = static_cast<const double*>(weight.row_dots);
  double sum = 0;
  for (int64_t row = 0; row < weight.rows; ++row) sum += dots[row];
  const T grad = static_cast<T>(sum * factor_of(1.0, weight.row_size));
  int64_t nonfinite = 0;
  AdamTensor gain = {};
  gain.param = const_cast<void*>(weight.gain);
  gain.grad = &grad;
  gain.exp_avg = weight.gain_exp_avg;
  gain.exp_avg_sq = weight.gain_exp_avg_sq;
  gain.emas = weight.gain_emas;
  gain.nonfinite = &nonfinite;
  gain.rows = gain.row_size = gain.inner = 1;
  const int64_t offsets[] = {0, 1};
  AdamStepParams single = call;
  single.tensors = &gain;
  single.offsets = offsets;
  single.num_tensors = 1;
  single.loss_scale = nullptr;  // the rows' shares are without
  cpu::adam_step(single, 0, 1);
}

void adam_step_(const Tensors& params, const OptionalTensors& grads, const Tensors& exp_avgs,
                const Tensors& exp_avg_sqs, const Tensors& emas, const Tensors& prepared,
                const std::vector<int64_t>& prepared_of, const std::vector<int64_t>& weights,
                const std::vector<int64_t>& gains, const std::vector<int64_t>& counters, const Tensor& scalars,
                const std::optional<Tensor>& loss_scale, const Tensor& nonfinite, double beta1, double beta2,
                double eps, double norm_eps, bool effective, bool force) {
  const char* op = AdamDescriptors::kOp;
  if (params.empty()) return;
  AdamDescriptors all({params, grads, exp_avgs, exp_avg_sqs, emas, prepared, prepared_of, weights, gains, counters,
                       scalars, loss_scale, nonfinite, effective});
  const DType dtype = cpu_dtype_of(all.first(), op, "params");
  EDM2_CHECK(dtype != DType::kBFloat16, op, "params", "expected float32 or float64 on the CPU, got BFloat16");
  std::vector<std::vector<double>> row_dots;
  row_dots.reserve(all.tensors.size());
  for (AdamTensor& t : all.tensors) {
    EDM2_CHECK(t.prepared_dtype != DType::kFloat16, op, "prepared", "expected float32, float64 or bfloat16 on the CPU");
    if (!effective || t.gain == nullptr) continue;
    t.row_dots = row_dots.emplace_back(static_cast<size_t>(t.rows)).data();
  }
  const AdamStepParams call{all.tensors.data(),
                            all.offsets.data(),
                            static_cast<int64_t>(all.tensors.size()),
                            all.profiles,
                            all.scalars,
                            all.loss_scale,
                            dtype,
                            beta1,
                            beta2,
                            eps,
                            norm_eps,
                            effective,
                            force};
  run_cpu(cpu::adam_step, call, all.numel(), all.numel(), 4 + all.profiles);
  Batch<WeightRows> batch(all.tensors.size());
  for (const AdamTensor& t : all.tensors) {
    if (t.gain == nullptr) continue;
    if (t.row_dots != nullptr && t.rows > 0) {
      dtype == DType::kFloat64 ? step_gain<double>(call, t) : step_gain<float>(call, t);
    }
    if (t.prepared == nullptr) continue;
    const double gain =
        dtype == DType::kFloat64 ? *static_cast<const double*>(t.gain) : *static_cast<const float*>(t.gain);
    batch.add(
        {t.param, t.prepared, t.rows, t.row_size, t.inner, nullptr, factor_of(gain, t.row_size), t.prepared_dtype});
  }
  const NormalizeWeightParams rest{batch.tensors.data(), batch.offsets.data(), batch.size(), dtype, norm_eps, false};
  run_cpu(cpu::normalize_weight, rest, batch.offsets.back(), batch.offsets.back());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) { m.impl("adam_step_", TORCH_BOX(&adam_step_)); }

}  // namespace edm2::torch_ops
