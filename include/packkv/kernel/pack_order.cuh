// SPDX-License-Identifier: Apache-2.0
// Kernels that find the orders median and greedy of packs, before encode_packs; a block of threads per block of tokens.
// One idea: codes are made from the elements once more, instead of being stored for the encoder; for a median even that
// is seldom needed (warp/code_boundaries.cuh).
#pragma once

#include <packkv/block/greedy_order.cuh>
#include <packkv/kernel/packs.cuh>
#include <packkv/warp/code_boundaries.cuh>
#include <packkv/warp/pack_row.cuh>

namespace packkv::kernel {

inline constexpr int median_warps = 8;   ///< of a block of order_by_median
inline constexpr int greedy_warps = 16;  ///< of order_by_greed

/// The lower median of the codes of a warp, of which each lane has eight words; `total` of them count, the others are
/// 255. present: those of the lane that count, ORed.
__device__ inline int median_of_words(std::uint32_t (&x)[8], std::int64_t total, std::uint32_t present) {
  using namespace packkv::detail;
  // The greatest m that at most (total - 1) / 2 codes are smaller than, bit by bit.
  const int most = static_cast<int>((total - 1) / 2);
  const int bits = bit_length(__reduce_or_sync(all_lanes, present));
  int median = 0;
  if (bits < 8) {
    // Bit 7 of a byte stays unless its code is below m; what does not count is 127 and never below.
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] |= 0x80808080u;
    for (int bit = 1 << bits >> 1; bit > 0; bit /= 2) {
      const std::uint32_t m = static_cast<std::uint32_t>(median | bit) * 0x01010101u;
      std::uint32_t not_below = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) not_below = dot_bytes((x[i] - m) & 0x80808080u, 0x01010101u, not_below);
      if (8 * 4 * warp_threads - static_cast<int>(warp_sum_unsigned(not_below) >> 7) <= most) median |= bit;
    }
    return median;
  }
  for (int bit = 128; bit > 0; bit /= 2) {
    const std::uint32_t m = static_cast<std::uint32_t>(median | bit) * 0x00010001u;
    std::uint32_t below = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // the same with bit 15 of a half
      const std::uint32_t even = ((x[i] & 0x00ff00ffu) | 0x80008000u) - m;
      const std::uint32_t odd = ((x[i] >> 8 & 0x00ff00ffu) | 0x80008000u) - m;
      below += static_cast<std::uint32_t>(__popc((~even & 0x80008000u) | (~odd & 0x80008000u) >> 1));
    }
    if (static_cast<int>(warp_sum_unsigned(below)) <= most) median |= bit;
  }
  return median;
}

/// The lower median of the codes of a token of `total` elements, of which a warp has loaded all.
template <bool BFloat, class Chunk>
__device__ inline int median_of_token(const Chunk& chunk, const pack_codec& codec, const typename Chunk::elements& x,
                                      int total) {
  using namespace packkv::detail;
  std::uint32_t words[8], present = 0, flags = 0;  // flags: of the encoder, which finds the same
#pragma unroll
  for (int k = 0; k < 8; ++k) words[k] = ~0u;
  const auto keep = [&](int load, int, int, const bytes8& codes) {
#pragma unroll
    for (int k = 0; k < warp::pack_row_shape::loads; ++k)
      if (k == load) {
        words[2 * k] = codes.word[0];
        words[2 * k + 1] = codes.word[1];
      }
    present |= codes.word[0] | codes.word[1];
  };
  if (codec.granularity == pack_granularity::vector) {
    chunk.codes_of_heads(x, 0, nullptr, flags, keep);
  } else {
    pack_range range = chunk.range_of_lanes(chunk.extent(x));
    const thread::code_step step = thread::make_code_step<BFloat>(codec, range, flags);
    const warp::code_boundaries<BFloat> boundaries(codec, range, step);
    if (__builtin_expect(boundaries.known(), 1)) return boundaries.median(x, static_cast<unsigned>(total));
    chunk.codes(x, range, step, keep);
  }
  present |= present >> 16;
  return median_of_words(words, total, (present | present >> 8) & 0xffu);
}

/// The median order of every block, to `order` [blocks][64]; `a` is the V side. HeadDim: its, or 0 for any.
template <bool BFloat, int HeadDim, int Warps>
__global__ void __launch_bounds__(Warps * 32)
    order_by_median(const __grid_constant__ pack_args a, std::uint8_t* order) {
  using namespace packkv::detail;
  using chunk_type = warp::pack_chunk<BFloat, HeadDim>;
  __shared__ int median[tile_tokens];
  wait_for_kernel_before();
  const pack_codec& codec = a.format.codec(a.which);
  const int heads = a.format.kv_heads;
  const chunk_type chunk(codec, a.in, 0, 0, heads);
  for (std::int64_t block = blockIdx.x; block < a.blocks; block += gridDim.x) {
    typename chunk_type::elements x;  // NaN where the lane has nothing to load
#pragma unroll
    for (bytes16& of_load : x) of_load = {{~0u, ~0u, ~0u, ~0u}};
    std::int64_t offset = chunk.offset(block * tile_tokens + warp_id());
#pragma unroll 1
    for (int t = warp_id(); t < tile_tokens; t += Warps, offset += chunk.offset(Warps)) {
      chunk.load_from(offset, x);
      const int value = median_of_token<BFloat>(chunk, codec, x, heads * codec.head_dim);
      if (lane_id() == 0) median[t] = value;
    }
    __syncthreads();
    write_median_order(median, static_cast<int>(threadIdx.x), Warps * warp_threads, order + block * tile_tokens);
    __syncthreads();
  }
}

/// The same for any number of heads and batch rows, by histograms.
template <bool BFloat, int Warps>
__global__ void __launch_bounds__(Warps * 32)
    order_by_counts(const __grid_constant__ pack_args a, std::uint8_t* order) {
  using namespace packkv::detail;
  __shared__ std::uint32_t count[Warps][max_pack_code + 1];
  __shared__ int median[tile_tokens];
  wait_for_kernel_before();
  const pack_codec& codec = a.format.codec(a.which);
  const int heads = a.format.kv_heads;
  const std::int64_t channels = std::int64_t{a.format.batch} * heads * codec.head_dim;
  std::uint32_t* const mine = count[warp_id()];
  for (std::int64_t block = blockIdx.x; block < a.blocks; block += gridDim.x) {
    for (int t = warp_id(); t < tile_tokens; t += Warps) {
      for (int i = lane_id(); i <= max_pack_code; i += warp_threads) mine[i] = 0;
      __syncwarp();
      bytes8 kept[warp::pack_row_shape::loads];
      unsigned present = 0;  // loads that are kept
      const auto keep = [&](int load, int, int, const bytes8& codes) {
#pragma unroll
        for (int k = 0; k < warp::pack_row_shape::loads; ++k)
          if (k == load) kept[k] = codes;
        present |= 1u << load;
      };
      const auto count_kept = [&] {
#pragma unroll
        for (int k = 0; k < warp::pack_row_shape::loads; ++k)
          for (int i = 0; (present >> k & 1u) != 0 && i < 8; ++i) {
            atomicAdd(&mine[kept[k].word[0] & 0xffu], 1u);
            kept[k].word[0] = i == 3 ? kept[k].word[1] : kept[k].word[0] >> 8;
          }
        present = 0;
      };
      for (int b = 0; b < a.format.batch; ++b)
        warp::for_each_code<BFloat>(codec, a.in, b, heads, block * tile_tokens + t, keep, count_kept);
      __syncwarp();
      const int value = median_code(mine, channels);
      __syncwarp();
      if (lane_id() == 0) median[t] = value;
    }
    __syncthreads();
    write_median_order(median, static_cast<int>(threadIdx.x), Warps * warp_threads, order + block * tile_tokens);
    __syncthreads();
  }
}

/// Whether order_by_median does a format: the codes of a token of V fit the registers of a warp.
PACKKV_HOST_DEVICE constexpr bool medians_in_registers(const pack_format& f) {
  return f.batch == 1 && f.kv_heads <= warp::pack_row_shape(f.value.head_dim).heads();
}

/// Both sides for the greedy order; `fast`: by warp::pack_row, else with the ranges that find_pack_ranges wrote.
struct greedy_args {
  pack_args key, value;
  bool key_fast, value_fast;
  std::uint8_t* order;      ///< [blocks][64]
  std::uint8_t* workspace;  ///< greedy_bytes() for each block of threads, if codes do not fit shared memory
};

/// Codes and states of the greedy order that one block of threads keeps in global memory.
PACKKV_HOST_DEVICE constexpr std::int64_t greedy_bytes(const block::code_rows& rows) {
  return rows.bytes() + rows.slabs() * std::int64_t{packkv::detail::warp_threads} * sizeof(block::slab_state);
}

/// Codes of all tokens of a side of a block, to rows of bytes; a warp per token.
template <bool BFloat, int Warps>
__device__ inline void write_code_rows(const pack_args& a, bool fast, std::int64_t block, std::int64_t stride,
                                       std::uint8_t* rows) {
  using namespace packkv::detail;
  const pack_codec& codec = a.format.codec(a.which);
  const int dim = codec.head_dim, heads = a.format.kv_heads;
  for (int t = warp_id(); t < tile_tokens; t += Warps)
    for (int b = 0; b < a.format.batch; ++b) {
      std::uint8_t* const to = rows + t * stride + std::int64_t{b} * heads * dim;
      if (fast) {
        warp::for_each_code<BFloat>(
            codec, a.in, b, heads, block * tile_tokens + t,
            [&](int, int head, int channel, const bytes8& codes) {
              *reinterpret_cast<bytes8*>(to + std::int64_t{head} * dim + channel) = codes;
            },
            [] {});
      } else {
        for (int i = lane_id(); i < heads * dim; i += warp_threads) {
          const pack_range range = pack_ranges_of(a, block, b)[range_index(codec, i / dim, t, i % dim)];
          to[i] = static_cast<std::uint8_t>(pack_code(a, range, pack_element(a, block, b, i / dim, t, i % dim)));
        }
      }
    }
}

/// The greedy order of every block. Shared: codes lie in dynamic shared memory of code_rows::bytes().
template <bool BFloat, bool Shared, int Warps>
__global__ void __launch_bounds__(Warps * 32) order_by_greed(const __grid_constant__ greedy_args a) {
  using namespace packkv::detail;
  __shared__ block::greedy_storage<Shared> storage;
  const block::code_rows rows(a.key.format);
  std::uint8_t* codes;
  block::slab_state* states = nullptr;
  if constexpr (Shared) {
    codes = dynamic_shared();
  } else {
    codes = a.workspace + blockIdx.x * greedy_bytes(rows);
    states = reinterpret_cast<block::slab_state*>(codes + rows.bytes());
  }
  for (std::int64_t block = blockIdx.x; block < a.key.blocks; block += gridDim.x) {
    write_code_rows<BFloat, Warps>(a.key, a.key_fast, block, rows.stride, codes);
    write_code_rows<BFloat, Warps>(a.value, a.value_fast, block, rows.stride, codes + rows.first_value);
    for (int t = warp_id(); t < tile_tokens; t += Warps)
      for (std::int64_t i = rows.channels + 4 * lane_id(); i < rows.stride; i += 4 * warp_threads)
        *reinterpret_cast<std::uint32_t*>(codes + t * rows.stride + i) = 0;
    __syncthreads();
    block::greedy_order<Warps, Shared>(storage, codes, rows, a.key.format.pack_size, states)
        .run(a.order + block * tile_tokens);
    __syncthreads();
  }
}

}  // namespace packkv::kernel
