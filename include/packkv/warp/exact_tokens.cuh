// SPDX-License-Identifier: Apache-2.0
// A warp codes eight tokens at once, each in a tile of its own, in the arithmetic of the definition
// (reference::encode_token): for the few tokens of which warp::tile_encoder is not certain.
// One idea: four lanes have a token, the channels 4q .. 4q + 3 of every 16 each, and do in pairs of registers or of
// lanes what the definition does in a loop, in its order.
//   warp::exact_tokens<Codec, false>::encode(token, slot, tile, flags);   // token null: none
#pragma once

#include <packkv/detail/approx.cuh>
#include <packkv/warp/token_codec.cuh>

namespace packkv::warp {

/// Plans without leading components in the identity or the Hadamard transform, without offsets and calibrated steps.
template <class Codec, bool BFloat>
class exact_tokens {
 public:
  /// Codes the token of this lane's four, `dim` 16-bit channels side by side, 8-byte aligned, as token `slot` of
  /// `tile`, which is whole; null: none. What is reported is added to flags. All lanes take part.
  __device__ static void encode(const void* token, int slot, std::uint8_t* tile, std::uint32_t& flags) {
    using namespace packkv::detail;
    const int q = lane_id() % 4;
    float y[blocks][4];
    for (int b = 0; b < blocks; ++b) {
      bytes8 bits = {};
      if (token != nullptr) bits = load8(static_cast<const char*>(token) + 32 * b + 8 * q);
      for (int w = 0; w < 2; ++w) {
        const two_floats x = unpack_16bit<BFloat>(bits.word[w]);
        y[b][2 * w] = x.low, y[b][2 * w + 1] = x.high;
      }
    }
    const bool finite = all_finite(y);
    if constexpr (turned) hadamard(y, q);
    const bool in_range = all_finite(y);
    const double sum = sum_of_squares(y);
    const std::uint16_t scale = finite && in_range ? row_scale_bits(sum, dim) : std::uint16_t{0x7fff};
    const bool valid = scale != 0x7fff;
    if (token == nullptr) return;
    if (q == 0) {
      if (!valid) flags |= finite ? report_scale_overflow : report_nonfinite_input;
      *reinterpret_cast<std::uint16_t*>(tile + 4 * strips.words + 2 * row_slot(slot)) = scale;
    }
    const float row = half_to_float(scale);
    for_constants<blocks>([&](auto block) {
      constexpr int b = decltype(block)::value, width = strips.width[16 * b / strips.channels];
      std::uint32_t codes[4];
      const float step = mul_rn(row, gaussian_step(width));
      for (int j = 0; j < 4; ++j) codes[j] = width > 0 && valid ? encode_element(y[b][j], step, width) : 0u;
      store<b>(codes, slot, 4 * q, shared_words(tile));
    });
  }

 private:
  static constexpr int dim = Codec::head_dim, blocks = dim / 16;
  static constexpr strip_layout strips = Codec::spec().strips;
  static constexpr bool turned = Codec::spec().transform == transform_kind::hadamard;

  /// Of a token.
  __device__ static bool all_finite(const float (&y)[blocks][4]) {
    bool finite = true;
    for (int b = 0; b < blocks; ++b)
      for (int j = 0; j < 4; ++j) finite = finite && detail::is_finite(y[b][j]);
    int all = finite ? 1 : 0;
    all &= detail::shuffle_xor(all, 1);
    return (all & detail::shuffle_xor(all, 2)) != 0;
  }
  /// Strides 1 and 2 within a lane's four, 4 and 8 between lanes, the others between blocks.
  __device__ static void hadamard(float (&y)[blocks][4], int q) {
    using namespace packkv::detail;
    const auto pair = [](float& a, float& b) {
      const float low = a, high = b;
      a = add_rn(low, high), b = sub_rn(low, high);
    };
    for (int b = 0; b < blocks; ++b) {
      pair(y[b][0], y[b][1]), pair(y[b][2], y[b][3]);
      pair(y[b][0], y[b][2]), pair(y[b][1], y[b][3]);
      for (int j = 0; j < 4; ++j)
        for (int stride = 1; stride < 4; stride *= 2) {
          const float other = shuffle_xor(y[b][j], stride);
          y[b][j] = (q & stride) == 0 ? add_rn(y[b][j], other) : sub_rn(other, y[b][j]);
        }
    }
    constexpr int channels = hadamard_block(dim);
#pragma unroll
    for (int stride = 1; 16 * stride < channels; stride *= 2)
#pragma unroll
      for (int b = 0; b < blocks; ++b)
        if ((b & stride) == 0)
          for (int j = 0; j < 4; ++j) pair(y[b][j], y[b + stride][j]);
    for (int b = 0; b < blocks; ++b)
      for (int j = 0; j < 4; ++j) y[b][j] = mul_rn(y[b][j], hadamard_scale(channels));
  }
  /// 32 sums of channels that agree modulo 32, then a tree of strides 16, 8, 4, 2, 1.
  __device__ static double sum_of_squares(const float (&y)[blocks][4]) {
    double part[2][4] = {};
    for (int b = 0; b < blocks; ++b)
      for (int j = 0; j < 4; ++j) part[b % 2][j] = detail::add_square(part[b % 2][j], y[b][j]);
    for (int j = 0; j < 4; ++j) {
      double& x = part[0][j];
      x += part[1][j];
      x += detail::shuffle_xor(x, 2);
      x += detail::shuffle_xor(x, 1);
    }
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
  }

  /// The codes of channels 16 * Block + first .. + 3.
  template <int Block>
  __device__ static void store(const std::uint32_t (&codes)[4], int slot, int first, const shared_words& words) {
    constexpr int strip = 16 * Block / strips.channels, width = strips.width[strip];
    if constexpr (width == 3) {
      store_plane<2, strips.low[strip], Block, 0>(codes, slot, first, words);
      store_plane<1, strips.high[strip], Block, 2>(codes, slot, first, words);
    } else if constexpr (width > 0) {
      store_plane<width, strips.low[strip], Block, 0>(codes, slot, first, words);
    }
  }
  /// Their bits From .. From + Bits - 1.
  template <int Bits, int Base, int Block, int From>
  __device__ static void store_plane(const std::uint32_t (&codes)[4], int slot, int first, const shared_words& words) {
    constexpr std::uint32_t mask = (1u << Bits) - 1;
    code_write write{0, 0, 0};
    for (int j = 0; j < 4; ++j) {
      const int channel = 16 * Block + first + j;
      const bit_field f = strips.which == side::key
                              ? packkv::detail::key_field(Bits, Base, strips.channels, slot, channel)
                              : packkv::detail::value_field(Bits, Base, slot, channel);
      write.word = f.word;
      write.mask |= mask << f.bit;
      write.bits |= (codes[j] >> From & mask) << f.bit;
      if (strips.which == side::value || j == 3) {  // the four codes of a key are in one word
        words(write);
        write.mask = write.bits = 0;
      }
    }
  }
};

}  // namespace packkv::warp
