// The scalar formulae, one definition for the CPU kernels, the CUDA kernels and the emulation. Branch-free, so that a
// compiler can vectorise a loop over any of them. NaN propagates.
#pragma once

#include <cmath>
#include <cstdint>

// Internal linkage and always inlined: the CPU kernels are compiled once per instruction set, and a function emitted by
// one of them must never be the one another links to.
#if defined(__CUDACC__)
#define EDM2_FORMULA static __host__ __device__ __forceinline__
#else
#define EDM2_FORMULA static inline __attribute__((always_inline))
#endif

namespace edm2::math {

constexpr double kMPSiLUScale = 0.596;  // Eq. 81

#if !defined(__CUDA_ARCH__)
EDM2_FORMULA float from_bits(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
EDM2_FORMULA double from_bits(int64_t bits) {
  double value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
EDM2_FORMULA int32_t to_bits(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}
EDM2_FORMULA int64_t to_bits(double value) {
  int64_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}
#endif

/// a / b. Floats on the GPU: within 2 ulp, and 0 for |b| > 2^126, at a third of the instructions of the correctly
/// rounded quotient.
template <class T>
EDM2_FORMULA T divide(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) return __fdividef(a, b);
#endif
  return a / b;
}

/// exp(x) within 1 ulp for use in 1 + exp(x): results below the smallest normal number become that number, and those
/// above 2^127.5 infinity. x = n ln 2 + r, exp(r) = 1 + r + r^2 P(r) with P minimax on |r| <= ln(2) / 2 (relative error
/// of exp 7.5e-9). Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; 2^n is made of its bits, n =
/// 128 giving infinity.
EDM2_FORMULA float exp(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);  // within 2 + |x| ulp
#else
  x = x > 89.0f ? 89.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.39411241e-3f;
  p = p * r + 8.36318123e-3f;
  p = p * r + 4.16663751e-2f;
  p = p * r + 1.66665770e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r;
  p = p + 1.0f;
  return p * from_bits((to_bits(shifted) - 0x4B400000 + 127) << 23);
#endif
}

/// The same with P of relative error 1.2e-17, 1.5 * 2^52 and 2^1023.5.
EDM2_FORMULA double exp(double x) {
#if defined(__CUDA_ARCH__)
  return ::exp(x);
#else
  x = x > 710.0 ? 710.0 : x;
  x = x < -708.0 ? -708.0 : x;
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  double r = x - n * 0.693147180369123816490;
  r = r - n * 1.90821492927058770002e-10;
  double p = 2.51100477464667121e-8;
  p = p * r + 2.76200893617774943e-7;
  p = p * r + 2.75572423422373281e-6;
  p = p * r + 2.48015212937456457e-5;
  p = p * r + 1.98412698865862775e-4;
  p = p * r + 1.38888889172153838e-3;
  p = p * r + 8.33333333332220876e-3;
  p = p * r + 4.16666666666241239e-2;
  p = p * r + 1.66666666666666745e-1;
  p = p * r + 0.5;
  p = (p * r) * r + r;
  p = p + 1.0;
  return p * from_bits((to_bits(shifted) - 0x4338000000000000 + 1023) << 52);
#endif
}

/// sin(r) and cos(r) for |r| <= pi / 4: minimax polynomials with errors below 1e-8.
EDM2_FORMULA float reduced_sine(float r) {
  const float u = r * r;
  float s = -1.95879585515e-4f;
  s = s * u + 8.33274876581e-3f;
  s = s * u - 1.66666646667e-1f;
  return s * u * r + r;
}
EDM2_FORMULA float reduced_cosine(float r) {
  const float u = r * r;
  float c = 2.45479901174e-5f;
  c = c * u - 1.38883034101e-3f;
  c = c * u + 4.1666664663e-2f;
  return c * u * u + (1.0f - 0.5f * u);
}

#if !defined(__CUDA_ARCH__)
/// Beyond these the reductions below lose accuracy.
constexpr float kTrigLimitFloat = 8192.0f;
constexpr double kTrigLimitDouble = 1e6;

/// cos(x), or sin(x) if Sine, within 2e-7 for |x| <= kTrigLimitFloat. x = k pi / 2 + r with pi / 2 in three parts, the
/// products of the first two with k exact; k picks sine or cosine of r and its sign.
template <bool Sine>
EDM2_FORMULA float trig(float x) {
  const float shifted = x * 0.636619772f + 12582912.0f;
  const float k = shifted - 12582912.0f;
  float r = x - k * 1.5703125f;
  r = r - k * 4.837512969970703125e-4f;
  r = r - k * 7.549789954891882e-8f;
  const float s = reduced_sine(r);
  const float c = reduced_cosine(r);
  const int32_t quadrant = to_bits(shifted) + (Sine ? 0 : 1);  // cos(x) = sin(x + pi / 2)
  const float value = (quadrant & 1) != 0 ? c : s;
  return from_bits(to_bits(value) ^ ((quadrant & 2) << 30));
}

/// The same within 2 ulp for |x| <= kTrigLimitDouble, with polynomials of relative errors 2e-17.
template <bool Sine>
EDM2_FORMULA double trig(double x) {
  const double shifted = x * 0.63661977236758134 + 6755399441055744.0;
  const double k = shifted - 6755399441055744.0;
  double r = x - k * 1.57079632673412561417;
  r = r - k * 6.07710050630396597660e-11;
  r = r - k * 2.02226624879595063154e-21;
  const double u = r * r;
  double s = 1.59181145104037275e-10;
  s = s * u - 2.5051131660274163e-8;
  s = s * u + 2.75573161017889576e-6;
  s = s * u - 1.98412698367574071e-4;
  s = s * u + 8.33333333333094798e-3;
  s = s * u - 1.66666666666666646e-1;
  s = s * u * r + r;
  double c = -1.13826222517344388e-11;
  c = c * u + 2.08761461385748554e-9;
  c = c * u - 2.75573172711751659e-7;
  c = c * u + 2.4801587298764788e-5;
  c = c * u - 1.38888888888873968e-3;
  c = c * u + 4.16666666666666654e-2;
  c = c * u * u + (1.0 - 0.5 * u);
  const int64_t quadrant = to_bits(shifted) + (Sine ? 0 : 1);
  const double value = (quadrant & 1) != 0 ? c : s;
  return from_bits(to_bits(value) ^ ((quadrant & 2) << 62));
}
#endif

/// MP-SiLU, z * sigmoid(z) / 0.596 (Eq. 81).
template <class T>
EDM2_FORMULA T mp_silu(T z) {
  const T scale = static_cast<T>(kMPSiLUScale);
  return divide(z, exp(-z) * scale + scale);
}

/// Its derivative, s * (1 + z * (1 - s)) / 0.596 with s = sigmoid(z) (spec 2.2).
template <class T>
EDM2_FORMULA T mp_silu_grad(T z) {
  const T s = divide(T(1), T(1) + exp(-z));
  return s * (T(1) + z * (T(1) - s)) * static_cast<T>(1.0 / kMPSiLUScale);
}

/// min(max(v, -bound), bound), NaN staying NaN.
template <class T>
EDM2_FORMULA T clamp(T v, T bound) {
  v = v > bound ? bound : v;
  return v < -bound ? -bound : v;
}

#if !defined(__CUDA_ARCH__)
/// condition ? v : 0 without a branch, which would hinder vectorisation where v is loaded from memory.
EDM2_FORMULA float where(bool condition, float v) { return from_bits(to_bits(v) & -static_cast<int32_t>(condition)); }
EDM2_FORMULA double where(bool condition, double v) { return from_bits(to_bits(v) & -static_cast<int64_t>(condition)); }
#endif

/// Coefficient of x in the gradient of x / s, s = eps + rms (spec 2.1): grad = g / s - x * (<g, x> / s^2) / (n * rms).
/// At rms = 0 the norm's sub-gradient is 0.
template <class T>
EDM2_FORMULA T normalize_grad_coef(T dot_gx, T inv_s, T rms, T n) {
  const T coef = divide(dot_gx * inv_s * inv_s, n * rms);
  return rms > T(0) ? coef : T(0);
}

}  // namespace edm2::math
