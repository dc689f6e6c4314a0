#include "edm2/mp_sum.h"

#include <cstring>

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

template <class T>
void sum(const T* __restrict a, const T* __restrict b, T* __restrict y, Compute<T> wa, Compute<T> wb, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = narrow<T>(wa * widen(a[i]) + wb * widen(b[i]));
}

template <class T>
void sum_clamped(const T* __restrict a, const T* __restrict b, T* __restrict y, Compute<T> wa, Compute<T> wb,
                 Compute<T> clip, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = narrow<T>(math::clamp(wa * widen(a[i]) + wb * widen(b[i]), clip));
}

/// Elements that are summed in one go where there is a mask.
constexpr int64_t kBlock = 8 * kMaskedTogether;

/// Eight bytes of 0 or 1, the first in the lowest bit.
EDM2_FORMULA uint8_t packed(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return static_cast<uint8_t>((word * 0x0102040810204080u) >> 56);
}

/// The bits of a byte in a byte each: 0 or not.
EDM2_FORMULA void unpack(uint8_t bits, uint8_t* bytes) {
  const uint64_t word = bits * 0x0101010101010101u & 0x8040201008040201u;
  std::memcpy(bytes, &word, sizeof(word));
}

/// Of a block, whole or less: the sums, clamped, and their mask.
template <class T>
EDM2_FORMULA void sum_masked(const T* __restrict a, const T* __restrict b, T* __restrict y, uint8_t* mask,
                             Compute<T> wa, Compute<T> wb, Compute<T> clip, int64_t size) {
  uint8_t passes[kBlock] = {};
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const Compute<T> s = wa * widen(a[i]) + wb * widen(b[i]);
    passes[i] = static_cast<uint8_t>((s >= -clip) & (s <= clip));
    y[i] = narrow<T>(math::clamp(s, clip));
  }
  for (int64_t i = 0; i < size; i += kMaskedTogether) mask[i / kMaskedTogether] = packed(passes + i);
}

template <bool kTwoUsers, class T>
void backward(const T* __restrict grad, const T* __restrict more, T* __restrict grad_a, T* __restrict grad_b,
              Compute<T> wa, Compute<T> wb, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    Compute<T> g = widen(grad[i]);
    if constexpr (kTwoUsers) g += widen(more[i]);
    grad_a[i] = narrow<T>(g * wa);
    grad_b[i] = narrow<T>(g * wb);
  }
}

/// The same of a block, where its mask lets the gradient pass.
template <bool kTwoUsers, class T>
EDM2_FORMULA void backward_masked(const T* __restrict grad, const T* __restrict more, const uint8_t* mask,
                                  T* __restrict grad_a, T* __restrict grad_b, Compute<T> wa, Compute<T> wb,
                                  int64_t size) {
  uint8_t passes[kBlock];
  for (int64_t i = 0; i < size; i += kMaskedTogether) unpack(mask[i / kMaskedTogether], passes + i);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    Compute<T> g = widen(grad[i]);
    if constexpr (kTwoUsers) g += widen(more[i]);
    g = math::where(passes[i] != 0, g);
    grad_a[i] = narrow<T>(g * wa);
    grad_b[i] = narrow<T>(g * wb);
  }
}

/// Calls body(first element, its byte of the mask, size) for every block of the groups from begin to end; the sizes of
/// whole blocks are constants.
template <class Body>
EDM2_FORMULA void for_each_block(int64_t numel, int64_t begin, int64_t end, const Body& body) {
  int64_t at = begin * kMaskedTogether;
  const int64_t stop = min(end * kMaskedTogether, numel);
  for (; at + kBlock <= stop; at += kBlock) {
    body(at, at / kMaskedTogether, std::integral_constant<int64_t, kBlock>{});
  }
  if (at < stop) body(at, at / kMaskedTogether, stop - at);
}

template <bool kTwoUsers, class T>
void backward_of(const MPSumBackwardParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const C wa = static_cast<C>(p.weight_a), wb = static_cast<C>(p.weight_b);
  const T* grad = as<T>(p.grad_y);
  const T* more = as<T>(p.more_grad_y);
  T* grad_a = as<T>(p.grad_a);
  T* grad_b = as<T>(p.grad_b);
  if (p.mask == nullptr) {
    const int64_t at = begin * kMaskedTogether;
    const int64_t size = min(end * kMaskedTogether, p.numel) - at;
    backward<kTwoUsers>(grad + at, kTwoUsers ? more + at : nullptr, grad_a + at, grad_b + at, wa, wb, size);
    return;
  }
  for_each_block(p.numel, begin, end, [&](int64_t at, int64_t group, auto size) {
    backward_masked<kTwoUsers>(grad + at, kTwoUsers ? more + at : nullptr, p.mask + group, grad_a + at, grad_b + at, wa,
                               wb, size);
  });
}

}  // namespace

void mp_sum(const MPSumParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const C wa = static_cast<C>(p.weight_a), wb = static_cast<C>(p.weight_b), clip = static_cast<C>(p.clip);
    const T* a = as<T>(p.a);
    const T* b = as<T>(p.b);
    T* y = as<T>(p.y);
    if (p.mask != nullptr) {
      for_each_block(p.numel, begin, end, [&](int64_t at, int64_t group, auto size) {
        sum_masked(a + at, b + at, y + at, p.mask + group, wa, wb, clip, size);
      });
      return;
    }
    const int64_t at = begin * kMaskedTogether;
    const int64_t size = min(end * kMaskedTogether, p.numel) - at;
    if (std::isinf(p.clip)) {
      sum(a + at, b + at, y + at, wa, wb, size);
    } else {
      sum_clamped(a + at, b + at, y + at, wa, wb, clip, size);
    }
  });
}

void mp_sum_backward(const MPSumBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    if (p.more_grad_y != nullptr) {
      backward_of<true, T>(p, begin, end);
    } else {
      backward_of<false, T>(p, begin, end);
    }
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
