// SPDX-License-Identifier: Apache-2.0
// Quantises one 64-token block of one side: ranges of its groups, then a byte for every element.
// One idea: smallest and largest are found on the bits, as integers; codes come from rows of channels with one divisor
// each, in loops without calls or branches that compilers vectorise. Equal to encode_code() for every element.
//   block_quantizer q(format, side::key);   status s = q.run(keys, first_token, ranges, codes, stride);
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <packkv/codec/pack_quantize.hpp>
#include <packkv/core/views.hpp>
#include <vector>

namespace packkv::reference::detail {

/// half_to_float of finite halves, without branches.
inline float finite_half_to_float(std::uint16_t bits) {
  const std::int32_t magnitude = bits & 0x7fff;
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  const std::uint32_t normal = (static_cast<std::uint32_t>(magnitude) << 13) + (112u << 23);
  const std::uint32_t value = magnitude < 0x400 ? packkv::detail::bit_cast<std::uint32_t>(subnormal) : normal;
  return packkv::detail::bit_cast<float>(value | sign);
}

/// Nearest integer, ties to even, for |x| < 2^22; the sum cannot be contracted, because x is a quotient.
inline float small_rint(float x) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23
  return (x + shift) - shift;
}

/// Quantises the blocks of one side of all batch rows.
class block_quantizer {
 public:
  block_quantizer(const pack_format& format, side which)
      : format_(format),
        codec_(format.codec(which)),
        dim_(codec_.head_dim),
        rows_(static_cast<std::size_t>(format.kv_heads) * tile_tokens * static_cast<std::size_t>(dim_)),
        low_(static_cast<std::size_t>(range_count(format, which))),
        high_(low_.size()),
        steps_(low_.size()) {}

  /// One block of batch row `b`. x [batch, kv_heads, tokens, D] of the format's element type; ranges [range_count()] in
  /// order of tokens; codes: byte (token, head, channel) at codes[token * stride + head * D + channel]. Refuses
  /// elements that are not finite, and codes of more than 8 bits; then ranges and codes are unspecified.
  status run(const input_view<4>& x, std::int64_t b, std::int64_t first_token, pack_range* ranges, std::uint8_t* codes,
             std::int64_t stride) {
    load(x, b, first_token);
    find_ranges();
    for (std::size_t i = 0; i < low_.size(); ++i)
      if (const status s = make_step(i, ranges[i]); !s) return s;
    for (int h = 0; h < format_.kv_heads; ++h)
      for (int t = 0; t < tile_tokens; ++t) code_row(h, t, codes + t * stride + std::int64_t{h} * dim_);
    return {};
  }

 private:
  std::uint16_t* row(int head, int token) {
    return rows_.data() + (static_cast<std::size_t>(head) * tile_tokens + static_cast<std::size_t>(token)) *
                              static_cast<std::size_t>(dim_);
  }

  void load(const input_view<4>& x, std::int64_t b, std::int64_t first_token) {
    for (int h = 0; h < format_.kv_heads; ++h)
      for (int t = 0; t < tile_tokens; ++t) {
        const char* const from = static_cast<const char*>(packkv::detail::address(x, b, h, first_token + t, 0));
        std::uint16_t* const to = row(h, t);
        if (x.stride[3] == 2)
          std::memcpy(to, from, static_cast<std::size_t>(dim_) * 2);
        else
          for (int c = 0; c < dim_; ++c) std::memcpy(to + c, from + c * x.stride[3], 2);
      }
  }

  void find_ranges() {
    low_.assign(low_.size(), 0x7fff);
    high_.assign(high_.size(), -0x8000);
    for (int h = 0; h < format_.kv_heads; ++h)
      for (int t = 0; t < tile_tokens; ++t) {
        const std::uint16_t* const x = row(h, t);
        const std::size_t group = static_cast<std::size_t>(range_index(codec_, h, t, 0));
        if (codec_.granularity == pack_granularity::channel) {
          std::int16_t *const low = low_.data() + group, *const high = high_.data() + group;
          for (int c = 0; c < dim_; ++c) {
            const std::int16_t v = ordered_bits(x[c]);
            low[c] = min_of(low[c], v);
            high[c] = max_of(high[c], v);
          }
        } else {
          std::int16_t low = low_[group], high = high_[group];
          for (int c = 0; c < dim_; ++c) {
            const std::int16_t v = ordered_bits(x[c]);
            low = min_of(low, v);
            high = max_of(high, v);
          }
          low_[group] = low;
          high_[group] = high;
        }
      }
  }

  status make_step(std::size_t i, pack_range& range) {
    if (!are_finite_bits(format_.element, low_[i], high_[i]))
      return refuse(status_code::invalid_argument, "an element to be packed is not finite");
    range = {element_bits(low_[i]), element_bits(high_[i])};
    const float low = range_value(format_.element, range.low), high = range_value(format_.element, range.high);
    steps_[i] = make_pack_step(codec_, low, high);
    if (!packkv::detail::is_finite(steps_[i].scale))
      return refuse(status_code::unsupported, "the elements of a group span more than a float holds");
    // Codes grow with the element, so the largest one decides for its group.
    const float widest = encode_code(codec_, steps_[i], high);
    if (!(widest <= static_cast<float>(max_pack_code)))
      return refuse(status_code::unsupported, "a code has more than 8 bits: the relative step is too small");
    return {};
  }

  void code_row(int head, int token, std::uint8_t* codes) {
    const std::uint16_t* const bits = row(head, token);
    float x[max_head_dim], divisor[max_head_dim], before[max_head_dim], after[max_head_dim];
    for (int c = 0; c < dim_; ++c) {
      const std::size_t group = static_cast<std::size_t>(range_index(codec_, head, token, c));
      const pack_step& s = steps_[group];
      const bool integer = codec_.zero == pack_zero::integer, equal = !(s.scale > 0.0f);
      divisor[c] = equal ? packkv::detail::infinity() : s.scale;  // x / infinity is 0
      before[c] = integer ? 0.0f : s.low;
      after[c] = integer && !equal ? s.zero : 0.0f;
      if (codec_.granularity == pack_granularity::channel || c > 0) continue;
      for (int k = 1; k < dim_; ++k) {
        divisor[k] = divisor[0];
        before[k] = before[0];
        after[k] = after[0];
      }
      break;
    }
    if (format_.element == dtype::float16)
      for (int c = 0; c < dim_; ++c) x[c] = finite_half_to_float(bits[c]);
    else
      for (int c = 0; c < dim_; ++c) x[c] = bfloat16_to_float(bits[c]);
    for (int c = 0; c < dim_; ++c)
      codes[c] =
          static_cast<std::uint8_t>(static_cast<std::int32_t>(small_rint((x[c] - before[c]) / divisor[c]) - after[c]));
  }

  const pack_format& format_;
  const pack_codec& codec_;
  int dim_;
  std::vector<std::uint16_t> rows_;       ///< [kv_heads][64][D]
  std::vector<std::int16_t> low_, high_;  ///< ordered bits, by group
  std::vector<pack_step> steps_;
};

}  // namespace packkv::reference::detail
