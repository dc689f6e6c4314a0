// Weighted sums of snapshots, sum_n coefs[n, m] * inputs[n], in fp32, of fp16, bf16 or fp32 inputs: added to out[m], or
// stored there.
#pragma once

#include "edm2/common.h"

namespace edm2 {

struct SnapshotInput {
  const void* data;  // [numel]
  DType dtype;
};

struct AccumulateSnapshotsParams {
  void* out;                    // [num_outputs, numel], rows row_stride elements apart
  DType out_dtype;              // fp32; of sums that are stored also fp16
  const SnapshotInput* inputs;  // [num_inputs], host memory
  const double* coefs;          // [num_inputs, num_outputs], host memory
  int64_t num_inputs;
  int64_t num_outputs;
  int64_t numel;
  int64_t row_stride;
  bool compensated;  // coefficients, products and sums have twice the precision of fp32 until they are stored
};

namespace cpu {
/// Adds to out. Work items are elements of one output.
void accumulate_snapshots(const AccumulateSnapshotsParams& params, int64_t begin, int64_t end);
/// Stores in out what is rounded once, to its type.
void sum_snapshots(const AccumulateSnapshotsParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Returns a cudaError_t. Inputs and coefficients travel as kernel parameters, in as many launches as their limit
/// needs: one for up to 80 inputs and 7168 coefficients, or 3584 compensated.
int launch_accumulate_snapshots(const AccumulateSnapshotsParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
