// SPDX-License-Identifier: Apache-2.0
// Which lane holds the score of which token and query row in the kernels that use matrix instructions.
// One idea: a product with queries as columns gives a lane two neighbouring columns. With up to four rows these are the
// high and the low byte of one row, so that all eight columns work; with more rows they are two rows.
//   using columns = score_columns<Rows>;   float s[tokens_per_lane][columns::lane_rows];
#pragma once

#include <packkv/codec/strips.hpp>
#include <packkv/detail/approx.cuh>

namespace packkv::warp {

/// Tokens of a tile that a lane has scores of: score k is of token 8 * k + lane / 4.
inline constexpr int tokens_per_lane = tile_tokens / 8;

/// Rows = 4, 8 or 16 query rows (query token x query head) of one KV head; for sums of values alone also 1.
template <int Rows>
struct score_columns {
  static_assert(Rows == 1 || Rows == 4 || Rows == 8 || Rows == 16, "kernels take 1, 4, 8 or 16 query rows at a time");
  static constexpr bool spread = Rows == 1;                         ///< the row has all columns, each eight tokens
  static constexpr bool paired = Rows == 4;                         ///< a row has two columns: high and low byte
  static constexpr int blocks = Rows <= 4 ? 1 : Rows / 8;           ///< of eight columns
  static constexpr int lane_rows = Rows <= 4 ? 1 : 2 * blocks;      ///< rows that a lane has scores of
  static constexpr int products = lane_rows;                        ///< of K: paired, or two bytes of each block
  static constexpr int lane_tokens = spread ? 2 : tokens_per_lane;  ///< of a tile, that a lane has scores of
  static constexpr int lanes_apart = spread ? 1 : 4;                ///< lanes so far apart have the same rows

  /// Row number i (0..lane_rows - 1) of a lane.
  __device__ static int row(int i) {
    const int place = detail::lane_id() % 4;
    return spread ? 0 : paired ? place : 8 * (i / 2) + 2 * place + i % 2;
  }
  /// Token 0 of a lane in a tile, and how far apart a lane's tokens are.
  __device__ static int first_token() { return spread ? 2 * detail::lane_id() : detail::lane_id() / 4; }
  static constexpr int token_step = spread ? 1 : 8;
};

/// The 16-bit row data of a lane's eight tokens; `rows`: that of the 64 tokens of a tile, 16-byte aligned.
__device__ inline detail::bytes16 load_rows(const std::uint8_t* rows) {
  return detail::load16(rows + 16 * (detail::lane_id() / 4));
}
/// What load_rows loaded, as floats.
__device__ inline void unpack_rows(const detail::bytes16& rows, float (&row)[tokens_per_lane]) {
  for (int i = 0; i < tokens_per_lane / 2; ++i) {
    const detail::two_floats x = detail::unpack_halves(rows.word[i]);
    row[2 * i] = x.low;
    row[2 * i + 1] = x.high;
  }
}
/// The 16-bit row data of a lane's tokens as floats; `rows` as above.
template <int Rows>
__device__ inline void load_rows(const std::uint8_t* rows, float (&row)[score_columns<Rows>::lane_tokens]) {
  if constexpr (score_columns<Rows>::spread) {
    // Number 8 * j + k is that of token 8 * k + j.
    const int lane = detail::lane_id();
    const auto* const own = reinterpret_cast<const std::uint16_t*>(rows) + 16 * (lane % 4) + lane / 4;
    const detail::two_floats x = detail::unpack_halves(own[0] | std::uint32_t{own[8]} << 16);
    row[0] = x.low;
    row[1] = x.high;
  } else {
    unpack_rows(load_rows(rows), row);
  }
}

}  // namespace packkv::warp
