// SPDX-License-Identifier: Apache-2.0
// Dot products of a few queries with the 64 keys of a coded tile, computed on the codes.
// One idea: columns, steps and the basis are folded into the query once, so a key costs one multiply-add per code.
//   key_scores<D, Rows>::prepare(storage, spec, head, source, warp, warps);   __syncthreads();
//   float s[2][Rows];   key_scores<D, Rows>::compute(storage, spec, tile, s);   // tokens lane and lane + 32
#pragma once

#include <packkv/codec/layout.hpp>
#include <packkv/codec/quantize.hpp>
#include <packkv/warp/element.cuh>
#include <packkv/warp/transform.cuh>

namespace packkv::warp {

/// Scores of `Rows` queries against tiles of one KV head. HeadDim is D_k.
template <int HeadDim, int Rows>
struct key_scores {
  /// Shared by all warps of a block: Rows * (HeadDim + 1) * 4 bytes.
  struct temp_storage {
    float query[Rows][HeadDim];
    float offset[Rows];  ///< query . channel_offset, part of every score
  };

  /// Fills the storage from source(row, channel), the queries in the original basis: row r is done by warp r % warps.
  /// The caller synchronises the block before compute.
  template <class Source>
  __device__ static void prepare(temp_storage& storage, const codec_spec& spec, const head_parameters& head,
                                 Source&& source, int warp, int warps) {
    for (int row = warp; row < Rows; row += warps) {
      float q[HeadDim / 32], offset = 0.0f;
      load_query_transformed<HeadDim>(
          spec.transform, head.transform(),
          [&](int c) {
            const float x = source(row, c);
            offset = fmaf(x, head.offset(c), offset);
            return x;
          },
          q);
      offset = detail::warp_sum(offset);
      if (detail::lane_id() == 0) storage.offset[row] = offset;
      for (int i = 0; i < HeadDim / 32; ++i) {
        const int c = detail::lane_id() + 32 * i;
        storage.query[row][c] = q[i] * column(spec, head, c);
      }
    }
  }

  /// scores[j][r] = query r . key of token lane + 32 * j. Slots that hold no token give arbitrary values, NaN included.
  __device__ static void compute(const temp_storage& storage, const codec_spec& spec, const std::uint8_t* tile,
                                 float (&scores)[2][Rows]) {
    for (int j = 0; j < 2; ++j) {
      for (int r = 0; r < Rows; ++r) scores[j][r] = 0.0f;
      const int token = detail::lane_id() + 32 * j;
      if (spec.kind == codec_kind::plan)
        plan_scores(storage, spec, tile, token, scores[j]);
      else
        element_scores(storage, spec, tile, token, scores[j]);
    }
  }

 private:
  /// What a query channel is multiplied with, so that a key channel is just its code (or element).
  __device__ static float column(const codec_spec& spec, const head_parameters& head, int c) {
    if (spec.kind == codec_kind::fp8) return head.tensor_scale;
    if (spec.kind != codec_kind::plan) return 1.0f;
    return c < spec.leading ? head.leading_scale[c]
                            : detail::column_of(head, spec.strips.width[c / spec.strips.channels], c);
  }

  __device__ static void plan_scores(const temp_storage& storage, const codec_spec& spec, const std::uint8_t* tile,
                                     int token, float (&score)[Rows]) {
    using namespace packkv::detail;
    const auto* words = reinterpret_cast<const std::uint32_t*>(tile);
    for (int strip = 0; strip < spec.strips.count; ++strip) {
      const int width = spec.strips.width[strip];
      if (width == 0) break;  // widest first: nothing follows
      const float centre = code_centre(width);
      const int first = strip * spec.strips.channels;
#pragma unroll 4
      for (int c = first; c < first + spec.strips.channels; ++c) {
        const float x = static_cast<float>(read_code(words, locate(spec.strips, token, c))) - centre;
        for (int r = 0; r < Rows; ++r) score[r] = c < spec.leading ? score[r] : fmaf(storage.query[r][c], x, score[r]);
      }
    }
    const float row = row_scale(spec, tile, token);
    for (int r = 0; r < Rows; ++r) score[r] = fmaf(score[r], row, storage.offset[r]);
    for (int c = 0; c < spec.leading; ++c) {
      const float x = leading_component(spec, tile, token, c);
      for (int r = 0; r < Rows; ++r) score[r] = fmaf(storage.query[r][c], x, score[r]);
    }
  }

  __device__ static void element_scores(const temp_storage& storage, const codec_spec& spec, const std::uint8_t* tile,
                                        int token, float (&score)[Rows]) {
    const bool grouped = spec.kind == codec_kind::grouped;
    for (int c = 0; c < HeadDim; ++c) {
      const float x =
          grouped ? grouped_element(spec, tile, token, c) : stored_element(spec.kind, tile, token * HeadDim + c);
      for (int r = 0; r < Rows; ++r) score[r] = fmaf(storage.query[r][c], x, score[r]);
    }
    for (int r = 0; r < Rows && grouped; ++r) score[r] += storage.offset[r];
  }
};

/// Scores against up to 64 keys that lie in 16 bits outside the tiles (sinks, ring); queries in the original basis.
template <int HeadDim, int Rows>
struct raw_key_scores {
  using temp_storage = typename key_scores<HeadDim, Rows>::temp_storage;

  /// key(token) gives the address of a token's channels, or null. Tokens without an address score 0.
  template <class KeyAddress>
  __device__ static void compute(const temp_storage& storage, KeyAddress&& key, std::int64_t channel_stride, dtype type,
                                 float (&scores)[2][Rows]) {
    for (int j = 0; j < 2; ++j) {
      for (int r = 0; r < Rows; ++r) scores[j][r] = 0.0f;
      const char* k = static_cast<const char*>(key(detail::lane_id() + 32 * j));
      if (k == nullptr) continue;
      for (int c = 0; c < HeadDim; ++c) {
        const float x = detail::load_element(k + c * channel_stride, type);
        for (int r = 0; r < Rows; ++r) scores[j][r] = fmaf(storage.query[r][c], x, scores[j][r]);
      }
    }
  }
};

}  // namespace packkv::warp
