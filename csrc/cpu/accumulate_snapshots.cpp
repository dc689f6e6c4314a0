#include "edm2/accumulate_snapshots.h"

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// Elements and inputs worked on at a time: the block of inputs, widened, and the block of one output stay in the L1
/// cache.
constexpr int64_t kBlock = 1024;
constexpr int64_t kInputs = 4;
/// Outputs whose sums are in the L1 cache until they are stored, and their elements.
constexpr int64_t kOutputs = 25;
constexpr int64_t kStored = 256;

template <class T>
void widen_block(const T* __restrict from, float* __restrict to, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) to[i] = widen(from[i]);
}

void load(const SnapshotInput& input, int64_t at, float* to, int64_t size) {
  if (input.dtype == DType::kFloat32) {
    widen_block(as<float>(input.data) + at, to, size);
  } else if (input.dtype == DType::kFloat16) {
    widen_block(as<Float16>(input.data) + at, to, size);
  } else {
    widen_block(as<BFloat16>(input.data) + at, to, size);
  }
}

template <int64_t kSize>
void add(const float (&block)[kInputs][kSize], const float (&coef)[kInputs], float* __restrict out, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    out[i] += (coef[0] * block[0][i] + coef[1] * block[1][i]) + (coef[2] * block[2][i] + coef[3] * block[3][i]);
  }
}

/// Adds the products of up to kInputs inputs, of which `block` holds `size` elements, to those of one output.
template <int64_t kSize>
void add_products(const AccumulateSnapshotsParams& p, const float (&block)[kInputs][kSize], int64_t first, int64_t m,
                  float* __restrict out, int64_t size) {
  const int64_t count = min(kInputs, p.num_inputs - first);
  float coef[kInputs];
  for (int64_t n = 0; n < count; ++n) coef[n] = static_cast<float>(p.coefs[(first + n) * p.num_outputs + m]);
  if (count == kInputs) {
    add(block, coef, out, size);
    return;
  }
  for (int64_t n = 0; n < count; ++n) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[i] += coef[n] * block[n][i];
  }
}

template <class T>
void add_wide(const T* __restrict input, double coef, double* __restrict total, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) total[i] += coef * static_cast<double>(widen(input[i]));
}

/// Adds the products of all inputs for one output to the fp64 sums of `size` elements.
void add_all_wide(const AccumulateSnapshotsParams& p, int64_t m, int64_t at, double* total, int64_t size) {
  for (int64_t n = 0; n < p.num_inputs; ++n) {
    const double coef = p.coefs[n * p.num_outputs + m];
    if (p.inputs[n].dtype == DType::kFloat32) {
      add_wide(as<float>(p.inputs[n].data) + at, coef, total, size);
    } else if (p.inputs[n].dtype == DType::kFloat16) {
      add_wide(as<Float16>(p.inputs[n].data) + at, coef, total, size);
    } else {
      add_wide(as<BFloat16>(p.inputs[n].data) + at, coef, total, size);
    }
  }
}

/// Every output over all inputs in fp64, rounded once.
void accumulate_compensated(const AccumulateSnapshotsParams& p, int64_t at, int64_t size) {
  alignas(64) double total[kBlock];
  for (int64_t m = 0; m < p.num_outputs; ++m) {
    float* out = as<float>(p.out) + m * p.row_stride + at;
    for (int64_t i = 0; i < size; ++i) total[i] = out[i];
    add_all_wide(p, m, at, total, size);
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<float>(total[i]);
  }
}

void accumulate(const AccumulateSnapshotsParams& p, int64_t at, int64_t size) {
  alignas(64) float block[kInputs][kBlock];
  for (int64_t first = 0; first < p.num_inputs; first += kInputs) {
    const int64_t count = min(kInputs, p.num_inputs - first);
    for (int64_t n = 0; n < count; ++n) load(p.inputs[first + n], at, block[n], size);
    for (int64_t m = 0; m < p.num_outputs; ++m) {
      add_products(p, block, first, m, as<float>(p.out) + m * p.row_stride + at, size);
    }
  }
}

template <class T>
void store(const float* __restrict total, T* __restrict out, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = narrow<T>(total[i]);
}

void store_row(const AccumulateSnapshotsParams& p, int64_t m, int64_t at, const float* total, int64_t size) {
  if (p.out_dtype == DType::kFloat16) {
    store(total, as<Float16>(p.out) + m * p.row_stride + at, size);
  } else {
    store(total, as<float>(p.out) + m * p.row_stride + at, size);
  }
}

void sum_compensated(const AccumulateSnapshotsParams& p, int64_t at, int64_t size) {
  alignas(64) double total[kStored];
  alignas(64) float rounded[kStored];
  for (int64_t m = 0; m < p.num_outputs; ++m) {
    for (int64_t i = 0; i < size; ++i) total[i] = 0;
    add_all_wide(p, m, at, total, size);
    for (int64_t i = 0; i < size; ++i) rounded[i] = static_cast<float>(total[i]);
    store_row(p, m, at, rounded, size);
  }
}

void sum(const AccumulateSnapshotsParams& p, int64_t at, int64_t size) {
  alignas(64) float block[kInputs][kStored];
  alignas(64) float total[kOutputs][kStored];
  for (int64_t first_out = 0; first_out < p.num_outputs; first_out += kOutputs) {
    const int64_t outputs = min(kOutputs, p.num_outputs - first_out);
    for (int64_t m = 0; m < outputs; ++m) {
      for (int64_t i = 0; i < size; ++i) total[m][i] = 0;
    }
    for (int64_t first = 0; first < p.num_inputs; first += kInputs) {
      const int64_t count = min(kInputs, p.num_inputs - first);
      for (int64_t n = 0; n < count; ++n) load(p.inputs[first + n], at, block[n], size);
      for (int64_t m = 0; m < outputs; ++m) add_products(p, block, first, first_out + m, total[m], size);
    }
    for (int64_t m = 0; m < outputs; ++m) store_row(p, first_out + m, at, total[m], size);
  }
}

}  // namespace

void accumulate_snapshots(const AccumulateSnapshotsParams& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t size = min(kBlock, end - at);
    if (p.compensated) {
      accumulate_compensated(p, at, size);
    } else {
      accumulate(p, at, size);
    }
  }
}

void sum_snapshots(const AccumulateSnapshotsParams& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kStored) {
    const int64_t size = min(kStored, end - at);
    if (p.compensated) {
      sum_compensated(p, at, size);
    } else {
      sum(p, at, size);
    }
  }
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
