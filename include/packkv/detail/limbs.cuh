// SPDX-License-Identifier: Apache-2.0
// Integers of 31 bits as four signed bytes, for products of bytes by matrix instructions whose sums are exact.
// One idea: x = l0 + 256 l1 + 65536 l2 + 2^24 l3 with -128 <= l < 128; each limb is a column of the operand B.
//   w = to_limbs(x);   b = limb_of(w, 2);   total = total_of_limbs(d);
#pragma once

#include <packkv/detail/arith.hpp>
#include <packkv/detail/bits.cuh>

namespace packkv::detail {

/// |x| <= 2^30; byte i of the result is limb i.
PACKKV_HOST_DEVICE inline std::uint32_t to_limbs(std::int32_t x) {
  return (static_cast<std::uint32_t>(x) + 0x00808080u) ^ 0x00808080u;
}

/// Limb `which` of four integers in limbs, a byte each.
__device__ inline std::uint32_t gather_limb(const bytes16& x, int which) {
  const std::uint32_t selector = static_cast<std::uint32_t>(which) | static_cast<std::uint32_t>(4 + which) << 4;
  return permute_bytes(permute_bytes(x.word[0], x.word[1], selector), permute_bytes(x.word[2], x.word[3], selector),
                       0x5410);
}

/// The sums of products of which this lane has two limbs of two rows, as mma_u8s8 leaves them (fragment::c), and the
/// lane beside it the other two: that of row lane / 4 in even lanes, of row lane / 4 + 8 in odd ones. All lanes take
/// part.
__device__ inline std::int64_t total_of_limbs(const std::int32_t (&d)[4]) {
  const bool odd = lane_id() % 2 != 0;  // limbs 2 and 3
  const std::int64_t first = std::int64_t{d[1]} * 256 + d[0], second = std::int64_t{d[3]} * 256 + d[2];
  const std::int64_t own = odd ? second : first, other = shuffle_xor(odd ? first : second, 1);
  return (odd ? own : other) * 65536 + (odd ? other : own);
}

/// e such that |x| * 2^e < 2^bits for all |x| whose float bits are at most `largest`, finite; as large as that allows.
PACKKV_HOST_DEVICE constexpr int fixed_point_exponent(std::uint32_t largest, int bits) {
  const int exponent = static_cast<int>(largest >> 23);
  return bits + 126 - (exponent > 0 ? exponent : 1);
}

/// 2^e, -1022 <= e <= 1023.
PACKKV_HOST_DEVICE inline double power_of_two(int e) {
  return bit_cast<double>(static_cast<std::uint64_t>(1023 + e) << 52);
}

}  // namespace packkv::detail
