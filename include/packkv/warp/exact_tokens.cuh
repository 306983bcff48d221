// SPDX-License-Identifier: Apache-2.0
// A warp codes eight tokens at once, each in a tile of its own, in the arithmetic of the definition
// (reference::encode_token): for the few tokens of which warp::tile_encoder is not certain.
// One idea: four lanes have a token, the channels 4q .. 4q + 3 of every 16 each, and do in pairs of registers or of
// lanes what the definition does in a loop, in its order; for nearly all tokens without its root and divisions
// (thread/definition.cuh). Nearly all codes are right already, and only the others are changed.
//   warp::exact_tokens<Codec, false>::encode(token, slot, tile, flags);   // token null: none
#pragma once

#include <packkv/thread/definition.cuh>
#include <packkv/warp/token_octet.cuh>

namespace packkv::warp {

/// Plans without leading components in the identity or the Hadamard transform, without offsets and calibrated steps;
/// BFloat: the elements are bfloat16.
template <class Codec, bool BFloat>
class exact_tokens {
 public:
  /// Codes the token of this lane's four, `dim` 16-bit channels side by side, 8-byte aligned, as token `slot` of
  /// `tile`, which is whole and holds what its codes may be; null: none. What is reported is added to flags. All lanes
  /// take part.
  __device__ static void encode(const void* token, int slot, std::uint8_t* tile, std::uint32_t& flags) {
    using namespace packkv::detail;
    const int q = lane_id() % 4;
    const bool exists = token != nullptr;
    typename octet::elements y;
    for (int b = 0; b < blocks; ++b) {
      bytes8 bits = {};
      if (exists) bits = load8(static_cast<const char*>(token) + 32 * b + 8 * q);
      for (int w = 0; w < 2; ++w) {
        const two_floats x = unpack_16bit<BFloat>(bits.word[w]);
        y[b][2 * w] = x.low, y[b][2 * w + 1] = x.high;
      }
    }
    const bool finite = all_finite(y);
    octet::turn(y, q);
    const double sum = sum_of_squares(y);
    const thread::row_scale_number scale(sum * (1.0 / dim));  // not finite: no number
    bool quick = scale.value != 0.0f;
    for (int b = 0; b < blocks; ++b)
      for (int j = 0; j < 4; ++j) quick = quick && !thread::is_tiny<BFloat>(y[b][j]);
    if (__all_sync(all_lanes, quick || !exists) != 0) {
      if (!exists) return;
      const stored codes(tile, slot, 4 * q);  // on their way while codes are worked out
      if (q == 0) store_scale(tile, slot, scale.half_bits());
      for_constants<blocks>([&](auto block) {
        constexpr int b = decltype(block)::value, width = octet::template width_of<b>;
        const thread::repeated_division by(mul_rn(scale.value, gaussian_step(width)));
        std::uint32_t of[4];
        for (int j = 0; j < 4; ++j) of[j] = width > 0 ? thread::code_of(by.quotient(y[b][j]), width) : 0u;
        codes.template become<b>(of);
      });
    } else {
      encode_by_definition(y, sum, finite, exists, tile, slot, flags);
    }
  }

 private:
  using octet = token_octet<Codec>;
  using stored = typename octet::stored_codes;
  static constexpr int dim = octet::dim, blocks = octet::blocks;

  __device__ static void encode_by_definition(const typename octet::elements& y, double sum, bool finite, bool exists,
                                              std::uint8_t* tile, int slot, std::uint32_t& flags) {
    using namespace packkv::detail;
    const bool in_range = all_finite(y);
    const std::uint16_t scale = finite && in_range ? row_scale_bits(sum, dim) : std::uint16_t{0x7fff};
    const bool valid = scale != 0x7fff;
    if (!exists) return;
    if (lane_id() % 4 == 0) {
      if (!valid) flags |= finite ? report_scale_overflow : report_nonfinite_input;
      store_scale(tile, slot, scale);
    }
    const float row = half_to_float(scale);
    std::uint32_t bytes[blocks] = {};
    for_constants<blocks>([&](auto block) {
      constexpr int b = decltype(block)::value, width = octet::template width_of<b>;
      const float step = mul_rn(row, gaussian_step(width));
      if constexpr (width > 0)
        for (int j = 0; j < 4; ++j) bytes[b] |= (valid ? encode_element(y[b][j], step, width) : 0u) << (8 * j);
    });
    const stored codes(tile, slot, 4 * (lane_id() % 4));
    for_constants<blocks>([&](auto block) {
      constexpr int b = decltype(block)::value;
      std::uint32_t of[4];
      for (int j = 0; j < 4; ++j) of[j] = bytes[b] >> (8 * j) & 0xffu;
      codes.template become<b>(of);
    });
  }
  __device__ static void store_scale(std::uint8_t* tile, int slot, std::uint16_t scale) {
    *reinterpret_cast<std::uint16_t*>(tile + 4 * octet::strips.words + 2 * row_slot(slot)) = scale;
  }

  /// Of a token.
  __device__ static bool all_finite(const float (&y)[blocks][4]) {
    bool finite = true;
    for (int b = 0; b < blocks; ++b)
      for (int j = 0; j < 4; ++j) finite = finite && detail::is_finite(y[b][j]);
    int all = finite ? 1 : 0;
    all &= detail::shuffle_xor(all, 1);
    return (all & detail::shuffle_xor(all, 2)) != 0;
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
};

}  // namespace packkv::warp
