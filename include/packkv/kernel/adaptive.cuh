// SPDX-License-Identifier: Apache-2.0
// Encodes one side of a sequence to the `strip-adaptive` format, a warp per tile: first the sizes of all tiles, then,
// when a scan has made them offsets, the tiles. Bytes of reference::encode_adaptive.
// One idea: codes are computed again wherever they are needed, so there is no scratch memory.
#pragma once

#include <packkv/kernel/grouped.cuh>
#include <packkv/warp/adaptive_tokens.cuh>

namespace packkv::kernel {

struct adaptive_args {
  adaptive_spec spec;
  adaptive_layout layout;
  input_view<3> x;        ///< [heads, tokens, head_dim], 16-bit
  std::uint8_t* bytes;    ///< channel means are there
  std::int64_t* offsets;  ///< [tiles + 1]
  device_report* report;
};

/// Where a block keeps the numbers that its heads share.
__device__ inline std::uint8_t* shared_numbers_of(const adaptive_args& a, std::int64_t block) {
  return a.bytes + a.layout.shared_offset + block * a.spec.groups.shared_bytes(a.layout.heads);
}

/// Writes numbers of a group to where a tile or a block keeps `count` of them.
__device__ inline void store_numbers(detail::group_numbers n, std::uint16_t* numbers, int count, int index) {
  numbers[index] = n.first;
  numbers[count + index] = n.minimum;
}

/// Numbers that all heads share; a warp per group: a token, or the tokens of a block.
template <int HeadDim>
__global__ void __launch_bounds__(grouped_warps * 32, 1)
    adaptive_shared_numbers(const __grid_constant__ adaptive_args a) {
  using namespace packkv::detail;
  const int count = a.spec.number_count(), run = tile_tokens / count;
  std::uint32_t flags = 0;
  for (std::int64_t first = run * (static_cast<std::int64_t>(blockIdx.x) * grouped_warps + warp_id());
       first < a.layout.coded_tokens; first += run * (static_cast<std::int64_t>(gridDim.x) * grouped_warps)) {
    warp::extremes own;
    bool finite = true;
    for (std::int64_t h = 0; h < a.layout.heads; ++h)
      for (std::int64_t token = first; token < first + run; ++token) {
        float y[HeadDim / 32];
        finite = warp::to_coded_basis<HeadDim>(a.spec.groups, a.bytes, a.x, h, token, y) && finite;
        for (int i = 0; i < HeadDim / 32; ++i) own.add(y[i]);
      }
    const warp::extremes range = own.joined();
    const group_numbers n = warp::bounds_of(range);
    if (lane_id() != 0) continue;
    flags |= report_of(a.spec, n, finite, range.highest);
    std::uint8_t* const numbers = shared_numbers_of(a, first / tile_tokens);
    if (run == tile_tokens) store16(numbers, bytes16{});
    store_numbers(n, reinterpret_cast<std::uint16_t*>(numbers), count,
                  group_index(a.spec, static_cast<int>(first % tile_tokens), 0));
  }
  detail::add_report(a.report, flags, 0);
}

/// One tile in the making, held by a warp.
template <int HeadDim>
class adaptive_tile {
 public:
  static constexpr int registers = HeadDim / 32;
  std::uint32_t flags = 0;  ///< what the groups of the tile have to report

  __device__ adaptive_tile(const adaptive_args& a, std::int64_t tile)
      : a_(a), head_(tile % a.layout.heads), block_(tile / a.layout.heads) {
    if (a_.spec.groups.axis != group_axis::channel) return;
    warp::extremes range[registers];
    bool finite = true;
    for (int t = 0; t < tile_tokens; ++t) {
      float y[registers];
      finite = load(t, y) && finite;
      for (int i = 0; i < registers; ++i) range[i].add(y[i]);
    }
    for (int i = 0; i < registers; ++i) {
      own_[i] = warp::bounds_of(range[i]);
      flags |= report_of(a_.spec, own_[i], finite, range[i].highest);
    }
  }

  /// Numbers of channel lane + 32 i, where a group is a channel.
  __device__ detail::group_numbers own(int i) const { return own_[i]; }

  /// f(slot, numbers of its group unless that is a channel, codes) in order of slots; codes[i] is that of channel
  /// lane + 32 i. All lanes take part.
  template <class Function>
  __device__ void for_each_slot(Function&& f) {
    using namespace packkv::detail;
    const group_axis axis = a_.spec.groups.axis;
    for (int t = 0; t < tile_tokens; ++t) {
      float y[registers];
      const bool finite = load(t, y);
      group_numbers n;
      if (axis == group_axis::vector) {
        warp::extremes own;
        for (int i = 0; i < registers; ++i) own.add(y[i]);
        const warp::extremes range = own.joined();
        n = warp::bounds_of(range);
        flags |= report_of(a_.spec, n, finite, range.highest);
      } else if (a_.spec.groups.shared_numbers()) {
        n = warp::load_numbers(shared_numbers_of(a_, block_), a_.spec.number_count(), group_index(a_.spec, t, 0));
      }
      int codes[registers];
      for (int i = 0; i < registers; ++i)
        codes[i] =
            static_cast<int>(encode_in(a_.spec, values_of(a_.spec, axis == group_axis::channel ? own_[i] : n), y[i]));
      f(t, n, codes);
    }
  }

  /// The strips of the tile, in all lanes, and the least code of the strip of each of this lane's channels.
  __device__ strip_layout measure(int (&base)[registers]) {
    using namespace packkv::detail;
    int high[registers];
    for (int i = 0; i < registers; ++i) {
      base[i] = max_adaptive_code;
      high[i] = 0;
    }
    for_each_slot([&](int, group_numbers, const int(&codes)[registers]) {
      for (int i = 0; i < registers; ++i) {
        base[i] = min_of(base[i], codes[i]);
        high[i] = max_of(high[i], codes[i]);
      }
    });
    strip_widths widths;
    widths.count = a_.spec.strip_count();
    const int wide = HeadDim / widths.count;
    for (int i = 0; i < registers; ++i) {
      for (int mask = wide / 2; mask > 0; mask /= 2) {
        base[i] = min_of(base[i], shuffle_xor(base[i], mask));
        high[i] = max_of(high[i], shuffle_xor(high[i], mask));
      }
      for (int first = 0; first < warp_threads; first += wide)
        widths.width[(32 * i + first) / wide] =
            static_cast<std::uint8_t>(stored_width(shuffle(high[i] - base[i], first)));
    }
    return make_strips(a_.spec.groups.which, HeadDim, widths);
  }

 private:
  __device__ bool load(int slot, float (&y)[registers]) const {
    return warp::to_coded_basis<HeadDim>(a_.spec.groups, a_.bytes, a_.x, head_, block_ * tile_tokens + slot, y);
  }

  const adaptive_args& a_;
  std::int64_t head_, block_;
  detail::group_numbers own_[registers];
};

/// Bytes of tile i to offsets[i + 1]; a warp per tile.
template <int HeadDim>
__global__ void __launch_bounds__(grouped_warps * 32) measure_adaptive(const __grid_constant__ adaptive_args a) {
  using namespace packkv::detail;
  std::uint32_t flags = 0;
  for (std::int64_t tile = static_cast<std::int64_t>(blockIdx.x) * grouped_warps + warp_id(); tile < a.layout.tiles;
       tile += static_cast<std::int64_t>(gridDim.x) * grouped_warps) {
    adaptive_tile<HeadDim> maker(a, tile);
    int base[HeadDim / 32];
    const strip_layout strips = maker.measure(base);
    flags |= maker.flags;
    if (lane_id() == 0) a.offsets[tile + 1] = a.spec.header_bytes() + strips.words * 4 + a.spec.number_bytes();
  }
  detail::add_report(a.report, flags, 0);
}

/// The tiles, when the offsets are there; a warp per tile.
template <int HeadDim>
__global__ void __launch_bounds__(grouped_warps * 32) write_adaptive(const __grid_constant__ adaptive_args a) {
  using namespace packkv::detail;
  constexpr int registers = HeadDim / 32;
  for (std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * grouped_warps + warp_id(); index < a.layout.tiles;
       index += static_cast<std::int64_t>(gridDim.x) * grouped_warps) {
    adaptive_tile<HeadDim> maker(a, index);
    int base[registers];
    const strip_layout strips = maker.measure(base);
    std::uint8_t* const tile = a.bytes + a.offsets[index];
    auto* const words = reinterpret_cast<std::uint32_t*>(tile + a.spec.header_bytes());
    auto* const numbers = reinterpret_cast<std::uint16_t*>(words + strips.words);
    const int count = a.spec.number_count();
    for (int i = 16 * lane_id(); i < a.spec.header_bytes() + strips.words * 4; i += 16 * warp_threads)
      store16(tile + i, bytes16{});
    __syncwarp();
    for (int i = 0; i < registers; ++i) {
      const int c = lane_id() + 32 * i, strip = c / strips.channels;
      if (c % strips.channels == 0) {
        tile[strip] = strips.width[strip];
        tile[strips.count + strip] = static_cast<std::uint8_t>(base[i]);
      }
      if (a.spec.groups.axis == group_axis::channel)
        store_numbers(maker.own(i), numbers, count, group_index(a.spec, 0, c));
    }
    maker.for_each_slot([&](int slot, group_numbers n, const int(&codes)[registers]) {
      for (int i = 0; i < registers; ++i) {
        const code_writes writes =
            split_code(locate(strips, slot, lane_id() + 32 * i), static_cast<std::uint32_t>(codes[i] - base[i]));
        for (int w = 0; w < writes.count; ++w)
          if (writes.write[w].bits != 0) atomicOr(words + writes.write[w].word, writes.write[w].bits);
      }
      if (a.spec.groups.axis == group_axis::vector && lane_id() == 0)
        store_numbers(n, numbers, count, group_index(a.spec, slot, 0));
    });
  }
}

}  // namespace packkv::kernel
