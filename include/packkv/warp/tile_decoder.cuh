// SPDX-License-Identifier: Apache-2.0
// A warp reconstructs tokens of a tile of a plan that is known at compile time, to the bits of reference::decode_token.
// One idea: a lane has a token, so that no butterfly crosses lanes and lanes work on many sums at once; 32 tokens go
// through shared memory, which turns them into whole lines of output.
//   using decoder = warp::tile_decoder<Codec, false>;   __shared__ decoder::temp_storage storage;
//   decoder::decode(storage, tile, first + lane_id());   __syncwarp();   decoder::store(storage, 32, to, stride, true);
#pragma once

#include <packkv/detail/approx.cuh>
#include <packkv/detail/bits.cuh>
#include <packkv/warp/token_octet.cuh>

namespace packkv::warp {

/// For codecs of which has_tile_encoder holds, without offsets and calibrated steps; BFloat: the output's type.
template <class Codec, bool BFloat>
class tile_decoder {
  using octet = token_octet<Codec>;
  static constexpr int dim = octet::dim, chunks = dim / 8;  ///< of 16 bytes of output, in a token

 public:
  /// Channels that a lane has in floats at a time.
  static constexpr int together = octet::turned ? hadamard_block(dim) : 16;
  /// Of a warp, in shared memory. Rows are 16 bytes apart in the banks: neither lanes with a row each nor lanes with a
  /// chunk of the same row each are in each other's way.
  struct temp_storage {
    alignas(16) std::uint8_t row[detail::warp_threads][2 * dim + 16];
  };

  /// Makes token t of a tile, each lane its own, the lane's row. `tile`: 4-byte aligned, best in shared memory. All
  /// lanes take part, here and below; the caller synchronises the warp before and after rows are stored.
  __device__ static void decode(temp_storage& storage, const std::uint8_t* tile, int t) {
    using namespace packkv::detail;
    const token_codes codes(tile, t);
    for_constants<dim / together>([&](auto group) {
      constexpr int from = decltype(group)::value * together;
      float y[together];
      for_constants<together / 16>([&](auto part) {
        constexpr int p = decltype(part)::value;
        codes.template decode<from / 16 + p>(y + 16 * p);
      });
      if constexpr (octet::turned) hadamard_in_lane<1>(y);
      for (int c = 0; c < together; c += 8) store16(storage.row[lane_id()] + 2 * (from + c), to_16_bits(y + c));
    });
  }
  /// Writes the rows of lanes 0 .. count - 1, at most all, to `to`, `to` + stride, ...: multiples of 8 bytes or, if
  /// `wide`, of 16.
  __device__ static void store(const temp_storage& storage, int count, char* to, std::int64_t stride, bool wide) {
    if (wide && count >= detail::warp_threads)
      store_all_rows(storage, to, stride);
    else
      store_rows(storage, min_of(count, detail::warp_threads), to, stride);
  }

 private:
  class token_codes;

  /// The definition's butterflies, from the stage of `Stride` on, and its scale.
  template <int Stride>
  __device__ static void hadamard_in_lane(float (&y)[together]) {
    using namespace packkv::detail;
    if constexpr (Stride < together) {
#pragma unroll
      for (int i = 0; i < together; ++i)
        if ((i & Stride) == 0) octet::pair(y[i], y[i + Stride]);
      hadamard_in_lane<2 * Stride>(y);
    } else {
#pragma unroll
      for (int i = 0; i < together; ++i) y[i] = mul_rn(y[i], hadamard_scale(together));
    }
  }
  /// Eight channels, rounded.
  __device__ static detail::bytes16 to_16_bits(const float* x) {
    using detail::pack_16bit;
    return {{pack_16bit<BFloat>(x[0], x[1]), pack_16bit<BFloat>(x[2], x[3]), pack_16bit<BFloat>(x[4], x[5]),
             pack_16bit<BFloat>(x[6], x[7])}};
  }

  /// See store.
  __device__ static void store_rows(const temp_storage& storage, int count, char* row, std::int64_t stride) {
    using namespace packkv::detail;
#pragma unroll 1
    for (int i = lane_id(); i < chunks * count; i += warp_threads) {
      const int r = i / chunks, c = i % chunks;
      const bytes16 x = load16(storage.row[r] + 16 * c);
      char* const to = row + r * stride + 16 * c;
      store8(to, {{x.word[0], x.word[1]}});
      store8(to + 8, {{x.word[2], x.word[3]}});
    }
  }
  /// All rows, whole lines at a time.
  __device__ static void store_all_rows(const temp_storage& storage, char* row, std::int64_t stride) {
    using namespace packkv::detail;
    // Every `turns` stores a lane has the chunk of the same number again, `apart` rows further.
    constexpr int turns = warp_threads % chunks == 0 ? 1 : 3, apart = turns * warp_threads / chunks;
    static_assert(apart * chunks == turns * warp_threads, "whole rows");
    for_constants<turns>([&](auto turn) {
      const int i = warp_threads * decltype(turn)::value + lane_id(), r = i / chunks, c = i % chunks;
      const std::uint8_t* const from = storage.row[r] + 16 * c;
      char* to = row + r * stride + 16 * c;
#pragma unroll
      for (int n = 0; n < warp_threads / apart; ++n, to += apart * stride)
        store16_streaming(to, load16(from + n * apart * static_cast<int>(sizeof storage.row[0])));
    });
  }
};

/// The codes of a token, of four channels in the bytes of a register, and its row scale.
template <class Codec, bool BFloat>
class tile_decoder<Codec, BFloat>::token_codes {
  static constexpr bool keys = octet::strips.which == side::key;
  /// Channel of byte j of the i-th four of a block: as a word of keys has them; words of values have two each.
  PACKKV_HOST_DEVICE static constexpr int channel_of(int i, int j) {
    return keys ? 4 * i + j : 2 * i + j / 2 + 8 * (j % 2);
  }

 public:
  __device__ token_codes(const std::uint8_t* tile, int t) : t_(t) {
    using namespace packkv::detail;
    const auto* const words = reinterpret_cast<const std::uint32_t*>(tile);
    for_constants<octet::blocks>([&](auto block) {
      constexpr int b = decltype(block)::value;
      octet::template for_planes<b>([&](auto bits, auto base, auto from) {
        constexpr int width = decltype(bits)::value;
        // A token's fields lie as far from token 0's in all channels.
        const bit_field own = octet::template field<width>(0, t, 0);
        for (int i = 0; i < 4; ++i) {
          const bit_field first = octet::template field<width>(decltype(base)::value, 0, 16 * b + channel_of(i, 0));
          const std::uint32_t* const word = words + own.word + first.word;
          std::uint32_t x = word[0];
          if constexpr (!keys)
            x = permute_bytes(x, word[value_field(width, 0, 0, 1).word], own.bit < 16 ? 0x5410 : 0x7632);
          if constexpr (octet::template width_of<b> == 3) {
            constexpr std::uint32_t low = decltype(from)::value, mask = 0x01010101u * ((1u << width) - 1);
            bytes_[b][i] = (low == 0 ? 0 : bytes_[b][i]) | (x >> (own.bit % 8 + first.bit) & mask) << low;
          } else {
            bytes_[b][i] = x;
          }
        }
      });
    });
    row_ = unpack_halves(reinterpret_cast<const std::uint16_t*>(words + octet::strips.words)[row_slot(t)]).low;
  }
  /// y[c] = decode_element(code of channel c of block Block), before the transform, without conversions and shifts.
  template <int Block>
  __device__ void decode(float* y) const {
    using namespace packkv::detail;
    constexpr int width = octet::template width_of<Block>;
    if constexpr (width == 0) {
      for (int c = 0; c < 16; ++c) y[c] = is_nan(row_) ? row_ : 0.0f;
    } else {
      int bit = 8;  // the lowest of a code whose byte is the second of a word
      if constexpr (width != 3)
        bit += octet::template field<width>(0, t_, 0).bit % 8 + octet::template field<width>(0, 0, 16 * Block).bit;
      // Below the exponent of 2^23 such a word is a float, of which a subtraction leaves what it holds, exactly: the
      // code less its centre, times 2^bit, which the step makes good.
      constexpr std::uint32_t base = 0x4b000000u, ones = (1u << width) - 1;
      const auto centre = bit_cast<float>(base + (ones << (bit - 1)));
      const auto unit = bit_cast<float>(static_cast<std::uint32_t>(127 - bit) << 23);  // 2^-bit
      const float step = mul_rn(row_, gaussian_step(width)) * unit;
      const std::uint32_t mask = 0x01010101u * ones << (bit - 8);
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t bytes = bytes_[Block][i] & mask;
        for_constants<4>([&](auto index) {
          constexpr int j = decltype(index)::value;
          const auto code = bit_cast<float>(permute_bytes(bytes, base, 0x7404u + (j << 4)));
          y[channel_of(i, j)] = mul_rn(sub_rn(code, centre), step);
        });
      }
    }
  }

 private:
  std::uint32_t bytes_[octet::blocks][4];
  float row_;
  int t_;
};

}  // namespace packkv::warp
