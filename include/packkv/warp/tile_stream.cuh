// SPDX-License-Identifier: Apache-2.0
// The tiles of one KV head that a warp has to visit, brought into shared memory ahead of their use.
// One idea: pages are looked up 32 tiles at a time, a lane each, and that lane requests its tile; a tile without a page
// is passed over.
//   tile_stream<Format, 2, Engine> stream(storage, buffers, cache, report);
//   stream.open(b, head, tile_walk{first, Warps, 0, 0}, warp, end);   stream.start();
//   while (stream.next(tile, keys, values)) { use them; stream.release(); }
#pragma once

#include <packkv/codec/pages.hpp>
#include <packkv/detail/approx.cuh>
#include <packkv/detail/report.cuh>
#include <packkv/warp/tile_ring.cuh>

namespace packkv::warp {

/// How warps share tiles: each takes every `warps`-th, but the first `late` warps come `rounds` rounds later, and the
/// others have the tiles of those rounds.
struct tile_walk {
  int first, warps, late, rounds;

  /// Tile i of a warp, from begin(warp) on.
  __device__ int tile(int warp, int i) const {
    return first + warp + (i < rounds ? i * (warps - late) - late : i * warps - rounds * late);
  }
  __device__ int begin(int warp) const { return warp < late ? rounds : 0; }
};

/// A warp's stream of pairs of a K tile and a V tile, `Stages` of them on their way or in use.
template <class Format, int Stages, copy_engine Engine>
class tile_stream {
 public:
  static constexpr int key_bytes = Format::key_tile_bytes, value_bytes = Format::value_tile_bytes;
  static constexpr int stage_bytes = key_bytes + value_bytes;
  static constexpr int buffer_bytes = Stages * stage_bytes;
  using ring_type = tile_ring<Stages, resolved(Engine)>;
  /// In shared memory, of one warp.
  struct temp_storage {
    typename ring_type::temp_storage ring;
    tile_walk walk;
  };

  /// `buffers`: buffer_bytes of shared memory of this warp, 16-byte aligned. What is wrong with pages of `cache` is
  /// reported. All lanes take part, here and below.
  __device__ tile_stream(temp_storage& storage, std::uint8_t* buffers, const cache_view& cache, device_report* report)
      : ring_(storage.ring, buffers, stage_bytes), cache_(cache), report_(report), walk_(storage.walk) {}

  /// Looks up a warp's tiles below `end` of a sequence and KV head.
  __device__ void open(std::int64_t b, int head, const tile_walk& walk, int warp, int end) {
    b_ = b;
    head_ = head;
    __syncwarp();
    if (detail::lane_id() == 0) walk_ = walk;
    warp_ = warp;
    next_ = walk.begin(warp);
    end_ = end;
    found_ = 0;
    find(walk, cache_);
  }
  /// Starts to fetch up to `count` tiles ahead, before the first next().
  __device__ void start(int count = Stages) {
#pragma unroll 1
    while (ring_.waiting() < count && found_ != 0) request_found();
    __syncwarp();
  }

  /// Waits for the next tile; false if there is none. `tile` is its number in the sequence.
  __device__ bool next(int& tile, const std::uint8_t*& keys, const std::uint8_t*& values) {
    if (ring_.waiting() == 0) return false;
    keys = ring_.wait();
    values = keys + key_bytes;
    tile = ring_.tag();
    return true;
  }
  /// All lanes have read that tile.
  __device__ void release() {
    ring_.release();
    request();
  }

 private:
  /// Fetches the next tile that has a page.
  __device__ void request() {
    if (__builtin_expect(found_ == 0, 0)) {
      // What is known of the cache at compile time would be fetched for every tile.
      find(walk_, *detail::opaque(&cache_));
      if (found_ == 0) return;
    }
    request_found();
  }
  /// Looks tiles up until one has a page.
  __device__ void find(const tile_walk& walk, const cache_view& cache) {
    while (found_ == 0 && walk.tile(warp_, next_) < end_) look_up(walk, cache);
  }
  __device__ void request_found() {
    const int lane = __ffs(static_cast<int>(found_)) - 1;
    ring_.request({keys_, key_bytes}, {values_, value_bytes}, detail::shuffle(tile_, lane), lane);
    found_ &= found_ - 1;
  }
  /// Finds where the next 32 tiles lie, a lane each.
  __device__ void look_up(const tile_walk& walk, const cache_view& cache) {
    std::uint32_t flags = 0;
    const pages_view& pages = cache.pages;
    tile_ = walk.tile(warp_, next_ + detail::lane_id());
    const std::int32_t of_sequence = detail::divide(tile_, pages.tiles_per_page);
    const std::int64_t page = tile_ < end_ ? find_page(cache.table, pages.num_pages, b_, of_sequence, flags) : -1;
    if (page >= 0) {
      const std::int64_t slot = tile_ - of_sequence * pages.tiles_per_page;
      keys_ = static_cast<const std::uint8_t*>(pages.key_data) + page * pages.key_page_stride +
              head_ * pages.key_head_stride + slot * key_bytes;
      values_ = static_cast<const std::uint8_t*>(pages.value_data) + page * pages.value_page_stride +
                head_ * pages.value_head_stride + slot * value_bytes;
    }
    detail::add_report(report_, flags, 0);
    found_ = __ballot_sync(detail::all_lanes, page >= 0);
    next_ += detail::warp_threads;
  }

  ring_type ring_;
  const cache_view& cache_;
  device_report* const report_;
  std::int64_t b_ = 0;
  tile_walk& walk_;
  int head_ = 0, warp_ = 0, next_ = 0, end_ = 0;            ///< next_: of the walk, to be looked up
  const std::uint8_t *keys_ = nullptr, *values_ = nullptr;  ///< the lane's tile of those looked up
  int tile_ = 0;                                            ///< its number
  std::uint32_t found_ = 0;                                 ///< lanes whose tile has a page and is to be requested
};

}  // namespace packkv::warp
