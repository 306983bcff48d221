// SPDX-License-Identifier: Apache-2.0
// Tuning of the decode and GEMV kernels: how rows, warps and splits are chosen. Plain constants and one aggregate.
#pragma once

#include <cstdint>
#include <packkv/codec/strips.hpp>
#include <packkv/core/checked.hpp>

namespace packkv::policy {

inline constexpr int decode_warps = 4;  ///< warps of a block; each finishes one row, so as many rows as warps
inline constexpr int decode_rows = 4;   ///< query rows (query token x query head of one KV head) of a block
/// Blocks to aim for when a call leaves `splits` to us: eight for each of an H200's 132 SMs.
/// Not tuned: this version's kernels are bound by instructions, not by memory.
inline constexpr std::int64_t decode_blocks = 1056;
inline constexpr std::int64_t min_tiles_per_split = 4;  ///< one tile for each warp

/// How a decode call is cut into blocks. Printable, and a pure function of maxima that the host knows.
struct decode_grid {
  std::int64_t chunks = 0;  ///< row chunks of one (sequence, KV head)
  std::int64_t units = 0;   ///< sequences x KV heads x chunks: blocks that have a result of their own
  std::int32_t splits = 1;  ///< blocks that share a unit
};

/// `rows` = maximum of query tokens per sequence x query heads per KV head. Products are checked by the caller.
inline decode_grid make_decode_grid(std::int64_t batch, std::int64_t kv_heads, std::int64_t rows,
                                    std::int64_t max_seq_len, std::int32_t splits) {
  decode_grid grid;
  grid.chunks = ceil_div<std::int64_t>(rows, decode_rows);
  grid.units = (checked(batch) * kv_heads * grid.chunks).value();
  if (splits > 0) {
    grid.splits = splits;
  } else if (grid.units > 0) {
    const std::int64_t tiles = ceil_div<std::int64_t>(max_seq_len, tile_tokens);
    const std::int64_t wanted = ceil_div<std::int64_t>(decode_blocks, grid.units);
    grid.splits = static_cast<std::int32_t>(max_of<std::int64_t>(1, min_of(wanted, tiles / min_tiles_per_split)));
  }
  return grid;
}

}  // namespace packkv::policy
