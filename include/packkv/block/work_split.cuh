// SPDX-License-Identifier: Apache-2.0
// Shares the work of a ragged batch evenly among blocks, from lengths that only the device knows.
// One idea: every block adds up the same costs, and then knows who has which items without asking.
// Items are counted in 32 bits (max_launch_sequences): divisions in 64 bits took longer than a short sequence.
//   items.build<Threads>(batch, blocks, [&](int b) { return sequence_cost{...}; });   // in shared memory
//   block i has the items from items.shares.begin(i) to items.shares.begin(i + 1)
#pragma once

#include <packkv/core/checked.hpp>
#include <packkv/core/divisor.hpp>
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

/// The blocks that share a unit: those with its first and its last tile, and that with its 16-bit tokens.
struct unit_owners {
  int first, last, tail;
  __device__ bool alone() const { return first == tail; }
};

/// How a launch of one sequence is shared that has blocks enough for its units: as align_units says, but that every
/// unit has as many blocks, whatever the length, and neighbours are of different units. A block has a part of one unit
/// at most. The host prepares it, so that a block has few divisions to do.
class single_split {
 public:
  /// What a block has of its unit, if that exists.
  struct part {
    std::int32_t unit;   ///< its number
    std::int32_t block;  ///< the block's number where those of a unit are neighbours, the one with the tail the last
    std::int32_t blocks, share;  ///< of a unit; items of a block
    std::int32_t lo, hi;         ///< tiles
    bool tail;

    /// Whether it has a part of `tiles`; somebody stores what is empty.
    PACKKV_HOST_DEVICE bool has_tiles(std::int32_t tiles) const { return lo < hi || (tail && tiles == 0); }
  };

  single_split() = default;
  /// For up to `most_units` units, `blocks` blocks, and 16-bit tokens that cost `raw_items`.
  PACKKV_HOST_DEVICE constexpr single_split(std::int32_t most_units, std::int32_t blocks, std::int32_t raw_items)
      : blocks_(blocks), raw_items_(raw_items), each_(most_units > 0 ? blocks / most_units : 0) {
    if (each_ == 0) return;
    by_units_ = divisor(most_units);
    by_sharing_ = divisor(sharing_of(each_));
  }
  /// Whether such a launch is shared so.
  PACKKV_HOST_DEVICE constexpr bool exists() const { return by_units_.value > 0; }

  /// Of `units` units, 1 to as many as there may be, with so many tiles.
  PACKKV_HOST_DEVICE part part_of(std::int32_t block, std::int32_t units, std::int32_t tiles) const {
    part p;
    const bool known = units == by_units_.value;
    const std::int32_t index = known ? by_units_.quotient(block) : quotient(block, units).whole;
    p.unit = block - index * units;
    p.blocks = known ? each_ : quotient(blocks_, units).whole;
    const std::int32_t items = items_of(tiles, p.blocks), sharing = sharing_of(p.blocks);
    p.share = (known ? by_sharing_.quotient(items - 1) : quotient(items - 1, sharing).whole) + 1;
    // Whoever has nothing but the tail is the first to begin.
    const bool own_tail = sharing < p.blocks;
    const std::int32_t number = !own_tail ? index : index == 0 ? sharing : index - 1;
    p.block = p.unit * p.blocks + number;
    const std::int32_t begin = number * p.share, end = begin + p.share;
    p.lo = min_of(begin, tiles);
    p.hi = min_of(end, tiles);
    p.tail = own_tail ? index == 0 : begin < items && items <= end;
    if (index >= p.blocks) p.hi = p.lo, p.tail = false;
    return p;
  }
  /// The blocks of a unit with `tiles` tiles, by part::block.
  PACKKV_HOST_DEVICE unit_owners owners(std::int32_t unit, std::int32_t blocks, std::int32_t share,
                                        std::int32_t tiles) const {
    const std::int32_t first = unit * blocks, sharing = sharing_of(blocks);
    unit_owners o;
    o.tail = first + (sharing < blocks ? sharing : quotient(items_of(tiles, blocks) - 1, share).whole);
    o.first = tiles == 0 ? o.tail : first;
    o.last = tiles == 0 ? o.tail : first + quotient(tiles - 1, share).whole;
    return o;
  }

 private:
  /// Those of a unit's blocks that share its items: all, but where one has the tail for itself.
  PACKKV_HOST_DEVICE constexpr std::int32_t sharing_of(std::int32_t each) const {
    return each - (raw_items_ > 0 && each >= blocks_with_own_tail ? 1 : 0);
  }
  /// What they share.
  PACKKV_HOST_DEVICE std::int32_t items_of(std::int32_t tiles, std::int32_t each) const {
    return max_of(tiles + (sharing_of(each) < each ? 0 : raw_items_), 1);
  }

  std::int32_t blocks_, raw_items_;
  std::int32_t each_;  ///< blocks of a unit, where there are as many as there may be
  divisor by_units_, by_sharing_;
};

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
