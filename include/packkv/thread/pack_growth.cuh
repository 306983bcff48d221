// SPDX-License-Identifier: Apache-2.0
// What a token adds to a pack, four channels at a time: the sum of ceil(log2(max - min + 1)) with it.
// One idea: |x - low| + |x - high| + (high - low) is twice the range of the pack with x, and the ones below the
// highest bit of a number count its length.
//   int widths = thread::joined_widths<7>(low, high, x);   thread::join_bytes(low, high, x);
#pragma once

#include <packkv/detail/packed_bytes.cuh>

namespace packkv::thread {

/// A word that has as many ones as the widths of four packs sum to, after token `x` joins them. The packs span low to
/// high; codes are below 2^Bits: 4, 7 or 8.
template <int Bits>
__device__ inline std::uint32_t joined_ones(std::uint32_t low, std::uint32_t high, std::uint32_t x) {
  using namespace packkv::detail;
  static_assert(Bits == 4 || Bits == 7 || Bits == 8, "there is a form for codes below 16, 128 and 256");
  if constexpr (Bits < 8) {
    // Twice a range fits a byte, and its bit 0 is 0. No byte carries into the next one.
    std::uint32_t twice = byte_distances(x, low) + byte_distances(x, high) + (high - low);
    twice |= twice >> 1 & 0x7e7e7e7eu;
    twice |= twice >> 2 & 0x3e3e3e3eu;
    if constexpr (Bits > 4) twice |= twice >> 4 & 0x0e0e0e0eu;
    return twice;
  } else {
    const auto ones = [](std::uint32_t l, std::uint32_t h, std::uint32_t y) {
      std::uint32_t range = max_pairs(h, y, y) - min_pairs(l, y, y);
      range |= range >> 1 & 0x007f007fu;
      range |= range >> 2 & 0x003f003fu;
      return range | (range >> 4 & 0x000f000fu);
    };
    constexpr std::uint32_t even = 0x00ff00ffu;
    return ones(low & even, high & even, x & even) | ones(low >> 8 & even, high >> 8 & even, x >> 8 & even) << 8;
  }
}

/// Smallest and largest of four packs after token x joins them.
__device__ inline void join_bytes(std::uint32_t& low, std::uint32_t& high, std::uint32_t x) {
  using namespace packkv::detail;
  constexpr std::uint32_t even = 0x00ff00ffu;
  const std::uint32_t y = x & even, low_even = low & even, high_even = high & even;
  low = select_bytes(min_pairs(low_even, y, y), min_pairs(low, x, x), 0x7250);
  high = select_bytes(max_pairs(high_even, y, y), max_pairs(high, x, x), 0x7250);
}

}  // namespace packkv::thread
