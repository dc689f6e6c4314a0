#include "edm2/cosine_attention.h"

#include <cstdlib>

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

constexpr int64_t kBlock = kQKVPixelBlock;

/// The part of qkv one item handles: one head, a block of pixels. Element (i, j) of pixel p, i in the head, j of q, k,
/// v, lies at offset + (3 * i + j) * channel_stride + p * pixel_stride; element i of pixel p of each output at out + p
/// * head_dim + i.
struct Item {
  int64_t offset;
  int64_t channel_stride;
  int64_t pixel_stride;
  int64_t out;
  int64_t size;  // pixels
};

Item item_of(const Activation& shape, int64_t heads, int64_t head_dim, int64_t number) {
  const int64_t blocks = (shape.pixels + kBlock - 1) / kBlock;
  const int64_t pixel = number % blocks * kBlock;
  const int64_t head = number / blocks % heads;
  const int64_t sample = number / blocks / heads;
  const int64_t channel = head * 3 * head_dim;
  Item item;
  item.channel_stride = shape.channels_last ? 1 : shape.pixels;
  item.pixel_stride = shape.channels_last ? shape.channels : 1;
  item.offset = sample * shape.channels * shape.pixels + channel * item.channel_stride + pixel * item.pixel_stride;
  item.out = ((sample * heads + head) * shape.pixels + pixel) * head_dim;
  item.size = min(kBlock, shape.pixels - pixel);
  return item;
}

/// 1 / (eps + rms) of each vector of q, k, v, and rms.
template <class C>
struct Norms {
  C rms[3][kBlock];
  C inv[3][kBlock];

  void set(const C (&squares)[3][kBlock], int64_t head_dim, double eps) {
    for (int64_t j = 0; j < 3; ++j) {
#pragma omp simd
      for (int64_t p = 0; p < kBlock; ++p) {
        rms[j][p] = std::sqrt(squares[j][p] / static_cast<C>(head_dim));
        inv[j][p] = C(1) / (rms[j][p] + static_cast<C>(eps));
      }
    }
  }
};

/// The block as squares of its vectors' norms.
template <class T, class C>
void sum_squares(const T* __restrict x, const Item& item, int64_t head_dim, C (&squares)[3][kBlock]) {
  for (auto& row : squares) {
    for (C& v : row) v = 0;
  }
  if (item.pixel_stride == 1) {
    for (int64_t i = 0; i < head_dim; ++i) {
      for (int64_t j = 0; j < 3; ++j) {
        const T* __restrict row = x + item.offset + (3 * i + j) * item.channel_stride;
#pragma omp simd
        for (int64_t p = 0; p < item.size; ++p) squares[j][p] += widen(row[p]) * widen(row[p]);
      }
    }
  } else {
    for (int64_t p = 0; p < item.size; ++p) {
      const T* __restrict row = x + item.offset + p * item.pixel_stride;
      C q = 0, k = 0, v = 0;
#pragma omp simd reduction(+ : q, k, v)
      for (int64_t i = 0; i < head_dim; ++i) {
        q += widen(row[3 * i]) * widen(row[3 * i]);
        k += widen(row[3 * i + 1]) * widen(row[3 * i + 1]);
        v += widen(row[3 * i + 2]) * widen(row[3 * i + 2]);
      }
      squares[0][p] = q;
      squares[1][p] = k;
      squares[2][p] = v;
    }
  }
}

}  // namespace

void qkv_norm(const QKVNormParams& p, int64_t begin, int64_t end) {
  const int64_t d = p.head_dim;
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    C squares[3][kBlock];
    Norms<C> norms;
    for (int64_t number = begin; number < end; ++number) {
      const Item item = item_of(p.shape, p.heads, d, number);
      const T* __restrict x = as<T>(p.qkv) + item.offset;
      sum_squares(as<T>(p.qkv), item, d, squares);
      norms.set(squares, d, p.eps);
      T* const outs[3] = {as<T>(p.q) + item.out, as<T>(p.k) + item.out, as<T>(p.v) + item.out};
      for (int64_t j = 0; j < 3; ++j) {
        for (int64_t l = 0; l < item.size; ++l) {
          const C inv = norms.inv[j][l];
          const T* __restrict from = x + j * item.channel_stride + l * item.pixel_stride;
          T* __restrict out = outs[j] + l * d;
          for (int64_t i = 0; i < d; ++i) out[i] = narrow<T>(widen(from[3 * i * item.channel_stride]) * inv);
        }
      }
    }
  });
}

void qkv_norm_backward(const QKVNormBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t d = p.head_dim;
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    C squares[3][kBlock];
    Norms<C> norms;
    for (int64_t number = begin; number < end; ++number) {
      const Item item = item_of(p.shape, p.heads, d, number);
      const T* __restrict x = as<T>(p.qkv) + item.offset;
      T* __restrict grad_x = as<T>(p.grad_qkv) + item.offset;
      sum_squares(as<T>(p.qkv), item, d, squares);
      norms.set(squares, d, p.eps);
      const T* const grads[3] = {as<T>(p.grad_q) + item.out, as<T>(p.grad_k) + item.out, as<T>(p.grad_v) + item.out};
      for (int64_t j = 0; j < 3; ++j) {
        for (int64_t l = 0; l < item.size; ++l) {
          const int64_t at = j * item.channel_stride + l * item.pixel_stride;
          const int64_t stride = 3 * item.channel_stride;
          const T* __restrict grad = grads[j] + l * d;
          C dot = 0;
          for (int64_t i = 0; i < d; ++i) dot += widen(grad[i]) * widen(x[at + i * stride]);
          const C inv = norms.inv[j][l];
          const C coef = math::normalize_grad_coef(dot, inv, norms.rms[j][l], static_cast<C>(d));
          for (int64_t i = 0; i < d; ++i) {
            grad_x[at + i * stride] = narrow<T>(widen(grad[i]) * inv - widen(x[at + i * stride]) * coef);
          }
        }
      }
    }
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
