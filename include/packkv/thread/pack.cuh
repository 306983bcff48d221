// SPDX-License-Identifier: Apache-2.0
// Puts a lane's codes into its words of a tile, four codes whose places differ by bytes at a time: the way back of
// thread/unpack.cuh. One idea: which word and bit follow from codec/layout.hpp alone. 16 tokens at a time, so that the
// code of a loop over a tile's quarters is short: instructions that are not in the cache are waited for.
//   thread::tile_words<Codec> words;   words.put<strip, token, channel, from>(bytes);   // tokens 0..15 of a quarter
//   words.store_quarter(tile, lane, quarter);   // and when all are done   words.store_rest(tile, lane);
#pragma once

#include <packkv/detail/unroll.hpp>
#include <packkv/thread/unpack.cuh>

namespace packkv::thread {

namespace detail {

/// Moves the bits From.. of every byte to the bits To.., those of `Bits` bits.
template <int Bits, int From, int To>
__device__ inline std::uint32_t move_codes(std::uint32_t bytes) {
  static_assert(From >= 0 && To >= 0 && From + Bits <= 8 && To + Bits <= 8, "a code stays within its byte");
  constexpr std::uint32_t mask = 0x01010101u * ((1u << Bits) - 1) << To;
  if constexpr (To >= From)
    return bytes << (To - From) & mask;
  else
    return bytes >> (From - To) & mask;
}

}  // namespace detail

/// The words of a tile that a lane holds: those of the present quarter, and of planes whose words have codes of several
/// quarters what there is of them.
template <class Codec>
class tile_words {
 public:
  static constexpr strip_layout strips = Codec::spec().strips;

  /// Four codes of strip Strip, whose lowest bit lies at bit From of their bytes. Token (0..15, within the quarter) and
  /// Channel (within the strip) are the place of the first byte's code in lane 0. K: the bytes are the channels Channel
  /// .. + 3. V: the bytes are (Token, Channel), (Token, Channel + 8), (Token + 1, Channel), (Token + 1, Channel + 8).
  template <int Strip, int Token, int Channel, int From>
  __device__ void put(std::uint32_t bytes) {
    constexpr int width = strips.width[Strip];
    if constexpr (width == 3) {
      put_plane<2, first_word(Strip, false), Token, Channel, From>(bytes);
      put_plane<1, first_word(Strip, true), Token, Channel, From + 2>(bytes);
    } else if constexpr (width > 0) {
      put_plane<width, first_word(Strip, false), Token, Channel, From>(bytes);
    }
  }
  /// Whether a quarter has words of its own in half of the strips or more: those of 4 or 8 bits.
  PACKKV_HOST_DEVICE static constexpr bool quarters_have_words() {
    int own = 0, all = 0;
    for (int s = 0; s < strips.count; ++s) {
      const int width = strips.width[s];
      own += width > 0 && width != 3 && quarters_of_word(width) == 1 ? 1 : 0;
      all += width > 0 ? 1 : 0;
    }
    return own > 0 && 2 * own >= all;
  }
  /// Quarter `quarter`, 0 to 3 in this order, is complete. All lanes take part, here and below.
  __device__ void store_quarter(std::uint32_t* tile, int lane, int quarter) {
    for_planes([&](auto bits, auto first, auto base) {
      constexpr int n = words_of(decltype(bits)::value), at = decltype(first)::value,
                    shared_by = quarters_of_word(decltype(bits)::value), here = n * shared_by / 4;
      std::uint32_t* const plane = tile + decltype(base)::value;
      if constexpr (shared_by == 1) {
        store_words<n, here, at>(part_, plane, lane, here * quarter);
      } else {
        constexpr int step = 8 / shared_by;  // bits from a quarter's codes to the next one's
        static_assert(step == field_of(decltype(bits)::value, 16, 0).bit, "quarters share words in steps of bits");
        for (int i = at; i < at + here; ++i) all_[i] |= part_[i] << (step * (quarter % shared_by));
        if (shared_by == 2 && quarter % 2 == 1) {
          store_words<n, here, at>(all_, plane, lane, here * (quarter / 2));
          for (int i = at; i < at + here; ++i) all_[i] = 0;
        }
      }
      for (int i = at; i < at + here; ++i) part_[i] = 0;
    });
  }
  /// All quarters are: the planes whose words have codes of all.
  __device__ void store_rest(std::uint32_t* tile, int lane) {
    for_planes([&](auto bits, auto first, auto base) {
      constexpr int n = words_of(decltype(bits)::value), at = decltype(first)::value;
      if constexpr (quarters_of_word(decltype(bits)::value) == 4) {
        store_words<n, n, at>(all_, tile + decltype(base)::value, lane, 0);
        for (int i = at; i < at + n; ++i) all_[i] = 0;
      }
    });
  }

 private:
  /// Words of a lane of a plane.
  PACKKV_HOST_DEVICE static constexpr int words_of(int bits) { return bits * strips.channels / 16; }
  /// Field of the code of lane 0, with the word's number among the lane's.
  PACKKV_HOST_DEVICE static constexpr bit_field field_of(int bits, int token, int channel) {
    return detail::own_field(strips.which == side::key
                                 ? packkv::detail::key_field(bits, 0, strips.channels, token, channel)
                                 : packkv::detail::value_field(bits, 0, token, channel),
                             words_of(bits));
  }
  /// Quarters of a tile that have codes in a word of such a plane: 1, 2 or 4.
  PACKKV_HOST_DEVICE static constexpr int quarters_of_word(int bits) {
    return field_of(bits, 16, 0).word != 0 ? 1 : field_of(bits, 32, 0).word != 0 ? 2 : 4;
  }
  PACKKV_HOST_DEVICE static constexpr int kept(int bits) { return words_of(bits) * quarters_of_word(bits) / 4; }
  /// Where the words of a strip's plane begin among those kept; behind the last strip: their number.
  PACKKV_HOST_DEVICE static constexpr int first_word(int strip, bool high) {
    int n = 0;
    for (int s = 0; s < strip; ++s) {
      const int width = strips.width[s];
      if (width > 0) n += kept(width == 3 ? 2 : width);
      if (width == 3) n += kept(1);
    }
    return high ? n + kept(2) : n;
  }
  static constexpr int count = first_word(strips.count, false);

  /// f(bits, first of the words kept, first word in the tile) of every plane, as integral constants.
  template <class F>
  __device__ static void for_planes(F&& f) {
    packkv::detail::for_constants<strips.count>([&](auto strip) {
      constexpr int s = decltype(strip)::value, width = strips.width[s], low_bits = width == 3 ? 2 : width,
                    low = first_word(s, false), high = first_word(s, true);
      if constexpr (width > 0)
        f(std::integral_constant<int, low_bits>{}, std::integral_constant<int, low>{},
          std::integral_constant<int, strips.low[s]>{});
      if constexpr (width == 3)
        f(std::integral_constant<int, 1>{}, std::integral_constant<int, high>{},
          std::integral_constant<int, strips.high[s]>{});
    });
  }
  template <int Bits, int First, int Token, int Channel, int From>
  __device__ void put_plane(std::uint32_t bytes) {
    constexpr bit_field own = field_of(Bits, Token, Channel);
    static_assert(Token < 16 && own.bit < 8, "a code of the quarter, the first one in the first byte");
    part_[First + own.word] |= detail::move_codes<Bits, From, own.bit>(bytes);
  }
  /// Count words from w[First] on become the lane's words `index` on of a plane of N a lane; they do not cross a vector
  /// of 16 bytes unless they are whole ones.
  template <int N, int Count, int First, int All>
  __device__ static void store_words(const std::uint32_t (&w)[All], std::uint32_t* plane, int lane, int index) {
    constexpr int vector = N < 4 ? N : 4;
    std::uint32_t* const to = plane + index / vector * (32 * vector) + lane * vector + index % vector;
    if constexpr (Count == 1)
      *to = w[First];
    else if constexpr (Count == 2)
      packkv::detail::store8(to, {{w[First], w[First + 1]}});
    else
      packkv::detail::for_constants<Count / 4>([&](auto number) {
        constexpr int i = First + 4 * decltype(number)::value;
        packkv::detail::store16(to + 128 * decltype(number)::value, {{w[i], w[i + 1], w[i + 2], w[i + 3]}});
      });
  }

  static constexpr int size = count > 0 ? count : 1;
  std::uint32_t part_[size] = {};
  std::uint32_t all_[size] = {};
};

}  // namespace packkv::thread
