// SPDX-License-Identifier: Apache-2.0
// Tokens of the `strip-adaptive` format, by warps.
//   adaptive_source source{spec, layout, bytes, size, offsets, tail};   // a token source, see token_source.cuh
#pragma once

#include <packkv/codec/adaptive_quantize.hpp>
#include <packkv/codec/pages.hpp>
#include <packkv/warp/grouped_tokens.cuh>

namespace packkv::warp {

/// Numbers of the group of an element, from where a tile or a block keeps `count` of them.
__device__ inline detail::group_numbers load_numbers(const std::uint8_t* numbers, int count, int index) {
  return {stored_half(numbers, 2 * index), stored_half(numbers, 2 * (count + index))};
}

/// One side of one sequence. Tiles whose offsets or headers are damaged read as NaN and set report_tile_damaged; no
/// byte outside a tile is read.
struct adaptive_source {
  adaptive_spec spec;
  adaptive_layout layout;
  const std::uint8_t* bytes;
  std::int64_t size;  ///< bytes that may be read
  const std::int64_t* offsets;
  input_view<4> tail;

  PACKKV_HOST_DEVICE std::int64_t coded_tokens() const { return layout.coded_tokens; }

  /// Loads the tokens of a tile, see token_source.cuh.
  template <int HeadDim>
  class reader {
   public:
    __device__ reader(const adaptive_source& source, std::int64_t, int head, std::int64_t tile, std::uint32_t& flags)
        : source_(source), head_(head) {
      const std::int64_t index = tile * source.layout.heads + head;
      valid_ = open(source.offsets[index], source.offsets[index + 1]);
      if (!valid_) flags |= report_tile_damaged;
      count_ = source.spec.number_count();
      if (source.spec.groups.shared_numbers())
        numbers_ =
            source.bytes + source.layout.shared_offset + tile * source.spec.groups.shared_bytes(source.layout.heads);
    }

    __device__ void load(int slot, float (&x)[HeadDim / 32]) const {
      using namespace packkv::detail;
      const adaptive_spec& format = source_.spec;
      for (int i = 0; i < HeadDim / 32; ++i) {
        x[i] = nan_float();
        if (!valid_) continue;
        const int c = lane_id() + 32 * i;
        const std::uint32_t base = header_[strips_.count + c / strips_.channels];
        const group_values v = values_of(format, load_numbers(numbers_, count_, group_index(format, slot, c)));
        x[i] = decode_in(format, v, base + read_code(words_, locate(strips_, slot, c)));
      }
      to_original_basis<HeadDim>(format.groups, source_.bytes, head_, x);
    }

   private:
    /// Checks the tile from byte `begin` to byte `end`; the same answer in all lanes.
    __device__ bool open(std::int64_t begin, std::int64_t end) {
      const adaptive_spec& format = source_.spec;
      const int fixed = format.header_bytes() + format.number_bytes();
      if (begin < source_.layout.tiles_offset || begin % 16 != 0 || end > source_.size || end - begin < fixed)
        return false;
      header_ = source_.bytes + begin;
      for (int i = 0; i < format.strip_count(); ++i)
        if (!is_plan_width(header_[i])) return false;
      strips_ = detail::strips_of(format, header_);
      words_ = reinterpret_cast<const std::uint32_t*>(header_ + format.header_bytes());
      numbers_ = header_ + format.header_bytes() + strips_.words * 4;
      return end - begin == fixed + strips_.words * 4;
    }

    const adaptive_source& source_;
    int head_;
    const std::uint8_t* header_ = nullptr;
    const std::uint32_t* words_ = nullptr;
    const std::uint8_t* numbers_ = nullptr;
    int count_ = 0;
    strip_layout strips_;
    bool valid_ = false;
  };
};

/// Checks what the host can see of a view and makes the source that kernels of this head dim read.
inline status make_source(const adaptive_view& view, int head_dim, adaptive_source& source) {
  adaptive_layout l;
  if (const status s = detail::check_adaptive_view(view, l); !s) return s;
  if (const status s = detail::check_head_dim(view.spec.groups, head_dim); !s) return s;
  source = {view.spec,
            l,
            view.bytes,
            view.size,
            view.offsets,
            make_input<4>(view.bytes + l.tail_offset, view.tail_type,
                          {1, view.heads, view.tokens - l.coded_tokens, head_dim})};
  return {};
}

}  // namespace packkv::warp
