// SPDX-License-Identifier: Apache-2.0
// Shares the work of a ragged batch evenly among blocks, from lengths that only the device knows.
// One idea: every block adds up the same costs, and then knows who has which items without asking.
//   items.build<Threads>(batch, blocks, [&](int b) { return sequence_cost{...}; });   // in shared memory
//   even_shares shares = items.shares(batch, blocks);   // block i has shares.begin(i) .. shares.begin(i + 1)
#pragma once

#include <packkv/core/checked.hpp>
#include <packkv/detail/cuda.cuh>

namespace packkv::block {

inline constexpr int max_split_sequences = 256;  ///< sequences of one launch
/// From so many blocks per unit on, one of them does nothing but the unit's tail.
inline constexpr std::int64_t blocks_with_own_tail = 8;
/// What it costs a block to begin and to end a unit, in tiles.
inline constexpr std::int32_t unit_cost = 24;

/// a / b and a % b of a >= 0, b > 0: in 32 bits where they fit, which is several times faster.
struct quotient {
  std::int64_t whole, rest;
  quotient() = default;
  __device__ quotient(std::int64_t a, std::int64_t b) {
    if ((static_cast<std::uint64_t>(a | b) >> 32) == 0) {
      whole = static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
      rest = static_cast<std::uint32_t>(a) - static_cast<std::uint32_t>(whole) * static_cast<std::uint32_t>(b);
    } else {
      whole = a / b;
      rest = a - whole * b;
    }
  }
};

/// Shares of `total` items that differ by one at most; the first shares are the larger ones.
class even_shares {
 public:
  even_shares() = default;
  /// At most `blocks` shares, none of them empty.
  __device__ even_shares(std::int64_t total, std::int64_t blocks)
      : blocks_(min_of(blocks, total)), each_(total, max_of<std::int64_t>(blocks_, 1)) {}
  __device__ std::int64_t blocks() const { return blocks_; }
  /// First item of a block, which may be the end.
  __device__ std::int64_t begin(std::int64_t block) const { return each_.whole * block + min_of(block, each_.rest); }
  /// The block that has an item.
  __device__ int owner(std::int64_t item) const {
    const std::int64_t larger = each_.rest * (each_.whole + 1);
    return static_cast<int>(item < larger ? quotient(item, each_.whole + 1).whole
                                          : each_.rest + quotient(item - larger, each_.whole).whole);
  }

 private:
  std::int64_t blocks_;
  quotient each_;
};

/// What a sequence has to do: `units` of the same size. In shared memory: no initialisers.
struct sequence_cost {
  std::int64_t units;
  std::int32_t tiles;  ///< of each unit
  std::int32_t raw;    ///< what the 16-bit tokens of a unit cost, in tiles
};

/// The items of the sequences of a launch, in shared memory.
struct sequence_items {
  std::int64_t begin[max_split_sequences + 1];  ///< begin[b] .. begin[b + 1] are those of sequence b
  sequence_cost cost[max_split_sequences];
  std::int64_t aligned;  ///< > 0: units begin at multiples of this, which is also what a block takes
  bool own_tail;         ///< then: tails begin there, too

  /// cost_of(b) is called once for each of `batch` <= max_split_sequences sequences. All threads of the block take
  /// part; ends with a barrier. Where units are few, each begins with a block of its own: a block that has parts of two
  /// units does them one after the other.
  template <int Threads, class Cost>
  __device__ void build(int batch, std::int64_t blocks, Cost&& cost_of) {
    for (int b = static_cast<int>(threadIdx.x); b < batch; b += Threads) cost[b] = cost_of(b);
    __syncthreads();
    if (detail::warp_id() == 0) {
      choose(batch, blocks);
      std::int64_t before = 0;
      for (int first = 0; first < batch; first += detail::warp_threads) {
        const int b = first + detail::lane_id();
        std::int64_t up_to = b < batch ? cost[b].units * items_of(cost[b]) : std::int64_t{0};
        if (batch > 1) up_to = before + detail::warp_prefix_sum(up_to);
        if (b < batch) begin[b + 1] = up_to;
        if (batch > detail::warp_threads) before = detail::shuffle(up_to, detail::warp_threads - 1);
      }
      if (detail::lane_id() == 0) begin[0] = 0;
    }
    __syncthreads();
  }

  /// Items of a unit: its tiles, then a tail of which the last item stands for all that is not tiles.
  __device__ std::int64_t items_of(const sequence_cost& c) const {
    if (aligned == 0) return c.tiles + c.raw + unit_cost;
    const std::int64_t items = own_tail ? c.tiles + aligned : max_of(c.tiles + c.raw, 1);
    return quotient(items + aligned - 1, aligned).whole * aligned;
  }
  /// The shares of the blocks of a launch.
  __device__ even_shares shares(int batch, std::int64_t blocks) const {
    return even_shares(begin[batch], aligned > 0 ? quotient(begin[batch], aligned).whole : blocks);
  }

  /// The sequence that has an item.
  __device__ int owner(int batch, std::int64_t item) const {
    int low = 0, high = batch;  // begin[low] <= item < begin[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (begin[middle] <= item)
        low = middle;
      else
        high = middle;
    }
    return low;
  }

 private:
  /// By warp 0.
  __device__ void choose(int batch, std::int64_t blocks) {
    constexpr std::int64_t many = 1 << 20;
    unsigned units = 0, largest = 0, least = 0xffffffffu, raw = 0;
    for (int b = detail::lane_id(); b < batch; b += detail::warp_threads)
      if (cost[b].units > 0) {
        const auto items = static_cast<unsigned>(cost[b].tiles + cost[b].raw);
        units += static_cast<unsigned>(min_of(cost[b].units, many));
        largest = max_of(largest, items);
        least = min_of(least, items);
        raw = static_cast<unsigned>(cost[b].raw);
      }
    if (batch > 1) {
      units = detail::warp_sum_unsigned(units);
      largest = detail::warp_max_unsigned(largest);
      least = ~detail::warp_max_unsigned(~least);
      raw = detail::warp_max_unsigned(raw);
    }
    std::int64_t share = 0;
    bool tails = false;
    const bool uniform = least == largest;
    if (detail::lane_id() == 0 || batch > 1) {
      if (units > 0 && units * (uniform ? 1 : 8) <= blocks) {
        std::int64_t each = quotient(blocks, units).whole, items = largest;
        tails = raw > 0 && each >= blocks_with_own_tail;
        if (tails) {
          --each;
          items -= raw;
        }
        share = uniform ? quotient(items + each - 1, each).whole
                        : quotient(total_of(batch), blocks - units * (tails ? 2 : 1)).whole + 1;
        share = max_of<std::int64_t>(share, 1);
      }
      if (detail::lane_id() == 0) {
        aligned = share;
        own_tail = tails;
      }
    }
    __syncwarp();
  }
  __device__ std::int64_t total_of(int batch) const {
    std::int64_t total = 0;
    for (int b = detail::lane_id(); b < batch; b += detail::warp_threads)
      total += cost[b].units * (cost[b].tiles + cost[b].raw);
    return detail::warp_sum(total);
  }
};

}  // namespace packkv::block
