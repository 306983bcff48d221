// SPDX-License-Identifier: Apache-2.0
// CPU definitions of compress, decompress, store_tokens and store_tiles. All pointers are host memory; calls are
// thread-safe as long as they write different pages.
//   packkv::status s = packkv::reference::compress(keys, values, nullptr, parameters, pages, table, report);
#pragma once

#include <cstdint>
#include <cstring>
#include <packkv/codec/checks.hpp>
#include <packkv/reference/tile.hpp>

namespace packkv::reference {

namespace detail {

inline void load_token(const void* base, std::int64_t channel_stride, dtype type, int head_dim, float* x) {
  for (int c = 0; c < head_dim; ++c)
    x[c] = packkv::detail::load_element(static_cast<const char*>(base) + c * channel_stride, type);
}
/// Codes tile `slot` of a page, of all heads and both sides, from `count` tokens of row `row`; token t of the tile is
/// at(t) there.
template <class Format, class At>
void encode_tiles(const parameters<Format>& params, const pages_view& pages, std::int64_t page, int slot,
                  const input_view<4>& keys, const input_view<4>& values, std::int64_t row, int count, At&& at,
                  device_report& report) {
  using namespace packkv::detail;
  const auto encode = [&](const codec_spec& spec, const side_parameters& p, const input_view<4>& from, int h,
                          std::uint8_t* tile) {
    const auto load = [&](int t, float* x) {
      load_token(address(from, row, h, at(t), 0), from.stride[3], from.type, spec.head_dim, x);
    };
    encode_tile(spec, of_head(spec, p, h), count, load, tile, report);
  };
  const codec_spec key = params.format.key(), value = params.format.value();
  for (int h = 0; h < pages.kv_heads; ++h) {
    encode(key, params.key, keys, h, key_tile(pages, key, page, h, slot));
    encode(value, params.value, values, h, value_tile(pages, value, page, h, slot));
  }
}
inline void store_token(void* base, std::int64_t channel_stride, dtype type, int head_dim, const float* x) {
  for (int c = 0; c < head_dim; ++c)
    packkv::detail::store_element(static_cast<char*>(base) + c * channel_stride, type, x[c]);
}

}  // namespace detail

/// Codes whole sequences from their token 0 on.
/// keys [batch, kv_heads, tokens, D_k], values [batch, kv_heads, tokens, D_v], float16 or bfloat16.
/// lengths: int32 [batch], tokens of each sequence, or null for all `tokens`. Unused slots of a sequence's
/// last tile become zero bytes. Tiles without a page are skipped and reported.
template <class Format>
status compress(const input_view<4>& keys, const input_view<4>& values, const std::int32_t* lengths,
                const parameters<Format>& params, const pages_view& pages, const page_table& table,
                device_report& report) {
  using namespace packkv::detail;
  if (const status s = check_kv(params, pages, keys, values); !s) return s;
  if (const status s = check_encoder(params); !s) return s;
  if (const status s = check_parameter_arrays(params, pages.kv_heads); !s) return s;
  if (const status s = check_table(table, static_cast<std::int32_t>(keys.extent[0])); !s) return s;
  for (std::int64_t b = 0; b < keys.extent[0]; ++b) {
    const std::int64_t length = clamp_length(lengths, b, static_cast<std::int32_t>(keys.extent[2]), report.flags);
    for (std::int64_t first = 0; first < length; first += tile_tokens) {
      const std::int64_t index = first / tile_tokens;
      const std::int32_t page = find_page(table, pages.num_pages, b, index / pages.tiles_per_page, report.flags);
      if (page < 0) continue;
      const int count = static_cast<int>(min_of<std::int64_t>(tile_tokens, length - first));
      detail::encode_tiles(
          params, pages, page, static_cast<int>(index % pages.tiles_per_page), keys, values, b, count,
          [&](int t) { return first + t; }, report);
    }
  }
  return {};
}

/// Reconstructs whole sequences: the inverse shapes of compress. Tokens at or past a sequence's length are left as
/// they were; tokens whose page is missing become NaN and are reported.
template <class Format>
status decompress(const pages_view& pages, const page_table& table, const std::int32_t* lengths,
                  const parameters<Format>& params, const output_view<4>& keys, const output_view<4>& values,
                  device_report& report) {
  using namespace packkv::detail;
  if (const status s = check_kv(params, pages, keys, values); !s) return s;
  if (const status s = check_parameter_arrays(params, pages.kv_heads); !s) return s;
  if (const status s = check_table(table, static_cast<std::int32_t>(keys.extent[0])); !s) return s;
  const codec_spec key = params.format.key(), value = params.format.value();
  float x[max_head_dim];
  for (std::int64_t b = 0; b < keys.extent[0]; ++b) {
    const std::int64_t length = clamp_length(lengths, b, static_cast<std::int32_t>(keys.extent[2]), report.flags);
    for (std::int64_t t = 0; t < length; ++t) {
      const std::int64_t index = t / tile_tokens;
      const int slot = static_cast<int>(index % pages.tiles_per_page), token = static_cast<int>(t % tile_tokens);
      const std::int32_t page = find_page(table, pages.num_pages, b, index / pages.tiles_per_page, report.flags);
      for (int h = 0; h < pages.kv_heads; ++h) {
        const auto put = [&](const codec_spec& spec, const side_parameters& p, auto tile_at,
                             const output_view<4>& out) {
          if (page >= 0) decode_token(spec, of_head(spec, p, h), tile_at(pages, spec, page, h, slot), token, x);
          for (int c = 0; c < spec.head_dim && page < 0; ++c) x[c] = nan_float();
          detail::store_token(address(out, b, h, t, 0), out.stride[3], out.type, spec.head_dim, x);
        };
        put(key, params.key, key_tile, keys);
        put(value, params.value, value_tile, values);
      }
    }
  }
  return {};
}

/// Codes n single tokens into their slots: slot = page * page_tokens + token in page, negative = skip.
/// keys [n, kv_heads, D_k], values [n, kv_heads, D_v]; slots: int64 [n], distinct where not negative. Pages may be
/// uninitialised; bits of other tokens are untouched. Slots beyond the pages are skipped and reported.
template <class Format>
status store_tokens(const input_view<3>& keys, const input_view<3>& values, const std::int64_t* slots,
                    const parameters<Format>& params, const pages_view& pages, device_report& report) {
  using namespace packkv::detail;
  if (const status s = check_kv(params, pages, keys, values); !s) return s;
  if (const status s = check_token_encoder(params); !s) return s;
  if (const status s = check_parameter_arrays(params, pages.kv_heads); !s) return s;
  if (slots == nullptr && keys.extent[0] > 0) return refuse(status_code::invalid_argument, "slots is null");
  const codec_spec key = params.format.key(), value = params.format.value();
  const std::int64_t page_tokens = static_cast<std::int64_t>(pages.tiles_per_page) * tile_tokens;
  float x[max_head_dim];
  for (std::int64_t i = 0; i < keys.extent[0]; ++i) {
    const std::int64_t slot = slots[i];
    if (slot < 0) continue;
    if (slot / page_tokens >= pages.num_pages) {
      report.flags |= report_page_out_of_range;
      continue;
    }
    const int tile = static_cast<int>(slot % page_tokens / tile_tokens), token = static_cast<int>(slot % tile_tokens);
    for (int h = 0; h < pages.kv_heads; ++h) {
      detail::load_token(address(keys, i, h, 0), keys.stride[2], keys.type, key.head_dim, x);
      encode_token(key, of_head(key, params.key, h), x, token, key_tile(pages, key, slot / page_tokens, h, tile),
                   report);
      detail::load_token(address(values, i, h, 0), values.stride[2], values.type, value.head_dim, x);
      encode_token(value, of_head(value, params.value, h), x, token,
                   value_tile(pages, value, slot / page_tokens, h, tile), report);
    }
  }
  return {};
}

/// Codes n whole tiles into their slots, from tensors or rings of the newest tokens.
/// keys [rows, kv_heads, tokens, D_k], values [rows, kv_heads, tokens, D_v], at least 64 tokens; moves: [n], see
/// tile_move. Slots must differ. Moves out of range are skipped and reported.
template <class Format>
status store_tiles(const input_view<4>& keys, const input_view<4>& values, const tile_move* moves, std::int64_t n,
                   const parameters<Format>& params, const pages_view& pages, device_report& report) {
  if (const status s = packkv::detail::check_store_tiles(keys, values, moves, n, params, pages); !s) return s;
  if (const status s = check_parameter_arrays(params, pages.kv_heads); !s) return s;
  for (std::int64_t i = 0; i < n; ++i) {
    const packkv::detail::tile_place to = packkv::detail::place_of(moves[i], keys, pages, report.flags);
    if (!to.valid) continue;
    detail::encode_tiles(
        params, pages, to.page, to.slot, keys, values, moves[i].row, tile_tokens,
        [&](int t) { return (std::int64_t{moves[i].first} + t) % keys.extent[2]; }, report);
  }
  return {};
}

}  // namespace packkv::reference
