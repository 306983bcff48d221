// SPDX-License-Identifier: Apache-2.0
// A warp codes or decodes one token of a tile, or a group of tokens. Lane l holds the channels l, l + 32, ...
// One idea: a token owns its bits, so `put` may store them anywhere: shared memory, a zeroed page or a live one.
//   warp::encode_token<D>(spec, head, source, token, tile, put_bits, report);
#pragma once

#include <packkv/codec/pages.hpp>
#include <packkv/warp/element.cuh>
#include <packkv/warp/group_statistics.cuh>
#include <packkv/warp/transform.cuh>

namespace packkv::warp {

/// y = T (x - offset) of the token with channels source(c); whether all of them are finite, in every lane.
template <int HeadDim, class Source>
__device__ inline bool to_coded_basis(const codec_spec& spec, const head_parameters& head, Source&& source,
                                      float (&y)[HeadDim / 32]) {
  bool finite = true;
  load_transformed<HeadDim>(
      spec.transform, head.transform(),
      [&](int c) {
        const float x = source(c);
        finite = finite && detail::is_finite(x);
        return head.channel_offset != nullptr ? detail::sub_rn(x, head.offset(c)) : x;
      },
      y);
  return __all_sync(detail::all_lanes, finite) != 0;
}

/// Stores what a group of a `grouped` tile holds beside codes. By the lanes that call it.
__device__ inline void store_numbers(const codec_spec& spec, std::uint8_t* tile, int token, int channel,
                                     const detail::group_numbers& n) {
  const int group = spec.group_of(token, channel);
  *reinterpret_cast<std::uint16_t*>(tile + spec.maximum_offset(group)) = n.first;
  *reinterpret_cast<std::uint16_t*>(tile + spec.minimum_offset(group)) = n.minimum;
}
/// Codes an element of a `grouped` tile.
template <class PutBits>
__device__ inline void put_code(const codec_spec& spec, int token, int channel, const detail::group_numbers& n, float y,
                                PutBits&& put_bits) {
  const int width = spec.strips.width[0];
  const std::uint32_t code = detail::code_above(detail::min_max_values(width, n), y, top_code(width));
  const code_writes writes = split_code(locate(spec.strips, token, channel), code);
  for (int w = 0; w < writes.count; ++w) put_bits(writes.write[w]);
}

/// Codes `count` tokens of a tile that share a group in every channel, from token `first` on; load(token, y) gives a
/// token in the coded basis and says whether it was finite. Otherwise as encode_token. All lanes take part.
template <int HeadDim, class Load, class PutBits>
__device__ inline void encode_token_group(const codec_spec& spec, int first, int count, Load&& load, std::uint8_t* tile,
                                          PutBits&& put_bits, std::uint32_t& flags) {
  constexpr int registers = HeadDim / 32;
  const int lane = detail::lane_id();
  float y[registers];
  extremes range[registers];
  bool finite = true;
  for (int t = first; t < first + count; ++t) {
    finite = load(t, y) && finite;
    for (int i = 0; i < registers; ++i) range[i].add(y[i]);
  }
  if (!finite) flags |= report_nonfinite_input;
  detail::group_numbers n[registers];
  for (int i = 0; i < registers; ++i) {
    n[i] = bounds_of(range[i]);
    if (finite && !n[i].valid()) flags |= report_scale_overflow;
    store_numbers(spec, tile, first, lane + 32 * i, n[i]);
  }
  for (int t = first; t < first + count; ++t) {
    load(t, y);
    for (int i = 0; i < registers; ++i) put_code(spec, t, lane + 32 * i, n[i], y[i], put_bits);
  }
}

/// Codes a token whose groups lie along its channels. `finite`: whether its elements are. All lanes take part.
template <int HeadDim, class PutBits>
__device__ inline void encode_channel_groups(const codec_spec& spec, const float (&y)[HeadDim / 32], bool finite,
                                             int token, std::uint8_t* tile, PutBits&& put_bits, std::uint32_t& flags) {
  const int lane = detail::lane_id();
  for (int first = 0; first < HeadDim; first += spec.group) {
    const auto inside = [&](int i) { return lane + 32 * i >= first && lane + 32 * i < first + spec.group; };
    extremes range;
    for (int i = 0; i < HeadDim / 32; ++i)
      if (inside(i)) range.add(y[i]);
    const detail::group_numbers n = bounds_of(range.joined());
    if (lane == 0) {
      if (finite && !n.valid()) flags |= report_scale_overflow;
      store_numbers(spec, tile, token, first, n);
    }
    for (int i = 0; i < HeadDim / 32; ++i)
      if (inside(i)) put_code(spec, token, lane + 32 * i, n, y[i], put_bits);
  }
  if (!finite && lane == 0) flags |= report_nonfinite_input;
}

/// Codes the elements source(c) of a token of a 16-bit or FP8 tile. All lanes take part.
template <int HeadDim, class Source>
__device__ inline void encode_elements(const codec_spec& spec, const head_parameters& head, Source&& source, int token,
                                       std::uint8_t* tile, std::uint32_t& flags) {
  using namespace packkv::detail;
  bool finite = true, overflow = false;
  for (int i = 0; i < HeadDim / 32; ++i) {
    const int c = lane_id() + 32 * i, at = token * HeadDim + c;
    const float x = source(c);
    const bool x_finite = is_finite(x);
    finite = finite && x_finite;
    if (spec.kind == codec_kind::fp8) {
      const float u = div_rn(x, head.tensor_scale);
      overflow = overflow || (x_finite && !(u >= -448.0f && u <= 448.0f));
      tile[at] = float_to_e4m3(x_finite ? u : nan_float());
    } else {
      const bool half = spec.kind == codec_kind::float16;
      const std::uint16_t bits = half ? float_to_half(x) : float_to_bfloat16(x);
      overflow = overflow || (x_finite && !is_finite(half ? half_to_float(bits) : bfloat16_to_float(bits)));
      reinterpret_cast<std::uint16_t*>(tile)[at] = bits;
    }
  }
  if (!finite) flags |= report_nonfinite_input;
  if (overflow) flags |= report_scale_overflow;
}

/// Codes a token y in the coded basis of a plan; place_of(index) is the code_place of channel lane + 32 * index,
/// `index` an integral_constant, or something with its width, and put_code(index, place, code) takes its code, 0 where
/// it has none. `finite`: whether the elements were. Otherwise as encode_token.
template <int HeadDim, class PlaceOf, class PutCode>
__device__ inline void encode_plan_token(const codec_spec& spec, const head_parameters& head,
                                         const float (&y)[HeadDim / 32], bool finite, int token, std::uint8_t* tile,
                                         PlaceOf&& place_of, PutCode&& put_code, std::uint32_t& flags,
                                         std::uint32_t& clamps) {
  using namespace packkv::detail;
  const int lane = lane_id();
  double sum = 0.0;
  bool in_range = true;
  for (int i = 0; i < HeadDim / 32; ++i) {
    in_range = in_range && is_finite(y[i]);
    if (lane + 32 * i >= spec.leading) sum = add_square(sum, y[i]);
  }
  sum = warp_sum(sum);
  in_range = __all_sync(all_lanes, in_range) != 0;
  const std::uint16_t scale_bits =
      finite && in_range ? row_scale_bits(sum, HeadDim - spec.leading) : std::uint16_t{0x7fff};
  const bool valid = scale_bits != 0x7fff;
  const float row = unpack_16bit<false>(scale_bits).low;
  if (lane == 0) {
    if (!finite)
      flags |= report_nonfinite_input;
    else if (!valid)
      flags |= report_scale_overflow;
    *reinterpret_cast<std::uint16_t*>(tile + spec.code_bytes() + 2 * row_slot(token)) = scale_bits;
  }
  for_constants<HeadDim / 32>([&](auto index) {
    constexpr int i = decltype(index)::value;
    const int c = lane + 32 * i;
    const auto place = place_of(index);
    const bool coded = valid && place.width > 0 && c >= spec.leading;
    put_code(index, place,
             coded ? encode_element(y[i], mul_rn(row, column_of(head, place.width, c)), place.width) : 0u);
  });
  if (lane < spec.leading) {
    bool clamped = false;
    const std::int8_t q = valid ? encode_leading(y[0], head.leading_scale[lane], clamped) : std::int8_t{0};
    clamps += clamped ? 1u : 0u;
    tile[spec.leading_offset() + lane * tile_tokens + row_slot(token)] = static_cast<std::uint8_t>(q);
  }
}

/// Codes the token with channels source(c) as token `token` of a tile; not for codecs that need whole tiles.
/// `put_bits(code_write)` stores a field of a code word; everything else of the tile (scale, leading components,
/// elements) is stored to `tile` directly. `flags` and `clamps` collect what device_report counts; each event is
/// counted in one lane. All lanes take part.
template <int HeadDim, class Source, class PutBits>
__device__ inline void encode_token(const codec_spec& spec, const head_parameters& head, Source&& source, int token,
                                    std::uint8_t* tile, PutBits&& put_bits, std::uint32_t& flags,
                                    std::uint32_t& clamps) {
  if (!spec.has_codes()) return encode_elements<HeadDim>(spec, head, source, token, tile, flags);
  float y[HeadDim / 32];
  const bool finite = to_coded_basis<HeadDim>(spec, head, source, y);
  if (spec.kind == codec_kind::grouped)
    return encode_channel_groups<HeadDim>(spec, y, finite, token, tile, put_bits, flags);
  encode_plan_token<HeadDim>(
      spec, head, y, finite, token, tile,
      [&](auto index) {
        constexpr int i = decltype(index)::value;
        return locate(spec.strips, token, detail::lane_id() + 32 * i);
      },
      [&](auto, const code_place& place, std::uint32_t code) {
        const code_writes all = split_code(place, code);
        for (int w = 0; w < all.count; ++w) put_bits(all.write[w]);
      },
      flags, clamps);
}

/// Stores fields of code words of a tile whose other bits belong to others, who may store theirs at the same time.
class shared_words {
 public:
  __device__ explicit shared_words(std::uint8_t* tile) : words_(reinterpret_cast<std::uint32_t*>(tile)) {}
  __device__ void operator()(const code_write& w) const {
    if (w.bits != w.mask) atomicAnd(&words_[w.word], ~(w.mask & ~w.bits));
    if (w.bits != 0) atomicOr(&words_[w.word], w.bits);
  }
  /// The same in two steps, the first of which may come before the bits are known.
  __device__ std::uint32_t load(int word) const { return detail::load_changing(&words_[word]); }
  __device__ void replace(const code_write& w, std::uint32_t loaded) const {
    atomicXor(&words_[w.word], (loaded & w.mask) ^ w.bits);
  }

 private:
  std::uint32_t* words_;
};

/// Reconstructs channel c of a token in the transformed basis.
__device__ inline float decode_transformed(const codec_spec& spec, const head_parameters& head,
                                           const std::uint8_t* tile, int token, int c) {
  using namespace packkv::detail;
  if (spec.kind == codec_kind::grouped) return grouped_element(spec, tile, token, c);
  if (spec.kind != codec_kind::plan) {
    const float x = stored_element(spec.kind, tile, token * spec.head_dim + c);
    return spec.kind == codec_kind::fp8 ? mul_rn(x, head.tensor_scale) : x;
  }
  const float row = row_scale(spec, tile, token);
  if (c < spec.leading)
    return is_nan(row) ? row : mul_rn(head.leading_scale[c], leading_component(spec, tile, token, c));
  const code_place place = locate(spec.strips, token, c);
  if (place.width == 0) return is_nan(row) ? row : 0.0f;
  const std::uint32_t code = read_code(reinterpret_cast<const std::uint32_t*>(tile), place);
  return decode_element(code, mul_rn(row, column_of(head, place.width, c)), place.width);
}

/// Reconstructs a token: sink(c, x[c]) for each channel. All lanes take part.
template <int HeadDim, class Sink>
__device__ inline void decode_token(const codec_spec& spec, const head_parameters& head, const std::uint8_t* tile,
                                    int token, Sink&& sink) {
  float y[HeadDim / 32];
  for (int i = 0; i < HeadDim / 32; ++i) y[i] = decode_transformed(spec, head, tile, token, detail::lane_id() + 32 * i);
  store_inverse<HeadDim>(spec.transform, head.transform(), y, [&](int c, float x) {
    sink(c, head.channel_offset != nullptr ? detail::add_rn(x, head.offset(c)) : x);
  });
}

}  // namespace packkv::warp
