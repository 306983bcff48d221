// SPDX-License-Identifier: Apache-2.0
// Bits and bytes of 32-bit registers, one instruction each on a GPU.
//   x = permute_bytes<0x6420>(a, b);   x = funnel_shift_right(low, high, 16 * odd);   y = field_spreader(3)(x);
#pragma once

#include <packkv/detail/cuda.cuh>

namespace packkv::detail {

/// Byte i of the result is byte (selector >> 4 i) % 8 of `low` (0..3) and `high` (4..7); bits 3, 7, 11 and 15 of the
/// selector are 0.
__device__ inline std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
#if defined(PACKKV_SIMT_EXECUTOR)
  const std::uint64_t both = low | static_cast<std::uint64_t>(high) << 32;
  std::uint32_t x = 0;
  for (int i = 0; i < 4; ++i)
    x |= static_cast<std::uint32_t>(both >> (8 * (selector >> (4 * i) & 7u)) & 0xffu) << (8 * i);
  return x;
#else
  std::uint32_t x;  // __byte_perm clears those bits of the selector first
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(x) : "r"(low), "r"(high), "r"(selector));
  return x;
#endif
}

/// The low half of (high:low) >> bits, 0 <= bits <= 32.
__device__ inline std::uint32_t funnel_shift_right(std::uint32_t low, std::uint32_t high, std::uint32_t bits) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return static_cast<std::uint32_t>((low | static_cast<std::uint64_t>(high) << 32) >> bits);
#else
  return __funnelshift_rc(low, high, bits);
#endif
}
/// The same by bits % 32.
__device__ inline std::uint32_t funnel_shift_right_by_rest(std::uint32_t low, std::uint32_t high, std::uint32_t bits) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return funnel_shift_right(low, high, bits % 32);
#else
  return __funnelshift_r(low, high, bits);
#endif
}

/// The sums of the bytes of a and b, each modulo 256.
__device__ inline std::uint32_t add_bytes(std::uint32_t a, std::uint32_t b) {
  return ((a & 0x7f7f7f7fu) + (b & 0x7f7f7f7fu)) ^ ((a ^ b) & 0x80808080u);
}

/// Turns four fields of `bits` <= 8 bits each into four bytes. What depends on `bits` alone is made once.
class field_spreader {
 public:
  field_spreader() = default;
  /// Keeps the first `count` fields; the bytes of the others are 0.
  __device__ explicit field_spreader(std::uint32_t bits, int count = 4)
      : by_ones_(0x100u >> bits),
        mask_(((1u << bits) - 1u) * (count == 4 ? 0x01010101u : 0x00010101u >> (8 * (3 - count)))) {}
  /// The fields at the low end of x; what lies above them does not matter.
  __device__ std::uint32_t operator()(std::uint32_t x) const {
    // Two fields to a half, then one to a byte. Shifts to the left are products, which take other units.
    const std::uint32_t halves = permute_bytes(x, x * (by_ones_ * by_ones_), 0x7610);
    return permute_bytes(halves, halves * by_ones_, 0x7250) & mask_;
  }

 private:
  std::uint32_t by_ones_, mask_;
};

}  // namespace packkv::detail
