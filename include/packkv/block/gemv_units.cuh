// SPDX-License-Identifier: Apache-2.0
// What a block of a GEMV kernel has to do: pieces of units, a unit being a sequence, a KV head and up to Rows query
// heads. One idea: blocks share the tiles evenly (work_split), so a block has a few pieces, and a unit one block or
// several neighbours.
//   gemv_units<Rows, Threads> units(call, storage, true);   while (units.next()) { const gemv_piece& p = units.piece();
//   ... }
#pragma once

#include <packkv/block/work_split.cuh>
#include <packkv/codec/pages.hpp>
#include <packkv/detail/report.cuh>

namespace packkv::block {

/// The arguments of a GEMV that do not depend on its format.
struct gemv_call {
  cache_view cache;
  input_view<3> in;    ///< queries [batch, query_heads, D_k] or weights [batch, query_heads, max_seq_len]
  output_view<3> out;  ///< scores [batch, query_heads, max_seq_len] or outputs [batch, query_heads, D_v]
  std::int32_t group;  ///< query heads per KV head
  std::int32_t first_sequence, sequences;  ///< of this launch
  device_report* report;
};

/// In 32 bits, and without holes between its members.
struct gemv_piece {
  std::int32_t b, head;           ///< sequence, KV head
  std::int32_t first_head, rows;  ///< query heads first_head .. first_head + rows - 1
  std::int32_t length;            ///< tokens of the sequence
  std::int32_t lo, hi;            ///< tiles of this block
  /// Those that have tiles of the unit; without tiles, the one that answers for it, twice.
  std::int32_t first_block, last_block;
};

/// The pieces of units that a block of a GEMV kernel works on, one after the other.
template <int Rows, int Threads>
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
      : call_(call), storage_(storage), left_(is_single() ? 1 : 2) {
    if (is_single()) {
      if (threadIdx.x == 0) storage_.found = find_single(empty);
      return;
    }
    storage_.items.template build<Threads>(call.sequences, gridDim.x, [&](int index) {
      const int length = length_of(index);
      storage_.length[index] = length;
      return cost_of(length, empty);
    });
    if (threadIdx.x == 0) {
      const even_shares shares = storage_.items.shares;
      const auto here = static_cast<int>(blockIdx.x);
      storage_.next = here < shares.blocks() ? shares.begin(here) : -1;
    }
  }

  /// Finds the block's next piece; false if there is none. Begins with a barrier; all threads see
  /// the piece behind it.
  __device__ bool next() {
    __syncthreads();
    if (left_ < 2) return left_-- > 0 && storage_.found;
    if (threadIdx.x == 0) storage_.found = find();
    __syncthreads();
    return storage_.found;
  }
  __device__ const gemv_piece& piece() const { return storage_.piece; }

 private:
  __device__ int chunks() const { return ceil_div(call_.group, Rows); }
  /// Whether a launch has one sequence and so few units that a block has one piece at most.
  __device__ bool is_single() const {
    return call_.sequences == 1 && chunks() * call_.cache.pages.kv_heads <= static_cast<int>(gridDim.x);
  }
  __device__ int length_of(int index) const {
    std::uint32_t flags = 0;
    const int length =
        detail::clamp_length(call_.cache.seq_lens, call_.first_sequence + index, call_.cache.max_seq_len, flags);
    detail::add_report(call_.report, flags, 0);
    return length;
  }
  __device__ sequence_cost cost_of(int length, bool empty) const {
    const int tiles = ceil_div(length, tile_tokens);
    return {tiles > 0 || empty ? chunks() * call_.cache.pages.kv_heads : 0, tiles, 0};
  }

  /// The piece of such a launch, without a search. By one thread.
  __device__ bool find_single(bool empty) {
    const int length = length_of(0), here = static_cast<int>(blockIdx.x);
    const sequence_cost cost = cost_of(length, empty);
    const auto split = storage_.items.build_one(cost, static_cast<std::int32_t>(gridDim.x), false);
    if (here >= split.shares.blocks()) return false;
    const int each = split.units.aligned, blocks = split.units.blocks_of(cost);
    const quotient unit(here, blocks);
    gemv_piece& p = storage_.piece;
    set(p, 0, unit.whole, length);
    p.lo = unit.rest * each;
    p.hi = min_of(p.lo + each, cost.tiles);
    p.first_block = here - unit.rest;
    p.last_block = p.first_block + blocks - 1;
    return true;
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
  int left_;  ///< pieces of a launch that has one at most; 2: of any other
};

}  // namespace packkv::block
