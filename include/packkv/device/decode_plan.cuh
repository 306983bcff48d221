// SPDX-License-Identifier: Apache-2.0
// How decode_attention would share a call among blocks, worked out on the host where lengths are known: to look at, to
// print, to choose `splits` by. One idea: the same arithmetic as the kernel's, block after block.
//   decode_plan plan;   status s = packkv::plan_decode<format>(queries, query_start_loc, cache, options, plan);
//   std::fputs(packkv::describe(plan).c_str(), stdout);
#pragma once

#include <packkv/device/decode_attention.cuh>
#include <string>
#include <vector>

namespace packkv {

/// What one block does of one unit: a sequence, a KV head and up to decode_plan::query_rows query rows of it.
struct decode_share {
  std::int32_t launch, block;
  std::int32_t sequence, kv_head;
  std::int32_t first_row;             ///< of the sequence's rows for that head: query token * group + head in the group
  std::int32_t first_tile, end_tile;  ///< tiles of 64 tokens of the sequence; none if they are equal
  bool raw;                           ///< it has the unit's 16-bit tokens, and ends the unit
};

/// Which block of which launch of a call does what.
struct decode_plan {
  int query_rows = 0;               ///< of a pass over the cache: 4, 8 or 16
  policy::fused_block_shape shape;  ///< of a block
  std::int64_t blocks = 0;          ///< of a launch
  std::int32_t launches = 0;
  std::uint32_t report = 0;          ///< report_... of lengths that the kernel would report
  std::vector<decode_share> shares;  ///< in the order of launches, blocks and what a block does first
};

namespace detail {

/// Appends what the blocks of a launch do.
template <int Rows>
void plan_launch(const block::decode_call& call, std::int32_t first, std::int32_t sequences, std::int64_t rows,
                 std::int32_t raw_items, decode_plan& plan) {
  std::vector<block::decode_sequence> known;
  std::vector<std::int32_t> begin{0};
  block::unit_totals all = block::unit_totals::none();
  for (std::int32_t b = 0; b < sequences; ++b) {
    known.emplace_back(call, first + b, Rows, plan.report);
    all.add(known.back().cost(call, raw_items));
  }
  const auto blocks = static_cast<std::int32_t>(plan.blocks);
  const block::single_split single =
      single_split_of<Rows>(sequences, call.cache.pages.kv_heads, rows, blocks, raw_items);
  if (single.exists()) {
    const block::decode_sequence& s = known[0];
    for (std::int32_t block = 0; block < blocks && s.chunks > 0; ++block) {
      const block::single_split::part p = single.part_of(block, s.chunks * call.cache.pages.kv_heads, s.tiles);
      if (p.lo < p.hi || p.tail)
        plan.shares.push_back({plan.launches, block, first, p.unit / s.chunks, p.unit % s.chunks * Rows,
                               s.first_tile + p.lo, s.first_tile + p.hi, p.tail});
    }
    ++plan.launches;
    return;
  }
  const block::unit_alignment units = block::align_units(all, blocks);
  for (const block::decode_sequence& s : known) {
    const block::sequence_cost cost = s.cost(call, raw_items);
    begin.push_back(begin.back() + cost.units * units.items_of(cost));
  }
  const block::even_shares shares = units.shares(begin.back(), blocks);
  std::size_t index = 0;
  for (std::int32_t block = 0; block < shares.blocks(); ++block) {
    const std::int32_t end = shares.begin(block + 1);
    for (std::int32_t item = shares.begin(block); item < end;) {
      while (begin[index + 1] <= item) ++index;
      const block::decode_sequence& s = known[index];
      const std::int32_t items = units.items_of(s.cost(call, raw_items));
      const std::int32_t number = (item - begin[index]) / items, unit_begin = begin[index] + number * items;
      const std::int32_t lo = min_of(item - unit_begin, s.tiles), hi = min_of(end - unit_begin, s.tiles);
      const bool tail = unit_begin + items <= end;
      if (lo < hi || tail)
        plan.shares.push_back({plan.launches, block, first + static_cast<std::int32_t>(index), number / s.chunks,
                               number % s.chunks * Rows, s.first_tile + lo, s.first_tile + hi, tail});
      item = unit_begin + items;
    }
  }
  ++plan.launches;
}

template <class Format, int Rows>
status plan_launches(const block::decode_call& call, std::int64_t rows, int shared_kib, decode_plan& plan) {
  const cache_view& cache = call.cache;
  const std::int32_t raw_items = raw_items_of(cache, call.options);
  const std::int32_t most = sequences_per_launch<Rows>(cache, rows, raw_items);
  if (most == 0) return too_much_work();
  plan.query_rows = Rows;
  const checked units = fused_units<Rows>(cache.batch, cache.pages.kv_heads, rows);
  plan.shape = kernel::fused_shape<Format, Rows>(shared_kib, policy::fused_blocks_per_sm(units));
  plan.blocks = fused_blocks(plan.shape, units, call.options.splits);
  for (std::int32_t first = 0; first < cache.batch; first += most)
    plan_launch<Rows>(call, first, min_of(most, cache.batch - first), rows, raw_items, plan);
  return {};
}

}  // namespace detail

/// Plans a call of decode_attention on the host. Format's codes are known at compile time (cache_format of
/// key_codec or grouped_key_codec and value_codec or grouped_value_codec). \param queries, query_start_loc, cache,
/// options as decode_attention takes them, but all arrays of lengths, positions and rows (query_start_loc, seq_lens,
/// kv_begin, ring.row, context_lens) are host memory. Tables, pages, queries, sinks and ring are not read: their
/// extents count. \param shared_kib of an SM of the GPU that is planned for: 228 (sm_90, sm_100), 164 (sm_80) or 100
/// (sm_86, 89, 120). \return not ok for negative or inconsistent extents, or what decode_attention refuses for its
/// size; `plan` is then empty.
template <class Format>
status plan_decode(const input_view<3>& queries, const std::int32_t* query_start_loc, const cache_view& cache,
                   const attention_options& options, decode_plan& plan, int shared_kib = 228) {
  static_assert(is_fused<Format>,
                "calls are planned for cache_formats whose K and V have codes: plans or groups known at compile time");
  plan = {};
  if (query_start_loc == nullptr) return refuse(status_code::invalid_argument, "query_start_loc must not be null");
  if (cache.batch < 0 || cache.max_seq_len < 0 || cache.max_seq_len > detail::max_count - 2 * tile_tokens ||
      cache.pages.kv_heads <= 0 || queries.extent[1] <= 0 || queries.extent[1] > detail::max_count ||
      queries.extent[1] % cache.pages.kv_heads != 0 || options.max_query_len <= 0 || options.splits < 0 ||
      options.position_stride <= 0)
    return refuse(status_code::invalid_argument, "batch, lengths, heads, splits or position stride out of range");
  block::decode_call call{};
  call.cache = cache;
  call.queries = queries;
  call.query_start_loc = query_start_loc;
  call.options = options;
  call.group = static_cast<std::int32_t>(queries.extent[1] / cache.pages.kv_heads);
  const checked rows = checked(call.group) * options.max_query_len;
  if (!rows.valid() || rows.value() > detail::max_count) return detail::too_much_work();
  status s;
  switch (detail::fitting_decode_rows<Format>(policy::fused_rows(rows.value()), shared_kib)) {
    case 4:
      s = detail::plan_launches<Format, 4>(call, rows.value(), shared_kib, plan);
      break;
    case 8:
      s = detail::plan_launches<Format, 8>(call, rows.value(), shared_kib, plan);
      break;
    case 16:
      s = detail::plan_launches<Format, 16>(call, rows.value(), shared_kib, plan);
      break;
    default:
      s = detail::no_decode_fits();
  }
  if (!s) plan = {};
  return s;
}

/// A line for the shape of the blocks, one for how even the shares are, then one for each share.
inline std::string describe(const decode_plan& plan) {
  std::string text = std::to_string(plan.launches) + " launches of " + std::to_string(plan.blocks) + " blocks of " +
                     std::to_string(plan.shape.warps) + " warps, " + std::to_string(plan.shape.stages) +
                     " tiles in flight each, " + std::to_string(plan.shape.shared_bytes) + " bytes of shared memory, " +
                     std::to_string(plan.query_rows) + " query rows a pass\n";
  std::int64_t tiles = 0, most = 0, of_block = 0, busy = 0;
  for (std::size_t i = 0; i < plan.shares.size(); ++i) {
    const decode_share& s = plan.shares[i];
    const bool first = i == 0 || plan.shares[i - 1].block != s.block || plan.shares[i - 1].launch != s.launch;
    of_block = (first ? 0 : of_block) + s.end_tile - s.first_tile;
    busy += first ? 1 : 0;
    tiles += s.end_tile - s.first_tile;
    most = max_of(most, of_block);
  }
  text += std::to_string(tiles) + " tiles in " + std::to_string(plan.shares.size()) + " shares of " +
          std::to_string(busy) + " blocks, " + std::to_string(most) + " tiles at most\n";
  for (const decode_share& s : plan.shares)
    text += "launch " + std::to_string(s.launch) + " block " + std::to_string(s.block) + ": sequence " +
            std::to_string(s.sequence) + ", KV head " + std::to_string(s.kv_head) + ", rows from " +
            std::to_string(s.first_row) + ", tiles " + std::to_string(s.first_tile) + " to " +
            std::to_string(s.end_tile) + (s.raw ? ", 16-bit tokens and end\n" : "\n");
  return text;
}

}  // namespace packkv
