// Weighted sums of snapshots: out[m] += sum_n coefs[n, m] * inputs[n], fp32 sums of fp16, bf16 or fp32 inputs.
#pragma once

#include "edm2/common.h"

namespace edm2 {

struct SnapshotInput {
  const void* data;  // [numel]
  DType dtype;
};

struct AccumulateSnapshotsParams {
  float* out;                   // [num_outputs, numel], rows row_stride elements apart
  const SnapshotInput* inputs;  // [num_inputs], host memory
  const double* coefs;          // [num_inputs, num_outputs], host memory
  int64_t num_inputs;
  int64_t num_outputs;
  int64_t numel;
  int64_t row_stride;
  bool compensated;  // coefficients, products and sums have twice the precision of fp32 until they are stored
};

namespace cpu {
/// Work items are elements of one output.
void accumulate_snapshots(const AccumulateSnapshotsParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Returns a cudaError_t. Inputs and coefficients travel as kernel parameters, in as many launches as their limit
/// needs: one for up to 80 inputs and 7168 coefficients, or 3584 compensated.
int launch_accumulate_snapshots(const AccumulateSnapshotsParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
