// SPDX-License-Identifier: Apache-2.0
// Single correctly rounded float operations that no compiler flag may contract, approximate or reorder.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <packkv/core/config.hpp>

namespace packkv::detail {

template <class To, class From>
PACKKV_HOST_DEVICE inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

/// Hides a value from the host optimiser, so that a product is rounded before it is added.
PACKKV_HOST_DEVICE inline float rounded(float x) {
#if !defined(__CUDA_ARCH__)
#if defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  volatile float stored = x;
  x = stored;
#endif
#endif
  return x;
}

PACKKV_HOST_DEVICE inline float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return rounded(a * b);
#endif
}
PACKKV_HOST_DEVICE inline float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return rounded(a + b);
#endif
}
PACKKV_HOST_DEVICE inline float sub_rn(float a, float b) { return add_rn(a, -b); }
PACKKV_HOST_DEVICE inline float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return rounded(a / b);
#endif
}
/// a * b + c, rounded once.
PACKKV_HOST_DEVICE inline float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fmaf(a, b, c);
#endif
}

/// a + x*x in double. The product of two floats is exact there, so contraction cannot change the sum.
PACKKV_HOST_DEVICE inline double add_square(double sum, float x) {
  return sum + static_cast<double>(x) * static_cast<double>(x);
}
PACKKV_HOST_DEVICE inline double sqrt_rn(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}
PACKKV_HOST_DEVICE inline double div_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __ddiv_rn(a, b);
#else
  return a / b;
#endif
}

/// Tests on the bits, which hold whatever the compiler assumes about NaN.
PACKKV_HOST_DEVICE inline bool is_finite(float x) { return (bit_cast<std::uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }
PACKKV_HOST_DEVICE inline bool is_nan(float x) { return (bit_cast<std::uint32_t>(x) & 0x7fffffffu) > 0x7f800000u; }

PACKKV_HOST_DEVICE inline float nan_float() { return bit_cast<float>(std::uint32_t{0x7fffffffu}); }
PACKKV_HOST_DEVICE inline float infinity() { return bit_cast<float>(std::uint32_t{0x7f800000u}); }

}  // namespace packkv::detail
