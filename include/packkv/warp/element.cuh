// SPDX-License-Identifier: Apache-2.0
// Elements of the 16-bit and FP8 tiles, as stored.
#pragma once

#include <packkv/codec/codec.hpp>
#include <packkv/codec/layout.hpp>
#include <packkv/detail/cuda.cuh>

namespace packkv::warp {

/// Element `index` (token * head_dim + channel) of a tile whose kind is not `plan`; FP8 without its tensor scale.
__device__ inline float stored_element(codec_kind kind, const std::uint8_t* tile, int index) {
  if (kind == codec_kind::fp8) return e4m3_to_float(tile[index]);
  const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(tile)[index];
  return kind == codec_kind::float16 ? half_to_float(bits) : bfloat16_to_float(bits);
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
