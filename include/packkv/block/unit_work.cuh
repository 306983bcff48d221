// SPDX-License-Identifier: Apache-2.0
// Which units (sequence, KV head, up to Rows query rows) a block of the fused decode kernel works on, one after the
// other, and which of their tiles.
//   unit_work<Rows, Threads> work(launch, storage);
//   std::int32_t item;
//   for (bool more = work.begin(item); more; more = work.more()) { work.take(item); ...; item = work.release(); }
#pragma once

#include <packkv/block/decode_unit.cuh>
#include <packkv/block/work_split.cuh>

namespace packkv::block {

/// A launch of the decode kernel, whatever its format.
struct decode_launch {
  decode_call call;
  std::int32_t first_sequence, sequences;  ///< of this launch
  std::int32_t raw_items;                  ///< what the 16-bit tokens of a unit cost, in tiles
  single_split single;                     ///< of this launch, if it is split so
  device_report* report;
};

/// In shared memory.
template <int Rows>
struct work_storage {
  sequence_items items;
  decode_unit<Rows> unit;
  std::int32_t unit_begin, unit_end;  ///< items
  single_split::part part;            ///< where the launch is a single_split
  int block;                          ///< the block's number, of those that `owner` has
  unit_owners owner;
  int tiles;         ///< of the unit
  int lo, hi;        ///< tiles of the unit that are this block's
  bool coded, tail;  ///< the block has a part of the coded tokens; has the 16-bit tokens
};

/// The units that a block of the fused decode kernel works on, one after the other.
template <int Rows, int Threads>
class unit_work {
 public:
  __device__ unit_work(const decode_launch& launch, work_storage<Rows>& storage) : a_(launch), storage_(storage) {}

  __device__ static int here() { return static_cast<int>(blockIdx.x); }

  /// Works out the split; `item` is the block's first item, or -1 where it has a part of one unit at most, which is
  /// taken at once. False if the block has none.
  __device__ bool begin(std::int32_t& item) {
    item = -1;
    return is_single() ? take_single() : split(item);
  }
  /// Sets the unit to that which has this item of the block, and the block's part of it. An item of -1 was taken by
  /// begin().
  __device__ void take(std::int32_t item) {
    if (item < 0) return;
    const std::int32_t end = storage_.items.shares.begin(here() + 1);
    const int index = storage_.items.owner(a_.sequences, item);
    std::uint32_t known = 0;  // and reported
    const decode_sequence s(a_.call, a_.first_sequence + index, Rows, known);
    set(s, storage_.items.begin[index], storage_.items.units.items_of(storage_.items.cost[index]), item, end);
    __syncthreads();
  }
  /// Whether the unit is the block's first.
  __device__ bool is_first() const { return is_single() || storage_.unit_begin <= storage_.items.shares.begin(here()); }
  /// Whether the block has items behind the unit.
  __device__ bool more() const { return !is_single() && storage_.unit_end < storage_.items.shares.begin(here() + 1); }
  /// The item behind the unit, which all threads are done with.
  __device__ std::int32_t release() {
    const std::int32_t next = storage_.unit_end;
    __syncthreads();
    return next;
  }
  /// Needed at the end of a unit only, and divisions are slow: one thread does it while others wait, of a warp in the
  /// middle, since the first have tiles and the last rows. A barrier must follow.
  __device__ void find_owners() {
    if (threadIdx.x != Threads / 2 - 1) return;
    if (is_single()) {
      const single_split::part p = storage_.part;
      const unit_owners o = a_.single.owners(p.unit, p.blocks, p.share, storage_.tiles);
      storage_.owner = o;
      return;
    }
    const even_shares shares = storage_.items.shares;
    const std::int32_t begin = storage_.unit_begin;
    const int tiles = storage_.tiles;
    unit_owners o;
    o.tail = storage_.tail ? here() : shares.owner(storage_.unit_end - 1);
    o.first = tiles == 0 ? o.tail : shares.owner(begin);
    o.last = tiles == 0 ? o.tail : shares.owner(begin + tiles - 1);
    storage_.owner = o;
  }

 private:
  __device__ bool is_single() const { return a_.single.exists(); }
  /// Finds the block's unit and its part of it in a launch that is split so; false if there is none. Each warp that
  /// sets something of it finds it on its own.
  __device__ bool take_single() {
    prefetch_pages();
    if (sets_units()) {
      std::uint32_t flags = 0;
      const decode_sequence s(a_.call, a_.first_sequence, Rows, flags);
      if (threadIdx.x == 0) detail::add_report(a_.report, flags, 0);
      single_split::part p = {};
      if (s.chunks > 0) p = a_.single.part_of(here(), s.chunks * a_.call.cache.pages.kv_heads, s.tiles);
      const bool coded = p.has_tiles(s.tiles);
      if (coded || p.tail) storage_.unit.set(a_.call, s, p.unit, p.tail);
      if (is_part_setter()) {
        storage_.part = p;
        storage_.block = p.block;
        set_part(s, p.lo, p.hi, coded, p.tail);
      }
    }
    __syncthreads();
    return storage_.coded || storage_.tail;
  }
  /// Whether set() needs the thread's warp. These have a scheduler of the SM each: all warps together would take turns.
  __device__ static bool sets_units() {
    const int warp = detail::warp_id();
    return warp < 3 || warp == Threads / detail::warp_threads - 1;
  }
  /// Brings the page ids of the only sequence nearer while its lengths are on their way. A lane of a warp of
  /// each block has 128 bytes of them.
  __device__ void prefetch_pages() const {
    constexpr std::int64_t ids = 32;  // in 128 bytes
    const page_table& table = a_.call.cache.table;
    if (detail::warp_id() != Threads / 64 || table.pages == nullptr || table.indptr != nullptr) return;
    const std::int64_t line = ids * (detail::warp_threads * here() + detail::lane_id());
    if (line < table.row_stride) detail::prefetch(table.pages + a_.first_sequence * table.row_stride + line);
  }
  /// Works out the split of any launch; `first` is the block's first item. False if it has none.
  __device__ bool split(std::int32_t& first) {
    storage_.items.template build<Threads>(a_.sequences, static_cast<std::int32_t>(gridDim.x), [&](int index) {
      std::uint32_t flags = 0;
      const decode_sequence s(a_.call, a_.first_sequence + index, Rows, flags);
      detail::add_report(a_.report, flags, 0);
      return s.cost(a_.call, a_.raw_items);
    });
    __syncthreads();
    const even_shares shares = storage_.items.shares;
    first = shares.begin(here());
    return here() < shares.blocks();
  }
  /// Sets the unit to that with `item` of a sequence whose units have `items` each, the first from `begin` on. The
  /// block's items end at `end`. A barrier must follow.
  __device__ void set(const decode_sequence& s, std::int32_t begin, std::int32_t items, std::int32_t item,
                      std::int32_t end) {
    const std::int32_t number = quotient(item - begin, items).whole;
    const std::int32_t unit_begin = begin + number * items, unit_end = unit_begin + items;
    const bool tail = unit_end <= end;
    storage_.unit.set(a_.call, s, number, tail);
    if (is_part_setter()) {
      const int lo = min_of(item - unit_begin, s.tiles), hi = min_of(min_of(end, unit_end) - unit_begin, s.tiles);
      storage_.unit_begin = unit_begin;
      storage_.unit_end = unit_end;
      storage_.block = here();
      set_part(s, lo, hi, lo < hi || (tail && s.tiles == 0), tail);  // somebody stores what is empty
    }
  }
  /// The thread that writes down what the block has of a unit: the first warps set the unit.
  __device__ static bool is_part_setter() { return threadIdx.x == (Threads > 64 ? 64 : 0); }
  __device__ void set_part(const decode_sequence& s, int lo, int hi, bool coded, bool tail) {
    storage_.tiles = s.tiles;
    storage_.lo = s.first_tile + lo;
    storage_.hi = s.first_tile + hi;
    storage_.coded = coded;
    storage_.tail = tail;
  }

  const decode_launch& a_;
  work_storage<Rows>& storage_;
};

}  // namespace packkv::block
