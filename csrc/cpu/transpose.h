// Transposition of small blocks in the L1 cache.
#pragma once

#include "storage.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns.
template <class T>
void transpose_any(const T* __restrict from, int64_t from_stride, T* __restrict to, int64_t to_stride, int64_t rows,
                   int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

#if defined(__AVX2__)
EDM2_FORMULA void transpose_8x8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 row[8], pair[8], quad[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
  }
}
#endif

/// The same, 8 x 8 floats at a time where there are registers for it.
template <class T>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    const int64_t whole_rows = rows / 8 * 8;
    const int64_t whole_columns = columns / 8 * 8;
    for (int64_t r = 0; r < whole_rows; r += 8) {
      for (int64_t c = 0; c < whole_columns; c += 8) {
        transpose_8x8(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
      }
    }
    transpose_any(from + whole_columns, from_stride, to + whole_columns * to_stride, to_stride, whole_rows,
                  columns - whole_columns);
    transpose_any(from + whole_rows * from_stride, from_stride, to + whole_rows, to_stride, rows - whole_rows, columns);
    return;
  }
#endif
  transpose_any(from, from_stride, to, to_stride, rows, columns);
}

}  // namespace
}  // namespace edm2::cpu::EDM2_CPU_ISA
