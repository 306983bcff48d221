// SPDX-License-Identifier: Apache-2.0
// The argument checks of every entry point, shared by the device calls and the CPU reference.
// They see what the host can see: shapes, strides, alignment. Device-side lengths and page ids are checked by the
// kernels.
#pragma once

#include <cstdint>
#include <packkv/codec/pages.hpp>

namespace packkv::detail {

inline constexpr std::int64_t max_count = 2147483647;

inline bool aligned16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

template <class Format>
inline status check_pages(const Format& format, const pages_view& p) {
  if (p.num_pages < 0 || p.kv_heads <= 0 || p.tiles_per_page <= 0)
    return refuse(status_code::invalid_argument, "pages need num_pages >= 0, kv_heads > 0 and tiles_per_page > 0");
  if (p.num_pages > 0 && (p.key_data == nullptr || p.value_data == nullptr))
    return refuse(status_code::invalid_argument, "a page pool pointer is null");
  if (!aligned16(p.key_data) || !aligned16(p.value_data) || p.key_page_stride % 16 != 0 ||
      p.key_head_stride % 16 != 0 || p.value_page_stride % 16 != 0 || p.value_head_stride % 16 != 0)
    return refuse(status_code::misaligned, "page pointers and strides must be multiples of 16 bytes");
  if (p.key_page_stride < 0 || p.key_head_stride < 0 || p.value_page_stride < 0 || p.value_head_stride < 0)
    return refuse(status_code::invalid_argument, "page strides must not be negative");
  if (p.kv_heads > 1 && (p.key_head_stride < key_page_bytes(format, p.tiles_per_page) ||
                         p.value_head_stride < value_page_bytes(format, p.tiles_per_page)))
    return refuse(status_code::invalid_argument, "a head stride is smaller than a head's tiles of one page");
  if (p.num_pages > 1 && (p.key_page_stride < key_page_bytes(format, p.tiles_per_page) ||
                          p.value_page_stride < value_page_bytes(format, p.tiles_per_page)))
    return refuse(status_code::invalid_argument, "a page stride is smaller than a head's tiles of one page");
  const auto reach = [&](std::int64_t page_stride, std::int64_t head_stride, std::int64_t bytes) {
    return (checked(p.num_pages) * page_stride + checked(p.kv_heads) * head_stride + bytes).valid();
  };
  if (!reach(p.key_page_stride, p.key_head_stride, key_page_bytes(format, p.tiles_per_page)) ||
      !reach(p.value_page_stride, p.value_head_stride, value_page_bytes(format, p.tiles_per_page)))
    return refuse(status_code::overflow, "the page pool reaches beyond 63 bits of address");
  return {};
}

inline status check_table(const page_table& t, std::int32_t batch) {
  if (t.indptr != nullptr && t.pages == nullptr && batch > 0)
    return refuse(status_code::invalid_argument, "a CSR page table needs its indices");
  if (t.indptr == nullptr && t.row_stride < 0)
    return refuse(status_code::invalid_argument, "a page table's row_stride must not be negative");
  if (t.indptr == nullptr && !(checked(batch) * t.row_stride).valid())
    return refuse(status_code::overflow, "a page table reaches beyond 63 bits");
  return {};
}

inline status check_16bit(dtype type) {
  return type == dtype::float16 || type == dtype::bfloat16
             ? status{}
             : refuse(status_code::unsupported, "keys, values and queries are float16 or bfloat16");
}

template <class Pointer, int Rank>
inline status check_16bit_view(const tensor_view<Pointer, Rank>& view) {
  if (const status s = check_view(view); !s) return s;
  return check_16bit(view.type);
}

/// keys and values [batch, kv_heads, tokens, head_dim] or [n, kv_heads, head_dim] against a format and pages.
template <class Format, class Pointer, int Rank>
inline status check_kv(const parameters<Format>& p, const pages_view& pages, const tensor_view<Pointer, Rank>& keys,
                       const tensor_view<Pointer, Rank>& values) {
  if (const status s = check_parameters(p); !s) return s;
  if (const status s = check_pages(p.format, pages); !s) return s;
  if (const status s = check_16bit_view(keys); !s) return s;
  if (const status s = check_16bit_view(values); !s) return s;
  for (int i = 0; i + 1 < Rank; ++i)
    if (keys.extent[i] != values.extent[i])
      return refuse(status_code::shape_mismatch, "keys and values differ in shape", i);
  constexpr int heads = Rank == 4 ? 1 : Rank - 2;
  if (keys.extent[heads] != pages.kv_heads)
    return refuse(status_code::shape_mismatch, "keys and pages differ in kv_heads", keys.extent[heads]);
  if (keys.extent[Rank - 1] != Format::key_head_dim || values.extent[Rank - 1] != Format::value_head_dim)
    return refuse(status_code::shape_mismatch, "the last extent of keys and values must be the format's head dims");
  for (int i = 0; i < Rank; ++i)
    if (keys.extent[i] > max_count) return refuse(status_code::overflow, "an extent exceeds 2^31 - 1", i);
  return {};
}

/// The arguments of store_tiles.
template <class Format>
inline status check_store_tiles(const input_view<4>& keys, const input_view<4>& values, const tile_move* moves,
                                std::int64_t n, const parameters<Format>& p, const pages_view& pages) {
  if (const status s = check_kv(p, pages, keys, values); !s) return s;
  if (const status s = check_encoder(p); !s) return s;
  if (n < 0 || n > max_count) return refuse(status_code::invalid_argument, "0 to 2^31 - 1 tiles at a time", n);
  if (moves == nullptr && n > 0) return refuse(status_code::invalid_argument, "the moves of store_tiles are null");
  if (reinterpret_cast<std::uintptr_t>(moves) % alignof(tile_move) != 0)
    return refuse(status_code::misaligned, "the moves of store_tiles must be 8-byte aligned");
  if (n > 0 && keys.extent[2] < tile_tokens)
    return refuse(status_code::shape_mismatch, "a tile has 64 tokens, the tensors fewer", keys.extent[2]);
  return {};
}

template <class Format>
inline status check_cache(const parameters<Format>& p, const cache_view& cache) {
  if (const status s = check_parameters(p); !s) return s;
  if (const status s = check_pages(p.format, cache.pages); !s) return s;
  if (cache.batch < 0 || cache.max_seq_len < 0)
    return refuse(status_code::invalid_argument, "batch and max_seq_len must not be negative");
  if (cache.max_seq_len > max_count - 2 * tile_tokens)
    return refuse(status_code::overflow, "max_seq_len must be at most 2^31 - 129");
  if (const status s = check_table(cache.table, cache.batch); !s) return s;
  if (cache.batch > 0 && cache.seq_lens == nullptr)
    return refuse(status_code::invalid_argument, "cache_view::seq_lens is null");
  return {};
}

inline status check_overlay(const input_view<4>& keys, const input_view<4>& values, std::int64_t kv_heads, int key_dim,
                            int value_dim) {
  if ((keys.data == nullptr) != (values.data == nullptr))
    return refuse(status_code::invalid_argument, "sinks and ring need both keys and values");
  if (keys.data == nullptr) return {};
  if (const status s = check_16bit_view(keys); !s) return s;
  if (const status s = check_16bit_view(values); !s) return s;
  if (keys.extent[0] != values.extent[0] || keys.extent[1] != kv_heads || values.extent[1] != kv_heads ||
      keys.extent[2] != values.extent[2] || keys.extent[3] != key_dim || values.extent[3] != value_dim ||
      keys.extent[2] > max_count)
    return refuse(status_code::shape_mismatch, "sinks and ring are [rows, kv_heads, tokens, head_dim] of this cache");
  return {};
}

inline status check_base(lse_base base) {
  if (base == lse_base::e || base == lse_base::two) return {};
  return refuse(status_code::invalid_argument, "the log-sum-exp base must be lse_base::e or lse_base::two");
}

/// Query heads must be a multiple of the KV heads.
inline status check_groups(std::int64_t query_heads, std::int32_t kv_heads) {
  if (query_heads <= 0 || query_heads % kv_heads != 0 || query_heads > max_count)
    return refuse(status_code::shape_mismatch, "query heads must be a positive multiple of kv_heads", query_heads);
  return {};
}

template <class Format>
inline status check_decode(const input_view<3>& queries, const std::int32_t* query_start_loc, const cache_view& cache,
                           const parameters<Format>& p, const output_view<3>& out, const output_view<2>& lse,
                           const attention_options& o) {
  if (const status s = check_cache(p, cache); !s) return s;
  if (const status s = check_16bit_view(queries); !s) return s;
  if (const status s = check_view(out); !s) return s;
  if (const status s = check_groups(queries.extent[1], cache.pages.kv_heads); !s) return s;
  if (queries.extent[0] != out.extent[0] || queries.extent[1] != out.extent[1] ||
      queries.extent[2] != Format::key_head_dim || out.extent[2] != Format::value_head_dim)
    return refuse(status_code::shape_mismatch,
                  "queries are [tokens, query_heads, D_k] and the output [tokens, query_heads, D_v]");
  if (out.type != queries.type && out.type != dtype::float32)
    return refuse(status_code::unsupported, "the output has the dtype of the queries, or float32");
  if (lse.data != nullptr) {
    if (const status s = check_view(lse); !s) return s;
    if (lse.type != dtype::float32) return refuse(status_code::unsupported, "the log-sum-exp output is float32");
    if (lse.extent[0] != queries.extent[0] || lse.extent[1] != queries.extent[1])
      return refuse(status_code::shape_mismatch, "the log-sum-exp output is [tokens, query_heads]");
  }
  if (queries.extent[0] > max_count) return refuse(status_code::overflow, "more than 2^31 - 1 query tokens");
  if (cache.batch > 0 && query_start_loc == nullptr)
    return refuse(status_code::invalid_argument, "query_start_loc is null");
  if (const status s = check_softmax_scale(o.softmax_scale); !s) return s;
  if (!is_finite(o.soft_cap) || o.soft_cap < 0.0f || o.window < 0)
    return refuse(status_code::invalid_argument, "soft_cap and window must not be negative");
  if (lse.data != nullptr)
    if (const status s = check_base(o.base); !s) return s;
  if (o.position_stride <= 0 || o.position_offset < 0)
    return refuse(status_code::invalid_argument, "position_stride must be > 0 and position_offset >= 0");
  if ((o.position_stride != 1 || o.position_offset != 0) && o.context_lens == nullptr)
    return refuse(status_code::invalid_argument, "interleaved positions need context_lens");
  if (o.max_query_len <= 0) return refuse(status_code::invalid_argument, "max_query_len must be > 0");
  if (o.splits < 0 || o.splits > 4096) return refuse(status_code::invalid_argument, "splits must be 0..4096");
  if (const status s = check_overlay(cache.sinks.keys, cache.sinks.values, cache.pages.kv_heads, Format::key_head_dim,
                                     Format::value_head_dim);
      !s)
    return s;
  if (cache.sinks.keys.data != nullptr && cache.sinks.keys.extent[0] < cache.batch)
    return refuse(status_code::shape_mismatch, "sinks have one row per sequence");
  if (const status s = check_overlay(cache.ring.keys, cache.ring.values, cache.pages.kv_heads, Format::key_head_dim,
                                     Format::value_head_dim);
      !s)
    return s;
  if (cache.ring.keys.data != nullptr) {
    if (cache.ring.window < 1) return refuse(status_code::invalid_argument, "a ring needs a window > 0");
    if (cache.ring.keys.extent[2] < static_cast<std::int64_t>(cache.ring.window) + o.max_query_len - 1)
      return refuse(status_code::invalid_argument, "the ring's capacity must be at least window + max_query_len - 1");
    if (cache.ring.row == nullptr && cache.ring.keys.extent[0] < cache.batch)
      return refuse(status_code::shape_mismatch, "a ring without row ids has one row per sequence");
  }
  return {};
}

template <class Format>
inline status check_gemv(const cache_view& cache, const parameters<Format>& p, const input_view<3>& in,
                         const output_view<3>& out, std::int64_t in_dim, std::int64_t out_dim) {
  if (const status s = check_cache(p, cache); !s) return s;
  if (const status s = check_view(in); !s) return s;
  if (const status s = check_view(out); !s) return s;
  if (const status s = check_groups(in.extent[1], cache.pages.kv_heads); !s) return s;
  if (in.extent[0] != cache.batch || out.extent[0] != cache.batch || out.extent[1] != in.extent[1])
    return refuse(status_code::shape_mismatch, "GEMV operands are [batch, query_heads, ...] of this cache");
  if (in.extent[2] != in_dim || out.extent[2] != out_dim)
    return refuse(status_code::shape_mismatch, "the last extent of a GEMV operand is head_dim or max_seq_len");
  if (cache.sinks.keys.data != nullptr || cache.ring.keys.data != nullptr)
    return refuse(status_code::unsupported, "GEMV reads coded tokens only: pass a cache without sinks and ring");
  return {};
}

inline status check_merge(const input_view<4>& outs, const input_view<3>& lses, const output_view<3>& out,
                          const output_view<2>& lse, lse_base base) {
  if (const status s = check_base(base); !s) return s;
  if (const status s = check_view(outs); !s) return s;
  if (const status s = check_view(lses); !s) return s;
  if (const status s = check_view(out); !s) return s;
  if (lses.type != dtype::float32) return refuse(status_code::unsupported, "log-sum-exps are float32");
  if (outs.extent[0] < 1) return refuse(status_code::invalid_argument, "merge_states needs at least one state");
  for (int i = 0; i < 3; ++i)
    if (outs.extent[i] != lses.extent[i])
      return refuse(status_code::shape_mismatch, "outs [n, tokens, heads, D] and lses [n, tokens, heads] differ");
  for (int i = 0; i < 3; ++i)
    if (outs.extent[i + 1] != out.extent[i])
      return refuse(status_code::shape_mismatch, "the merged output is [tokens, heads, D]");
  if (lse.data != nullptr) {
    if (const status s = check_view(lse); !s) return s;
    if (lse.type != dtype::float32) return refuse(status_code::unsupported, "log-sum-exps are float32");
    if (lse.extent[0] != out.extent[0] || lse.extent[1] != out.extent[1])
      return refuse(status_code::shape_mismatch, "the merged log-sum-exp is [tokens, heads]");
  }
  return {};
}

}  // namespace packkv::detail
