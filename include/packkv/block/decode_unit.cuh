// SPDX-License-Identifier: Apache-2.0
// What a block of the fused decode kernel knows of its work: the call, a sequence, and a unit (sequence, KV head, up to
// Rows query rows) with the ranges of tokens that its rows see. Kept in shared memory; the tile loop needs little of
// it.
#pragma once

#include <packkv/block/row_ranges.cuh>
#include <packkv/block/work_split.cuh>
#include <packkv/detail/report.cuh>
#include <packkv/warp/attention_row.cuh>
#include <packkv/warp/raw_attention.cuh>
#include <packkv/warp/score_columns.cuh>

namespace packkv::block {

/// Leaves scores as they are. A user's variant has the same shape: it gets a scaled score (before the soft cap), the
/// query head, and the positions of query and key, and returns the score to use; see examples/alibi_attention.cu.
struct plain_scores {
  static constexpr bool active = false;
  __device__ float operator()(float score, int, std::int64_t, std::int64_t) const { return score; }
};

/// The arguments of a decode call that do not depend on its format.
struct decode_call {
  cache_view cache;
  input_view<3> queries;
  const std::int32_t* query_start_loc;
  output_view<3> out;
  output_view<2> lse;
  attention_options options;
  std::int32_t group;  ///< query heads per KV head
};

/// One sequence of a call.
struct decode_sequence {
  detail::visibility view;
  std::int64_t b, query_begin = 0, first_position = 0;
  int query_count = 0, chunks = 0;  ///< query tokens; units of its rows per KV head
  token_range seen = {};            ///< from the first coded token that a query sees to the last
  int first_tile = 0, tiles = 0;    ///< tiles in which a query may see a coded token

  /// What is wrong with its lengths is added to `flags`.
  PACKKV_HOST_DEVICE decode_sequence(const decode_call& call, std::int64_t sequence, int rows, std::uint32_t& flags)
      : b(sequence) {
    find(call, rows, flags);
  }
  PACKKV_HOST_DEVICE sequence_cost cost(const decode_call& call, std::int32_t raw_items) const {
    return {chunks * call.cache.pages.kv_heads, tiles, raw_items};
  }
  __device__ bool has_raw() const { return view.sinks > 0 || view.ring_begin < view.length; }

 private:
  PACKKV_HOST_DEVICE void find(const decode_call& call, int rows, std::uint32_t& flags) {
    // Everything is loaded before anything is used: one wait for memory.
    const std::int32_t* const lengths = call.cache.seq_lens;
    const std::int32_t query_end = detail::load_now(call.query_start_loc + b + 1),
                       begin = detail::load_now(call.query_start_loc + b),
                       found = lengths != nullptr ? detail::load_now(lengths + b) : call.cache.max_seq_len;
    std::uint32_t of_ring = 0;
    const std::int32_t length = detail::clamp_length(found, call.cache.max_seq_len, flags);
    const std::int64_t context = call.options.context_lens != nullptr ? call.options.context_lens[b] : length;
    view = detail::make_visibility(call.cache, call.options, b, length, of_ring);
    query_begin = begin;
    const std::int32_t count = begin >= 0 && query_end >= begin ? query_end - begin : -1;
    if (count < 0 || count > call.options.max_query_len || query_end > call.queries.extent[0]) {
      flags |= report_length_out_of_range;
      return;
    }
    if (count == 0) return;
    flags |= of_ring;
    query_count = count;
    chunks = ceil_div(query_count * call.group, rows);
    first_position = context - count;
    if (queries_see_all(call.cache, call.options)) {
      seen = all_coded(view);
    } else {
      for (std::int32_t i = 0; i < count; i += max_of(count - 1, 1)) {
        const token_range of_query = coded_range(view, first_position + i);
        seen = {i == 0 ? of_query.begin : seen.begin, of_query.end};
      }
    }
    first_tile = seen.begin / tile_tokens;
    tiles = seen.begin < seen.end ? ceil_div(seen.end, tile_tokens) - first_tile : 0;
  }
};

/// The 16-bit tokens of a sequence and KV head that a query at `first_position` or later may see: sinks, then ring. In
/// shared memory.
class raw_tokens {
 public:
  int count;

  /// By one thread, as is the other half.
  __device__ void set_sinks(const decode_call& call, const detail::visibility& view, std::int64_t b, int head) {
    if (view.sinks > 0) set(sink_tokens_, call.cache.sinks.keys, call.cache.sinks.values, b, head, 0, view.sinks);
  }
  __device__ void set_ring(const decode_call& call, const detail::visibility& view, std::int64_t b, int head,
                           std::int64_t first_position) {
    const cache_view& cache = call.cache;
    sinks_ = view.sinks;
    ring_first_ = view.length;
    if (view.ring_begin < view.length) {
      ring_first_ = max_of(max_of(view.ring_begin, view.sinks), token_at(view, first_position - view.ring_window + 1));
      const auto capacity = static_cast<int>(cache.ring.keys.extent[2]);
      set(ring_tokens_, cache.ring.keys, cache.ring.values, cache.ring.row != nullptr ? cache.ring.row[b] : b, head,
          quotient(ring_first_, capacity).rest, capacity);
    }
    count = sinks_ + max_of(view.length - ring_first_, 0);
  }
  /// Brings them nearer. By `threads` threads, each with its number.
  template <int KeyDim, int ValueDim>
  __device__ void prefetch(int thread, int threads) const {
    constexpr int apart = 64;  // channels in 128 bytes, if they lie together
    for (int i = thread; i < count; i += threads) {
      const bool sink = i < sinks_;
      const warp::raw_chunk& all = sink ? sink_tokens_ : ring_tokens_;
      const warp::raw_vector key = all.key_of(sink ? i : i - sinks_), value = all.value_of(sink ? i : i - sinks_);
      for (int c = 0; c < KeyDim; c += apart) detail::prefetch(key.data + c * key.stride);
      for (int c = 0; c < ValueDim; c += apart) detail::prefetch(value.data + c * value.stride);
    }
  }
  /// They come in chunks of up to `size`, none of which has both sinks and tokens of the ring.
  __device__ int chunks(int size) const { return ceil_div(sinks_, size) + ceil_div(count - sinks_, size); }
  /// Chunk c, of which the first token has number `first` in the sequence.
  __device__ warp::raw_chunk chunk(int c, int size, int& first) const {
    const int of_sinks = ceil_div(sinks_, size);
    const bool sink = c < of_sinks;
    const int begin = (sink ? c : c - of_sinks) * size;
    first = sink ? begin : ring_first_ + begin;
    const warp::raw_chunk& all = sink ? sink_tokens_ : ring_tokens_;
    const int slot = all.slot + begin;
    return {all.key,
            all.value,
            all.key_token,
            all.value_token,
            all.key_stride,
            all.value_stride,
            all.key_type,
            all.value_type,
            slot - (slot >= all.capacity ? all.capacity : 0),
            all.capacity,
            min_of(size, (sink ? sinks_ : count - sinks_) - begin)};
  }
  /// Those of a chunk that begins with token `first` which a query at `query_position` sees.
  __device__ warp::raw_range seen(const detail::visibility& view, int first, std::int64_t query_position) const {
    const bool sink = first < sinks_;
    token_range x = visible_range(view, query_position,
                                  {sink ? 0 : max_of(view.ring_begin, view.sinks), sink ? sinks_ : view.length});
    if (!sink) x.begin = max_of(x.begin, token_at(view, query_position - view.ring_window + 1));
    return {x.begin - first, x.end - first};
  }

 private:
  __device__ static void set(warp::raw_chunk& to, const input_view<4>& k, const input_view<4>& v, std::int64_t row,
                             int head, int slot, int capacity) {
    to.key = static_cast<const char*>(detail::address(k, row, head, 0, 0));
    to.value = static_cast<const char*>(detail::address(v, row, head, 0, 0));
    to.key_token = k.stride[2];
    to.value_token = v.stride[2];
    to.key_stride = k.stride[3];
    to.value_stride = v.stride[3];
    to.key_type = k.type;
    to.value_type = v.type;
    to.slot = slot;
    to.capacity = capacity;
  }

  warp::raw_chunk sink_tokens_, ring_tokens_;  ///< all of them, but for the count
  int sinks_, ring_first_;
};

/// A unit of work, in shared memory.
template <int Rows>
struct decode_unit {
  using columns = warp::score_columns<Rows>;
  static constexpr float log2e = 1.4426950408889634f;

  detail::visibility view;
  std::int64_t b;
  int head, rows;  ///< KV head; rows that exist
  std::int64_t query_token[Rows];
  std::int64_t position[Rows];  ///< of rows that do not exist: the last row's
  token_range range[Rows];
  int query_head[Rows];
  raw_tokens raw;

  /// Unit `number` of a sequence, with its 16-bit tokens or without. By the whole block; a barrier must follow.
  __device__ void set(const decode_call& call, const decode_sequence& s, int number, bool with_raw) {
    const bool single = s.chunks == 1;
    const int kv_head = single ? number : number / s.chunks, first_row = single ? 0 : number % s.chunks * Rows,
              all = s.query_count * call.group;
    if (threadIdx.x == (blockDim.x > 32 ? 32u : 0u)) {  // warp 0 has the rows
      view = s.view;
      b = s.b;
      head = kv_head;
      rows = min_of(Rows, all - first_row);
      if (with_raw) raw.set_sinks(call, s.view, s.b, kv_head);
    }
    if (threadIdx.x == blockDim.x - 1 && with_raw && s.has_raw())  // where there are several warps, not the first
      raw.set_ring(call, s.view, s.b, kv_head, s.first_position + quotient(first_row, call.group).whole);
    if (threadIdx.x < Rows) {
      const int r = static_cast<int>(threadIdx.x), row = min_of(first_row + r, all - 1),
                token = s.query_count == 1 ? 0 : row / call.group;
      query_token[r] = s.query_begin + token;
      query_head[r] = kv_head * call.group + row - token * call.group;
      position[r] = s.first_position + token;
      token_range seen = s.seen;
      if (s.query_count > 1) seen = coded_range(s.view, position[r]);
      range[r] = seen;  // an assignment of its own, which gcc shows to the race detector
    }
  }
  __device__ bool has_raw() const { return view.sinks > 0 || view.ring_begin < view.length; }

  __device__ row_ranges ranges(const decode_call& call) const {
    if (call.options.max_query_len == 1) return row_ranges::same(range[0]);
    row_ranges x = row_ranges::none();
    for (int r = 0; r < Rows; ++r) x.add(range[r]);
    return x;
  }
  __device__ bool sees(int row, int token) const { return token >= range[row].begin && token < range[row].end; }

  __device__ warp::raw_vector where(const decode_call& call, int row) const {
    const input_view<3>& q = call.queries;
    return {static_cast<const char*>(detail::address(q, query_token[row], query_head[row], 0)), q.stride[2]};
  }
  /// The bits of the channels index[i] of a query.
  template <int Count>
  __device__ void load_query(const decode_call& call, int row, const int (&index)[Count],
                             std::uint16_t (&bits)[Count]) const {
    const warp::raw_vector from = where(call, row);
    warp::load_16bit(from.data, from.stride, index, bits);
  }
  /// Their values; 0 in rows that do not exist.
  template <int Count>
  __device__ void convert_query(const decode_call& call, int row, const std::uint16_t (&bits)[Count],
                                float (&x)[Count]) const {
    warp::convert_16bit(bits, call.queries.type, x);
    for (int i = 0; i < Count; ++i) x[i] = row < rows ? x[i] : 0.0f;
  }
  template <int Count>
  __device__ void load_query(const decode_call& call, int row, const int (&index)[Count], float (&x)[Count]) const {
    std::uint16_t bits[Count];
    load_query(call, row, index, bits);
    convert_query(call, row, bits, x);
  }

  /// From a scaled score to base 2, through the variant and the soft cap.
  template <class Variant>
  __device__ float shape(const decode_call& call, const Variant& variant, float score, int row, int token) const {
    if constexpr (Variant::active) score = variant(score, query_head[row], position[row], view.position(token));
    const float cap = call.options.soft_cap;
    if (cap > 0.0f) {  // cap * tanh(score / cap)
      const float e = detail::exp2_fast(min_of(score * detail::reciprocal_fast(cap), 40.0f) * (2.0f * log2e));
      score = cap * (1.0f - 2.0f * detail::reciprocal_fast(e + 1.0f));
    }
    return score * log2e;
  }
  /// The same for the lane's scores of the tile that begins with token `first`, which are and will be less by `less`.
  template <class Variant>
  __device__ void shape_tile(const decode_call& call, const Variant& variant, int first,
                             const float (&less)[columns::lane_rows],
                             float (&s)[warp::tokens_per_lane][columns::lane_rows]) const {
    for (int k = 0; k < warp::tokens_per_lane; ++k)
      for (int i = 0; i < columns::lane_rows; ++i)
        s[k][i] =
            shape(call, variant, s[k][i] + less[i], columns::row(i), first + 8 * k + detail::lane_id() / 4) - less[i];
  }
  /// What the lane's rows do not see of that tile: bit lane_rows * k + i is of its score [k][i].
  __device__ std::uint32_t hidden(int first) const {
    std::uint32_t bits = 0;
    for (int k = 0; k < warp::tokens_per_lane; ++k)
      for (int i = 0; i < columns::lane_rows; ++i)
        if (!sees(columns::row(i), first + 8 * k + detail::lane_id() / 4)) bits |= 1u << (columns::lane_rows * k + i);
    return bits;
  }

  /// Where the lane's first channel of a finished row goes.
  __device__ char* out_of(const decode_call& call, int r) const {
    return static_cast<char*>(detail::address(call.out, query_token[r], query_head[r], detail::lane_id()));
  }
  /// Stores a finished row at `to`, which is out_of(call, r). By one warp.
  template <int ValueDim>
  __device__ void write(const decode_call& call, int r, const warp::attention_row<ValueDim>& row, char* to) const {
    using namespace packkv::detail;
    const bool empty = row.sum == 0.0f;
    const float factor = empty ? 0.0f : 1.0f / row.sum;
    float x[ValueDim / 32];
    for (int i = 0; i < ValueDim / 32; ++i) x[i] = empty ? 0.0f : row.channel[i] * factor;
    const std::int64_t apart = 32 * call.out.stride[2];
    if (call.out.type == dtype::float32)
      for (int i = 0; i < ValueDim / 32; ++i) *reinterpret_cast<float*>(to + i * apart) = x[i];
    else if (call.out.type == dtype::float16)
      for (int i = 0; i < ValueDim / 32; ++i)
        *reinterpret_cast<std::uint16_t*>(to + i * apart) = static_cast<std::uint16_t>(pack_halves(x[i], 0.0f));
    else
      for (int i = 0; i < ValueDim / 32; ++i)
        *reinterpret_cast<std::uint16_t*>(to + i * apart) = float_to_bfloat16(x[i]);
    if (call.lse.data != nullptr && lane_id() == 0) {
      const float base2 = row.maximum + log2f(row.sum);
      const float unit = call.options.base == lse_base::two ? 1.0f : 1.0f / log2e;
      store_element(address(call.lse, query_token[r], query_head[r]), call.lse.type,
                    empty ? -infinity() : base2 * unit);
    }
  }
};

}  // namespace packkv::block
