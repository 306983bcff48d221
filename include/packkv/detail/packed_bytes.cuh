// SPDX-License-Identifier: Apache-2.0
// Words of four bytes or of two 16-bit numbers, one instruction each on sm_90; and 64-bit words that blocks of one
// launch tell each other.
#pragma once

#include <packkv/detail/approx.cuh>
#include <packkv/detail/cuda.cuh>

namespace packkv::detail {

#if defined(PACKKV_SIMT_EXECUTOR)
/// f of the low and of the high halves.
template <class F>
inline std::uint32_t of_halves(std::uint32_t a, std::uint32_t b, F&& f) {
  return std::uint32_t{f(static_cast<std::uint16_t>(a), static_cast<std::uint16_t>(b))} |
         std::uint32_t{f(static_cast<std::uint16_t>(a >> 16), static_cast<std::uint16_t>(b >> 16))} << 16;
}
/// The smaller of two halves or bfloat16; NaN wins, and -0 is less than +0.
template <bool BFloat>
inline std::uint16_t smaller_float(std::uint16_t a, std::uint16_t b, bool larger) {
  const auto key = [](std::uint16_t x) { return (x & 0x8000u) != 0 ? -static_cast<int>(x & 0x7fffu) - 1 : int{x}; };
  const unsigned infinity = BFloat ? 0x7f80u : 0x7c00u;
  if ((a & 0x7fffu) > infinity || (b & 0x7fffu) > infinity) return 0x7fff;
  return (key(a) < key(b)) != larger ? a : b;
}
#endif

/// Smallest and largest of two halves or bfloat16, for both parts of a word. NaN wins.
template <bool BFloat>
__device__ inline std::uint32_t min_floats16(std::uint32_t a, std::uint32_t b) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return of_halves(a, b, [](std::uint16_t x, std::uint16_t y) { return smaller_float<BFloat>(x, y, false); });
#else
  std::uint32_t y;
  if constexpr (BFloat)
    asm("min.NaN.bf16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b));
  else
    asm("min.NaN.f16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
#endif
}
template <bool BFloat>
__device__ inline std::uint32_t max_floats16(std::uint32_t a, std::uint32_t b) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return of_halves(a, b, [](std::uint16_t x, std::uint16_t y) { return smaller_float<BFloat>(x, y, true); });
#else
  std::uint32_t y;
  if constexpr (BFloat)
    asm("max.NaN.bf16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b));
  else
    asm("max.NaN.f16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
#endif
}

/// 0xffff where a half or bfloat16 of `a` is less than that of `b`, else 0, for both parts of a word; NaN is not.
template <bool BFloat>
__device__ inline std::uint32_t masks_of_less(std::uint32_t a, std::uint32_t b) {
#if !defined(PACKKV_SIMT_EXECUTOR) && defined(__CUDA_ARCH__)
  constexpr bool has_instruction = !BFloat || __CUDA_ARCH__ >= 900;
#else
  constexpr bool has_instruction = false;
#endif
  if constexpr (has_instruction) {
    std::uint32_t y = 0;
    if constexpr (BFloat)
      asm("set.lt.u32.bf16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b));
    else
      asm("set.lt.u32.f16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
  } else {
    const two_floats x = unpack_16bit<BFloat>(a), y = unpack_16bit<BFloat>(b);
    return (x.low < y.low ? 0xffffu : 0u) | (x.high < y.high ? 0xffff0000u : 0u);
  }
}
/// How many masks there are in a sum of words of such masks, modulo 2^32; at most 65,535 in each part.
__device__ inline int masks_in(std::uint32_t sum) {
  // A low one adds 2^16 - 1, a high one -2^16.
  const std::uint32_t low = -sum & 0xffffu;
  return static_cast<int>(2 * low) - (static_cast<int>(sum + low) >> 16);
}

/// Smallest and largest of three, for both unsigned 16-bit parts of a word.
__device__ inline std::uint32_t min_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const auto f = [](std::uint16_t x, std::uint16_t y) { return x < y ? x : y; };
  return of_halves(of_halves(a, b, f), c, f);
#else
  return __vimin3_u16x2(a, b, c);
#endif
}
__device__ inline std::uint32_t max_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const auto f = [](std::uint16_t x, std::uint16_t y) { return x > y ? x : y; };
  return of_halves(of_halves(a, b, f), c, f);
#else
  return __vimax3_u16x2(a, b, c);
#endif
}

/// Four bytes of the eight of `a` (0..3) and `b` (4..7): nibble i of the selector names byte i of the result.
__device__ inline std::uint32_t select_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const std::uint64_t both = a | std::uint64_t{b} << 32;
  std::uint32_t y = 0;
  for (int i = 0; i < 4; ++i) y |= static_cast<std::uint32_t>(both >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
  return y;
#else
  return __byte_perm(a, b, selector);
#endif
}

/// Sum of the products of four unsigned bytes, and c.
__device__ inline std::uint32_t dot_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
#if defined(PACKKV_SIMT_EXECUTOR)
  for (int i = 0; i < 32; i += 8) c += (a >> i & 0xffu) * (b >> i & 0xffu);
  return c;
#else
  return __dp4a(a, b, c);
#endif
}

/// Distances of four unsigned bytes.
__device__ inline std::uint32_t byte_distances(std::uint32_t a, std::uint32_t b) {
#if defined(PACKKV_SIMT_EXECUTOR)
  std::uint32_t y = 0;
  for (int i = 0; i < 32; i += 8) {
    const std::uint32_t p = a >> i & 0xffu, q = b >> i & 0xffu;
    y |= (p > q ? p - q : q - p) << i;
  }
  return y;
#else
  return __vabsdiffu4(a, b);
#endif
}

/// A word that other blocks of the launch read by observe(), as a whole; orders nothing else.
__device__ inline void publish(std::int64_t* p, std::int64_t x) {
#if defined(PACKKV_SIMT_EXECUTOR)
  atomicExch(p, x);
#else
  asm volatile("st.relaxed.gpu.global.s64 [%0],%1;" ::"l"(__cvta_generic_to_global(p)), "l"(x) : "memory");
#endif
}
__device__ inline std::int64_t observe(std::int64_t* p) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return atomicAdd(p, 0);
#else
  std::int64_t x;
  asm volatile("ld.relaxed.gpu.global.s64 %0,[%1];" : "=l"(x) : "l"(__cvta_generic_to_global(p)) : "memory");
  return x;
#endif
}

}  // namespace packkv::detail
