// q, k and v of cosine attention (spec 2.12, steps 2-3) taken apart and normalised over the channels of their head, and
// the backward. Channel (head * head_dim + i) * 3 + j of qkv is element i of q, k or v (j = 0, 1, 2); these and their
// gradients are [batch, pixels, heads, head_dim].
//
// channels_last: a row, one head of one pixel, is 3 * head_dim neighbours in qkv and head_dim neighbours in each of q,
// k and v. A group of lanes owns a row; three packs of qkv in a lane's registers are one pack each of q, k and v
// (qkv_norm_rows). Rows that are too long for that, or not made of packs, are read element by element, once per step
// (qkv_norm_long_rows). contiguous: a block owns a strip of neighbouring pixels of q, k or v of one head, and
// transposes it in shared memory (qkv_norm_planes).
#pragma once

#include "pixel_norm.cuh"

namespace edm2::cuda {

/// q, k and v, or their gradients.
template <typename T>
struct Parts {
  T* part[3];
};

/// 3 N neighbouring values of qkv as N of each of q, k and v.
template <int N, typename T>
__device__ void load_apart(const T* qkv, Floats<N> (&parts)[3]) {
  Packed<T, N> packs[3];
#pragma unroll
  for (int pack = 0; pack < 3; ++pack) packs[pack] = Packed<T, N>::load(qkv + pack * N);
#pragma unroll
  for (int pack = 0; pack < 3; ++pack) {
    const auto values = unpack(packs[pack]);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int at = pack * N + i;
      parts[at % 3].v[at / 3] = values.v[i];
    }
  }
}

/// The inverse of load_apart.
template <int N, typename T>
__device__ void store_together(T* qkv, const Floats<N> (&parts)[3]) {
#pragma unroll
  for (int pack = 0; pack < 3; ++pack) {
    Floats<N> values;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int at = pack * N + i;
      values.v[i] = parts[at % 3].v[at / 3];
    }
    store(qkv + pack * N, values);
  }
}

/// channels_last; a lane holds one pack of each part.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    qkv_norm_rows(const T* __restrict__ qkv, Parts<T> out, int64_t rows, int head_dim, int lanes, float eps) {
  constexpr int N = kPack<T>;
  const float n = static_cast<float>(head_dim);
  const LaneGroups groups(lanes);
  const int channel = groups.lane * N;
  for (int64_t first = groups.first; first < rows; first += groups.step) {
    const int64_t row = first + groups.within_warp;
    const bool active = row < rows && channel < head_dim;
    const int64_t at = row * head_dim + channel;
    Floats<N> x[3] = {};
    if (active) load_apart<N>(qkv + 3 * at, x);
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const float squares = sum_over_lanes(sum(x[j] * x[j]), lanes);
      if (active) store(out.part[j] + at, x[j] * inverse_pixel_scale(squares, n, eps));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<12>)
    qkv_norm_backward_rows(Parts<const T> grads, const T* __restrict__ qkv, T* __restrict__ grad_qkv, int64_t rows,
                           int head_dim, int lanes, float eps) {
  constexpr int N = kPack<T>;
  const float n = static_cast<float>(head_dim);
  const LaneGroups groups(lanes);
  const int channel = groups.lane * N;
  for (int64_t first = groups.first; first < rows; first += groups.step) {
    const int64_t row = first + groups.within_warp;
    const bool active = row < rows && channel < head_dim;
    const int64_t at = row * head_dim + channel;
    Floats<N> x[3] = {};
    Floats<N> grad[3] = {};
    if (active) {
      load_apart<N>(qkv + 3 * at, x);
#pragma unroll
      for (int j = 0; j < 3; ++j) grad[j] = load<N>(grads.part[j] + at);
    }
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const float squares = sum_over_lanes(sum(x[j] * x[j]), lanes);
      const float dot_gx = sum_over_lanes(sum(grad[j] * x[j]), lanes);
      grad[j] = grad[j] * inverse_pixel_scale(squares, n, eps) - x[j] * pixel_norm_projection(squares, dot_gx, n, eps);
    }
    if (active) store_together<N>(grad_qkv + 3 * at, grad);
  }
}

/// channels_last, any head_dim at any alignment: a warp per row.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    qkv_norm_long_rows(const T* __restrict__ qkv, Parts<T> out, int64_t rows, int64_t head_dim, float eps) {
  const float n = static_cast<float>(head_dim);
  const LaneGroups groups(kWarpSize);
  for (int64_t row = groups.first; row < rows; row += groups.step) {
    const T* x = qkv + 3 * row * head_dim;
    float inverse_scale[3] = {};
    for (int64_t i = groups.lane; i < head_dim; i += kWarpSize) {
#pragma unroll
      for (int j = 0; j < 3; ++j) inverse_scale[j] += to_float(x[3 * i + j]) * to_float(x[3 * i + j]);
    }
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      inverse_scale[j] = inverse_pixel_scale(sum_over_lanes(inverse_scale[j], kWarpSize), n, eps);
    }
    for (int64_t i = groups.lane; i < head_dim; i += kWarpSize) {
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        out.part[j][row * head_dim + i] = from_float<T>(to_float(x[3 * i + j]) * inverse_scale[j]);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    qkv_norm_backward_long_rows(Parts<const T> grads, const T* __restrict__ qkv, T* __restrict__ grad_qkv, int64_t rows,
                                int64_t head_dim, float eps) {
  const float n = static_cast<float>(head_dim);
  const LaneGroups groups(kWarpSize);
  for (int64_t row = groups.first; row < rows; row += groups.step) {
    const int64_t at = row * head_dim;
    float squares[3] = {};
    float dot_gx[3] = {};
    for (int64_t i = groups.lane; i < head_dim; i += kWarpSize) {
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const float x = to_float(qkv[3 * (at + i) + j]);
        squares[j] += x * x;
        dot_gx[j] += to_float(grads.part[j][at + i]) * x;
      }
    }
    float inverse_scale[3];
    float projection[3];
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      squares[j] = sum_over_lanes(squares[j], kWarpSize);
      inverse_scale[j] = inverse_pixel_scale(squares[j], n, eps);
      projection[j] = pixel_norm_projection(squares[j], sum_over_lanes(dot_gx[j], kWarpSize), n, eps);
    }
    for (int64_t i = groups.lane; i < head_dim; i += kWarpSize) {
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const float x = to_float(qkv[3 * (at + i) + j]);
        const float grad = to_float(grads.part[j][at + i]);
        grad_qkv[3 * (at + i) + j] = from_float<T>(grad * inverse_scale[j] - x * projection[j]);
      }
    }
  }
}

/// contiguous: a strip of pixels of one part of one head. Strips are ordered (sample, head, strip, part). Packs are N
/// pixels wide in qkv and N channels wide in q, k and v; N = 1 fits any sizes and alignment.
template <int N>
struct PartStrip : PixelStrip<N> {
  static constexpr int kChannels = 64;  // that pass through shared memory at a time

  using Tile = float[PixelStrip<N>::kPixels][kChannels + 1];

  int part;
  int64_t pixels;
  int64_t head_dim;
  int64_t first_pixel;  // of the strip
  int64_t out;          // offset of the first pixel's channel 0 in q, k or v
  int64_t out_step;     // to the next pixel

  __device__ PartStrip(int64_t index, int64_t heads, int64_t head_dim_, int64_t pixels_)
      : PixelStrip<N>(index / 3, 3 * head_dim_, pixels_),
        part(static_cast<int>(index % 3)),
        pixels(pixels_),
        head_dim(head_dim_) {
    const int64_t strips = (pixels + this->kPixels - 1) / this->kPixels;
    const int64_t head = index / 3 / strips;
    first_pixel = index / 3 % strips * this->kPixels;
    out_step = heads * head_dim;
    out = (head / heads * pixels + first_pixel) * out_step + head % heads * head_dim;
    if (this->end > 0) this->end = head_dim;
  }

  /// Offset in qkv of channel i of this thread's pixels.
  __device__ int64_t at(int64_t i) const { return this->base + (3 * i + part) * pixels; }

  /// This thread's first pixel within the strip.
  __device__ int own_pixel() const { return static_cast<int>(threadIdx.x) % this->kLanes * N; }

  /// Calls body(offset in q, k or v, row of the tile, first column) for every pack of up to kChannels channels.
  template <typename Body>
  __device__ void for_each_out(int64_t first_channel, Body body) const {
    const int64_t left = head_dim - first_channel;
    const int packs = static_cast<int>(left < kChannels ? left : kChannels) / N;
    for (int i = static_cast<int>(threadIdx.x); i < packs * this->kPixels; i += kThreads) {
      const int pixel = i / packs;
      const int column = i % packs * N;
      if (first_pixel + pixel < pixels) body(out + pixel * out_step + first_channel + column, pixel, column);
    }
  }

  /// Calls body(offset in qkv, column of the tile) for this thread's share of up to kChannels channels.
  template <typename Body>
  __device__ void for_each_own(int64_t first_channel, Body body) const {
    const int64_t past = first_channel + kChannels;
    const int64_t stop = past < this->end ? past : this->end;
#pragma unroll 1
    for (int64_t i = first_channel + this->first; i < stop; i += this->kSlices) {
      body(at(i), static_cast<int>(i - first_channel));
    }
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    qkv_norm_planes(const T* __restrict__ qkv, const __grid_constant__ Parts<T> out, int64_t strips, int64_t heads,
                    int64_t head_dim, int64_t pixels, float eps) {
  using Strip = PartStrip<N>;
  __shared__ typename Strip::Tile tile;
  const float n = static_cast<float>(head_dim);
  for (int64_t s = blockIdx.x; s < strips; s += gridDim.x) {
    const Strip strip(s, heads, head_dim, pixels);
    T* target = out.part[strip.part];
    Floats<N> squares = {};
    for (int64_t i = strip.first; i < strip.end; i += Strip::kSlices) {
      const auto here = load<N>(qkv + strip.at(i));
      squares = squares + here * here;
    }
    squares = sum_over_slices(squares);
    const auto inverse_scale = map([=](float v) { return inverse_pixel_scale(v, n, eps); }, squares);
    for (int64_t chunk = 0; chunk < head_dim; chunk += Strip::kChannels) {
      strip.for_each_own(chunk, [&](int64_t at, int column) {
        const auto y = load<N>(qkv + at) * inverse_scale;
#pragma unroll
        for (int i = 0; i < N; ++i) tile[strip.own_pixel() + i][column] = y.v[i];
      });
      __syncthreads();
      strip.for_each_out(chunk, [&](int64_t at, int pixel, int column) {
        Floats<N> y;
#pragma unroll
        for (int i = 0; i < N; ++i) y.v[i] = tile[pixel][column + i];
        store(target + at, y);
      });
      __syncthreads();  // the next chunk overwrites `tile`
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<12>)
    qkv_norm_backward_planes(const __grid_constant__ Parts<const T> grads, const T* __restrict__ qkv,
                             T* __restrict__ grad_qkv, int64_t strips, int64_t heads, int64_t head_dim, int64_t pixels,
                             float eps) {
  using Strip = PartStrip<N>;
  __shared__ typename Strip::Tile tile;
  const float n = static_cast<float>(head_dim);
  for (int64_t s = blockIdx.x; s < strips; s += gridDim.x) {
    const Strip strip(s, heads, head_dim, pixels);
    const T* source = grads.part[strip.part];
    const auto fetch_gradients = [&](int64_t chunk) {
      strip.for_each_out(chunk, [&](int64_t at, int pixel, int column) {
        const auto grad = load<N>(source + at);
#pragma unroll
        for (int i = 0; i < N; ++i) tile[pixel][column + i] = grad.v[i];
      });
      __syncthreads();
    };
    const auto own_gradients = [&](int column) {
      Floats<N> grad;
#pragma unroll
      for (int i = 0; i < N; ++i) grad.v[i] = tile[strip.own_pixel() + i][column];
      return grad;
    };
    Floats<N> squares = {};
    Floats<N> dot_gx = {};
    for (int64_t chunk = 0; chunk < head_dim; chunk += Strip::kChannels) {
      fetch_gradients(chunk);
      strip.for_each_own(chunk, [&](int64_t at, int column) {
        const auto here = load<N>(qkv + at);
        squares = squares + here * here;
        dot_gx = dot_gx + own_gradients(column) * here;
      });
      __syncthreads();  // the next chunk overwrites `tile`
    }
    squares = sum_over_slices(squares);
    dot_gx = sum_over_slices(dot_gx);
    const auto inverse_scale = map([=](float v) { return inverse_pixel_scale(v, n, eps); }, squares);
    const auto projection = map([=](float v, float d) { return pixel_norm_projection(v, d, n, eps); }, squares, dot_gx);
    for (int64_t chunk = 0; chunk < head_dim; chunk += Strip::kChannels) {
      fetch_gradients(chunk);
      strip.for_each_own(chunk, [&](int64_t at, int column) {
        store(grad_qkv + at, own_gradients(column) * inverse_scale - load<N>(qkv + at) * projection);
      });
      __syncthreads();  // the next chunk or strip overwrites `tile`
    }
  }
}

}  // namespace edm2::cuda
