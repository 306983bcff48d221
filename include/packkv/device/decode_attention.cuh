// SPDX-License-Identifier: Apache-2.0
// Device-wide attention over a compressed cache, and its workspace. Definition: reference/attention.hpp.
//   std::size_t bytes = packkv::decode_workspace_bytes<format>({tokens, query_heads, batch, kv_heads, 1, max_seq_len});
//   status s = packkv::decode_attention(queries, query_start_loc, cache, params, out, lse, options, exec{stream, ws,
//   bytes});
#pragma once

#include <packkv/codec/checks.hpp>
#include <packkv/device/exec.cuh>
#include <packkv/kernel/decode_attention.cuh>
#include <packkv/kernel/fused_decode.cuh>

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

/// Whether decode_attention, key_gemv and value_gemv of a format are the fused kernels, with matrix instructions on its
/// codes. They are where K and V have codes that are known at compile time; everything else, every runtime_format too,
/// takes general kernels, which are slower. Whoever must have the fast ones says
/// static_assert(packkv::is_fused<Format>), or asks a format_family.
template <class Format, class = void>
inline constexpr bool is_fused = false;
template <class Format>
inline constexpr bool is_fused<Format, std::void_t<typename Format::key_codec_type>> =
    Format::key().has_codes() && Format::value().has_codes();

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
  if (grid.splits == 1 || e.workspace == nullptr) return {nullptr, nullptr};
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

template <class Format, int Rows>
inline constexpr std::int64_t fused_part_bytes =
    std::int64_t{3} * block::part_merge<Format::value_head_dim, Rows, 1>::part_floats * 4;

/// Most query rows of a pass, from `rows` (16, 8 or 4) down, for which a block fits into the shared memory; 0: for
/// none. Shapes are functions of the KiB of an SM.
template <class Shape4, class Shape8, class Shape16>
constexpr int fitting_rows(int rows, int shared_kib, Shape4 four, Shape8 eight, Shape16 sixteen) {
  if (rows == 16 && sixteen(shared_kib).fits()) return 16;
  if (rows >= 8 && eight(shared_kib).fits()) return 8;
  return four(shared_kib).fits() ? 4 : 0;
}

/// The same for the decode kernel.
template <class Format>
constexpr int fitting_decode_rows(int rows, int shared_kib) {
  return fitting_rows(
      rows, shared_kib, [](int kib) { return kernel::fused_shape<Format, 4>(kib, 1); },
      [](int kib) { return kernel::fused_shape<Format, 8>(kib, 1); },
      [](int kib) { return kernel::fused_shape<Format, 16>(kib, 1); });
}

/// Units of a launch over at most `batch` sequences with at most `rows` query rows per KV head.
template <int Rows>
checked fused_units(std::int64_t batch, std::int64_t kv_heads, std::int64_t rows) {
  return checked(min_of<std::int64_t>(batch, block::max_split_sequences)) * kv_heads *
         ceil_div<std::int64_t>(rows, Rows);
}
/// Blocks of a launch whose caller asks for `splits` > 0 a unit.
inline std::int64_t split_blocks(checked units, std::int32_t splits) {
  const checked wanted = units * splits;
  return wanted.valid() ? max_of<std::int64_t>(1, min_of<std::int64_t>(wanted.value(), block::max_parts))
                        : block::max_parts;
}
/// Blocks of a launch.
inline std::int64_t fused_blocks(const policy::fused_block_shape& shape, checked units, std::int32_t splits) {
  if (!shape.fits()) return 0;
  return splits == 0 ? policy::fused_blocks(shape) : split_blocks(units, splits);
}

/// What the 16-bit tokens of a unit cost, in tiles.
inline std::int32_t raw_items_of(const cache_view& cache, const attention_options& options) {
  const bool sinks = cache.sinks.keys.data != nullptr, ring = cache.ring.keys.data != nullptr;
  return policy::raw_cost((sinks ? cache.sinks.keys.extent[2] : 0) +
                          (ring ? std::int64_t{cache.ring.window} + options.max_query_len : 0));
}
/// Of `rows` query rows (GEMV: query heads) per KV head. 0: not even one.
template <int Rows>
std::int32_t sequences_per_launch(const cache_view& cache, std::int64_t rows, std::int32_t raw_items) {
  return block::max_launch_sequences(ceil_div<std::int64_t>(rows, Rows) * cache.pages.kv_heads,
                                     ceil_div<std::int64_t>(cache.max_seq_len, tile_tokens), raw_items);
}
/// How a launch is shared that has one sequence with at most `rows` query rows per KV head, if it may be a
/// single_split.
template <int Rows>
block::single_split single_split_of(std::int32_t sequences, std::int32_t kv_heads, std::int64_t rows,
                                    std::int64_t blocks, std::int32_t raw_items) {
  const checked units = checked(ceil_div<std::int64_t>(rows, Rows)) * kv_heads;
  const bool few = sequences == 1 && units.valid() && units.value() <= blocks;
  return {few ? static_cast<std::int32_t>(units.value()) : 0, static_cast<std::int32_t>(blocks), raw_items};
}
inline status too_much_work() {
  return refuse(status_code::overflow,
                "2^31 or more units of work of a sequence: max_seq_len x KV heads x query rows or heads");
}
inline status no_decode_fits() {
  return refuse(status_code::unsupported, "no block of the decode kernel fits into the shared memory of this GPU");
}

template <class Format, int Rows, warp::copy_engine Engine, int SharedKib, int BlocksPerSm, class Variant>
status launch_fused(kernel::fused_args args, std::int64_t rows, int shared_kib, const exec& e, const Variant& variant) {
  const cache_view& cache = args.call.cache;
  const attention_options& options = args.call.options;
  args.raw_items = raw_items_of(cache, options);
  const std::int32_t most = sequences_per_launch<Rows>(cache, rows, args.raw_items);
  if (most == 0) return too_much_work();
  const auto shape = kernel::fused_shape<Format, Rows>(shared_kib, BlocksPerSm);
  const std::int64_t blocks =
      fused_blocks(shape, fused_units<Rows>(cache.batch, cache.pages.kv_heads, rows), options.splits);
  if (const status s = check_workspace(e, checked(blocks) * fused_part_bytes<Format, Rows> + workspace_counter_bytes);
      !s)
    return s;
  args.counters = static_cast<std::uint32_t*>(e.workspace);
  args.parts = reinterpret_cast<float*>(static_cast<std::uint8_t*>(e.workspace) + workspace_counter_bytes);
  const bool early = shared_kib == 228;  // as of sm_90
  for (std::int32_t first = 0; first < cache.batch; first += most) {
    args.first_sequence = first;
    args.sequences = min_of(most, cache.batch - first);
    args.single = single_split_of<Rows>(args.sequences, cache.pages.kv_heads, rows, blocks, args.raw_items);
    const status s =
        launch(kernel::fused_decode<Format, Rows, Engine, Variant, SharedKib, BlocksPerSm>, grid_for(blocks),
               block_size(shape.warps * warp_threads, shape.shared_bytes, early), e.stream, args, variant);
    if (!s) return s;
  }
  return {};
}

/// KiB of shared memory of an SM of the architecture for which the code of a kernel was compiled that runs here.
template <class... Parameter>
status compiled_shared_kib(void (*kernel)(Parameter...), int& shared_kib) {
  int architecture = 0;
  const status s = compiled_architecture(kernel, architecture);
  if (s) shared_kib = policy::shared_kib_of(architecture);
  return s;
}

/// With as many blocks an SM as the number of units asks for.
template <class Format, int Rows, warp::copy_engine Engine, int SharedKib, class Variant>
status launch_fused_rows(const kernel::fused_args& args, std::int64_t rows, int shared_kib, const exec& e,
                         const Variant& variant) {
  if constexpr (policy::fused_blocks_are_paired(Rows, Format::value_head_dim)) {
    const checked units = fused_units<Rows>(args.call.cache.batch, args.call.cache.pages.kv_heads, rows);
    if (policy::fused_blocks_per_sm(units) == 2)
      return launch_fused<Format, Rows, Engine, SharedKib, 2>(args, rows, shared_kib, e, variant);
  }
  return launch_fused<Format, Rows, Engine, SharedKib, 1>(args, rows, shared_kib, e, variant);
}

/// SharedKib: of an SM, 0: what the code that runs was compiled for.
template <class Format, warp::copy_engine Engine, int SharedKib, class Variant>
status launch_fused(const kernel::fused_args& args, const exec& e, const Variant& variant) {
  const std::int64_t rows = std::int64_t{args.call.group} * args.call.options.max_query_len;
  if (rows > max_count) return too_much_work();
  int kib = SharedKib;
  if constexpr (SharedKib == 0)
    if (const status s = compiled_shared_kib(kernel::fused_decode<Format, 4, Engine, Variant, 0, 1>, kib); !s) return s;
  switch (fitting_decode_rows<Format>(policy::fused_rows(rows), kib)) {
    case 4:
      return launch_fused_rows<Format, 4, Engine, SharedKib>(args, rows, kib, e, variant);
    case 8:
      return launch_fused_rows<Format, 8, Engine, SharedKib>(args, rows, kib, e, variant);
    case 16:
      return launch_fused_rows<Format, 16, Engine, SharedKib>(args, rows, kib, e, variant);
    default:
      return no_decode_fits();
  }
}

/// Whatever GPU it is.
template <class Format>
checked fused_workspace_bound(std::int64_t batch, std::int64_t kv_heads, std::int64_t rows, std::int32_t splits) {
  std::int64_t most = 0;
  const auto count = [&](auto rows_of_pass, int kib, int blocks_per_sm) {
    constexpr int pass = decltype(rows_of_pass)::value;
    most = max_of(most, fused_blocks(kernel::fused_shape<Format, pass>(kib, blocks_per_sm),
                                     fused_units<pass>(batch, kv_heads, rows), splits) *
                            fused_part_bytes<Format, pass>);
  };
  const auto count_both = [&](auto rows_of_pass) {
    constexpr int pass = decltype(rows_of_pass)::value;
    const int blocks_per_sm = policy::fused_blocks_per_sm(fused_units<pass>(batch, kv_heads, rows));
    for (const int kib : policy::shared_kib_choices) {
      count(rows_of_pass, kib, 1);
      count(rows_of_pass, kib, blocks_per_sm);
    }
  };
  count_both(std::integral_constant<int, 4>{});
  if (rows > 4) count_both(std::integral_constant<int, 8>{});
  if (rows > 8) count_both(std::integral_constant<int, 16>{});
  return checked(most) + workspace_counter_bytes;
}

/// decode_attention for formats whose codes are known at compile time.
template <class Format, warp::copy_engine Engine, int SharedKib, class Variant>
status decode_fused(const input_view<3>& queries, const std::int32_t* query_start_loc, const cache_view& cache,
                    const parameters<Format>& params, const output_view<3>& out, const output_view<2>& lse,
                    const attention_options& options, const Variant& variant, const exec& e) {
  if (const status s = check_decode(queries, query_start_loc, cache, params, out, lse, options); !s) return s;
  if (cache.batch == 0 || queries.extent[0] == 0) return {};
  kernel::fused_args args{};
  args.call = {cache,
               queries,
               query_start_loc,
               out,
               lse,
               options,
               static_cast<std::int32_t>(queries.extent[1] / cache.pages.kv_heads)};
  args.key = params.key;
  args.value = params.value;
  args.report = e.report;
  args.settled_cache = e.settled_cache;
  return launch_fused<Format, Engine, SharedKib>(args, e, variant);
}

/// decode_attention for formats whose plans are run-time data, and for the 16-bit and FP8 formats.
template <class Format>
status decode_simply(const input_view<3>& queries, const std::int32_t* query_start_loc, const cache_view& cache,
                     const parameters<Format>& params, const output_view<3>& out, const output_view<2>& lse,
                     const attention_options& options, const exec& e) {
  if (const status s = check_decode(queries, query_start_loc, cache, params, out, lse, options); !s) return s;
  if (cache.batch == 0 || queries.extent[0] == 0) return {};
  kernel::decode_args args{};
  args.group = static_cast<std::int32_t>(queries.extent[1] / cache.pages.kv_heads);
  const checked rows = checked(args.group) * options.max_query_len;
  const auto grid =
      policy::make_decode_grid(cache.batch, cache.pages.kv_heads, rows.value(), cache.max_seq_len, options.splits);
  if (const status s = check_grid<Format::value_head_dim>(grid, e); !s) return s;
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
  args.storage = split_storage_of(e, grid);
  args.report = e.report;
  args.splits = grid.splits;
  args.chunks = grid.chunks;
  return launch(kernel::decode_attention<Format::key_head_dim, Format::value_head_dim>,
                grid_for(grid.units * grid.splits), policy::decode_warps * 32, e.stream, args);
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
  if constexpr (is_fused<Format>) {
    const checked bytes = detail::fused_workspace_bound<Format>(m.batch, m.kv_heads, rows.value(), m.splits);
    return bytes.valid() ? bytes.value() : -1;
  } else {
    const checked bytes =
        detail::workspace_bound<Format::value_head_dim>(m.batch, m.kv_heads, rows.value(), m.max_seq_len, m.splits);
    return bytes.valid() ? bytes.value() : -1;
  }
}

/// decode_attention with scores that the caller changes: a bias by position, a mask of one's own.
/// \param variant trivially copyable; what it must have, block::plain_scores shows. It sees every score that is not
/// masked out already, once, as softmax_scale * q . k before the soft cap, and may return -inf to leave the token out.
/// Positions are those of the sequence, which permuting formats would not keep: plan formats do. The format's plans are
/// known at compile time (cache_format of key_codec and value_codec).
template <class Format, class Variant>
status decode_attention(const input_view<3>& queries, const std::int32_t* query_start_loc, const cache_view& cache,
                        const parameters<Format>& params, const output_view<3>& out, const output_view<2>& lse,
                        const attention_options& options, const Variant& variant, const exec& e) {
  static_assert(is_fused<Format>,
                "score variants need a cache_format whose K and V have codes: plans or groups known at compile time");
  static_assert(std::is_trivially_copyable_v<Variant>, "a variant is a kernel argument");
  return detail::decode_fused<Format, warp::copy_engine::best, 0>(queries, query_start_loc, cache, params, out, lse,
                                                                  options, variant, e);
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
/// repeat bit for bit for the same number of splits. \remark A format whose codes are known at compile time takes the
/// fused kernel: its blocks share all tiles evenly, `splits` times as many as there are sequences x KV heads x row
/// chunks. Its blocks are shaped for the shared memory of the architecture: sm_90 and sm_100 take up to 16 query rows
/// of a KV head in one pass over the cache; where a block of so many does not fit, as for D_v = 512 on sm_86, passes
/// have 8 or 4. On sm_90 and later it is launched with programmatic stream serialization: it may begin while the kernel
/// before it in the stream ends, and waits for that kernel's end before it reads anything, or with exec::settled_cache
/// before it reads queries and 16-bit tokens. \return not ok, with nothing
/// launched, for what the host can see to be wrong; cuda_error if the launch is refused.
template <class Format>
status decode_attention(const input_view<3>& queries, const std::int32_t* query_start_loc, const cache_view& cache,
                        const parameters<Format>& params, const output_view<3>& out, const output_view<2>& lse,
                        const attention_options& options, const exec& e) {
  if constexpr (is_fused<Format>)
    return decode_attention(queries, query_start_loc, cache, params, out, lse, options, block::plain_scores{}, e);
  else
    return detail::decode_simply(queries, query_start_loc, cache, params, out, lse, options, e);
}

}  // namespace packkv
