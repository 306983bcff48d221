// SPDX-License-Identifier: Apache-2.0
// CUDA's shuffles, votes and reductions, and what they give. Kernels of tests: each writes 12 results a thread.
#pragma once

#include <cstdint>
#include <packkv/detail/cuda.cuh>

namespace packkv_test {

// -------------------------------------------------------------------------------------------------------------- shuffles
template <int Results>
__global__ void shuffle_all(int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int x = 100 * lane;
  int* mine = out + Results * threadIdx.x;
  mine[0] = __shfl_sync(0xffffffffu, x, 5);
  mine[1] = __shfl_sync(0xffffffffu, x, (lane + 1) % 32);
  mine[2] = __shfl_sync(0xffffffffu, x, lane + 35);        // the source is taken modulo 32
  mine[3] = __shfl_sync(0xffffffffu, x, 3, 8);             // lane 3 of each group of eight
  mine[4] = __shfl_up_sync(0xffffffffu, x, 1);
  mine[5] = __shfl_up_sync(0xffffffffu, x, 3, 8);
  mine[6] = __shfl_down_sync(0xffffffffu, x, 2);
  mine[7] = __shfl_down_sync(0xffffffffu, x, 5, 16);
  mine[8] = __shfl_xor_sync(0xffffffffu, x, 16);
  mine[9] = __shfl_xor_sync(0xffffffffu, x, 12, 8);        // beyond the group: groups above keep what they have
  mine[10] = static_cast<int>(__shfl_sync(0xffffffffu, static_cast<double>(x) + 0.25, 31) * 4);
  mine[11] = __shfl_sync(0xffffffffu, static_cast<std::int8_t>(-lane), 7);
}

inline int expected_shuffle(int which, int lane) {
  const auto x = [](int l) { return 100 * l; };
  switch (which) {
    case 0: return x(5);
    case 1: return x((lane + 1) % 32);
    case 2: return x((lane + 3) % 32);
    case 3: return x(lane / 8 * 8 + 3);
    case 4: return x(lane >= 1 ? lane - 1 : lane);
    case 5: return x(lane % 8 >= 3 ? lane - 3 : lane);
    case 6: return x(lane + 2 < 32 ? lane + 2 : lane);
    case 7: return x(lane % 16 + 5 < 16 ? lane + 5 : lane);
    case 8: return x(lane ^ 16);
    case 9: return x((lane ^ 12) <= (lane | 7) ? lane ^ 12 : lane);
    case 10: return x(31) * 4 + 1;
    default: return -7;
  }
}

// ---------------------------------------------------------------------------------------------------- votes and reductions
template <int Results>
__global__ void vote_all(unsigned* out) {
  const int lane = static_cast<int>(threadIdx.x);
  unsigned* mine = out + Results * lane;
  mine[0] = __ballot_sync(0xffffffffu, lane % 3 == 0);
  mine[1] = static_cast<unsigned>(__any_sync(0xffffffffu, lane == 17));
  mine[2] = static_cast<unsigned>(__any_sync(0xffffffffu, 0));
  mine[3] = static_cast<unsigned>(__all_sync(0xffffffffu, lane < 32));
  mine[4] = static_cast<unsigned>(__all_sync(0xffffffffu, lane != 3));
  mine[5] = __reduce_add_sync(0xffffffffu, static_cast<unsigned>(lane));
  mine[6] = static_cast<unsigned>(__reduce_max_sync(0xffffffffu, lane - 40));
  mine[7] = static_cast<unsigned>(__reduce_min_sync(0xffffffffu, lane - 20));
  mine[8] = __reduce_or_sync(0xffffffffu, 1u << lane);
  mine[9] = __match_any_sync(0xffffffffu, lane / 4);
  // Each half of the warp on its own, from different source lines.
  if (lane < 16) mine[10] = __ballot_sync(0x0000ffffu, lane % 2);
  else mine[10] = __ballot_sync(0xffff0000u, lane % 2);
  // And again the whole, so that one half may be ahead of the other.
  mine[11] = __shfl_sync(0xffffffffu, mine[10], 31 - lane);
}

inline unsigned expected_vote(int which, unsigned lane) {
  switch (which) {
    case 0: return 0x49249249u;
    case 1: return 1;
    case 2: return 0;
    case 3: return 1;
    case 4: return 0;
    case 5: return 496;
    case 6: return static_cast<unsigned>(-9);
    case 7: return static_cast<unsigned>(-20);
    case 8: return 0xffffffffu;
    case 9: return 0xfu << (lane / 4 * 4);
    case 10: return lane < 16 ? 0x0000aaaau : 0xaaaa0000u;
    default: return 31 - lane < 16 ? 0x0000aaaau : 0xaaaa0000u;
  }
}

}  // namespace packkv_test
