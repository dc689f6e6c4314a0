#include "edm2/cosine_attention.h"

#include <cstdlib>

#include "kernels.h"
#include "storage.h"
#include "transpose.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

constexpr int64_t kBlock = kQKVPixelBlock;

/// One head of a block of pixels. Element i of q, k, v (j = 0, 1, 2) of pixel p lies in qkv at
/// qkv + (3 * i + j) * channel_stride + p * pixel_stride, and in each of q, k, v at out + p * head_dim + i.
struct Block {
  int64_t qkv;
  int64_t out;
  int64_t channel_stride;
  int64_t pixel_stride;
  int64_t size;
  int64_t head_dim;
};

template <class F>
EDM2_FORMULA void for_blocks(const Activation& shape, int64_t heads, int64_t head_dim, int64_t begin, int64_t end,
                             const F& f) {
  const int64_t blocks = (shape.pixels + kBlock - 1) / kBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t pixel = item % blocks * kBlock;
    const int64_t head = item / blocks % heads;
    const int64_t sample = item / blocks / heads;
    Block b;
    b.channel_stride = shape.channels_last ? 1 : shape.pixels;
    b.pixel_stride = shape.channels_last ? shape.channels : 1;
    b.qkv = sample * shape.channels * shape.pixels + head * 3 * head_dim * b.channel_stride + pixel * b.pixel_stride;
    b.out = ((sample * heads + head) * shape.pixels + pixel) * head_dim;
    b.size = min(kBlock, shape.pixels - pixel);
    b.head_dim = head_dim;
    f(b);
  }
}

/// For each pixel of a block: the rms of its vector, 1 / (eps + rms), and the coefficient of x in the gradient.
template <class C>
struct Norms {
  C rms[kBlock];
  C inv[kBlock];
  C coef[kBlock];

  void from_squares(const C* squares, const Block& b, double eps) {
    const C n = static_cast<C>(b.head_dim);
    const C e = static_cast<C>(eps);
#pragma omp simd
    for (int64_t p = 0; p < b.size; ++p) {
      rms[p] = std::sqrt(squares[p] / n);
      inv[p] = C(1) / (rms[p] + e);
    }
  }

  void from_dots(const C* dots, const Block& b) {
    const C n = static_cast<C>(b.head_dim);
#pragma omp simd
    for (int64_t p = 0; p < b.size; ++p) coef[p] = math::normalize_grad_coef(dots[p], inv[p], rms[p], n);
  }
};

// ---- NCHW: vectorised over pixels; q, k and v pass through a transposed tile [head_dim, kBlock] ----

template <class T>
void planes_norm(const T* __restrict x, const Block& b, double eps, Norms<Compute<T>>& norms) {
  Compute<T> squares[kBlock] = {};
  for (int64_t i = 0; i < b.head_dim; ++i) {
    const T* __restrict row = x + 3 * i * b.channel_stride;
#pragma omp simd
    for (int64_t p = 0; p < b.size; ++p) squares[p] += widen(row[p]) * widen(row[p]);
  }
  norms.from_squares(squares, b, eps);
}

/// x is q, k or v of the block; scratch holds two tiles.
template <class T>
void planes_forward(const T* __restrict x, T* __restrict out, const Block& b, double eps,
                    Compute<T>* __restrict scratch) {
  using C = Compute<T>;
  Norms<C> norms;
  planes_norm(x, b, eps, norms);
  C* __restrict tile = scratch;
  for (int64_t i = 0; i < b.head_dim; ++i) {
    const T* __restrict row = x + 3 * i * b.channel_stride;
#pragma omp simd
    for (int64_t p = 0; p < b.size; ++p) tile[i * kBlock + p] = widen(row[p]) * norms.inv[p];
  }
  if constexpr (std::is_same_v<T, C>) {
    transpose(tile, kBlock, out, b.head_dim, b.head_dim, b.size);
  } else {
    C* __restrict rows = scratch + b.head_dim * kBlock;
    transpose(tile, kBlock, rows, b.head_dim, b.head_dim, b.size);
#pragma omp simd
    for (int64_t k = 0; k < b.size * b.head_dim; ++k) out[k] = narrow<T>(rows[k]);
  }
}

template <class T>
void planes_backward(const T* __restrict grad, const T* __restrict x, T* __restrict grad_x, const Block& b, double eps,
                     Compute<T>* __restrict scratch) {
  using C = Compute<T>;
  Norms<C> norms;
  planes_norm(x, b, eps, norms);
  C* __restrict tile = scratch;
  if constexpr (std::is_same_v<T, C>) {
    transpose(grad, b.head_dim, tile, kBlock, b.size, b.head_dim);
  } else {
    C* __restrict rows = scratch + b.head_dim * kBlock;
#pragma omp simd
    for (int64_t k = 0; k < b.size * b.head_dim; ++k) rows[k] = widen(grad[k]);
    transpose(rows, b.head_dim, tile, kBlock, b.size, b.head_dim);
  }
  C dots[kBlock] = {};
  for (int64_t i = 0; i < b.head_dim; ++i) {
    const T* __restrict row = x + 3 * i * b.channel_stride;
#pragma omp simd
    for (int64_t p = 0; p < b.size; ++p) dots[p] += tile[i * kBlock + p] * widen(row[p]);
  }
  norms.from_dots(dots, b);
  for (int64_t i = 0; i < b.head_dim; ++i) {
    const T* __restrict row = x + 3 * i * b.channel_stride;
    T* __restrict out = grad_x + 3 * i * b.channel_stride;
#pragma omp simd
    for (int64_t p = 0; p < b.size; ++p) {
      out[p] = narrow<T>(tile[i * kBlock + p] * norms.inv[p] - widen(row[p]) * norms.coef[p]);
    }
  }
}

// ---- NHWC: vectorised over the channels of a pixel, q, k and v side by side ----

template <class T>
void pixels_norm(const T* __restrict x, const Block& b, double eps, Norms<Compute<T>> (&norms)[3]) {
  using C = Compute<T>;
  C squares[3][kBlock];
  for (int64_t p = 0; p < b.size; ++p) {
    const T* __restrict row = x + p * b.pixel_stride;
    C q = 0, k = 0, v = 0;
#pragma omp simd reduction(+ : q, k, v)
    for (int64_t i = 0; i < b.head_dim; ++i) {
      q += widen(row[3 * i]) * widen(row[3 * i]);
      k += widen(row[3 * i + 1]) * widen(row[3 * i + 1]);
      v += widen(row[3 * i + 2]) * widen(row[3 * i + 2]);
    }
    squares[0][p] = q;
    squares[1][p] = k;
    squares[2][p] = v;
  }
  for (int j = 0; j < 3; ++j) norms[j].from_squares(squares[j], b, eps);
}

template <class T>
void pixels_forward(const T* __restrict x, T* __restrict q, T* __restrict k, T* __restrict v, const Block& b,
                    double eps) {
  using C = Compute<T>;
  Norms<C> norms[3];
  pixels_norm(x, b, eps, norms);
  for (int64_t p = 0; p < b.size; ++p) {
    const T* __restrict row = x + p * b.pixel_stride;
    const int64_t at = p * b.head_dim;
    const C inv_q = norms[0].inv[p], inv_k = norms[1].inv[p], inv_v = norms[2].inv[p];
#pragma omp simd
    for (int64_t i = 0; i < b.head_dim; ++i) {
      q[at + i] = narrow<T>(widen(row[3 * i]) * inv_q);
      k[at + i] = narrow<T>(widen(row[3 * i + 1]) * inv_k);
      v[at + i] = narrow<T>(widen(row[3 * i + 2]) * inv_v);
    }
  }
}

template <class T>
void pixels_backward(const T* __restrict grad_q, const T* __restrict grad_k, const T* __restrict grad_v,
                     const T* __restrict x, T* __restrict grad_x, const Block& b, double eps) {
  using C = Compute<T>;
  Norms<C> norms[3];
  pixels_norm(x, b, eps, norms);
  C dots[3][kBlock];
  for (int64_t p = 0; p < b.size; ++p) {
    const T* __restrict row = x + p * b.pixel_stride;
    const int64_t at = p * b.head_dim;
    C q = 0, k = 0, v = 0;
#pragma omp simd reduction(+ : q, k, v)
    for (int64_t i = 0; i < b.head_dim; ++i) {
      q += widen(grad_q[at + i]) * widen(row[3 * i]);
      k += widen(grad_k[at + i]) * widen(row[3 * i + 1]);
      v += widen(grad_v[at + i]) * widen(row[3 * i + 2]);
    }
    dots[0][p] = q;
    dots[1][p] = k;
    dots[2][p] = v;
  }
  for (int j = 0; j < 3; ++j) norms[j].from_dots(dots[j], b);
  for (int64_t p = 0; p < b.size; ++p) {
    const T* __restrict row = x + p * b.pixel_stride;
    T* __restrict out = grad_x + p * b.pixel_stride;
    const int64_t at = p * b.head_dim;
    const C inv_q = norms[0].inv[p], inv_k = norms[1].inv[p], inv_v = norms[2].inv[p];
    const C coef_q = norms[0].coef[p], coef_k = norms[1].coef[p], coef_v = norms[2].coef[p];
#pragma omp simd
    for (int64_t i = 0; i < b.head_dim; ++i) {
      out[3 * i] = narrow<T>(widen(grad_q[at + i]) * inv_q - widen(row[3 * i]) * coef_q);
      out[3 * i + 1] = narrow<T>(widen(grad_k[at + i]) * inv_k - widen(row[3 * i + 1]) * coef_k);
      out[3 * i + 2] = narrow<T>(widen(grad_v[at + i]) * inv_v - widen(row[3 * i + 2]) * coef_v);
    }
  }
}

/// Two tiles.
template <class C>
struct Scratch {
  C* data;
  explicit Scratch(int64_t head_dim)
      : data(static_cast<C*>(std::malloc(static_cast<size_t>(2 * head_dim * kBlock) * sizeof(C)))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace

void qkv_norm(const QKVNormParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    const Scratch<Compute<T>> scratch(p.head_dim);
    for_blocks(p.shape, p.heads, p.head_dim, begin, end, [&](const Block& b) {
      const T* x = as<T>(p.qkv) + b.qkv;
      T* const out[3] = {as<T>(p.q) + b.out, as<T>(p.k) + b.out, as<T>(p.v) + b.out};
      if (p.shape.channels_last) {
        pixels_forward(x, out[0], out[1], out[2], b, p.eps);
      } else {
        for (int j = 0; j < 3; ++j) planes_forward(x + j * b.channel_stride, out[j], b, p.eps, scratch.data);
      }
    });
  });
}

void qkv_norm_backward(const QKVNormBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    const Scratch<Compute<T>> scratch(p.head_dim);
    for_blocks(p.shape, p.heads, p.head_dim, begin, end, [&](const Block& b) {
      const T* x = as<T>(p.qkv) + b.qkv;
      T* grad_x = as<T>(p.grad_qkv) + b.qkv;
      const T* const grad[3] = {as<T>(p.grad_q) + b.out, as<T>(p.grad_k) + b.out, as<T>(p.grad_v) + b.out};
      if (p.shape.channels_last) {
        pixels_backward(grad[0], grad[1], grad[2], x, grad_x, b, p.eps);
      } else {
        for (int j = 0; j < 3; ++j) {
          const int64_t shift = j * b.channel_stride;
          planes_backward(grad[j], x + shift, grad_x + shift, b, p.eps, scratch.data);
        }
      }
    });
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
