// What the ops for sums of snapshots share, on CPU and GPU: checks and parameters.
#pragma once

#include "edm2/accumulate_snapshots.h"

#include <vector>

#include "common.h"

namespace edm2::torch_ops {

/// One call of an op: its arguments checked, brought to a layout that the kernels take, and kept alive. `half`: out may
/// be float16 too.
class SnapshotSum {
 public:
  SnapshotSum(const char* op, const Tensor& out, const std::vector<Tensor>& inputs, const Tensor& coefs,
              bool compensated, bool half = false)
      : op_(op),
        given_(out),
        out_(has_dense_rows(out) ? View(out) : dense(out, Format::kContiguous)),
        coefs_(dense(coefs, Format::kContiguous)) {
    EDM2_CHECK(
        out_.dim >= 1 && (out_.scalar_type == ScalarType::Float || (half && out_.scalar_type == ScalarType::Half)), op_,
        "out", "expected ", half ? "float16 or " : "", "float32 of shape [outputs, ...], got ",
        to_string(out_.scalar_type), " of shape ", out_.shape());
    const auto num_inputs = static_cast<int64_t>(inputs.size());
    const int64_t num_outputs = out_.sizes[0];
    EDM2_CHECK(coefs_.scalar_type == ScalarType::Double && coefs_.dim == 2 && coefs_.sizes[0] == num_inputs &&
                   coefs_.sizes[1] == num_outputs,
               op_, "coefs", "expected float64 of shape [", num_inputs, ", ", num_outputs, "], got ",
               to_string(coefs_.scalar_type), " of shape ", coefs_.shape());
    EDM2_CHECK(coefs_.tensor.is_cpu(), op_, "coefs", "expected a tensor on the CPU");
    inputs_.reserve(inputs.size());
    list_.reserve(inputs.size());
    for (const Tensor& input : inputs) add(input);
    const int64_t numel = num_outputs > 0 ? out_.numel / num_outputs : 0;
    params_ = {out_.data(),  dtype_of(out_.scalar_type, op_, "out"),
               list_.data(), static_cast<const double*>(coefs_.data()),
               num_inputs,   num_outputs,
               numel,        num_outputs > 1 ? out_.tensor.strides()[0] : numel,
               compensated};
  }
  SnapshotSum(const SnapshotSum&) = delete;

  const View& out() const { return out_; }
  const std::vector<View>& inputs() const { return inputs_; }
  const AccumulateSnapshotsParams& params() const { return params_; }

  /// Brings the result to where it belongs, if it was made elsewhere.
  void finish() {
    if (address(given_) != out_.data()) torch::stable::copy_(given_, out_.tensor);
  }

 private:
  /// Whether every out[m] is dense.
  static bool has_dense_rows(const Tensor& out) {
    const View view(out);
    return view.dim >= 1 && is_dense(view.sizes + 1, out.strides().data() + 1, view.dim - 1, false);
  }

  void add(const Tensor& tensor) {
    const View& input = inputs_.emplace_back(dense(tensor, Format::kContiguous));
    bool fits = input.dim + 1 == out_.dim;
    for (int64_t i = 0; fits && i < input.dim; ++i) fits = input.sizes[i] == out_.sizes[i + 1];
    EDM2_CHECK(fits, op_, "inputs", "expected shape ", to_string(out_.sizes + 1, out_.dim - 1), ", got ",
               input.shape());
    const DType dtype = dtype_of(input.scalar_type, op_, "inputs");
    EDM2_CHECK(dtype != DType::kFloat64, op_, "inputs", "expected float16, bfloat16 or float32, got Double");
    list_.push_back({input.data(), dtype});
  }

  const char* op_;
  Tensor given_;
  View out_;
  View coefs_;
  std::vector<View> inputs_;
  std::vector<SnapshotInput> list_;
  AccumulateSnapshotsParams params_;
};

}  // namespace edm2::torch_ops
