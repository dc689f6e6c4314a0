// Weighted sums of snapshots: out[m] += sum_n coefs[n, m] * inputs[n], fp32 sums of fp16, bf16 or fp32 inputs.
#pragma once

#include "edm2/common.h"

namespace edm2 {

struct SnapshotInput {
  const void* data;  // [numel]
  DType dtype;
};

struct AccumulateSnapshotsParams {
  float* out;                   // [num_outputs, numel]
  const SnapshotInput* inputs;  // [num_inputs], host memory
  const double* coefs;          // [num_inputs, num_outputs], host memory
  int64_t num_inputs;
  int64_t num_outputs;
  int64_t numel;
};

namespace cpu {
/// Work items are elements of one output.
void accumulate_snapshots(const AccumulateSnapshotsParams& params, int64_t begin, int64_t end);
}  // namespace cpu

}  // namespace edm2
