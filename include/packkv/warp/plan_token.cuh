// SPDX-License-Identifier: Apache-2.0
// A warp codes a token of a plan that is known at compile time, into a tile that others may change at the same time.
// One idea: lane l codes the channels l, l + 32, ... as the definition does; then lanes trade codes, a byte each, until
// one lane has all of a word that are this token's.
//   warp::store_plan_token<Codec>(head, y, finite, slot, tile, flags, clamps);
#pragma once

#include <packkv/detail/bits.cuh>
#include <packkv/warp/token_codec.cuh>

namespace packkv::warp {

/// Code words of a token's tile.
template <class Codec>
class plan_words {
 public:
  static constexpr strip_layout strips = Codec::spec().strips;
  static constexpr bool keys = strips.which == side::key;
  static constexpr int registers = Codec::head_dim / 32, packs = (registers + 3) / 4;

  /// What encode_plan_token asks for.
  struct place {
    int width;
  };
  /// Of channel lane + 32 * Index.
  template <int Index>
  __device__ static place place_of() {
    if constexpr (strips.channels == 32) {
      return {number_of(number::width, Index)};
    } else {
      constexpr int lower = number_of(number::width, 2 * Index), upper = number_of(number::width, 2 * Index + 1);
      return {detail::lane_id() < 16 ? lower : upper};
    }
  }

  /// What codes of a strip are made with.
  struct strip_numbers {
    int width;
    float step;  ///< gaussian_step; 1 where there are no codes
  };
  /// Of the strip that a channel is in.
  __device__ static strip_numbers strip_of(int channel) {
    strip_numbers found = numbers_of(0);
    if constexpr (!is_even(number::width) || number_of(number::width, 0) != number_of(number::width, 1))
      packkv::detail::for_constants<strips.count>([&](auto index) {
        constexpr strip_numbers here = numbers_of(decltype(index)::value);
        if (channel / strips.channels == decltype(index)::value) found = here;
      });
    return found;
  }

  __device__ plan_words(std::uint8_t* tile, int token) : words_(tile), token_(token) {}

  /// From the codes of channels 4 l .. 4 l + 3 of each lane l, a byte each, what store_neighbours takes; head dim 128.
  /// All lanes take part.
  __device__ static std::uint32_t trade_neighbours(std::uint32_t codes) {
    if constexpr (keys) return codes;
    // Channels c and c + 8 share a word: the lower lane gets the first two pairs, the upper one the others.
    const bool upper = (packkv::detail::lane_id() & 2) != 0;
    const std::uint32_t others = packkv::detail::shuffle_xor(codes, 2);
    return packkv::detail::permute_bytes(upper ? others : codes, upper ? codes : others, upper ? 0x7362u : 0x5140u);
  }
  /// Loads the words that store_neighbours changes, which others may change meanwhile.
  __device__ void load_neighbours() {
    for_neighbours([&](int channel, auto word, int) {
      for_fields(channel, [&](auto, const bit_field& field, auto plane) {
        loaded_[planes * decltype(word)::value + decltype(plane)::value] = words_.load(field.word);
      });
    });
  }
  /// Stores them.
  __device__ void store_neighbours(std::uint32_t traded) const {
    for_neighbours([&](int channel, auto word, int shift) {
      for_fields(channel, [&](auto bits, const bit_field& field, auto plane) {
        constexpr int n = planes * decltype(word)::value + decltype(plane)::value;
        words_.replace(write_of<decltype(bits)::value>(field, traded >> (shift + 2 * decltype(plane)::value)),
                       loaded_[n]);
      });
    });
  }

  /// Stores the codes of pack Pack: byte k is that of channel lane + 32 * (4 * Pack + k). All lanes take part.
  template <int Pack>
  __device__ void store(std::uint32_t codes) const {
    using namespace packkv::detail;
    const int lane = lane_id();
    if constexpr (keys) {
      // Four neighbouring channels share a word. After the trade, byte j of lane 4 n + k is byte k of lane 4 n + j.
      codes = permute_bytes(codes, shuffle_xor(codes, 1), (lane & 1) == 0 ? 0x6240u : 0x3715u);
      codes = permute_bytes(codes, shuffle_xor(codes, 2), (lane & 2) == 0 ? 0x5410u : 0x3276u);
      store_word(4 * Pack + (lane & 3), lane & ~3, codes);
    } else {
      // Channels c and c + 8 share a word: the lower lane stores the first two of the pack, the upper one the others.
      const bool upper = (lane & 8) != 0;
      const std::uint32_t others = shuffle_xor(codes, 8), low = upper ? others >> 16 : codes;
      const std::uint32_t pairs = permute_bytes(low, upper ? codes >> 16 : others, 0x5140u);
      store_word(4 * Pack + (upper ? 2 : 0), lane & ~8, pairs);
      store_word(4 * Pack + (upper ? 3 : 1), lane & ~8, pairs >> 16);
    }
  }

 private:
  static constexpr std::uint32_t each = keys ? 0x01010101u : 0x0101u;  ///< the lowest bits of the codes of a word

  PACKKV_HOST_DEVICE static constexpr bool has_width(int width) {
    for (int s = 0; s < strips.count; ++s)
      if (strips.width[s] == width) return true;
    return false;
  }
  /// What the layout says of a strip.
  enum class number { width, low, high };
  PACKKV_HOST_DEVICE static constexpr int number_of(number what, int strip) {
    return what == number::width ? strips.width[strip] : what == number::low ? strips.low[strip] : strips.high[strip];
  }
  /// number_of grows by as much from each strip to the next.
  PACKKV_HOST_DEVICE static constexpr bool is_even(number what) {
    const int first = number_of(what, 0), step = number_of(what, 1) - first;
    for (int s = 0; s < strips.count; ++s)
      if (number_of(what, s) != first + s * step) return false;
    return true;
  }
  PACKKV_HOST_DEVICE static constexpr strip_numbers numbers_of(int strip) {
    const int width = number_of(number::width, strip);
    return {width, width > 0 ? gaussian_step(width) : 1.0f};
  }
  /// The same of a strip that is not known at compile time.
  template <number What>
  __device__ static int look_up(int strip) {
    constexpr int first = number_of(What, 0), step = number_of(What, 1) - first;
    int found = first + strip * step;
    if constexpr (!is_even(What))
      detail::for_constants<strips.count>([&](auto index) {
        constexpr int s = decltype(index)::value, of_strip = number_of(What, s);
        if (strip == s) found = of_strip;
      });
    return found;
  }

  /// Stores the word of channel first + 32 * index and its neighbours, if there is this index.
  __device__ void store_word(int index, int first, std::uint32_t codes) const {
    if (index < registers) store_at(first + 32 * index, codes);
  }
  /// Stores the word of a channel and its neighbours.
  __device__ void store_at(int channel, std::uint32_t codes) const {
    for_fields(channel, [&](auto bits, const bit_field& field, auto plane) {
      words_(write_of<decltype(bits)::value>(field, codes >> (2 * decltype(plane)::value)));
    });
  }
  /// f(first channel of a word, its number, place of its codes in what trade_neighbours returns).
  template <class F>
  __device__ static void for_neighbours(F&& f) {
    using std::integral_constant;
    const int lane = packkv::detail::lane_id();
    if constexpr (keys) {
      f(4 * lane, integral_constant<int, 0>{}, 0);
    } else {
      const int channel = 4 * (lane & ~2) + (lane & 2);
      f(channel, integral_constant<int, 0>{}, 0);
      f(channel + 1, integral_constant<int, 1>{}, 16);
    }
  }
  /// f(bits, field, plane) for each field of a channel and its neighbours: one, two of a width of 3, none of 0.
  template <class F>
  __device__ void for_fields(int channel, F&& f) const {
    const int strip = channel / strips.channels;
    fields_of_width<1>(channel, strip, f);
    fields_of_width<2>(channel, strip, f);
    fields_of_width<3>(channel, strip, f);
    fields_of_width<4>(channel, strip, f);
    fields_of_width<8>(channel, strip, f);
  }
  template <int Width, class F>
  __device__ void fields_of_width(int channel, int strip, F&& f) const {
    using std::integral_constant;
    if constexpr (has_width(Width)) {
      if (look_up<number::width>(strip) != Width) return;
      constexpr int low = Width == 3 ? 2 : Width;
      f(integral_constant<int, low>{}, field_of<low>(look_up<number::low>(strip), channel),
        integral_constant<int, 0>{});
      if constexpr (Width == 3)
        f(integral_constant<int, 1>{}, field_of<1>(look_up<number::high>(strip), channel), integral_constant<int, 1>{});
    }
  }
  template <int Bits>
  __device__ bit_field field_of(int base, int channel) const {
    return keys ? packkv::detail::key_field(Bits, base, strips.channels, token_, channel)
                : packkv::detail::value_field(Bits, base, token_, channel);
  }
  template <int Bits>
  __device__ static code_write write_of(const bit_field& field, std::uint32_t codes) {
    constexpr std::uint32_t mask = ((1u << Bits) - 1) * each;
    return {field.word, mask << field.bit, (codes & mask) << field.bit};
  }

  static constexpr int planes = has_width(3) ? 2 : 1;
  shared_words words_;
  int token_;
  std::uint32_t loaded_[(keys ? 1 : 2) * planes] = {};
};

/// Codes a token y in the coded basis: the bytes of encode_token by fewer instructions. All lanes take part.
template <class Codec>
__device__ inline void store_plan_token(const head_parameters& head, const float (&y)[Codec::head_dim / 32],
                                        bool finite, int token, std::uint8_t* tile, std::uint32_t& flags,
                                        std::uint32_t& clamps) {
  constexpr codec_spec spec = Codec::spec();
  static_assert(spec.kind == codec_kind::plan, "a plan");
  using words = plan_words<Codec>;
  std::uint32_t codes[words::packs] = {};
  encode_plan_token<Codec::head_dim>(
      spec, head, y, finite, token, tile, [](auto index) { return words::template place_of<decltype(index)::value>(); },
      [&](auto index, auto, std::uint32_t code) {
        constexpr int i = decltype(index)::value;
        codes[i / 4] |= code << (8 * (i % 4));
      },
      flags, clamps);
  const words to(tile, token);
  detail::for_constants<words::packs>([&](auto pack) {
    constexpr int p = decltype(pack)::value;
    to.template store<p>(codes[p]);
  });
}

}  // namespace packkv::warp
