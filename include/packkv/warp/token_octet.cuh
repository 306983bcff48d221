// SPDX-License-Identifier: Apache-2.0
// Eight tokens in a warp, of a plan that is known at compile time: four lanes a token, the channels 4q .. 4q + 3 of
// every 16 each (warp::exact_tokens); and where codes lie, which tile_decoder asks, too. One idea: pairs of registers
// or of lanes do what the definition does in a loop, in its order.
//   using octet = warp::token_octet<Codec>;   octet::elements y;   octet::turn(y, lane_id() % 4);
#pragma once

#include <packkv/warp/token_codec.cuh>

namespace packkv::warp {

/// Plans without leading components in the identity or the Hadamard transform.
template <class Codec>
struct token_octet {
  static constexpr int dim = Codec::head_dim, blocks = dim / 16;
  static constexpr strip_layout strips = Codec::spec().strips;
  static constexpr bool turned = Codec::spec().transform == transform_kind::hadamard;
  using elements = float[blocks][4];
  /// Width of the strip in which block Block of 16 channels lies.
  template <int Block>
  static constexpr int width_of = strips.width[16 * Block / strips.channels];

  /// The transform, which is its own inverse: strides 1 and 2 within a lane's four, 4 and 8 between lanes, the others
  /// between blocks. All lanes take part.
  __device__ static void turn([[maybe_unused]] elements& y, [[maybe_unused]] int q) {
    if constexpr (turned) hadamard(y, q);
  }
  __device__ static void pair(float& a, float& b) {
    const float low = a, high = b;
    a = detail::add_rn(low, high), b = detail::sub_rn(low, high);
  }
  /// From the stage of `Stride` blocks on.
  template <int Stride>
  __device__ static void between_blocks(elements& y) {
    if constexpr (16 * Stride < hadamard_block(dim)) {
#pragma unroll
      for (int b = 0; b < blocks; ++b)
        if ((b & Stride) == 0)
          for (int j = 0; j < 4; ++j) pair(y[b][j], y[b + Stride][j]);
      between_blocks<2 * Stride>(y);
    }
  }
  __device__ static void hadamard(elements& y, int q) {
    using namespace packkv::detail;
    for (int b = 0; b < blocks; ++b) {
      pair(y[b][0], y[b][1]), pair(y[b][2], y[b][3]);
      pair(y[b][0], y[b][2]), pair(y[b][1], y[b][3]);
      for (int j = 0; j < 4; ++j)
        for (int stride = 1; stride < 4; stride *= 2) {
          y[b][j] = fma_rn(y[b][j], (q & stride) == 0 ? 1.0f : -1.0f, shuffle_xor(y[b][j], stride));
        }
    }
    between_blocks<1>(y);
    for (int b = 0; b < blocks; ++b)
      for (int j = 0; j < 4; ++j) y[b][j] = mul_rn(y[b][j], hadamard_scale(hadamard_block(dim)));
  }
  /// f(bits, first word of the plane, lowest bit in the code) of the planes of block Block, as integral constants.
  template <int Block, class F>
  __device__ static void for_planes(F&& f) {
    constexpr int strip = 16 * Block / strips.channels, width = strips.width[strip], low_bits = width == 3 ? 2 : width;
    if constexpr (width > 0)
      f(std::integral_constant<int, low_bits>{}, std::integral_constant<int, strips.low[strip]>{},
        std::integral_constant<int, 0>{});
    if constexpr (width == 3)
      f(std::integral_constant<int, 1>{}, std::integral_constant<int, strips.high[strip]>{},
        std::integral_constant<int, 2>{});
  }
  template <int Bits>
  PACKKV_HOST_DEVICE static constexpr bit_field field(int base, int token, int channel) {
    return strips.which == side::key ? packkv::detail::key_field(Bits, base, strips.channels, token, channel)
                                     : packkv::detail::value_field(Bits, base, token, channel);
  }

  /// A lane's codes of a token that lies in a tile already, of the channels first .. first + 3 of every 16, and what
  /// the words with them were when this was made. Other bits belong to others, who may change them meanwhile.
  class stored_codes {
   public:
    /// `first`: a multiple of 4.
    __device__ stored_codes(std::uint8_t* tile, int token, int first) : words_(tile), token_(token), first_(first) {
      detail::for_constants<blocks>([&](auto block) {
        constexpr int b = decltype(block)::value;
        for_planes<b>([&](auto bits, auto base, auto from) {
          for (int w = 0; w < words; ++w)
            loaded_[b][decltype(from)::value > 0][w] =
                words_.load(field<decltype(bits)::value>(decltype(base)::value, token_, 16 * b + first_ + w).word);
        });
      });
    }
    /// Makes them these, of block Block: few are not.
    template <int Block>
    __device__ void become(const std::uint32_t (&codes)[4]) const {
      for_planes<Block>([&](auto bits, auto base, auto from) {
        constexpr std::uint32_t mask = (1u << decltype(bits)::value) - 1;
        code_write write{0, 0, 0};
        for (int j = 0; j < 4; ++j) {
          const auto field_of = [&](int token) {
            return field<decltype(bits)::value>(decltype(base)::value, token, 16 * Block + first_ + j);
          };
          const int bit = field_of(token_).bit;
          write.mask |= mask << bit;
          write.bits |= (codes[j] >> decltype(from)::value & mask) << bit;
          if (words > 1 || j == 3) {
            const std::uint32_t loaded = loaded_[Block][decltype(from)::value > 0][words > 1 ? j : 0];
            if ((loaded & write.mask) != write.bits) {
              // Worked out again: addresses of all words would fill the registers.
              write.word = field_of(static_cast<int>(detail::opaque(static_cast<std::uint32_t>(token_)))).word;
              words_.replace(write, loaded);
            }
            write.mask = write.bits = 0;
          }
        }
      });
    }

   private:
    static constexpr int words = strips.which == side::value ? 4 : 1;  ///< of a plane; a key's four codes share one
    shared_words words_;
    int token_, first_;
    std::uint32_t loaded_[blocks][2][words];
  };
};

}  // namespace packkv::warp
