// SPDX-License-Identifier: Apache-2.0
// Where tiles live: pages of 64-token tiles in memory that the engine owns, page tables, the whole cache.
// One idea: base pointers and strides in bytes come from the caller and are never derived from shapes.
//   tile address = data + page * page_stride + head * head_stride + i * tile_bytes
#pragma once

#include <cstdint>
#include <packkv/codec/parameters.hpp>
#include <packkv/core/views.hpp>

namespace packkv {

/// The pages of one layer. K and V may lie in one pool or in two. Pointers and strides: multiples of 16 bytes.
struct pages_view {
  void* key_data = nullptr;
  void* value_data = nullptr;
  std::int64_t key_page_stride = 0;  ///< bytes between pages
  std::int64_t key_head_stride = 0;  ///< bytes between KV heads of a page
  std::int64_t value_page_stride = 0;
  std::int64_t value_head_stride = 0;
  std::int32_t num_pages = 0;
  std::int32_t kv_heads = 0;
  std::int32_t tiles_per_page = 1;  ///< page size in tokens / 64
};

/// Which page holds which part of a sequence; page i of a sequence covers tokens i*page_tokens onwards.
/// Dense: `pages` is int32 [batch, row_stride], `indptr` null. CSR: `pages` holds the indices, `indptr` is
/// int32 [batch + 1]. Contiguous: `pages` null, sequence b owns the pages b*row_stride, b*row_stride + 1, ...
/// Ids outside 0..num_pages-1 stand for "no page": their tokens are left out, and the report says so.
struct page_table {
  const std::int32_t* pages = nullptr;
  const std::int32_t* indptr = nullptr;
  std::int64_t row_stride = 0;
};

/// The first tokens of every sequence in 16 bits: [batch, kv_heads, count, head_dim]. No sinks: data null.
/// They take the place of the coded tokens 0..count-1.
struct sinks_view {
  input_view<4> keys = {};
  input_view<4> values = {};
};

/// The newest tokens in 16 bits: [rows, kv_heads, capacity, head_dim], token t at slot t % capacity. They take the
/// place of coded tokens: a query at position p reads tokens at positions > p - window from here. capacity >= window +
/// max_query_len - 1. No ring: data null. Row of sequence b: `row[b]`, or b if `row` is null; a negative row means no
/// ring for it, and so does a row beyond the ring, which is reported.
struct ring_view {
  input_view<4> keys = {};
  input_view<4> values = {};
  const std::int32_t* row = nullptr;  ///< int32 [batch], same memory space as the data
  std::int32_t window = 0;
};

/// A tile for store_tiles to code, and where its 64 tokens are.
struct tile_move {
  std::int64_t slot = -1;   ///< of its first token: page * page_tokens + token in page, a multiple of 64; < 0: no tile
  std::int32_t row = 0;     ///< of the tensors, or of the ring
  std::int32_t first = 0;   ///< its token t lies at (first + t) % tokens
};

/// A batch of sequences in a paged cache, with the optional 16-bit overlays.
struct cache_view {
  pages_view pages = {};
  page_table table = {};
  const std::int32_t* seq_lens =
      nullptr;  ///< tokens per sequence, int32 [batch]; values outside 0..max_seq_len are clamped and reported
  const std::int32_t* kv_begin =
      nullptr;  ///< first visible position per sequence (left padding), int32 [batch]; null: 0
  std::int32_t batch = 0;
  std::int32_t max_seq_len = 0;
  sinks_view sinks = {};
  ring_view ring = {};
};

/// What kernels found in the data; counters only grow, flags are or-ed. The caller zeroes it.
struct device_report {
  std::uint32_t flags = 0;
  std::uint32_t leading_clamps = 0;  ///< leading components beyond +-127 steps
};

/// Bits of device_report::flags.
enum report_flag : std::uint32_t {
  report_nonfinite_input = 1u,        ///< NaN or infinity in the input: the token's row scale is NaN
  report_scale_overflow = 2u,         ///< finite input beyond the range of the stored type
  report_page_out_of_range = 4u,      ///< a page id >= num_pages, or a store slot beyond the pages
  report_page_missing = 8u,           ///< a negative page id, or a table row too short, inside a sequence
  report_length_out_of_range = 16u,   ///< a sequence or query length outside its stated maximum
  report_ring_row_out_of_range = 32u,  ///< a ring row beyond the ring: the sequence has none; store_tiles: the tile has none
  report_code_overflow = 64u,         ///< packs, strip-adaptive: a code above 255, which became 255
  report_order_invalid = 128u,        ///< packs: a given order of a block that is no permutation of its 64 tokens
  report_tile_damaged = 256u          ///< packs, strip-adaptive: a tile that contradicts itself: its elements read as NaN
};

/// Base of the log-sum-exp that a call writes or reads. The caller must choose: a wrong base corrupts merges silently.
enum class lse_base : std::uint8_t { e = 0, two = 1, unset = 255 };

/// What decode_attention computes beside softmax(scale * q.K^T) V.
struct attention_options {
  float softmax_scale = 0.0f;        ///< required, > 0
  lse_base base = lse_base::unset;   ///< base of the log-sum-exp output; required with one
  float soft_cap = 0.0f;             ///< > 0: scores become cap * tanh(score / cap)
  std::int32_t window = 0;           ///< > 0: a query sees the last `window` positions up to its own
  bool causal = true;                ///< query i of n sees positions up to length - n + i
  std::int32_t position_stride = 1;  ///< position of local token t = t * position_stride + position_offset
  std::int32_t position_offset = 0;
  const std::int32_t* context_lens =
      nullptr;  ///< positions per sequence, int32 [batch], where local tokens are a part of them; null: seq_lens
  std::int32_t max_query_len = 1;  ///< upper bound of tokens per sequence in this call
  std::int32_t splits =
      0;  ///< partial results per sequence; 0: chosen from maxima. Results repeat bit for bit for a fixed value. Fused
          ///< kernels have at most 4,096 blocks, whatever is asked for
};

/// Bytes of one page of one KV head of each side, a lower bound for the strides.
template <class Format>
PACKKV_HOST_DEVICE constexpr std::int64_t key_page_bytes(const Format& format, int tiles_per_page) {
  return static_cast<std::int64_t>(format.key().tile_bytes()) * tiles_per_page;
}
/// The same for V.
template <class Format>
PACKKV_HOST_DEVICE constexpr std::int64_t value_page_bytes(const Format& format, int tiles_per_page) {
  return static_cast<std::int64_t>(format.value().tile_bytes()) * tiles_per_page;
}

/// Page i of sequence b, or -1. Counts what is wrong with the table into `flags`.
PACKKV_HOST_DEVICE inline std::int32_t find_page(const page_table& table, std::int32_t num_pages, std::int64_t b,
                                                 std::int64_t i, std::uint32_t& flags) {
  std::int64_t id = -1;
  if (table.indptr != nullptr) {
    const std::int64_t begin = table.indptr[b], end = table.indptr[b + 1];
    if (begin >= 0 && i < end - begin) id = table.pages[begin + i];
  } else if (i < table.row_stride) {
    id = table.pages != nullptr ? table.pages[b * table.row_stride + i] : b * table.row_stride + i;
  }
  if (id >= 0 && id < num_pages) return static_cast<std::int32_t>(id);
  flags |= id < 0 ? report_page_missing : report_page_out_of_range;
  return -1;
}

/// Address of a tile of K or of V: tile `tile` of page `page`, KV head `head`.
PACKKV_HOST_DEVICE inline std::uint8_t* key_tile(const pages_view& p, const codec_spec& spec, std::int64_t page,
                                                 int head, int tile) {
  return static_cast<std::uint8_t*>(p.key_data) + page * p.key_page_stride + head * p.key_head_stride +
         static_cast<std::int64_t>(tile) * spec.tile_bytes();
}
/// The same for V.
PACKKV_HOST_DEVICE inline std::uint8_t* value_tile(const pages_view& p, const codec_spec& spec, std::int64_t page,
                                                   int head, int tile) {
  return static_cast<std::uint8_t*>(p.value_data) + page * p.value_page_stride + head * p.value_head_stride +
         static_cast<std::int64_t>(tile) * spec.tile_bytes();
}

namespace detail {

using packkv::find_page;
using packkv::key_tile;
using packkv::value_tile;

/// A length, from 0 to max_len. What is wrong with it is added to `flags`.
PACKKV_HOST_DEVICE inline std::int32_t clamp_length(std::int32_t n, std::int32_t max_len, std::uint32_t& flags) {
  if (n >= 0 && n <= max_len) return n;
  flags |= report_length_out_of_range;
  return n < 0 ? 0 : max_len;
}
/// Length of sequence b, clamped to 0..max_seq_len; a null array means max_seq_len for all.
PACKKV_HOST_DEVICE inline std::int32_t clamp_length(const std::int32_t* lengths, std::int64_t b, std::int32_t max_len,
                                                    std::uint32_t& flags) {
  return lengths == nullptr ? max_len : clamp_length(lengths[b], max_len, flags);
}

/// Which tokens a query sees, and which of them in 16 bits. One definition for the kernels and the reference. In shared
/// memory, too: no initialisers.
struct visibility {
  std::int64_t position_stride, position_offset;
  std::int64_t kv_begin, window;
  std::int32_t length;      ///< local tokens
  std::int32_t sinks;       ///< tokens 0..sinks-1 are 16-bit
  std::int32_t ring_begin;  ///< first token still in the ring; `length` without a ring
  std::int64_t ring_window;
  bool causal;

  PACKKV_HOST_DEVICE std::int64_t position(std::int64_t t) const { return t * position_stride + position_offset; }
  PACKKV_HOST_DEVICE bool visible(std::int64_t t, std::int64_t query_position) const {
    const std::int64_t p = position(t);
    return t < length && p >= kv_begin && (!causal || p <= query_position) &&
           (window <= 0 || p > query_position - window);
  }
  PACKKV_HOST_DEVICE bool in_ring(std::int64_t t, std::int64_t query_position) const {
    return t >= sinks && t >= ring_begin && position(t) > query_position - ring_window;
  }
  PACKKV_HOST_DEVICE bool raw(std::int64_t t, std::int64_t query_position) const {
    return t < sinks || in_ring(t, query_position);
  }
};

PACKKV_HOST_DEVICE inline visibility make_visibility(const cache_view& cache, const attention_options& options,
                                                     std::int64_t b, std::int32_t length, std::uint32_t& flags) {
  visibility v = {};
  v.position_stride = options.position_stride;
  v.position_offset = options.position_offset;
  v.kv_begin = cache.kv_begin != nullptr ? cache.kv_begin[b] : 0;
  v.window = options.window;
  v.length = length;
  v.causal = options.causal;
  v.sinks = cache.sinks.keys.data != nullptr
                ? static_cast<std::int32_t>(min_of<std::int64_t>(cache.sinks.keys.extent[2], length))
                : 0;
  v.ring_begin = length;
  const std::int64_t row = cache.ring.keys.data == nullptr ? -1 : cache.ring.row != nullptr ? cache.ring.row[b] : b;
  if (row >= 0 && row >= cache.ring.keys.extent[0]) {
    flags |= report_ring_row_out_of_range;
  } else if (row >= 0) {
    const std::int64_t first = length - cache.ring.keys.extent[2];
    v.ring_begin = static_cast<std::int32_t>(first > 0 ? first : 0);
    v.ring_window = cache.ring.window;
  }
  return v;
}

/// Where a tile goes.
struct tile_place {
  bool valid;
  std::int64_t page;
  int slot;  ///< tile of the page
};
/// Of a move from tensors [rows, kv_heads, tokens, head_dim]. What is wrong with it is added to `flags`.
PACKKV_HOST_DEVICE inline tile_place place_of(const tile_move& m, const input_view<4>& from, const pages_view& pages,
                                              std::uint32_t& flags) {
  if (m.slot < 0) return {false, 0, 0};
  const std::int64_t tile = m.slot / tile_tokens, page = tile / pages.tiles_per_page;
  const bool row = m.row >= 0 && m.row < from.extent[0], first = m.first >= 0 && m.first < from.extent[2];
  const bool slot = m.slot % tile_tokens == 0 && page < pages.num_pages;
  if (!slot) flags |= report_page_out_of_range;
  if (!row) flags |= report_ring_row_out_of_range;
  if (!first) flags |= report_length_out_of_range;
  return {slot && row && first, page, static_cast<int>(tile % pages.tiles_per_page)};
}

}  // namespace detail
}  // namespace packkv
