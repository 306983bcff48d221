// SPDX-License-Identifier: Apache-2.0
// What a tile of grouped values stores for a group of channels, of the eight tokens that a lane has scores of.
//   const lane_numbers<Codec> n(tile, group);   n.most(k);   n.least(k);   // of token 8 * k + lane / 4
#pragma once

#include <packkv/codec/codec.hpp>
#include <packkv/warp/score_columns.cuh>

namespace packkv::warp {

/// Codec is a static grouped_value_codec.
template <class Codec>
struct lane_numbers {
  detail::bytes16 maximum, minimum;  ///< halves

  __device__ lane_numbers(const std::uint8_t* tile, int group)
      : maximum(load_rows(tile + maximum_at + 2 * group * tile_tokens)),
        minimum(load_rows(tile + minimum_at + 2 * group * tile_tokens)) {}

  __device__ float most(int k) const { return half(maximum, k); }
  __device__ float least(int k) const { return half(minimum, k); }
  /// Tokens of which bit k of `dropped` is set become 0.
  __device__ void drop(std::uint32_t dropped) {
    if (dropped == 0) return;
    for (int k = 0; k < tokens_per_lane; ++k) {
      const std::uint32_t kept = (dropped >> k & 1u) == 0 ? ~0u : k % 2 == 0 ? 0xffff0000u : 0x0000ffffu;
      maximum.word[k / 2] &= kept;
      minimum.word[k / 2] &= kept;
    }
  }

 private:
  static constexpr int maximum_at = Codec::spec().maximum_offset(0), minimum_at = Codec::spec().minimum_offset(0);

  __device__ static float half(const detail::bytes16& x, int k) {
    const detail::two_floats pair = detail::unpack_halves(x.word[k / 2]);
    return k % 2 == 0 ? pair.low : pair.high;
  }
};

}  // namespace packkv::warp
