// SPDX-License-Identifier: Apache-2.0
// Tuning of the kernels that unpack packs of 16 tokens: warps of a block, and how many blocks share a unit.
//   constexpr auto shape = make_pack_shape(warp_bytes, fixed_bytes, 16);   int splits = pack_splits(units, tiles,
//   shape, most);
#pragma once

#include <cstdint>
#include <packkv/core/checked.hpp>

namespace packkv::policy {

/// How a block is built. Printable.
struct pack_shape {
  int warps = 8;
  int blocks_per_sm = 2;  ///< that fit an SM of 228 KiB; the registers are limited to what that many need
  int shared_bytes = 0;   ///< dynamic
};

/// Shared memory that a block may have on any SM (one of 100 KiB).
inline constexpr int most_block_bytes = 99 * 1024;

/// For warps that need `warp_bytes` of shared memory each, blocks that need `fixed_bytes` beside them, and at most
/// `of_sm` warps of an SM: 16 leave a thread 128 registers, 12 leave 168, 8 all.
PACKKV_HOST_DEVICE constexpr pack_shape make_pack_shape(int warp_bytes, int fixed_bytes, int of_sm) {
  pack_shape s;
  s.warps = of_sm == 12 ? 4 : 8;
  while (s.warps * warp_bytes > most_block_bytes - fixed_bytes) s.warps /= 2;
  s.blocks_per_sm = of_sm / s.warps;
  while (s.blocks_per_sm * (s.warps * warp_bytes + fixed_bytes + 1024) > 228 * 1024) --s.blocks_per_sm;
  s.shared_bytes = s.warps * warp_bytes;
  return s;
}

/// Query rows of a KV head that one pass takes: 2 or 4; two where the sums of so many channels need the registers.
PACKKV_HOST_DEVICE constexpr int pack_key_rows(std::int64_t rows) { return rows <= 2 ? 2 : 4; }
/// The same of value_gemv.
PACKKV_HOST_DEVICE constexpr int pack_value_rows(std::int64_t rows, int head_dim) {
  return rows <= 2 || head_dim > 128 ? 2 : 4;
}

/// Blocks that share each of `units` units of `tiles` tiles, at most `most`: the fewest of those that end first on an
/// H200, where a block begins and ends in the time of about two tiles of a warp.
inline std::int32_t pack_splits(std::int64_t units, std::int64_t tiles, const pack_shape& s, std::int64_t most) {
  const std::int64_t slots = 132 * s.blocks_per_sm, limit = min_of(most, ceil_div<std::int64_t>(2 * slots, units));
  std::int64_t best = 1, least = 0;
  for (std::int64_t splits = 1; splits <= limit; ++splits) {
    const std::int64_t rounds = ceil_div<std::int64_t>(ceil_div(tiles, splits), s.warps);
    const std::int64_t cost = ceil_div(units * splits, slots) * (rounds + 2);
    if (splits > 1 && cost >= least) continue;
    best = splits;
    least = cost;
  }
  return static_cast<std::int32_t>(best);
}

}  // namespace packkv::policy
