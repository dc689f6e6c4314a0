#include "edm2/ema_update.h"

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// Elements worked on at a time, so that a parameter is read from memory once for all profiles.
constexpr int64_t kBlock = 2048;

/// ema += weight * (param - ema), written such that weight 1 gives param exactly.
template <class T>
void update(const T* __restrict param, T* __restrict ema, Compute<T> weight, int64_t size) {
  using C = Compute<T>;
  if (weight < C(0.5)) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const C e = widen(ema[i]);
      ema[i] = narrow<T>(e + weight * (widen(param[i]) - e));
    }
  } else {
    const C rest = C(1) - weight;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const C p = widen(param[i]);
      ema[i] = narrow<T>(p - rest * (p - widen(ema[i])));
    }
  }
}

}  // namespace

void ema_update(const EMAUpdateParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    int64_t offset = 0;  // elements before the tensor
    for (int64_t t = 0; t < p.num_tensors && offset < end; ++t) {
      const EMATensor& tensor = p.tensors[t];
      const int64_t last = min(end - offset, tensor.numel);
      for (int64_t at = max(begin - offset, 0); at < last; at += kBlock) {
        const int64_t size = min(kBlock, last - at);
        for (int64_t k = 0; k < p.profiles; ++k) {
          update(as<T>(tensor.param) + at, as<T>(tensor.emas[k]) + at, static_cast<Compute<T>>(p.weights[k]), size);
        }
      }
      offset += tensor.numel;
    }
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
