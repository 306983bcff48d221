// SPDX-License-Identifier: Apache-2.0
// Attention over 16-bit tokens that lie anywhere (sinks, ring), by matrix products: a warp takes 16 tokens at a time.
// One idea: which channel is which number of a product is free, so a lane's channels are neighbours and come in 16-byte
// loads; weights are two numbers of V's type, so that hardly anything is lost of them.
//   raw_attention<KeyDim, ValueDim, Rows> rows(part, row_floats);   rows.add(chunk, query, token, score);
//   rows.finish(maximum_at, sum_at);
#pragma once

#include <packkv/core/views.hpp>
#include <packkv/detail/approx.cuh>
#include <packkv/detail/matrix.cuh>
#include <packkv/detail/unroll.hpp>
#include <packkv/warp/attention_row.cuh>
#include <type_traits>

namespace packkv::warp {

/// Float16 or bfloat16 elements as floats.
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

/// A vector of 16-bit channels that lie `stride` bytes apart.
struct raw_vector {
  const char* data;
  std::int64_t stride;

  /// word[i] = the channels first + 2 * i and the one after it. The address of channel `first` of a vector that lies
  /// side by side is a multiple of 16 bytes if that of the vector is.
  template <int Words>
  __device__ void load(int first, std::uint32_t (&word)[Words]) const {
    static_assert(Words % 4 == 0, "16 bytes at a time");
    if (stride == 2 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0) {
      for (int i = 0; i < Words; i += 4) {
        const detail::bytes16 x = detail::load16(data + 2 * first + 4 * i);
        for (int k = 0; k < 4; ++k) word[i + k] = x.word[k];
      }
    } else {
      const char* at = data + first * stride;
      for (int i = 0; i < Words; ++i, at += 2 * stride)
        word[i] = *reinterpret_cast<const std::uint16_t*>(at) |
                  std::uint32_t{*reinterpret_cast<const std::uint16_t*>(at + stride)} << 16;
    }
  }
};
/// Up to 16 tokens of the same types, which lie at slots of a ring.
struct raw_chunk {
  const char *key, *value;                ///< of slot 0
  std::int64_t key_token, value_token;    ///< bytes between tokens
  std::int64_t key_stride, value_stride;  ///< bytes between channels
  dtype key_type, value_type;
  int slot, capacity;  ///< of the first token; slots of the ring
  int count;           ///< tokens, at least 1

  __device__ raw_vector key_of(int i) const { return {key + slot_of(i) * key_token, key_stride}; }
  __device__ raw_vector value_of(int i) const { return {value + slot_of(i) * value_token, value_stride}; }

 private:
  __device__ int slot_of(int i) const { return slot + i < capacity ? slot + i : slot + i - capacity; }
};
/// Half-open range of the tokens of a chunk.
struct raw_range {
  int begin, end;
};

/// Rows (4, 8 or 16) query rows in the original basis, whose sums lie in shared memory.
template <int KeyDim, int ValueDim, int Rows>
class raw_attention {
 public:
  static constexpr int tokens = 16;  ///< of a chunk, at most

  /// Row r of the sums: ValueDim floats at part + r * row_floats. Nothing is read or written there before the first
  /// chunk. All lanes take part, here and below.
  __device__ raw_attention(float* part, int row_floats) : part_(part), row_floats_(row_floats) {
    for (int h = 0; h < lane_rows; ++h) {
      maximum_[h] = attention_row<ValueDim>::lowest;
      sum_[h] = 0.0f;
    }
  }

  /// Adds tokens: query(row) says where a query lies, all of query_type; seen(row) which tokens the row sees: what the
  /// others hold, NaN included, does not reach it; and score(i, row, q . k) gives the score of token i (base 2).
  template <class Query, class Seen, class Score>
  __device__ void add(const raw_chunk& chunk, dtype query_type, Query&& query, Seen&& seen, Score&& score) {
    const int own[2] = {min_of(group(), chunk.count - 1), min_of(group() + 8, chunk.count - 1)};
    float s[2][4] = {};
    detail::for_constants<KeyDim / key_slab>([&](auto index) {
      constexpr int first = decltype(index)::value * key_slab;
      std::uint32_t q[lane_rows][key_words], k[2][key_words];
      for (int h = 0; h < lane_rows; ++h) query(row(h)).load(first + place() * 2 * key_words, q[h]);
      for (int half = 0; half < 2; ++half) chunk.key_of(own[half]).load(first + place() * 2 * key_words, k[half]);
      with_type(chunk.key_type, [&](auto bfloat) {
        constexpr bool keys = decltype(bfloat)::value;
        if ((query_type == dtype::bfloat16) == keys)
          multiply_keys<keys>(q, k, s);
        else
          multiply_keys_of_another_type<keys>(q, k, s);
      });
    });
    std::uint32_t v[2][value_words];
    const auto load_values = [&](int first) {
      for (int half = 0; half < 2; ++half) chunk.value_of(own[half]).load(first + place() * 2 * value_words, v[half]);
    };
    load_values(0);  // on their way while the weights are worked out
    float keep[lane_rows];
    weigh(chunk.count, s, seen, score, keep);
    for (int first = 0; first < ValueDim; first += value_slab) {
      if (first > 0) load_values(first);
      with_type(chunk.value_type, [&](auto bfloat) { add_values<decltype(bfloat)::value>(first, v, s, keep); });
    }
    begun_ = true;
  }

  /// Stores maximum and sum of every row behind its sums.
  __device__ void finish(int maximum_at, int sum_at) const {
    for (int h = 0; h < lane_rows; ++h) {
      if (row(h) >= Rows) continue;
      float* const to = part_ + row(h) * row_floats_;
      if (!begun_)
        for (int i = place(); i < ValueDim; i += 4) to[i] = 0.0f;
      if (place() == 0) {
        to[maximum_at] = maximum_[h];
        to[sum_at] = sum_[h];
      }
    }
  }

 private:
  /// Rows of a lane: lane / 4, and the one 8 below it.
  static constexpr int lane_rows = Rows > 8 ? 2 : 1;
  /// Channels at a time.
  PACKKV_HOST_DEVICE static constexpr int slab_of(int dim) {
    int slab = 128;
    while (dim % slab != 0) slab -= 32;
    return slab;
  }
  static constexpr int key_slab = slab_of(KeyDim), value_slab = slab_of(ValueDim);
  /// Words of two channels that a lane has of a slab.
  static constexpr int key_words = key_slab / 8, value_words = value_slab / 8;
  static constexpr int at_once = 4;  ///< words of V that are multiplied together

  __device__ static int group() { return detail::lane_id() / 4; }
  __device__ static int place() { return detail::lane_id() % 4; }
  __device__ static int row(int h) { return group() + 8 * h; }

  template <class F>
  __device__ static void with_type(dtype type, F&& f) {
    if (type == dtype::float16)
      f(std::false_type{});
    else
      f(std::true_type{});
  }
  /// One product of 16 channels or tokens.
  template <bool BFloat>
  __device__ static void multiply(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    if constexpr (BFloat)
      detail::mma_bf16(d, a, b);
    else
      detail::mma_f16(d, a, b);
  }
  /// s[half] += q x k, rows x tokens 8 * half .. 8 * half + 7.
  template <bool BFloat>
  __device__ static void multiply_keys(const std::uint32_t (&q)[lane_rows][key_words],
                                       const std::uint32_t (&k)[2][key_words], float (&s)[2][4]) {
    for (int i = 0; i < key_words; i += 2) {
      const std::uint32_t a[4] = {q[0][i], lane_rows > 1 ? q[lane_rows - 1][i] : 0u, q[0][i + 1],
                                  lane_rows > 1 ? q[lane_rows - 1][i + 1] : 0u};
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t b[2] = {k[half][i], k[half][i + 1]};
        multiply<BFloat>(s[half], a, b);
      }
    }
  }
  /// The same where queries are of the other type: they become two numbers of the keys' type, which loses less than
  /// 2^-30 of a row's largest, times a power of two that brings the largest near 2^8.
  template <bool BFloat>
  __device__ static void multiply_keys_of_another_type(const std::uint32_t (&q)[lane_rows][key_words],
                                                       const std::uint32_t (&k)[2][key_words], float (&s)[2][4]) {
    std::uint32_t high[lane_rows][key_words], low[lane_rows][key_words];
    float unit[lane_rows];
#pragma unroll
    for (int h = 0; h < lane_rows; ++h) {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < key_words; ++i) {
        const detail::two_floats x = detail::unpack_16bit<!BFloat>(q[h][i]);
        largest = fmaxf(largest, fmaxf(fabsf(x.low), fabsf(x.high)));
      }
      for (int m = 1; m < 4; m *= 2) largest = fmaxf(largest, detail::shuffle_xor(largest, m));
      const std::uint32_t exponent = detail::bit_cast<std::uint32_t>(largest) >> 23;  // 255: not finite
      const std::uint32_t of_unit = min_of(max_of(exponent, 9u), 254u) - 8u;
      unit[h] = detail::bit_cast<float>(of_unit << 23);
      const float inverse = detail::bit_cast<float>((254u - of_unit) << 23);
#pragma unroll
      for (int i = 0; i < key_words; ++i) {
        const detail::two_floats x = detail::unpack_16bit<!BFloat>(q[h][i]);
        split<BFloat>(x.low * inverse, x.high * inverse, high[h][i], low[h][i]);
      }
    }
    float sum[2][4] = {};
    multiply_keys<BFloat>(high, k, sum);
    multiply_keys<BFloat>(low, k, sum);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[half][i] = fmaf(sum[half][i], unit[i / 2 % lane_rows], s[half][i]);
  }
  /// Two floats as sums of two numbers of a type.
  template <bool BFloat>
  __device__ static void split(float x, float y, std::uint32_t& high, std::uint32_t& low) {
    high = detail::pack_16bit<BFloat>(x, y);
    const detail::two_floats rounded = detail::unpack_16bit<BFloat>(high);
    low = detail::pack_16bit<BFloat>(x - rounded.low, y - rounded.high);
  }

  /// Turns products into weights, and says by what earlier sums shrink.
  template <class Seen, class Score>
  __device__ void weigh(int count, float (&s)[2][4], Seen&& seen, Score&& score, float (&keep)[lane_rows]) {
    for (int h = 0; h < lane_rows; ++h) {
      float top = maximum_[h], all = 0.0f;
      raw_range range = {0, 0};
      if (row(h) < Rows) range = seen(row(h));
      for (int half = 0; half < 2; ++half)
        for (int e = 0; e < 2; ++e) {
          float& x = s[half][2 * h + e];
          const int i = 8 * half + 2 * place() + e;
          x = i >= range.begin && i < min_of(range.end, count) ? score(i, row(h), x) : -detail::infinity();
          top = fmaxf(top, x);
        }
      for (int m = 1; m < 4; m *= 2) top = fmaxf(top, detail::shuffle_xor(top, m));
      for (int half = 0; half < 2; ++half)
        for (int e = 0; e < 2; ++e) {
          float& x = s[half][2 * h + e];
          x = detail::exp2_fast(x - top);
          all += x;
        }
      for (int m = 1; m < 4; m *= 2) all += detail::shuffle_xor(all, m);
      keep[h] = detail::exp2_fast(maximum_[h] - top);
      maximum_[h] = top;
      sum_[h] = fmaf(sum_[h], keep[h], all);
    }
  }

  /// Adds the channels first .. first + value_slab - 1; v[half] are the lane's channels of token 8 * half + group().
  template <bool BFloat>
  __device__ void add_values(int first, const std::uint32_t (&v)[2][value_words], const float (&weight)[2][4],
                             const float (&keep)[lane_rows]) {
    std::uint32_t high[4] = {}, low[4] = {};
    for (int half = 0; half < 2; ++half)
      for (int h = 0; h < lane_rows; ++h)
        split<BFloat>(weight[half][2 * h], weight[half][2 * h + 1], high[2 * half + h], low[2 * half + h]);
    std::uint32_t zero = 0;
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < value_words; ++i) zero = detail::add_zero_times<BFloat>(v[half][i], zero);
    const bool finite = __all_sync(detail::all_lanes, (zero & 0x7fff7fffu) == 0) != 0;
    // 0 * NaN is no 0: if need be each row alone, without the tokens that have no weight in it.
#pragma unroll 1
    for (int only = finite ? Rows - 1 : 0; only < Rows; ++only) {
      bool used[2] = {true, true};
      if (!finite)
        for (int half = 0; half < 2; ++half) {
          const int lane = 4 * (only % 8) + group() / 2, h = lane_rows > 1 ? only / 8 : 0;
          const float even = detail::shuffle(h == 0 ? weight[half][0] : weight[half][2], lane),
                      odd = detail::shuffle(h == 0 ? weight[half][1] : weight[half][3], lane);
          used[half] = (group() % 2 == 0 ? even : odd) != 0.0f;
        }
      for (int i0 = 0; i0 < value_words; i0 += at_once) {  // so that products need not wait for one another
        std::uint32_t b[at_once][2];
        float sum[at_once][4] = {};
        for (int i = 0; i < at_once; ++i)
          for (int half = 0; half < 2; ++half) b[i][half] = detail::movmatrix(used[half] ? v[half][i0 + i] : 0u);
        for (int i = 0; i < at_once; ++i) multiply<BFloat>(sum[i], high, b[i]);
        for (int i = 0; i < at_once; ++i) multiply<BFloat>(sum[i], low, b[i]);
        for (int h = 0; h < lane_rows; ++h)
          if (row(h) < Rows && (finite || row(h) == only)) {
            float* const to = part_ + row(h) * row_floats_ + first + place() * 2 * value_words + 2 * i0;
            for (int i = 0; i < at_once; ++i)
              for (int e = 0; e < 2; ++e) {
                const float x = sum[i][2 * h + e];
                to[2 * i + e] = begun_ ? fmaf(to[2 * i + e], keep[h], x) : x;
              }
          }
      }
    }
  }

  float* part_;
  int row_floats_;
  bool begun_ = false;
  float maximum_[lane_rows], sum_[lane_rows];
};

}  // namespace packkv::warp
