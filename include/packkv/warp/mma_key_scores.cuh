// SPDX-License-Identifier: Apache-2.0
// Scores of the 64 keys of a coded tile against up to 16 query rows, by integer matrix products on the codes.
// One idea: a query is a 16-bit fixed-point number per channel, its bytes are two columns of a u8 x s8 product, and so
// a score is exact in the codes and in the rounded query (docs/numerics.md, rules 1 and 2).
//   using scores = mma_key_scores<Codec, Rows>;   const auto own = scores::head_values::load(head);
//   scores::prepare(storage, own, source, factor, warp, warps);
//   __syncthreads();   scores keys(storage);   float s[8][scores::columns::lane_rows];   keys.compute(tile, less, s);
#pragma once

#include <packkv/codec/quantize.hpp>
#include <packkv/detail/approx.cuh>
#include <packkv/detail/matrix.cuh>
#include <packkv/detail/unroll.hpp>
#include <packkv/thread/unpack.cuh>
#include <packkv/warp/lane_parameters.cuh>
#include <packkv/warp/score_columns.cuh>
#include <packkv/warp/transform.cuh>

namespace packkv::warp {

/// Codec is a static key_codec.
template <class Codec, int Rows>
class mma_key_scores {
 public:
  static constexpr codec_spec spec = Codec::spec();
  static constexpr int dim = spec.head_dim;
  static constexpr int code_bytes = spec.code_bytes(), leading_offset = spec.leading_offset();
  using columns = score_columns<Rows>;
  static_assert(!columns::spread, "keys take 4, 8 or 16 query rows at a time");
  static constexpr int lane_rows = columns::lane_rows;
  static constexpr bool has_basis = spec.transform == transform_kind::basis;

  /// The queries of a block, in shared memory.
  struct temp_storage {
    alignas(16) std::uint8_t bytes[2][Rows][dim];  ///< high and low bytes, of codes' channels alone
    float factor[Rows];                            ///< from a product with codes to a score
    float middle[Rows];                            ///< what the centre of the codes contributes
    float offset[Rows];                            ///< query . channel_offset
    float leading[spec.leading > 0 ? spec.leading : 1][Rows];
    /// With a basis: the queries before and after it.
    alignas(16) float plain[has_basis ? Rows : 1][has_basis ? dim : 4],
        turned[has_basis ? Rows : 1][has_basis ? dim : 4];
  };

  using head_values = lane_parameters<Codec>;

  /// Rounds the queries; source(row, index, x) loads x[i] = channel index[i] of a query in the original basis, `own` is
  /// what the lane needs of the head's parameters. Scores are multiplied by `factor`. Row r is done by warp r % warps.
  /// The caller synchronises the block before the constructor; with a basis all threads of the block take part.
  template <class Source>
  __device__ static void prepare(temp_storage& storage, const head_values& own, Source&& source, float factor, int warp,
                                 int warps) {
    using namespace packkv::detail;
    constexpr int registers = dim / 32;
    if constexpr (has_basis) {
      for (int row = warp; row < Rows; row += warps) {
        float q[registers];
        source(row, own.channel, q);
        store_offset(storage, own, q, factor, row);
        for (int i = 0; i < registers; ++i) storage.plain[row][lane_id() + 32 * i] = q[i];
      }
      __syncthreads();
      matrix_times_rows(own.basis, storage.plain, storage.turned, warp, warps);
      __syncthreads();
    }
    for (int row = warp; row < Rows; row += warps) {
      float q[registers];
      if constexpr (has_basis) {
        for (int i = 0; i < registers; ++i) q[i] = storage.turned[row][lane_id() + 32 * i];
      } else {
        source(row, own.channel, q);
        store_offset(storage, own, q, factor, row);
      }
      bool finite = true;
      for (int i = 0; i < registers; ++i) finite = finite && is_finite(q[i]);
      finite = __all_sync(all_lanes, finite) != 0;  // if not, integers are made of zeros
      if (spec.transform == transform_kind::hadamard) hadamard<dim>(q);
      float largest = 0.0f;
      detail::for_constants<dim / 32>([&](auto index) {
        constexpr int i = decltype(index)::value;
        const int c = lane_id() + 32 * i;
        if constexpr (i == 0 && spec.leading > 0)
          if (c < spec.leading) storage.leading[c][row] = factor * q[0] * own.leading;
        const int width = head_values::template width_of<i>();
        q[i] = finite && width > 0 && c >= spec.leading ? q[i] * own.column[i] : 0.0f;
        largest = fmaxf(largest, fabsf(q[i]));
      });
      largest = warp_max(largest);
      const float scale = largest > 0x1p-100f ? query_max * reciprocal_fast(largest) : 0.0f;
      std::int32_t middle = 0;  // twice the sum
      detail::for_constants<dim / 32>([&](auto index) {
        constexpr int i = decltype(index)::value;
        const int c = lane_id() + 32 * i, x = static_cast<int>(rintf(q[i] * scale)), high = (x + 128) >> 8;
        middle += x * ((1 << head_values::template width_of<i>()) - 1);
        storage.bytes[0][row][c] = static_cast<std::uint8_t>(high);
        storage.bytes[1][row][c] = static_cast<std::uint8_t>(x - 256 * high);
      });
      const float twice_middle = warp_sum(static_cast<float>(middle));
      if (lane_id() == 0) {
        const float unit = scale > 0.0f ? factor * (largest * (1.0f / query_max)) : 0.0f;
        storage.factor[row] = finite ? unit : nan_float();
        storage.middle[row] = unit * 0.5f * twice_middle;
      }
    }
  }

  __device__ explicit mma_key_scores(const temp_storage& storage) {
    const int column = detail::lane_id() / 4, place = detail::lane_id() % 4;
    detail::for_constants<spec.strips.count>([&](auto index) {
      constexpr int strip = decltype(index)::value;
      for (int n = 0; n < columns::products; ++n) {
        const int byte = columns::paired ? column % 2 : n % 2;
        const int row = columns::paired ? column / 2 : 8 * (n / 2) + column;
        for (int r = 0; r < b_registers; ++r)
          query_[strip][n][r] = *reinterpret_cast<const std::uint32_t*>(
              &storage.bytes[byte][row][strip * spec.strips.channels + 16 * r + 4 * place]);
      }
    });
    for (int i = 0; i < lane_rows; ++i) {
      const int row = columns::row(i);
      factor_[i] = storage.factor[row];
      middle_[i] = storage.middle[row];
      offset_[i] = storage.offset[row];
      for (int c = 0; c < spec.leading; ++c) leading_[c][i] = storage.leading[c][row];
    }
  }

  /// s[k][i] = score of token 8 * k + lane / 4 and of the lane's row i, less less[i]. Slots that hold no token give
  /// arbitrary values, NaN included. All lanes take part.
  __device__ void compute(const std::uint8_t* tile, const float (&less)[lane_rows],
                          float (&s)[tokens_per_lane][lane_rows]) const {
    // 16 tokens at a time, so that few sums are alive.
    held_words<0> words;
    words.load(reinterpret_cast<const std::uint32_t*>(tile));
    float row[tokens_per_lane], base[lane_rows];
    unpack_rows(load_rows(tile + code_bytes), row);
    for (int i = 0; i < lane_rows; ++i) base[i] = offset_[i] - less[i];
    detail::for_constants<4>([&](auto index) {
      constexpr int t = decltype(index)::value;
      std::int32_t sum[columns::products][4] = {};
      if constexpr (uniform_width() > 0)
        add_pairs<t>(words, sum);
      else
        detail::for_constants<spec.strips.count>([&](auto strip) {
          if constexpr (spec.strips.width[decltype(strip)::value] > 0) add_strip<decltype(strip)::value, t>(words, sum);
        });
      constexpr float unit = 1.0f / static_cast<float>(mma_key_scores::template unit_of<t>());
      for (int k = 2 * t; k < 2 * t + 2; ++k)
        for (int i = 0; i < lane_rows; ++i) {
          const int high = columns::paired ? 0 : 2 * (i / 2), low = columns::paired ? 0 : high + 1;
          const int r = 2 * (k % 2) + (columns::paired ? 0 : i % 2);
          const float x = joined(sum[high][r], sum[low][columns::paired ? r + 1 : r]);
          s[k][i] = fmaf(row[k], fmaf(factor_[i] * unit, x, -middle_[i]), base[i]);
        }
    });
    if constexpr (spec.leading > 0) add_leading(tile, s);
  }

 private:
  __device__ static void store_offset(temp_storage& storage, const head_values& own, const float (&q)[dim / 32],
                                      float factor, int row) {
    float offset = 0.0f;
    for (int i = 0; i < dim / 32; ++i) offset = fmaf(q[i], own.offset[i], offset);
    offset = detail::warp_sum(offset);
    if (detail::lane_id() == 0) storage.offset[row] = factor * offset;
  }

  static constexpr int b_registers = spec.strips.channels / 16;
  template <int Width>
  using unpacker = std::conditional_t<spec.strips.channels == 32, thread::unpacker<Width, thread::key_plane_32>,
                                      thread::unpacker<Width, thread::key_plane_16>>;
  /// Largest rounded query: its high byte is at most 127.
  static constexpr float query_max = 32512.0f;

  /// Where all strips that are stored have the same width and come in pairs, hardly a code is shifted: a product has
  /// the first 16 channels of two strips, another the last 16. What these lie apart is made up for in the sums or,
  /// where that takes more instructions, by a shift of each word.
  PACKKV_HOST_DEVICE static constexpr int uniform_strips() {
    int count = 0;
    for (int i = 0; i < spec.strips.count; ++i) count += spec.strips.width[i] > 0 ? 1 : 0;
    return count;
  }
  PACKKV_HOST_DEVICE static constexpr int uniform_width() {
    const int width = spec.strips.width[0];
    bool same = (width == 1 || width == 2 || width == 4) && spec.strips.channels == 32 && uniform_strips() % 2 == 0;
    for (int i = 1; i < spec.strips.count; ++i)
      same = same && (spec.strips.width[i] == width || spec.strips.width[i] == 0);
    return same ? width : 0;
  }
  template <int Width>
  using key_plane = thread::key_plane<Width, 32>;
  /// Bits from the last 16 channels of a strip to the first.
  template <int Width>
  static constexpr int halves_apart = key_plane<Width>::template place<0, 1> - key_plane<Width>::template place<0, 0>;
  PACKKV_HOST_DEVICE static constexpr bool shifts_words() {
    return 2 * uniform_width() * uniform_strips() < 16 * columns::products;
  }

  /// What a sum of row tile t is too large by.
  template <int RowTile>
  PACKKV_HOST_DEVICE static constexpr int unit_of() {
    constexpr int half = shifts_words() ? 0 : 1;
    if constexpr (uniform_width() > 0)
      return 1 << key_plane<uniform_width()>::template place<RowTile, half>;
    else
      return 1;
  }
  /// Largest sum of codes times rounded queries.
  PACKKV_HOST_DEVICE static constexpr double largest_sum() {
    double codes = 0.0;
    for (int i = 0; i < spec.strips.count; ++i) codes += ((1 << spec.strips.width[i]) - 1) * spec.strips.channels;
    return codes * 32640.0 * unit_of<3>();
  }
  __device__ static float joined(std::int32_t high, std::int32_t low) {
    if constexpr (largest_sum() < 2147483647.0)
      return static_cast<float>(high * 256 + low);
    else
      return fmaf(256.0f, static_cast<float>(high), static_cast<float>(low));
  }
  /// A lane's words of the strips Strip, Strip + 1, ...
  template <int Strip, bool Exists = (Strip < spec.strips.count)>
  struct held_words {
    __device__ void load(const std::uint32_t*) {}
  };
  template <int Strip>
  struct held_words<Strip, true> : held_words<Strip + 1> {
    static constexpr int width = spec.strips.width[Strip], low = spec.strips.low[Strip], high = spec.strips.high[Strip];
    using codes = unpacker<(width > 0 ? width : 1)>;
    typename codes::words own;

    __device__ void load(const std::uint32_t* tile) {
      if constexpr (width > 0) codes::load(own, tile + low, tile + high, detail::lane_id());
      held_words<Strip + 1>::load(tile);
    }
  };

  /// Adds the products of a strip and the tokens 16 * RowTile on.
  template <int Strip, int RowTile>
  __device__ void add_strip(const held_words<Strip>& words, std::int32_t (&sum)[columns::products][4]) const {
    using codes = typename held_words<Strip>::codes;
    std::uint32_t a[codes::registers];
    codes::template operand<RowTile>(words.own, a);
    for (int n = 0; n < columns::products; ++n) detail::mma_u8s8(sum[n], a, query_[Strip][n]);
  }

  /// The same for all strips, where they have the same width.
  template <int RowTile>
  __device__ void add_pairs(const held_words<0>& words, std::int32_t (&sum)[columns::products][4]) const {
    constexpr int pairs = uniform_strips() / 2, apart = halves_apart<uniform_width()>;
    if constexpr (shifts_words()) {
      detail::for_constants<pairs>([&](auto pair) {
        add_half<2 * decltype(pair)::value, RowTile, 0, 0>(words, sum);
        add_half<2 * decltype(pair)::value, RowTile, 1, apart>(words, sum);
      });
    } else {
      std::int32_t first[columns::products][4] = {};
      detail::for_constants<pairs>([&](auto pair) {
        add_half<2 * decltype(pair)::value, RowTile, 0, 0>(words, first);
        add_half<2 * decltype(pair)::value, RowTile, 1, 0>(words, sum);
      });
      for (int n = 0; n < columns::products; ++n)
        for (int r = 0; r < 4; ++r) sum[n][r] += first[n][r] * (1 << apart);
    }
  }
  /// The products of the channels 16 * Half + 0..15 of the strips Strip and Strip + 1, of words shifted to the right.
  template <int Strip, int RowTile, int Half, int Shift>
  __device__ void add_half(const held_words<Strip>& words, std::int32_t (&sum)[columns::products][4]) const {
    using plane = key_plane<uniform_width()>;
    const held_words<Strip + 1>& next = words;
    const auto &first = words.own.low_words, &second = next.own.low_words;
    const std::uint32_t a[4] = {plane::template in_place<RowTile, 2 * Half, Shift>(first),
                                plane::template in_place<RowTile, 2 * Half + 1, Shift>(first),
                                plane::template in_place<RowTile, 2 * Half, Shift>(second),
                                plane::template in_place<RowTile, 2 * Half + 1, Shift>(second)};
    for (int n = 0; n < columns::products; ++n) {
      const std::uint32_t b[2] = {query_[Strip][n][Half], query_[Strip + 1][n][Half]};
      detail::mma_u8s8(sum[n], a, b);
    }
  }

  __device__ void add_leading(const std::uint8_t* tile, float (&s)[tokens_per_lane][lane_rows]) const {
    for (int c = 0; c < spec.leading; ++c) {
      const auto x = detail::load8(tile + leading_offset + c * tile_tokens + 8 * (detail::lane_id() / 4));
      for (int k = 0; k < tokens_per_lane; ++k) {
        const auto component = static_cast<float>(static_cast<std::int8_t>(x.word[k / 4] >> 8 * (k % 4)));
        for (int i = 0; i < lane_rows; ++i) s[k][i] = fmaf(leading_[c][i], component, s[k][i]);
      }
    }
  }

  std::uint32_t query_[spec.strips.count][columns::products][b_registers];
  float factor_[lane_rows], middle_[lane_rows], offset_[lane_rows];
  float leading_[spec.leading > 0 ? spec.leading : 1][lane_rows];
};

}  // namespace packkv::warp
