// SPDX-License-Identifier: Apache-2.0
// Token sources: how kernels read formats that code whole sequences, one token at a time, whatever lies in memory.
// One idea: a warp holds a token as everywhere (lane l: channels l, l + 32, ...), so scores, sums and decompress need
// to know nothing but how to load it.
//   read_tile<D>(source, b, head, tile, flags, [&](auto& tokens) { tokens.load(slot, x); });
#pragma once

#include <packkv/codec/strips.hpp>
#include <packkv/core/views.hpp>
#include <packkv/detail/cuda.cuh>

// A token source is a trivially copyable kernel argument, one side of one or more sequences, with
//   std::int64_t coded_tokens() const   tokens per sequence that are coded, a multiple of 64
//   input_view<4> tail                  the 16-bit tokens behind them: [batch, kv_heads, tokens, head_dim], any strides
//   reader<HeadDim>                     of one coded tile; the source must outlive it:
//     reader(source, b, head, tile, flags)   damaged bytes set report_tile_damaged, in every lane
//     load(slot, x)                          channels lane, lane + 32, ... of a token as decompress would give them, NaN
//                                            where the bytes are damaged. All lanes take part; slots ascend.

namespace packkv::warp {

/// Tokens of a sequence, coded and not.
template <class Source>
PACKKV_HOST_DEVICE std::int64_t tokens_of(const Source& source) {
  return source.coded_tokens() + source.tail.extent[2];
}

/// Reads 16-bit tokens where they lie.
template <int HeadDim>
class tail_reader {
 public:
  __device__ tail_reader(const input_view<4>& tail, std::int64_t b, int head, std::int64_t first)
      : tail_(tail), first_(static_cast<const char*>(detail::address(tail, b, head, first, 0))) {}
  __device__ void load(int slot, float (&x)[HeadDim / 32]) const {
    const char* const token = first_ + slot * tail_.stride[2];
    for (int i = 0; i < HeadDim / 32; ++i)
      x[i] = detail::load_element(token + (detail::lane_id() + 32 * i) * tail_.stride[3], tail_.type);
  }

 private:
  const input_view<4>& tail_;
  const char* first_;
};

/// f(reader) for a tile of 64 tokens, coded or not.
template <int HeadDim, class Source, class Function>
__device__ inline void read_tile(const Source& source, std::int64_t b, int head, std::int64_t tile,
                                 std::uint32_t& flags, Function&& f) {
  const std::int64_t first = tile * tile_tokens;
  if (first < source.coded_tokens()) {
    typename Source::template reader<HeadDim> tokens(source, b, head, tile, flags);
    f(tokens);
  } else {
    tail_reader<HeadDim> tokens(source.tail, b, head, first - source.coded_tokens());
    f(tokens);
  }
}

/// Tokens that are all in 16 bits, [batch, kv_heads, tokens, head_dim], as a source.
struct raw_source {
  input_view<4> tail;

  PACKKV_HOST_DEVICE std::int64_t coded_tokens() const { return 0; }
};
/// The same where no token is coded.
template <int HeadDim, class Function>
__device__ inline void read_tile(const raw_source& source, std::int64_t b, int head, std::int64_t tile, std::uint32_t&,
                                 Function&& f) {
  tail_reader<HeadDim> tokens(source.tail, b, head, tile * tile_tokens);
  f(tokens);
}

/// Scores of `Rows` queries against the first `count` tokens of a tile.
template <int HeadDim, int Rows>
struct token_scores {
  /// Shared by all warps of a block; the caller fills it and synchronises.
  struct temp_storage {
    float query[Rows][HeadDim];
  };

  /// scores[j][r] = query r . token of slot lane + 32 * j; 0 from slot `count` on.
  template <class Reader>
  __device__ static void compute(const temp_storage& storage, Reader& tokens, int count, float (&scores)[2][Rows]) {
    for (int j = 0; j < 2; ++j)
      for (int r = 0; r < Rows; ++r) scores[j][r] = 0.0f;
    for (int slot = 0; slot < count; ++slot) {
      float x[HeadDim / 32];
      tokens.load(slot, x);
      for (int r = 0; r < Rows; ++r) {
        float sum = 0.0f;
        for (int i = 0; i < HeadDim / 32; ++i) sum = fmaf(storage.query[r][detail::lane_id() + 32 * i], x[i], sum);
        sum = detail::warp_sum(sum);
        if (slot % 32 != detail::lane_id()) continue;
        if (slot < 32)
          scores[0][r] = sum;
        else
          scores[1][r] = sum;
      }
    }
  }
};

}  // namespace packkv::warp
