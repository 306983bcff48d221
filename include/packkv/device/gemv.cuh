// SPDX-License-Identifier: Apache-2.0
// Device-wide key_gemv, value_gemv and merge_states. Definitions: reference/attention.hpp.
#pragma once

#include <packkv/device/decode_attention.cuh>
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

}  // namespace detail

/// scores[b, h, t] = scale * q[b, h, :] . k^[b, t, :] for t < seq_lens[b], in stream order.
/// \param queries device memory [batch, query_heads, D_k], any dtype; scores [batch, query_heads, max_seq_len], any
/// dtype. Scores at t >= seq_lens[b] are left as they were, tokens without a page give -inf. The cache has no sinks and
/// no ring. Uses no workspace.
template <class Format>
status key_gemv(const input_view<3>& queries, const cache_view& cache, const parameters<Format>& params, float scale,
                const output_view<3>& scores, const exec& e) {
  if (const status s = detail::check_gemv(cache, params, queries, scores, Format::key_head_dim, cache.max_seq_len); !s)
    return s;
  if (cache.batch == 0 || cache.max_seq_len == 0) return {};
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

/// Workspace of value_gemv for every call within the maxima (max_query_len does not count). -1 as
/// decode_workspace_bytes.
template <class Format>
std::int64_t value_gemv_workspace_bytes(decode_maxima m) {
  m.max_query_len = 1;
  return decode_workspace_bytes<Format>(m);
}

/// out[b, h, :] = sum over t < seq_lens[b] of weights[b, h, t] * v^[b, t, :], in stream order.
/// \param weights device memory [batch, query_heads, max_seq_len], any dtype; out [batch, query_heads, D_v], any dtype.
/// Tokens without a page count as 0, and so do tokens of weight 0 whatever they hold. The cache has no sinks and no
/// ring. \param splits blocks that share a sequence and KV head; 0: chosen from maxima. \param e workspace of
/// value_gemv_workspace_bytes(maxima), initialised once.
template <class Format>
status value_gemv(const input_view<3>& weights, const cache_view& cache, const parameters<Format>& params,
                  const output_view<3>& out, const exec& e, std::int32_t splits = 0) {
  if (const status s = detail::check_gemv(cache, params, weights, out, cache.max_seq_len, Format::value_head_dim); !s)
    return s;
  if (splits < 0 || splits > 4096) return refuse(status_code::invalid_argument, "splits must be 0..4096");
  if (cache.batch == 0) return {};
  const std::int64_t group = weights.extent[1] / cache.pages.kv_heads;
  const auto grid = policy::make_decode_grid(cache.batch, cache.pages.kv_heads, group, cache.max_seq_len, splits);
  if (const status s = detail::check_grid<Format::value_head_dim>(grid, e); !s) return s;
  kernel::gemv_args args = detail::make_gemv_args<Format>(cache, weights, out, grid, e);
  args.spec = params.format.value();
  args.parameters = params.value;
  return detail::launch(kernel::value_gemv<Format::value_head_dim>, detail::grid_for(grid.units * grid.splits),
                        policy::decode_warps * 32, e.stream, args);
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
