// What the CPU and the CUDA half of cosine attention share.
#pragma once

#include "edm2/cosine_attention.h"

#include "common.h"

namespace edm2::torch_ops {

/// channels = 3 * heads * head_dim.
inline int64_t head_dim_of(const Activation& shape, int64_t heads, const char* op) {
  EDM2_CHECK(heads > 0, op, "heads", "expected at least 1, got ", heads);
  EDM2_CHECK(shape.channels > 0 && shape.channels % (3 * heads) == 0, op, "qkv",
             "expected a multiple of 3 * heads = ", 3 * heads, " channels, got ", shape.channels);
  return shape.channels / (3 * heads);
}

/// A gradient of q, k or v, checked: [batch, heads, pixels, head_dim] in qkv's dtype.
inline const Tensor& part_gradient(const Tensor& grad, const View& qkv, const Activation& shape, int64_t heads,
                                   const char* op, const char* argument) {
  const int64_t sizes[4] = {shape.batch, heads, shape.pixels, head_dim_of(shape, heads, op)};
  const View view(grad);
  bool fits = view.dim == 4;
  for (int64_t i = 0; fits && i < 4; ++i) fits = view.sizes[i] == sizes[i];
  EDM2_CHECK(fits, op, argument, "expected shape ", to_string(sizes, 4), ", got ", view.shape());
  check_same_dtype(qkv, view, op, argument);
  return grad;
}

}  // namespace edm2::torch_ops
