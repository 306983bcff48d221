// SPDX-License-Identifier: Apache-2.0
// The codes of one token of packs whose channels lie side by side, by a warp: granularities token and vector.
// One idea: four 16-byte loads of a lane hold up to 1,024 channels of several heads in registers, from the search for
// the smallest and largest element to the codes, so that memory is read once.
//   warp::for_each_code<BFloat>(codec, in, b, kv_heads, token, [&](int load, int head, int channel, bytes8 codes) { ..
//   });
#pragma once

#include <packkv/core/views.hpp>
#include <packkv/thread/pack_codes.cuh>

namespace packkv::warp {

/// Which lane loads which channels: lane l of a head's lanes those from 8 l on. Powers of two, kept as exponents.
struct pack_row_shape {
  static constexpr int loads = 4;

  int lane_bits;  ///< 2^lane_bits lanes have one head; the last may have nothing to load
  int load_bits;  ///< 2^load_bits loads have one head: 2 with 512 channels, else 1

  PACKKV_HOST_DEVICE constexpr explicit pack_row_shape(int head_dim)
      : lane_bits(head_dim <= 64    ? 3
                  : head_dim <= 128 ? 4
                                    : 5),
        load_bits(head_dim > 256 ? 1 : 0) {}
  /// Heads of a chunk, which is what a warp holds at a time.
  PACKKV_HOST_DEVICE constexpr int heads() const { return (loads * 32) >> (lane_bits + load_bits); }
  /// What a lane has of a load.
  PACKKV_HOST_DEVICE constexpr int head(int load, int lane) const {
    return ((load >> load_bits) << (5 - lane_bits)) + (lane >> lane_bits);
  }
  PACKKV_HOST_DEVICE constexpr int channel(int load, int lane) const {
    return 8 * lane_within(lane) + 256 * (load & load_bits);
  }
  PACKKV_HOST_DEVICE constexpr int lane_within(int lane) const { return lane & ((1 << lane_bits) - 1); }
};

/// A range as one word; 4-byte aligned.
__device__ inline void store_range(pack_range* to, const pack_range& range) {
  *reinterpret_cast<std::uint32_t*>(to) = range.low | std::uint32_t{range.high} << 16;
}

/// Heads that a warp holds at a time, of any token. Calls are of the whole warp. HeadDim 0: any that formats may have.
template <bool BFloat, int HeadDim = 0>
class pack_chunk {
 public:
  using elements = packkv::detail::bytes16[pack_row_shape::loads];

  /// in [batch, kv_heads, tokens, D]: contiguous channels, 16-byte aligned rows; 0 < heads <= pack_row_shape::heads().
  __device__ pack_chunk(const pack_codec& codec, const input_view<4>& in, std::int64_t b, int first_head, int heads)
      : codec_(codec),
        shape_(HeadDim != 0 ? HeadDim : codec.head_dim),
        first_head_(first_head),
        token_stride_(in.stride[2]),
        head_step_(in.stride[1] << (5 - shape_.lane_bits)),
        data_(static_cast<const char*>(in.data) + b * in.stride[0] +
              (first_head + shape_.head(0, packkv::detail::lane_id())) * in.stride[1] +
              2 * shape_.channel(0, packkv::detail::lane_id())) {
    const int lane = packkv::detail::lane_id(), dim = HeadDim != 0 ? HeadDim : codec.head_dim;
#pragma unroll
    for (int k = 0; k < pack_row_shape::loads; ++k)
      loaded_[k] = shape_.head(k, lane) < heads && shape_.channel(k, lane) < dim;
  }

  /// Loads a token; what the lane does not have stays as it is in x.
  __device__ void load(std::int64_t token, elements& x) const { load_from(offset(token), x); }
  /// Bytes from token 0 to a token. The sum of two is that of the sum of their tokens.
  __device__ std::int64_t offset(std::int64_t token) const { return token * token_stride_; }
  /// load() of the token with this offset.
  __device__ void load_from(std::int64_t offset, elements& x) const {
    const char* const row = data_ + offset;
#pragma unroll
    for (int k = 0; k < pack_row_shape::loads; ++k) {
      const char* const at = row + (shape_.load_bits == 1 ? (k / 2) * head_step_ + (k % 2) * 512 : k * head_step_);
      if (loaded_[k]) x[k] = packkv::detail::load16(at);
    }
  }

  /// Extent of the lane's elements; combine() joins it with another.
  __device__ std::uint32_t extent(const elements& x) const {
    using namespace packkv::detail;
    std::uint32_t low = nothing, high = nothing ^ 0x80008000u;
#pragma unroll
    for (int k = 0; k < pack_row_shape::loads; ++k) {
      if (!loaded_[k]) continue;
#pragma unroll
      for (const std::uint32_t word : x[k].word) {
        low = min_floats16<BFloat>(low, word);
        high = max_floats16<BFloat>(high, word);
      }
    }
    return folded(low, high);
  }
  __device__ static std::uint32_t combine(std::uint32_t a, std::uint32_t b) {
    return packkv::detail::min_floats16<BFloat>(a, b);
  }
  __device__ static pack_range range_of_lanes(std::uint32_t key) { return range_of(among<32>(key)); }

  /// visit(load, head, channel, codes) in every lane that has them, under one range. Elements close to the boundaries
  /// of codes are visited again, with codes that replace the first ones.
  template <class Visit>
  __device__ void codes(const elements& x, const pack_range& range, const thread::code_step& step,
                        Visit&& visit) const {
    const std::uint32_t bits = range.low | std::uint32_t{range.high} << 16, ranges[] = {bits, bits, bits, bits};
    unsigned close = 0;
#pragma unroll
    for (int k = 0; k < pack_row_shape::loads; ++k) visit_load(x, k, step, close, visit);
    divide(close, x, ranges, visit);
  }

  /// The same with a range for each head, which goes to `ranges` [head][64] at `slot` unless null. A lane makes the
  /// step of load lane % 4 of its head.
  template <class Visit>
  __device__ void codes_of_heads(const elements& x, int slot, pack_range* ranges, std::uint32_t& flags,
                                 Visit&& visit) const {
    using namespace packkv::detail;
    const int own = lane_id() % pack_row_shape::loads, group = lane_id() - shape_.lane_within(lane_id());
    const bool exists = own < 2 ? (own == 0 ? loaded_[0] : loaded_[1]) : (own == 2 ? loaded_[2] : loaded_[3]);
    pack_range range = range_of(extent_of_own(x));
    if (!exists) range = {};
    const thread::code_step step = thread::make_code_step<BFloat>(codec_, range, flags);
    if (ranges != nullptr && exists && lane_id() - group < pack_row_shape::loads && (own & shape_.load_bits) == 0)
      store_range(ranges + (first_head_ + shape_.head(own, lane_id())) * tile_tokens + slot, range);
    std::uint32_t range_bits[pack_row_shape::loads];
    unsigned close = 0;
#pragma unroll
    for (int k = 0; k < pack_row_shape::loads; ++k) {
      const thread::code_step s{shuffle(step.before, group + k), shuffle(step.inverse, group + k),
                                shuffle(step.offset, group + k)};
      range_bits[k] = shuffle(range.low | std::uint32_t{range.high} << 16, group + k);
      visit_load(x, k, s, close, visit);
    }
    divide(close, x, range_bits, visit);
  }

  /// Smallest element in the low half, and the largest with its sign changed in the high one, so that both are minima.
  static constexpr std::uint32_t nothing = BFloat ? 0x7f807f80u : 0x7c007c00u;

 private:
  __device__ int head(int load) const { return first_head_ + shape_.head(load, packkv::detail::lane_id()); }
  __device__ int channel(int load) const { return shape_.channel(load, packkv::detail::lane_id()); }

  template <class Visit>
  __device__ void visit_load(const elements& x, int k, const thread::code_step& step, unsigned& close,
                             Visit& visit) const {
    if (!loaded_[k]) return;
    bool divided;
    const packkv::detail::bytes8 codes = thread::codes_of<BFloat>(step, x[k], divided);
    visit(k, head(k), channel(k), codes);
    if (divided) close |= 1u << k;
  }
  /// Visits the loads of `close` again: rare, and one piece of code for all.
  template <class Visit>
  __device__ void divide(unsigned close, const elements& x, const std::uint32_t (&ranges)[pack_row_shape::loads],
                         Visit& visit) const {
#pragma unroll 1
    for (; close != 0; close &= close - 1) {
      const int k = __ffs(static_cast<int>(close)) - 1;
      packkv::detail::bytes16 chosen = x[0];
      std::uint32_t bits = ranges[0];
#pragma unroll
      for (int i = 1; i < pack_row_shape::loads; ++i)
        if (i == k) {
          chosen = x[i];
          bits = ranges[i];
        }
      const pack_range range{static_cast<std::uint16_t>(bits), static_cast<std::uint16_t>(bits >> 16)};
      visit(k, head(k), channel(k), thread::divided_codes<BFloat>(codec_, range, chosen));
    }
  }

  /// Of both halves of two words, of a load, of `Lanes` neighbouring lanes.
  __device__ static std::uint32_t folded(std::uint32_t low, std::uint32_t high) {
    using namespace packkv::detail;
    low = min_floats16<BFloat>(low, select_bytes(low, low, 0x1032));
    high = max_floats16<BFloat>(high, select_bytes(high, high, 0x1032));
    return select_bytes(low, high ^ 0x80008000u, 0x5410);
  }
  __device__ static std::uint32_t extent(const packkv::detail::bytes16& x) {
    using namespace packkv::detail;
    return folded(
        min_floats16<BFloat>(min_floats16<BFloat>(x.word[0], x.word[1]), min_floats16<BFloat>(x.word[2], x.word[3])),
        max_floats16<BFloat>(max_floats16<BFloat>(x.word[0], x.word[1]), max_floats16<BFloat>(x.word[2], x.word[3])));
  }
  template <int Lanes>
  __device__ static std::uint32_t among(std::uint32_t key) {
#pragma unroll
    for (int m = 1; m < Lanes; m *= 2) key = combine(key, packkv::detail::shuffle_xor(key, m));
    return key;
  }
  /// Of the head of load lane % 4.
  __device__ std::uint32_t extent_of_own(const elements& x) const {
    using namespace packkv::detail;
    std::uint32_t key[pack_row_shape::loads];
#pragma unroll
    for (int k = 0; k < pack_row_shape::loads; ++k) {
      key[k] = among<8>(loaded_[k] ? extent(x[k]) : nothing);
#pragma unroll
      for (int bits = 3; bits < 5; ++bits) {
        const std::uint32_t other = shuffle_xor(key[k], 1 << bits);
        if (bits < shape_.lane_bits) key[k] = combine(key[k], other);
      }
    }
    if (shape_.load_bits == 1) {
      key[0] = key[1] = combine(key[0], key[1]);
      key[2] = key[3] = combine(key[2], key[3]);
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
  int first_head_;
  std::int64_t token_stride_, head_step_;  ///< head_step: from a load to that of the next heads
  const char* data_;                       ///< of load 0 of token 0
  bool loaded_[pack_row_shape::loads];
};

/// The range of all heads of a token: token granularity.
template <bool BFloat>
__device__ inline pack_range find_token_range(const pack_codec& codec, const input_view<4>& in, std::int64_t b,
                                              int kv_heads, std::int64_t token) {
  const int most = pack_row_shape(codec.head_dim).heads();
  std::uint32_t key = pack_chunk<BFloat>::nothing;
  for (int h = 0; h < kv_heads; h += most) {
    const pack_chunk<BFloat> chunk(codec, in, b, h, min_of(most, kv_heads - h));
    typename pack_chunk<BFloat>::elements x{};
    chunk.load(token, x);
    key = pack_chunk<BFloat>::combine(key, chunk.extent(x));
  }
  return pack_chunk<BFloat>::range_of_lanes(key);
}

/// visit(load, head, channel, codes) for all heads of a token, whatever their number, as pack_chunk::codes does;
/// finish() after each chunk, when its codes are final. The ranges are found.
template <bool BFloat, class Visit, class Finish>
__device__ inline void for_each_code(const pack_codec& codec, const input_view<4>& in, std::int64_t b, int kv_heads,
                                     std::int64_t token, Visit&& visit, Finish&& finish) {
  const int most = pack_row_shape(codec.head_dim).heads();
  const bool of_heads = codec.granularity == pack_granularity::vector;
  std::uint32_t flags = 0;  // of the encoder, which finds the same
  pack_range range{};
  if (!of_heads && kv_heads > most) range = find_token_range<BFloat>(codec, in, b, kv_heads, token);
  for (int h = 0; h < kv_heads; h += most) {
    const pack_chunk<BFloat> chunk(codec, in, b, h, min_of(most, kv_heads - h));
    typename pack_chunk<BFloat>::elements x{};
    chunk.load(token, x);
    if (of_heads) {
      chunk.codes_of_heads(x, 0, nullptr, flags, visit);
    } else {
      if (kv_heads <= most) range = pack_chunk<BFloat>::range_of_lanes(chunk.extent(x));
      pack_range copy = range;
      const thread::code_step step = thread::make_code_step<BFloat>(codec, copy, flags);
      chunk.codes(x, copy, step, visit);
    }
    finish();
  }
}

}  // namespace packkv::warp
