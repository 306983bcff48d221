// SPDX-License-Identifier: Apache-2.0
// The tiles of one side and KV head that a warp has to visit, brought into shared memory ahead of their use.
// One idea: as tile_stream, but of K or of V alone, and every tile comes, in order, those without a page, too.
//   side_stream<bytes, 4, Engine> stream(storage, buffers);   stream.open(source, b, first, end, step); stream.start();
//   while (stream.next(tile)) { use it; stream.release(); }   stream.report(to);
#pragma once

#include <packkv/codec/pages.hpp>
#include <packkv/core/divisor.hpp>
#include <packkv/detail/report.cuh>
#include <packkv/warp/tile_ring.cuh>

namespace packkv::warp {

/// The pages of one side and KV head.
struct side_pages {
  const page_table* table;
  const std::uint8_t* data;  ///< of the head, in page 0
  std::int64_t page_stride;  ///< bytes
  std::int32_t num_pages;
  divisor tiles_per_page;
};
/// Of the keys of a KV head; `tiles_per_page` is the cache's.
__device__ inline side_pages key_pages(const cache_view& cache, const divisor& tiles_per_page, int head) {
  const pages_view& p = cache.pages;
  return {&cache.table, static_cast<const std::uint8_t*>(p.key_data) + head * p.key_head_stride, p.key_page_stride,
          p.num_pages, tiles_per_page};
}
/// Of the values of a KV head.
__device__ inline side_pages value_pages(const cache_view& cache, const divisor& tiles_per_page, int head) {
  const pages_view& p = cache.pages;
  return {&cache.table, static_cast<const std::uint8_t*>(p.value_data) + head * p.value_head_stride,
          p.value_page_stride, p.num_pages, tiles_per_page};
}

/// A tile of a side_stream.
struct side_tile {
  int number;  ///< in the sequence
  bool has_page;
  const std::uint8_t* data;  ///< in shared memory, if it has one
};

/// A warp's stream of tiles of one side, `Stages` of them on their way or in use.
template <int TileBytes, int Stages, copy_engine Engine>
class side_stream {
 public:
  using ring_type = tile_ring<Stages, resolved(Engine), false>;
  using temp_storage = typename ring_type::temp_storage;

  /// `buffers`: Stages * TileBytes of shared memory of this warp, 16-byte aligned. All lanes take part, here and below.
  __device__ side_stream(temp_storage& storage, std::uint8_t* buffers) : ring_(storage, buffers, TileBytes) {}

  /// The tiles first, first + step, ... below `end` of sequence b come next; those before have all been released. Looks
  /// up where the first of them lie, without waiting for it.
  __device__ void open(const side_pages& pages, std::int64_t b, int first, int end, int step) {
    pages_ = pages;
    b_ = b;
    current_ = next_ = first;
    end_ = end;
    step_ = step;
    look_up();
  }
  /// Starts to fetch up to `count` tiles ahead, for a start.
  __device__ void start(int count = Stages) {
#pragma unroll 1
    for (int i = open_; i < count; ++i) request();
  }

  /// Waits for the next tile; false if there is none.
  __device__ bool next(side_tile& tile) {
    if (open_ == 0) return false;
    tile.number = current_;
    current_ += step_;
    tile.has_page = (present_ & 1u) != 0;
    if (tile.has_page) tile.data = ring_.wait();
    return true;
  }
  /// All lanes have read that tile.
  __device__ void release() {
    if ((present_ & 1u) != 0) ring_.release();
    present_ >>= 1;
    --open_;
    request();
  }

  /// Reports what was wrong with the pages since the last time.
  __device__ void report(device_report* to) {
    detail::add_report(to, flags_, 0);
    flags_ = 0;
  }

 private:
  __device__ void request() {
    if (next_ >= end_) return;
    if (lane_ == detail::warp_threads) look_up();
    if ((found_ & 1u) != 0) {
      ring_.request({address_, TileBytes}, {}, 0, lane_);
      present_ |= 1u << open_;
    }
    found_ >>= 1;
    ++lane_;
    ++open_;
    next_ += step_;
  }
  /// Finds where the next 32 tiles lie, a lane each.
  __device__ void look_up() {
    const int tile = next_ + detail::lane_id() * step_, number = pages_.tiles_per_page.quotient(tile);
    std::int32_t page = -1;
    if (tile < end_) page = find_page(*pages_.table, pages_.num_pages, b_, number, flags_);
    if (page >= 0)
      address_ = pages_.data + page * pages_.page_stride +
                 static_cast<std::int64_t>(tile - number * pages_.tiles_per_page.value) * TileBytes;
    found_ = __ballot_sync(detail::all_lanes, page >= 0);
    lane_ = 0;
  }

  ring_type ring_;
  side_pages pages_ = {};
  std::int64_t b_ = 0;
  const std::uint8_t* address_ = nullptr;  ///< of the lane's tile of those looked up
  int current_ = 0, next_ = 0, end_ = 0, step_ = 1;
  int lane_ = 0, open_ = 0;    ///< that looked up the next tile; tiles requested and not released
  std::uint32_t found_ = 0;    ///< bit i: the tile of lane lane_ + i has a page
  std::uint32_t present_ = 0;  ///< bit i: number i of those not released has a page
  std::uint32_t flags_ = 0;
};

}  // namespace packkv::warp
