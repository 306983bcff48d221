// SPDX-License-Identifier: Apache-2.0
// A warp reads the tokens of a tile of packs, one slot after another. Lane l holds the channels l, l + 32, ...
// One idea: where a channel's pack lies follows from the widths of the channels before it, so a warp finds the bits of
// all channels by prefix sums, once for every group of packs, and keeps them in registers.
//   pack_source::reader<128> tile(source, b, head, tile_index, flags);   tile.load(slot, y);   // slots in order
#pragma once

#include <cstdint>
#include <packkv/codec/pack_format.hpp>
#include <packkv/codec/pack_quantize.hpp>
#include <packkv/codec/pages.hpp>
#include <packkv/detail/cuda.cuh>
#include <type_traits>

namespace packkv::warp {

/// One side of a cache in packs, with the 16-bit tokens behind them: a token source, see token_source.cuh.
struct pack_source {
  pack_format format;
  side which = side::key;
  const_pack_side packs;
  std::int64_t blocks = 0;
  input_view<4> tail;  ///< [batch, kv_heads, tokens, D] of any element type; may be empty

  __host__ __device__ std::int64_t coded_tokens() const { return blocks * tile_tokens; }

  template <int HeadDim>
  class reader;
};
static_assert(std::is_trivially_copyable_v<pack_source>, "an argument of kernels");

/// Reads one tile; made and used by all lanes of a warp together. HeadDim is that of the source's side.
/// Nothing beyond the tile's bytes, or `size`, is read whatever they hold. A tile that contradicts itself
/// (docs/format-packkv.md, end of section 4) reads as NaN, and report_tile_damaged is set, in every lane; ranges are
/// taken as they are.
template <int HeadDim>
class pack_source::reader {
 public:
  static_assert(HeadDim % 32 == 0 && HeadDim > 0 && HeadDim <= max_head_dim, "a lane holds whole channels");
  static constexpr int registers = HeadDim / 32;

  /// Tile `tile`, below source.blocks, of KV head `head` of batch row `b`. `source` must outlive the reader.
  __device__ reader(const pack_source& source, std::int64_t b, int head, std::int64_t tile, std::uint32_t& flags)
      : source_(source),
        codec_(source.format.codec(source.which)),
        shape_{source.format.pack_size, HeadDim, 0, 0},
        head_(head) {
    const std::int64_t row = tile * source.format.batch + b, number = row * source.format.kv_heads + head;
    ranges_ = source.packs.ranges + row * range_count(source.format, source.which);
    valid_ = open(source.packs.offsets[number], source.packs.offsets[number + 1]);
    if (!valid_) flags |= report_tile_damaged;
#pragma unroll
    for (int i = 0; i < registers; ++i) step_[i] = step_of(0, by_channel() ? packkv::detail::lane_id() + 32 * i : 0);
  }

  /// y[i] = x^ of channel lane + 32 i of a slot, 0..63; the bits of reference::decompress. Slots may come in any order,
  /// ascending ones are quick. All lanes take part, with the same slot.
  __device__ void load(int slot, float (&y)[registers]) {
    using namespace packkv::detail;
    if (!valid_) {
#pragma unroll
      for (int i = 0; i < registers; ++i) y[i] = nan_float();
      return;
    }
    if (slot / shape_.pack_size != group_) enter(slot / shape_.pack_size);
    if (by_slot()) step_[0] = step_of(slot, 0);
    const std::uint32_t* const payload = words_ + shape_.payload_offset() / 4;
#pragma unroll
    for (int i = 0; i < registers; ++i) {
      const std::uint32_t field = read_field(payload, position_[i] + slot % shape_.pack_size * width_[i], width_[i]);
      y[i] = decode_code(codec_, by_channel() ? step_[i] : step_[0],
                         static_cast<int>((minimum_[i] + field) % (max_pack_code + 1)));
    }
  }

 private:
  /// The field of `bits` <= 16 bits that begins `position` bits behind `words`; touches no word beyond the field.
  __device__ static std::uint32_t read_field(const std::uint32_t* words, int position, int bits) {
    if (bits == 0) return 0;
    const std::uint32_t* const word = words + position / 32;
    const int shift = position % 32;
    std::uint32_t window = word[0] >> shift;
    if (shift + bits > 32) window |= word[1] << (32 - shift);
    return window & ((1u << bits) - 1u);
  }

  __device__ bool by_channel() const { return codec_.granularity == pack_granularity::channel; }
  __device__ bool by_slot() const {
    return codec_.granularity == pack_granularity::token || codec_.granularity == pack_granularity::vector;
  }
  __device__ pack_step step_of(int slot, int channel) const {
    const pack_range range = ranges_[range_index(codec_, head_, slot, channel)];
    const dtype element = source_.format.element;
    return make_pack_step(codec_, range_value(element, range.low), range_value(element, range.high));
  }

  /// Word of the payload at which a group of packs begins.
  __device__ int start(int group) const {
    return static_cast<int>(read_field(words_ + pack_tile::starts_offset / 4, 16 * group, 16));
  }
  __device__ int width(int group, int channel) const {
    return static_cast<int>(read_field(words_ + shape_.widths_offset() / 4,
                                       (group * HeadDim + channel) * shape_.width_bits, shape_.width_bits));
  }

  /// Checks the tile from byte `begin` to byte `end`; the same answer in all lanes.
  __device__ bool open(std::int64_t begin, std::int64_t end) {
    using namespace packkv::detail;
    if (begin < 0 || begin % 16 != 0 || end < begin || end > source_.packs.size) return false;
    if (end - begin < pack_tile::starts_offset) return false;
    words_ = reinterpret_cast<const std::uint32_t*>(source_.packs.data + begin);
    shape_.min_bits = static_cast<int>(words_[0] & 0xffu);
    shape_.width_bits = static_cast<int>(words_[0] >> 8 & 0xffu);
    if (shape_.min_bits > 8 || shape_.width_bits > 4 || words_[0] >> 16 != 0) return false;
    if (end - begin < shape_.payload_offset()) return false;
    int words = 0;
    bool good = true;
    for (int g = 0; g < shape_.groups(); ++g) {
      good = good && start(g) == words;
      int sum = 0;
#pragma unroll
      for (int i = 0; i < registers; ++i) {
        const int w = width(g, lane_id() + 32 * i);
        good = good && w <= 8;
        sum += w;
      }
      words += shape_.group_words(warp_sum(sum));
    }
    return __all_sync(all_lanes, good) != 0 && end - begin == shape_.tile_bytes(words);
  }

  /// Finds the packs of a group.
  __device__ void enter(int group) {
    using namespace packkv::detail;
    group_ = group;
    int begin = 32 * start(group);
#pragma unroll
    for (int i = 0; i < registers; ++i) {
      const int c = lane_id() + 32 * i;
      width_[i] = width(group, c);
      minimum_[i] =
          read_field(words_ + shape_.minima_offset() / 4, (group * HeadDim + c) * shape_.min_bits, shape_.min_bits);
      const int end = warp_prefix_sum(width_[i]);
      position_[i] = begin + (end - width_[i]) * shape_.pack_size;
      begin += shuffle(end, warp_threads - 1) * shape_.pack_size;
    }
  }

  const pack_source& source_;
  pack_codec codec_;
  pack_tile shape_;
  const pack_range* ranges_ = nullptr;  ///< of the batch row and block
  const std::uint32_t* words_ = nullptr;
  int head_;
  int group_ = -1;  ///< of which the next arrays are
  int position_[registers], width_[registers];
  std::uint32_t minimum_[registers];
  pack_step step_[registers];  ///< by channel; otherwise [0] is that of the slot or block
  bool valid_ = false;
};

}  // namespace packkv::warp
