// What the torch layers of weight normalisation share, on the CPU and on GPUs.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "common.h"
#include "edm2/normalize_weight.h"

namespace edm2::torch_ops {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

/// A weight [rows, ...]: every row lies together in memory, in both formats.
struct Weight {
  View view;
  int64_t rows;
  int64_t row_size;

  Weight(const Tensor& t, const char* op, const char* argument) : view(dense(t)) {
    EDM2_CHECK(view.dim >= 2, op, argument, "expected shape [out, in, ...], got ", view.shape());
    rows = view.sizes[0];
    row_size = 1;
    for (int64_t i = 1; i < view.dim; ++i) row_size *= view.sizes[i];
  }
};

/// gain / sqrt(fan-in) (spec 2.6, step 4).
inline double factor_of(double gain, int64_t fan_in) {
  return fan_in > 0 ? gain / std::sqrt(static_cast<double>(fan_in)) : 0;
}

/// Collects tensors of one dtype for one call of a kernel.
template <class Rows>
struct Batch {
  std::vector<Rows> tensors;
  std::vector<int64_t> offsets{0};

  explicit Batch(size_t size) {
    tensors.reserve(size);
    offsets.reserve(size + 1);
  }
  void add(const Rows& rows) {
    tensors.push_back(rows);
    offsets.push_back(offsets.back() + rows.rows * rows.row_size);
  }
  int64_t size() const { return static_cast<int64_t>(tensors.size()); }
};

inline void check_one_dtype(const View& first, const View& view, const char* op, const char* argument) {
  EDM2_CHECK(first.scalar_type == view.scalar_type, op, argument, "expected tensors of one dtype, got ",
             to_string(first.scalar_type), " and ", to_string(view.scalar_type));
}

inline std::vector<Weight> weights_of(const Tensors& tensors, const char* op) {
  std::vector<Weight> weights;
  weights.reserve(tensors.size());
  for (const Tensor& t : tensors) {
    weights.emplace_back(t, op, "weights");
    check_one_dtype(weights.front().view, weights.back().view, op, "weights");
  }
  return weights;
}

inline void check_lengths(size_t expected, size_t got, const char* op, const char* argument) {
  EDM2_CHECK(expected == got, op, argument, "expected as many as weights, ", expected, ", got ", got);
}

/// A tensor that takes the effective weight of w: its shape, in either format.
inline View effective_of(const Weight& w, const Tensor& out, const char* op, const char* argument) {
  const View view(out);
  check_same_shape(w.view, view, op, argument);
  EDM2_CHECK(view.format != Format::kOther, op, argument, "expected a contiguous or channels_last tensor");
  return view;
}

/// `inner` of WeightRows for writing w's rows in the format of out: rows are [channels, pixels] where contiguous and
/// [pixels, channels] where channels_last.
inline int64_t inner_of(const Weight& w, const View& out) {
  if (w.view.format == out.format) return 1;
  const int64_t channels = w.view.sizes[1];
  return w.view.format == Format::kContiguous ? w.row_size / channels : channels;
}

}  // namespace edm2::torch_ops
