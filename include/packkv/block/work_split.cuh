// SPDX-License-Identifier: Apache-2.0
// Shares the work of a ragged batch evenly among blocks, from lengths that only the device knows.
// One idea: every block adds up the same costs, and then knows who has which items without asking.
// Items are counted in 32 bits (max_launch_sequences): divisions in 64 bits took longer than a short sequence.
//   items.build<Threads>(batch, blocks, [&](int b) { return sequence_cost{...}; });   // in shared memory
//   block i has the items from items.shares.begin(i) to items.shares.begin(i + 1)
#pragma once

#include <packkv/core/checked.hpp>
#include <packkv/detail/approx.cuh>

namespace packkv::block {

inline constexpr int max_split_sequences = 256;  ///< sequences of one launch
/// From so many blocks per unit on, one of them does nothing but the unit's tail.
inline constexpr int blocks_with_own_tail = 8;
/// What it costs a block to begin and to end a unit, in tiles.
inline constexpr std::int32_t unit_cost = 28;

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
  PACKKV_HOST_DEVICE quotient(std::int32_t a, std::int32_t b) : whole(divide(a, b)), rest(a - whole * b) {}

 private:
  PACKKV_HOST_DEVICE static std::int32_t divide(std::int32_t a, std::int32_t b) {
#if defined(__CUDA_ARCH__) || defined(PACKKV_SIMT_EXECUTOR)
    return detail::divide(a, b);
#else
    return a / b;
#endif
  }
};

/// Shares of `total` items that differ by one at most; the first shares are the larger ones.
class even_shares {
 public:
  even_shares() = default;
  /// At most `blocks` shares, none of them empty.
  PACKKV_HOST_DEVICE even_shares(std::int32_t total, std::int32_t blocks)
      : blocks_(min_of(blocks, total)), each_(total, max_of(blocks_, 1)) {}
  /// `blocks` shares of `each` items.
  PACKKV_HOST_DEVICE static even_shares equal(std::int32_t blocks, std::int32_t each) {
    even_shares s;
    s.blocks_ = blocks;
    s.each_.whole = each;
    s.each_.rest = 0;
    return s;
  }
  PACKKV_HOST_DEVICE std::int32_t blocks() const { return blocks_; }
  /// First item of a block, which may be the end.
  PACKKV_HOST_DEVICE std::int32_t begin(std::int32_t block) const {
    return each_.whole * block + min_of(block, each_.rest);
  }
  /// The block that has an item.
  PACKKV_HOST_DEVICE std::int32_t owner(std::int32_t item) const {
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

/// What all units of a launch are like. Items here are tiles and the cost of 16-bit tokens.
struct unit_totals {
  std::uint32_t units, items;    ///< of all of them
  std::uint32_t largest, least;  ///< items of a unit
  std::uint32_t raw;             ///< the most that 16-bit tokens of a unit cost

  PACKKV_HOST_DEVICE static unit_totals none() { return {0, 0, 0, 0xffffffffu, 0}; }
  PACKKV_HOST_DEVICE void add(const sequence_cost& c) {
    if (c.units == 0) return;
    const auto each = static_cast<std::uint32_t>(c.tiles + c.raw);
    units += static_cast<std::uint32_t>(c.units);
    items += static_cast<std::uint32_t>(c.units) * each;
    largest = max_of(largest, each);
    least = min_of(least, each);
    raw = max_of(raw, static_cast<std::uint32_t>(c.raw));
  }
};

/// Where units begin.
struct unit_alignment {
  std::int32_t aligned;  ///< > 0: at multiples of this, which is also what a block takes
  bool own_tail;         ///< then: tails begin there, too

  /// Items of a unit: its tiles, then a tail of which the last item stands for all that is not tiles.
  PACKKV_HOST_DEVICE std::int32_t items_of(const sequence_cost& c) const {
    return aligned == 0 ? c.tiles + c.raw + unit_cost : blocks_of(c) * aligned;
  }
  /// Blocks of a unit, where units are aligned.
  PACKKV_HOST_DEVICE std::int32_t blocks_of(const sequence_cost& c) const {
    const std::int32_t items = own_tail ? c.tiles + aligned : max_of(c.tiles + c.raw, 1);
    return quotient(items + aligned - 1, aligned).whole;
  }
  /// The shares of up to `blocks` blocks in `total` items, a sum of items_of(...).
  PACKKV_HOST_DEVICE even_shares shares(std::int32_t total, std::int32_t blocks) const {
    return aligned > 0 ? even_shares::equal(quotient(total, aligned).whole, aligned) : even_shares(total, blocks);
  }
};

/// Where units are few, each begins with a block of its own: a block that has parts of two units does them one after
/// the other.
PACKKV_HOST_DEVICE inline unit_alignment align_units(const unit_totals& all, std::int32_t blocks) {
  unit_alignment a = {0, false};
  const bool uniform = all.least == all.largest;
  const auto units = static_cast<std::int32_t>(all.units);
  if (units == 0 || units > (uniform ? blocks : blocks / 8)) return a;
  std::int32_t each = quotient(blocks, units).whole;
  auto items = static_cast<std::int32_t>(all.largest);
  a.own_tail = all.raw > 0 && each >= blocks_with_own_tail;
  if (a.own_tail) {
    --each;
    items -= static_cast<std::int32_t>(all.raw);
  }
  a.aligned = uniform ? quotient(items + each - 1, each).whole
                      : quotient(static_cast<std::int32_t>(all.items), blocks - units * (a.own_tail ? 2 : 1)).whole + 1;
  a.aligned = max_of(a.aligned, 1);
  return a;
}

/// The items of the sequences of a launch, in shared memory.
struct sequence_items {
  std::int32_t begin[max_split_sequences + 1];  ///< begin[b] .. begin[b + 1] are those of sequence b
  sequence_cost cost[max_split_sequences];
  even_shares shares;  ///< of the blocks
  unit_alignment units;

  /// cost_of(b) is called once for each of `batch` <= max_launch_sequences(...) sequences. All threads of the block
  /// take part; a barrier must follow.
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
    const unit_totals all = totals(batch);
    if (detail::lane_id() == 0) {
      const unit_alignment chosen = align_units(all, blocks);
      units = chosen;
    }
    __syncwarp();
    std::int32_t total = 0;
#pragma unroll 1
    for (int first = 0; first < batch; first += detail::warp_threads) {
      const int b = first + detail::lane_id();
      std::int32_t up_to = b < batch ? cost[b].units * units.items_of(cost[b]) : 0;
      if (batch > 1) up_to = total + detail::warp_prefix_sum(up_to);
      if (b < batch) begin[b + 1] = up_to;
      total = detail::shuffle(up_to, min_of(batch - first, detail::warp_threads) - 1);
    }
    if (detail::lane_id() == 0) {
      begin[0] = 0;
      const even_shares of_blocks = units.shares(total, blocks);
      shares = of_blocks;
    }
  }

  /// How a launch of one sequence is shared.
  struct split {
    even_shares shares;
    unit_alignment units;
    std::int32_t items;  ///< of each unit
  };
  /// The same for one sequence, with as few divisions as may be. Every thread that comes here gets the split; after a
  /// barrier it is here, too, by the one that `writes`.
  __device__ split build_one(const sequence_cost& c, std::int32_t blocks, bool writes) {
    const auto count = static_cast<std::uint32_t>(c.units), each = static_cast<std::uint32_t>(c.tiles + c.raw);
    const unit_totals all = {count, count * each, each, each, static_cast<std::uint32_t>(c.raw)};
    split s;
    s.units = align_units(all, blocks);
    if (s.units.aligned > 0) {
      const std::int32_t of_unit = s.units.blocks_of(c);
      s.items = of_unit * s.units.aligned;
      s.shares = even_shares::equal(c.units * of_unit, s.units.aligned);
    } else {
      s.items = s.units.items_of(c);
      s.shares = even_shares(c.units * s.items, blocks);
    }
    if (writes) {
      begin[0] = 0;
      begin[1] = c.units * s.items;
      cost[0] = c;
      units = s.units;
      shares = s.shares;
    }
    return s;
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
  /// By warp 0; in its first lane where there is one sequence, else in all.
  __device__ unit_totals totals(int batch) const {
    unit_totals all = unit_totals::none();
#pragma unroll 1
    for (int b = detail::lane_id(); b < batch; b += detail::warp_threads) all.add(cost[b]);
    if (batch > 1) {
      all.units = detail::warp_sum_unsigned(all.units);
      all.items = detail::warp_sum_unsigned(all.items);
      all.largest = detail::warp_max_unsigned(all.largest);
      all.least = ~detail::warp_max_unsigned(~all.least);
      all.raw = detail::warp_max_unsigned(all.raw);
    }
    return all;
  }
};

}  // namespace packkv::block
