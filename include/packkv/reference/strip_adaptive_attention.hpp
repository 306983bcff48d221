// SPDX-License-Identifier: Apache-2.0
// CPU definition of scores, value sums and attention on the stored bytes of the `strip-adaptive` format, in double.
// The sums are those of reference/grouped_attention.hpp; offsets and headers are checked before anything is written.
//   adaptive_view k{spec, bytes, offsets[tiles], offsets, heads, tokens, recent};
//   adaptive_attention(q, k, v, scale, out);
#pragma once

#include <packkv/reference/grouped_attention.hpp>
#include <packkv/reference/strip_adaptive.hpp>

namespace packkv::reference {

/// As grouped_key_gemv.
inline status adaptive_key_gemv(const input_view<3>& queries, const adaptive_view& keys, float scale,
                                const output_view<3>& scores) {
  detail::adaptive_side side;
  return detail::key_gemv_on(queries, keys, scale, scores, side);
}

/// As grouped_value_gemv.
inline status adaptive_value_gemv(const input_view<3>& weights, const adaptive_view& values,
                                  const output_view<3>& out) {
  detail::adaptive_side side;
  return detail::value_gemv_on(weights, values, out, side);
}

/// As grouped_attention.
inline status adaptive_attention(const input_view<3>& queries, const adaptive_view& keys, const adaptive_view& values,
                                 float scale, const output_view<3>& out) {
  detail::adaptive_side key_side, value_side;
  return detail::attention_on(queries, keys, values, scale, out, key_side, value_side);
}

}  // namespace packkv::reference
