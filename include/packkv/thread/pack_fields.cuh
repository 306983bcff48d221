// SPDX-License-Identifier: Apache-2.0
// Packs of four channels by one thread: smallest codes and widths, and their fields as bits.
// One idea: four codes of a pack in a word become fields of any width by two dot products with powers of two.
//   const auto q = thread::measure_packs<16>(codes, head_dim);   thread::fields_of_packs<16, false>(codes, head_dim, q,
//   runs);
#pragma once

#include <packkv/detail/packed_bytes.cuh>

namespace packkv::thread {

/// Bytes of four neighbouring channels' packs.
struct four_packs {
  std::uint32_t minimum, width;

  __device__ int minimum_of(int k) const { return static_cast<int>(minimum >> 8 * k & 0xffu); }
  __device__ int width_of(int k) const { return static_cast<int>(width >> 8 * k & 0xffu); }
  /// Widths of the packs of all four, and of those before channel k.
  __device__ int widths() const { return widths_before(4); }
  __device__ int widths_before(int k) const {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < k; ++i) sum += width_of(i);
    return sum;
  }
};

/// The four codes of a token; 4-byte aligned.
__device__ inline std::uint32_t four_codes(const std::uint8_t* codes) {
  return *reinterpret_cast<const std::uint32_t*>(codes);
}

/// codes: of the first slot, whose successors are `stride` bytes apart; any codes up to 255.
template <int PackSize>
__device__ inline four_packs measure_packs(const std::uint8_t* codes, int stride) {
  using namespace packkv::detail;
  // 16-bit minima: of bytes 1 and 3 with what lies below them, and of bytes 0 and 2 alone.
  std::uint32_t low_odd = ~0u, low_even = ~0u, high_odd = 0, high_even = 0;
#pragma unroll
  for (int i = 0; i < PackSize; i += 2) {
    const std::uint32_t x = four_codes(codes + i * stride), y = four_codes(codes + (i + 1) * stride);
    const std::uint32_t x_even = x & 0x00ff00ffu, y_even = y & 0x00ff00ffu;
    low_odd = min_pairs(low_odd, x, y);
    high_odd = max_pairs(high_odd, x, y);
    low_even = min_pairs(low_even, x_even, y_even);
    high_even = max_pairs(high_even, x_even, y_even);
  }
  four_packs packs{select_bytes(low_even, low_odd, 0x7250), 0};
  const std::uint32_t range = select_bytes(high_even, high_odd, 0x7250) - packs.minimum;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    packs.width |= static_cast<std::uint32_t>(32 - __clz(static_cast<int>(range >> 8 * k & 0xffu))) << 8 * k;
  return packs;
}

/// Makes fields of the codes of one pack. Wide: its width may be 8.
template <bool Wide>
class field_maker {
 public:
  __device__ field_maker(int minimum, int width) : wide_(width == 8) {
    // The sum of (code - minimum) * 2^(width * i): two codes by one product each, and all minima at once.
    const std::uint32_t power = 1u << width;
    pair_ = 1u | power << 8;
    square_ = power * power;
    minima_ = static_cast<std::uint32_t>(minimum) * (1 + power) * (1 + square_);
    if (Wide && wide_) minima_ = static_cast<std::uint32_t>(minimum) * 0x01010101u;
  }
  /// Four codes, the first in the lowest byte, as 4 * width bits.
  __device__ std::uint32_t fields(std::uint32_t codes) const {
    using namespace packkv::detail;
    if (Wide && wide_) return codes - minima_;
    return dot_bytes(codes, pair_, dot_bytes(codes, pair_ << 16, 0u) * square_ - minima_);
  }

 private:
  bool wide_;
  std::uint32_t pair_, square_, minima_;
};

/// Rows of four codes to columns.
__device__ inline void transpose_bytes(std::uint32_t (&x)[4]) {
  using packkv::detail::select_bytes;
  const std::uint32_t a = select_bytes(x[0], x[1], 0x5140), b = select_bytes(x[0], x[1], 0x7362),
                      c = select_bytes(x[2], x[3], 0x5140), d = select_bytes(x[2], x[3], 0x7362);
  x[0] = select_bytes(a, c, 0x5410);
  x[1] = select_bytes(a, c, 0x7632);
  x[2] = select_bytes(b, d, 0x5410);
  x[3] = select_bytes(b, d, 0x7632);
}

/// 16 * width bits: the fields of 16 tokens of a channel.
struct field_run {
  std::uint64_t low, high;
};

/// Fields of Tokens tokens of four channels, for Tokens of 2, 4, 8 or 16; Tokens * width bits each, from bit 0 of
/// `low` on. Wide: a width may be 8.
template <int Tokens, bool Wide>
__device__ inline void fields_of_packs(const std::uint8_t* codes, int stride, const four_packs& packs,
                                       field_run (&runs)[4]) {
  constexpr int quads = Tokens < 4 ? 1 : Tokens / 4;
  std::uint32_t quad[quads][4];
#pragma unroll
  for (int q = 0; q < quads; ++q) {
#pragma unroll
    for (int i = 0; i < 4; ++i)  // a missing token is its packs' minimum, whose fields are 0
      quad[q][i] = i < Tokens ? four_codes(codes + (4 * q + i) * stride) : packs.minimum;
    transpose_bytes(quad[q]);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int width = packs.width_of(k);
    const field_maker<Wide> maker(packs.minimum_of(k), width);
    runs[k] = {maker.fields(quad[0][k]), 0};
    if constexpr (quads > 1) runs[k].low |= std::uint64_t{maker.fields(quad[1][k])} << 4 * width;
    if constexpr (quads > 2) {
      const std::uint64_t upper = maker.fields(quad[2][k]) | std::uint64_t{maker.fields(quad[3][k])} << 4 * width;
      if (!Wide || width < 8) runs[k].low |= upper << 8 * width;
      runs[k].high = upper >> ((64 - 8 * width) & 63);
    }
  }
}

/// Adds `count` <= 64 bits to zeroed words that other threads add to, too; bits of `x` above them are 0.
__device__ inline void or_bits(std::uint32_t* words, int position, std::uint64_t x) {
  words += position / 32;
  const int shift = position % 32;
  const std::uint64_t low = x << shift;
  if (static_cast<std::uint32_t>(low) != 0) atomicOr(words, static_cast<std::uint32_t>(low));
  if (low >> 32 != 0) atomicOr(words + 1, static_cast<std::uint32_t>(low >> 32));
  const std::uint32_t rest = shift == 0 ? 0 : static_cast<std::uint32_t>(x >> (64 - shift));
  if (rest != 0) atomicOr(words + 2, rest);
}

}  // namespace packkv::thread
