// SPDX-License-Identifier: Apache-2.0
// A warp codes one token of 128 channels, four neighbours a lane, into a tile that others may change at the same time.
// One idea: what the definition does by a square root and divisions in double and float, done by multiply-adds whose
// result is the same, proven for the numbers that nearly all tokens have; any other token is left to
// warp::store_plan_token.
//   warp::lone_token<Codec, false> coded(load8(channels + 8 * lane_id()));
//   coded.aim(slot, tile);
//   if (coded.code()) coded.store();
#pragma once

#include <packkv/warp/plan_token.cuh>
#include <packkv/warp/tile_encoder.cuh>

namespace packkv::warp {

/// Divides by one number: the bits of div_rn where both numbers and the quotient lie far from the ends of float's
/// range. Newton's iteration as compilers do it, with the reciprocal kept.
class repeated_division {
 public:
  __device__ explicit repeated_division(float by) : minus_by_(-by) {
    const float first = detail::reciprocal_fast(by);
    reciprocal_ = detail::fma_rn(first, detail::fma_rn(minus_by_, first, 1.0f), first);
  }
  __device__ float quotient(float x) const {
    using detail::fma_rn;
    float q = detail::mul_rn(x, reciprocal_);
    q = fma_rn(reciprocal_, fma_rn(minus_by_, q, x), q);
    return fma_rn(reciprocal_, fma_rn(minus_by_, q, x), q);
  }

 private:
  float minus_by_, reciprocal_;
};

/// A row scale: the half nearest to a root mean square.
struct row_scale_number {
  float value = 0.0f;  ///< 0: left to row_scale_bits

  /// Of the mean of squares, whatever the order in which it was summed. 12 bits hold the border between two halves, and
  /// 24 its square, so that a difference says on which side the root lies; the definition's root is rounded to float
  /// first, which makes those within half a float of the border lie on it.
  __device__ explicit row_scale_number(double mean) {
    using namespace packkv::detail;
    const auto rough = static_cast<float>(mean);
    const float root = rough * reciprocal_sqrt_fast(rough);
    if (!(root >= 0x1p-13f && root < 65000.0f)) return;
    const std::uint32_t below = bit_cast<std::uint32_t>(root) & 0xffffe000u;
    const auto border = bit_cast<float>(below | 0x1000u);
    const auto above = static_cast<float>(mean - double{border} * double{border});
    const float on_it = border * bit_cast<float>((below & 0x7f800000u) - (23u << 23));
    if (fabsf(fabsf(above) - on_it) <= on_it * 0x1p-16f) return;
    const bool up = above > on_it || (above > -on_it && (below & 0x2000u) != 0);  // the even one from the border
    value = bit_cast<float>(below + (up ? 0x2000u : 0u));
  }
  __device__ std::uint16_t half_bits() const {
    return static_cast<std::uint16_t>((detail::bit_cast<std::uint32_t>(value) >> 13) - (112u << 10));
  }
};

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
    const row_scale_number scale(warp_sum(sum) * (1.0 / Codec::head_dim));  // not finite: no number
    scale_ = scale.half_bits();
    traded_ = words_type::trade_neighbours(codes_of(y_, scale.value));
    return scale.value != 0.0f && !has_tiny(y_);
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
  /// Whether an element is so small that a division may lose it; of halves none is.
  __device__ static bool has_tiny([[maybe_unused]] const float (&y)[4]) {
    if constexpr (!BFloat) return false;
    bool tiny = false;
    for (const float x : y) tiny = tiny || (x != 0.0f && fabsf(x) < 0x1p-80f);
    return __any_sync(detail::all_lanes, tiny) != 0;
  }
  /// encode_element of the lane's four, a byte each.
  __device__ static std::uint32_t codes_of(const float (&y)[4], float row) {
    using namespace packkv::detail;
    const auto [width, step] = words_type::strip_of(4 * lane_id());
    const auto half = static_cast<float>(1 << width >> 1);
    const repeated_division by(mul_rn(row, step));
    std::uint32_t codes = 0;
    for (int j = 0; j < 4; ++j) {
      const float u = fminf(fmaxf(by.quotient(y[j]), -half), half - 0.5f);
      codes |= static_cast<std::uint32_t>(static_cast<int>(floorf(u)) + (1 << width >> 1)) << (8 * j);
    }
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
