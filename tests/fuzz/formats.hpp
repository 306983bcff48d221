// SPDX-License-Identifier: Apache-2.0
// Formats, pages and parameters of the fuzz targets for paged caches: head dim 64, every kind of codec.
//   const fuzz::format f = fuzz::any_format(in);   fuzz::page_pool pool(f, 2, 1, 1, 0);   auto p =
//   fuzz::any_parameters(in, f);
#pragma once

#include <packkv/codec/checks.hpp>

#include "input.hpp"

namespace fuzz {

inline constexpr int head_dim = 64;
using format = pk::runtime_format<head_dim>;

/// A valid codec. Keys and values of head dim 64 have strips of 16 channels.
inline pk::codec_spec any_codec(input& in, pk::side which) {
  constexpr pk::transform_kind transforms[] = {pk::transform_kind::identity, pk::transform_kind::hadamard,
                                               pk::transform_kind::permutation, pk::transform_kind::basis};
  constexpr int widths[] = {8, 4, 3, 2, 1, 0}, groups[] = {16, 32, 64};
  switch (in.below(6)) {
    case 0:
      return pk::make_element_codec(pk::codec_kind::float16, head_dim);
    case 1:
      return pk::make_element_codec(pk::codec_kind::bfloat16, head_dim);
    case 2:
      return pk::make_element_codec(pk::codec_kind::fp8, head_dim);
    case 3: {
      const int group = in.pick(groups);
      return pk::make_grouped_codec(which, head_dim, widths[in.below(5)],
                                    which == pk::side::key && group == 16 ? 32 : group, transforms[in.below(2)]);
    }
    default: {
      pk::strip_widths plan;
      plan.count = head_dim / pk::strip_channels(which, head_dim);
      for (int i = 0, at = 0; i < plan.count; ++i) {  // widest first
        at = at + in.below(6 - at);
        plan.width[i] = static_cast<std::uint8_t>(widths[at]);
      }
      const pk::transform_kind transform = in.pick(transforms);
      return pk::make_plan_codec(which, head_dim, transform, plan, which == pk::side::key ? in.below(5) : 0);
    }
  }
}

inline format any_format(input& in) {
  format f;
  f.key_spec = any_codec(in, pk::side::key);
  f.value_spec = any_codec(in, pk::side::value);
  check(static_cast<bool>(pk::check_format(f)), "a codec from the make functions is accepted");
  return f;
}

/// Pages of their own memory for K and for V, which ends where the last tile does.
struct page_pool {
  memory keys, values;
  pk::pages_view pages;

  page_pool(const format& f, int num_pages, int kv_heads, int tiles_per_page, int gap, int byte = 0)
      : keys(bytes(f.key().tile_bytes(), num_pages, kv_heads, tiles_per_page, gap), byte),
        values(bytes(f.value().tile_bytes(), num_pages, kv_heads, tiles_per_page, gap), byte) {
    pages.key_data = keys.data(), pages.value_data = values.data();
    pages.num_pages = num_pages, pages.kv_heads = kv_heads, pages.tiles_per_page = tiles_per_page;
    pages.key_head_stride = pk::key_page_bytes(f, tiles_per_page) + gap;
    pages.value_head_stride = pk::value_page_bytes(f, tiles_per_page) + gap;
    pages.key_page_stride = pages.key_head_stride * kv_heads,
    pages.value_page_stride = pages.value_head_stride * kv_heads;
  }
  page_pool(const page_pool&) = delete;
  page_pool& operator=(const page_pool&) = delete;

 private:
  static std::int64_t bytes(std::int64_t tile, int num_pages, int kv_heads, int tiles_per_page, int gap) {
    const std::int64_t heads = std::int64_t{num_pages} * kv_heads;
    return heads * (tile * tiles_per_page + gap) - (heads > 0 ? gap : 0);
  }
};

/// Arrays that any codec of head dim 64 may need, for max_heads heads; good ones.
inline constexpr int max_heads = 2;
struct parameter_arrays {
  float column[max_heads * head_dim], leading[max_heads * pk::max_leading], offset[max_heads * head_dim];
  std::int16_t permutation[max_heads * head_dim];
  alignas(16) float basis[max_heads * head_dim * head_dim] = {}, inverse[max_heads * head_dim * head_dim] = {};

  parameter_arrays() {
    for (int i = 0; i < max_heads * head_dim; ++i) {
      const int c = i % head_dim, other = (c * 5 + 3) % head_dim;
      column[i] = 0.25f + 0.015625f * static_cast<float>(c), offset[i] = 0.5f * static_cast<float>(c % 7 - 3);
      permutation[i] = static_cast<std::int16_t>(other);
      basis[i * head_dim + other] = 2.0f, inverse[(i - c + other) * head_dim + c] = 0.5f;
    }
    for (float& x : leading) x = 0.03125f;
  }
};
inline const parameter_arrays& good_arrays() {
  static const parameter_arrays arrays;
  return arrays;
}

/// Parameters that the format accepts, some of what it may do without left out.
inline pk::parameters<format> any_parameters(input& in, const format& f) {
  const parameter_arrays& a = good_arrays();
  pk::parameters<format> p;
  p.format = f;
  for (pk::side_parameters* s : {&p.key, &p.value}) {
    const pk::codec_spec& spec = s == &p.key ? f.key() : f.value();
    const int given = in.byte();
    s->permutation = a.permutation, s->leading_scale = a.leading, s->basis = a.basis, s->basis_inverse = a.inverse;
    if ((given & 1) != 0 && spec.kind != pk::codec_kind::grouped) s->column_scale = a.column;
    if ((given & 2) != 0) s->channel_offset = a.offset;
    s->tensor_scale = (given & 4) != 0 ? 0.25f : 1.0f;
  }
  check(static_cast<bool>(pk::check_parameters(p)), "good parameters are accepted");
  return p;
}

}  // namespace fuzz
