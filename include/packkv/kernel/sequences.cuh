// SPDX-License-Identifier: Apache-2.0
// Decompress, GEMVs and attention over token sources (warp/token_source.cuh): formats that code whole sequences.
// One idea: a warp takes tiles of 64 tokens and loads them token by token; softmax, merges and splits are those of
// decode_attention. General and parallel, not tuned.
#pragma once

#include <packkv/block/split_merge.cuh>
#include <packkv/detail/report.cuh>
#include <packkv/policy/decode.hpp>
#include <packkv/warp/token_source.cuh>

namespace packkv::kernel {

inline constexpr int sequence_warps = 8;  ///< of a block that takes a tile or a token for each warp

/// Reconstructs the first `tokens` tokens of a source into out [batch, kv_heads, >= tokens, HeadDim]; a warp per tile.
template <int HeadDim, class Source>
__global__ void __launch_bounds__(sequence_warps * 32)
    sequence_decompress(const __grid_constant__ Source source, const __grid_constant__ output_view<4> out,
                        std::int64_t tokens, device_report* report) {
  using namespace packkv::detail;
  const std::int64_t tiles = ceil_div<std::int64_t>(tokens, tile_tokens);
  const std::int64_t items = out.extent[0] * out.extent[1] * tiles;
  std::uint32_t flags = 0;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * sequence_warps + warp_id(); item < items;
       item += static_cast<std::int64_t>(gridDim.x) * sequence_warps) {
    const std::int64_t tile = item % tiles, b = item / tiles / out.extent[1], first = tile * tile_tokens;
    const int head = static_cast<int>(item / tiles % out.extent[1]);
    const int count = static_cast<int>(min_of<std::int64_t>(tile_tokens, tokens - first));
    warp::read_tile<HeadDim>(source, b, head, tile, flags, [&](auto& reader) {
      for (int slot = 0; slot < count; ++slot) {
        float x[HeadDim / 32];
        reader.load(slot, x);
        for (int i = 0; i < HeadDim / 32; ++i)
          store_element(address(out, b, head, first + slot, lane_id() + 32 * i), out.type, x[i]);
      }
    });
  }
  detail::add_report(report, lane_id() == 0 ? flags : 0u, 0);
}

/// What the GEMVs and attention share; every tensor has the layout [batch, query_heads, queries, ...].
struct sequence_args {
  input_view<4> in;    ///< queries [.., D_k] or weights [.., tokens]
  output_view<4> out;  ///< scores [.., tokens] or outputs [.., D_v]
  float scale;
  std::int64_t tokens;  ///< of a sequence
  block::split_storage storage;
  device_report* report;
  std::int32_t kv_heads;
  std::int32_t splits;
  std::int64_t chunks;
};

/// Coordinates of a block: grid = units * splits, a unit being (batch row, KV head, Rows query rows). Row r is query
/// r / group of query head r % group of the KV head.
template <int Rows>
struct sequence_rows {
  static constexpr int rows = Rows;
  const sequence_args& a;
  std::int64_t unit, b, first_row, group;
  int split, head;

  __device__ explicit sequence_rows(const sequence_args& args) : a(args) {
    split = static_cast<int>(blockIdx.x % a.splits);
    unit = blockIdx.x / a.splits;
    first_row = unit % a.chunks * rows;
    head = static_cast<int>(unit / a.chunks % a.kv_heads);
    b = unit / a.chunks / a.kv_heads;
    group = a.in.extent[1] / a.kv_heads;
  }
  __device__ bool row_exists(int r) const { return first_row + r < group * a.in.extent[2]; }
  __device__ std::int64_t query(int r) const { return (first_row + r) / group; }
  __device__ std::int64_t query_head(int r) const {
    return static_cast<std::int64_t>(head) * group + (first_row + r) % group;
  }
  /// Element c of row r of the input; 0 in rows that do not exist.
  __device__ float load(int r, std::int64_t c) const {
    return row_exists(r) ? detail::load_element(detail::address(a.in, b, query_head(r), query(r), c), a.in.type) : 0.0f;
  }
  __device__ void store(int r, std::int64_t c, float x) const {
    detail::store_element(detail::address(a.out, b, query_head(r), query(r), c), a.out.type, x);
  }
  template <int HeadDim>
  __device__ void load_queries(typename warp::token_scores<HeadDim, rows>::temp_storage& storage) const {
    for (int c = static_cast<int>(threadIdx.x); c < HeadDim; c += policy::decode_warps * 32)
      for (int r = 0; r < rows; ++r) storage.query[r][c] = load(r, c);
    __syncthreads();
  }
  /// f(tile, first token, tokens of the tile) for the tiles of this warp of this split.
  template <class Function>
  __device__ void for_each_tile(Function&& f) const {
    const std::int64_t tiles = ceil_div<std::int64_t>(a.tokens, tile_tokens), end = tiles * (split + 1) / a.splits;
    for (std::int64_t tile = tiles * split / a.splits + detail::warp_id(); tile < end; tile += policy::decode_warps) {
      const std::int64_t first = tile * tile_tokens;
      f(tile, first, static_cast<int>(min_of<std::int64_t>(tile_tokens, a.tokens - first)));
    }
  }
};

using sequence_unit = sequence_rows<policy::decode_rows>;

/// out[.., t] = scale * in . k^[t] for the tokens of a source. Blocks of decode_warps warps.
template <int HeadDim, class Source>
__global__ void __launch_bounds__(policy::decode_warps * 32)
    sequence_key_gemv(const __grid_constant__ Source source, const __grid_constant__ sequence_args a) {
  using namespace packkv::detail;
  constexpr int rows = sequence_unit::rows;
  using scores_type = warp::token_scores<HeadDim, rows>;
  __shared__ typename scores_type::temp_storage queries;
  const sequence_unit unit(a);
  unit.load_queries<HeadDim>(queries);
  std::uint32_t flags = 0;
  unit.for_each_tile([&](std::int64_t tile, std::int64_t first, int count) {
    float scores[2][rows];
    warp::read_tile<HeadDim>(source, unit.b, unit.head, tile, flags,
                             [&](auto& tokens) { scores_type::compute(queries, tokens, count, scores); });
    for (int j = 0; j < 2; ++j)
      for (int r = 0; r < rows; ++r)
        if (lane_id() + 32 * j < count && unit.row_exists(r))
          unit.store(r, first + lane_id() + 32 * j, scores[j][r] * a.scale);
  });
  detail::add_report(a.report, lane_id() == 0 ? flags : 0u, 0);
}

/// Merges what the warps and splits of a unit have summed; write(row, sums) is called in the last split's warps.
template <int HeadDim, class Write>
__device__ inline void finish_sequence(const sequence_unit& unit,
                                       typename block::row_merge<HeadDim, sequence_unit::rows>::temp_storage& storage,
                                       const warp::online_softmax<sequence_unit::rows>& softmax,
                                       const warp::value_sum<HeadDim, sequence_unit::rows>& sum, Write&& write) {
  constexpr int rows = sequence_unit::rows;
  static_assert(rows == policy::decode_warps, "a warp finishes one row");
  block::attention_row<HeadDim> row = block::row_merge<HeadDim, rows>::merge(storage, softmax, sum);
  if (block::split_merge<HeadDim, rows>::is_last(unit.a.storage, unit.unit, unit.split, unit.a.splits, row) &&
      unit.row_exists(detail::warp_id()))
    write(detail::warp_id(), row);
}

/// out = sum over t of in[.., t] * v^[t]. A weight of 0 selects: what its token holds does not reach the sum.
template <int HeadDim, class Source>
__global__ void __launch_bounds__(policy::decode_warps * 32)
    sequence_value_gemv(const __grid_constant__ Source source, const __grid_constant__ sequence_args a) {
  using namespace packkv::detail;
  constexpr int rows = sequence_unit::rows;
  __shared__ typename block::row_merge<HeadDim, rows>::temp_storage storage;
  const sequence_unit unit(a);
  std::uint32_t flags = 0;
  warp::online_softmax<rows> plain;  // a sum without a maximum: every weight counts as it is
  for (int r = 0; r < rows; ++r) plain.maximum[r] = 0.0f;
  warp::value_sum<HeadDim, rows> sum;
  unit.for_each_tile([&](std::int64_t tile, std::int64_t first, int count) {
    float weights[2][rows];
    for (int j = 0; j < 2; ++j)
      for (int r = 0; r < rows; ++r) {
        const int slot = lane_id() + 32 * j;
        weights[j][r] = slot < count ? unit.load(r, first + slot) : 0.0f;
      }
    warp::read_tile<HeadDim>(source, unit.b, unit.head, tile, flags, [&](auto& tokens) {
      sum.add_tokens(weights, [&](int slot, float(&x)[HeadDim / 32]) { tokens.load(slot, x); });
    });
  });
  finish_sequence<HeadDim>(unit, storage, plain, sum, [&](int r, const block::attention_row<HeadDim>& row) {
    for (int i = 0; i < HeadDim / 32; ++i) unit.store(r, lane_id() + 32 * i, row.channel[i]);
  });
  detail::add_report(a.report, lane_id() == 0 ? flags : 0u, 0);
}

/// What attention needs beside sequence_args.
struct sequence_attention_args {
  output_view<3> lse;             ///< natural logarithm, may be null
  warp::raw_source keys, values;  ///< all tokens in 16 bits, where sinks or recent > 0
  std::int64_t sinks = 0;         ///< tokens 0 .. sinks - 1 are read there
  std::int64_t recent = 0;        ///< and those whose distance to the query is less than this
  std::int64_t window = 0;        ///< tokens at this distance or more are not seen; 0: all are
};

/// out = softmax(scale * in . k^) v^. The queries are the last positions: query i of n stands at token tokens - n + i
/// and sees no later one. K and V may differ in how many of their tokens are coded.
template <int KeyDim, int ValueDim, class KeySource, class ValueSource>
__global__ void __launch_bounds__(policy::decode_warps * 32, 1)
    sequence_attention(const __grid_constant__ KeySource keys, const __grid_constant__ ValueSource values,
                       const __grid_constant__ sequence_args a, const __grid_constant__ sequence_attention_args more) {
  using namespace packkv::detail;
  constexpr int rows = sequence_unit::rows;
  using scores_type = warp::token_scores<KeyDim, rows>;
  __shared__ typename scores_type::temp_storage queries;
  __shared__ typename block::row_merge<ValueDim, rows>::temp_storage storage;
  const sequence_unit unit(a);
  unit.load_queries<KeyDim>(queries);
  std::uint32_t flags = 0;
  warp::online_softmax<rows> softmax;
  warp::value_sum<ValueDim, rows> sum;
  std::int64_t position[rows];
  for (int r = 0; r < rows; ++r)
    position[r] = a.tokens - a.in.extent[2] + min_of<std::int64_t>(unit.query(r), a.in.extent[2] - 1);

  /// Adds the tokens of a tile that are raw, or those that are not, if a row sees one.
  const auto add = [&](const auto& key, const auto& value, std::int64_t tile, std::int64_t first, int count, bool raw) {
    const auto seen = [&](int slot, int r) {
      const std::int64_t t = first + slot, distance = position[r] - t;
      return slot < count && distance >= 0 && (more.window == 0 || distance < more.window) &&
             (t < more.sinks || distance < more.recent) == raw;
    };
    bool any = false;
    for (int r = 0; r < rows; ++r) any = any || seen(lane_id(), r) || seen(lane_id() + 32, r);
    if (__any_sync(all_lanes, any) == 0) return;
    float weights[2][rows], rescale[rows];
    warp::read_tile<KeyDim>(key, unit.b, unit.head, tile, flags,
                            [&](auto& tokens) { scores_type::compute(queries, tokens, count, weights); });
    for (int j = 0; j < 2; ++j)
      for (int r = 0; r < rows; ++r)
        weights[j][r] = seen(lane_id() + 32 * j, r) ? weights[j][r] * a.scale * 1.4426950408889634f : -infinity();
    softmax.weigh(weights, rescale);
    sum.rescale(rescale);
    warp::read_tile<ValueDim>(value, unit.b, unit.head, tile, flags, [&](auto& tokens) {
      sum.add_tokens(weights, [&](int slot, float(&x)[ValueDim / 32]) { tokens.load(slot, x); });
    });
  };
  unit.for_each_tile([&](std::int64_t tile, std::int64_t first, int count) {
    add(keys, values, tile, first, count, false);
    if (more.sinks > 0 || more.recent > 0) add(more.keys, more.values, tile, first, count, true);
  });
  finish_sequence<ValueDim>(unit, storage, softmax, sum, [&](int r, const block::attention_row<ValueDim>& row) {
    for (int i = 0; i < ValueDim / 32; ++i) unit.store(r, lane_id() + 32 * i, row.channel[i] / row.sum);
    if (more.lse.data != nullptr && lane_id() == 0)
      store_element(address(more.lse, unit.b, unit.query_head(r), unit.query(r)), more.lse.type,
                    (row.maximum + log2f(row.sum)) * 0.6931471805599453f);
  });
  detail::add_report(a.report, lane_id() == 0 ? flags : 0u, 0);
}

}  // namespace packkv::kernel
