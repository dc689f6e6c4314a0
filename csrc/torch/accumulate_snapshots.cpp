#include "edm2/accumulate_snapshots.h"

#include <vector>

#include "common.h"

namespace edm2::torch_ops {
namespace {

void accumulate_snapshots_(const Tensor& out_, const std::vector<Tensor>& inputs_, const Tensor& coefs_) {
  const char* op = "accumulate_snapshots_";
  const View out = dense(out_, Format::kContiguous);
  EDM2_CHECK(out.dim >= 1 && out.scalar_type == ScalarType::Float, op, "out",
             "expected float32 of shape [outputs, ...], got ", to_string(out.scalar_type), " of shape ", out.shape());
  const View coefs = dense(coefs_, Format::kContiguous);
  const int64_t num_inputs = static_cast<int64_t>(inputs_.size());
  EDM2_CHECK(coefs.scalar_type == ScalarType::Double && coefs.dim == 2 && coefs.sizes[0] == num_inputs &&
                 coefs.sizes[1] == out.sizes[0],
             op, "coefs", "expected float64 of shape [", num_inputs, ", ", out.sizes[0], "], got ",
             to_string(coefs.scalar_type), " of shape ", coefs.shape());
  EDM2_CHECK(coefs.tensor.is_cpu(), op, "coefs", "expected a tensor on the CPU");
  std::vector<View> inputs;
  std::vector<SnapshotInput> list;
  inputs.reserve(inputs_.size());
  list.reserve(inputs_.size());
  for (const Tensor& t : inputs_) {
    const View& input = inputs.emplace_back(dense(t, Format::kContiguous));
    bool fits = input.dim + 1 == out.dim;
    for (int64_t i = 0; fits && i < input.dim; ++i) fits = input.sizes[i] == out.sizes[i + 1];
    EDM2_CHECK(fits, op, "inputs", "expected shape ", to_string(out.sizes + 1, out.dim - 1), ", got ", input.shape());
    const DType dtype = dtype_of(input.scalar_type, op, "inputs");
    EDM2_CHECK(dtype != DType::kFloat64, op, "inputs", "expected float16, bfloat16 or float32, got Double");
    list.push_back({input.data(), dtype});
  }
  const int64_t num_outputs = out.sizes[0];
  const int64_t numel = num_outputs > 0 ? out.numel / num_outputs : 0;
  const AccumulateSnapshotsParams params{static_cast<float*>(out.data()),
                                         list.data(),
                                         static_cast<const double*>(coefs.data()),
                                         num_inputs,
                                         num_outputs,
                                         numel};
  run_cpu(cpu::accumulate_snapshots, params, numel, numel, num_inputs);
  Tensor target = out_;
  if (target.data_ptr() != out.data()) torch::stable::copy_(target, out.tensor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) { m.impl("accumulate_snapshots_", TORCH_BOX(&accumulate_snapshots_)); }

}  // namespace edm2::torch_ops
