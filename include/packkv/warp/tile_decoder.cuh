// SPDX-License-Identifier: Apache-2.0
// A warp reconstructs the tokens of a tile of a plan that is known at compile time, to the bits of
// reference::decode_token. One idea: eight tokens at a time, four lanes a token, the channels 4q .. 4q + 3 of every 16
// each (warp::token_octet), so that a row of output is whole sectors.
//   warp::tile_decoder<Codec, false>::decode(tile, count, [&](int t) { return row + t * stride; });
#pragma once

#include <packkv/detail/approx.cuh>
#include <packkv/warp/token_octet.cuh>

namespace packkv::warp {

/// For codecs of which has_tile_encoder holds, without offsets and calibrated steps; BFloat: the output's type.
template <class Codec, bool BFloat>
class tile_decoder {
 public:
  /// Writes the first `count` tokens of a tile; at(t) is the address of `dim` 16-bit channels side by side, 8-byte
  /// aligned. All lanes take part.
  template <class At>
  __device__ static void decode(const std::uint8_t* tile, int count, At&& at) {
    using namespace packkv::detail;
    const int q = lane_id() % 4;
#pragma unroll 1
    for (int first = 0; first < count; first += 8) {
      const int t = first + lane_id() / 4;
      const float row =
          half_to_float(*reinterpret_cast<const std::uint16_t*>(tile + 4 * octet::strips.words + 2 * row_slot(t)));
      typename octet::elements y;
      for_constants<octet::blocks>([&](auto block) {
        constexpr int b = decltype(block)::value, width = octet::template width_of<b>;
        if constexpr (width == 0) {
          for (int j = 0; j < 4; ++j) y[b][j] = is_nan(row) ? row : 0.0f;
        } else {
          const float step = mul_rn(row, gaussian_step(width));
          std::uint32_t codes[4];
          octet::template load_codes<b>(reinterpret_cast<const std::uint32_t*>(tile), t, 4 * q, codes);
          for (int j = 0; j < 4; ++j) y[b][j] = decode_element(codes[j], step, width);
        }
      });
      octet::turn(y, q);
      if (t >= count) continue;
      char* const to = static_cast<char*>(at(t)) + 8 * q;
      for (int b = 0; b < octet::blocks; ++b)
        store8(to + 32 * b, {{pack_16bit<BFloat>(y[b][0], y[b][1]), pack_16bit<BFloat>(y[b][2], y[b][3])}});
    }
  }

 private:
  using octet = token_octet<Codec>;
};

}  // namespace packkv::warp
