// SPDX-License-Identifier: Apache-2.0
// How many warps the kernels of warp::tile_encoder have.
#pragma once

#include <cstdint>
#include <packkv/core/checked.hpp>

namespace packkv::policy {

inline constexpr int encoder_warps = 4;   ///< of a block, each with tiles of its own
inline constexpr int encoder_blocks = 4;  ///< of an SM: 128 registers a thread

inline constexpr int decoder_warps = 4;  ///< of a block of fused_decompress

/// Blocks of a launch that codes: all that an H200's 132 SMs hold at once, if there are as many.
PACKKV_HOST_DEVICE constexpr std::int64_t encoder_grid(std::int64_t tiles) {
  return min_of<std::int64_t>(ceil_div<std::int64_t>(tiles, encoder_warps), 132 * encoder_blocks);
}

}  // namespace packkv::policy
