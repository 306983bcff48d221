// SPDX-License-Identifier: Apache-2.0
// A warp codes a whole tile of a plan whose widths are known at compile time, to the bytes of reference::encode_tile.
// One idea: almost every code is certain from approximate arithmetic with a proven error. A matrix product with a
// Hadamard (or identity) matrix of 16 channels brings elements to the lanes that own their bits; one multiply-add makes
// each a fixed-point number whose top bits are the code. A token with an element too near to a border of its cell, or a
// scale too near to a border of half's grid, is coded again in the arithmetic of the definition (warp::exact_tokens).
// Such tokens are listed and coded together.
// Elements come by copies into shared memory, each lane's own, so that they need no registers until they are used.
//   using encoder_type = warp::tile_encoder<Codec, false>;   encoder_type encoder(storage);   encoder.begin(tokens_0);
//   for (...) { encoder.encode(tokens_i, tile(i));   if (encoder.full() || last) encoder.finish(flags); }
// where tokens_i(n) are those of tile i + n, encoder_type::make_tokens(count, at).
#pragma once

#include <packkv/detail/approx.cuh>
#include <packkv/detail/async.cuh>
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
  /// Of the root mean square, relative. Sums of 16 squares, each within 16 units (instruction::mma_16bit), then of half
  /// of dim / 16 such, and of two; the definition's transformed elements are wrong by log2(n) + 1 units of their norm,
  /// which counts twice in squares; the root halves all that. 4 for the reciprocal root and two products.
  PACKKV_HOST_DEVICE constexpr int scale() const { return (16 + dim / 32 + 1 + 2 * (log2_block() + 1) + 1) / 2 + 4; }
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
  static constexpr int dim = Codec::head_dim, blocks = dim / 16;  ///< blocks of channels
  static constexpr int list_size = 128;  ///< tokens to be coded again: at least those of a tile
  static constexpr int ahead = 2;        ///< times eight tokens are on their way
  /// Whether a tile is gathered in shared memory until its lines are whole: where quarters store words, each sector
  /// would be stored to in several parts (8 x 32k tokens of four_bit 0.658 to 0.605 ms; but 2 bits, whose halves store
  /// words, 0.548 to 0.554, keys of 4, 2, 1 and no bits 0.516 to 0.525; H200, 2026-11-30).
  static constexpr bool gathers = thread::tile_words<Codec>::quarters_have_words();
  /// Of a warp, in shared memory.
  struct temp_storage {
    alignas(16) std::uint8_t coded[gathers ? Codec::spec().tile_bytes() : 16];
    detail::bytes16 arriving[ahead][blocks / 2][detail::warp_threads];  ///< a lane's own
    detail::bytes16 mix[detail::warp_threads];                          ///< V: a lane's operand A. K: the parts of B
    std::uint16_t doubtful[4];                                          ///< of a tile, a bit for each token
    const void* token[list_size];
    std::uint8_t* tile[list_size];
    std::uint8_t slot[list_size];
  };

  /// All lanes take part, here and below.
  __device__ explicit tile_encoder(temp_storage& storage) : storage_(storage), lane_(detail::lane_id()) {
    const int g = lane_ / 4, q = lane_ % 4;
    for (int r = 0; r < 4; ++r) {
      // A lane's halves of k are the channels 4q .. 4q + 3. V: registers are (pair, row half). K: the first pair alone,
      // which the second equals, and the same with signs changed.
      const int in = 4 * q + (keys ? 0 : 2 * (r / 2)), out = keys ? 4 * (g / 2) + g % 2 : g + 8 * (r % 2);
      storage_.mix[lane_].word[r] = (entry(out, in) | entry(out, in + 1) << 16) ^ (keys && r == 3 ? 0x80008000u : 0u);
    }
  }

  /// Tokens of a tile: those below `count`, of which at(t) is the address of `dim` 16-bit channels side by side, 8-byte
  /// aligned; of others it is asked, but not read.
  template <class At>
  struct token_list {
    int count;
    At at;
  };
  template <class At>
  __device__ static token_list<At> make_tokens(int count, At at) {
    return {count, at};
  }

  /// Requests the first elements of the tile that comes first, or behind one that was not coded: of(1) are its tokens.
  template <class Tokens>
  __device__ void begin(Tokens&& of) {
    detail::wait_copies<0>();
    for (int i = 0; i < ahead; ++i) request(i, tile_tokens + 8 * i, of);
  }

  /// Codes a tile, which begin() or the call before had as the next one: of(0) are its tokens, of(1) those of the next
  /// one, or none. Slots behind its tokens become zero bytes. Some tokens are not right before finish(), until when
  /// their elements must stay. Not while the encoder is full().
  template <class Tokens>
  __device__ void encode(Tokens&& of, std::uint8_t* tile) {
    using namespace packkv::detail;
    const int count = of(0).count;
    words_type words;
    std::uint8_t* const to = gathers ? storage_.coded : tile;
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      std::uint32_t scales = 0, doubts = 0;
#pragma unroll 1  // in a straight line both steps would overlap, and need more registers than there are
      for (int now = 0; now < 2; ++now) {
        elements x;
        load(x, now);
        request(now, 16 * quarter + 8 * (now + ahead), of);
        for_constants<2>([&](auto number) {
          constexpr int step = decltype(number)::value;
          if (now == step) encode_octet<step>(x, count - 16 * quarter - 8 * step, words, scales, doubts);
        });
      }
      words.store_quarter(reinterpret_cast<std::uint32_t*>(to), lane_, quarter);
      if (lane_ % 4 == 0)  // the slots of the tokens whose number is lane / 4 modulo 8 lie side by side
        *reinterpret_cast<std::uint32_t*>(to + code_bytes + 4 * lane_ + 4 * quarter) = scales;
      doubts = __reduce_or_sync(all_lanes, doubts << (keys ? lane_ / 4 : lane_ % 4 * 2));
      if (lane_ == 0) storage_.doubtful[quarter] = static_cast<std::uint16_t>(doubts);
    }
    words.store_rest(reinterpret_cast<std::uint32_t*>(to), lane_);
    if constexpr (gathers) {
      __syncwarp();
      for (int i = 16 * lane_; i < spec_of.tile_bytes(); i += 16 * warp_threads) store16(tile + i, load16(to + i));
      __syncwarp();
    }
    __syncwarp();
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t half = storage_.doubtful[2 * i] | std::uint32_t{storage_.doubtful[2 * i + 1]} << 16;
      if ((half >> lane_ & 1u) != 0) {
        const int at = listed_ + __popc(half & ((1u << lane_) - 1)), t = lane_ + warp_threads * i;
        storage_.token[at] = of(0).at(t);
        storage_.tile[at] = tile;
        storage_.slot[at] = static_cast<std::uint8_t>(t);
      }
      listed_ += __popc(half);
    }
    __syncwarp();
  }

  /// Tokens that wait for finish(), and whether those of another tile may be too many.
  __device__ int waiting() const { return listed_; }
  __device__ bool full() const { return listed_ + tile_tokens > list_size; }
  /// Codes these tokens in the arithmetic of the definition, eight at a time. What is reported is added to flags. Ends
  /// with what has been requested there.
  __device__ void finish(std::uint32_t& flags) {
    detail::wait_copies<0>();
    __syncwarp();  // list and tiles are written
#pragma unroll 1
    for (int first = 0; first < listed_; first += 8) {
      const int i = first + detail::lane_id() / 4;
      const bool exists = i < listed_;
      exact_tokens<Codec, BFloat>::encode(exists ? storage_.token[i] : nullptr, exists ? storage_.slot[i] : 0,
                                          exists ? storage_.tile[i] : nullptr, flags);
    }
    __syncwarp();
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
  // Clamped numbers, which are certain, lie from `lowest` to 2^24 - 1. A multiply-add that saturates gives where among
  // these an element lies, from 0 to 1, within 2^-25 of that and of its constants: less than one of the 2.
  static constexpr int lowest = (1 << 23) + 2 * margin + 1, range = (1 << 24) - 1 - lowest;
  static constexpr float middle =
      static_cast<float>((static_cast<double>((1 << 23) + (1 << 22) + margin) - lowest) / range);

  struct elements {
    detail::bytes16 pair[blocks / 2];
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

  /// Starts to copy the lane's elements of eight tokens from `first` on, behind the tile's end those of the next one;
  /// absent ones become zeros.
  template <class Tokens>
  __device__ void request(int stage, int first, Tokens&& of) {
    const auto tile = of(first < tile_tokens ? 0 : 1);
    const int t = first % tile_tokens + lane_ / 4;
    const auto token = static_cast<const char*>(tile.at(t));
    const char* const from = detail::away(token, 8 * (lane_ % 4));
    for (int b = 0; b < blocks; ++b)
      detail::copy_async<8>(&storage_.arriving[stage][b / 2][lane_].word[2 * (b % 2)], detail::away(from, 32 * b),
                            t < tile.count);
    detail::commit_copies();
  }
  /// The elements that were requested first, which are in `stage`.
  __device__ void load(elements& x, int stage) const {
    detail::wait_copies<ahead - 1>();
    for (int p = 0; p < blocks / 2; ++p) x.pair[p] = detail::load16(&storage_.arriving[stage][p][lane_]);
  }

  /// Adds the products of eight tokens with one another, 32 channels of them: part[i][k] are those of token lane / 4
  /// with 2q + k, of half of the channels.
  template <bool First>
  __device__ static void add_products(float (&part)[2][2], const detail::bytes16& x) {
    for (int i = 0; i < 2; ++i) {
      float d[4] = {};  // rows are the first channels of each four and, 8 below, the second
      multiply(d, x.word, {x.word[i], x.word[2 + i]});
      for (int k = 0; k < 2; ++k) part[i][k] = First ? d[2 * i + k] : part[i][k] + d[2 * i + k];
    }
  }
  /// From these: half scale of token lane / 4, and what its elements are multiplied with before the factor of their
  /// width: NaN for a token that is absent, which makes them clamped ones of code 0. `doubts`: the scale is not
  /// certain.
  __device__ float inverse_of(const float (&part)[2][2], bool exists, std::uint16_t& scale, bool& doubts) const {
    using namespace packkv::detail;
    const int g = lane_ / 4;
    const float own = g % 2 == 0 ? part[0][0] + part[1][0] : part[0][1] + part[1][1];
    const float sum = shuffle(own, 4 * g + g / 2);
    const float mean = sum * (1.0f / dim), root = mean * reciprocal_sqrt_fast(mean);
    const std::uint32_t half = pack_halves(root, 0.0f);
    // Half rounds at the middle of 2^13 floats; a subnormal scale, an overflow or NaN is left to the definition.
    constexpr std::uint32_t zone = bounds.scale() + 1;
    const std::uint32_t to_border = (bit_cast<std::uint32_t>(root) & 0x1fffu) - (0x1000u - zone);
    doubts = exists && !(root >= 0x1p-14f && root < 65000.0f && to_border > 2 * zone);
    scale = static_cast<std::uint16_t>(exists ? half : 0u);
    return exists ? reciprocal_fast(unpack_halves(half).low) : nan_float();
  }

  /// A code of width Width in the upper bits of byte 2 of the result's bits; `nearest` becomes the smallest distance.
  template <int Width>
  __device__ static std::uint32_t fixed(float y, float factor, std::uint32_t& nearest) {
    const float t =
        fmaf(detail::multiply_add_saturated(y, factor, middle), static_cast<float>(range), static_cast<float>(lowest));
    const auto bits = detail::bit_cast<std::uint32_t>(t);
    nearest = min_of(nearest, bits & ((1u << fraction_bits(Width)) - 1));
    return Width == 8 ? bits << 1 : bits;
  }
  /// Four elements of strip Strip, as tile_words::put has them, of the tokens of `first` (bytes 0, 1) and `second`.
  template <int Strip, int Token, int Channel>
  __device__ static void put(words_type& words, float a, float b, float c, float d, float first, float second,
                             std::uint32_t& first_nearest, std::uint32_t& second_nearest) {
    constexpr int width = strips.width[Strip];
    if constexpr (width > 0) {
      constexpr float scale = static_cast<float>(1 << fraction_bits(width)) / gaussian_step(width) *
                              (turned ? hadamard_scale(hadamard_channels) : 1.0f) / static_cast<float>(range);
      const float of_first = first * scale, of_second = second * scale;
      const std::uint32_t bytes = detail::gather_bytes<2>(
          fixed<width>(a, of_first, first_nearest), fixed<width>(b, of_first, first_nearest),
          fixed<width>(c, of_second, second_nearest), fixed<width>(d, of_second, second_nearest));
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

  /// Eight tokens of a quarter, 8 * Step and up, of which the first `count` exist. `scales` and `doubtful`: half scales
  /// of token lane / 4, and bits of tokens that are not certain, both of two steps.
  template <int Step>
  __device__ void encode_octet(const elements& x, int count, words_type& words, std::uint32_t& scales,
                               std::uint32_t& doubtful) const {
    using namespace packkv::detail;
    float y[blocks][4] = {}, products[2][2];
    const bytes16 mix = storage_.mix[lane_];
    for_constants<blocks / 2>([&](auto number) {
      constexpr int p = decltype(number)::value;
      add_products<p == 0>(products, x.pair[p]);
      if constexpr (keys)
        turn_keys(x.pair[p], mix, y[2 * p], y[2 * p + 1]);
      else
        for (int i = 0; i < 2; ++i)
          multiply(y[2 * p + i], mix.word, {x.pair[p].word[2 * i], x.pair[p].word[2 * i + 1]});
    });
    bool doubts;
    std::uint16_t scale;
    const float own = inverse_of(products, lane_ / 4 < count, scale, doubts);
    scales |= std::uint32_t{scale} << (16 * Step);
    butterflies<keys ? 2 : 1>(y);
    if constexpr (keys) {  // a lane has the channels 4q .. 4q + 3 of every 16 of token lane / 4
      std::uint32_t nearest = doubts ? 0u : ~0u;
      for_constants<blocks>([&](auto block) {
        constexpr int b = decltype(block)::value;
        put<16 * b / strips.channels, 8 * Step, 16 * b % strips.channels>(words, y[b][0], y[b][1], y[b][2], y[b][3],
                                                                          own, own, nearest, nearest);
      });
      if (nearest <= 2 * margin) doubtful |= 1u << (8 * Step);
    } else {  // a lane has tokens 2q and 2q + 1, channels lane / 4 and 8 more of every 16
      float row[2];
      std::uint32_t nearest[2];
      for (int i = 0; i < 2; ++i) {
        const int from = 8 * (lane_ % 4) + 4 * i;
        row[i] = shuffle(own, from);
        nearest[i] = shuffle(doubts ? 1 : 0, from) != 0 ? 0u : ~0u;
      }
      for_constants<blocks>([&](auto block) {
        constexpr int b = decltype(block)::value;
        put<b, 8 * Step, 0>(words, y[b][0], y[b][2], y[b][1], y[b][3], row[0], row[1], nearest[0], nearest[1]);
      });
      for (int i = 0; i < 2; ++i)
        if (nearest[i] <= 2 * margin) doubtful |= 1u << (8 * Step + i);
    }
  }

  /// Channels 4q .. 4q + 3 of two blocks of 16. The product mixes the first and the second pair of every four apart,
  /// and both blocks with each other; sums and differences mix the pairs.
  __device__ static void turn_keys(const detail::bytes16& x, const detail::bytes16& mix, float (&first)[4],
                                   float (&second)[4]) {
    if constexpr (turned) {
      for (int i = 0; i < 2; ++i) {
        float d[4] = {};
        multiply(d, x.word, {mix.word[2 * i], mix.word[2 * i + 1]});
        float(&y)[4] = i == 0 ? first : second;
        for (int k = 0; k < 2; ++k) y[k] = d[k] + d[2 + k], y[2 + k] = d[k] - d[2 + k];
      }
    } else {
      for (int w = 0; w < 4; ++w) {
        const detail::two_floats of = detail::unpack_16bit<BFloat>(x.word[w]);
        float(&y)[4] = w < 2 ? first : second;
        y[2 * (w % 2)] = of.low, y[2 * (w % 2) + 1] = of.high;
      }
    }
  }

  temp_storage& storage_;
  const int lane_;
  int listed_ = 0;
};

}  // namespace packkv::warp
