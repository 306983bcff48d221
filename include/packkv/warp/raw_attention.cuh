// SPDX-License-Identifier: Apache-2.0
// Attention of a few query rows over 16-bit tokens that lie anywhere (sinks, ring): a warp takes a token at a time.
// One idea: lane l has the channels l, l + 32, ...; the products of several tokens and rows are summed together, and
// each ends in lanes of its own, where its score is computed.
//   raw_attention<KeyDim, ValueDim> rows(source);   rows.attend(first, count, step, token, score);   rows.row(r)
#pragma once

#include <packkv/core/views.hpp>
#include <packkv/detail/approx.cuh>
#include <packkv/warp/attention_row.cuh>

namespace packkv::warp {

/// Where the channels of a token lie.
struct raw_token {
  const char* key;
  const char* value;
  std::int64_t key_stride, value_stride;  ///< bytes between channels
  dtype key_type, value_type;
};

template <int Count>
__device__ inline void convert_16bit(const std::uint16_t (&bits)[Count], dtype type, float (&x)[Count]) {
  if (type == dtype::float16)
    for (int i = 0; i < Count; ++i) x[i] = detail::unpack_halves(bits[i]).low;
  else
    for (int i = 0; i < Count; ++i) x[i] = bfloat16_to_float(bits[i]);
}

/// bits[i] = the 16-bit element `index[i]` of a row with `stride` bytes between elements.
template <int Count>
__device__ inline void load_16bit(const char* row, std::int64_t stride, const int (&index)[Count],
                                  std::uint16_t (&bits)[Count]) {
  for (int i = 0; i < Count; ++i) bits[i] = *reinterpret_cast<const std::uint16_t*>(row + index[i] * stride);
}
/// The values of float16 or bfloat16 elements; all loads come first.
template <int Count>
__device__ inline void load_16bit(const char* row, std::int64_t stride, dtype type, const int (&index)[Count],
                                  float (&x)[Count]) {
  std::uint16_t bits[Count];
  load_16bit(row, stride, index, bits);
  convert_16bit(bits, type, x);
}

/// The bits of the channels lane, lane + 32, ... of a token.
template <int Count>
__device__ inline void load_channels(const char* token, std::int64_t stride, std::uint16_t (&bits)[Count]) {
  const char* from = token + detail::lane_id() * stride;
  for (int i = 0; i < Count; ++i, from += 32 * stride) bits[i] = *reinterpret_cast<const std::uint16_t*>(from);
}
/// Four query rows at a time; each becomes an attention_row in the original basis.
template <int KeyDim, int ValueDim>
class raw_attention {
 public:
  static constexpr int rows = 4;
  static constexpr int at_once = KeyDim + ValueDim <= 256 ? 4 : 1;  ///< tokens in flight

  /// source(row, index, x) loads x[i] = channel index[i] of a query in the original basis. All lanes take part, here
  /// and below.
  template <class Source>
  __device__ explicit raw_attention(Source&& source) {
    int index[KeyDim / 32];
    for (int i = 0; i < KeyDim / 32; ++i) index[i] = detail::lane_id() + 32 * i;
    for (int r = 0; r < rows; ++r) {
      source(r, index, query_[r]);
      for (int i = 0; i < ValueDim / 32; ++i) channel_[r][i] = 0.0f;
    }
  }

  /// Adds the tokens first, first + step, ... below `end`: token(i) says where number i lies, and
  /// score(i, row, q . k) gives its score (base 2), or -inf if the row does not see it: then what it holds, NaN
  /// included, does not reach the row.
  template <class Token, class Score>
  __device__ void attend(int first, int end, int step, Token&& token, Score&& score) {
    for (int i0 = first; i0 < end; i0 += step * at_once) {
      batch now;
      load(i0, end, step, token, now);
      float dot[products], value[at_once][ValueDim / 32];
      for (int j = 0; j < at_once; ++j) {
        float key[KeyDim / 32];
        convert_16bit(now.key[j], now.key_type[j], key);
        convert_16bit(now.value[j], now.value_type[j], value[j]);
        for (int r = 0; r < rows; ++r) {
          dot[j * rows + r] = 0.0f;
          for (int i = 0; i < KeyDim / 32; ++i) dot[j * rows + r] = fmaf(query_[r][i], key[i], dot[j * rows + r]);
        }
      }
      const float sum = share_out(dot);
      const int mine = detail::lane_id() >> product_shift, i = i0 + mine / rows * step;
      add(i < end ? score(i, mine % rows, sum) : -detail::infinity(), value);
    }
  }

  __device__ attention_row<ValueDim> row(int r) const {
    attention_row<ValueDim> x;
    x.maximum = detail::shuffle(maximum_, r << product_shift);
    x.sum = detail::shuffle(sum_, r << product_shift);
    for (int i = 0; i < ValueDim / 32; ++i) x.channel[i] = channel_[r][i];
    return x;
  }

 private:
  static constexpr int products = at_once * rows;
  /// Product p = token * rows + row is summed in the lanes p << product_shift and the following.
  static constexpr int product_shift = products == 16 ? 1 : 3;

  /// Tokens on their way.
  struct batch {
    std::uint16_t key[at_once][KeyDim / 32], value[at_once][ValueDim / 32];
    dtype key_type[at_once], value_type[at_once];
  };
  template <class Token>
  __device__ static void load(int first, int end, int step, Token&& token, batch& b) {
    for (int j = 0; j < at_once; ++j) {
      const raw_token from = token(min_of(first + j * step, end - 1));
      load_channels(from.key, from.key_stride, b.key[j]);
      load_channels(from.value, from.value_stride, b.value[j]);
      b.key_type[j] = from.key_type;
      b.value_type[j] = from.value_type;
    }
  }

  /// Sums each product over the lanes: every step halves the products that a lane keeps.
  __device__ static float share_out(float (&x)[products]) {
    int count = products;
#pragma unroll
    for (int m = detail::warp_threads / 2; m > 0; m /= 2) {
      const bool upper = (detail::lane_id() & m) != 0;
      if (count > 1) {
        count /= 2;
#pragma unroll
        for (int p = 0; p < products / 2; ++p)
          if (p < count) {
            const float keep = upper ? x[p + count] : x[p], give = upper ? x[p] : x[p + count];
            x[p] = keep + detail::shuffle_xor(give, m);
          }
      } else {
        x[0] += detail::shuffle_xor(x[0], m);
      }
    }
    return x[0];
  }

  /// Adds tokens whose scores lie in the lanes of their products.
  __device__ void add(float s, const float (&value)[at_once][ValueDim / 32]) {
    constexpr int next_token = rows << product_shift;
    float top = fmaxf(maximum_, s);
    for (int m = next_token; m < detail::warp_threads; m *= 2) top = fmaxf(top, detail::shuffle_xor(top, m));
    const float keep = detail::exp2_fast(maximum_ - top), weight = detail::exp2_fast(s - top);
    float all = weight;
    for (int m = next_token; m < detail::warp_threads; m *= 2) all += detail::shuffle_xor(all, m);
    maximum_ = top;
    sum_ = fmaf(sum_, keep, all);
    float weights[rows][at_once], finite = 0.0f;
    for (int r = 0; r < rows; ++r) {
      const float keep_row = detail::shuffle(keep, r << product_shift);
      for (int i = 0; i < ValueDim / 32; ++i) channel_[r][i] *= keep_row;
      for (int j = 0; j < at_once; ++j) weights[r][j] = detail::shuffle(weight, (j * rows + r) << product_shift);
    }
    for (int j = 0; j < at_once; ++j)
      for (int i = 0; i < ValueDim / 32; ++i) finite = fmaf(value[j][i], 0.0f, finite);
    const bool all_finite = __all_sync(detail::all_lanes, finite == 0.0f) != 0;
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < at_once; ++j)
        if (all_finite || weights[r][j] != 0.0f)  // the same in all lanes; 0 * NaN is no 0
          for (int i = 0; i < ValueDim / 32; ++i) channel_[r][i] = fmaf(weights[r][j], value[j][i], channel_[r][i]);
  }

  float query_[rows][KeyDim / 32], channel_[rows][ValueDim / 32];
  float maximum_ = attention_row<ValueDim>::lowest, sum_ = 0.0f;  ///< of row (lane >> product_shift) % rows
};

}  // namespace packkv::warp
