// Weight normalisation over rows (spec 2.1 and 2.6): y = w / (eps + rms(row)), and the effective weight
// gain / sqrt(fan_in) * y. A call covers a whole list of tensors.
#pragma once

#include "edm2/common.h"

namespace edm2 {

/// One weight tensor as [rows, row_size], row by row in memory.
struct WeightRows {
  void* w;    // written to by forced normalisation only
  void* out;  // null: not wanted
  int64_t rows;
  int64_t row_size;
  int64_t inner;      // rows of out are the transposes of rows [row_size / inner, inner] of w; 1: the same order
  const float* gain;  // on the GPU, a factor more; null: none. For the CPU it is part of factor.
  double factor;      // what the normalised rows are multiplied with: gain / sqrt(row_size), or 1
  DType out_dtype;
};

struct NormalizeWeightParams {
  const WeightRows* tensors;  // [num_tensors], host memory
  const int64_t* offsets;     // [num_tensors + 1]: elements before tensor i, all tensors laid end to end
  int64_t num_tensors;
  DType dtype;  // of w
  double eps;
  bool force;  // first overwrite w by its normalised rows (Eq. 66)
};

struct WeightRowsBackward {
  const void* grad;  // of the result, type grad_dtype
  const void* w;
  void* grad_w;
  void* row_dots;  // [rows] <grad, y>, the rows' shares of the gain's gradient (double; GPU: float); null: not wanted
  int64_t rows;
  int64_t row_size;
  const float* gain;  // as above
  double factor;
  float* grad_gain;         // on the GPU: the sum of row_dots times gain_grad_factor; null: not wanted
  double gain_grad_factor;  // factor without the gain
};

struct NormalizeWeightBackwardParams {
  const WeightRowsBackward* tensors;  // [num_tensors], host memory
  const int64_t* offsets;             // [num_tensors + 1]
  int64_t num_tensors;
  DType dtype;       // of w and grad_w
  DType grad_dtype;  // of grad
  double eps;
};

namespace cpu {
/// Work items are elements of all tensors laid end to end; a call handles the rows that begin in [begin, end).
void normalize_weight(const NormalizeWeightParams& params, int64_t begin, int64_t end);
void normalize_weight_backward(const NormalizeWeightBackwardParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Launches return a cudaError_t. Descriptors travel as kernel parameters, in as many launches as their limit needs.
int launch_normalize_weight(const NormalizeWeightParams& params, CUstream_st* stream);
int launch_normalize_weight_backward(const NormalizeWeightBackwardParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
