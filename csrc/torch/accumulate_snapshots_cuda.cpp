#include "accumulate_snapshots.h"

#include "cuda_support.h"

namespace edm2::torch_ops {
namespace {

constexpr const char* kOp = "accumulate_snapshots_";

void accumulate_snapshots_(const Tensor& out, const std::vector<Tensor>& inputs, const Tensor& coefs,
                           bool compensated) {
  SnapshotSum sum(kOp, out, inputs, coefs, compensated);
  for (const View& input : sum.inputs()) check_same_gpu(sum.out(), input, kOp, "inputs");
  run_cuda(sum.out(), kOp,
           [&](CUstream_st* stream) { return cuda::launch_accumulate_snapshots(sum.params(), stream); });
  sum.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) { m.impl("accumulate_snapshots_", TORCH_BOX(&accumulate_snapshots_)); }

}  // namespace edm2::torch_ops
