// SPDX-License-Identifier: Apache-2.0
// Codecs and cache formats: types that say how a tile of K or of V is stored. Everything else follows from them.
// One idea: a codec type is a constexpr `codec_spec`; run-time formats carry the same struct as data.
//   using format = cache_format<key_codec<128, permutation, rms_scale, plan<4, 2, 1, 1>>,
//                               value_codec<128, hadamard, rms_scale, plan<2, 2, 2, 2, 2, 2, 2, 2>>>;
#pragma once

#include <cstdint>
#include <packkv/codec/layout.hpp>
#include <packkv/codec/transform.hpp>
#include <packkv/core/views.hpp>

namespace packkv {

/// What a codec's tiles hold.
enum class codec_kind : std::uint8_t {
  plan,      ///< fixed-width codes by strip, a 16-bit scale per token
  float16,   ///< elements as IEEE half, token-major
  bfloat16,  ///< elements as bfloat16, token-major
  fp8,       ///< elements as FP8 E4M3 times one scale per tensor, token-major
  grouped,   ///< codes of one width, a maximum and a minimum per group: of keys along tokens, of values along channels
};

/// Everything that decides the bytes of a tile of one side.
struct codec_spec {
  codec_kind kind = codec_kind::float16;
  transform_kind transform = transform_kind::identity;
  std::int16_t head_dim = 128;
  std::int16_t leading = 0;  ///< leading key components kept in 8 bits beside the codes
  std::int16_t group = 0;    ///< grouped only: tokens (keys) or channels (values) that share a maximum and a minimum
  strip_layout strips = {};  ///< plan and grouped

  /// The tile begins with code words.
  PACKKV_HOST_DEVICE constexpr bool has_codes() const {
    return kind == codec_kind::plan || kind == codec_kind::grouped;
  }
  /// Tokens share numbers, so that only whole tiles can be coded.
  PACKKV_HOST_DEVICE constexpr bool needs_tiles() const {
    return kind == codec_kind::grouped && strips.which == side::key;
  }
  /// Bytes of the codes (or elements), which come first in the tile.
  PACKKV_HOST_DEVICE constexpr int code_bytes() const {
    switch (kind) {
      case codec_kind::plan:
      case codec_kind::grouped:
        return strips.words * 4;
      case codec_kind::fp8:
        return tile_tokens * head_dim;
      default:
        return tile_tokens * head_dim * 2;
    }
  }
  /// Offset of the leading components, behind the 64 row scales.
  PACKKV_HOST_DEVICE constexpr int leading_offset() const { return code_bytes() + tile_tokens * 2; }
  /// grouped: groups of a tile; the maxima lie behind the codes, the minima behind the maxima, both as IEEE half.
  PACKKV_HOST_DEVICE constexpr int groups() const {
    return strips.which == side::key ? tile_tokens / group * head_dim : head_dim / group * tile_tokens;
  }
  /// Number of an element's group in the tile.
  PACKKV_HOST_DEVICE constexpr int group_of(int token, int channel) const {
    return strips.which == side::key ? token / group * head_dim + channel
                                     : channel / group * tile_tokens + row_slot(token);
  }
  PACKKV_HOST_DEVICE constexpr int maximum_offset(int group_number) const { return code_bytes() + 2 * group_number; }
  PACKKV_HOST_DEVICE constexpr int minimum_offset(int group_number) const {
    return maximum_offset(groups() + group_number);
  }
  /// Bytes of a tile: a multiple of 16.
  PACKKV_HOST_DEVICE constexpr int tile_bytes() const {
    if (kind == codec_kind::grouped) return group > 0 ? minimum_offset(groups()) : 0;
    return kind == codec_kind::plan ? leading_offset() + leading * tile_tokens : code_bytes();
  }
  /// Bits stored per value of a full tile, everything counted.
  constexpr double bits_per_value() const { return 8.0 * tile_bytes() / (tile_tokens * head_dim); }
};

/// Row scale: the root mean square of the token's non-leading channels, stored as IEEE half.
struct rms_scale {};

/// The first N key channels after the transform are kept in 8 bits with a static scale.
template <int N>
struct leading {
  static_assert(N >= 0 && N <= max_leading, "0 to 4 leading components");
  static constexpr int count = N;
};

namespace detail {
/// What a grouped codec must satisfy beside what plans do.
PACKKV_HOST_DEVICE constexpr status check_groups(side which, const codec_spec& spec) {
  const int width = spec.strips.width[0];
  for (int i = 0; i < spec.strips.count; ++i)
    if (width == 0 || spec.strips.width[i] != width)
      return refuse(status_code::unsupported, "grouped codes have 1, 2, 3, 4 or 8 bits, the same in all strips");
  if (spec.transform != transform_kind::identity && spec.transform != transform_kind::hadamard)
    return refuse(status_code::unsupported, "grouped codecs take the identity or the Hadamard transform");
  if (spec.leading != 0) return refuse(status_code::unsupported, "grouped codecs have no leading components");
  if (which == side::key && spec.group != 32 && spec.group != 64)
    return refuse(status_code::unsupported, "a group of keys has 32 or 64 tokens of a channel", spec.group);
  if (which == side::value && (spec.group < 16 || spec.group % 16 != 0 || spec.head_dim % spec.group != 0))
    return refuse(status_code::unsupported, "a group of values is a multiple of 16 channels that divides head_dim",
                  spec.group);
  return {};
}
/// 0, which check_codec refuses, for a head dim that has no kernels.
PACKKV_HOST_DEVICE constexpr std::int16_t stored_head_dim(int head_dim) {
  return is_head_dim(head_dim) ? static_cast<std::int16_t>(head_dim) : std::int16_t{0};
}
}  // namespace detail

/// Checks a spec that came from run-time data; static formats check the same at compile time.
PACKKV_HOST_DEVICE constexpr status check_codec(side which, const codec_spec& spec) {
  if (!is_head_dim(spec.head_dim))
    return refuse(status_code::unsupported, "head_dim must be 64, 96, 128, 192, 256 or 512", spec.head_dim);
  if (static_cast<int>(spec.kind) > 4 || static_cast<int>(spec.transform) > 3)
    return refuse(status_code::invalid_argument, "unknown codec kind or transform");
  if (spec.kind != codec_kind::grouped && spec.group != 0)
    return refuse(status_code::invalid_argument, "only grouped codecs have a group size", spec.group);
  if (!spec.has_codes()) {
    if (spec.transform != transform_kind::identity || spec.leading != 0)
      return refuse(status_code::unsupported, "16-bit and FP8 formats take no transform and no leading components");
    return {};
  }
  strip_widths widths;
  if (spec.strips.count < 0 || spec.strips.count > max_strips || spec.strips.which != which)
    return refuse(status_code::invalid_argument, "a codec's strips are made for the other side");
  widths.count = spec.strips.count;
  for (int i = 0; i < widths.count; ++i) widths.width[i] = spec.strips.width[i];
  if (const status s = check_plan(which, spec.head_dim, widths); !s) return s;
  if (!detail::same_layout(spec.strips, make_strips(which, spec.head_dim, widths)))
    return refuse(status_code::invalid_argument, "a codec's strips were not placed by make_strips");
  if (spec.leading < 0 || spec.leading > max_leading)
    return refuse(status_code::invalid_argument, "0 to 4 leading components");
  if (spec.leading > 0 && which == side::value)
    return refuse(status_code::unsupported, "only keys have leading components");
  return spec.kind == codec_kind::grouped ? detail::check_groups(which, spec) : status{};
}

/// A plan codec from run-time data; check it with check_codec.
PACKKV_HOST_DEVICE constexpr codec_spec make_plan_codec(side which, int head_dim, transform_kind transform,
                                                        const strip_widths& widths, int leading = 0) {
  codec_spec spec;
  spec.kind = codec_kind::plan;
  spec.transform = transform;
  spec.head_dim = detail::stored_head_dim(head_dim);
  spec.leading = static_cast<std::int16_t>(leading < 0 || leading > max_leading ? -1 : leading);
  spec.strips = make_strips(which, head_dim, widths);
  return spec;
}

/// A grouped codec from run-time data; check it with check_codec. `group`: tokens (keys) or channels (values).
PACKKV_HOST_DEVICE constexpr codec_spec make_grouped_codec(side which, int head_dim, int width, int group,
                                                           transform_kind transform = transform_kind::identity) {
  codec_spec spec;
  spec.kind = codec_kind::grouped;
  spec.transform = transform;
  spec.head_dim = detail::stored_head_dim(head_dim);
  spec.group = static_cast<std::int16_t>(group < 0 || group > max_head_dim ? -1 : group);
  const strip_widths widths = uniform_widths(which, head_dim, width);
  if (widths.count > 0) spec.strips = make_strips(which, head_dim, widths);
  return spec;
}

/// A 16-bit or FP8 codec from run-time data; check it with check_codec.
PACKKV_HOST_DEVICE constexpr codec_spec make_element_codec(codec_kind kind, int head_dim) {
  codec_spec spec;
  spec.kind = kind;
  spec.head_dim = detail::stored_head_dim(head_dim);
  return spec;
}

namespace detail {
/// A codec of one side.
template <side Which, int HeadDim>
struct one_sided {
  static constexpr int head_dim = HeadDim;
  template <side Side>
  static constexpr bool serves = Side == Which;
};
template <side Which, int HeadDim, class Transform, class Plan, int Leading>
struct plan_codec : one_sided<Which, HeadDim> {
  static_assert(is_head_dim(HeadDim), "head_dim must be 64, 96, 128, 192, 256 or 512");
  static_assert(check_plan(Which, HeadDim, Plan::widths()).code == status_code::ok,
                "a plan has one width of {0,1,2,3,4,8} per strip, widest first: "
                "K head_dim/32 strips (head_dim 64: 4), V head_dim/16 strips");
  PACKKV_HOST_DEVICE static constexpr codec_spec spec() {
    return make_plan_codec(Which, HeadDim, Transform::kind, Plan::widths(), Leading);
  }
};
template <side Which, int HeadDim, int Width, int Group, class Transform>
struct grouped_codec : one_sided<Which, HeadDim> {
  static_assert(check_codec(Which, make_grouped_codec(Which, HeadDim, Width, Group, Transform::kind)).code ==
                    status_code::ok,
                "a grouped codec has codes of 1, 2, 3, 4 or 8 bits, the identity or the Hadamard transform, and groups "
                "of 32 or 64 tokens (keys) or of a multiple of 16 channels that divides head_dim (values)");
  PACKKV_HOST_DEVICE static constexpr codec_spec spec() {
    return make_grouped_codec(Which, HeadDim, Width, Group, Transform::kind);
  }
};
template <codec_kind Kind, int HeadDim>
struct element_codec {
  static_assert(is_head_dim(HeadDim), "head_dim must be 64, 96, 128, 192, 256 or 512");
  static constexpr int head_dim = HeadDim;
  template <side>
  static constexpr bool serves = true;
  PACKKV_HOST_DEVICE static constexpr codec_spec spec() { return make_element_codec(Kind, HeadDim); }
};
}  // namespace detail

/// Keys coded by a plan. Transform: identity, permutation or hadamard.
template <int HeadDim, class Transform, class RowScale, class Plan, class Leading = leading<0>>
struct key_codec : detail::plan_codec<side::key, HeadDim, Transform, Plan, Leading::count> {
  static_assert(std::is_same_v<RowScale, rms_scale>, "plan codecs scale tokens by rms_scale");
};
/// Values coded by a plan.
template <int HeadDim, class Transform, class RowScale, class Plan>
struct value_codec : detail::plan_codec<side::value, HeadDim, Transform, Plan, 0> {
  static_assert(std::is_same_v<RowScale, rms_scale>, "plan codecs scale tokens by rms_scale");
};
/// Keys with a maximum and a minimum per channel and `Group` tokens of a tile, 32 or 64, as in KIVI (Liu et al., "KIVI:
/// a tuning-free asymmetric 2bit quantization for KV cache", 2024). Transform: identity or hadamard. Such tokens cannot
/// be coded alone: keep the newest in a ring and code tiles when they are full (store_tiles).
template <int HeadDim, int Width, int Group = 32, class Transform = identity>
struct grouped_key_codec : detail::grouped_codec<side::key, HeadDim, Width, Group, Transform> {};
/// Values with a maximum and a minimum per token and `Group` channels, as in KIVI.
template <int HeadDim, int Width, int Group = 32, class Transform = identity>
struct grouped_value_codec : detail::grouped_codec<side::value, HeadDim, Width, Group, Transform> {};
/// 16-bit and FP8 baselines, for either side.
template <int HeadDim>
struct float16_codec : detail::element_codec<codec_kind::float16, HeadDim> {};
template <int HeadDim>
struct bfloat16_codec : detail::element_codec<codec_kind::bfloat16, HeadDim> {};
template <int HeadDim>
struct fp8_codec : detail::element_codec<codec_kind::fp8, HeadDim> {};

/// A cache format: how K and V of one layer are stored. An empty type; all its facts are constexpr.
template <class KeyCodec, class ValueCodec>
struct cache_format {
  static_assert(KeyCodec::template serves<side::key>, "the first codec of a cache_format must serve keys");
  static_assert(ValueCodec::template serves<side::value>, "the second codec of a cache_format must serve values");
  using key_codec_type = KeyCodec;
  using value_codec_type = ValueCodec;
  static constexpr int key_head_dim = KeyCodec::head_dim;
  static constexpr int value_head_dim = ValueCodec::head_dim;
  static constexpr int key_tile_bytes = KeyCodec::spec().tile_bytes();
  static constexpr int value_tile_bytes = ValueCodec::spec().tile_bytes();
  PACKKV_HOST_DEVICE static constexpr codec_spec key() { return KeyCodec::spec(); }
  PACKKV_HOST_DEVICE static constexpr codec_spec value() { return ValueCodec::spec(); }
};

/// A cache format whose codecs are known only at run time; the head dims stay compile-time constants.
template <int KeyHeadDim, int ValueHeadDim = KeyHeadDim>
struct runtime_format {
  static_assert(is_head_dim(KeyHeadDim) && is_head_dim(ValueHeadDim), "head_dim must be 64, 96, 128, 192, 256 or 512");
  static constexpr int key_head_dim = KeyHeadDim;
  static constexpr int value_head_dim = ValueHeadDim;
  codec_spec key_spec = make_element_codec(codec_kind::float16, KeyHeadDim);
  codec_spec value_spec = make_element_codec(codec_kind::float16, ValueHeadDim);
  PACKKV_HOST_DEVICE const codec_spec& key() const { return key_spec; }
  PACKKV_HOST_DEVICE const codec_spec& value() const { return value_spec; }
};

/// Checks both codecs of a format object; always ok for a cache_format.
template <class Format>
PACKKV_HOST_DEVICE constexpr status check_format(const Format& format) {
  if (format.key().head_dim != Format::key_head_dim || format.value().head_dim != Format::value_head_dim)
    return refuse(status_code::shape_mismatch, "a codec's head_dim differs from its format's");
  if (const status s = check_codec(side::key, format.key()); !s) return s;
  return check_codec(side::value, format.value());
}

}  // namespace packkv
