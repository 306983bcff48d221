// SPDX-License-Identifier: Apache-2.0
// Shares the work of a ragged batch evenly among blocks, from lengths that only the device knows.
// One idea: every block adds up the same costs, and then knows who has which items without asking.
// Items are counted in 32 bits (max_launch_sequences): divisions in 64 bits took longer than a short sequence.
//   items.build<Threads>(batch, blocks, [&](int b) { return sequence_cost{...}; });   // in shared memory
//   block i has the items from items.shares.begin(i) to items.shares.begin(i + 1)
#pragma once

#include <packkv/core/checked.hpp>
#include <packkv/detail/cuda.cuh>

namespace packkv::block {

inline constexpr int max_split_sequences = 256;  ///< sequences of one launch
/// From so many blocks per unit on, one of them does nothing but the unit's tail.
inline constexpr int blocks_with_own_tail = 8;
/// What it costs a block to begin and to end a unit, in tiles.
inline constexpr std::int32_t unit_cost = 24;

/// Sequences that one launch takes, if each has `units` units of at most `tiles` tiles and `raw` for 16-bit tokens:
/// their items are fewer than 2^31. 0: not even one.
constexpr std::int32_t max_launch_sequences(std::int64_t units, std::int64_t tiles, std::int64_t raw) {
  // Rounding units up to whole shares makes them less than twice as large.
  const checked items = checked(units) * 2 * (checked(tiles) + raw + unit_cost);
  if (!items.valid() || items.value() > 0x7fffffff) return 0;
  return static_cast<std::int32_t>(
      min_of<std::int64_t>(max_split_sequences, 0x7fffffff / max_of<std::int64_t>(items.value(), 1)));
}

/// a / b and a % b of a >= 0, b > 0.
struct quotient {
  std::int32_t whole, rest;
  quotient() = default;
  __device__ quotient(std::int32_t a, std::int32_t b)
      : whole(static_cast<std::int32_t>(static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b))),
        rest(a - whole * b) {}
};

/// Shares of `total` items that differ by one at most; the first shares are the larger ones.
class even_shares {
 public:
  even_shares() = default;
  /// At most `blocks` shares, none of them empty.
  __device__ even_shares(std::int32_t total, std::int32_t blocks)
      : blocks_(min_of(blocks, total)), each_(total, max_of(blocks_, 1)) {}
  __device__ std::int32_t blocks() const { return blocks_; }
  /// First item of a block, which may be the end.
  __device__ std::int32_t begin(std::int32_t block) const { return each_.whole * block + min_of(block, each_.rest); }
  /// The block that has an item.
  __device__ std::int32_t owner(std::int32_t item) const {
    const std::int32_t larger = each_.rest * (each_.whole + 1);
    const bool early = item < larger;
    return quotient(early ? item : item - larger, each_.whole + (early ? 1 : 0)).whole + (early ? 0 : each_.rest);
  }

 private:
  std::int32_t blocks_;
  quotient each_;
};

/// What a sequence has to do: `units` of the same size. In shared memory: no initialisers.
struct sequence_cost {
  std::int32_t units;
  std::int32_t tiles;  ///< of each unit
  std::int32_t raw;    ///< what the 16-bit tokens of a unit cost, in tiles
};

/// The items of the sequences of a launch, in shared memory.
struct sequence_items {
  std::int32_t begin[max_split_sequences + 1];  ///< begin[b] .. begin[b + 1] are those of sequence b
  sequence_cost cost[max_split_sequences];
  even_shares shares;    ///< of the blocks
  std::int32_t aligned;  ///< > 0: units begin at multiples of this, which is also what a block takes
  bool own_tail;         ///< then: tails begin there, too

  /// cost_of(b) is called once for each of `batch` <= max_launch_sequences(...) sequences. All threads of the block
  /// take part; a barrier must follow. Where units are few, each begins with a block of its own: a block that has parts
  /// of two units does them one after the other.
  template <int Threads, class Cost>
  __device__ void build(int batch, std::int32_t blocks, Cost&& cost_of) {
#pragma unroll 1
    for (int b = static_cast<int>(threadIdx.x); b < batch; b += Threads) {
      const sequence_cost of_b = cost_of(b);
      cost[b] = of_b;
    }
    if (batch > detail::warp_threads) __syncthreads();
    if (detail::warp_id() != 0) return;
    __syncwarp();
    choose(batch, blocks);
    std::int32_t total = 0;
#pragma unroll 1
    for (int first = 0; first < batch; first += detail::warp_threads) {
      const int b = first + detail::lane_id();
      std::int32_t up_to = b < batch ? cost[b].units * items_of(cost[b]) : 0;
      if (batch > 1) up_to = total + detail::warp_prefix_sum(up_to);
      if (b < batch) begin[b + 1] = up_to;
      total = detail::shuffle(up_to, min_of(batch - first, detail::warp_threads) - 1);
    }
    if (detail::lane_id() == 0) {
      begin[0] = 0;
      const even_shares all(total, aligned > 0 ? quotient(total, aligned).whole : blocks);
      shares = all;
    }
  }

  /// Items of a unit: its tiles, then a tail of which the last item stands for all that is not tiles.
  __device__ std::int32_t items_of(const sequence_cost& c) const {
    if (aligned == 0) return c.tiles + c.raw + unit_cost;
    const std::int32_t items = own_tail ? c.tiles + aligned : max_of(c.tiles + c.raw, 1);
    return quotient(items + aligned - 1, aligned).whole * aligned;
  }

  /// The sequence that has an item.
  __device__ int owner(int batch, std::int32_t item) const {
    int low = 0, high = batch;  // begin[low] <= item < begin[high]
#pragma unroll 1
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
  __device__ void choose(int batch, std::int32_t blocks) {
    unsigned units = 0, largest = 0, least = 0xffffffffu, raw = 0, total = 0;
#pragma unroll 1
    for (int b = detail::lane_id(); b < batch; b += detail::warp_threads)
      if (cost[b].units > 0) {
        const auto items = static_cast<unsigned>(cost[b].tiles + cost[b].raw),
                   count = static_cast<unsigned>(cost[b].units);
        units += count;
        total += count * items;
        largest = max_of(largest, items);
        least = min_of(least, items);
        raw = static_cast<unsigned>(cost[b].raw);
      }
    if (batch > 1) {
      units = detail::warp_sum_unsigned(units);
      total = detail::warp_sum_unsigned(total);
      largest = detail::warp_max_unsigned(largest);
      least = ~detail::warp_max_unsigned(~least);
      raw = detail::warp_max_unsigned(raw);
    }
    if (detail::lane_id() == 0) {
      std::int32_t share = 0;
      bool tails = false;
      const bool uniform = least == largest;
      const auto count = static_cast<std::int32_t>(units);
      if (count > 0 && count <= blocks / (uniform ? 1 : 8)) {
        std::int32_t each = quotient(blocks, count).whole;
        auto items = static_cast<std::int32_t>(largest);
        tails = raw > 0 && each >= blocks_with_own_tail;
        if (tails) {
          --each;
          items -= static_cast<std::int32_t>(raw);
        }
        share = uniform ? quotient(items + each - 1, each).whole
                        : quotient(static_cast<std::int32_t>(total), blocks - count * (tails ? 2 : 1)).whole + 1;
        share = max_of(share, 1);
      }
      aligned = share;
      own_tail = tails;
    }
    __syncwarp();
  }
};

}  // namespace packkv::block
