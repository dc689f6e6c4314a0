#include "accumulate_snapshots.h"

namespace edm2::torch_ops {
namespace {

void accumulate_snapshots_(const Tensor& out, const std::vector<Tensor>& inputs, const Tensor& coefs,
                           bool compensated) {
  SnapshotSum sum("accumulate_snapshots_", out, inputs, coefs, compensated);
  run_cpu(cpu::accumulate_snapshots, sum.params(), sum.params().numel, sum.params().numel, sum.params().num_inputs);
  sum.finish();
}

void sum_snapshots_(const Tensor& out, const std::vector<Tensor>& inputs, const Tensor& coefs, bool compensated) {
  SnapshotSum sum("sum_snapshots_", out, inputs, coefs, compensated, true);
  run_cpu(cpu::sum_snapshots, sum.params(), sum.params().numel, sum.params().numel, sum.params().num_inputs);
  sum.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("accumulate_snapshots_", TORCH_BOX(&accumulate_snapshots_));
  m.impl("sum_snapshots_", TORCH_BOX(&sum_snapshots_));
}

}  // namespace edm2::torch_ops
