// SPDX-License-Identifier: Apache-2.0
// What lies in a tile beside code words: elements of the 16-bit and FP8 tiles, row scales, leading components.
#pragma once

#include <packkv/codec/codec.hpp>
#include <packkv/codec/layout.hpp>
#include <packkv/detail/cuda.cuh>

namespace packkv::warp {

/// Element `index` (token * head_dim + channel) of a tile whose kind is not `plan`; FP8 without its tensor scale.
/// The bits of a NaN are the machine's choice.
__device__ inline float stored_element(codec_kind kind, const std::uint8_t* tile, int index) {
  if (kind == codec_kind::fp8) return e4m3_to_float(tile[index]);
  const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(tile)[index];
  return kind == codec_kind::float16 ? detail::half_to_float_fast(bits) : bfloat16_to_float(bits);
}

/// Calls f(channel, element) for all channels of a token, in order; 16 bytes a load.
template <int HeadDim, class F>
__device__ inline void for_each_element(codec_kind kind, const std::uint8_t* tile, int token, F&& f) {
  if (kind == codec_kind::fp8) {
    for (int c = 0; c < HeadDim; c += 16) {
      const detail::bytes16 chunk = detail::load16(tile + token * HeadDim + c);
#pragma unroll
      for (int k = 0; k < 16; ++k) f(c + k, e4m3_to_float(static_cast<std::uint8_t>(chunk.word[k / 4] >> 8 * (k % 4))));
    }
    return;
  }
  for (int c = 0; c < HeadDim; c += 8) {
    const detail::bytes16 chunk = detail::load16(tile + (token * HeadDim + c) * 2);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const auto bits = static_cast<std::uint16_t>(chunk.word[k / 2] >> 16 * (k % 2));
      f(c + k, kind == codec_kind::float16 ? detail::half_to_float_fast(bits) : bfloat16_to_float(bits));
    }
  }
}

/// Row scale of a token of a `plan` tile. NaN where the token's input was not finite, anything in unused slots.
__device__ inline float row_scale(const codec_spec& spec, const std::uint8_t* tile, int token) {
  return half_to_float(*reinterpret_cast<const std::uint16_t*>(tile + spec.code_bytes() + 2 * row_slot(token)));
}

/// Leading component i of a token of a `plan` tile, in steps of its scale.
__device__ inline float leading_component(const codec_spec& spec, const std::uint8_t* tile, int token, int i) {
  return static_cast<float>(static_cast<std::int8_t>(tile[spec.leading_offset() + i * tile_tokens + row_slot(token)]));
}

}  // namespace packkv::warp
