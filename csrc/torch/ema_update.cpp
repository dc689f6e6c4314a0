#include "edm2/ema_update.h"

#include <vector>

#include "common.h"

namespace edm2::torch_ops {
namespace {

using Tensors = std::vector<Tensor>;

void ema_update_(const Tensors& emas, const Tensors& params_, const std::vector<double>& weights) {
  const char* op = "ema_update_";
  const size_t count = params_.size();
  const size_t profiles = weights.size();
  EDM2_CHECK(emas.size() == count * profiles, op, "emas", "expected profiles * parameters = ", count * profiles,
             " tensors, got ", emas.size());
  if (emas.empty()) return;
  std::vector<View> params,
      averages;  // averages in the order of emas; a copy where the format differs from the parameter's
  params.reserve(count);
  averages.reserve(emas.size());
  for (const Tensor& param : params_) {
    params.push_back(dense(param));
    EDM2_CHECK(params.back().scalar_type == params.front().scalar_type, op, "params",
               "expected tensors of one dtype, got ", to_string(params.front().scalar_type), " and ",
               to_string(params.back().scalar_type));
  }
  for (size_t i = 0; i < emas.size(); ++i) {
    averages.push_back(dense(emas[i], params[i % count].format));
    check_like(params[i % count], averages.back(), op, "emas");
  }
  std::vector<void*> pointers(emas.size());
  std::vector<EMATensor> tensors(count);
  int64_t numel = 0;
  for (size_t i = 0; i < count; ++i) {
    for (size_t k = 0; k < profiles; ++k) pointers[i * profiles + k] = averages[k * count + i].data();
    tensors[i] = {params[i].data(), pointers.data() + i * profiles, params[i].numel};
    numel += params[i].numel;
  }
  const EMAUpdateParams call{tensors.data(), weights.data(), static_cast<int64_t>(count),
                             static_cast<int64_t>(profiles), cpu_dtype_of(params.front(), op, "params")};
  run_cpu(cpu::ema_update, call, numel, numel, static_cast<int64_t>(profiles));
  for (size_t i = 0; i < emas.size(); ++i) {
    Tensor target = emas[i];
    if (target.data_ptr() != averages[i].data()) torch::stable::copy_(target, averages[i].tensor);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_)); }

}  // namespace edm2::torch_ops
