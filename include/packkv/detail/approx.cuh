// SPDX-License-Identifier: Apache-2.0
// Fast arithmetic of the attention kernels: the special-function unit and pairs of halves. Results are those of the
// hardware, within the stated bounds of the exact ones, and need not have the same bits elsewhere.
#pragma once

#include <packkv/core/float_formats.hpp>
#include <packkv/detail/cuda.cuh>

namespace packkv::detail {

/// 2^x within 2^-22 relative; 2^-inf = 0, results below 2^-126 are 0.
__device__ inline float exp2_fast(float x) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
/// log2(x) for normal x > 0, within 2^-22 absolute near 1 and relative elsewhere; NaN stays NaN.
__device__ inline float log2_fast(float x) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return log2f(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
/// 1 / x for normal x, within 2^-23 relative.
__device__ inline float reciprocal_fast(float x) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
/// Out of line: 17 instructions, and hardly any division comes here.
__device__ __noinline__ inline std::uint32_t divide_large(std::uint32_t a, std::uint32_t b) { return a / b; }
/// a / b, rounded down, of a >= 0, b > 0, in a third of the instructions where a < 2^21: (a + 1/2) / b is 1 / (2 b) and
/// more away from any integer, and two roundings and a reciprocal change less than 2^-22 of it.
__device__ inline std::int32_t divide(std::int32_t a, std::int32_t b) {
  if (__builtin_expect(a < 1 << 21, 1))
    return static_cast<std::int32_t>((static_cast<float>(a) + 0.5f) * reciprocal_fast(static_cast<float>(b)));
  return static_cast<std::int32_t>(divide_large(static_cast<std::uint32_t>(a), static_cast<std::uint32_t>(b)));
}
/// 1 / sqrt(x) for normal x > 0, within 2^-22.4 relative (the PTX ISA's bound); infinite for 0.
__device__ inline float reciprocal_sqrt_fast(float x) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return 1.0f / sqrtf(x);
#else
  float y;
  asm("rsqrt.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
/// a * b + c, rounded once, then clamped to 0 .. 1; NaN becomes 0.
__device__ inline float multiply_add_saturated(float a, float b, float c) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return fminf(fmaxf(fmaf(a, b, c), 0.0f), 1.0f);
#else
  float y;
  asm("fma.rn.sat.f32 %0,%1,%2,%3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
  return y;
#endif
}
/// Two floats as halves, nearest even; `low` in the low 16 bits.
__device__ inline std::uint32_t pack_halves(float low, float high) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return float_to_half(low) | std::uint32_t{float_to_half(high)} << 16;
#else
  std::uint32_t x;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
#endif
}
struct two_floats {
  float low, high;
};
__device__ inline two_floats unpack_halves(std::uint32_t x) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return {half_to_float(static_cast<std::uint16_t>(x)), half_to_float(static_cast<std::uint16_t>(x >> 16))};
#else
  two_floats y;
  asm("{\n.reg .b16 l,h;\nmov.b32 {l,h},%2;\ncvt.f32.f16 %0,l;\ncvt.f32.f16 %1,h;\n}"
      : "=f"(y.low), "=f"(y.high)
      : "r"(x));
  return y;
#endif
}
/// The same for halves or bfloat16.
template <bool BFloat>
__device__ inline std::uint32_t pack_16bit(float low, float high) {
  if constexpr (!BFloat) {
    return pack_halves(low, high);
  } else {
#if defined(PACKKV_SIMT_EXECUTOR)
    return float_to_bfloat16(low) | std::uint32_t{float_to_bfloat16(high)} << 16;
#else
    std::uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
#endif
  }
}
template <bool BFloat>
__device__ inline two_floats unpack_16bit(std::uint32_t x) {
  if constexpr (BFloat)
    return {bit_cast<float>(x << 16), bit_cast<float>(x & 0xffff0000u)};
  else
    return unpack_halves(x);
}
/// 0 * x + sum for each half, halves or bfloat16: 0 as long as every x is finite, and NaN from then on.
template <bool BFloat>
__device__ inline std::uint32_t add_zero_times(std::uint32_t x, std::uint32_t sum) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const two_floats a = unpack_16bit<BFloat>(x), b = unpack_16bit<BFloat>(sum);
  return pack_16bit<BFloat>(0.0f * a.low + b.low, 0.0f * a.high + b.high);
#else
  std::uint32_t y;
  if constexpr (BFloat)
    asm("fma.rn.bf16x2 %0,%1,%2,%3;" : "=r"(y) : "r"(x), "r"(0u), "r"(sum));
  else
    asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(y) : "r"(x), "r"(0u), "r"(sum));
  return y;
#endif
}
/// The larger of two numbers, for each half; a number beats NaN.
__device__ inline std::uint32_t larger_halves(std::uint32_t a, std::uint32_t b) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const two_floats x = unpack_halves(a), y = unpack_halves(b);
  return pack_halves(fmaxf(x.low, y.low), fmaxf(x.high, y.high));
#else
  std::uint32_t y;
  asm("max.f16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
#endif
}
/// A register as it is, for what does not matter.
__device__ inline std::uint32_t anything() {
#if defined(PACKKV_SIMT_EXECUTOR)
  return 0;
#else
  std::uint32_t x;
  asm("" : "=r"(x));
  return x;
#endif
}
/// Whether a half of `a` is greater than its half of `b`; NaN is not.
__device__ inline bool any_half_above(std::uint32_t a, std::uint32_t b) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const two_floats x = unpack_halves(a), y = unpack_halves(b);
  return x.low > y.low || x.high > y.high;
#else
  std::uint32_t above;
  asm("{\n.reg .pred p,q;\nsetp.gt.f16x2 p|q,%1,%2;\nor.pred p,p,q;\nselp.u32 %0,1,0,p;\n}"
      : "=r"(above)
      : "r"(a), "r"(b));
  return above != 0;
#endif
}
/// Products of halves, nearest even.
__device__ inline std::uint32_t multiply_halves(std::uint32_t a, std::uint32_t b) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const two_floats x = unpack_halves(a), y = unpack_halves(b);
  return pack_halves(x.low * y.low, x.high * y.high);
#else
  std::uint32_t y;
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
#endif
}
/// a * b + c of halves, rounded once, to nearest even.
__device__ inline std::uint32_t multiply_add_halves(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const two_floats x = unpack_halves(a), y = unpack_halves(b), z = unpack_halves(c);
  return pack_halves(fmaf(x.low, y.low, z.low), fmaf(x.high, y.high, z.high));
#else
  std::uint32_t y;
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
#endif
}
/// The low or the high half of x, twice.
template <bool High>
__device__ inline std::uint32_t half_twice(std::uint32_t x) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const std::uint32_t half = High ? x >> 16 : x & 0xffffu;
  return half | half << 16;
#else
  std::uint32_t y;
  if constexpr (High)
    asm("{\n.reg .b16 l,h;\nmov.b32 {l,h},%1;\nmov.b32 %0,{h,h};\n}" : "=r"(y) : "r"(x));
  else
    asm("{\n.reg .b16 l,h;\nmov.b32 {l,h},%1;\nmov.b32 %0,{l,l};\n}" : "=r"(y) : "r"(x));
  return y;
#endif
}
/// Both halves times a power of two, rounded to nearest even where they become subnormal.
__device__ inline std::uint32_t scale_halves(std::uint32_t x, float factor) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const two_floats y = unpack_halves(x);
  return pack_halves(y.low * factor, y.high * factor);
#else
  std::uint32_t y;
  asm("{\n.reg .b16 f;\n.reg .b32 ff;\ncvt.rn.f16.f32 f,%2;\nmov.b32 ff,{f,f};\nmul.rn.f16x2 %0,%1,ff;\n}"
      : "=r"(y)
      : "r"(x), "f"(factor));
  return y;
#endif
}

}  // namespace packkv::detail
