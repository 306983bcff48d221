// SPDX-License-Identifier: Apache-2.0
// Tuning of the GEMV kernels with matrix instructions: warps and stages of a block, and how many blocks share the work.
// One idea: tiles under way, times their bytes, must cover the latency of the memory; registers decide the rest.
//   constexpr auto shape = make_gemv_shape(tile_bytes, part_bytes, fixed_bytes, key_gemv_registers(rows), 228, 2);
#pragma once

#include <packkv/policy/fused_decode.hpp>

namespace packkv::policy {

/// How a block of a GEMV kernel is built. Printable.
struct gemv_block_shape {
  int warps = 8;
  int stages = 2;         ///< tiles in flight or in use, of each warp; 0: no block fits
  int blocks_per_sm = 2;  ///< that fit, by shared memory and registers
  int warp_bytes = 0;     ///< of a warp's ring, which later holds its part of the sums
  int shared_bytes = 0;   ///< dynamic

  PACKKV_HOST_DEVICE constexpr bool fits() const { return stages > 0; }
};

/// Registers that a thread of a GEMV kernel may use: 16 warps in 1 or 2 blocks, 12 in one, or 8 in one fit an SM then.
enum class gemv_registers { few = 128, more = 168, all = 255 };

/// What the kernels need (nvcc 12, sm_90a; measured over plans of all head dims).
PACKKV_HOST_DEVICE constexpr gemv_registers key_gemv_registers(int rows) {
  return rows == 4 ? gemv_registers::few : rows == 8 ? gemv_registers::more : gemv_registers::all;
}
/// The same for the value kernel.
PACKKV_HOST_DEVICE constexpr gemv_registers value_gemv_registers(int rows, int head_dim) {
  if (rows <= 4 && head_dim <= (rows == 1 ? 256 : 128)) return gemv_registers::few;
  return (rows == 8 && head_dim <= 128) || (rows == 4 && head_dim <= 256) ? gemv_registers::more : gemv_registers::all;
}
/// Query heads of a KV head that one pass takes: 4, 8 or 16. Sums of 16 rows of 512 channels are more than all
/// registers.
PACKKV_HOST_DEVICE constexpr int key_gemv_rows(std::int64_t group) { return group <= 4 ? 4 : group <= 8 ? 8 : 16; }
/// The same for the value kernel, which takes one query head of a plan alone, too.
PACKKV_HOST_DEVICE constexpr int value_gemv_rows(std::int64_t group, int head_dim) {
  return min_of(key_gemv_rows(group), head_dim > 256 ? 8 : 16);
}

/// Shape for tiles of `tile_bytes`, parts of sums of `part_bytes` (none: 0), a block that needs `fixed_bytes` of shared
/// memory beside them, SMs that have `shared_kib`, and 1 or 2 blocks an SM, where there is a choice.
PACKKV_HOST_DEVICE constexpr gemv_block_shape make_gemv_shape(int tile_bytes, int part_bytes, int fixed_bytes,
                                                              gemv_registers registers, int shared_kib,
                                                              int blocks_per_sm) {
  gemv_block_shape s;
  const bool few = registers == gemv_registers::few;
  s.blocks_per_sm = few ? blocks_per_sm : 1;
  s.warps = few && blocks_per_sm == 1 ? 16 : registers == gemv_registers::more ? 12 : 8;
  for (;;) {
    const int room = shared_kib * 1024 / s.blocks_per_sm - shared_bytes_per_block - fixed_bytes - part_bytes;
    const int wanted = ceil_div(bytes_in_flight, s.warps * s.blocks_per_sm * tile_bytes);
    s.stages = min_of(min_of(max_of(wanted, 2), 8), room / (s.warps * tile_bytes));
    const bool enough = s.stages >= 2 || (s.stages == 1 && s.warps <= 4);
    const bool fits = enough && s.warps * part_bytes <= room;
    if (!fits && s.warps == 1) s.stages = 0;
    if (fits || s.warps == 1) break;
    if (s.blocks_per_sm > 1)
      s.blocks_per_sm = 1;
    else
      s.warps /= 2;
  }
  s.warp_bytes = max_of(s.stages * tile_bytes, part_bytes);
  s.shared_bytes = s.warps * s.warp_bytes + part_bytes;
  return s;
}

/// Blocks of a launch when the caller leaves it to us: all that an H200's 132 SMs hold at once.
PACKKV_HOST_DEVICE constexpr std::int64_t gemv_blocks(const gemv_block_shape& s) { return 132 * s.blocks_per_sm; }

}  // namespace packkv::policy
