// The functions of csrc/cuda/tensor_core.cuh for the emulation: asynchronous copies that are made when the thread waits
// for them, and what the 32 lanes of a warp do together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

namespace emulation {

/// Groups of 8 rows that load_matrices read, and those of them of which two rows lay in the same banks.
struct BankCounts {
  int64_t reads = 0;
  int64_t conflicts = 0;
};
inline BankCounts bank_counts;

}  // namespace emulation

namespace edm2::cuda {

inline void copy_async(void* shared, const void* source, bool wanted) {
  emulation::start_copy(shared, wanted ? source : nullptr, 16);
}

inline void commit_copies() { emulation::end_copy_group(); }

template <int Groups>
void await_copies() {
  emulation::await_copy_groups(Groups);
}

namespace emulated {

struct MatrixRow {
  const unsigned char* row;
  uint32_t* matrices;
};

template <bool Transposed>
void load_matrices(unsigned mask, void** lanes) {
  if (mask != 0xffffffffu) __builtin_trap();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t rows[8][8];
    unsigned banks = 0;
    for (int i = 0; i < 8; ++i) {
      const unsigned char* row = static_cast<MatrixRow*>(lanes[8 * matrix + i])->row;
      memcpy(rows[i], row, 16);
      banks |= 1u << reinterpret_cast<uintptr_t>(row) / 16 % 8;
    }
    ++emulation::bank_counts.reads;
    emulation::bank_counts.conflicts += banks != 0xff;
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4;
      const int j = lane % 4 * 2;
      const uint32_t low = Transposed ? rows[j][i] : rows[i][j];
      const uint32_t high = Transposed ? rows[j + 1][i] : rows[i][j + 1];
      static_cast<MatrixRow*>(lanes[lane])->matrices[matrix] = low | high << 16;
    }
  }
}

template <typename T>
float half_of(uint32_t pair, int half) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * half);
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(__half{bits});
  } else {
    return __bfloat162float(__nv_bfloat16{bits});
  }
}

struct Product {
  float* sums;
  const uint32_t* a;
  uint32_t b[2];
};

/// Products of 16-bit numbers are exact in fp32; their sum is rounded once per addition here, in an order of its own.
template <typename T>
void multiply_add(unsigned mask, void** lanes) {
  if (mask != 0xffffffffu) __builtin_trap();
  float a[16][16];
  float b[8][16];  // a column after the other
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<Product*>(lanes[lane]);
    const int i = lane / 4;
    const int j = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        a[i + matrix % 2 * 8][j + matrix / 2 * 8 + half] = half_of<T>(own.a[matrix], half);
      }
      for (int matrix = 0; matrix < 2; ++matrix) b[i][j + matrix * 8 + half] = half_of<T>(own.b[matrix], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* sums = static_cast<Product*>(lanes[lane])->sums;
    for (int k = 0; k < 4; ++k) {
      const float* row = a[lane / 4 + k / 2 * 8];
      const float* column = b[lane % 4 * 2 + k % 2];
      float sum = 0.0f;
      for (int depth = 0; depth < 16; ++depth) sum += row[depth] * column[depth];
      sums[k] += sum;
    }
  }
}

}  // namespace emulated

template <bool Transposed>
void load_matrices(uint32_t (&matrices)[4], const void* row,
                   std::source_location where = std::source_location::current()) {
  emulated::MatrixRow own{static_cast<const unsigned char*>(row), matrices};
  emulation::warp_collective(0xffffffffu, &own, emulated::load_matrices<Transposed>, where);
}

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  std::source_location where = std::source_location::current()) {
  emulated::Product own{sums, a, {b0, b1}};
  emulation::warp_collective(0xffffffffu, &own, emulated::multiply_add<T>, where);
}

}  // namespace edm2::cuda
