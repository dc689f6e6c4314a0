#include <vector>

#include "cuda_support.h"
#include "edm2/ema_update.h"

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
  std::vector<View> params;
  std::vector<View> averages;  // in the order of emas; a copy where the format differs from the parameter's
  params.reserve(count);
  averages.reserve(emas.size());
  for (const Tensor& param : params_) {
    params.push_back(dense(param));
    check_same_gpu(params.front(), params.back(), op, "params");
    EDM2_CHECK(params.back().scalar_type == ScalarType::Float, op, "params", "expected float32 on a GPU, got ",
               to_string(params.back().scalar_type));
  }
  for (size_t i = 0; i < emas.size(); ++i) {
    averages.push_back(dense(emas[i], params[i % count].format));
    check_like(params[i % count], averages.back(), op, "emas");
    check_same_gpu(params[i % count], averages.back(), op, "emas");
  }
  std::vector<void*> pointers(emas.size());
  std::vector<EMATensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    for (size_t k = 0; k < profiles; ++k) pointers[i * profiles + k] = averages[k * count + i].data();
    tensors[i] = {params[i].data(), pointers.data() + i * profiles, params[i].numel};
  }
  const EMAUpdateParams call{tensors.data(), weights.data(), static_cast<int64_t>(count),
                             static_cast<int64_t>(profiles), DType::kFloat32};
  run_cuda(params.front(), op, [&](CUstream_st* stream) { return cuda::launch_ema_update(call, stream); });
  for (size_t i = 0; i < emas.size(); ++i) {
    Tensor target = emas[i];
    if (address(target) != averages[i].data()) torch::stable::copy_(target, averages[i].tensor);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_)); }

}  // namespace edm2::torch_ops
