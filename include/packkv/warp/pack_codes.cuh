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

/// Finds and unpacks the packs of a tile, group by group.
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

  /// Bytes behind a tile that are read, too, and do not matter.
  static constexpr int slack_bytes = 16;

  /// Takes a tile of `bytes` bytes, a multiple of 16 and at least 16, in shared memory, 16-byte aligned, with
  /// slack_bytes behind it. False if it contradicts itself (docs/format-packkv.md, end of section 4). All lanes take
  /// part, here and below, and get the same answer. Nothing else is read, whatever the tile holds.
  __device__ bool open(const std::uint8_t* tile, int bytes) {
    using namespace packkv::detail;
    const auto* const words = reinterpret_cast<const std::uint32_t*>(tile);
    const std::uint32_t header = words[0], min_bits = header & 0xffu, width_bits = header >> 8 & 0xffu;
    const pack_tile shape{pack_size, HeadDim, static_cast<int>(min_bits), static_cast<int>(width_bits)};
    if (min_bits > 8 || width_bits > 4 || header >> 16 != 0) return false;
    if (bytes < shape.payload_offset()) return false;
    minima_ = lane_fields(words + shape.minima_offset() / 4, min_bits);
    payload_ = words + shape.payload_offset() / 4;

    std::uint32_t above_8 = 0, above_4 = 0, sum[groups];
    lane_fields widths(words + shape.widths_offset() / 4, width_bits);
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      sum[g] = 0;
#pragma unroll
      for (int k = 0; k < chunks; ++k) {
        const std::uint32_t w = widths.get(k);
        widths_[g][k] = w;
        sum[g] += (w * 0x01010101u) >> 24;
        above_8 |= w + 0x07070707u;  // a width has at most 4 bits; from 9 on the sum has bit 4
        above_4 |= w + 0x0b0b0b0bu;
      }
      widths.next_group();
    }
    bool good = __any_sync(all_lanes, (above_8 & 0x10101010u) != 0 ? 1 : 0) == 0;
    wide_ = __any_sync(all_lanes, (above_4 & 0x10101010u) != 0 ? 1 : 0) != 0 || min_bits == 8;

    std::uint32_t begin = 0;
#pragma unroll
    for (int i = 0; i < groups; i += 2) {  // two groups' sums in a word: each is at most 15 * 256
      const std::uint32_t own = sum[i] | sum[i + 1] << 16, end = warp_prefix_sum(own);
      const std::uint32_t total = shuffle(end, warp_threads - 1);
      // A group's words are its widths' sum in units of 16 bits, rounded up.
      const std::uint32_t middle = begin + ((total & 0xffffu) + 1) / 2;
      good = good && words[1 + i / 2] == (begin | middle << 16);
      position_[i] = 2 * begin + ((end - own) & 0xffffu);
      position_[i + 1] = 2 * middle + ((end - own) >> 16);
      begin = middle + ((total >> 16) + 1) / 2;
    }
    return good && bytes == shape.tile_bytes(static_cast<int>(begin));
  }

  /// Leaves the codes of the next group in `to`: the groups come in order, once each. The caller orders this before and
  /// after what other lanes do with `to`.
  __device__ void unpack(group_codes& to) {
    if (wide_)
      unpack_group<true>(to);
    else
      unpack_group<false>(to);
    minima_.next_group();
#pragma unroll
    for (int g = 0; g + 1 < groups; ++g) {  // registers have constant indices
      position_[g] = position_[g + 1];
#pragma unroll
      for (int k = 0; k < chunks; ++k) widths_[g][k] = widths_[g + 1][k];
    }
  }

 private:
  static constexpr int chunks = (lane_channels + 3) / 4;  ///< of up to four channels of a lane

  /// Fields of the lane's channels, group after group: as a group's are a whole number of words, only the word changes.
  class lane_fields {
   public:
    lane_fields() = default;
    __device__ lane_fields(const std::uint32_t* fields, std::uint32_t bits)
        : position_(static_cast<std::uint32_t>(lane_channels * packkv::detail::lane_id()) * bits),
          bits_(bits),
          word_(fields + position_ / 32),
          spread_(bits, min_of(4, lane_channels)) {}
    /// The fields of channels 4 k .. 4 k + 3 of the lane, a byte each; 0 behind its last channel.
    __device__ std::uint32_t get(int k) const {
      using namespace packkv::detail;
      if constexpr (chunks == 1) {
        return spread_(funnel_shift_right_by_rest(word_[0], word_[1], position_));
      } else {
        const std::uint32_t position = position_ % 32 + 4 * static_cast<std::uint32_t>(k) * bits_;
        const std::uint32_t* const word = word_ + position / 32;
        const std::uint32_t x = spread_(funnel_shift_right_by_rest(word[0], word[1], position));
        return lane_channels - 4 * k >= 4 ? x : x & ((1u << 8 * (lane_channels - 4 * k)) - 1u);
      }
    }
    __device__ void next_group() { word_ += HeadDim / 32 * bits_; }

   private:
    std::uint32_t position_, bits_;  ///< of the lane's first field in a group
    const std::uint32_t* word_;      ///< that it begins in
    packkv::detail::field_spreader spread_;
  };

  /// Wide: widths up to 8, and sums of a minimum and a field that may wrap; otherwise widths up to 4, sums below 256.
  template <bool Wide>
  __device__ void unpack_group(group_codes& to) const {
    using namespace packkv::detail;
    std::uint32_t position = position_[0];
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      constexpr int most = lane_channels < 4 ? lane_channels : 4;
      const int count = min_of(most, lane_channels - 4 * k);
      const std::uint32_t minima = minima_.get(k);
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
  // is as long as it is wide. As many words are read as a pack may take, because conditions would take longer.

  /// Up to 4 bits a field: 8 fields are at most a word.
  struct narrow_pack {
    std::uint32_t low, high;

    __device__ void load(const std::uint32_t* payload, std::uint32_t position, std::uint32_t) {
      using namespace packkv::detail;
      const std::uint32_t* const word = payload + position / 2;
      low = funnel_shift_right_by_rest(word[0], word[1], 16 * position);
      high = funnel_shift_right_by_rest(word[1], word[2], 16 * position);
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
        fields[i] = funnel_shift_right_by_rest(word[0], word[1], bit);
      }
    }
    __device__ void unpack(std::uint32_t width, std::uint32_t minimum, packkv::detail::bytes16& x) const {
      using namespace packkv::detail;
      const field_spreader spread(width);
      std::uint32_t codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[i] = add_bytes(spread(fields[i]), minimum);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        x.word[i] = permute_bytes(codes[i], codes[i + 1], 0x6420);
        x.word[i + 1] = permute_bytes(codes[i], codes[i + 1], 0x7531);
      }
    }
  };

  lane_fields minima_;  ///< of the group that comes next
  const std::uint32_t* payload_ = nullptr;
  bool wide_ = false;
  std::uint32_t position_[groups];        ///< where the lane's packs of it and of those behind it begin, in 16 bits
  std::uint32_t widths_[groups][chunks];  ///< of the lane's channels there, a byte each
};

}  // namespace packkv::warp
