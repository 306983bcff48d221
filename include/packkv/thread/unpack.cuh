// SPDX-License-Identifier: Apache-2.0
// Turns a lane's words of one plane of codes into operands of matrix instructions: shift and mask where the codes lie.
// One idea: a register of a fragment is one masked word, and which word and bit follow from codec/layout.hpp alone.
//   using codes = thread::unpacker<3, thread::key_plane_32>;   codes::words w;   std::uint32_t a[codes::registers];
//   codes::load(w, low_plane, high_plane, lane);   codes::operand<1>(w, a);   // A of tokens 16..31, bytes are codes
#pragma once

#include <packkv/codec/layout.hpp>
#include <packkv/detail/cuda.cuh>
#include <utility>

namespace packkv::thread {

namespace detail {

/// Where lane 0 has a field: number of its word among the lane's, and bit.
PACKKV_HOST_DEVICE constexpr bit_field own_field(bit_field f, int words_per_lane) {
  const int vec = words_per_lane < 4 ? words_per_lane : 4;
  return {f.word / (32 * vec) * vec + f.word % vec, f.bit};
}

/// Loads a lane's words of a plane: vectors of 4, 2 or 1 words that lie 32 vectors apart. `plane` is a multiple of 16.
template <int Words>
__device__ inline void load_words(std::uint32_t (&w)[Words], const std::uint32_t* plane, int lane) {
  static_assert(Words == 1 || Words == 2 || Words % 4 == 0, "planes have 1, 2, 4, 8 or 16 words a lane");
  if constexpr (Words == 1) {
    w[0] = plane[lane];
  } else if constexpr (Words == 2) {
    const auto x = packkv::detail::load8(plane + 2 * lane);
    w[0] = x.word[0];
    w[1] = x.word[1];
  } else {
    for (int i = 0; i < Words; i += 4) {
      const auto x = packkv::detail::load16(plane + 32 * i + 4 * lane);
      for (int k = 0; k < 4; ++k) w[i + k] = x.word[k];
    }
  }
}

}  // namespace detail

/// One plane of a K strip: codes of Bits (1, 2, 4, 8) bits of 32 channels (16 at head_dim 64) and 64 tokens.
/// Rows of the operand A are tokens, its k are the channels of the strip.
template <int Bits, int StripChannels>
struct key_plane {
  static_assert(Bits == 1 || Bits == 2 || Bits == 4 || Bits == 8, "a plane has 1, 2, 4 or 8 bits a code");
  static_assert(StripChannels == 16 || StripChannels == 32, "K strips have 32 channels, or 16 at head_dim 64");
  static constexpr int words = Bits * StripChannels / 16;  ///< of a lane
  static constexpr int plane_words = 32 * words;
  static constexpr int registers = StripChannels / 8;  ///< of A: m16n8k32, or m16n8k16

  __device__ static void load(std::uint32_t (&w)[words], const std::uint32_t* plane, int lane) {
    detail::load_words(w, plane, lane);
  }

  /// Register Reg of A for tokens 16 * RowTile on; every byte is a code.
  template <int RowTile, int Reg>
  __device__ static std::uint32_t operand(const std::uint32_t (&w)[words]) {
    constexpr int token = 16 * RowTile + 8 * (Reg % 2), channel = 16 * (Reg / 2);
    constexpr bit_field f = detail::own_field(packkv::detail::key_field(Bits, 0, StripChannels, token, channel), words);
    return w[f.word] >> f.bit & 0x01010101u * ((1u << Bits) - 1);
  }

  /// Bit at which `in_place` leaves the codes of row tile RowTile and of channels 16 * Half + 0..15.
  template <int RowTile, int Half>
  static constexpr int place = packkv::detail::key_field(Bits, 0, StripChannels, 16 * RowTile, 16 * Half).bit;

  /// The same register with the codes where they lie in their bytes: code * 2^place, without a shift, or with one that
  /// all registers of a word share: code * 2^(place - Shift).
  template <int RowTile, int Reg, int Shift = 0>
  __device__ static std::uint32_t in_place(const std::uint32_t (&w)[words]) {
    constexpr int token = 16 * RowTile + 8 * (Reg % 2), channel = 16 * (Reg / 2);
    constexpr bit_field f = detail::own_field(packkv::detail::key_field(Bits, 0, StripChannels, token, channel), words);
    static_assert(f.bit == place<RowTile, Reg / 2>, "both rows' codes lie at the same bit");
    static_assert(f.bit >= Shift, "codes stay in their bytes");
    return w[f.word] >> Shift & 0x01010101u * ((1u << Bits) - 1) << (f.bit - Shift);
  }
};

/// One plane of a V strip: codes of Bits (1, 2, 4, 8) bits of 16 channels and 64 tokens. Rows of the operand A are
/// channels, its k are 16 tokens; a half is a float16 whose bits are the code: code * 2^-24, exact in m16n8k16.
template <int Bits>
struct value_plane {
  static_assert(Bits == 1 || Bits == 2 || Bits == 4 || Bits == 8, "a plane has 1, 2, 4 or 8 bits a code");
  static constexpr int words = Bits;  ///< of a lane
  static constexpr int plane_words = 32 * words;
  static constexpr int registers = 4;

  __device__ static void load(std::uint32_t (&w)[words], const std::uint32_t* plane, int lane) {
    detail::load_words(w, plane, lane);
  }

  /// Register Reg of A for tokens 16 * TokenTile on.
  template <int TokenTile, int Reg>
  __device__ static std::uint32_t operand(const std::uint32_t (&w)[words]) {
    constexpr int channel = 8 * (Reg % 2), token = 16 * TokenTile + 8 * (Reg / 2);
    constexpr bit_field f = detail::own_field(packkv::detail::value_field(Bits, 0, token, channel), words);
    return w[f.word] >> f.bit & 0x00010001u * ((1u << Bits) - 1);
  }

  /// Bit at which `in_place` leaves the codes of tokens 16 * TokenTile + 8 * TokenHalf + 0..7.
  template <int TokenTile, int TokenHalf>
  static constexpr int place = packkv::detail::value_field(Bits, 0, 16 * TokenTile + 8 * TokenHalf, 0).bit;

  /// The same register with the codes where they lie: code * 2^(place - 24), for one shift per word instead of one
  /// per register. Bits 0..9 of a half that has no others are a subnormal.
  template <int TokenTile, int Reg>
  __device__ static std::uint32_t in_place(const std::uint32_t (&w)[words]) {
    constexpr int channel = 8 * (Reg % 2), token_half = Reg / 2, bit = place<TokenTile, token_half>;
    constexpr bit_field f =
        detail::own_field(packkv::detail::value_field(Bits, 0, 16 * TokenTile + 8 * token_half, channel), words);
    static_assert(f.bit == bit + channel && bit + Bits <= 10, "codes of both halves of the rows lie at the same bit");
    return w[f.word] >> channel & 0x00010001u * ((1u << Bits) - 1) << bit;
  }
};

/// Codes of one width: a plane, or at width 3 a plane of 2 bits and one of 1 bit, which is the code's high bit.
/// `Plane<Bits>` is key_plane_32, key_plane_16 or value_plane.
template <int Width, template <int> class Plane>
struct unpacker {
  static constexpr int low_bits = Width == 3 ? 2 : Width;
  using low = Plane<low_bits>;
  using high = Plane<1>;
  static constexpr int registers = low::registers;
  /// The words of a lane.
  struct words {
    std::uint32_t low_words[low::words], high_words[high::words];
  };

  /// `low_plane` and `high_plane` are the first words of the strip's planes (strip_layout::low, high).
  __device__ static void load(words& w, const std::uint32_t* low_plane, const std::uint32_t* high_plane, int lane) {
    low::load(w.low_words, low_plane, lane);
    if constexpr (Width == 3) high::load(w.high_words, high_plane, lane);
  }

  /// A of 16 rows (K: tokens 16 * Tile on) or of 16 tokens (V: tokens 16 * Tile on).
  template <int Tile>
  __device__ static void operand(const words& w, std::uint32_t (&a)[registers]) {
    each<Tile>(w, a, std::make_integer_sequence<int, registers>{});
  }

 private:
  template <int Tile, int... Reg>
  __device__ static void each(const words& w, std::uint32_t (&a)[registers], std::integer_sequence<int, Reg...>) {
    ((a[Reg] = one<Tile, Reg>(w)), ...);
  }
  template <int Tile, int Reg>
  __device__ static std::uint32_t one(const words& w) {
    const std::uint32_t x = low::template operand<Tile, Reg>(w.low_words);
    if constexpr (Width == 3)
      return x | high::template operand<Tile, Reg>(w.high_words) << 2;
    else
      return x;
  }
};

/// Of strips of 32 channels.
template <int Bits>
using key_plane_32 = key_plane<Bits, 32>;
/// Of strips of 16 channels (head dim 64).
template <int Bits>
using key_plane_16 = key_plane<Bits, 16>;

}  // namespace packkv::thread
