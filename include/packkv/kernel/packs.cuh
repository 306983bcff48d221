// SPDX-License-Identifier: Apache-2.0
// Kernels that write packs (docs/format-packkv.md), one after another in a stream: ranges in the order of tokens, the
// order, ranges in the order of slots, sizes of tiles, [scan_offsets,] tiles.
// One idea: a code follows from an element and its range, so each kernel computes the codes it needs again, and nothing
// but the result is ever stored.
#pragma once

#include <cstdint>
#include <packkv/codec/pack_format.hpp>
#include <packkv/codec/pack_quantize.hpp>
#include <packkv/detail/report.cuh>

namespace packkv::kernel {

inline constexpr int pack_warps = 4;  ///< of a block of the library's own launches: `Warps` of these kernels

/// One side of a compress into packs, in device memory.
struct pack_args {
  pack_format format;
  side which;
  input_view<4> in;
  pack_side out;
  std::int64_t blocks;
  const std::uint8_t* order;  ///< [blocks][64]: token of each slot; null: token i is slot i
  device_report* report;
};

/// Bits of an element of a block.
__device__ inline std::uint16_t pack_element(const pack_args& a, std::int64_t block, std::int64_t b, int head,
                                             int token, int channel) {
  return *static_cast<const std::uint16_t*>(
      packkv::detail::address(a.in, b, head, block * tile_tokens + token, channel));
}

/// Ranges of a batch row of a block.
__device__ inline pack_range* pack_ranges_of(const pack_args& a, std::int64_t block, std::int64_t b) {
  return a.out.ranges + (block * a.format.batch + b) * range_count(a.format, a.which);
}

/// Code of an element under a range, within 0..255 whatever they are.
__device__ inline int pack_code(const pack_args& a, const pack_range& range, std::uint16_t bits) {
  const dtype element = a.format.element;
  const pack_codec& codec = a.format.codec(a.which);
  const pack_step step = make_pack_step(codec, range_value(element, range.low), range_value(element, range.high));
  const float code = encode_code(codec, step, range_value(element, bits));
  if (!(code > 0.0f)) return 0;
  return static_cast<int>(min_of(code, static_cast<float>(max_pack_code)));
}

/// The token that comes to a slot, within 0..63 whatever the order holds.
__device__ inline int pack_token(const pack_args& a, std::int64_t block, int slot) {
  return a.order != nullptr ? a.order[block * tile_tokens + slot] % tile_tokens : slot;
}

/// Which block, batch row and head a tile is of.
struct pack_place {
  std::int64_t block, b;
  int head;
};
__device__ inline pack_place pack_place_of(const pack_format& f, std::int64_t tile) {
  return {tile / f.kv_heads / f.batch, tile / f.kv_heads % f.batch, static_cast<int>(tile % f.kv_heads)};
}

/// Smallest code of a pack, and width of the others' distance from it.
struct pack_extent {
  int minimum, width;
};

/// codes: of the tile by slot, [64][head_dim].
__device__ inline pack_extent pack_extent_of(const pack_tile& shape, const std::uint8_t* codes, int group,
                                             int channel) {
  const std::uint8_t* const x = codes + group * shape.pack_size * shape.head_dim + channel;
  int low = x[0], high = x[0];
  for (int i = 1; i < shape.pack_size; ++i) {
    low = min_of<int>(low, x[i * shape.head_dim]);
    high = max_of<int>(high, x[i * shape.head_dim]);
  }
  return {low, bit_length(static_cast<std::uint32_t>(high - low))};
}

/// What the threads of a block know about their tile, in shared memory.
struct pack_sizes {
  int min_bits, width_bits;
  int start[tile_tokens / 2 + 1];  ///< word of the payload at which each group begins; behind them the end
};

/// Codes of a tile by slot, [64][head_dim] in shared memory, and its sizes. All threads of the block take part.
template <int Warps>
__device__ inline pack_tile load_pack_tile(const pack_args& a, std::int64_t tile, std::uint8_t* codes,
                                           pack_sizes& sizes) {
  using namespace packkv::detail;
  const pack_place at = pack_place_of(a.format, tile);
  const pack_codec& codec = a.format.codec(a.which);
  const pack_range* const ranges = pack_ranges_of(a, at.block, at.b);
  const int dim = codec.head_dim, thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < tile_tokens * dim; i += Warps * warp_threads) {
    const int slot = i / dim, c = i % dim;
    codes[i] = static_cast<std::uint8_t>(
        pack_code(a, ranges[range_index(codec, at.head, slot, c)],
                  pack_element(a, at.block, at.b, at.head, pack_token(a, at.block, slot), c)));
  }
  if (thread == 0) sizes.min_bits = sizes.width_bits = sizes.start[0] = 0;
  __syncthreads();
  pack_tile shape{a.format.pack_size, dim, 0, 0};
  int min_bits = 0, width_bits = 0;
  for (int g = warp_id(); g < shape.groups(); g += Warps) {
    int widths = 0;
    for (int c = lane_id(); c < dim; c += warp_threads) {
      const pack_extent pack = pack_extent_of(shape, codes, g, c);
      widths += pack.width;
      min_bits = max_of(min_bits, bit_length(static_cast<std::uint32_t>(pack.minimum)));
      width_bits = max_of(width_bits, bit_length(static_cast<std::uint32_t>(pack.width)));
    }
    widths = warp_sum(widths);
    if (lane_id() == 0) sizes.start[g + 1] = shape.group_words(widths);
  }
  atomicMax(&sizes.min_bits, min_bits);
  atomicMax(&sizes.width_bits, width_bits);
  __syncthreads();
  if (thread == 0)
    for (int g = 0; g < shape.groups(); ++g) sizes.start[g + 1] += sizes.start[g];
  __syncthreads();
  shape.min_bits = sizes.min_bits;
  shape.width_bits = sizes.width_bits;
  return shape;
}

/// Appends fields of bits to zeroed words that other threads write to, too.
class field_writer {
 public:
  /// The first field begins `position` bits behind `words`.
  __device__ field_writer(std::uint32_t* words, int position) : word_(words + position / 32), count_(position % 32) {}
  /// `value` has at most `bits` <= 32 bits.
  __device__ void put(std::uint32_t value, int bits) {
    held_ |= static_cast<std::uint64_t>(value) << count_;
    count_ += bits;
    if (count_ < 32) return;
    atomicOr(word_++, static_cast<std::uint32_t>(held_));
    held_ >>= 32;
    count_ -= 32;
  }
  /// Writes what is held.
  __device__ void finish() {
    if (held_ != 0) atomicOr(word_, static_cast<std::uint32_t>(held_));
  }

 private:
  std::uint32_t* word_;
  int count_;  ///< bits of `held_` that are taken, below 32
  std::uint64_t held_ = 0;
};

/// Element (total - 1) / 2 of `total` sorted codes that have been counted. All lanes take part.
__device__ inline int median_code(const std::uint32_t* count, std::int64_t total) {
  using namespace packkv::detail;
  constexpr int bins = (max_pack_code + 1) / warp_threads;
  std::int64_t own = 0;
  for (int i = 0; i < bins; ++i) own += count[lane_id() * bins + i];
  std::int64_t below = warp_prefix_sum(own) - own;
  int smaller = 0;  // codes of this lane that are below the median
  for (int i = 0; i < bins; ++i) {
    below += count[lane_id() * bins + i];
    if (below <= (total - 1) / 2) ++smaller;
  }
  return warp_sum(smaller);
}

/// Smallest and largest element of every group, in the order of tokens; a warp per group. Reports what cannot be coded:
/// a group with an element that is not finite, or whose range overflows a float, gets NaN for a range.
template <int Warps>
__global__ void __launch_bounds__(Warps * 32) find_pack_ranges(const __grid_constant__ pack_args a) {
  using namespace packkv::detail;
  const pack_codec& codec = a.format.codec(a.which);
  const dtype element = a.format.element;
  const int dim = codec.head_dim, heads = a.format.kv_heads;
  const std::int64_t groups = range_count(a.format, a.which), items = a.blocks * a.format.batch * groups;
  std::uint32_t flags = 0;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * Warps + warp_id(); item < items;
       item += static_cast<std::int64_t>(gridDim.x) * Warps) {
    const std::int64_t block = item / groups / a.format.batch, b = item / groups % a.format.batch;
    const int group = static_cast<int>(item % groups);
    int low = 0x7fff, high = -0x8000;
    const auto add = [&](int head, int token, int channel) {
      const std::int16_t x = ordered_bits(pack_element(a, block, b, head, token, channel));
      low = min_of<int>(low, x);
      high = max_of<int>(high, x);
    };
    switch (codec.granularity) {
      case pack_granularity::token:
        for (int i = lane_id(); i < heads * dim; i += warp_threads) add(i / dim, group, i % dim);
        break;
      case pack_granularity::vector:
        for (int c = lane_id(); c < dim; c += warp_threads) add(group / tile_tokens, group % tile_tokens, c);
        break;
      case pack_granularity::channel:
        for (int t = lane_id(); t < tile_tokens; t += warp_threads) add(group / dim, t, group % dim);
        break;
      default:
        for (std::int64_t i = lane_id(); i < std::int64_t{heads} * tile_tokens * dim; i += warp_threads)
          add(static_cast<int>(i / dim / tile_tokens), static_cast<int>(i / dim % tile_tokens),
              static_cast<int>(i % dim));
    }
    for (int m = warp_threads / 2; m > 0; m /= 2) {
      low = min_of(low, shuffle_xor(low, m));
      high = max_of(high, shuffle_xor(high, m));
    }
    if (lane_id() != 0) continue;
    const std::int16_t first = static_cast<std::int16_t>(low), last = static_cast<std::int16_t>(high);
    pack_range range{element_bits(first), element_bits(last)};
    const float largest = range_value(element, range.high);
    const pack_step step = make_pack_step(codec, range_value(element, range.low), largest);
    const bool finite = are_finite_bits(element, first, last);
    if (!finite || !is_finite(step.scale)) {
      flags |= finite ? report_scale_overflow : report_nonfinite_input;
      range.low = range.high = 0x7fff;
    } else if (!(encode_code(codec, step, largest) <= static_cast<float>(max_pack_code))) {
      flags |= report_code_overflow;
    }
    pack_ranges_of(a, block, b)[group] = range;
  }
  detail::add_report(a.report, flags, 0);
}

/// Tokens by their medians, descending, equal ones as they come; the threads of a block share them.
__device__ inline void write_median_order(const int* median, int thread, int threads, std::uint8_t* order) {
  for (int token = thread; token < tile_tokens; token += threads) {
    int slot = 0;  // tokens that come before this one
    for (int t = 0; t < tile_tokens; ++t)
      slot += median[t] > median[token] || (median[t] == median[token] && t < token) ? 1 : 0;
    order[slot] = static_cast<std::uint8_t>(token);
  }
}

/// The order of the tokens of every block, to `order` [blocks][64]; `a` is the V side, its ranges in the order of
/// tokens. A block of threads per block of tokens, a warp per token. token_order::median, or none.
template <int Warps>
__global__ void __launch_bounds__(Warps * 32) order_packs(const __grid_constant__ pack_args a, std::uint8_t* order) {
  using namespace packkv::detail;
  __shared__ std::uint32_t count[Warps][max_pack_code + 1];
  __shared__ int median[tile_tokens];
  const pack_codec& codec = a.format.codec(a.which);
  const int dim = codec.head_dim, heads = a.format.kv_heads, thread = static_cast<int>(threadIdx.x);
  const int channels = a.format.batch * heads * dim;
  std::uint32_t* const mine = count[warp_id()];
  for (std::int64_t block = blockIdx.x; block < a.blocks; block += gridDim.x) {
    for (int t = warp_id(); t < tile_tokens; t += Warps) {
      if (a.format.order == token_order::none) {
        if (lane_id() == 0) median[t] = 0;
        continue;
      }
      for (int i = lane_id(); i <= max_pack_code; i += warp_threads) mine[i] = 0;
      __syncwarp();
      for (int i = lane_id(); i < channels; i += warp_threads) {
        const int b = i / dim / heads, head = i / dim % heads, c = i % dim;
        const pack_range range = pack_ranges_of(a, block, b)[range_index(codec, head, t, c)];
        atomicAdd(&mine[pack_code(a, range, pack_element(a, block, b, head, t, c))], 1u);
      }
      __syncwarp();
      const int value = median_code(mine, channels);
      if (lane_id() == 0) median[t] = value;
      __syncwarp();
    }
    __syncthreads();
    write_median_order(median, thread, Warps * warp_threads, order + block * tile_tokens);
    __syncthreads();
  }
}

/// Reports blocks whose given order does not hold every token once; a warp per block.
template <int Warps>
__global__ void __launch_bounds__(Warps * 32) check_pack_order(const __grid_constant__ pack_args a) {
  using namespace packkv::detail;
  std::uint32_t flags = 0;
  for (std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * Warps + warp_id(); block < a.blocks;
       block += static_cast<std::int64_t>(gridDim.x) * Warps) {
    std::uint32_t seen[2] = {0, 0};
    for (int slot = lane_id(); slot < tile_tokens; slot += warp_threads) {
      const int token = a.order[block * tile_tokens + slot];
      if (token < tile_tokens) seen[token / 32] |= 1u << token % 32;
    }
    if (__reduce_or_sync(all_lanes, seen[0]) != ~0u || __reduce_or_sync(all_lanes, seen[1]) != ~0u)
      flags |= report_order_invalid;
  }
  detail::add_report(a.report, lane_id() == 0 ? flags : 0u, 0);
}

/// Moves the ranges of tokens to their slots; a warp per 64 of them. For granularities token and vector.
template <int Warps>
__global__ void __launch_bounds__(Warps * 32) move_pack_ranges(const __grid_constant__ pack_args a) {
  using namespace packkv::detail;
  const std::int64_t rows = range_count(a.format, a.which) / tile_tokens;
  const std::int64_t items = a.blocks * a.format.batch * rows;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * Warps + warp_id(); item < items;
       item += static_cast<std::int64_t>(gridDim.x) * Warps) {
    const std::int64_t block = item / rows / a.format.batch, b = item / rows % a.format.batch;
    std::uint32_t* const ranges =
        reinterpret_cast<std::uint32_t*>(pack_ranges_of(a, block, b) + item % rows * tile_tokens);
    // Lane l owns entries l and l + 32 from the load to the store; the others see them by shuffles.
    const std::uint32_t first = ranges[lane_id()], second = ranges[lane_id() + warp_threads];
    for (int slot = lane_id(); slot < tile_tokens; slot += warp_threads) {
      const int token = pack_token(a, block, slot);
      const std::uint32_t lower = shuffle(first, token % warp_threads), upper = shuffle(second, token % warp_threads);
      ranges[slot] = token < warp_threads ? lower : upper;
    }
  }
}

/// Bytes of every tile, to offsets[1 + tile]; a block of threads per tile, with head_dim * 64 bytes of dynamic shared
/// memory.
template <int Warps>
__global__ void __launch_bounds__(Warps * 32) measure_packs(const __grid_constant__ pack_args a) {
  __shared__ pack_sizes sizes;
  const std::int64_t tiles = tile_count(a.format, a.blocks);
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const pack_tile shape = load_pack_tile<Warps>(a, tile, packkv::detail::dynamic_shared(), sizes);
    if (threadIdx.x == 0) a.out.offsets[tile + 1] = shape.tile_bytes(sizes.start[shape.groups()]);
    __syncthreads();
  }
}

/// Every tile, to where the offsets say; threads and shared memory as measure_packs.
template <int Warps>
__global__ void __launch_bounds__(Warps * 32) write_packs(const __grid_constant__ pack_args a) {
  using namespace packkv::detail;
  __shared__ pack_sizes sizes;
  const std::uint8_t* const codes = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t tiles = tile_count(a.format, a.blocks);
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const pack_tile shape = load_pack_tile<Warps>(a, tile, packkv::detail::dynamic_shared(), sizes);
    std::uint8_t* const bytes = a.out.data + a.out.offsets[tile];
    for (int i = 16 * thread; i < shape.tile_bytes(sizes.start[shape.groups()]); i += 16 * Warps * warp_threads)
      store16(bytes + i, bytes16{});
    __syncthreads();
    std::uint32_t* const words = reinterpret_cast<std::uint32_t*>(bytes);
    std::uint32_t* const payload = words + shape.payload_offset() / 4;
    if (thread == 0)
      words[0] = static_cast<std::uint32_t>(shape.min_bits) | static_cast<std::uint32_t>(shape.width_bits) << 8;
    if (thread < shape.groups() / 2)
      words[pack_tile::starts_offset / 4 + thread] = static_cast<std::uint32_t>(sizes.start[2 * thread]) |
                                                     static_cast<std::uint32_t>(sizes.start[2 * thread + 1]) << 16;
    for (int g = warp_id(); g < shape.groups(); g += Warps) {
      int begin = 0;  // bit of the group's payload where the packs of the next 32 channels begin
      for (int c = lane_id(); c < shape.head_dim; c += warp_threads) {
        const pack_extent pack = pack_extent_of(shape, codes, g, c);
        const int number = g * shape.head_dim + c, end = warp_prefix_sum(pack.width);
        field_writer width(words + shape.widths_offset() / 4, number * shape.width_bits);
        width.put(static_cast<std::uint32_t>(pack.width), shape.width_bits);
        width.finish();
        field_writer minimum(words + shape.minima_offset() / 4, number * shape.min_bits);
        minimum.put(static_cast<std::uint32_t>(pack.minimum), shape.min_bits);
        minimum.finish();
        field_writer fields(payload + sizes.start[g], begin + (end - pack.width) * shape.pack_size);
        for (int i = 0; i < shape.pack_size; ++i)
          fields.put(static_cast<std::uint32_t>(codes[(g * shape.pack_size + i) * shape.head_dim + c] - pack.minimum),
                     pack.width);
        fields.finish();
        begin += shuffle(end, warp_threads - 1) * shape.pack_size;
      }
    }
    __syncthreads();
  }
}

}  // namespace packkv::kernel
