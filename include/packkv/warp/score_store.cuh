// SPDX-License-Identifier: Apache-2.0
// Stores the scores of a tile, as mma_key_scores leaves them in the lanes, to [batch, query_heads, tokens] of any type.
// One idea: 16-bit scores of neighbouring tokens meet in one lane by the transpose of movmatrix, and go out in pairs.
//   score_store<Rows> to(scores, b, first_head, rows);   to.store(s, tile * tile_tokens, length);
#pragma once

#include <packkv/core/views.hpp>
#include <packkv/detail/matrix.cuh>
#include <packkv/detail/unroll.hpp>
#include <packkv/warp/score_columns.cuh>

namespace packkv::warp {

/// Two floats in a 16-bit type, nearest even; `low` in the low 16 bits.
__device__ inline std::uint32_t pack_16bit(float low, float high, dtype type) {
  return type == dtype::float16 ? detail::pack_halves(low, high) : detail::pack_16bit<true>(low, high);
}

/// Where the scores of a sequence's rows go, and their type.
template <int Rows>
class score_store {
 public:
  using columns = score_columns<Rows>;
  static constexpr int lane_rows = columns::lane_rows;

  /// For the rows first_head .. first_head + rows - 1 of sequence b.
  __device__ score_store(const output_view<3>& out, std::int64_t b, std::int64_t first_head, int rows)
      : type_(out.type), stride_(out.stride[2]) {
    char* const first = static_cast<char*>(detail::address(out, b, first_head, 0));
    const std::int64_t row_stride = out.stride[1];
    pairs_ = type_ != dtype::float32 && stride_ == 2 &&
             ((reinterpret_cast<std::uintptr_t>(first) | static_cast<std::uintptr_t>(row_stride)) & 3u) == 0;
    const int group = detail::lane_id() / 4, place = detail::lane_id() % 4;
    token_ = !pairs_ ? group : columns::paired ? 8 * (group % 2) + 2 * place : 2 * place;
    for (int i = 0; i < lane_rows; ++i) {
      const int row = !pairs_ ? columns::row(i) : columns::paired ? group / 2 : 8 * i + group;
      const bool exists = row < rows && (!pairs_ || i < columns::blocks);
      to_[i] = exists ? first + row * row_stride + token_ * stride_ : nullptr;
    }
  }

  /// Stores the scores of the tokens first .. first + 63 that are below `length`. All lanes take part.
  __device__ void store(const float (&s)[tokens_per_lane][lane_rows], int first, int length) const {
    const int count = length - first - token_;  // token_ + t is stored if t < count
    const std::int64_t at = first * stride_;
    if (pairs_)
      store_pairs(s, at, count);
    else if (type_ == dtype::float32)
      each(s, at, count, [](char* to, float x) { *reinterpret_cast<float*>(to) = x; });
    else
      each(s, at, count, [type = type_](char* to, float x) {
        *reinterpret_cast<std::uint16_t*>(to) = static_cast<std::uint16_t>(pack_16bit(x, 0.0f, type));
      });
  }

 private:
  template <class Put>
  __device__ void each(const float (&s)[tokens_per_lane][lane_rows], std::int64_t at, int count, Put&& put) const {
    for (int i = 0; i < lane_rows; ++i)
      if (to_[i] != nullptr) {
        char* to = to_[i] + at;
        for (int k = 0; k < tokens_per_lane; ++k, to += 8 * stride_)
          if (8 * k < count) put(to, s[k][i]);
      }
  }

  __device__ void store_pairs(const float (&s)[tokens_per_lane][lane_rows], std::int64_t at, int count) const {
    // A matrix of movmatrix: its row is lane / 4, the token; its columns are the two halves of the four places, which
    // are two groups of eight tokens of four rows, or the two rows of each place.
    detail::for_constants<columns::paired ? 4 : tokens_per_lane>([&](auto index) {
      constexpr int k = decltype(index)::value, t = columns::paired ? 16 * k : 8 * k;
      for (int n = 0; n < columns::blocks; ++n) {
        std::uint32_t x;
        if constexpr (columns::paired)
          x = detail::movmatrix(pack_16bit(s[2 * k][0], s[2 * k + 1][0], type_));
        else
          x = detail::movmatrix(pack_16bit(s[k][2 * n], s[k][2 * n + 1], type_));
        if (to_[n] == nullptr) continue;
        char* const to = to_[n] + at + 2 * t;
        if (t + 1 < count)
          *reinterpret_cast<std::uint32_t*>(to) = x;
        else if (t < count)
          *reinterpret_cast<std::uint16_t*>(to) = static_cast<std::uint16_t>(x);
      }
    });
  }

  dtype type_;
  bool pairs_;  ///< 16-bit scores of neighbouring tokens lie in aligned words
  std::int64_t stride_;
  int token_;  ///< the lane's first token
  char* to_[lane_rows];
};

}  // namespace packkv::warp
