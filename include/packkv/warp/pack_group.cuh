// SPDX-License-Identifier: Apache-2.0
// One group of packs of a tile, by a warp: its share of the tile's widths, minima and payload, from codes in shared
// memory. One idea: with channels a multiple of 32, a group's widths and minima fill whole words, and its payload
// begins at one, so that groups never share a word.
//   const int widths = warp::measure_group<16>(codes, dim, packs, bits);
//   warp::write_group<16>(shape, g, start, codes, packs, stage, tile);   // or stage_group, then write_staged_group
#pragma once

#include <packkv/codec/pack_format.hpp>
#include <packkv/thread/pack_fields.cuh>

namespace packkv::warp {

inline constexpr int group_round = 128;  ///< channels that a warp handles at a time, four a lane

/// Words of write_group's `stage`: the fields of a round, and a word that it shares with the one before.
PACKKV_HOST_DEVICE constexpr int group_stage_words(int pack_size) { return pack_size * group_round / 4 + 4; }

/// Sum of the widths of a group's packs, in all lanes; packs [dim / 4] is for write_group. `bits`: all minima, and
/// all widths << 8, ORed together, in all lanes. codes: of the group's first slot, [PackSize][dim].
template <int PackSize>
__device__ inline int measure_group(const std::uint8_t* codes, int dim, thread::four_packs* packs,
                                    std::uint32_t& bits) {
  using namespace packkv::detail;
  int widths = 0;
  std::uint32_t minima = 0, all = 0;
  for (int c = 4 * lane_id(); c < dim; c += group_round) {
    const thread::four_packs x = thread::measure_packs<PackSize>(codes + c, dim);
    packs[c / 4] = x;
    minima |= x.minimum;
    all |= x.width;
    widths += x.widths();
  }
  minima |= minima >> 16;
  all |= all >> 16;
  bits = __reduce_or_sync(all_lanes, ((minima | minima >> 8) & 0xffu) | ((all | all >> 8) & 0xffu) << 8);
  return static_cast<int>(warp_sum_unsigned(static_cast<unsigned>(widths)));
}

/// Writes four bytes of each lane as fields of `bits` <= 8 bits, one lane's behind the other's: `count` whole words.
__device__ inline void write_fields(std::uint32_t bytes, int bits, int count, std::uint32_t* to) {
  using namespace packkv::detail;
  if (bits == 0) return;
  const std::uint32_t own =
      (bytes & 0xffu) | (bytes >> 8 & 0xffu) << bits | (bytes >> 16 & 0xffu) << 2 * bits | bytes >> 24 << 3 * bits;
  // Word `lane` begins `skipped` bits into what lane `first` has.
  // The quotient by the reciprocal, which is right because it is a multiple of 1/16 away from integers.
  const int first =
      static_cast<int>((static_cast<float>(8 * lane_id()) + 0.5f) * reciprocal_fast(static_cast<float>(bits)));
  const int skipped = 32 * lane_id() - 4 * bits * first;
  std::uint32_t word = 0;
#pragma unroll 1
  for (int k = 0; k * bits < 8 + bits; ++k) {
    const std::uint32_t x = shuffle(own, (first + k) % warp_threads);
    const int at = 4 * bits * k - skipped;
    word |= at < 0 ? x >> -at : at < 32 ? x << at : 0u;
  }
  if (lane_id() < count) to[lane_id()] = word;
}

/// The fields of four packs of each lane that `exists`, `begin` bits behind `to`; begin is a multiple of PackSize. Bits
/// that are not written stay as they were with packs of 16 and 32 tokens, else what is written is ORed to them. Wide: a
/// width may be 8. `ready` is called by the whole warp when all codes have been read.
template <int PackSize, bool Wide, class Ready>
__device__ inline void store_fields(bool exists, const std::uint8_t* codes, int dim, const thread::four_packs& packs,
                                    int begin, std::uint32_t* to, Ready&& ready) {
  constexpr int run = PackSize < 16 ? PackSize : 16, count = PackSize / run;
  thread::field_run runs[count][4];
#pragma unroll
  for (int r = 0; r < count; ++r)
    if (exists) thread::fields_of_packs<run, Wide>(codes + r * run * dim, dim, packs, runs[r]);
  ready();
  if (!exists) return;
#pragma unroll
  for (int r = 0; r < count; ++r)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int width = packs.width_of(k), at = begin + packs.widths_before(k) * PackSize + r * run * width;
      if constexpr (PackSize < 16) {
        if (width > 0) thread::or_bits(to, at, runs[r][k].low);
      } else {
        std::uint16_t* const halves = reinterpret_cast<std::uint16_t*>(to) + at / 16;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < width) halves[i] = static_cast<std::uint16_t>(runs[r][k].low >> 16 * i);
        if (width <= 4) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i + 4 < width) halves[i + 4] = static_cast<std::uint16_t>(runs[r][k].high >> 16 * i);
      }
    }
}

/// The widths and minima of a round of group g, from channel `first` on.
__device__ inline void write_packs_of_round(const pack_tile& shape, int g, int first, const thread::four_packs& packs,
                                            std::uint32_t* tile) {
  const int number = g * shape.head_dim + first, words = min_of(shape.head_dim - first, group_round) / 32;
  write_fields(packs.width, shape.width_bits, words * shape.width_bits,
               tile + shape.widths_offset() / 4 + number / 32 * shape.width_bits);
  write_fields(packs.minimum, shape.min_bits, words * shape.min_bits,
               tile + shape.minima_offset() / 4 + number / 32 * shape.min_bits);
}

/// Turns the codes of a group, which are as many bytes as its widest payload, into its payload of `words` words in
/// their place: head dims of one round. codes, packs: as measure_group had and left them.
template <int PackSize>
__device__ inline void stage_group(const pack_tile& shape, int words, std::uint8_t* codes,
                                   const thread::four_packs* packs) {
  using namespace packkv::detail;
  const int c = 4 * lane_id();
  std::uint32_t* const to = reinterpret_cast<std::uint32_t*>(codes);
  const bool exists = c < shape.head_dim;
  const thread::four_packs x = exists ? packs[lane_id()] : thread::four_packs{0, 0};
  const int widths = x.widths(), begin = (warp_prefix_sum(widths) - widths) * PackSize;
  const auto ready = [&] {
    __syncwarp();
    if constexpr (PackSize < 16) {
      for (int i = lane_id(); i < words; i += warp_threads) to[i] = 0;
      __syncwarp();
    } else if (PackSize == 16 && lane_id() == warp_threads - 1 && (begin / PackSize + widths) % 2 != 0) {
      reinterpret_cast<std::uint16_t*>(to)[2 * words - 1] = 0;  // behind the last field
    }
  };
  if (shape.width_bits < 4)
    store_fields<PackSize, false>(exists, codes + c, shape.head_dim, x, begin, to, ready);
  else
    store_fields<PackSize, true>(exists, codes + c, shape.head_dim, x, begin, to, ready);
}

/// Writes group g of a tile from what stage_group left.
__device__ inline void write_staged_group(const pack_tile& shape, int g, int start, int words,
                                          const std::uint8_t* staged, const thread::four_packs* packs,
                                          std::uint32_t* tile) {
  using namespace packkv::detail;
  const bool exists = 4 * lane_id() < shape.head_dim;
  write_packs_of_round(shape, g, 0, exists ? packs[lane_id()] : thread::four_packs{0, 0}, tile);
  const std::uint32_t* const from = reinterpret_cast<const std::uint32_t*>(staged);
  std::uint32_t* const payload = tile + shape.payload_offset() / 4 + start;
#pragma unroll 1
  for (int i = lane_id(); i < words; i += warp_threads) payload[i] = from[i];
}

/// Writes group g of a tile, of any head dim, round after round. codes, packs: as measure_group had and left them;
/// start: word of the payload at which the group begins; stage: group_stage_words(PackSize) words of shared memory of
/// this warp; tile: 4-byte aligned.
template <int PackSize>
__device__ inline void write_group(const pack_tile& shape, int g, int start, const std::uint8_t* codes,
                                   const thread::four_packs* packs, std::uint32_t* stage, std::uint32_t* tile) {
  using namespace packkv::detail;
  const int dim = shape.head_dim;
  std::uint32_t* payload = tile + shape.payload_offset() / 4 + start;
  int taken = 0;  // bits of stage[0] that belong to the round before
  for (int first = 0; first < dim; first += group_round) {
    const int c = first + 4 * lane_id();
    const thread::four_packs x = c < dim ? packs[c / 4] : thread::four_packs{0, 0};
    write_packs_of_round(shape, g, first, x, tile);
    const int widths = x.widths(), end = warp_prefix_sum(widths);
    const int bits = taken + shuffle(end, warp_threads - 1) * PackSize, whole = bits / 32, rest = bits % 32;
    if constexpr (PackSize < 16) {
      for (int i = lane_id() + (taken > 0 ? 1 : 0); i < whole + (rest > 0 ? 1 : 0); i += warp_threads) stage[i] = 0;
      __syncwarp();
    }
    const int begin = taken + (end - widths) * PackSize;
    if (shape.width_bits < 4)
      store_fields<PackSize, false>(c < dim, codes + c, dim, x, begin, stage, [] {});
    else
      store_fields<PackSize, true>(c < dim, codes + c, dim, x, begin, stage, [] {});
    __syncwarp();
    const bool last = first + group_round >= dim;
#pragma unroll 1
    for (int i = lane_id(); i < whole; i += warp_threads) payload[i] = stage[i];
    if (rest > 0 && lane_id() == 0) {
      // What follows has not been written; packs of 16 and 32 tokens end with a half.
      const std::uint32_t begun =
          PackSize < 16 ? stage[whole] : reinterpret_cast<const std::uint16_t*>(stage)[2 * whole];
      if (last)
        payload[whole] = begun;
      else
        stage[0] = begun;
    }
    __syncwarp();
    payload += whole;
    taken = rest;
  }
}

}  // namespace packkv::warp
