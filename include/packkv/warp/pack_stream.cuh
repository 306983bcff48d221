// SPDX-License-Identifier: Apache-2.0
// The tiles of packs that a warp has to visit, brought into shared memory ahead of their use.
// One idea: tiles differ in size, so two of them share a buffer that holds the largest one: one at its begin, the next
// at its end, as soon as there is room between.
//   pack_stream<bytes, 16, Engine> stream(storage, buffer, packs, number, step, count);   stream.start();
//   while (stream.next(tile, size)) { use it; stream.release(); }
#pragma once

#include <packkv/codec/pack_format.hpp>
#include <packkv/warp/tile_ring.cuh>

namespace packkv::warp {

/// Of one side, or of both: then K and V take turns. With Gap bytes behind each tile that belong to it and hold
/// anything.
template <int Bytes, int Gap, copy_engine Engine, int Sides = 1>
class pack_stream {
 public:
  static constexpr int stages = 2;  ///< tiles under way or in use, at most
  using ring_type = tile_ring<stages, resolved(Engine), false>;
  using temp_storage = typename ring_type::temp_storage;
  static constexpr int buffer_bytes = Bytes + Gap;
  static_assert(Bytes % 16 == 0 && Gap % 16 == 0, "tiles are multiples of 16 bytes");

  /// Where the sides lie, for the life of the stream.
  struct sides {
    const const_pack_side* of[Sides];
  };

  /// The `count` tiles number, number + step, ... of each side. `buffer`:
  /// buffer_bytes of shared memory of this warp, 16-byte aligned. All lanes take part, here and below.
  __device__ pack_stream(temp_storage& storage, std::uint8_t* buffer, const sides& packs, std::int64_t number,
                         std::int64_t step, int count)
      : ring_(storage, buffer, 0),
        buffer_(buffer),
        packs_(packs),
        number_(number),
        step_(step),
        count_(Sides * count) {}
  /// Starts to fetch.
  __device__ void start() {
    packkv::detail::allow_unwritten_reads(buffer_, buffer_bytes);  // gaps
    while (request()) {
    }
  }

  /// Waits for the next tile; false if there is none. `tile` is null if the offsets of the tile, or its size, are not
  /// what they can be; otherwise `bytes`, a multiple of 16, at least 16, lie there.
  __device__ bool next(const std::uint8_t*& tile, int& bytes) {
    if (current_ == count_) return false;
    bytes = held_[0];
    tile = nullptr;
    if (bytes > 0) {
      (void)ring_.wait();
      tile = buffer_ + place_of(current_, bytes);
    }
    return true;
  }
  /// All lanes have read that tile.
  __device__ void release() {
    if (held_[0] > 0) ring_.release();
    held_[0] = held_[1];
    held_[1] = 0;
    ++current_;
    while (request()) {
    }
  }

 private:
  static constexpr int look_ahead = 16;  ///< half a warp: the other half's lanes know tiles that are not yet released

  __device__ static int place_of(int index, int bytes) { return index % 2 == 0 ? 0 : Bytes - bytes; }

  /// Requests the next tile; false if there is none, or no room.
  __device__ bool request() {
    if (requested_ == count_ || requested_ == current_ + stages) return false;
    if (requested_ == known_) look_up();
    const int lane = requested_ % packkv::detail::warp_threads, bytes = packkv::detail::shuffle(bytes_, lane);
    const bool second = requested_ > current_;
    if (bytes > 0) {
      if (second && held_[0] > 0 && held_[0] + bytes > Bytes - Gap) return false;
      ring_.request_to(buffer_ + place_of(requested_, bytes), {from_, bytes}, lane);
    }
    (second ? held_[1] : held_[0]) = bytes;
    ++requested_;
    return true;
  }
  /// Finds where the next tiles lie, a lane each.
  __device__ void look_up() {
    const int lane = packkv::detail::lane_id();
    if (lane / look_ahead == known_ / look_ahead % 2) {
      const int index = known_ + lane % look_ahead;
      bytes_ = 0;
      if (index < count_) {
        const const_pack_side& packs = *packs_.of[Sides == 1 ? 0 : index % Sides];
        const std::int64_t* const offset = packs.offsets + number_ + index / Sides * step_;
        const std::int64_t begin = offset[0], end = offset[1];
        if (begin >= 0 && begin % 16 == 0 && end % 16 == 0 && end > begin && end <= packs.size &&
            end - begin <= Bytes) {
          from_ = packs.data + begin;
          bytes_ = static_cast<int>(end - begin);
        }
      }
    }
    known_ += look_ahead;
  }

  ring_type ring_;
  std::uint8_t* buffer_;
  const sides packs_;
  std::int64_t number_, step_;
  const std::uint8_t* from_ = nullptr;  ///< of the lane's tile: that with its number, modulo 32, among those looked up
  int bytes_ = 0;                       ///< the same; 0: there is no such tile
  int count_, known_ = 0;               ///< tiles; looked up
  int current_ = 0, requested_ = 0;     ///< of the tiles, the first that has not been released, or requested
  int held_[stages] = {};               ///< bytes of tile current_ and of the one behind it, as far as requested
};

}  // namespace packkv::warp
