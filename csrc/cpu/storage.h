// Storage types and the choice of a kernel by DType. Included by every kernel file, hence once per instruction set: all
// of it has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "edm2/common.h"
#include "edm2/math.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// Bits as a scalar: a struct would be copied as an aggregate, which stops vectorisation.
enum class BFloat16 : uint16_t {};
enum class Float16 : uint16_t {};

/// Type computed in: double for double, else float.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

EDM2_FORMULA float widen(float v) { return v; }
EDM2_FORMULA double widen(double v) { return v; }
EDM2_FORMULA float widen(BFloat16 v) { return math::from_bits(static_cast<int32_t>(static_cast<uint32_t>(v) << 16)); }

/// Shifting exponent and mantissa into float's place leaves a factor 2^112, which a multiplication removes (subnormals
/// included); Inf and NaN, whose exponent must become all ones, are set apart.
EDM2_FORMULA float widen(Float16 v) {
  const uint32_t magnitude = (static_cast<uint32_t>(v) & 0x7FFFu) << 13;
  const float finite = math::from_bits(static_cast<int32_t>(magnitude)) * 0x1p112f;
  const uint32_t special = magnitude | 0x7F800000u;
  const uint32_t sign = (static_cast<uint32_t>(v) & 0x8000u) << 16;
  const uint32_t bits = magnitude >= 0x0F800000u ? special : static_cast<uint32_t>(math::to_bits(finite));
  return math::from_bits(static_cast<int32_t>(bits | sign));
}

template <class T>
EDM2_FORMULA T narrow(Compute<T> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {  // round to nearest even; NaN stays a NaN
    const uint32_t bits = static_cast<uint32_t>(math::to_bits(v));
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<BFloat16>(static_cast<uint16_t>(v == v ? rounded : 0x7FC0u));
  } else if constexpr (std::is_same_v<T, Float16>) {
    // To nearest even, with float's adder for subnormals: 0.5f has their spacing. Beyond the largest: Inf; NaN stays
    // one.
    const uint32_t bits = static_cast<uint32_t>(math::to_bits(v)), magnitude = bits & 0x7FFFFFFFu;
    const float shifted = math::from_bits(static_cast<int32_t>(magnitude)) + 0.5f;
    const uint32_t subnormal = static_cast<uint32_t>(math::to_bits(shifted)) - 0x3F000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t half = magnitude >= 0x47800000u ? special : finite;
    return static_cast<Float16>(static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u)));
  } else {
    return v;
  }
}

/// v as it reads back after being stored.
template <class T>
EDM2_FORMULA Compute<T> stored(Compute<T> v) {
  return widen(narrow<T>(v));
}

EDM2_FORMULA int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
EDM2_FORMULA int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/// Calls f(T{}) with the storage type T that dtype names.
template <class F>
EDM2_FORMULA void with_type(DType dtype, const F& f) {
  if (dtype == DType::kFloat32) {
    f(float{});
  } else if (dtype == DType::kFloat64) {
    f(double{});
  } else {
    f(BFloat16{});
  }
}

template <class T>
EDM2_FORMULA const T* as(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
EDM2_FORMULA T* as(void* p) {
  return static_cast<T*>(p);
}

}  // namespace
}  // namespace edm2::cpu::EDM2_CPU_ISA
