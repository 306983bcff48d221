// SPDX-License-Identifier: Apache-2.0
// Elements of tensors, and of the 16-bit, FP8 and grouped tiles, as stored.
#pragma once

#include <packkv/codec/grouped_quantize.hpp>
#include <packkv/detail/approx.cuh>

namespace packkv::warp {

/// The bits of an element of a tensor: a load that nobody waits for before it is used.
__device__ inline std::uint32_t load_bits(const void* p, dtype type) {
  return type == dtype::float32 ? *static_cast<const std::uint32_t*>(p) : *static_cast<const std::uint16_t*>(p);
}
/// What they are; a NaN need not keep its bits.
__device__ inline float element_of_bits(std::uint32_t bits, dtype type) {
  if (type == dtype::float32) return detail::bit_cast<float>(bits);
  return type == dtype::float16 ? detail::unpack_16bit<false>(bits).low : detail::unpack_16bit<true>(bits).low;
}

/// Element `index` (token * head_dim + channel) of a tile without codes; FP8 without its tensor scale.
__device__ inline float stored_element(codec_kind kind, const std::uint8_t* tile, int index) {
  if (kind == codec_kind::fp8) return e4m3_to_float(tile[index]);
  const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(tile)[index];
  return kind == codec_kind::float16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

/// The 16-bit number at a byte offset; the sum is a multiple of 2.
__device__ inline std::uint16_t stored_half(const std::uint8_t* bytes, std::int64_t offset) {
  return *reinterpret_cast<const std::uint16_t*>(bytes + offset);
}

/// Element of a `grouped` tile, in the transformed basis. NaN where its group could not be coded.
__device__ inline float grouped_element(const codec_spec& spec, const std::uint8_t* tile, int token, int channel) {
  using namespace packkv::detail;
  const int group = spec.group_of(token, channel);
  const group_numbers n{stored_half(tile, spec.maximum_offset(group)), stored_half(tile, spec.minimum_offset(group))};
  const auto* words = reinterpret_cast<const std::uint32_t*>(tile);
  return decode_between(min_max_values(spec.strips.width[0], n), read_code(words, locate(spec.strips, token, channel)));
}

/// Row scale of a token of a `plan` tile. NaN where the token's input was not finite, anything in unused slots.
__device__ inline float row_scale(const codec_spec& spec, const std::uint8_t* tile, int token) {
  return half_to_float(stored_half(tile, spec.code_bytes() + 2 * row_slot(token)));
}

/// Leading component i of a token of a `plan` tile, in steps of its scale.
__device__ inline float leading_component(const codec_spec& spec, const std::uint8_t* tile, int token, int i) {
  return static_cast<float>(static_cast<std::int8_t>(tile[spec.leading_offset() + i * tile_tokens + row_slot(token)]));
}

}  // namespace packkv::warp
