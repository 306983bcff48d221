// SPDX-License-Identifier: Apache-2.0
// Device-wide attention over a compressed cache, and its workspace. Definition: reference/attention.hpp.
//   std::size_t bytes = packkv::decode_workspace_bytes<format>({tokens, query_heads, batch, kv_heads, 1, max_seq_len});
//   status s = packkv::decode_attention(queries, query_start_loc, cache, params, out, lse, options, exec{stream, ws,
//   bytes});
#pragma once

#include <packkv/codec/checks.hpp>
#include <packkv/device/exec.cuh>
#include <packkv/kernel/decode_attention.cuh>

namespace packkv {

/// Upper bounds that an engine knows when it allocates; a workspace made for them serves every smaller call.
struct decode_maxima {
  std::int64_t batch = 0;
  std::int64_t kv_heads = 0;
  std::int64_t query_heads = 0;
  std::int64_t max_query_len = 1;
  std::int64_t max_seq_len = 0;
  std::int32_t splits = 0;  ///< attention_options::splits
};

namespace detail {

/// Bytes of partial rows behind the counters; 0 when a unit is one block.
template <int ValueDim>
checked split_bytes(const policy::decode_grid& grid) {
  if (grid.splits == 1) return 0;
  return checked(grid.units) * grid.splits * block::split_merge<ValueDim, policy::decode_rows>::floats_per_split * 4 +
         workspace_counter_bytes;
}

template <int ValueDim>
status check_grid(const policy::decode_grid& grid, const exec& e) {
  if (!(checked(grid.units) * grid.splits).valid() || (checked(grid.units) * grid.splits).value() > max_count)
    return refuse(status_code::overflow, "more than 2^31 - 1 blocks: cut the call into smaller batches");
  if (grid.splits > 1 && grid.units > workspace_counters)
    return refuse(status_code::unsupported, "splits > 1 for more than 65536 (sequence, KV head, row chunk) units");
  return check_workspace(e, split_bytes<ValueDim>(grid));
}

inline block::split_storage split_storage_of(const exec& e, const policy::decode_grid& grid) {
  if (grid.splits == 1) return {nullptr, nullptr};
  auto* base = static_cast<std::uint8_t*>(e.workspace);
  return {reinterpret_cast<std::uint32_t*>(base), reinterpret_cast<float*>(base + workspace_counter_bytes)};
}

/// Largest split bytes over all calls within the maxima: fewer units may mean more splits.
template <int ValueDim>
checked workspace_bound(std::int64_t batch, std::int64_t kv_heads, std::int64_t rows, std::int64_t max_seq_len,
                        std::int32_t splits) {
  const auto grid = policy::make_decode_grid(batch, kv_heads, rows, max_seq_len, splits);
  checked units = checked(batch) * kv_heads * grid.chunks;
  if (!units.valid()) return units;
  // units * ceil(target / units) < target + units, and never more than units * tiles.
  const checked blocks = splits > 0 ? units * splits : units + policy::decode_blocks;
  return blocks * block::split_merge<ValueDim, policy::decode_rows>::floats_per_split * 4 + workspace_counter_bytes;
}

}  // namespace detail

/// Workspace of decode_attention for every call within the maxima. A pure function; -1 if the maxima are
/// negative, inconsistent or overflow.
template <class Format>
std::int64_t decode_workspace_bytes(const decode_maxima& m) {
  if (m.batch < 0 || m.kv_heads <= 0 || m.query_heads < m.kv_heads || m.query_heads % m.kv_heads != 0 ||
      m.max_query_len <= 0 || m.max_seq_len < 0 || m.splits < 0)
    return -1;
  const checked rows = checked(m.query_heads / m.kv_heads) * m.max_query_len;
  if (!rows.valid()) return -1;
  const checked bytes =
      detail::workspace_bound<Format::value_head_dim>(m.batch, m.kv_heads, rows.value(), m.max_seq_len, m.splits);
  return bytes.valid() ? bytes.value() : -1;
}

/// out = softmax(scale * q.K^T + mask) V over the coded tiles, sinks and ring of a cache, in stream order.
/// \param queries device memory [tokens, query_heads, D_k], float16 or bfloat16; the tokens of sequence b are
///        query_start_loc[b] .. query_start_loc[b+1]-1 (device int32 [batch + 1]; 0 tokens = padding). Query i of n
///        stands at position length - n + i and, if causal, sees positions up to its own.
/// \param out [tokens, query_heads, D_v], dtype of the queries or float32. A query that sees nothing gets 0.
/// \param lse float32 [tokens, query_heads] or a null view: log-sum-exp in options.base; -inf where nothing is seen.
/// \param e workspace of decode_workspace_bytes(maxima), initialised once.
/// Grid and workspace depend on maxima only; lengths and page ids are read on the device. Bad page ids leave their
/// tokens out; bad lengths are clamped, bad query ranges skipped; all three are reported in exec::report. Results
/// repeat bit for bit for the same number of splits.
/// \return not ok, with nothing launched, for what the host can see to be wrong.
template <class Format>
status decode_attention(const input_view<3>& queries, const std::int32_t* query_start_loc, const cache_view& cache,
                        const parameters<Format>& params, const output_view<3>& out, const output_view<2>& lse,
                        const attention_options& options, const exec& e) {
  if (const status s = detail::check_decode(queries, query_start_loc, cache, params, out, lse, options); !s) return s;
  if (cache.batch == 0 || queries.extent[0] == 0) return {};
  kernel::decode_args args{};
  args.group = static_cast<std::int32_t>(queries.extent[1] / cache.pages.kv_heads);
  const checked rows = checked(args.group) * options.max_query_len;
  const auto grid =
      policy::make_decode_grid(cache.batch, cache.pages.kv_heads, rows.value(), cache.max_seq_len, options.splits);
  if (const status s = detail::check_grid<Format::value_head_dim>(grid, e); !s) return s;
  args.key_spec = params.format.key();
  args.value_spec = params.format.value();
  args.key = params.key;
  args.value = params.value;
  args.cache = cache;
  args.queries = queries;
  args.query_start_loc = query_start_loc;
  args.out = out;
  args.lse = lse;
  args.options = options;
  args.storage = detail::split_storage_of(e, grid);
  args.report = e.report;
  args.splits = grid.splits;
  args.chunks = grid.chunks;
  return detail::launch(kernel::decode_attention<Format::key_head_dim, Format::value_head_dim>,
                        detail::grid_for(grid.units * grid.splits), policy::decode_warps * 32, e.stream, args);
}

}  // namespace packkv
