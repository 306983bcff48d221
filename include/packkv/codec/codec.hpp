// SPDX-License-Identifier: Apache-2.0
// Codecs and cache formats: types that say how a tile of K or of V is stored. Everything else follows from them.
// One idea: a codec type is a constexpr `codec_spec`; run-time formats carry the same struct as data.
//   using format = cache_format<key_codec<128, permutation, rms_scale, plan<4, 2, 1, 1>>,
//                               value_codec<128, hadamard, rms_scale, plan<2, 2, 2, 2, 2, 2, 2, 2>>>;
#pragma once

#include <cstdint>
#include <packkv/codec/strips.hpp>
#include <packkv/codec/transform.hpp>
#include <packkv/core/views.hpp>

namespace packkv {

enum class codec_kind : std::uint8_t {
  plan,      ///< fixed-width codes by strip, a 16-bit scale per token
  float16,   ///< elements as IEEE half, token-major
  bfloat16,  ///< elements as bfloat16, token-major
  fp8,       ///< elements as FP8 E4M3 times one scale per tensor, token-major
};

/// Everything that decides the bytes of a tile of one side.
struct codec_spec {
  codec_kind kind = codec_kind::float16;
  transform_kind transform = transform_kind::identity;
  std::int16_t head_dim = 128;
  std::int16_t leading = 0;  ///< leading key components kept in 8 bits beside the codes
  strip_layout strips = {};  ///< plan only

  /// Bytes of the codes (or elements), which come first in the tile.
  PACKKV_HOST_DEVICE constexpr int code_bytes() const {
    switch (kind) {
      case codec_kind::plan:
        return strips.words * 4;
      case codec_kind::fp8:
        return tile_tokens * head_dim;
      default:
        return tile_tokens * head_dim * 2;
    }
  }
  /// Offset of the leading components, behind the 64 row scales.
  PACKKV_HOST_DEVICE constexpr int leading_offset() const { return code_bytes() + tile_tokens * 2; }
  /// Bytes of a tile: a multiple of 16.
  PACKKV_HOST_DEVICE constexpr int tile_bytes() const {
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
PACKKV_HOST_DEVICE constexpr bool same_layout(const strip_layout& a, const strip_layout& b) {
  bool same = a.which == b.which && a.channels == b.channels && a.count == b.count && a.words == b.words;
  for (int i = 0; i < max_strips; ++i)
    same = same && a.width[i] == b.width[i] && a.low[i] == b.low[i] && a.high[i] == b.high[i];
  return same;
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
  if (static_cast<int>(spec.kind) > 3 || static_cast<int>(spec.transform) > 3)
    return refuse(status_code::invalid_argument, "unknown codec kind or transform");
  if (spec.kind != codec_kind::plan) {
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
  return {};
}

/// A plan codec from run-time data; check it with check_codec.
PACKKV_HOST_DEVICE constexpr codec_spec make_plan_codec(side which, int head_dim, transform_kind transform,
                                                        const strip_widths& widths, int leading = 0) {
  codec_spec spec;
  spec.kind = codec_kind::plan;
  spec.transform = transform;
  spec.head_dim = detail::stored_head_dim(head_dim);
  spec.leading = static_cast<std::int16_t>(leading);
  spec.strips = make_strips(which, head_dim, widths);
  return spec;
}

PACKKV_HOST_DEVICE constexpr codec_spec make_element_codec(codec_kind kind, int head_dim) {
  codec_spec spec;
  spec.kind = kind;
  spec.head_dim = detail::stored_head_dim(head_dim);
  return spec;
}

namespace detail {
template <side Which, int HeadDim, class Transform, class Plan, int Leading>
struct plan_codec {
  static_assert(is_head_dim(HeadDim), "head_dim must be 64, 96, 128, 192, 256 or 512");
  static_assert(check_plan(Which, HeadDim, Plan::widths()).code == status_code::ok,
                "a plan has one width of {0,1,2,3,4,8} per strip, widest first: "
                "K head_dim/32 strips (head_dim 64: 4), V head_dim/16 strips");
  static constexpr int head_dim = HeadDim;
  template <side Side>
  static constexpr bool serves = Side == Which;
  PACKKV_HOST_DEVICE static constexpr codec_spec spec() {
    return make_plan_codec(Which, HeadDim, Transform::kind, Plan::widths(), Leading);
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
