// SPDX-License-Identifier: Apache-2.0
// Weighted sums of the 64 values of a coded tile for a few query rows, computed on the codes.
// One idea: row scales go into the weights, columns and the basis are applied to the finished sum once.
//   value_sum<D, Rows> sum;   sum.rescale(factor);   sum.add(spec, tile, weights);   sum.finish(spec, head, y, weight,
//   sink);
#pragma once

#include <packkv/codec/layout.hpp>
#include <packkv/codec/quantize.hpp>
#include <packkv/warp/element.cuh>
#include <packkv/warp/transform.cuh>

namespace packkv::warp {

/// Unnormalised outputs of `Rows` rows; lane l holds the channels l, l + 32, ... HeadDim is D_v.
template <int HeadDim, int Rows>
struct value_sum {
  float channel[Rows][HeadDim / 32];

  __device__ value_sum() {
    for (int r = 0; r < Rows; ++r)
      for (int i = 0; i < HeadDim / 32; ++i) channel[r][i] = 0.0f;
  }

  __device__ void rescale(const float (&factor)[Rows]) {
    for (int r = 0; r < Rows; ++r)
      for (int i = 0; i < HeadDim / 32; ++i) channel[r][i] *= factor[r];
  }

  /// Adds a tile; weights[j][r] belong to token lane + 32 * j. A weight of 0 selects: what its slot holds, NaN
  /// included, does not reach the sum. All lanes take part.
  __device__ void add(const codec_spec& spec, const std::uint8_t* tile, const float (&weights)[2][Rows]) {
    using namespace packkv::detail;
    float scaled[2][Rows];
    for (int j = 0; j < 2; ++j) {
      const float row = spec.kind == codec_kind::plan ? row_scale(spec, tile, lane_id() + 32 * j) : 1.0f;
      for (int r = 0; r < Rows; ++r) scaled[j][r] = weights[j][r] == 0.0f ? 0.0f : weights[j][r] * row;
    }
    add_tokens(scaled, [&](int token, float(&x)[HeadDim / 32]) {
      for (int i = 0; i < HeadDim / 32; ++i) x[i] = element(spec, tile, token, lane_id() + 32 * i);
    });
  }

  /// Adds up to 64 tokens that lie in 16 bits outside the tiles; value(token) is the address of a token's channels.
  template <class ValueAddress>
  __device__ void add_raw(ValueAddress&& value, std::int64_t channel_stride, dtype type,
                          const float (&weights)[2][Rows]) {
    add_tokens(weights, [&](int token, float(&x)[HeadDim / 32]) {
      const char* const channels = static_cast<const char*>(value(token));
      for (int i = 0; i < HeadDim / 32; ++i)
        x[i] = detail::load_element(channels + (detail::lane_id() + 32 * i) * channel_stride, type);
    });
  }

  /// Adds up to 64 tokens; weights[j][r] belong to token lane + 32 * j. load(token, x) gives a token's channels lane,
  /// lane + 32, ... to all lanes at once; it is called in ascending order for the tokens that have a weight.
  template <class Load>
  __device__ void add_tokens(const float (&weights)[2][Rows], Load&& load) {
    for (int j = 0; j < 2; ++j)
      for (int lane = 0; lane < detail::warp_threads; ++lane) {
        float w[Rows];
        bool used = false;
        for (int r = 0; r < Rows; ++r) {
          w[r] = detail::shuffle(weights[j][r], lane);
          used = used || w[r] != 0.0f;
        }
        if (!used) continue;  // the same in all lanes
        float x[HeadDim / 32];
        load(lane + 32 * j, x);
        for (int i = 0; i < HeadDim / 32; ++i)
          for (int r = 0; r < Rows; ++r) channel[r][i] = w[r] != 0.0f ? fmaf(w[r], x[i], channel[r][i]) : channel[r][i];
      }
  }

  /// Applies columns, inverse basis and offset to one row of sums `y` (lane l: channels l, l + 32, ...) whose weights
  /// add up to `weight`, and hands sink(channel, value) the result in the original basis. All lanes take part.
  template <class Sink>
  __device__ static void finish(const codec_spec& spec, const head_parameters& head, float (&y)[HeadDim / 32],
                                float weight, Sink&& sink) {
    for (int i = 0; i < HeadDim / 32; ++i) {
      const int c = detail::lane_id() + 32 * i;
      if (spec.kind == codec_kind::fp8) y[i] *= head.tensor_scale;
      if (spec.kind == codec_kind::plan)
        y[i] *= detail::column_of(head, spec.strips.width[c / spec.strips.channels], c);
    }
    store_inverse<HeadDim>(spec.transform, head.transform(), y,
                           [&](int c, float x) { sink(c, fmaf(weight, head.offset(c), x)); });
  }

 private:
  /// A stored element before its row and column scales.
  __device__ static float element(const codec_spec& spec, const std::uint8_t* tile, int token, int c) {
    if (spec.kind == codec_kind::grouped) return grouped_element(spec, tile, token, c);
    if (spec.kind != codec_kind::plan) return stored_element(spec.kind, tile, token * HeadDim + c);
    const code_place place = locate(spec.strips, token, c);
    if (place.width == 0) return 0.0f;
    return static_cast<float>(read_code(reinterpret_cast<const std::uint32_t*>(tile), place)) -
           detail::code_centre(place.width);
  }
};

}  // namespace packkv::warp
