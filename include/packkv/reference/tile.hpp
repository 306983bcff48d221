// SPDX-License-Identifier: Apache-2.0
// The CPU definition of a tile: encode one token into it, decode one token from it.
// One idea: a token's bytes depend on that token alone, so a tile is encoded token by token in any order; but for keys
// that are grouped along tokens, of which a tile is encoded at once.
//   reference::encode_token(spec, head, x, token, tile, report);   reference::decode_token(spec, head, tile, token, x);
//   reference::encode_tile(spec, head, count, load, tile, report);
#pragma once

#include <cstdint>
#include <cstring>
#include <packkv/codec/grouped_quantize.hpp>
#include <packkv/codec/pages.hpp>
#include <packkv/codec/transform.hpp>
#include <vector>

namespace packkv::reference {

namespace detail {

inline void store_bits(std::uint8_t* tile, std::int64_t offset, std::uint16_t bits) {
  std::memcpy(tile + offset, &bits, 2);
}
inline std::uint16_t load_bits(const std::uint8_t* tile, std::int64_t offset) {
  std::uint16_t bits;
  std::memcpy(&bits, tile + offset, 2);
  return bits;
}

/// y = T (x - offset).
inline void to_coded_basis(const codec_spec& spec, const head_parameters& head, const float* x, float* y) {
  float centred[max_head_dim];
  for (int c = 0; c < spec.head_dim; ++c)
    centred[c] = head.channel_offset != nullptr ? packkv::detail::sub_rn(x[c], head.offset(c)) : x[c];
  packkv::detail::transform_forward(spec.transform, head.transform(), spec.head_dim, centred, y);
}
/// x = T^-1 y + offset.
inline void to_original_basis(const codec_spec& spec, const head_parameters& head, const float* y, float* x) {
  packkv::detail::transform_inverse(spec.transform, head.transform(), spec.head_dim, y, x);
  for (int c = 0; c < spec.head_dim && head.channel_offset != nullptr; ++c)
    x[c] = packkv::detail::add_rn(x[c], head.offset(c));
}
inline bool all_finite(const codec_spec& spec, const float* x) {
  bool finite = true;
  for (int c = 0; c < spec.head_dim; ++c) finite = finite && packkv::detail::is_finite(x[c]);
  return finite;
}
inline void store_code(std::uint8_t* tile, const code_place& place, std::uint32_t code) {
  std::uint32_t* words = reinterpret_cast<std::uint32_t*>(tile);
  const code_writes writes = split_code(place, code);
  for (int i = 0; i < writes.count; ++i) {
    const code_write& w = writes.write[i];
    words[w.word] = (words[w.word] & ~w.mask) | w.bits;
  }
}

inline void encode_plan_token(const codec_spec& spec, const head_parameters& head, const float* x, int token,
                              std::uint8_t* tile, device_report& report) {
  using namespace packkv::detail;
  const int dim = spec.head_dim;
  float y[max_head_dim];
  to_coded_basis(spec, head, x, y);

  // 32 partial sums, then a tree: the order in which a warp adds (warp/token_codec.cuh).
  double partial[32] = {};
  const bool finite = all_finite(spec, x), in_range = all_finite(spec, y);
  for (int c = spec.leading; c < dim; ++c) partial[c % 32] = add_square(partial[c % 32], y[c]);
  for (int stride = 16; stride > 0; stride /= 2)
    for (int i = 0; i < stride; ++i) partial[i] += partial[i + stride];

  const std::uint16_t scale_bits =
      finite && in_range ? row_scale_bits(partial[0], dim - spec.leading) : std::uint16_t{0x7fff};
  if (!finite)
    report.flags |= report_nonfinite_input;
  else if (scale_bits == 0x7fff)
    report.flags |= report_scale_overflow;
  const float row = half_to_float(scale_bits);
  const bool valid = scale_bits != 0x7fff;

  for (int c = 0; c < dim; ++c) {
    const code_place place = locate(spec.strips, token, c);
    if (place.width == 0) continue;
    std::uint32_t code = 0;
    if (valid && c >= spec.leading) {
      const float step = mul_rn(row, column_of(head, place.width, c));
      code = encode_element(y[c], step, place.width);
    }
    store_code(tile, place, code);
  }
  store_bits(tile, spec.code_bytes() + 2 * row_slot(token), scale_bits);
  for (int i = 0; i < spec.leading; ++i) {
    bool clamped = false;
    const std::int8_t q = valid ? encode_leading(y[i], head.leading_scale[i], clamped) : std::int8_t{0};
    report.leading_clamps += clamped ? 1u : 0u;
    std::memcpy(tile + spec.leading_offset() + i * tile_tokens + row_slot(token), &q, 1);
  }
}

/// A group of `count` elements of a tile: element i, y[i * apart], belongs to place(i) = (token, channel). `finite`:
/// the tokens that it reaches are finite.
template <class Place>
void encode_group(const codec_spec& spec, const float* y, int count, int apart, bool finite, Place&& place,
                  std::uint8_t* tile, device_report& report) {
  using namespace packkv::detail;
  float lowest = infinity(), highest = -infinity();
  bool in_range = true;
  for (int i = 0; i < count; ++i) {
    in_range = in_range && is_finite(y[i * apart]);
    lowest = std::fmin(lowest, y[i * apart]);
    highest = std::fmax(highest, y[i * apart]);
  }
  const group_numbers n = in_range ? min_max_numbers(lowest, highest) : group_numbers{};
  if (finite && !n.valid()) report.flags |= report_scale_overflow;
  const auto [first_token, first_channel] = place(0);
  const int group = spec.group_of(first_token, first_channel), width = spec.strips.width[0];
  store_bits(tile, spec.maximum_offset(group), n.first);
  store_bits(tile, spec.minimum_offset(group), n.minimum);
  for (int i = 0; i < count; ++i) {
    const auto [token, channel] = place(i);
    store_code(tile, locate(spec.strips, token, channel),
               code_above(min_max_values(width, n), y[i * apart], top_code(width)));
  }
}

struct token_channel {
  int token, channel;
};
inline void encode_value_groups(const codec_spec& spec, const head_parameters& head, const float* x, int token,
                                std::uint8_t* tile, device_report& report) {
  float y[max_head_dim];
  to_coded_basis(spec, head, x, y);
  const bool finite = all_finite(spec, x);
  if (!finite) report.flags |= report_nonfinite_input;
  for (int first = 0; first < spec.head_dim; first += spec.group)
    encode_group(
        spec, y + first, spec.group, 1, finite,
        [&](int i) {
          return token_channel{token, first + i};
        },
        tile, report);
}
/// Codes `count` tokens of a tile from y [count, head_dim]; x_finite[t]: token t's elements are finite.
inline void encode_key_groups(const codec_spec& spec, const std::vector<float>& y, const bool (&x_finite)[tile_tokens],
                              int count, std::uint8_t* tile, device_report& report) {
  for (int first = 0; first < count; first += spec.group) {
    const int tokens = min_of<int>(spec.group, count - first);
    bool finite = true;
    for (int t = first; t < first + tokens; ++t) finite = finite && x_finite[t];
    if (!finite) report.flags |= report_nonfinite_input;
    for (int c = 0; c < spec.head_dim; ++c)
      encode_group(
          spec, &y[static_cast<std::size_t>(first) * spec.head_dim + c], tokens, spec.head_dim, finite,
          [&](int i) {
            return token_channel{first + i, c};
          },
          tile, report);
  }
}

}  // namespace detail

/// Codes token `token` (0..63) of a tile from its head_dim channels. Touches only the bits that the token owns. Not for
/// codecs that need whole tiles.
inline void encode_token(const codec_spec& spec, const head_parameters& head, const float* x, int token,
                         std::uint8_t* tile, device_report& report) {
  if (spec.kind == codec_kind::plan) return detail::encode_plan_token(spec, head, x, token, tile, report);
  if (spec.kind == codec_kind::grouped) return detail::encode_value_groups(spec, head, x, token, tile, report);
  for (int c = 0; c < spec.head_dim; ++c) {
    const std::int64_t at = static_cast<std::int64_t>(token) * spec.head_dim + c;
    const bool finite = packkv::detail::is_finite(x[c]);
    if (!finite) report.flags |= report_nonfinite_input;
    if (spec.kind == codec_kind::fp8) {
      const float u = packkv::detail::div_rn(x[c], head.tensor_scale);
      if (finite && !(u >= -448.0f && u <= 448.0f)) report.flags |= report_scale_overflow;
      tile[at] = float_to_e4m3(packkv::detail::is_finite(x[c]) ? u : packkv::detail::nan_float());
    } else {
      const std::uint16_t bits = spec.kind == codec_kind::float16 ? float_to_half(x[c]) : float_to_bfloat16(x[c]);
      const float stored = spec.kind == codec_kind::float16 ? half_to_float(bits) : bfloat16_to_float(bits);
      if (finite && !packkv::detail::is_finite(stored)) report.flags |= report_scale_overflow;
      detail::store_bits(tile, 2 * at, bits);
    }
  }
}

/// Codes the first `count` tokens of a tile; load(token, x) gives a token's channels. The slots behind them, and groups
/// without a token, become zero bytes.
template <class Load>
void encode_tile(const codec_spec& spec, const head_parameters& head, int count, Load&& load, std::uint8_t* tile,
                 device_report& report) {
  std::memset(tile, 0, static_cast<std::size_t>(spec.tile_bytes()));
  float x[max_head_dim];
  if (!spec.needs_tiles()) {
    for (int t = 0; t < count; ++t) {
      load(t, x);
      encode_token(spec, head, x, t, tile, report);
    }
    return;
  }
  std::vector<float> y(static_cast<std::size_t>(count) * static_cast<std::size_t>(spec.head_dim));
  bool finite[tile_tokens] = {};
  for (int t = 0; t < count; ++t) {
    load(t, x);
    finite[t] = detail::all_finite(spec, x);
    detail::to_coded_basis(spec, head, x, &y[static_cast<std::size_t>(t) * static_cast<std::size_t>(spec.head_dim)]);
  }
  detail::encode_key_groups(spec, y, finite, count, tile, report);
}

/// Reconstructs token `token` of a tile into head_dim floats, in the original basis.
inline void decode_token(const codec_spec& spec, const head_parameters& head, const std::uint8_t* tile, int token,
                         float* x) {
  using namespace packkv::detail;
  if (spec.kind == codec_kind::plan) {
    const std::uint32_t* words = reinterpret_cast<const std::uint32_t*>(tile);
    const float row = half_to_float(detail::load_bits(tile, spec.code_bytes() + 2 * row_slot(token)));
    float y[max_head_dim] = {};
    for (int c = 0; c < spec.head_dim; ++c) {
      if (c < spec.leading) {
        std::int8_t q;
        std::memcpy(&q, tile + spec.leading_offset() + c * tile_tokens + row_slot(token), 1);
        y[c] = is_nan(row) ? row : mul_rn(head.leading_scale[c], static_cast<float>(q));
        continue;
      }
      const code_place place = locate(spec.strips, token, c);
      y[c] = place.width == 0
                 ? (is_nan(row) ? row : 0.0f)
                 : decode_element(read_code(words, place), mul_rn(row, column_of(head, place.width, c)), place.width);
    }
    return detail::to_original_basis(spec, head, y, x);
  }
  if (spec.kind == codec_kind::grouped) {
    const std::uint32_t* words = reinterpret_cast<const std::uint32_t*>(tile);
    float y[max_head_dim] = {};
    for (int c = 0; c < spec.head_dim; ++c) {
      const int group = spec.group_of(token, c);
      const group_numbers n{detail::load_bits(tile, spec.maximum_offset(group)),
                            detail::load_bits(tile, spec.minimum_offset(group))};
      y[c] = decode_between(min_max_values(spec.strips.width[0], n), read_code(words, locate(spec.strips, token, c)));
    }
    return detail::to_original_basis(spec, head, y, x);
  }
  for (int c = 0; c < spec.head_dim; ++c) {
    const std::int64_t at = static_cast<std::int64_t>(token) * spec.head_dim + c;
    switch (spec.kind) {
      case codec_kind::fp8:
        x[c] = mul_rn(e4m3_to_float(tile[at]), head.tensor_scale);
        break;
      case codec_kind::bfloat16:
        x[c] = bfloat16_to_float(detail::load_bits(tile, 2 * at));
        break;
      default:
        x[c] = half_to_float(detail::load_bits(tile, 2 * at));
        break;
    }
  }
}

}  // namespace packkv::reference
