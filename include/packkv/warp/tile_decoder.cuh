// SPDX-License-Identifier: Apache-2.0
// A warp reconstructs the tokens of a tile of a plan that is known at compile time, to the bits of
// reference::decode_token. One idea: eight tokens at a time, four lanes a token, the channels 4q .. 4q + 3 of every 16
// each (warp::token_octet), so that a row of output is whole sectors; the codes of such four are bytes of a register,
// and a permutation of bytes makes each a float.
//   warp::tile_decoder<Codec, false>::decode(tile, count, [&](int t) { return row + t * stride; });
#pragma once

#include <packkv/detail/approx.cuh>
#include <packkv/detail/bits.cuh>
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
    code_bytes codes;
#pragma unroll 1
    for (int first = 0; first < count; first += 8) {
      const int t = first + lane_id() / 4;
      const float row =
          unpack_halves(*reinterpret_cast<const std::uint16_t*>(tile + 4 * octet::strips.words + 2 * row_slot(t))).low;
      if (first % (8 * code_bytes::octets) == 0) codes.load(reinterpret_cast<const std::uint32_t*>(tile), first / 8);
      typename octet::elements y;
      for_constants<octet::blocks>([&](auto block) {
        constexpr int b = decltype(block)::value, width = octet::template width_of<b>;
        if constexpr (width == 0)
          for (int j = 0; j < 4; ++j) y[b][j] = is_nan(row) ? row : 0.0f;
        else
          decode_bytes<width>(codes.template of<b>(first / 8), mul_rn(row, gaussian_step(width)), y[b]);
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

  /// The lane's codes, of a channel in each byte. Bytes of values have the codes of several octets.
  class code_bytes {
    PACKKV_HOST_DEVICE static constexpr int widest_plane() {
      int widest = 1;
      for (int s = 0; s < octet::strips.count; ++s)
        widest = max_of(widest, octet::strips.width[s] == 3 ? 2 : octet::strips.width[s]);
      return widest;
    }
    static constexpr bool values = octet::strips.which == side::value;

   public:
    static constexpr int octets = values ? 8 / widest_plane() : 1;  ///< that one load serves

    /// For the tokens 8 * number on, where `number` is a multiple of `octets`.
    __device__ void load(const std::uint32_t* tile, int number) {
      using namespace packkv::detail;
      const int t = lane_id() / 4, q = lane_id() % 4;
      for_constants<octet::blocks>([&](auto block) {
        constexpr int b = decltype(block)::value;
        octet::template for_planes<b>([&](auto bits, auto base, auto from) {
          constexpr int width = decltype(bits)::value;
          // A lane's fields lie as far from lane 0's in all octets and blocks.
          const bit_field own = octet::template field<width>(0, t, 4 * q);
          const bit_field first = octet::template field<width>(decltype(base)::value, 8 * number, 16 * b);
          const std::uint32_t* const word = tile + own.word + first.word;
          std::uint32_t& bytes = bytes_[b][decltype(from)::value > 0 ? 1 : 0];
          if constexpr (values) {
            constexpr int apart = value_field(width, 0, 0, 1).word;
            const auto byte = static_cast<std::uint32_t>(own.bit / 8), pair = byte | (byte + 4) << 4;
            bytes = permute_bytes(permute_bytes(word[0], word[apart], pair),
                                  permute_bytes(word[2 * apart], word[3 * apart], pair), 0x5410);
          } else {
            bytes = word[0] >> first.bit;
          }
        });
      });
    }
    /// The codes of block Block, of tokens 8 * number on; bits above a code do not matter.
    template <int Block>
    __device__ std::uint32_t of(int number) const {
      constexpr int width = octet::template width_of<Block>;
      if constexpr (width == 3)
        return (plane<2>(bytes_[Block][0], number) & 0x03030303u) |
               (plane<1>(bytes_[Block][1], number) << 2 & 0x04040404u);
      else
        return plane<width>(bytes_[Block][0], number);
    }

   private:
    template <int Bits>
    __device__ static std::uint32_t plane(std::uint32_t x, int number) {
      return values && Bits < 8 ? x >> (Bits * number % 8) : x;
    }
    std::uint32_t bytes_[octet::blocks][2];
  };

  /// y[j] = decode_element(the code in the low bits of byte j, step, Width), without conversions: a byte below the
  /// exponent of 2^23 is a float, of which a subtraction leaves what it holds, exactly.
  template <int Width>
  __device__ static void decode_bytes(std::uint32_t bytes, float step, float (&y)[4]) {
    using namespace packkv::detail;
    constexpr float base = 8388608.0f;  // 2^23
    // Twice the code where a byte has room, since centres are halves of integers.
    if constexpr (Width < 8) bytes = (bytes & 0x01010101u * ((1u << Width) - 1)) << 1;
    const float half_step = step * 0.5f;
    for_constants<4>([&](auto index) {
      constexpr int j = decltype(index)::value;
      const auto code = bit_cast<float>(permute_bytes(bytes, 0x4b000000u, 0x7440u + j));
      if constexpr (Width < 8)
        y[j] = mul_rn(sub_rn(code, base + 2.0f * code_centre(Width)), half_step);
      else
        y[j] = mul_rn(sub_rn(sub_rn(code, base), code_centre(Width)), step);
    });
  }
};

}  // namespace packkv::warp
