// SPDX-License-Identifier: Apache-2.0
// The codes of one token of packs whose channels lie side by side, by a warp: granularities token and vector.
// One idea: four 16-byte loads of a lane hold up to 1,024 channels of several heads in registers, from the search for
// the smallest and largest element to the codes, so that memory is read once.
//   warp::pack_row<BFloat> row(codec, in, b, token);
//   row.codes(first_head, heads, {nullptr, ranges, slot}, flags, [&](int k, int head, int channel, bytes8 codes) { .. });
#pragma once

#include <packkv/core/views.hpp>
#include <packkv/thread/pack_codes.cuh>

namespace packkv::warp {

/// Which lane loads which channels: lane l of a head's lanes those from 8 l on.
struct pack_row_shape {
  static constexpr int loads = 4;

  int lanes;          ///< of one head, a power of two; the last may have nothing to load
  int heads_of_load;  ///< heads that one load of the warp covers
  int loads_of_head;  ///< 1, or 2 with 512 channels

  PACKKV_HOST_DEVICE constexpr explicit pack_row_shape(int head_dim)
      : lanes(head_dim <= 64 ? 8 : head_dim <= 128 ? 16 : 32),
        heads_of_load(32 / lanes),
        loads_of_head(head_dim > 256 ? 2 : 1) {}
  /// Heads of a chunk, which is what a warp holds at a time.
  PACKKV_HOST_DEVICE constexpr int heads() const { return loads * heads_of_load / loads_of_head; }
};

/// Where the ranges of a token lie: those of a batch row and block, [range_count()].
struct pack_row_ranges {
  const pack_range* given;  ///< if not null, they are known
  pack_range* found;        ///< else they are found, and written here unless null
  int slot;                 ///< of the token in both
};

template <bool BFloat>
class pack_row {
 public:
  /// in [batch, kv_heads, tokens, D]: contiguous channels, 16-byte aligned rows.
  __device__ pack_row(const pack_codec& codec, const input_view<4>& in, std::int64_t b, std::int64_t token)
      : codec_(codec),
        shape_(codec.head_dim),
        head_stride_(in.stride[1]),
        row_(static_cast<const char*>(packkv::detail::address(in, b, 0, token, 0))) {}

  /// visit(load, head, channel, codes) for 8 codes of `heads` heads from `first_head` on, of which `head` is one: in
  /// every lane that has them; in chunks of shape().heads() heads. Token granularity: all heads, unless ranges are
  /// given. The whole warp takes part; `visit` must not need it.
  template <class Visit>
  __device__ void codes(int first_head, int heads, const pack_row_ranges& ranges, std::uint32_t& flags,
                        Visit&& visit) const {
    using namespace packkv::detail;
    const bool of_heads = codec_.granularity == pack_granularity::vector;
    const bool twice = !of_heads && ranges.given == nullptr && heads > shape_.heads();
    std::uint32_t whole = nothing;
    bytes16 x[pack_row_shape::loads];
    if (twice) {
      for (int h = 0; h < heads; h += shape_.heads()) {
        load(first_head + h, heads - h, x);
        whole = min_floats16<BFloat>(whole, extent(x, heads - h));
      }
      whole = among(whole, warp_threads);
    }
    for (int h = 0; h < heads; h += shape_.heads()) {
      load(first_head + h, heads - h, x);
      // The lane makes the step of load lane % 4 of its head, or that of the token.
      const int own = lane_id() % pack_row_shape::loads, own_head = first_head + h + head_of(own);
      const bool exists = !of_heads || head_of(own) < heads - h;
      const int index = of_heads ? own_head * tile_tokens + ranges.slot : ranges.slot;
      pack_range range;
      std::uint32_t found = 0;
      if (ranges.given != nullptr) {
        if (exists) range = ranges.given[index];
      } else if (of_heads) {
        const std::uint32_t key = extent_of_own(x, heads - h);
        if (exists) range = range_of(key);
      } else {
        range = range_of(twice ? whole : among(extent(x, heads - h), warp_threads));
      }
      const thread::code_step step = thread::make_code_step<BFloat>(codec_, range, found);
      if (ranges.given == nullptr && exists) flags |= found;
      const bool writes = of_heads ? lane_id() % shape_.lanes < pack_row_shape::loads && own % shape_.loads_of_head == 0
                                   : lane_id() == 0 && h == 0;
      if (ranges.given == nullptr && ranges.found != nullptr && exists && writes) ranges.found[index] = range;
#pragma unroll
      for (int k = 0; k < pack_row_shape::loads; ++k) {
        thread::code_step s = step;
        pack_range r = range;
        if (of_heads) {
          const int from = lane_id() / shape_.lanes * shape_.lanes + k;
          s = {shuffle(step.before, from), shuffle(step.inverse, from), shuffle(step.offset, from)};
          const std::uint32_t bits = shuffle(range.low | std::uint32_t{range.high} << 16, from);
          r = {static_cast<std::uint16_t>(bits), static_cast<std::uint16_t>(bits >> 16)};
        }
        if (is_loaded(k, heads - h))
          visit(k, first_head + h + head_of(k), channel_of(k), thread::codes_of<BFloat>(codec_, r, s, x[k]));
      }
    }
  }

  /// Finds the ranges alone, which `codes` would find.
  __device__ void find_ranges(int heads, const pack_row_ranges& ranges, std::uint32_t& flags) const {
    codes(0, heads, ranges, flags, [](int, int, int, const packkv::detail::bytes8&) {});
  }

  __device__ const pack_row_shape& shape() const { return shape_; }

 private:
  /// Smallest element in the low half, and the largest with its sign changed in the high one: both are minima.
  static constexpr std::uint32_t nothing = BFloat ? 0x7f807f80u : 0x7c007c00u;

  __device__ int head_of(int load) const {
    return load / shape_.loads_of_head * shape_.heads_of_load + packkv::detail::lane_id() / shape_.lanes;
  }
  __device__ int channel_of(int load) const {
    return packkv::detail::lane_id() % shape_.lanes * 8 + load % shape_.loads_of_head * 256;
  }
  __device__ bool is_loaded(int load, int heads) const {
    return head_of(load) < heads && channel_of(load) < codec_.head_dim;
  }
  __device__ void load(int first_head, int heads, packkv::detail::bytes16 (&x)[pack_row_shape::loads]) const {
#pragma unroll
    for (int k = 0; k < pack_row_shape::loads; ++k)
      x[k] = is_loaded(k, heads) ? packkv::detail::load16(row_ + (first_head + head_of(k)) * head_stride_ +
                                                          2 * channel_of(k))
                                 : packkv::detail::bytes16{};
  }

  /// Of the lane's elements of one load, or of all.
  __device__ static std::uint32_t extent(const packkv::detail::bytes16& x) {
    using namespace packkv::detail;
    return folded(min_floats16<BFloat>(min_floats16<BFloat>(x.word[0], x.word[1]),
                                       min_floats16<BFloat>(x.word[2], x.word[3])),
                  max_floats16<BFloat>(max_floats16<BFloat>(x.word[0], x.word[1]),
                                       max_floats16<BFloat>(x.word[2], x.word[3])));
  }
  __device__ std::uint32_t extent(const packkv::detail::bytes16 (&x)[pack_row_shape::loads], int heads) const {
    using namespace packkv::detail;
    std::uint32_t low = nothing, high = nothing ^ 0x80008000u;
#pragma unroll
    for (int k = 0; k < pack_row_shape::loads; ++k) {
      if (!is_loaded(k, heads)) continue;
#pragma unroll
      for (const std::uint32_t word : x[k].word) {
        low = min_floats16<BFloat>(low, word);
        high = max_floats16<BFloat>(high, word);
      }
    }
    return folded(low, high);
  }
  __device__ static std::uint32_t folded(std::uint32_t low, std::uint32_t high) {
    using namespace packkv::detail;
    low = min_floats16<BFloat>(low, select_bytes(low, low, 0x1032));
    high = max_floats16<BFloat>(high, select_bytes(high, high, 0x1032));
    return select_bytes(low, high ^ 0x80008000u, 0x5410);
  }
  /// Of `lanes` neighbouring lanes.
  __device__ static std::uint32_t among(std::uint32_t key, int lanes) {
    for (int m = lanes / 2; m > 0; m /= 2)
      key = packkv::detail::min_floats16<BFloat>(key, packkv::detail::shuffle_xor(key, m));
    return key;
  }
  /// Of the head of load lane % 4.
  __device__ std::uint32_t extent_of_own(const packkv::detail::bytes16 (&x)[pack_row_shape::loads], int heads) const {
    using namespace packkv::detail;
    std::uint32_t key[pack_row_shape::loads];
#pragma unroll
    for (int k = 0; k < pack_row_shape::loads; ++k) {
      key[k] = is_loaded(k, heads) ? extent(x[k]) : nothing;
      key[k] = among(key[k], shape_.lanes);
    }
    if (shape_.loads_of_head == 2) {
      key[0] = key[1] = min_floats16<BFloat>(key[0], key[1]);
      key[2] = key[3] = min_floats16<BFloat>(key[2], key[3]);
    }
    const int own = lane_id() % pack_row_shape::loads;
    return own < 2 ? (own == 0 ? key[0] : key[1]) : (own == 2 ? key[2] : key[3]);
  }
  __device__ static pack_range range_of(std::uint32_t key) {
    const std::uint32_t low = key & 0xffffu, high = key >> 16 ^ 0x8000u;
    return {static_cast<std::uint16_t>((low & 0x7fffu) == 0 ? 0 : low),  // both zeros are stored as +0
            static_cast<std::uint16_t>((high & 0x7fffu) == 0 ? 0 : high)};
  }

  const pack_codec& codec_;
  pack_row_shape shape_;
  std::int64_t head_stride_;
  const char* row_;
};

}  // namespace packkv::warp
