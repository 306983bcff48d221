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
    if (spec.kind == codec_kind::plan)
      add_codes(spec, reinterpret_cast<const std::uint32_t*>(tile), scaled);
    else if (spec.kind == codec_kind::fp8)
      add_elements<codec_kind::fp8>(tile, scaled);
    else if (spec.kind == codec_kind::float16)
      add_elements<codec_kind::float16>(tile, scaled);
    else
      add_elements<codec_kind::bfloat16>(tile, scaled);
  }

  /// Adds up to 64 tokens that lie in 16 bits outside the tiles; value(token) is the address of a token's channels.
  template <class ValueAddress>
  __device__ void add_raw(ValueAddress&& value, std::int64_t channel_stride, dtype type,
                          const float (&weights)[2][Rows]) {
    for (int j = 0; j < 2; ++j)
      for (int lane = 0; lane < detail::warp_threads; ++lane) {
        float w[Rows];
        bool used = false;
        for (int r = 0; r < Rows; ++r) {
          w[r] = detail::shuffle(weights[j][r], lane);
          used = used || w[r] != 0.0f;
        }
        if (!used) continue;  // the same in all lanes; the token may have no address
        const char* token = static_cast<const char*>(value(lane + 32 * j));
        for (int i = 0; i < HeadDim / 32; ++i) {
          const float x = detail::load_element(token + (detail::lane_id() + 32 * i) * channel_stride, type);
          for (int r = 0; r < Rows; ++r) channel[r][i] = w[r] != 0.0f ? fmaf(w[r], x, channel[r][i]) : channel[r][i];
        }
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
    store_inverse<HeadDim>(spec.transform, head.permutation, y,
                           [&](int c, float x) { sink(c, fmaf(weight, head.offset(c), x)); });
  }

 private:
  /// Adds weight * (scale * field - centre) of one plane of register i's strip for 8 tokens from `first` on.
  template <int Bits>
  __device__ void add_plane(const std::uint32_t* plane, int first, int i, float scale, float centre,
                            const float (&weights)[8][Rows]) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const bit_field at = detail::value_field(Bits, 0, first + k, detail::lane_id() % value_strip_channels);
      const float code = static_cast<float>((plane[at.word] >> at.bit) & ((1u << Bits) - 1));
      const float x = fmaf(code, scale, -centre);
      for (int r = 0; r < Rows; ++r) channel[r][i] = fmaf(weights[k][r], x, channel[r][i]);
    }
  }

  /// Elements of unused slots may be NaN, so a weight of 0 selects.
  template <codec_kind Kind>
  __device__ void add_elements(const std::uint8_t* tile, const float (&scaled)[2][Rows]) {
#pragma unroll
    for (int first = 0; first < tile_tokens; first += 8) {
      float weights[8][Rows];
      for (int k = 0; k < 8; ++k)
        for (int r = 0; r < Rows; ++r) weights[k][r] = detail::shuffle(scaled[first / 32][r], first % 32 + k);
#pragma unroll
      for (int i = 0; i < HeadDim / 32; ++i)
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float x = stored_element(Kind, tile, (first + k) * HeadDim + detail::lane_id() + 32 * i);
          for (int r = 0; r < Rows; ++r)
            channel[r][i] = weights[k][r] != 0.0f ? fmaf(weights[k][r], x, channel[r][i]) : channel[r][i];
        }
    }
  }

  /// Codes are finite whatever their slot holds, so a weight of 0 needs no selection here.
  __device__ void add_codes(const codec_spec& spec, const std::uint32_t* words, const float (&scaled)[2][Rows]) {
#pragma unroll
    for (int first = 0; first < tile_tokens; first += 8) {
      float weights[8][Rows];
      for (int k = 0; k < 8; ++k)
        for (int r = 0; r < Rows; ++r) weights[k][r] = detail::shuffle(scaled[first / 32][r], first % 32 + k);
#pragma unroll
      for (int i = 0; i < HeadDim / 32; ++i) {
        const int strip = 2 * i + detail::lane_id() / value_strip_channels;
        const std::uint32_t* low = words + spec.strips.low[strip];
        const float centre = detail::code_centre(spec.strips.width[strip]);
        switch (spec.strips.width[strip]) {
          case 8:
            add_plane<8>(low, first, i, 1.0f, centre, weights);
            break;
          case 4:
            add_plane<4>(low, first, i, 1.0f, centre, weights);
            break;
          case 3:
            add_plane<1>(words + spec.strips.high[strip], first, i, 4.0f, 0.0f, weights);
            [[fallthrough]];
          case 2:
            add_plane<2>(low, first, i, 1.0f, centre, weights);
            break;
          case 1:
            add_plane<1>(low, first, i, 1.0f, centre, weights);
            break;
          default:
            break;
        }
      }
    }
  }
};

}  // namespace packkv::warp
