// SPDX-License-Identifier: Apache-2.0
// A warp unpacks a tile of packs of 16 tokens into bytes, for matrix instructions.
// One idea: a lane owns neighbouring channels, whose widths and minima are then one word each; and 8 fields of up to 4
// bits are one word, which shifts and permutations turn into bytes whatever the width.
//   pack_codes<128> codes;   if (codes.open(tile, bytes)) for (int g = 0; g < codes.groups; ++g) codes.unpack(storage);
#pragma once

#include <packkv/codec/pack_format.hpp>
#include <packkv/detail/bits.cuh>
#include <type_traits>

namespace packkv::warp {

/// Codes of a group of 16 slots in shared memory, 16 bytes for each channel.
template <int HeadDim>
struct pack_group_codes {
  static constexpr int lane_channels = HeadDim / packkv::detail::warp_threads;
  packkv::detail::bytes16 of[lane_channels][packkv::detail::warp_threads];

  /// The channel at of[j][lane].
  PACKKV_HOST_DEVICE static constexpr int channel(int j, int lane) { return lane_channels * lane + j; }
  /// The slot, of the group's 16, whose code is byte `i` of a channel.
  PACKKV_HOST_DEVICE static constexpr int slot_of(int i) { return i / 8 * 8 + i % 4 * 2 + i / 4 % 2; }
  /// The byte that holds the code of a slot.
  PACKKV_HOST_DEVICE static constexpr int byte_of(int slot) { return slot / 8 * 8 + slot % 2 * 4 + slot % 8 / 2; }
};

template <int HeadDim>
class pack_codes {
 public:
  static_assert(HeadDim % 32 == 0 && HeadDim >= 64 && HeadDim <= 256, "a lane holds 2 to 8 channels");
  using group_codes = pack_group_codes<HeadDim>;
  static constexpr int lane_channels = group_codes::lane_channels;
  static constexpr int pack_size = 16, groups = tile_tokens / pack_size;
  /// Of the largest tile, whatever it holds.
  static constexpr int max_tile_bytes =
      pack_tile{pack_size, HeadDim, 8, 4}.tile_bytes(groups * (8 * HeadDim * pack_size / 32));

  /// Takes a tile of `bytes` bytes, a multiple of 16 and at least 16, in shared memory, 16-byte aligned. False if it
  /// contradicts itself (docs/format-packkv.md, end of section 4). All lanes take part, here and below, and get the
  /// same answer. Nothing outside the tile is read, whatever it holds.
  __device__ bool open(const std::uint8_t* tile, int bytes) {
    using namespace packkv::detail;
    const auto* const words = reinterpret_cast<const std::uint32_t*>(tile);
    const std::uint32_t header = words[0];
    const pack_tile shape{pack_size, HeadDim, static_cast<int>(header & 0xffu), static_cast<int>(header >> 8 & 0xffu)};
    if (shape.min_bits > 8 || shape.width_bits > 4 || header >> 16 != 0) return false;
    if (bytes < shape.payload_offset()) return false;
    min_bits_ = header & 0xffu;
    minima_ = words + shape.minima_offset() / 4;
    payload_ = words + shape.payload_offset() / 4;
    group_ = 0;

    std::uint32_t above_8 = 0, above_4 = 0, sum[groups];
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      sum[g] = 0;
#pragma unroll
      for (int k = 0; k < chunks; ++k) {
        const std::uint32_t w = read_fields(words + shape.widths_offset() / 4, g, k, header >> 8 & 0xffu);
        widths_[g][k] = w;
        sum[g] += (w * 0x01010101u) >> 24;
        above_8 |= w + 0x07070707u;  // a width has at most 4 bits; from 9 on the sum has bit 4
        above_4 |= w + 0x0b0b0b0bu;
      }
    }
    bool good = __any_sync(all_lanes, (above_8 & 0x10101010u) != 0 ? 1 : 0) == 0;
    wide_ = __any_sync(all_lanes, (above_4 & 0x10101010u) != 0 ? 1 : 0) != 0 || min_bits_ == 8;

    int begin = 0;
#pragma unroll
    for (int i = 0; i < groups; i += 2) {  // two groups' sums in a word: each is at most 15 * 256
      const std::uint32_t own = sum[i] | sum[i + 1] << 16, end = warp_prefix_sum(own);
      const std::uint32_t total = shuffle(end, warp_threads - 1), starts = words[1 + i / 2];
      const int first = static_cast<int>(total & 0xffffu), second = static_cast<int>(total >> 16);
      const int middle = begin + shape.group_words(first);
      good = good && starts == (static_cast<std::uint32_t>(begin) | static_cast<std::uint32_t>(middle) << 16);
      position_[i] = 2 * static_cast<std::uint32_t>(begin) + ((end - own) & 0xffffu);
      position_[i + 1] = 2 * static_cast<std::uint32_t>(middle) + ((end - own) >> 16);
      begin = middle + shape.group_words(second);
    }
    return good && bytes == shape.tile_bytes(begin);
  }

  /// Leaves the codes of the next group in `to`: the groups come in order, once each. The caller orders this before and
  /// after what other lanes do with `to`.
  __device__ void unpack(group_codes& to) {
    if (wide_)
      unpack_group<true>(to);
    else
      unpack_group<false>(to);
    ++group_;
#pragma unroll
    for (int g = 0; g + 1 < groups; ++g) {  // registers have constant indices
      position_[g] = position_[g + 1];
#pragma unroll
      for (int k = 0; k < chunks; ++k) widths_[g][k] = widths_[g + 1][k];
    }
  }

 private:
  static constexpr int chunks = (lane_channels + 3) / 4;  ///< of up to four channels of a lane

  /// The fields of the lane's channels 4 k .. 4 k + 3 of group g, a byte each; zero behind its last channel.
  __device__ static std::uint32_t read_fields(const std::uint32_t* fields, int g, int k, std::uint32_t bits) {
    using namespace packkv::detail;
    const auto count = static_cast<std::uint32_t>(min_of(4, lane_channels - 4 * k));
    const std::uint32_t position = static_cast<std::uint32_t>(g * HeadDim + lane_channels * lane_id() + 4 * k) * bits;
    const std::uint32_t* const word = fields + position / 32;
    std::uint32_t low = 0, high = 0;
    if (bits > 0) low = word[0];
    if (position % 32 + count * bits > 32) high = word[1];
    const std::uint32_t x = spread_fields(funnel_shift_right_by_rest(low, high, position), bits);
    return count == 4 ? x : x & ((1u << 8 * count) - 1u);
  }

  /// Wide: widths up to 8, and sums of a minimum and a field that may wrap; otherwise widths up to 4, sums below 256.
  template <bool Wide>
  __device__ void unpack_group(group_codes& to) const {
    using namespace packkv::detail;
    std::uint32_t position = position_[0];
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      constexpr int most = lane_channels < 4 ? lane_channels : 4;
      const int count = min_of(most, lane_channels - 4 * k);
      const std::uint32_t minima = read_fields(minima_, group_, k, min_bits_);
      std::uint32_t width[most];
      std::conditional_t<Wide, wide_pack, narrow_pack> words[most];
      // Everything is loaded before anything is stored: the compiler cannot know that it lies apart.
#pragma unroll
      for (int j = 0; j < count; ++j) {
        width[j] = permute_bytes(widths_[0][k], 0, 0x4440u + static_cast<unsigned>(j));
        words[j].load(payload_, position, width[j]);
        position += width[j];
      }
#pragma unroll
      for (int j = 0; j < count; ++j) {
        bytes16 x;
        words[j].unpack(width[j], permute_bytes(minima, 0, 0x1111u * static_cast<unsigned>(j)), x);
        store16(&to.of[4 * k + j][lane_id()], x);
      }
    }
  }

  // The words of a pack, which begins `position` times 16 bits behind the payload's begin: in units of 16 bits, a pack
  // is as long as it is wide. Words that hold nothing of it are not read.

  /// Up to 4 bits a field: 8 fields are at most a word.
  struct narrow_pack {
    std::uint32_t low, high;

    __device__ void load(const std::uint32_t* payload, std::uint32_t position, std::uint32_t width) {
      using namespace packkv::detail;
      const std::uint32_t* const word = payload + position / 2;
      const std::uint32_t end = position % 2 + width;
      std::uint32_t w[3] = {0, 0, 0};
#pragma unroll
      for (std::uint32_t i = 0; i < 3; ++i)
        if (end > 2 * i) w[i] = word[i];
      low = funnel_shift_right_by_rest(w[0], w[1], 16 * position);
      high = funnel_shift_right_by_rest(w[1], w[2], 16 * position);
    }
    __device__ void unpack(std::uint32_t width, std::uint32_t minimum, packkv::detail::bytes16& x) const {
      using namespace packkv::detail;
      const std::uint32_t mask = permute_bytes(0x07030100u, 0x0000000fu, 0x1111u * width);
      // Shifts to the left are products: other units than those of shifts to the right and permutations.
      const std::uint32_t by_pairs = 0x100u >> (2 * width), by_fours = by_pairs * by_pairs;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const std::uint32_t fields = i == 0 ? low : funnel_shift_right(low, high, 8 * width);
        // Four fields to a half, then two to a byte.
        const std::uint32_t halves = permute_bytes(fields, fields * by_fours, 0x7610);
        const std::uint32_t pairs = permute_bytes(halves, halves * by_pairs, 0x7250);
        x.word[2 * i] = (pairs & mask) + minimum;
        x.word[2 * i + 1] = (pairs >> width & mask) + minimum;
      }
    }
  };

  /// Up to 8 bits a field: 4 fields are at most a word.
  struct wide_pack {
    std::uint32_t fields[4];

    __device__ void load(const std::uint32_t* payload, std::uint32_t position, std::uint32_t width) {
      using namespace packkv::detail;
#pragma unroll
      for (std::uint32_t i = 0; i < 4; ++i) {
        const std::uint32_t bit = 16 * position + 4 * width * i;
        const std::uint32_t* const word = payload + bit / 32;
        std::uint32_t w[2] = {0, 0};
        if (width > 0) w[0] = word[0];
        if (bit % 32 + 4 * width > 32) w[1] = word[1];
        fields[i] = funnel_shift_right_by_rest(w[0], w[1], bit);
      }
    }
    __device__ void unpack(std::uint32_t width, std::uint32_t minimum, packkv::detail::bytes16& x) const {
      using namespace packkv::detail;
      std::uint32_t codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[i] = add_bytes(spread_fields(fields[i], width), minimum);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        x.word[i] = permute_bytes(codes[i], codes[i + 1], 0x6420);
        x.word[i + 1] = permute_bytes(codes[i], codes[i + 1], 0x7531);
      }
    }
  };

  const std::uint32_t *minima_ = nullptr, *payload_ = nullptr;
  std::uint32_t min_bits_ = 0;
  bool wide_ = false;
  int group_ = 0;                         ///< that comes next
  std::uint32_t position_[groups];        ///< where the lane's packs of it and of those behind it begin, in 16 bits
  std::uint32_t widths_[groups][chunks];  ///< of the lane's channels there, a byte each
};

}  // namespace packkv::warp
