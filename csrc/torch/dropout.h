// The dropout arguments of an op, the same for CPU and CUDA.
#pragma once

#include "common.h"
#include "edm2/philox.h"

namespace edm2::torch_ops {

/// The dropout of layer `subsequence` that philox, seed and offset, int64 [2] on x's device, defines (philox.h).
inline Dropout dropout_of(const View& philox, int64_t subsequence, int64_t threshold, const Tensor& x, const char* op) {
  EDM2_CHECK(philox.scalar_type == ScalarType::Long && philox.dim == 1 && philox.numel == 2, op, "philox",
             "expected int64 of shape [2], got ", to_string(philox.scalar_type), " of shape ", philox.shape());
  EDM2_CHECK(philox.tensor.device() == x.device(), op, "philox", "expected a tensor on the device of x");
  EDM2_CHECK(subsequence >= 0 && subsequence < 65536, op, "subsequence", "expected 0 to 65535, got ", subsequence);
  EDM2_CHECK(threshold >= 0 && threshold < 65536, op, "threshold", "expected 0 to 65535, got ", threshold);
  return {static_cast<const int64_t*>(philox.data()), subsequence, threshold};
}

}  // namespace edm2::torch_ops
