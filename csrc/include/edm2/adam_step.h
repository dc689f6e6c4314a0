// One optimizer step over all parameters (spec 4.2, 5.1, 2.6): unscale the gradient; zero and count what is not finite;
// the backward of weight normalisation where the gradient is that of the effective weight; Adam; every power-function
// average of the not yet normalised value; forced normalisation; the effective weight for the next forward.
#pragma once

#include "edm2/common.h"

namespace edm2 {

/// One parameter. All tensors are dense, of the parameter's layout and, but for `prepared`, of its dtype.
struct AdamTensor {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* const* emas;   // [profiles], host memory
  int64_t* nonfinite;  // counts up
  void* prepared;      // takes the effective weight; null: not wanted
  DType prepared_dtype;
  const void* gain;    // a factor of the effective weight, on the parameter's device; null: none
  void* gain_exp_avg;  // with effective gradients: the gain's own state and averages
  void* gain_exp_avg_sq;
  void* const* gain_emas;
  void* row_dots;  // with effective gradients and a gain: [rows] <gradient, y>, double; on the GPU [rows + 3] floats
  int64_t rows;    // of a weight; else 1
  int64_t row_size;
  int64_t inner;  // rows of prepared are the transposes of rows [row_size / inner, inner] of param; 1: the same order
  bool weight;    // whether its rows are normalised
};

struct AdamStepParams {
  const AdamTensor* tensors;  // [num_tensors], host memory
  const int64_t* offsets;     // [num_tensors + 1]: elements before tensor i, all tensors laid end to end
  int64_t num_tensors;
  int64_t profiles;
  const double* scalars;    // lr / (1 - beta1^step), sqrt(1 - beta2^step), then 1 - beta of each average
  const float* loss_scale;  // null: 1
  DType dtype;
  double beta1;
  double beta2;
  double eps;
  double norm_eps;
  bool effective;  // gradients of weights are those of effective weights
  bool force;      // overwrite weights by their normalised rows
};

namespace cpu {
/// Work items are elements of all tensors laid end to end; a call handles the rows that begin in [begin, end), of
/// parameters that are no weights the elements. Gains are left to the caller, and so is what is prepared with them.
void adam_step(const AdamStepParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Returns a cudaError_t. Descriptors travel as kernel parameters, in as many launches as their limit needs, and one
/// more if there are gains.
int launch_adam_step(const AdamStepParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
