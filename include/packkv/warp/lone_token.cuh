// SPDX-License-Identifier: Apache-2.0
// A warp codes one token of 128 channels, four neighbours a lane, into a tile that others may change at the same time.
// One idea: what the definition does by a square root and divisions in double and float, done by multiply-adds whose
// result is the same, proven for the numbers that nearly all tokens have; any other token is left to
// warp::store_plan_token.
//   warp::lone_token<Codec, false> coded(load8(channels + 8 * lane_id()));
//   coded.aim(slot, tile);
//   if (coded.code()) coded.store();
#pragma once

#include <packkv/thread/definition.cuh>
#include <packkv/warp/plan_token.cuh>
#include <packkv/warp/tile_encoder.cuh>

namespace packkv::warp {

/// Whether a codec has a lone_token. Its tokens must not have offsets or calibrated steps.
template <class Codec>
inline constexpr bool has_lone_token = has_tile_encoder<Codec>&& Codec::head_dim == 128;

/// Tokens of codecs of which has_lone_token holds; BFloat: their elements are bfloat16.
template <class Codec, bool BFloat>
class lone_token {
  static_assert(has_lone_token<Codec>, "plans of 128 channels, identity or Hadamard, no leading components");

 public:
  /// Of the token whose channels 4 l .. 4 l + 3 lane l has. All lanes take part, in all that follows, too.
  __device__ explicit lone_token(const detail::bytes8& bits) {
    using namespace packkv::detail;
    for (int w = 0; w < 2; ++w) {
      const two_floats x = unpack_16bit<BFloat>(bits.word[w]);
      y_[2 * w] = x.low, y_[2 * w + 1] = x.high;
    }
    if constexpr (spec.transform == transform_kind::hadamard) hadamard(y_);
  }
  /// It will be token `token` of a tile, whose words are requested.
  __device__ void aim(int token, std::uint8_t* tile) {
    token_ = token, tile_ = tile;
    words_ = words_type(tile, token);
    words_.load_neighbours();
  }
  /// False: the token may have something to report, or needs the arithmetic of the definition. The same in all lanes.
  __device__ bool code() {
    using namespace packkv::detail;
    double sum = 0.0;
    for (const float x : y_) sum = add_square(sum, x);
    const thread::row_scale_number scale(warp_sum(sum) * (1.0 / Codec::head_dim));  // not finite: no number
    scale_ = scale.half_bits();
    traded_ = words_type::trade_neighbours(codes_of(y_, scale.value));
    bool tiny = false;
    for (const float x : y_) tiny = tiny || thread::is_tiny<BFloat>(x);
    return scale.value != 0.0f && __any_sync(all_lanes, tiny) == 0;
  }
  /// Stores it where it was aimed at.
  __device__ void store() const {
    if (packkv::detail::lane_id() == 0)
      *reinterpret_cast<std::uint16_t*>(tile_ + spec.code_bytes() + 2 * row_slot(token_)) = scale_;
    words_.store_neighbours(traded_);
  }

 private:
  using words_type = plan_words<Codec>;
  static constexpr codec_spec spec = Codec::spec();

  /// warp::hadamard of four neighbours a lane.
  __device__ static void hadamard(float (&y)[4]) {
    using namespace packkv::detail;
    constexpr int block = hadamard_block(Codec::head_dim);
    static_assert(block == 4 * warp_threads, "strides up to half a warp");
    using octet = token_octet<Codec>;
    octet::pair(y[0], y[1]), octet::pair(y[2], y[3]);
    octet::pair(y[0], y[2]), octet::pair(y[1], y[3]);
    for (int stride = 1; stride < warp_threads; stride *= 2) {
      const float sign = (lane_id() & stride) == 0 ? 1.0f : -1.0f;
      for (float& x : y) x = fma_rn(sign, x, shuffle_xor(x, stride));
    }
    for (float& x : y) x = mul_rn(x, hadamard_scale(block));
  }
  /// encode_element of the lane's four, a byte each.
  __device__ static std::uint32_t codes_of(const float (&y)[4], float row) {
    using namespace packkv::detail;
    const auto [width, step] = words_type::strip_of(4 * lane_id());
    const thread::repeated_division by(mul_rn(row, step));
    std::uint32_t codes = 0;
    for (int j = 0; j < 4; ++j) codes |= thread::code_of(by.quotient(y[j]), width) << (8 * j);
    return codes;
  }

  float y_[4];
  int token_ = 0;
  std::uint8_t* tile_ = nullptr;
  words_type words_{nullptr, 0};
  std::uint16_t scale_ = 0;
  std::uint32_t traded_ = 0;
};

}  // namespace packkv::warp
