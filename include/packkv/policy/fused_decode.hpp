// SPDX-License-Identifier: Apache-2.0
// Tuning of the fused decode kernel: rows, warps and stages of a block, and how many blocks share the work.
#pragma once

#include <cstdint>
#include <packkv/codec/pages.hpp>
#include <packkv/core/checked.hpp>
#include <packkv/policy/machine.hpp>

namespace packkv::policy {

/// How a block of the fused decode kernel is built. Printable.
struct fused_block_shape {
  int warps = 8;
  int stages = 2;         ///< tiles in flight or in use, of each warp; 0: no block fits
  int blocks_per_sm = 2;  ///< that fit, by shared memory and registers
  int warp_bytes = 0;     ///< of a warp's tiles, which later hold its results
  int raw_warps = 1;      ///< that attend to 16-bit tokens while others have tiles, each with room for its results
  int shared_bytes = 0;   ///< dynamic

  PACKKV_HOST_DEVICE constexpr bool fits() const { return stages > 0; }
};

/// Bytes that an SM should have under way or in use. More made decode slower (H100, 2026-11-25, 2.12 bits, batch 8 x
/// 128k tokens: 136 KiB 0.222 ms, 204 KiB 0.231 ms).
inline constexpr int bytes_in_flight = 128 * 1024;

/// Sinks and a ring of 64 tokens are 5 chunks of 16 or, with several query tokens, 6: one for each of these warps.
inline constexpr int most_raw_warps = 6;
/// Tiles that a warp leaves to the others for each chunk of 16-bit tokens that it attends to.
inline constexpr int raw_chunk_tiles = 3;

/// Where 128 registers a thread are enough, an SM holds 16 warps, in one block or in two.
PACKKV_HOST_DEVICE constexpr bool fused_blocks_are_paired(int rows, int value_dim) {
  return rows <= 8 && value_dim <= 128;
}
/// Blocks of an SM, for a launch of so many units (sequence, KV head, rows of a pass). An SM favours the older of two
/// blocks, so that the younger one ends late (H200, 2026-11-28, batch 8 x 128k tokens: after 133 and 166 us), while the
/// warps of one block end together; but where blocks have many units, one of two streams while the other begins or
/// ends a unit.
constexpr int fused_blocks_per_sm(checked units) { return units.valid() && units.value() <= 132 ? 1 : 2; }

/// Shape for tiles of K and V of `stage_bytes` together, `rows` query rows per pass, a block that needs `fixed_bytes`
/// of shared memory beside the ring, SMs that have `shared_kib`, and 1 or 2 blocks an SM, if they may be paired.
PACKKV_HOST_DEVICE constexpr fused_block_shape make_fused_shape(int stage_bytes, int rows, int value_dim,
                                                                int fixed_bytes, int shared_kib, int blocks_per_sm) {
  fused_block_shape s;
  const int part_bytes = rows * (value_dim + 8) * 4;  // a warp's results take the place of its tiles
  const bool paired = fused_blocks_are_paired(rows, value_dim);
  s.blocks_per_sm = paired ? blocks_per_sm : 1;
  s.warps = paired && blocks_per_sm == 1 ? 16 : 8;
  int room = 0;  // beside the joined parts of codes and of 16-bit tokens
  for (;; s.warps = s.blocks_per_sm > 1 ? s.warps : s.warps / 2, s.blocks_per_sm = 1) {
    room = shared_kib * 1024 / s.blocks_per_sm - shared_bytes_per_block - fixed_bytes - 2 * part_bytes;
    const int wanted = ceil_div(bytes_in_flight, s.warps * s.blocks_per_sm * stage_bytes);
    s.stages = min_of(min_of(max_of(wanted, 2), 4), room / (s.warps * stage_bytes));
    const bool enough = s.stages >= 2 || (s.stages == 1 && s.warps <= 4);
    const bool fits = enough && s.warps * part_bytes <= room;
    if (!fits && s.warps == 1) s.stages = 0;
    if (fits || s.warps == 1) break;
  }
  s.warp_bytes = max_of(s.stages * stage_bytes, part_bytes);
  const int parts = min_of(max_of(room - s.warps * s.warp_bytes, 0) / part_bytes, min_of(most_raw_warps, s.warps));
  s.raw_warps = max_of(parts, 1);
  s.shared_bytes = s.warps * s.warp_bytes + (2 + (parts > 1 ? parts : 0)) * part_bytes;  // one needs no join
  return s;
}

/// Blocks of a launch when the caller leaves it to us: all that an H200's 132 SMs hold at once.
PACKKV_HOST_DEVICE constexpr std::int64_t fused_blocks(const fused_block_shape& s) { return 132 * s.blocks_per_sm; }

/// What the 16-bit tokens of a unit cost, in tiles.
PACKKV_HOST_DEVICE constexpr std::int32_t raw_cost(std::int64_t raw_tokens) {
  return raw_tokens == 0 ? 0 : static_cast<std::int32_t>(14 + min_of<std::int64_t>(raw_tokens, 1 << 20) / 8);
}
/// Query rows of one pass over the cache: 4, 8 or 16 of those of a KV head.
constexpr int fused_rows(std::int64_t rows) { return rows <= 4 ? 4 : rows <= 8 ? 8 : 16; }

}  // namespace packkv::policy
