// SPDX-License-Identifier: Apache-2.0
// The small floating-point formats as bit patterns: IEEE half, bfloat16, FP8 E4M3 and E5M2.
// One source for host and device, all conversions round to nearest even and are exact for every pattern.
//   float x = half_to_float(0x3c00);   std::uint16_t h = float_to_half(1.0f);
#pragma once

#include <cstdint>
#include <packkv/core/config.hpp>
#include <packkv/detail/arith.hpp>

namespace packkv {

namespace detail {

/// Describes a format of 1 + ExponentBits + MantissaBits bits.
/// WithInfinity: the all-ones exponent holds infinity and NaN as in IEEE 754; without, only the all-ones
/// pattern is NaN and overflow saturates to the largest finite value (OCP 8-bit floating point, E4M3).
template <int ExponentBits, int MantissaBits, bool WithInfinity>
struct small_float {
  static constexpr int bias = (1 << (ExponentBits - 1)) - 1;
  static constexpr std::uint32_t sign_bit = 1u << (ExponentBits + MantissaBits);
  static constexpr std::uint32_t magnitude_mask = sign_bit - 1;
  static constexpr std::uint32_t infinity_bits = ((1u << ExponentBits) - 1) << MantissaBits;
  static constexpr std::uint32_t nan_bits = magnitude_mask;
  static constexpr std::uint32_t largest_finite = WithInfinity ? infinity_bits - 1 : nan_bits - 1;

  PACKKV_HOST_DEVICE static float decode(std::uint32_t bits) {
    const std::uint32_t sign = (bits & sign_bit) != 0 ? 0x80000000u : 0u;
    const std::uint32_t magnitude = bits & magnitude_mask;
    if (WithInfinity ? magnitude > infinity_bits : magnitude == nan_bits) return bit_cast<float>(sign | 0x7fffffffu);
    if (WithInfinity && magnitude == infinity_bits) return bit_cast<float>(sign | 0x7f800000u);
    const std::uint32_t exponent = magnitude >> MantissaBits;
    const std::uint32_t mantissa = magnitude & ((1u << MantissaBits) - 1);
    if (exponent != 0)
      return bit_cast<float>(sign | ((exponent + 127 - bias) << 23) | (mantissa << (23 - MantissaBits)));
    // Subnormal: mantissa * 2^(1 - bias - MantissaBits), exact in float.
    const float unit = bit_cast<float>(static_cast<std::uint32_t>(127 + 1 - bias - MantissaBits) << 23);
    const float value = static_cast<float>(mantissa) * unit;
    return bit_cast<float>(bit_cast<std::uint32_t>(value) | sign);
  }

  PACKKV_HOST_DEVICE static std::uint32_t encode(float x) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t sign = (bits & 0x80000000u) != 0 ? sign_bit : 0u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | nan_bits;
    const int exponent = static_cast<int>(magnitude >> 23) - 127;
    const bool subnormal = exponent < 1 - bias;
    // Shift the 24-bit significand right until the lowest kept bit has the weight of the target's unit.
    const int shift = (23 - MantissaBits) + (subnormal ? 1 - bias - exponent : 0);
    if (shift > 24) return sign;  // below half of the smallest subnormal
    const std::uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
    const std::uint32_t kept = significand >> shift;
    const std::uint32_t rest = significand & ((1u << shift) - 1);
    const std::uint32_t half = 1u << (shift - 1);
    const std::uint32_t up = rest > half || (rest == half && (kept & 1u) != 0) ? 1u : 0u;
    // A normal `kept` carries its hidden bit, which adds one to the exponent field; rounding may carry too.
    const std::uint32_t field = subnormal ? 0u : static_cast<std::uint32_t>(exponent + bias - 1) << MantissaBits;
    const bool too_large = exponent > bias + 1 || field + kept + up > largest_finite;
    if (too_large) return sign | (WithInfinity ? infinity_bits : largest_finite);
    return sign | (field + kept + up);
  }
};

using half_format = small_float<5, 10, true>;
using e4m3_format = small_float<4, 3, false>;
using e5m2_format = small_float<5, 2, true>;

}  // namespace detail

/// IEEE 754 binary16. Every NaN encodes to 0x7fff (or 0xffff), overflow to infinity.
PACKKV_HOST_DEVICE inline float half_to_float(std::uint16_t bits) { return detail::half_format::decode(bits); }
/// Nearest even.
PACKKV_HOST_DEVICE inline std::uint16_t float_to_half(float x) {
  return static_cast<std::uint16_t>(detail::half_format::encode(x));
}

namespace detail {

/// float_to_half(x), but for the bits of a NaN.
PACKKV_HOST_DEVICE inline std::uint16_t half_bits_rn(float x) {
#if defined(__CUDA_ARCH__)
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0,%1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  return float_to_half(x);
#endif
}

}  // namespace detail

/// bfloat16: the upper half of a float. Every NaN encodes to 0x7fff (or 0xffff).
PACKKV_HOST_DEVICE inline float bfloat16_to_float(std::uint16_t bits) {
  return detail::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}
/// Nearest even.
PACKKV_HOST_DEVICE inline std::uint16_t float_to_bfloat16(float x) {
  const std::uint32_t bits = detail::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x7fffu);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// FP8 E4M3 of "OCP 8-bit Floating Point Specification" 1.0: no infinity, |x| > 448 saturates to 448.
PACKKV_HOST_DEVICE inline float e4m3_to_float(std::uint8_t bits) { return detail::e4m3_format::decode(bits); }
/// Nearest even.
PACKKV_HOST_DEVICE inline std::uint8_t float_to_e4m3(float x) {
  return static_cast<std::uint8_t>(detail::e4m3_format::encode(x));
}

/// FP8 E5M2 of the same specification: IEEE-like, overflow gives infinity.
PACKKV_HOST_DEVICE inline float e5m2_to_float(std::uint8_t bits) { return detail::e5m2_format::decode(bits); }
/// Nearest even.
PACKKV_HOST_DEVICE inline std::uint8_t float_to_e5m2(float x) {
  return static_cast<std::uint8_t>(detail::e5m2_format::encode(x));
}

}  // namespace packkv
