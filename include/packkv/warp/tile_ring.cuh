// SPDX-License-Identifier: Apache-2.0
// Brings a warp's tiles into shared memory ahead of their use: a ring of stages of the warp's own.
// One idea: a request starts a copy into a free stage and returns; wait() gives the oldest one when it has arrived.
//   tile_ring<3, copy_engine::bulk> ring(storage, buffers, stage_bytes);
//   for (i = 0; i < 3 && i < n; ++i) ring.request({key(i), key_bytes}, {value(i), value_bytes});
//   for (i = 0; i < n; ++i) { use(ring.wait()); ring.release(); if (i + 3 < n) ring.request(...); }
#pragma once

#include <packkv/detail/async.cuh>
#include <utility>

namespace packkv::warp {

/// Who copies: the bulk copy engine (sm_90 and later; one lane starts a whole tile) or cp.async (sm_80 and later; every
/// lane copies 16 bytes at a time).
enum class copy_engine {
  bulk,
  per_thread,
  best,  ///< the first of these that the architecture has
};

/// The engine that a kernel compiled for this architecture uses.
__device__ constexpr copy_engine resolved(copy_engine engine) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return engine == copy_engine::best ? copy_engine::per_thread : engine;
#else
  return engine == copy_engine::best ? copy_engine::bulk : engine;
#endif
}

/// A piece of global memory: 16-byte aligned, a multiple of 16 bytes (as tiles are), or nothing.
struct copy_source {
  const void* data = nullptr;
  int bytes = 0;
};

/// A ring of `Stages` buffers in shared memory, of one warp; Tagged: whether a number comes with each.
template <int Stages, copy_engine Engine, bool Tagged = true>
class tile_ring {
 public:
  static_assert(Stages >= 1 && Stages <= 8, "a ring has 1 to 8 stages");
  /// In shared memory, of one warp.
  struct temp_storage {
    detail::mbarrier full[Engine == copy_engine::bulk ? Stages : 1];  // unused by per_thread
    std::int32_t tag[Tagged ? Stages : 1];
  };

  /// `buffers`: Stages * stage_bytes of shared memory, 16-byte aligned, stage_bytes a multiple of 16. All lanes take
  /// part, here and below.
  __device__ tile_ring(temp_storage& storage, std::uint8_t* buffers, int stage_bytes)
      : storage_(storage), buffers_(buffers), stage_bytes_(stage_bytes) {
    if constexpr (Engine == copy_engine::bulk) {
      if (detail::lane_id() == 0) {
        for (int s = 0; s < Stages; ++s) storage_.full[s].init(1);
        detail::fence_barrier_init();
      }
      __syncwarp();
    }
  }

  /// Starts to copy both pieces, one behind the other, into the stage after the last requested. At most Stages requests
  /// are not released. The pieces together are at most stage_bytes, and the first is not empty. `tag` comes back with
  /// them. Where the pieces lie need only be right in lane `lane`.
  __device__ void request(copy_source first, copy_source second = {}, std::int32_t tag = 0, int lane = 0) {
    start(buffers_ + stage_of(requested_) * stage_bytes_, first, second, tag, lane);
  }
  /// The same of one piece to a place of the caller's choice, 16-byte aligned, where nothing lies that has been
  /// requested and not released. For pieces of many sizes: what wait() returns is of no use then.
  __device__ void request_to(std::uint8_t* to, copy_source piece, int lane = 0) { start(to, piece, {}, 0, lane); }

  /// The oldest requested tile that has not been released, when it is there.
  __device__ const std::uint8_t* wait() {
    if constexpr (Engine == copy_engine::bulk) {
      storage_.full[stage_of(used_)].wait(used_ / Stages % 2);
    } else {
      wait_for_oldest(std::make_integer_sequence<int, Stages>{});
      __syncwarp();  // the bytes of the other lanes
    }
    return buffers_ + stage_of(used_) * stage_bytes_;
  }
  /// The tag of that tile.
  __device__ std::int32_t tag() const {
    static_assert(Tagged, "this ring keeps no tags");
    return storage_.tag[stage_of(used_)];
  }
  /// Tiles that are requested and not released.
  __device__ int waiting() const { return static_cast<int>(requested_ - used_); }

  /// Frees that tile's stage for the next request: all lanes have read what they need.
  __device__ void release() {
    __syncwarp();
    ++used_;
  }

 private:
  /// Where the copy of a request goes, by the number of the request.
  __device__ static int stage_of(unsigned request) { return static_cast<int>(request % Stages); }

  __device__ void start(std::uint8_t* to, copy_source first, copy_source second, std::int32_t tag, int lane) {
    // An address that is the same in all lanes and one elected lane cost less than a branch to the lane that has it.
    first.data = of_lane(first.data, lane);
    if (second.bytes > 0) second.data = of_lane(second.data, lane);
    if (detail::elected()) {
      if constexpr (Tagged) storage_.tag[stage_of(requested_)] = tag;
      if constexpr (Engine == copy_engine::bulk) {
        detail::mbarrier& full = storage_.full[stage_of(requested_)];
        full.arrive_expect(static_cast<unsigned>(first.bytes + second.bytes));
        detail::bulk_copy(to, first.data, static_cast<unsigned>(first.bytes), full);
        if (second.bytes > 0)
          detail::bulk_copy(to + first.bytes, second.data, static_cast<unsigned>(second.bytes), full);
      }
    }
    if constexpr (Engine == copy_engine::per_thread) {
      copy(to, first);
      copy(to + first.bytes, second);
      detail::commit_copies();
    }
    ++requested_;
  }

  __device__ static const void* of_lane(const void* p, int lane) {
    return reinterpret_cast<const void*>(detail::shuffle(reinterpret_cast<std::uintptr_t>(p), lane));
  }
  __device__ static void copy(std::uint8_t* to, copy_source from) {
    for (int i = 16 * detail::lane_id(); i < from.bytes; i += 16 * detail::warp_threads)
      detail::copy_async<16>(to + i, static_cast<const char*>(from.data) + i);
  }
  /// All groups but the `waiting() - 1` latest; how many is a constant of the instruction.
  template <int... Latest>
  __device__ void wait_for_oldest(std::integer_sequence<int, Latest...>) {
    ((waiting() == Latest + 1 ? detail::wait_copies<Latest>() : void()), ...);
  }

  temp_storage& storage_;
  std::uint8_t* buffers_;
  int stage_bytes_;
  unsigned requested_ = 0, used_ = 0;  ///< tiles so far
};

}  // namespace packkv::warp
