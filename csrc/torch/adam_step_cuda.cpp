#include "adam_arguments.h"
#include "cuda_support.h"

namespace edm2::torch_ops {
namespace {

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
  EDM2_CHECK(all.first().scalar_type == ScalarType::Float, op, "params", "expected float32 on a GPU, got ",
             to_string(all.first().scalar_type));
  int64_t floats = 0;
  for (const AdamTensor& t : all.tensors) {
    EDM2_CHECK(t.prepared_dtype != DType::kFloat64, op, "prepared",
               "expected float32, float16 or bfloat16 on a GPU, got Double");
    floats += effective && t.gain != nullptr ? t.rows + 3 : 0;
  }
  std::optional<Tensor> row_dots;
  if (floats > 0) {
    row_dots = workspace(all.first(), floats);
    auto* dots = static_cast<float*>(address(*row_dots));
    for (AdamTensor& t : all.tensors) {
      if (t.gain == nullptr) continue;
      t.row_dots = dots;
      dots += t.rows + 3;
    }
  }
  const AdamStepParams call{all.tensors.data(),
                            all.offsets.data(),
                            static_cast<int64_t>(all.tensors.size()),
                            all.profiles,
                            all.scalars,
                            all.loss_scale,
                            DType::kFloat32,
                            beta1,
                            beta2,
                            eps,
                            norm_eps,
                            effective,
                            force};
  run_cuda(all.first(), op, [&](CUstream_st* stream) { return cuda::launch_adam_step(call, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) { m.impl("adam_step_", TORCH_BOX(&adam_step_)); }

}  // namespace edm2::torch_ops
