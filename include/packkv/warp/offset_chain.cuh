// SPDX-License-Identifier: Apache-2.0
// Where an item of unknown size begins behind those before it, in one pass: each block tells its size, then its end.
// One idea: the words that hold the final offsets carry the messages until then, so no workspace is needed.
//   warp::tell_size(number, bytes, entry);   ..   const std::int64_t begin = warp::find_begin(number, bytes, entry);
#pragma once

#include <packkv/detail/packed_bytes.cuh>

namespace packkv::warp {

/// entry(i): a word of item i, 0 before the launch: minus the item's size (> 0) once that is told, and its end in the
/// end. The earlier an item's size is told, the less others wait. All lanes take part.
template <class Entry>
__device__ inline void tell_size(std::int64_t number, std::int64_t size, Entry&& entry) {
  if (packkv::detail::lane_id() == 0) packkv::detail::publish(entry(number), number > 0 ? -size : size);
}

/// The sum of the sizes of the items before `number`. A warp of a block calls it once for each of its items, behind
/// tell_size; items must be begun in ascending order, because a warp waits for all before its own. All lanes take part.
template <class Entry>
__device__ inline std::int64_t find_begin(std::int64_t number, std::int64_t size, Entry&& entry) {
  using namespace packkv::detail;
  constexpr int reads = 4;  // of a lane at once
  std::int64_t own = 0;     // of the sum, this lane's part
  bool found = number == 0;
  for (std::int64_t last = number - 1; !found; last -= reads * warp_threads) {
    std::int64_t known[reads];
#pragma unroll
    for (int k = 0; k < reads; ++k) {
      const std::int64_t item = last - k * warp_threads - lane_id();
      known[k] = item >= 0 ? observe(entry(item)) : -1;
    }
#pragma unroll
    for (int k = 0; k < reads; ++k) {
      if (found) continue;
      const std::int64_t item = last - k * warp_threads - lane_id();
      while (__any_sync(all_lanes, known[k] == 0))
        if (known[k] == 0) known[k] = observe(entry(item));
      // From the nearest end on: the items between it and this one have sizes. Item 0 has an end.
      const unsigned ends = __ballot_sync(all_lanes, known[k] > 0);
      const int nearest = ends == 0 ? warp_threads : __ffs(static_cast<int>(ends)) - 1;
      own += lane_id() < nearest ? -known[k] : lane_id() == nearest ? known[k] : std::int64_t{0};
      found = ends != 0;
    }
  }
  const std::int64_t begin = warp_sum(own);
  if (lane_id() == 0 && number > 0) publish(entry(number), begin + size);
  return begin;
}

}  // namespace packkv::warp
