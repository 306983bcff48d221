// SPDX-License-Identifier: Apache-2.0
// A warp codes a whole tile of a plan whose widths are known at compile time, to the bytes of reference::encode_tile.
// One idea: almost every code is certain from approximate arithmetic with a proven error. A matrix product with a
// Hadamard (or identity) matrix of 16 channels brings elements to the lanes that own their bits; one multiply-add makes
// each a fixed-point number whose top bits are the code. A token with an element too near to a border of its cell, or a
// scale too near to a border of half's grid, is coded again in the arithmetic of the definition (warp::exact_tokens).
// Such tokens are listed and coded together.
//   using encoder_type = warp::tile_encoder<Codec, false>;   encoder_type encoder(storage);
//   for (...) encoder.encode(encoder_type::make_tokens(count, at), tile, flags);   encoder.finish(flags);
#pragma once

#include <packkv/detail/approx.cuh>
#include <packkv/detail/matrix.cuh>
#include <packkv/thread/pack.cuh>
#include <packkv/warp/exact_tokens.cuh>

namespace packkv::warp {

/// Bounds of a tile_encoder for head dim D and Hadamard blocks of n channels (1: identity), in units of 2^-24.
struct encoder_bounds {
  int dim, block;

  PACKKV_HOST_DEVICE constexpr int log2_block() const {
    int n = 0;
    while (1 << (n + 1) <= block) ++n;
    return n;
  }
  /// At least sqrt(dim).
  PACKKV_HOST_DEVICE constexpr int root_dim() const {
    int r = 1;
    while (r * r < dim) ++r;
    return r;
  }
  /// Of the root mean square, relative. Sums of dim / 16 squares, then of 16 sums; the definition's transformed
  /// elements are wrong by log2(n) + 1 units of their norm, which counts twice in squares; the root halves all that. 4
  /// for the reciprocal root and two products.
  PACKKV_HOST_DEVICE constexpr int scale() const { return (dim / 16 + 4 + 2 * (log2_block() + 1) + 1) / 2 + 4; }
  /// Of a transformed element, in root mean squares of its token: a norm is at most sqrt(D) of these. A product of
  /// depth 16 is within 16 units of its largest term (instruction::mma_16bit), n / 16 of which add up to sqrt(n / 16)
  /// norms, before the division by sqrt(n): 4 units. Each butterfly stage, here log2(n) - 4, in the definition
  /// log2(n), and the definition's division add a unit of the norm.
  PACKKV_HOST_DEVICE constexpr int element() const {
    const int here = 4 + log2_block() - 4, definition = log2_block() + 1;
    return block == 1 ? 0 : root_dim() * (here + definition);
  }
};

/// Whether a codec has a tile_encoder: plans without leading components, of up to 128 channels, in the identity or the
/// Hadamard transform. Its tokens must not have offsets or calibrated steps.
template <class Codec>
inline constexpr bool has_tile_encoder = false;
/// Keys.
template <int HeadDim, class Transform, class RowScale, class Plan>
inline constexpr bool has_tile_encoder<key_codec<HeadDim, Transform, RowScale, Plan, leading<0>>> =
    HeadDim <= 128 && (Transform::kind == transform_kind::identity || Transform::kind == transform_kind::hadamard);
/// Values.
template <int HeadDim, class Transform, class RowScale, class Plan>
inline constexpr bool has_tile_encoder<value_codec<HeadDim, Transform, RowScale, Plan>> =
    HeadDim <= 128 && (Transform::kind == transform_kind::identity || Transform::kind == transform_kind::hadamard);

/// Codes tiles of codecs of which has_tile_encoder holds; BFloat: their elements are bfloat16.
template <class Codec, bool BFloat>
class tile_encoder {
  static_assert(has_tile_encoder<Codec>, "plans of up to 128 channels, identity or Hadamard, no leading components");

 public:
  static constexpr int dim = Codec::head_dim;
  static constexpr int list_size = 128;  ///< tokens to be coded again: at least those of a tile
  /// Whether a tile is gathered in shared memory until its lines are whole: where quarters store words, each sector
  /// would be stored to in several parts (8 x 32k tokens of four_bit 0.658 to 0.605 ms; but 2 bits, whose halves store
  /// words, 0.548 to 0.554, keys of 4, 2, 1 and no bits 0.516 to 0.525; H200, 2026-11-30).
  static constexpr bool gathers = thread::tile_words<Codec>::quarters_have_words();
  /// Of a warp, in shared memory.
  struct temp_storage {
    alignas(16) std::uint8_t coded[gathers ? Codec::spec().tile_bytes() : 16];
    const void* token[list_size];
    std::uint8_t* tile[list_size];
    std::uint8_t slot[list_size];
  };

  /// All lanes take part, here and below.
  __device__ explicit tile_encoder(temp_storage& storage) : storage_(storage), lane_(detail::lane_id()) {
    const int g = lane_ / 4, q = lane_ % 4;
    for (int r = 0; r < 4; ++r) {
      // A lane's halves of k are the channels 4q .. 4q + 3. K: registers are (column tile, pair), V: (pair, row half).
      const int pair = keys ? r % 2 : r / 2, out = keys ? 4 * (g / 2) + g % 2 + 2 * (r / 2) : g + 8 * (r % 2);
      mix_[r] = 0;
      for (int i = 0; i < 2; ++i) mix_[r] |= entry(out, 4 * q + 2 * pair + i) << (16 * i);
    }
  }

  /// Tokens of a tile: those below `count`, of which at(t) is the address of `dim` 16-bit channels side by side, 8-byte
  /// aligned.
  template <class At>
  struct tokens {
    int count;
    At at;
  };
  template <class At>
  __device__ static tokens<At> make_tokens(int count, At at) {
    return {count, at};
  }

  /// Codes the tokens of a tile; the slots behind them become zero bytes. Some tokens are not right before finish(),
  /// until when their elements must stay. What is reported is added to flags.
  template <class Tokens>
  __device__ void encode(const Tokens& of, std::uint8_t* tile, std::uint32_t& flags) {
    using namespace packkv::detail;
    if (listed_ + tile_tokens > list_size) finish(flags);
    words_type words;
    std::uint8_t* const to = gathers ? storage_.coded : tile;
    std::uint64_t doubtful = 0;
    elements x;
    load(x, 0, of);
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      std::uint32_t scales = 0, doubts = 0;
      for_constants<2 / octets>([&](auto number) {
        constexpr int step = decltype(number)::value;
        // The next elements come into the registers of those that have been multiplied.
        const auto refill = [&] { load(x, 16 * quarter + 8 * octets * (step + 1), of); };
        if constexpr (keys)
          encode_keys(x, of.count - 16 * quarter, refill, words, scales, doubts);
        else
          encode_values<step>(x, of.count - 16 * quarter, refill, words, scales, doubts);
      });
      words.store_quarter(reinterpret_cast<std::uint32_t*>(to), lane_, quarter);
      if (lane_ % 4 == 0)  // the slots of the tokens whose number is lane / 4 modulo 8 lie side by side
        *reinterpret_cast<std::uint32_t*>(to + code_bytes + 4 * lane_ + 4 * quarter) = scales;
      doubts = __reduce_or_sync(all_lanes, doubts << (keys ? lane_ / 4 : lane_ % 4 * 2));
      doubtful |= std::uint64_t{doubts} << (16 * quarter);
    }
    words.store_rest(reinterpret_cast<std::uint32_t*>(to), lane_);
    if constexpr (gathers) {
      __syncwarp();
      for (int i = 16 * lane_; i < spec_of.tile_bytes(); i += 16 * warp_threads) store16(tile + i, load16(to + i));
      __syncwarp();
    }
    if (doubtful == 0) return;
    for (int i = 0; i < 2; ++i) {
      const auto half = static_cast<std::uint32_t>(doubtful >> (32 * i));
      if ((half >> lane_ & 1u) != 0) {
        const int at = listed_ + __popc(half & ((1u << lane_) - 1)), t = lane_ + warp_threads * i;
        storage_.token[at] = of.at(t);
        storage_.tile[at] = tile;
        storage_.slot[at] = static_cast<std::uint8_t>(t);
      }
      listed_ += __popc(half);
    }
  }

  /// Tokens that wait for finish().
  __device__ int waiting() const { return listed_; }
  /// Codes the tokens of the list in the arithmetic of the definition.
  __device__ void finish(std::uint32_t& flags) {
    if (listed_ > 0) flags |= encode_listed(storage_, listed_);
    listed_ = 0;
  }

 private:
  static constexpr codec_spec spec_of = Codec::spec();
  using words_type = thread::tile_words<Codec>;
  static constexpr strip_layout strips = words_type::strips;
  static constexpr bool keys = strips.which == side::key;
  static constexpr bool turned = spec_of.transform == transform_kind::hadamard;
  static constexpr int hadamard_channels = turned ? hadamard_block(dim) : 1;
  static constexpr encoder_bounds bounds = {dim, hadamard_channels};
  static constexpr int blocks = dim / 16;      ///< of channels
  static constexpr int octets = keys ? 2 : 1;  ///< of tokens that are multiplied together
  static constexpr int code_bytes = strips.words * 4;

  // A scaled element u + 2^(width - 1) is kept as a float 2^23 + N + margin, N = (u + 2^(width - 1)) * 2^(23 - width)
  // below 2^23, so that the code is N's top bits. An element is doubtful if the bits below lie within `margin` of a
  // border; margin covers the element's error, 2 for products and constants, and rounding.
  PACKKV_HOST_DEVICE static constexpr int fraction_bits(int width) { return 23 - width; }
  PACKKV_HOST_DEVICE static constexpr int margin_of(int width) {
    const double element = bounds.element() * 1.01 / static_cast<double>(gaussian_step(width));
    return static_cast<int>(element * (1 << fraction_bits(width)) / (1 << 24)) + 1 + 4;
  }
  PACKKV_HOST_DEVICE static constexpr int widest_margin() {
    int most = 0;
    for (int i = 0; i < strips.count; ++i)
      if (strips.width[i] > 0) most = max_of(most, margin_of(strips.width[i]));
    return most;
  }
  static constexpr int margin = widest_margin();
  static constexpr float lowest = 8388608.0f + 2 * margin + 1, highest = 16777215.0f;

  struct elements {
    detail::bytes8 bits[octets][blocks];
  };
  /// What a token's elements are multiplied with, before the factor of their width, and what is added.
  struct row_numbers {
    float inverse, addend;
  };

  static constexpr std::uint32_t one = BFloat ? 0x3f80u : 0x3c00u;
  __device__ static std::uint32_t entry(int out, int in) {
    if (!turned) return out == in ? one : 0u;
    return one | (__popc(static_cast<unsigned>(out & in)) % 2 != 0 ? 0x8000u : 0u);
  }
  __device__ static void multiply(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    if constexpr (BFloat)
      detail::mma_bf16(d, a, b);
    else
      detail::mma_f16(d, a, b);
  }

  template <class Tokens>
  __device__ void load(elements& x, int first, const Tokens& of) const {
    for (int o = 0; o < octets; ++o) {
      const int t = first + 8 * o + lane_ / 4;
      if (t < of.count) {
        const char* const from = static_cast<const char*>(of.at(t)) + 8 * (lane_ % 4);
        for (int b = 0; b < blocks; ++b) x.bits[o][b] = detail::load8(from + 32 * b);
      } else {
        for (int b = 0; b < blocks; ++b) x.bits[o][b] = {};
      }
    }
  }

  /// Scale and numbers of the token of which four lanes hold `bits`. `doubts`: the scale is not certain.
  __device__ row_numbers row_of(const detail::bytes8 (&bits)[blocks], bool exists, std::uint16_t& scale,
                                bool& doubts) const {
    using namespace packkv::detail;
    float part[4] = {};
    for (int b = 0; b < blocks; ++b)
      for (int w = 0; w < 2; ++w) {
        const two_floats x = unpack_16bit<BFloat>(bits[b].word[w]);
        part[2 * w] = fmaf(x.low, x.low, part[2 * w]);
        part[2 * w + 1] = fmaf(x.high, x.high, part[2 * w + 1]);
      }
    float sum = (part[0] + part[1]) + (part[2] + part[3]);
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const float mean = sum * (1.0f / dim), root = mean * reciprocal_sqrt_fast(mean);
    scale = static_cast<std::uint16_t>(pack_halves(root, 0.0f));
    // Half rounds at the middle of 2^13 floats; a subnormal scale, an overflow or NaN is left to the definition.
    constexpr std::uint32_t zone = bounds.scale() + 1;
    const std::uint32_t to_border = (bit_cast<std::uint32_t>(root) & 0x1fffu) - (0x1000u - zone);
    doubts = exists && !(root >= 0x1p-14f && root < 65000.0f && to_border > 2 * zone);
    if (!exists) {
      scale = 0;
      return {0.0f, 0.0f};
    }
    return {reciprocal_fast(half_to_float(scale)), 8388608.0f + 4194304.0f + margin};
  }

  /// A code of width Width in the upper bits of byte 2 of the result's bits; `nearest` becomes the smallest distance.
  template <int Width>
  __device__ static std::uint32_t fixed(float y, float factor, float addend, std::uint32_t& nearest) {
    const float t = fminf(fmaxf(fmaf(y, factor, addend), lowest), highest);
    const auto bits = detail::bit_cast<std::uint32_t>(t);
    nearest = min_of(nearest, bits & ((1u << fraction_bits(Width)) - 1));
    return Width == 8 ? bits << 1 : bits;
  }
  /// Four elements of strip Strip, as tile_words::put has them, of the tokens of `first` (bytes 0, 1) and `second`.
  template <int Strip, int Token, int Channel>
  __device__ static void put(words_type& words, float a, float b, float c, float d, const row_numbers& first,
                             const row_numbers& second, std::uint32_t& first_nearest, std::uint32_t& second_nearest) {
    constexpr int width = strips.width[Strip];
    if constexpr (width > 0) {
      constexpr float scale = static_cast<float>(1 << fraction_bits(width)) / gaussian_step(width) *
                              (turned ? hadamard_scale(hadamard_channels) : 1.0f);
      const float of_first = first.inverse * scale, of_second = second.inverse * scale;
      const std::uint32_t bytes = detail::gather_bytes<2>(fixed<width>(a, of_first, first.addend, first_nearest),
                                                          fixed<width>(b, of_first, first.addend, first_nearest),
                                                          fixed<width>(c, of_second, second.addend, second_nearest),
                                                          fixed<width>(d, of_second, second.addend, second_nearest));
      words.template put<Strip, Token, Channel, width == 8 ? 0 : 7 - width>(bytes);
    }
  }

  /// The stages of the Hadamard transform between blocks of 16 channels, from that of `Stride` blocks on.
  template <int Stride = 1, int Count>
  __device__ static void butterflies(float (&y)[blocks][Count]) {
    if constexpr (16 * Stride < hadamard_channels) {
#pragma unroll
      for (int b = 0; b < blocks; ++b)
        if ((b & Stride) == 0)
#pragma unroll
          for (int i = 0; i < Count; ++i) {
            const float low = y[b][i], high = y[b + Stride][i];
            y[b][i] = low + high;
            y[b + Stride][i] = low - high;
          }
      butterflies<2 * Stride>(y);
    }
  }

  /// Tokens lane / 4 and 8 more of a quarter; a lane ends up with the channels 4q .. 4q + 3 of every 16.
  template <class Refill>
  __device__ void encode_keys(elements& x, int count, Refill&& refill, words_type& words, std::uint32_t& scales,
                              std::uint32_t& doubtful) const {
    using namespace packkv::detail;
    row_numbers row[2];
    bool doubts[2];
    for (int o = 0; o < 2; ++o) {
      std::uint16_t scale;
      row[o] = row_of(x.bits[o], 8 * o + lane_ / 4 < count, scale, doubts[o]);
      scales |= std::uint32_t{scale} << (16 * o);
    }
    float y[blocks][8] = {};  // [column tile][fragment of C]
    for_constants<blocks>([&](auto block) {
      constexpr int b = decltype(block)::value;
      const bytes8 &low = x.bits[0][b], &high = x.bits[1][b];
      for (int n = 0; n < 2; ++n) {
        if constexpr (turned) {
          float d[4] = {};
          multiply(d, {low.word[0], high.word[0], low.word[1], high.word[1]}, {mix_[2 * n], mix_[2 * n + 1]});
          for (int i = 0; i < 4; ++i) y[b][4 * n + i] = d[i];
        } else {
          const two_floats of_low = unpack_16bit<BFloat>(low.word[n]), of_high = unpack_16bit<BFloat>(high.word[n]);
          y[b][4 * n] = of_low.low, y[b][4 * n + 1] = of_low.high;
          y[b][4 * n + 2] = of_high.low, y[b][4 * n + 3] = of_high.high;
        }
      }
    });
    refill();
    butterflies(y);
    std::uint32_t nearest[2] = {~0u, ~0u};
    for_constants<2 * blocks>([&](auto index) {
      constexpr int b = decltype(index)::value / 2, o = decltype(index)::value % 2;
      constexpr int strip = 16 * b / strips.channels, channel = 16 * b % strips.channels;
      put<strip, 8 * o, channel>(words, y[b][2 * o], y[b][2 * o + 1], y[b][4 + 2 * o], y[b][5 + 2 * o], row[o], row[o],
                                 nearest[o], nearest[o]);
    });
    for (int o = 0; o < 2; ++o)
      if (doubts[o] || nearest[o] <= 2 * margin) doubtful |= 1u << (8 * o);
  }

  /// Tokens 8 * Step + lane / 4 of a quarter; a lane ends up with tokens 2q and 2q + 1 of the eight, channels lane / 4
  /// and 8 more of every 16.
  template <int Step, class Refill>
  __device__ void encode_values(elements& x, int count, Refill&& refill, words_type& words, std::uint32_t& scales,
                                std::uint32_t& doubtful) const {
    using namespace packkv::detail;
    bool doubts;
    std::uint16_t scale;
    const row_numbers own = row_of(x.bits[0], 8 * Step + lane_ / 4 < count, scale, doubts);
    scales |= std::uint32_t{scale} << (16 * Step);
    row_numbers row[2];
    std::uint32_t nearest[2];
    for (int i = 0; i < 2; ++i) {
      const int from = 8 * (lane_ % 4) + 4 * i;
      row[i] = {shuffle(own.inverse, from), shuffle(own.addend, from)};
      nearest[i] = shuffle(doubts ? 1 : 0, from) != 0 ? 0u : ~0u;
    }
    float y[blocks][4] = {};
    for_constants<blocks>([&](auto block) {
      constexpr int b = decltype(block)::value;
      multiply(y[b], mix_, {x.bits[0][b].word[0], x.bits[0][b].word[1]});
    });
    refill();
    butterflies(y);
    for_constants<blocks>([&](auto block) {
      constexpr int b = decltype(block)::value;
      put<b, 8 * Step, 0>(words, y[b][0], y[b][2], y[b][1], y[b][3], row[0], row[1], nearest[0], nearest[1]);
    });
    for (int i = 0; i < 2; ++i)
      if (nearest[i] <= 2 * margin) doubtful |= 1u << (8 * Step + i);
  }

  /// What is reported. A function of its own, which the tile loop's registers do not see.
#if !defined(PACKKV_SIMT_EXECUTOR)
  __noinline__
#endif
      __device__ static std::uint32_t
      encode_listed(const temp_storage& list, int count) {
    std::uint32_t flags = 0;
    __syncwarp();  // list and tiles are written
#pragma unroll 1
    for (int first = 0; first < count; first += 8) {
      const int i = first + detail::lane_id() / 4;
      const bool exists = i < count;
      exact_tokens<Codec, BFloat>::encode(exists ? list.token[i] : nullptr, exists ? list.slot[i] : 0,
                                          exists ? list.tile[i] : nullptr, flags);
    }
    __syncwarp();
    return flags;
  }

  temp_storage& storage_;
  const int lane_;
  int listed_ = 0;
  std::uint32_t mix_[4];  ///< K: operand B of two column tiles; V: operand A
};

}  // namespace packkv::warp
