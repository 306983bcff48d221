// SPDX-License-Identifier: Apache-2.0
// Launches of the kernels that unpack packs of 16 tokens (kernel/pack_gemv.cuh, pack_attention.cuh), and which packs
// take them.
#pragma once

#include <packkv/device/sequences.cuh>
#include <packkv/kernel/pack_attention.cuh>

namespace packkv::detail {

/// Packs of 16 tokens and steps of a token or a vector, up to 256 channels: what the kernels unpack. All others take
/// the general kernels: a step of a channel would multiply queries and sums, not weights, and other pack sizes have
/// fields of other lengths.
template <int HeadDim>
bool takes_pack_kernels(const pack_format& f, side which, std::int64_t blocks) {
  const pack_granularity g = f.codec(which).granularity;
  return HeadDim <= 256 && f.pack_size == 16 && blocks <= max_count &&
         (g == pack_granularity::token || g == pack_granularity::vector);
}

/// Grid of a kernel for `Rows` rows of a unit and blocks of this shape: changes the arguments that the general kernels
/// would get. Refuses more blocks than a grid has.
inline status make_pack_grid(int rows, const policy::pack_shape& shape, std::int64_t most, kernel::sequence_args& a,
                             std::int64_t& blocks) {
  a.chunks = ceil_div<std::int64_t>(a.in.extent[1] / a.kv_heads * a.in.extent[2], rows);
  const checked units = checked(a.in.extent[0]) * a.kv_heads * a.chunks;
  a.splits = policy::pack_splits(units.value(), ceil_div<std::int64_t>(a.tokens, tile_tokens), shape, most);
  const checked all = units * a.splits;
  if (!all.valid() || all.value() > max_count)
    return refuse(status_code::overflow, "more than 2^31 - 1 blocks: cut the call into smaller batches");
  blocks = all.value();
  return {};
}

template <class... Parameter>
status launch_pack_kernel(void (*kernel)(Parameter...), std::int64_t blocks, const policy::pack_shape& shape,
                          cudaStream_t stream, Parameter... parameter) {
  return launch_early(kernel, grid_for(blocks), block_size(shape.warps * warp_threads, shape.shared_bytes), stream,
                      parameter...);
}

template <int HeadDim, int Rows, warp::copy_engine Engine>
status launch_pack_key_rows(const warp::pack_source& source, kernel::sequence_args a, cudaStream_t stream) {
  constexpr policy::pack_shape shape = kernel::pack_key_warp<HeadDim, Rows, Engine>::shape();
  std::int64_t blocks = 0;
  if (const status s = make_pack_grid(Rows, shape, a.tokens / tile_tokens, a, blocks); !s) return s;
  return launch_pack_kernel(kernel::pack_key_gemv<HeadDim, Rows, Engine>, blocks, shape, stream, source, a);
}

/// As launch_sequence_key_gemv, for packs that take_pack_kernels.
template <int HeadDim, warp::copy_engine Engine = warp::copy_engine::best>
status launch_pack_key_gemv(const warp::pack_source& source, const input_view<4>& queries, std::int64_t kv_heads,
                            float scale, const output_view<4>& scores, const exec& e) {
  policy::decode_grid grid;
  kernel::sequence_args a;
  if (const status s = make_sequence_args(queries, scores, kv_heads, source.coded_tokens(), exec{}, a, grid); !s)
    return s;
  if (grid.units == 0 || a.tokens == 0) return {};
  a.scale = scale;
  a.report = e.report;
  if (policy::pack_key_rows(queries.extent[1] / kv_heads) == 2)
    return launch_pack_key_rows<HeadDim, 2, Engine>(source, a, e.stream);
  return launch_pack_key_rows<HeadDim, 4, Engine>(source, a, e.stream);
}

template <int HeadDim, int Rows, warp::copy_engine Engine>
status launch_pack_value_rows(const warp::pack_source& source, std::int32_t most_splits, kernel::sequence_args a,
                              cudaStream_t stream) {
  constexpr policy::pack_shape shape = kernel::pack_value_warp<HeadDim, Rows, Engine>::shape();
  static_assert(Rows <= policy::decode_rows, "parts of sums fit where the general kernel's rows do");
  std::int64_t blocks = 0;
  if (const status s = make_pack_grid(Rows, shape, most_splits, a, blocks); !s) return s;
  return launch_pack_kernel(kernel::pack_value_gemv<HeadDim, Rows, Engine>, blocks, shape, stream, source, a);
}

/// As launch_sequence_value_gemv, for packs that take_pack_kernels, with the same workspace.
template <int HeadDim, warp::copy_engine Engine = warp::copy_engine::best>
status launch_pack_value_gemv(const warp::pack_source& source, const input_view<4>& weights, std::int64_t kv_heads,
                              const output_view<4>& out, const exec& e) {
  policy::decode_grid grid;
  kernel::sequence_args a;
  if (const status s = make_sequence_args(weights, out, kv_heads, source.coded_tokens(), e, a, grid); !s) return s;
  if (grid.units == 0) return {};
  if (const status s = check_grid<HeadDim>(grid, e); !s) return s;
  if constexpr (HeadDim <= 128)
    if (policy::pack_value_rows(weights.extent[1] / kv_heads, HeadDim) == 4)
      return launch_pack_value_rows<HeadDim, 4, Engine>(source, grid.splits, a, e.stream);
  return launch_pack_value_rows<HeadDim, 2, Engine>(source, grid.splits, a, e.stream);
}

template <int KeyDim, int ValueDim, int Rows, warp::copy_engine Engine>
status launch_pack_attention_rows(const warp::pack_source& keys, const warp::pack_source& values,
                                  std::int32_t most_splits, kernel::sequence_args a, const output_view<3>& lse,
                                  cudaStream_t stream) {
  using own_type = kernel::pack_attention_warp<KeyDim, ValueDim, Rows, Engine>;
  constexpr policy::pack_shape shape = own_type::shape();
  // Parts have 8 floats more than channels, the general kernel's rows 2.
  const std::int64_t most = min_of<std::int64_t>(
      max_of<std::int64_t>(std::int64_t{most_splits} * (ValueDim + 2) / (ValueDim + 8), 1), block::max_parts);
  std::int64_t blocks = 0;
  if (const status s = make_pack_grid(Rows, shape, most, a, blocks); !s) return s;
  return launch_pack_kernel(kernel::pack_attention<KeyDim, ValueDim, Rows, Engine>, blocks, shape, stream, keys, values,
                            a, lse);
}

/// As launch_sequence_attention without sinks, recent tokens and a window, for packs that take_pack_kernels on both
/// sides, with the same workspace.
template <int KeyDim, int ValueDim, warp::copy_engine Engine = warp::copy_engine::best>
status launch_pack_attention(const warp::pack_source& keys, const warp::pack_source& values,
                             const input_view<4>& queries, std::int64_t kv_heads, float scale,
                             const output_view<4>& out, const output_view<3>& lse, const exec& e) {
  policy::decode_grid grid;
  kernel::sequence_args a;
  if (const status s = make_sequence_args(queries, out, kv_heads, warp::tokens_of(keys), e, a, grid); !s) return s;
  if (grid.units == 0) return {};
  if (const status s = check_grid<ValueDim>(grid, e); !s) return s;
  a.scale = scale;
  if constexpr (ValueDim <= 128)
    if (policy::pack_value_rows(queries.extent[1] / kv_heads * queries.extent[2], ValueDim) == 4)
      return launch_pack_attention_rows<KeyDim, ValueDim, 4, Engine>(keys, values, grid.splits, a, lse, e.stream);
  return launch_pack_attention_rows<KeyDim, ValueDim, 2, Engine>(keys, values, grid.splits, a, lse, e.stream);
}

}  // namespace packkv::detail
