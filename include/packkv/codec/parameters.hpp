// SPDX-License-Identifier: Apache-2.0
// What a format needs at run time beside its type: calibrated columns, permutations, scales. Plain data.
// One idea: every call takes the same POD; null pointers select the documented defaults.
//   parameters<format> p;   p.key.permutation = device_permutation;   compress<format>(keys, values, p, ...);
#pragma once

#include <cstdint>
#include <packkv/codec/codec.hpp>
#include <utility>

namespace packkv {

/// Run-time data of one side. Arrays are row-major [kv_heads, ...] in the memory space of the call (device
/// memory for kernels, host memory for the reference) and must stay valid until the call has completed. Kernels trust
/// their elements, which check_parameter_arrays checks.
struct side_parameters {
  /// plan: step of each channel relative to the row scale, [kv_heads, head_dim], finite and > 0, in the order
  /// of the transformed channels. Null: the Gaussian-optimal step of the strip's width (gaussian_step).
  const float* column_scale = nullptr;
  /// permutation transform: [kv_heads, head_dim], each row a permutation of 0..head_dim-1. Required by it.
  const std::int16_t* permutation = nullptr;
  /// leading components: value of one 8-bit step, [kv_heads, leading], finite and > 0. Required by them.
  const float* leading_scale = nullptr;
  /// fp8: the tensor is stored divided by this. Finite and > 0.
  float tensor_scale = 1.0f;
  /// plan and grouped: subtracted from every token before the transform, [kv_heads, head_dim], finite; the channel
  /// means. Null: 0. Costs nothing per token at decode: K adds q . offset to a score, V adds the sum of weights times
  /// offset.
  const float* channel_offset = nullptr;
  /// basis transform: [kv_heads, head_dim, head_dim], 16-byte aligned, row i of a head is the vector of original
  /// channels for which transformed channel i stands. Required by it.
  const float* basis = nullptr;
  /// basis transform: [kv_heads, head_dim, head_dim], the matrix inverse of `basis` (of an orthogonal one its
  /// transpose). Required where tokens are coded, not read otherwise.
  const float* basis_inverse = nullptr;
};

/// Parameters of a format; `format` itself is empty unless it is a runtime_format.
template <class Format>
struct parameters {
  Format format = {};
  side_parameters key = {};
  side_parameters value = {};
};

/// The parameters of one KV head, resolved from side_parameters.
struct head_parameters {
  const float* column_scale = nullptr;
  const std::int16_t* permutation = nullptr;
  const float* leading_scale = nullptr;
  float tensor_scale = 1.0f;
  const float* channel_offset = nullptr;
  const float* basis = nullptr;
  const float* basis_inverse = nullptr;

  PACKKV_HOST_DEVICE transform_data transform() const { return {permutation, basis, basis_inverse}; }
  /// Offset of channel c in the original basis.
  PACKKV_HOST_DEVICE float offset(int c) const { return channel_offset != nullptr ? channel_offset[c] : 0.0f; }
};

/// Picks the rows of KV head `head`.
PACKKV_HOST_DEVICE inline head_parameters of_head(const codec_spec& spec, const side_parameters& p, int head) {
  const std::int64_t row = static_cast<std::int64_t>(head) * spec.head_dim;
  return {p.column_scale != nullptr ? p.column_scale + row : nullptr,
          p.permutation != nullptr ? p.permutation + row : nullptr,
          p.leading_scale != nullptr ? p.leading_scale + static_cast<std::int64_t>(head) * spec.leading : nullptr,
          p.tensor_scale,
          spec.has_codes() && p.channel_offset != nullptr ? p.channel_offset + row : nullptr,
          p.basis != nullptr ? p.basis + row * spec.head_dim : nullptr,
          p.basis_inverse != nullptr ? p.basis_inverse + row * spec.head_dim : nullptr};
}

namespace detail {

using packkv::head_parameters;
using packkv::of_head;

inline status check_side(const codec_spec& spec, const side_parameters& p) {
  if (spec.transform == transform_kind::permutation && p.permutation == nullptr)
    return refuse(status_code::invalid_argument, "the permutation transform needs side_parameters::permutation");
  if (spec.transform == transform_kind::basis && p.basis == nullptr)
    return refuse(status_code::invalid_argument, "the basis transform needs side_parameters::basis");
  if (reinterpret_cast<std::uintptr_t>(p.basis) % 16 != 0)
    return refuse(status_code::misaligned, "side_parameters::basis must be 16-byte aligned");
  if (spec.leading > 0 && p.leading_scale == nullptr)
    return refuse(status_code::invalid_argument, "leading components need side_parameters::leading_scale");
  if (spec.kind == codec_kind::grouped && p.column_scale != nullptr)
    return refuse(status_code::invalid_argument,
                  "grouped codecs have no column_scale: their groups store their bounds");
  if (spec.kind == codec_kind::fp8 && (!is_finite(p.tensor_scale) || !(p.tensor_scale > 0.0f)))
    return refuse(status_code::invalid_argument, "fp8 needs a finite tensor_scale > 0");
  return {};
}

/// Whether n numbers are finite and, if they are steps, > 0; no array is good.
inline bool are_numbers(const float* x, std::int64_t n, bool steps) {
  for (std::int64_t i = 0; x != nullptr && i < n; ++i)
    if (!is_finite(x[i]) || (steps && !(x[i] > 0.0f))) return false;
  return true;
}
inline bool is_permutation(const std::int16_t* order, int n) {
  bool seen[max_head_dim] = {};
  for (int i = 0; i < n; ++i)
    if (order[i] < 0 || order[i] >= n || std::exchange(seen[order[i]], true)) return false;
  return true;
}
/// What a side that check_side accepts reads of its arrays.
inline status check_side_arrays(const codec_spec& spec, const side_parameters& p, std::int32_t kv_heads) {
  const std::int64_t channels = static_cast<std::int64_t>(kv_heads) * spec.head_dim;
  if (spec.kind == codec_kind::plan && !are_numbers(p.column_scale, channels, true))
    return refuse(status_code::invalid_argument, "column_scale must be finite and > 0");
  if (spec.has_codes() && !are_numbers(p.channel_offset, channels, false))
    return refuse(status_code::invalid_argument, "channel_offset must be finite");
  if (spec.leading > 0 && !are_numbers(p.leading_scale, static_cast<std::int64_t>(kv_heads) * spec.leading, true))
    return refuse(status_code::invalid_argument, "leading_scale must be finite and > 0");
  if (spec.transform == transform_kind::basis && (!are_numbers(p.basis, channels * spec.head_dim, false) ||
                                                  !are_numbers(p.basis_inverse, channels * spec.head_dim, false)))
    return refuse(status_code::invalid_argument, "basis and basis_inverse must be finite");
  for (std::int32_t h = 0; h < kv_heads && spec.transform == transform_kind::permutation; ++h)
    if (!is_permutation(p.permutation + static_cast<std::int64_t>(h) * spec.head_dim, spec.head_dim))
      return refuse(status_code::invalid_argument, "a row of permutation is no permutation of the channels", h);
  return {};
}

/// What coding needs beside check_parameters.
template <class Format>
inline status check_encoder(const parameters<Format>& p) {
  const auto lacks = [](const codec_spec& spec, const side_parameters& side) {
    return spec.transform == transform_kind::basis && side.basis_inverse == nullptr;
  };
  if (lacks(p.format.key(), p.key) || lacks(p.format.value(), p.value))
    return refuse(status_code::invalid_argument, "coding in a basis needs side_parameters::basis_inverse");
  return {};
}

/// What coding tokens one by one needs beside check_encoder.
template <class Format>
inline status check_token_encoder(const parameters<Format>& p) {
  if (p.format.key().needs_tiles())
    return refuse(status_code::unsupported, "keys grouped along tokens are coded by tiles: store_tiles or compress");
  return check_encoder(p);
}

}  // namespace detail

/// Checks what the host can see of a format's parameters (arrays in device memory are not read).
template <class Format>
inline status check_parameters(const parameters<Format>& p) {
  if (const status s = check_format(p.format); !s) return s;
  if (const status s = detail::check_side(p.format.key(), p.key); !s) return s;
  return detail::check_side(p.format.value(), p.value);
}

/// Checks the elements of all arrays that the format reads, which are host memory: permutations that are none would
/// reach beyond a token, scales of 0 give no numbers. The reference does so in every call; arrays that come from a file
/// want it before they are copied to a device.
template <class Format>
inline status check_parameter_arrays(const parameters<Format>& p, std::int32_t kv_heads) {
  if (const status s = check_parameters(p); !s) return s;
  if (const status s = detail::check_side_arrays(p.format.key(), p.key, kv_heads); !s) return s;
  return detail::check_side_arrays(p.format.value(), p.value, kv_heads);
}

}  // namespace packkv
