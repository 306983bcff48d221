// SPDX-License-Identifier: Apache-2.0
// Packs of four channels by one thread: smallest codes and widths, and their fields as bits.
// One idea: four codes of a pack in a word become fields of any width by two dot products with powers of two.
//   const auto q = thread::measure_packs<16>(codes, head_dim);   thread::fields_of_packs<16>(codes, head_dim, q, put);
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

/// Four codes of a pack, the first in the lowest byte, as fields of `width` bits: 4 * width bits.
__device__ inline std::uint32_t four_fields(std::uint32_t codes, int minimum, int width) {
  using namespace packkv::detail;
  if (width == 8) return codes - static_cast<std::uint32_t>(minimum) * 0x01010101u;
  const std::uint32_t power = 1u << width, pair = 1u | power << 8;
  const std::uint32_t minima = static_cast<std::uint32_t>(minimum) * (1 + power) * (1 + power * power);
  return dot_bytes(codes, pair, 0u - minima) + (dot_bytes(codes, pair << 16, 0u) << 2 * width);
}

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
/// `low` on.
template <int Tokens>
__device__ inline void fields_of_packs(const std::uint8_t* codes, int stride, const four_packs& packs,
                                       field_run (&runs)[4]) {
  constexpr int quads = Tokens < 4 ? 1 : Tokens / 4;
  std::uint32_t quad[quads][4];
#pragma unroll
  for (int q = 0; q < quads; ++q) {
    std::uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)  // a missing token is its packs' minimum, whose fields are 0
      x[i] = i < Tokens ? four_codes(codes + (4 * q + i) * stride) : packs.minimum;
    transpose_bytes(x);
#pragma unroll
    for (int k = 0; k < 4; ++k) quad[q][k] = four_fields(x[k], packs.minimum_of(k), packs.width_of(k));
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int width = packs.width_of(k);
    runs[k] = {quad[0][k], 0};
    if constexpr (quads > 1) runs[k].low |= std::uint64_t{quad[1][k]} << 4 * width;
    if constexpr (quads > 2) {
      const std::uint64_t upper = quad[2][k] | std::uint64_t{quad[3][k]} << 4 * width;
      if (width < 8) runs[k].low |= upper << 8 * width;
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
