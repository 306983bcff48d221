// SPDX-License-Identifier: Apache-2.0
// How many warps the kernels of warp::tile_encoder have.
#pragma once

#include <cstdint>
#include <packkv/core/checked.hpp>

namespace packkv::policy {

inline constexpr int encoder_warps = 4;   ///< of a block, each with tiles of its own
inline constexpr int encoder_blocks = 4;  ///< of an SM: 128 registers a thread
/// Of a warp that codes, at least that many if there are enough: the doubtful tokens of several are coded together.
/// 8 x 32k tokens in milliseconds (H200, 2026-12-01; two_bit, four_bit, two_bit untransformed): 4 tiles 0.409, 0.431,
/// 0.338; 8 0.404, 0.434, 0.340; 16, which make one wave of blocks, 0.398, 0.427, 0.336.
inline constexpr int encoder_tiles = 16;

/// Warps of a block of fused_decompress, each with tiles of its own in so much shared memory: a block fits into the 99
/// KiB that the smallest GPUs have for one.
PACKKV_HOST_DEVICE constexpr int decoder_warps(int warp_bytes) { return 4 * warp_bytes <= 99 << 10 ? 4 : 2; }
/// Of a warp, at least that many if there are enough: one is reconstructed while the next arrives. 8 x 32k tokens of
/// two_bit in milliseconds (H200, 2026-11-30): 1 tile 0.369, 2 0.334, 4 0.337, as many as make one wave of blocks
/// 0.355.
inline constexpr int decoder_tiles = 2;
/// Blocks of an SM, of which each thread has this many channels (168 registers for 128), with as much shared memory.
PACKKV_HOST_DEVICE constexpr int decoder_blocks(int channels, int shared_bytes) {
  constexpr int of_sm = 227 << 10, of_system = 1 << 10;  // bytes of shared memory; of a block
  return min_of(channels > 64 ? 3 : 5, of_sm / (shared_bytes + of_system));
}

/// Blocks of a launch, of so many warps each with at least `each` tiles, if there are enough; of which an SM of an H200
/// holds `blocks`.
PACKKV_HOST_DEVICE constexpr std::int64_t coder_grid(std::int64_t tiles, int warps, int blocks, int each) {
  return min_of(ceil_div<std::int64_t>(tiles, warps),
                max_of<std::int64_t>(132 * blocks, ceil_div<std::int64_t>(tiles, each * warps)));
}
/// The same of fused_decompress. More than the GPU holds at once are so many more that the last ones, half of what the
/// GPU holds, have one tile for each warp, and end one soon after another. Milliseconds of two_bit, one sequence of
/// 128k and 8 x 32k (H200, 2026-12-01): without 0.1739, 0.3333; a quarter of the GPU's blocks more 0.1675, 0.3277; half
/// 0.1674, 0.3291; all 0.1699, 0.3304.
PACKKV_HOST_DEVICE constexpr std::int64_t decoder_grid(std::int64_t tiles, int warps, int blocks) {
  const std::int64_t even = coder_grid(tiles, warps, blocks, decoder_tiles);
  return even <= 132 * blocks ? even : min_of(ceil_div<std::int64_t>(tiles, warps), even + 132 / 4 * blocks);
}

}  // namespace packkv::policy
