// SPDX-License-Identifier: Apache-2.0
// Device-wide key_gemv, value_gemv and merge_states. Definitions: reference/attention.hpp.
#pragma once

#include <packkv/device/decode_attention.cuh>
#include <packkv/kernel/fused_gemv.cuh>
#include <packkv/kernel/gemv.cuh>

namespace packkv {

namespace detail {

template <class Format>
kernel::gemv_args make_gemv_args(const cache_view& cache, const input_view<3>& in, const output_view<3>& out,
                                 const policy::decode_grid& grid, const exec& e) {
  kernel::gemv_args args{};
  args.cache = cache;
  args.in = in;
  args.out = out;
  args.scale = 1.0f;
  args.storage = split_storage_of(e, grid);
  args.report = e.report;
  args.group = static_cast<std::int32_t>(in.extent[1] / cache.pages.kv_heads);
  args.splits = grid.splits;
  args.chunks = grid.chunks;
  return args;
}

/// Whether the value kernel takes a query head alone, if it is the only one of a KV head.
template <class Codec>
inline constexpr bool value_row_alone = Codec::spec().kind == codec_kind::plan;
/// Whether the value kernel has 1 or 2 blocks an SM where it has the choice: few units are joined from many blocks.
template <int Rows>
int value_gemv_blocks_per_sm(std::int64_t batch, std::int64_t kv_heads, std::int64_t group) {
  return policy::fused_blocks_per_sm(fused_units<Rows>(batch, kv_heads, group));
}
/// Blocks of a launch of the value kernel over `batch` sequences.
template <class Format, int Rows>
std::int64_t value_gemv_blocks(std::int64_t batch, std::int64_t kv_heads, std::int64_t group, std::int32_t splits,
                               int shared_kib, int blocks_per_sm) {
  const auto shape = kernel::value_gemv_shape<typename Format::value_codec_type, Rows>(shared_kib, blocks_per_sm);
  if (!shape.fits()) return 0;
  if (splits == 0) return policy::gemv_blocks(shape);
  return split_blocks(checked(batch) * kv_heads * ceil_div<std::int64_t>(group, Rows), splits);
}
template <class Format, int Rows>
checked value_gemv_bytes(std::int64_t blocks) {
  return checked(blocks) * 2 * (block::sum_merge<Format::value_head_dim, Rows, 1>::part_floats * 4) +
         workspace_counter_bytes;
}

/// Whatever GPU it is, and for every call within these maxima: fewer units may have the other shape of blocks.
template <class Format>
checked value_gemv_bound(std::int64_t batch, std::int64_t kv_heads, std::int64_t group, std::int32_t splits) {
  const int rows = policy::value_gemv_rows(group, Format::value_head_dim);
  const std::int64_t at_once = min_of<std::int64_t>(batch, block::max_split_sequences);
  std::int64_t most = 0;
  const auto count = [&](auto rows_of_pass) {
    constexpr int pass = decltype(rows_of_pass)::value;
    for (const int kib : policy::shared_kib_choices)
      for (const int blocks_per_sm : {1, value_gemv_blocks_per_sm<pass>(batch, kv_heads, group)})
        most = max_of(most, value_gemv_bytes<Format, pass>(
                                value_gemv_blocks<Format, pass>(at_once, kv_heads, group, splits, kib, blocks_per_sm))
                                .value());
  };
  if constexpr (value_row_alone<typename Format::value_codec_type>) count(std::integral_constant<int, 1>{});
  count(std::integral_constant<int, 4>{});
  if (rows > 4) count(std::integral_constant<int, 8>{});
  if constexpr (policy::value_gemv_rows(16, Format::value_head_dim) == 16)
    if (rows > 8) count(std::integral_constant<int, 16>{});
  return most;
}

/// Calls launch(args) for each part of the batch that one launch of `blocks` blocks takes.
template <int Rows, class Launch>
status for_each_launch(kernel::fused_gemv_args args, std::int64_t blocks, Launch&& launch_part) {
  const cache_view& cache = args.call.cache;
  const std::int32_t most = sequences_per_launch<Rows>(cache, args.call.group, 0);
  if (most == 0) return too_much_work();
  for (std::int32_t first = 0; first < cache.batch; first += most) {
    args.call.first_sequence = first;
    args.call.sequences = min_of(most, cache.batch - first);
    args.call.unit_blocks = block::single_unit_blocks(
        args.call.sequences == 1 ? fused_units<Rows>(1, cache.pages.kv_heads, args.call.group).value() : 0, blocks);
    if (const status s = launch_part(args); !s) return s;
  }
  return {};
}

template <class Format, int Rows, warp::copy_engine Engine, int SharedKib>
status launch_key_gemv(const kernel::fused_gemv_args& all, int shared_kib, const exec& e) {
  const auto shape = kernel::key_gemv_shape<typename Format::key_codec_type, Rows>(shared_kib);
  const std::int64_t blocks = policy::gemv_blocks(shape);
  return for_each_launch<Rows>(all, blocks, [&](const kernel::fused_gemv_args& args) {
    return launch(kernel::fused_key_gemv<typename Format::key_codec_type, Rows, Engine, SharedKib>, grid_for(blocks),
                  block_size(shape.warps * warp_threads, shape.shared_bytes, shared_kib == 228), e.stream, args);
  });
}
template <class Format, int Rows, warp::copy_engine Engine, int SharedKib, int BlocksPerSm>
status launch_value_gemv(const kernel::fused_gemv_args& all, int shared_kib, const exec& e, std::int64_t blocks) {
  using codec = typename Format::value_codec_type;
  const auto shape = kernel::value_gemv_shape<codec, Rows>(shared_kib, BlocksPerSm);
  return for_each_launch<Rows>(all, blocks, [&](const kernel::fused_gemv_args& args) {
    return launch(kernel::fused_value_gemv<codec, Rows, Engine, SharedKib, BlocksPerSm>, grid_for(blocks),
                  block_size(shape.warps * warp_threads, shape.shared_bytes, shared_kib == 228), e.stream, args);
  });
}
template <class Format, int Rows, warp::copy_engine Engine, int SharedKib>
status launch_value_gemv(kernel::fused_gemv_args all, int shared_kib, const exec& e, std::int32_t splits) {
  const std::int64_t batch = min_of<std::int64_t>(all.call.cache.batch, block::max_split_sequences);
  const std::int32_t kv_heads = all.call.cache.pages.kv_heads, group = all.call.group;
  const int blocks_per_sm = value_gemv_blocks_per_sm<Rows>(batch, kv_heads, group);
  const std::int64_t blocks =
      value_gemv_blocks<Format, Rows>(batch, kv_heads, group, splits, shared_kib, blocks_per_sm);
  if (const status s = check_workspace(e, value_gemv_bytes<Format, Rows>(blocks)); !s) return s;
  all.counters = static_cast<std::uint32_t*>(e.workspace);
  all.parts = reinterpret_cast<float*>(static_cast<std::uint8_t*>(e.workspace) + workspace_counter_bytes);
  constexpr bool choice = policy::value_gemv_registers(Rows, Format::value_head_dim) == policy::gemv_registers::few;
  if constexpr (choice)
    if (blocks_per_sm == 2) return launch_value_gemv<Format, Rows, Engine, SharedKib, 2>(all, shared_kib, e, blocks);
  return launch_value_gemv<Format, Rows, Engine, SharedKib, 1>(all, shared_kib, e, blocks);
}

inline status no_gemv_fits() {
  return refuse(status_code::unsupported, "no block of the GEMV kernel fits into the shared memory of this GPU");
}

/// SharedKib: of an SM, 0: what the code that runs was compiled for.
template <class Format, warp::copy_engine Engine, int SharedKib>
status launch_key_gemv(const kernel::fused_gemv_args& args, const exec& e) {
  using codec = typename Format::key_codec_type;
  int kib = SharedKib;
  if constexpr (SharedKib == 0)
    if (const status s = compiled_shared_kib(kernel::fused_key_gemv<codec, 4, Engine, 0>, kib); !s) return s;
  switch (fitting_rows(policy::key_gemv_rows(args.call.group), kib, kernel::key_gemv_shape<codec, 4>,
                       kernel::key_gemv_shape<codec, 8>, kernel::key_gemv_shape<codec, 16>)) {
    case 4:
      return launch_key_gemv<Format, 4, Engine, SharedKib>(args, kib, e);
    case 8:
      return launch_key_gemv<Format, 8, Engine, SharedKib>(args, kib, e);
    case 16:
      return launch_key_gemv<Format, 16, Engine, SharedKib>(args, kib, e);
    default:
      return no_gemv_fits();
  }
}
template <class Format, warp::copy_engine Engine, int SharedKib>
status launch_value_gemv(const kernel::fused_gemv_args& args, const exec& e, std::int32_t splits) {
  using codec = typename Format::value_codec_type;
  constexpr int most = policy::value_gemv_rows(16, Format::value_head_dim);
  int kib = SharedKib;
  if constexpr (SharedKib == 0)
    if (const status s = compiled_shared_kib(kernel::fused_value_gemv<codec, 4, Engine, 0, 1>, kib); !s) return s;
  const auto shape_of = [](auto rows) {
    return [](int shared_kib) { return kernel::value_gemv_shape<codec, decltype(rows)::value>(shared_kib, 1); };
  };
  if constexpr (value_row_alone<codec>)
    if (args.call.group == 1 && kernel::value_gemv_shape<codec, 1>(kib, 1).fits())
      return launch_value_gemv<Format, 1, Engine, SharedKib>(args, kib, e, splits);
  switch (fitting_rows(policy::value_gemv_rows(args.call.group, Format::value_head_dim), kib,
                       shape_of(std::integral_constant<int, 4>{}), shape_of(std::integral_constant<int, 8>{}),
                       shape_of(std::integral_constant<int, most>{}))) {
    case 4:
      return launch_value_gemv<Format, 4, Engine, SharedKib>(args, kib, e, splits);
    case 8:
      return launch_value_gemv<Format, 8, Engine, SharedKib>(args, kib, e, splits);
    case 16:
      return launch_value_gemv<Format, most, Engine, SharedKib>(args, kib, e, splits);
    default:
      return no_gemv_fits();
  }
}

/// Arguments of the kernels for static formats.
inline status make_fused_gemv_args(const cache_view& cache, const input_view<3>& in, const output_view<3>& out,
                                   const side_parameters& parameters, float scale, const exec& e,
                                   kernel::fused_gemv_args& args) {
  if (in.extent[1] > max_count) return refuse(status_code::overflow, "more than 2^31 - 1 query heads");
  args.call.cache = cache;
  args.call.tiles_per_page = divisor(cache.pages.tiles_per_page);
  args.call.in = in;
  args.call.out = out;
  args.call.group = static_cast<std::int32_t>(in.extent[1] / cache.pages.kv_heads);
  args.call.report = e.report;
  args.parameters = parameters;
  args.scale = scale;
  args.settled_cache = e.settled_cache;
  return {};
}

}  // namespace detail

/// scores[b, h, t] = scale * q[b, h, :] . k^[b, t, :] for t < seq_lens[b], in stream order.
/// \param queries device memory [batch, query_heads, D_k], any dtype; scores [batch, query_heads, max_seq_len], any
/// dtype. Scores at t >= seq_lens[b] are left as they were, tokens without a page give -inf. The cache has no sinks and
/// no ring. Uses no workspace.
/// \remark Formats whose codes are known at compile time have a kernel with matrix instructions, for up to 16 query
/// heads per KV head in one pass over the cache. Of plans it rounds q times the column scales to 16 bits, the unit
/// being 1 / 32512 of the largest of a query (docs/numerics.md, rule 1); of grouped keys q times a range is two halves.
/// A query that is not finite gives NaN. Scores of 16 bits are stored in pairs where rows lie in aligned 32-bit words.
template <class Format>
status key_gemv(const input_view<3>& queries, const cache_view& cache, const parameters<Format>& params, float scale,
                const output_view<3>& scores, const exec& e) {
  if (const status s = detail::check_gemv(cache, params, queries, scores, Format::key_head_dim, cache.max_seq_len); !s)
    return s;
  if (cache.batch == 0 || cache.max_seq_len == 0) return {};
  if constexpr (is_fused<Format>) {
    kernel::fused_gemv_args args{};
    if (const status s = detail::make_fused_gemv_args(cache, queries, scores, params.key, scale, e, args); !s) return s;
    return detail::launch_key_gemv<Format, warp::copy_engine::best, 0>(args, e);
  } else {
    const std::int64_t group = queries.extent[1] / cache.pages.kv_heads;
    const auto grid = policy::make_decode_grid(cache.batch, cache.pages.kv_heads, group, cache.max_seq_len, 0);
    if (grid.units == 0 || !(checked(grid.units) * grid.splits).valid() || grid.units * grid.splits > detail::max_count)
      return refuse(status_code::overflow, "more than 2^31 - 1 blocks: cut the call into smaller batches");
    kernel::gemv_args args = detail::make_gemv_args<Format>(cache, queries, scores, grid, exec{});
    args.spec = params.format.key();
    args.parameters = params.key;
    args.scale = scale;
    args.report = e.report;
    return detail::launch(kernel::key_gemv<Format::key_head_dim>, detail::grid_for(grid.units * grid.splits),
                          policy::decode_warps * 32, e.stream, args);
  }
}

/// Bytes of workspace of value_gemv for every call within the maxima (max_query_len does not count), whichever kernel
/// the format has. A pure function; -1 as decode_workspace_bytes.
template <class Format>
std::int64_t value_gemv_workspace_bytes(const decode_maxima& m) {
  if (m.batch < 0 || m.kv_heads <= 0 || m.query_heads < m.kv_heads || m.query_heads % m.kv_heads != 0 ||
      m.max_seq_len < 0 || m.splits < 0)
    return -1;
  const std::int64_t group = m.query_heads / m.kv_heads;
  checked bytes = 0;
  if constexpr (is_fused<Format>)
    bytes = detail::value_gemv_bound<Format>(m.batch, m.kv_heads, group, m.splits);
  else
    bytes = detail::workspace_bound<Format::value_head_dim>(m.batch, m.kv_heads, group, m.max_seq_len, m.splits);
  return bytes.valid() ? bytes.value() : -1;
}

/// out[b, h, :] = sum over t < seq_lens[b] of weights[b, h, t] * v^[b, t, :], in stream order.
/// \param weights device memory [batch, query_heads, max_seq_len], any dtype; out [batch, query_heads, D_v], any dtype.
/// Tokens without a page count as 0, and so do tokens of weight 0 whatever they hold. The cache has no sinks and no
/// ring. \param splits blocks that share a sequence and KV head; 0: chosen from maxima. Results repeat bit for bit for
/// the same number of splits. \param e workspace of value_gemv_workspace_bytes(maxima), initialised once. \remark
/// Formats whose codes are known at compile time have a kernel with matrix instructions, for up to 16 query heads per
/// KV head in one pass over the cache (8 for D_v = 512). Weights may have any size and sign: each weight times row
/// scale (grouped values: times half a range) is rounded to a half relative to a power of two of its row, so that it is
/// off by at most 2^-11 of itself or 2^-22 of the largest of its row so far, whichever is more; sums are float32,
/// before the inverse transform. A weight that is not finite makes its row not finite.
template <class Format>
status value_gemv(const input_view<3>& weights, const cache_view& cache, const parameters<Format>& params,
                  const output_view<3>& out, const exec& e, std::int32_t splits = 0) {
  if (const status s = detail::check_gemv(cache, params, weights, out, cache.max_seq_len, Format::value_head_dim); !s)
    return s;
  if (splits < 0 || splits > 4096) return refuse(status_code::invalid_argument, "splits must be 0..4096");
  if (cache.batch == 0) return {};
  if constexpr (is_fused<Format>) {
    kernel::fused_gemv_args args{};
    if (const status s = detail::make_fused_gemv_args(cache, weights, out, params.value, 1.0f, e, args); !s) return s;
    return detail::launch_value_gemv<Format, warp::copy_engine::best, 0>(args, e, splits);
  } else {
    const std::int64_t group = weights.extent[1] / cache.pages.kv_heads;
    const auto grid = policy::make_decode_grid(cache.batch, cache.pages.kv_heads, group, cache.max_seq_len, splits);
    if (const status s = detail::check_grid<Format::value_head_dim>(grid, e); !s) return s;
    kernel::gemv_args args = detail::make_gemv_args<Format>(cache, weights, out, grid, e);
    args.spec = params.format.value();
    args.parameters = params.value;
    return detail::launch(kernel::value_gemv<Format::value_head_dim>, detail::grid_for(grid.units * grid.splits),
                          policy::decode_warps * 32, e.stream, args);
  }
}

/// Merges n attention results over disjoint tokens into one, in stream order.
/// \param outs device memory [n, tokens, heads, D], lses float32 [n, tokens, heads] in `base`; a state with lse -inf is
/// ignored. \param out [tokens, heads, D], lse float32 [tokens, heads] or a null view. All states empty: 0 and -inf.
/// Uses no workspace.
inline status merge_states(const input_view<4>& outs, const input_view<3>& lses, const output_view<3>& out,
                           const output_view<2>& lse, lse_base base, const exec& e) {
  if (const status s = detail::check_merge(outs, lses, out, lse, base); !s) return s;
  const std::int64_t items = out.extent[0] * out.extent[1];
  if (items == 0) return {};
  return detail::launch(kernel::merge_states<kernel::merge_threads>, detail::grid_for(items), kernel::merge_threads,
                        e.stream, kernel::merge_args{outs, lses, out, lse, base});
}

}  // namespace packkv
