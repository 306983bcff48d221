// SPDX-License-Identifier: Apache-2.0
// Packs of both sides in one kernel, for granularities token and vector and channels that lie side by side; the order
// of tokens is known. One idea: a block of threads keeps the codes of all heads of a 64-token block in shared memory,
// learns from the blocks before it where its tiles begin, and writes them: input and output move once.
#pragma once

#include <packkv/kernel/packs.cuh>
#include <packkv/warp/offset_chain.cuh>
#include <packkv/warp/pack_group.cuh>
#include <packkv/warp/pack_row.cuh>

namespace packkv::kernel {

inline constexpr int encode_warps = 8;   ///< of a block of encode_packs
inline constexpr int encode_blocks = 3;  ///< that an SM shall hold
inline constexpr int encode_heads = 16;  ///< most heads of a unit

/// Whether encode_packs<.., HeadDim> turns codes into payloads in their place.
PACKKV_HOST_DEVICE constexpr bool stages_in_place(int head_dim) {
  return head_dim != 0 && head_dim <= warp::group_round;
}

/// A unit is the heads of one batch row and block of tokens that a block of threads codes.
struct pack_units {
  int heads, of_row;  ///< heads of a unit, but for the last of a batch row; units of a batch row
  /// most_heads: for less shared memory; a warp's chunk has no more heads either.
  PACKKV_HOST_DEVICE constexpr pack_units(const pack_format& f, side which, int most_heads)
      : heads(min_of(min_of(warp::pack_row_shape(f.codec(which).head_dim).heads(), f.kv_heads), most_heads)),
        of_row((f.kv_heads + heads - 1) / heads) {}
  PACKKV_HOST_DEVICE constexpr std::int64_t count(const pack_format& f, std::int64_t blocks) const {
    return (checked(blocks) * f.batch * of_row).value();
  }
  /// Dynamic shared memory: codes [head][slot][channel], four_packs [head][group][channel / 4], and stages of warps
  /// unless payloads take the place of codes.
  PACKKV_HOST_DEVICE constexpr int code_bytes(int head_dim) const { return heads * tile_tokens * head_dim; }
  PACKKV_HOST_DEVICE constexpr int pack_bytes(int head_dim, int pack_size) const {
    return heads * (tile_tokens / pack_size) * head_dim * 2;
  }
};
constexpr int encode_shared_bytes(const pack_format& f, side which, int most_heads, bool staged_in_place) {
  const pack_units units(f, which, most_heads);
  const int dim = f.codec(which).head_dim;
  return units.code_bytes(dim) + units.pack_bytes(dim, f.pack_size) +
         (staged_in_place ? 0 : encode_warps * warp::group_stage_words(f.pack_size) * 4);
}
static_assert(warp::pack_row_shape(64).heads() == encode_heads, "the smallest head dim has the most heads");

/// One side, and how many units it has; 0: another kernel does it.
struct pack_encode_side {
  pack_args args;
  int most_heads;  ///< of a unit
  std::int64_t units;

  /// Whether its ranges are found by find_row_ranges, because they span more heads than a unit.
  PACKKV_HOST_DEVICE bool ranges_span_units() const {
    return args.format.codec(args.which).granularity == pack_granularity::token &&
           pack_units(args.format, args.which, most_heads).of_row > 1;
  }
};
struct pack_encode_args {
  pack_encode_side key, value;
};

/// The unit of one block of threads, in shared memory.
struct encode_unit {
  std::int64_t number;                           ///< of the launch
  std::int64_t first_tile;                       ///< its number
  std::int64_t begin;                            ///< byte of the first tile
  int start[encode_heads][tile_tokens / 2 + 1];  ///< words of payload before each group; behind them the end
  std::uint32_t bits[encode_heads];              ///< measure_group's
  int bytes[encode_heads];                       ///< of the tiles before; behind them of all
};

/// Zeroes offsets before encode_packs; a thread per word of the longer array.
template <int Threads>
__global__ void __launch_bounds__(Threads)
    clear_offsets(std::int64_t* a, std::int64_t count_a, std::int64_t* b, std::int64_t count_b) {
  packkv::detail::wait_for_kernel_before();
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * Threads + threadIdx.x; i < count_a || i < count_b;
       i += static_cast<std::int64_t>(gridDim.x) * Threads) {
    if (i < count_a) a[i] = 0;
    if (i < count_b) b[i] = 0;
  }
}

/// Ranges of token granularity over all heads, in the order of slots; a warp per token.
template <bool BFloat, int Warps>
__global__ void __launch_bounds__(Warps * 32) find_row_ranges(const __grid_constant__ pack_args a) {
  using namespace packkv::detail;
  std::uint32_t flags = 0;
  const std::int64_t items = a.blocks * a.format.batch * tile_tokens;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * Warps + warp_id(); item < items;
       item += static_cast<std::int64_t>(gridDim.x) * Warps) {
    const std::int64_t block = item / tile_tokens / a.format.batch, b = item / tile_tokens % a.format.batch;
    const int slot = static_cast<int>(item % tile_tokens);
    const pack_codec& codec = a.format.codec(a.which);
    pack_range range = warp::find_token_range<BFloat>(codec, a.in, b, a.format.kv_heads,
                                                      block * tile_tokens + pack_token(a, block, slot));
    (void)thread::make_code_step<BFloat>(codec, range, flags);
    if (lane_id() == 0) warp::store_range(pack_ranges_of(a, block, b) + slot, range);
  }
  add_report(a.report, lane_id() == 0 ? flags : 0u, 0);
}

/// Starts of the groups of a head, its header, and the bytes of its tile; a warp.
template <int PackSize>
__device__ inline int sum_groups(int* start, std::uint32_t bits, int dim) {
  using namespace packkv::detail;
  pack_tile shape{PackSize, dim, bit_length(bits & 0xffu), bit_length(bits >> 8)};
  const int own = lane_id() < shape.groups() ? start[lane_id() + 1] : 0, end = warp_prefix_sum(own);
  if (lane_id() == 0) start[0] = 0;
  if (lane_id() < shape.groups()) start[lane_id() + 1] = end;
  return shape.tile_bytes(shuffle(end, warp_threads - 1));
}

/// What a tile has beside its groups: header, starts, and zeros at the end; a warp.
__device__ inline void write_tile_frame(const pack_tile& shape, const int* start, std::uint32_t* tile) {
  using namespace packkv::detail;
  if (lane_id() == 0)
    tile[0] = static_cast<std::uint32_t>(shape.min_bits) | static_cast<std::uint32_t>(shape.width_bits) << 8;
  if (lane_id() < shape.groups() / 2)
    tile[pack_tile::starts_offset / 4 + lane_id()] =
        static_cast<std::uint32_t>(start[2 * lane_id()]) | static_cast<std::uint32_t>(start[2 * lane_id() + 1]) << 16;
  const int words = start[shape.groups()], end = shape.payload_offset() / 4 + words;
  if (end + lane_id() < shape.tile_bytes(words) / 4) tile[end + lane_id()] = 0;
}

/// Codes of a unit, [head][slot][channel], and the ranges of their slots; a warp per token.
template <bool BFloat, int HeadDim>
__device__ inline void write_unit_codes(const pack_encode_side& s, std::int64_t block, std::int64_t b, int first_head,
                                        int heads, std::uint8_t* codes) {
  using namespace packkv::detail;
  const pack_args& a = s.args;
  const pack_codec& codec = a.format.codec(a.which);
  const int dim = HeadDim != 0 ? HeadDim : codec.head_dim;
  pack_range* const ranges = pack_ranges_of(a, block, b);
  const warp::pack_chunk<BFloat, HeadDim> chunk(codec, a.in, b, first_head, heads);
  const bool of_heads = codec.granularity == pack_granularity::vector, known = s.ranges_span_units();
  std::uint32_t flags = 0;
  // Where the tokens of the warp's slots lie, one a lane. The loads of a token are under way while the one before is
  // coded.
  static_assert(tile_tokens <= encode_warps * warp_threads, "a lane has one slot");
  const int own_slot = warp_id() + encode_warps * lane_id();
  const int own_token = own_slot < tile_tokens ? pack_token(a, block, own_slot) : 0;
  const std::int64_t offsets = chunk.offset(block * tile_tokens + own_token);
  typename warp::pack_chunk<BFloat, HeadDim>::elements x, next{};
  chunk.load_from(shuffle(offsets, 0), next);
#pragma unroll 1  // two at once are slower: 1.35 instead of 1.48 TB/s of elements on an H200, for want of instruction
                  // cache
  for (int i = 0; i < tile_tokens / encode_warps; ++i) {
    const int slot = warp_id() + encode_warps * i;
#pragma unroll
    for (int k = 0; k < warp::pack_row_shape::loads; ++k) x[k] = next[k];
    if (i + 1 < tile_tokens / encode_warps) chunk.load_from(shuffle(offsets, i + 1), next);
    const auto store = [&](int, int head, int channel, const bytes8& c) {
      *reinterpret_cast<bytes8*>(codes + ((head - first_head) * tile_tokens + slot) * dim + channel) = c;
    };
    if (of_heads) {
      chunk.codes_of_heads(x, slot, ranges, flags, store);
    } else {
      pack_range range = known ? ranges[slot] : chunk.range_of_lanes(chunk.extent(x));
      const thread::code_step step = thread::make_code_step<BFloat>(codec, range, flags);
      if (!known && lane_id() == 0) warp::store_range(ranges + slot, range);
      chunk.codes(x, range, step, store);
    }
  }
  // Ranges that are known have been reported.
  add_report(a.report, known ? 0u : flags, 0);
}

/// Codes both sides: a block of threads for each of their units, which take them in ascending order; dynamic shared
/// memory of encode_shared_bytes. Both sides' offsets are zero before (clear_offsets); those of the first side that
/// has units count the blocks that have begun, too, in their first word.
/// HeadDim: of both sides, or 0 for any.
template <bool BFloat, int PackSize, int HeadDim>
__global__ void __launch_bounds__(encode_warps * 32, encode_blocks)
    encode_packs(const __grid_constant__ pack_encode_args args) {
  using namespace packkv::detail;
  __shared__ encode_unit unit;
  constexpr int groups = tile_tokens / PackSize;
  constexpr bool in_place = stages_in_place(HeadDim);
  const int thread = static_cast<int>(threadIdx.x), warp = warp_id();
  touch_parameters(args);
  wait_for_kernel_before();
  if (thread == 0) {
    std::int64_t* const first = args.key.units > 0 ? args.key.args.out.offsets : args.value.args.out.offsets;
    unit.number = atomicInc(reinterpret_cast<unsigned*>(first), gridDim.x - 1);
  }
  if (thread < encode_heads) unit.bits[thread] = 0;
  __syncthreads();
  const bool keys = unit.number < args.key.units;
  const pack_encode_side& side = keys ? args.key : args.value;
  const pack_args& a = side.args;
  const auto number_of_side = [&] { return keys ? unit.number : unit.number - args.key.units; };
  const pack_units units(a.format, a.which, side.most_heads);
  const int dim = HeadDim != 0 ? HeadDim : a.format.codec(a.which).head_dim;
  const std::int64_t number = number_of_side(), row = number / units.of_row, block = row / a.format.batch,
                     b = row % a.format.batch;
  const int first_head = static_cast<int>(number % units.of_row) * units.heads;
  const int heads = min_of(units.heads, a.format.kv_heads - first_head);
  std::uint8_t* const codes = dynamic_shared();
  const auto packs_of = [&](int item) {
    return reinterpret_cast<thread::four_packs*>(codes + units.code_bytes(dim)) + item * (dim / 4);
  };

  if (thread == 0) unit.first_tile = row * a.format.kv_heads + first_head;
  write_unit_codes<BFloat, HeadDim>(side, block, b, first_head, heads, codes);
  __syncthreads();

  for (int item = warp; item < heads * groups; item += encode_warps) {
    const int head = item / groups, g = item % groups;
    std::uint32_t bits = 0;
    const int widths =
        warp::measure_group<PackSize>(codes + (head * tile_tokens + g * PackSize) * dim, dim, packs_of(item), bits);
    if (lane_id() == 0) {
      unit.start[head][g + 1] = pack_tile::words_of(widths * PackSize);
      atomicOr(&unit.bits[head], bits);
    }
  }
  __syncthreads();
  for (int head = warp; head < heads; head += encode_warps) {
    const int bytes = sum_groups<PackSize>(unit.start[head], unit.bits[head], dim);
    if (lane_id() == 0) unit.bytes[head] = bytes;
  }
  __syncthreads();
  const auto entry = [&](std::int64_t i) {
    const int last = min_of((static_cast<int>(i % units.of_row) + 1) * units.heads, a.format.kv_heads);
    return a.out.offsets + i / units.of_row * a.format.kv_heads + last;
  };
  int own = 0, end = 0;  // bytes of the tile of head lane_id(), and where it ends within the unit
  if (warp == 0) {
    own = lane_id() < heads ? unit.bytes[lane_id()] : 0;
    end = warp_prefix_sum(own);
    warp::tell_size(number_of_side(), std::int64_t{shuffle(end, warp_threads - 1)}, entry);
  }
  const auto shape_of = [&](int head) {
    return pack_tile{PackSize, dim, bit_length(unit.bits[head] & 0xffu), bit_length(unit.bits[head] >> 8)};
  };
  if constexpr (in_place)
    for (int item = warp; item < heads * groups; item += encode_warps) {
      const int head = item / groups, g = item % groups;
      warp::stage_group<PackSize>(shape_of(head), unit.start[head][g + 1] - unit.start[head][g],
                                  codes + (head * tile_tokens + g * PackSize) * dim, packs_of(item));
    }
  if (warp == 0) {
    const std::int64_t begin = warp::find_begin(number_of_side(), std::int64_t{shuffle(end, warp_threads - 1)}, entry);
    if (lane_id() == 0) unit.begin = begin;
    if (lane_id() < heads) unit.bytes[lane_id()] = end - own;
    if (lane_id() < heads - 1) a.out.offsets[unit.first_tile + lane_id() + 1] = begin + end;
  }
  __syncthreads();

  for (int item = warp; item < heads * groups; item += encode_warps) {
    const int head = item / groups, g = item % groups;
    const pack_tile shape = shape_of(head);
    std::uint32_t* const tile = reinterpret_cast<std::uint32_t*>(a.out.data + unit.begin + unit.bytes[head]);
    if (g == 0) write_tile_frame(shape, unit.start[head], tile);
    const std::uint8_t* const from = codes + (head * tile_tokens + g * PackSize) * dim;
    const int start = unit.start[head][g];
    if constexpr (in_place)
      warp::write_staged_group(shape, g, start, unit.start[head][g + 1] - start, from, packs_of(item), tile);
    else
      warp::write_group<PackSize>(
          shape, g, start, from, packs_of(item),
          reinterpret_cast<std::uint32_t*>(codes + units.code_bytes(dim) + units.pack_bytes(dim, PackSize)) +
              warp * warp::group_stage_words(PackSize),
          tile);
  }
}

}  // namespace packkv::kernel
