// SPDX-License-Identifier: Apache-2.0
// Scores of the 64 keys of a tile that is grouped along tokens against up to 16 query rows, by fp16 matrix products.
// One idea: a group's step belongs to a channel, so queries times steps are the operand of the group's tokens, as two
// halves each; codes stay where they lie in their bytes, as subnormal halves (docs/numerics.md, "Grouped keys").
//   using scores = grouped_key_scores<Codec, Rows>;   // used as mma_key_scores is
#pragma once

#include <packkv/warp/mma_key_scores.cuh>
#include <packkv/warp/mma_value_sum.cuh>

namespace packkv::warp {

/// Codec is a static grouped_key_codec.
template <class Codec, int Rows>
class grouped_key_scores {
 public:
  static constexpr codec_spec spec = Codec::spec();
  static constexpr int dim = spec.head_dim, width = spec.strips.width[0];
  using columns = score_columns<Rows>;
  static constexpr int lane_rows = columns::lane_rows;
  static constexpr bool has_basis = false;
  using head_values = lane_parameters<Codec>;

  /// The queries of a block, in shared memory.
  struct temp_storage {
    /// Divided by powers of two, so that all are below 1/2 and products with codes where they lie have one unit. Two
    /// rows are read at once, without conflicts of banks.
    alignas(16) float query[Rows][dim + 16];
    float factor[Rows];  ///< from a product with keys to a score
    float offset[Rows];  ///< query . channel_offset
  };

  /// source(row, index, x) loads x[i] = channel index[i] of a query in the original basis, `own` is what the lane needs
  /// of the head's parameters. Scores are multiplied by `factor`. Row r is done by warp r % warps. The caller
  /// synchronises the block before the constructor.
  template <class Source>
  __device__ static void prepare(temp_storage& storage, const head_values& own, Source&& source, float factor, int warp,
                                 int warps) {
    using namespace packkv::detail;
    constexpr int registers = dim / 32;
    for (int row = warp; row < Rows; row += warps) {
      float q[registers], offset = 0.0f, largest = 0.0f;
      source(row, own.channel, q);
      bool finite = true;
      for (int i = 0; i < registers; ++i) {
        offset = fmaf(q[i], own.offset[i], offset);
        finite = finite && is_finite(q[i]);
      }
      offset = warp_sum(offset);
      finite = __all_sync(all_lanes, finite) != 0;
      if (spec.transform == transform_kind::hadamard) hadamard<dim>(q);
      for (int i = 0; i < registers; ++i) largest = fmaxf(largest, fabsf(q[i]));
      largest = warp_max(largest);
      // 2^e > 2 * largest; within the range in which both it and its inverse are floats.
      const int e = max_of(min_of(static_cast<int>(bit_cast<std::uint32_t>(largest) >> 23) - 127 + 2, 120), -120);
      const float inverse = exponential(-e);
      for (int i = 0; i < registers; ++i) {
        const int c = lane_id() + 32 * i, half = c / 16 % halves;
        storage.query[row][c] = finite ? q[i] * inverse * (half == 0 ? 1.0f : half_unit) : 0.0f;
      }
      if (lane_id() == 0) {
        storage.factor[row] = finite ? factor * exponential(e) : nan_float();
        storage.offset[row] = factor * offset;
      }
    }
  }

  __device__ explicit grouped_key_scores(const temp_storage& storage) : storage_(storage) {
    for (int i = 0; i < lane_rows; ++i) {
      factor_[i] = storage.factor[columns::row(i)];
      offset_[i] = storage.offset[columns::row(i)];
    }
  }

  /// s[k][i] = score of token 8 * k + lane / 4 and of the lane's row i, less less[i]. Slots that hold no token give
  /// arbitrary values, NaN included. All lanes take part.
  __device__ void compute(const std::uint8_t* tile, const float (&less)[lane_rows],
                          float (&s)[tokens_per_lane][lane_rows]) const {
    float sum[4][columns::products][4] = {};              // of 16 tokens each: codes times steps times queries
    float minimum[halves][groups][columns::blocks] = {};  // of a quarter of the lane's column: minima times queries
    detail::for_constants<spec.strips.count>([&](auto index) {
      constexpr int strip = decltype(index)::value, low = spec.strips.low[strip], high = spec.strips.high[strip];
      const auto* const all = reinterpret_cast<const std::uint32_t*>(tile);
      typename codes::words words, odd;  // the codes of channels 0 and 2 of four, of 1 and 3
      codes::load(words, all + low, all + high, detail::lane_id());
      odd = words;
      for (auto& word : odd.low_words) word >>= 8;
      for (auto& word : odd.high_words) word >>= 8;
      detail::for_constants<halves>([&](auto half) {
        add_channels<strip, decltype(half)::value>(tile, words, odd, sum, minimum[decltype(half)::value]);
      });
    });
    float least[groups][lane_rows], base[lane_rows];
    for (int i = 0; i < lane_rows; ++i) base[i] = offset_[i] - less[i];
    for (int g = 0; g < groups; ++g) {
      for (int n = 0; n < columns::blocks && halves > 1; ++n)
        minimum[0][g][n] = fmaf(minimum[halves - 1][g][n], 1.0f / half_unit, minimum[0][g][n]);
      spread(minimum[0][g], least[g]);
    }
    detail::for_constants<tokens_per_lane>([&](auto index) {
      constexpr int k = decltype(index)::value, t = k / 2, g = 16 * t / spec.group;
      constexpr float unit = passes::power_of_two(24 - in_byte<t>()) / static_cast<float>((1 << width) - 1);
      for (int i = 0; i < lane_rows; ++i) {
        const int high = columns::paired ? 0 : 2 * (i / 2), low = columns::paired ? 0 : high + 1;
        const int r = 2 * (k % 2) + (columns::paired ? 0 : i % 2);
        const float x = fmaf(sum[t][low][columns::paired ? r + 1 : r], 1.0f / low_unit, sum[t][high][r]);
        s[k][i] = fmaf(factor_[i], fmaf(x, unit, least[g][i]), base[i]);
      }
    });
  }

 private:
  static constexpr int groups = tile_tokens / spec.group;  ///< along the tokens of a tile
  static constexpr int halves = spec.strips.channels / 16;
  static constexpr int maximum_at = spec.maximum_offset(0), minimum_at = spec.minimum_offset(0);
  using codes = std::conditional_t<spec.strips.channels == 32, thread::unpacker<width, thread::key_plane_32>,
                                   thread::unpacker<width, thread::key_plane_16>>;
  using plane = thread::key_plane<codes::low_bits, spec.strips.channels>;

  /// Codes of two planes are put together at bit 0, and so are those of which a word has two rows.
  static constexpr bool shifted = width == 3 || (width == 1 && halves == 1);

  /// The second halves are what the first leave, times this: as halves they keep 11 more bits.
  static constexpr float low_unit = 2048.0f;

  /// 2^e for -126 <= e <= 127.
  __device__ static float exponential(int e) {
    return detail::bit_cast<float>(static_cast<std::uint32_t>(e + 127) << 23);
  }
  /// Bit of its byte at which a code of row tile T is in the operand.
  template <int T>
  PACKKV_HOST_DEVICE static constexpr int in_byte() {
    if constexpr (shifted)
      return 0;
    else
      return plane::template place<T, 0>;
  }
  /// Those of the last 16 channels of a strip lie higher; queries make up for it.
  PACKKV_HOST_DEVICE static constexpr float half_unit_of() {
    if constexpr (shifted || halves == 1)
      return 1.0f;
    else
      return passes::power_of_two(plane::template place<0, 0> - plane::template place<0, 1>);
  }
  static constexpr float half_unit = half_unit_of();
  /// Two codes of a token.
  template <int T, int Reg>
  __device__ static std::uint32_t two(const typename codes::words& w) {
    if constexpr (shifted) {
      std::uint32_t a[codes::registers];
      codes::template operand<T>(w, a);
      return a[Reg] & 0x00ff00ffu;
    } else {
      return plane::template in_place<T, Reg>(w.low_words) & 0x00ff00ffu;
    }
  }

  /// Adds 16 channels of a strip for all tokens.
  template <int Strip, int Half>
  __device__ void add_channels(const std::uint8_t* tile, const typename codes::words& words,
                               const typename codes::words& odd, float (&sum)[4][columns::products][4],
                               float (&minimum)[groups][columns::blocks]) const {
    constexpr int first = Strip * spec.strips.channels + 16 * Half;
    const int channel = first + 4 * (detail::lane_id() % 4);
    float q[columns::blocks][4];
    for (int n = 0; n < columns::blocks; ++n) {
      const auto x = detail::load16(&storage_.query[query_row(n)][channel]);
      for (int c = 0; c < 4; ++c) q[n][c] = detail::bit_cast<float>(x.word[c]);
    }
    detail::for_constants<groups>([&](auto index) {
      constexpr int g = decltype(index)::value;
      float least[4], range[4];
      four_halves(tile + minimum_at + 2 * (g * dim + channel), least);
      four_halves(tile + maximum_at + 2 * (g * dim + channel), range);
      for (int c = 0; c < 4; ++c) range[c] -= least[c];
      std::uint32_t b[columns::products][2];
      for (int n = 0; n < columns::blocks; ++n) {
        float x[4];
        for (int c = 0; c < 4; ++c) {
          minimum[g][n] = fmaf(q[n][c], least[c], minimum[g][n]);
          x[c] = q[n][c] * range[c];
        }
        // Bytes 0 and 2 are one pair of a fragment's k, bytes 1 and 3 the other.
        const std::uint32_t high[2] = {detail::pack_halves(x[0], x[2]), detail::pack_halves(x[1], x[3])};
        std::uint32_t low[2];
        for (int i = 0; i < 2; ++i) {
          const detail::two_floats y = detail::unpack_halves(high[i]);
          low[i] = detail::pack_halves((x[i] - y.low) * low_unit, (x[i + 2] - y.high) * low_unit);
        }
        for (int i = 0; i < 2; ++i) {
          if constexpr (columns::paired) {
            b[0][i] = (detail::lane_id() / 4) % 2 != 0 ? low[i] : high[i];
          } else {
            b[2 * n][i] = high[i];
            b[2 * n + 1][i] = low[i];
          }
        }
      }
      detail::for_constants<spec.group / 16>([&](auto row_tile) {
        constexpr int t = g * (spec.group / 16) + decltype(row_tile)::value;
        const std::uint32_t a[4] = {two<t, 2 * Half>(words), two<t, 2 * Half + 1>(words), two<t, 2 * Half>(odd),
                                    two<t, 2 * Half + 1>(odd)};
        for (int n = 0; n < columns::products; ++n) detail::mma_f16(sum[t][n], a, b[n]);
      });
    });
  }

  /// Row of the lane's column in block n of the operand B.
  __device__ static int query_row(int n) {
    const int column = detail::lane_id() / 4;
    return columns::paired ? column / 2 : 8 * n + column;
  }
  __device__ static void four_halves(const std::uint8_t* from, float (&x)[4]) {
    const auto bits = detail::load8(from);
    for (int i = 0; i < 2; ++i) {
      const detail::two_floats y = detail::unpack_halves(bits.word[i]);
      x[2 * i] = y.low;
      x[2 * i + 1] = y.high;
    }
  }
  /// From a quarter of each column's sum to the sums of the lane's rows.
  __device__ static void spread(float (&quarter)[columns::blocks], float (&row)[lane_rows]) {
    for (float& x : quarter)
      for (int m = 1; m < 4; m *= 2) x += detail::shuffle_xor(x, m);
    const int place = detail::lane_id() % 4;
    for (int i = 0; i < lane_rows; ++i)
      row[i] = columns::paired ? detail::shuffle(quarter[0], 8 * place)
                               : detail::shuffle(quarter[i / 2], 4 * (2 * place + i % 2));
  }

  const temp_storage& storage_;
  float factor_[lane_rows], offset_[lane_rows];
};

/// The scores of a codec's tiles.
template <class Codec, int Rows>
using key_scores_of = std::conditional_t<Codec::spec().kind == codec_kind::grouped, grouped_key_scores<Codec, Rows>,
                                         mma_key_scores<Codec, Rows>>;

}  // namespace packkv::warp
