// SPDX-License-Identifier: Apache-2.0
// Who of the blocks that share a unit of work comes last, and joins what the others have left in global memory.
//   if (!last_to_arrive(counter, others, storage.last)) return;
#pragma once

#include <packkv/detail/cuda.cuh>

namespace packkv::block {

/// Asks whether the block is the last; a barrier must follow before `last` is read. See last_to_arrive.
__device__ inline void ask_for_last(std::uint32_t* counter, unsigned others, bool& last) {
  __syncthreads();
  if (threadIdx.x == 0) last = detail::arrive(counter, others) == others;
}

/// True in the last of others + 1 blocks that come here for the same counter (0 before and after), which then sees what
/// the others have written. All threads take part; `last` lies in shared memory.
__device__ inline bool last_to_arrive(std::uint32_t* counter, unsigned others, bool& last) {
  ask_for_last(counter, others, last);
  __syncthreads();
  return last;
}

}  // namespace packkv::block
