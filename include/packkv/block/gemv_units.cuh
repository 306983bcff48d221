// SPDX-License-Identifier: Apache-2.0
// What a block of a GEMV kernel has to do: pieces of units, a unit being a sequence, a KV head and up to Rows query
// heads. One idea: blocks share the tiles evenly (work_split), so a block has a few pieces, and a unit one block or
// several neighbours.
//   gemv_units<Rows, Threads, true> units(call, storage, true);   gemv_piece piece;   while (units.next(piece)) { ... }
#pragma once

#include <packkv/block/work_split.cuh>
#include <packkv/codec/pages.hpp>
#include <packkv/core/divisor.hpp>
#include <packkv/detail/report.cuh>

namespace packkv::block {

/// The arguments of a GEMV that do not depend on its format.
struct gemv_call {
  cache_view cache;
  input_view<3> in;    ///< queries [batch, query_heads, D_k] or weights [batch, query_heads, max_seq_len]
  output_view<3> out;  ///< scores [batch, query_heads, max_seq_len] or outputs [batch, query_heads, D_v]
  std::int32_t group;  ///< query heads per KV head
  std::int32_t first_sequence, sequences;  ///< of this launch
  divisor tiles_per_page;                  ///< of the cache
  divisor unit_blocks;  ///< blocks of a unit, where the launch has one sequence and a block one piece at most; else 0
  device_report* report;
};

/// In 32 bits, and without holes between its members.
struct gemv_piece {
  std::int32_t b, head;           ///< sequence, KV head
  std::int32_t first_head, rows;  ///< query heads first_head .. first_head + rows - 1
  std::int32_t length;            ///< tokens of the sequence
  std::int32_t lo, hi;            ///< tiles of this block
  /// Those that have tiles of the unit; without tiles, the one that answers for it, twice. The last may be missing
  /// before gemv_units::settle.
  std::int32_t first_block, last_block;
};

/// The blocks of each unit (unit_blocks) in a launch of `blocks` blocks for one sequence with `units` units.
PACKKV_HOST_DEVICE constexpr divisor single_unit_blocks(std::int64_t units, std::int64_t blocks) {
  return divisor(units > 0 && units <= blocks ? static_cast<std::int32_t>(blocks / units) : 0);
}

/// The pieces of units that a block of a GEMV kernel works on, one after the other. Own: every thread finds the only
/// piece of a launch that has one by itself, without a barrier; this needs a few registers more.
template <int Rows, int Threads, bool Own>
class gemv_units {
 public:
  /// In shared memory.
  struct temp_storage {
    sequence_items items;
    std::int32_t length[max_split_sequences];
    std::int32_t next;  ///< item
    gemv_piece piece;
    bool found;
  };

  /// With `empty`, units without tiles are pieces, too. All threads take part, here and below.
  __device__ gemv_units(const gemv_call& call, temp_storage& storage, bool empty)
      : call_(call), storage_(storage), empty_(empty) {
    if (is_single()) return;
    storage_.items.template build<Threads>(call.sequences, gridDim.x, [&](int index) {
      const int length = length_of(index, true);
      storage_.length[index] = length;
      return cost_of(length, empty);
    });
    if (threadIdx.x == 0) {
      const even_shares shares = storage_.items.shares;
      const auto here = static_cast<int>(blockIdx.x);
      storage_.next = here < shares.blocks() ? shares.begin(here) : -1;
    }
  }

  /// Finds the block's next piece; false if there is none. A barrier comes first, except before the only piece of a
  /// launch that has one.
  __device__ bool next(gemv_piece& piece) {
    if (is_single()) {
      if (done_) return false;
      done_ = true;
      if constexpr (Own) return find_single(piece);
    }
    __syncthreads();
    if (threadIdx.x == 0) storage_.found = is_single() ? find_single(storage_.piece) : find();
    __syncthreads();
    if (storage_.found) piece = storage_.piece;
    return storage_.found;
  }
  /// Completes the piece that next() found, for piece() behind a barrier.
  __device__ void settle(gemv_piece p) {
    if constexpr (Own)
      if (is_single() && threadIdx.x == 0) {
        complete(p);
        storage_.piece = p;
      }
  }
  __device__ const gemv_piece& piece() const { return storage_.piece; }

 private:
  __device__ int chunks() const { return ceil_div(call_.group, Rows); }
  __device__ bool is_single() const { return call_.unit_blocks.value > 0; }
  /// `reports`: whether this thread says what is wrong with it.
  __device__ int length_of(int index, bool reports) const {
    std::uint32_t flags = 0;
    const int length =
        detail::clamp_length(call_.cache.seq_lens, call_.first_sequence + index, call_.cache.max_seq_len, flags);
    if (reports) detail::add_report(call_.report, flags, 0);
    return length;
  }
  __device__ sequence_cost cost_of(int length, bool empty) const {
    const int tiles = ceil_div(length, tile_tokens);
    return {tiles > 0 || empty ? chunks() * call_.cache.pages.kv_heads : 0, tiles, 0};
  }

  /// Tiles of a block of the only sequence, of which a unit has `tiles` > 0.
  __device__ int single_share(int tiles) const { return call_.unit_blocks.quotient(tiles - 1) + 1; }
  /// The last block of the unit of such a piece: all but this one have as many tiles.
  __device__ void complete(gemv_piece& p) const {
    const int tiles = max_of(ceil_div(p.length, tile_tokens), 1);
    p.last_block = p.first_block + quotient(tiles - 1, single_share(tiles)).whole;
  }
  /// The piece of such a launch: a unit's blocks are neighbours, with equal shares.
  __device__ bool find_single(gemv_piece& p) const {
    const auto here = static_cast<int>(blockIdx.x);
    const std::int32_t unit = call_.unit_blocks.quotient(here);
    if (unit >= chunks() * call_.cache.pages.kv_heads) return false;
    const int length = length_of(0, threadIdx.x == 0), tiles = ceil_div(length, tile_tokens);
    const int share = single_share(max_of(tiles, 1));
    set(p, 0, unit, length);
    p.first_block = unit * call_.unit_blocks.value;
    p.lo = (here - p.first_block) * share;
    p.hi = min_of(p.lo + share, tiles);
    p.last_block = p.first_block;
    if constexpr (!Own) complete(p);
    return p.lo < tiles || (empty_ && p.lo == 0);
  }
  /// Unit `number` of a sequence.
  __device__ void set(gemv_piece& p, int index, std::int32_t number, int length) const {
    quotient head;
    if (chunks() == 1)
      head.whole = number, head.rest = 0;
    else
      head = quotient(number, chunks());
    const int first_row = head.rest * Rows;
    p.b = call_.first_sequence + index;
    p.head = head.whole;
    p.first_head = p.head * call_.group + first_row;
    p.rows = min_of(Rows, call_.group - first_row);
    p.length = length;
  }

  /// By one thread.
  __device__ bool find() {
    const even_shares shares = storage_.items.shares;
    if (storage_.next < 0) return false;
    const auto here = static_cast<int>(blockIdx.x);
    const std::int32_t end = shares.begin(here + 1);
    while (storage_.next < end) {
      const std::int32_t item = storage_.next;
      const int index = storage_.items.owner(call_.sequences, item);
      const sequence_cost cost = storage_.items.cost[index];
      const std::int32_t items = storage_.items.units.items_of(cost), begin = storage_.items.begin[index];
      const std::int32_t number = quotient(item - begin, items).whole;
      const std::int32_t unit_begin = begin + number * items;
      storage_.next = unit_begin + items;
      const std::int32_t offset = item - unit_begin;     // of the piece, in the unit
      if (offset > 0 && offset >= cost.tiles) continue;  // the rest of a unit is nobody's work
      gemv_piece& p = storage_.piece;
      set(p, index, number, storage_.length[index]);
      p.lo = offset;
      p.hi = min_of(end - unit_begin, cost.tiles);
      p.first_block = offset == 0 ? here : shares.owner(unit_begin);
      p.last_block = cost.tiles == 0 ? here : shares.owner(unit_begin + cost.tiles - 1);
      return true;
    }
    return false;
  }

  const gemv_call& call_;
  temp_storage& storage_;
  const bool empty_;
  bool done_ = false;  ///< with the only piece
};

}  // namespace packkv::block
