// SPDX-License-Identifier: Apache-2.0
// Launches of the kernels over token sources (kernel/sequences.cuh), and their workspace.
//   std::int64_t bytes = packkv::sequence_workspace_bytes<128>({batch, kv_heads, query_heads, queries, tokens, 0});
#pragma once

#include <packkv/device/decode_attention.cuh>
#include <packkv/kernel/sequences.cuh>

namespace packkv {

/// Workspace of the value GEMVs and attention over whole-sequence formats (grouped_*, adaptive_*, packs) for every call
/// within the maxima; max_query_len is the queries of a head, splits does not count. -1 as decode_workspace_bytes.
template <int ValueDim>
std::int64_t sequence_workspace_bytes(decode_maxima m) {
  m.splits = 0;
  return decode_workspace_bytes<runtime_format<ValueDim, ValueDim>>(m);
}

namespace detail {

template <int HeadDim, class Source>
status launch_sequence_decompress(const Source& source, const output_view<4>& out, std::int64_t tokens, const exec& e) {
  const checked tiles = checked(out.extent[0]) * out.extent[1] * ceil_div<std::int64_t>(tokens, tile_tokens);
  if (!tiles.valid()) return refuse(status_code::overflow, "more tiles than 63 bits can count");
  if (tiles.value() == 0) return {};
  return launch(kernel::sequence_decompress<HeadDim, Source>,
                grid_for(ceil_div<std::int64_t>(tiles.value(), kernel::sequence_warps)), kernel::sequence_warps * 32,
                e.stream, source, out, tokens, e.report);
}

/// Arguments and grid of a call with `in` [batch, query_heads, queries, ...]. Refuses more blocks than a grid has; no
/// units of work, hence nothing to launch, only if an extent of `in` is 0.
inline status make_sequence_args(const input_view<4>& in, const output_view<4>& out, std::int64_t kv_heads,
                                 std::int64_t tokens, const exec& e, kernel::sequence_args& a,
                                 policy::decode_grid& grid) {
  const checked rows = checked(in.extent[1] / kv_heads) * in.extent[2];
  grid = policy::make_decode_grid(in.extent[0], kv_heads, rows.value(), tokens, 0);
  const bool empty = in.extent[0] == 0 || in.extent[1] == 0 || in.extent[2] == 0;
  if (!empty && (grid.units == 0 || grid.units > max_count / grid.splits))
    return refuse(status_code::overflow, "more than 2^31 - 1 blocks: cut the call into smaller batches");
  a = {};
  a.in = in;
  a.out = out;
  a.scale = 1.0f;
  a.tokens = tokens;
  a.report = e.report;
  a.kv_heads = static_cast<std::int32_t>(kv_heads);
  a.chunks = grid.chunks;
  a.splits = grid.splits;
  a.storage = split_storage_of(e, grid);
  return {};
}

template <int HeadDim, class Source>
status launch_sequence_key_gemv(const Source& source, const input_view<4>& queries, std::int64_t kv_heads, float scale,
                                const output_view<4>& scores, const exec& e) {
  policy::decode_grid grid;
  kernel::sequence_args a;
  if (const status s = make_sequence_args(queries, scores, kv_heads, warp::tokens_of(source), exec{}, a, grid); !s)
    return s;
  if (grid.units == 0 || a.tokens == 0) return {};
  a.scale = scale;
  a.report = e.report;
  return launch(kernel::sequence_key_gemv<HeadDim, Source>, grid_for(grid.units * grid.splits),
                policy::decode_warps * 32, e.stream, source, a);
}

template <int HeadDim, class Source>
status launch_sequence_value_gemv(const Source& source, const input_view<4>& weights, std::int64_t kv_heads,
                                  const output_view<4>& out, const exec& e) {
  policy::decode_grid grid;
  kernel::sequence_args a;
  if (const status s = make_sequence_args(weights, out, kv_heads, warp::tokens_of(source), e, a, grid); !s) return s;
  if (grid.units == 0) return {};
  if (const status s = check_grid<HeadDim>(grid, e); !s) return s;
  return launch(kernel::sequence_value_gemv<HeadDim, Source>, grid_for(grid.units * grid.splits),
                policy::decode_warps * 32, e.stream, source, a);
}

template <int KeyDim, int ValueDim, class KeySource, class ValueSource>
status launch_sequence_attention(const KeySource& keys, const ValueSource& values, const input_view<4>& queries,
                                 std::int64_t kv_heads, float scale, const output_view<4>& out,
                                 const kernel::sequence_attention_args& more, const exec& e) {
  policy::decode_grid grid;
  kernel::sequence_args a;
  if (const status s = make_sequence_args(queries, out, kv_heads, warp::tokens_of(keys), e, a, grid); !s) return s;
  if (grid.units == 0) return {};
  if (const status s = check_grid<ValueDim>(grid, e); !s) return s;
  a.scale = scale;
  return launch(kernel::sequence_attention<KeyDim, ValueDim, KeySource, ValueSource>,
                grid_for(grid.units * grid.splits), policy::decode_warps * 32, e.stream, keys, values, a, more);
}

}  // namespace detail
}  // namespace packkv
