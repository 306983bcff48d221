// SPDX-License-Identifier: Apache-2.0
// Where an item of unknown size begins behind those before it, in one pass: each block tells its size, then its end.
// One idea: the words that hold the final offsets carry the messages until then, so no workspace is needed.
//   const std::int64_t begin = warp::chained_begin(number, bytes, [&](std::int64_t i) { return offsets + i + 1; });
#pragma once

#include <packkv/detail/packed_bytes.cuh>

namespace packkv::warp {

/// The sum of the sizes (> 0) of the items before `number`. entry(i): a word of item i, 0 before the launch: minus the
/// item's size once that is known, and its end in the end. A warp of a block calls it once for each of its items; items
/// must be begun in ascending order, because a warp waits for all before its own. All lanes take part.
template <class Entry>
__device__ inline std::int64_t chained_begin(std::int64_t number, std::int64_t size, Entry&& entry) {
  using namespace packkv::detail;
  if (lane_id() == 0 && number > 0) publish(entry(number), -size);
  std::int64_t begin = 0;
  for (std::int64_t last = number - 1; last >= 0; last -= warp_threads) {
    const std::int64_t item = last - lane_id();
    std::int64_t known = item >= 0 ? observe(entry(item)) : 1;
    while (__any_sync(all_lanes, known == 0))
      if (known == 0) known = observe(entry(item));
    // Ends count from the nearest one on: the items between it and this one have sizes.
    const unsigned ends = __ballot_sync(all_lanes, item >= 0 && known > 0);
    const int nearest = ends == 0 ? warp_threads : __ffs(static_cast<int>(ends)) - 1;
    begin += warp_sum(item < 0 || lane_id() > nearest ? std::int64_t{0} : lane_id() == nearest ? known : -known);
    if (ends != 0) break;
  }
  if (lane_id() == 0) publish(entry(number), begin + size);
  return begin;
}

}  // namespace packkv::warp
