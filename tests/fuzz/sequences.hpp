// SPDX-License-Identifier: Apache-2.0
// What the fuzz targets of the whole-sequence formats ask of every call on a coded side, be it good or not.
//   fuzz::check_side_calls(in, heads, tokens, dim, good, decode, key_gemv, value_gemv, attention);
#pragma once

#include <cmath>
#include <packkv/reference/strip_adaptive_attention.hpp>

#include "input.hpp"

namespace fuzz {

inline constexpr int side_canary = 0x5a;

/// 64, where K has strips of 16 channels, or 96, where it has strips of 32.
inline int any_side_dim(input& in) { return in.few(4) == 2 ? 96 : 64; }

/// `heads`, `tokens` and `dim` are those of a coded side, which must be accepted if `good` and else refused.
/// decode(x), key_gemv(q, scale, scores), value_gemv(w, out), attention(q, scale, out) are the calls on it, K = V.
template <class Decode, class KeyGemv, class ValueGemv, class Attention>
void check_side_calls(input& in, std::int64_t heads, std::int64_t tokens, int dim, bool good, Decode&& decode,
                      KeyGemv&& key_gemv, ValueGemv&& value_gemv, Attention&& attention) {
  const int call = in.below(4), channel = in.below(dim), token = tokens > 0 ? in.byte() % static_cast<int>(tokens) : 0;
  tensor<3> x(pk::dtype::float32, {heads, tokens, dim}, side_canary);
  const auto agrees = [&](bool done, const memory& before, const memory& after) {
    check(done == good, "a call agrees with what is known of the side");
    if (!done) check(before == after, "a refused side is not decoded");
    if (!done || call == 0 || !decode(x.view)) return -1.0f;
    float most = 0.0f;
    for (std::int64_t i = 0; i < x.elements() && std::isfinite(most); ++i)
      most = std::fabs(x.floats()[i]) <= most ? most : std::fabs(x.floats()[i]);
    return std::isfinite(most) ? most : -1.0f;  // nothing to compare with
  };
  tensor<3> q(pk::dtype::float32, {heads, call == 3 ? in.between(0, 2) : 1, dim}),
      w(pk::dtype::float32, {heads, 1, tokens}), scores(pk::dtype::float32, {heads, 1, tokens}, side_canary),
      sums(pk::dtype::float32, {heads, q.view.extent[1], dim}, side_canary);
  for (std::int64_t i = channel; i < q.elements(); i += dim) q.bytes.as<float>()[i] = 1.0f;
  for (std::int64_t i = token; tokens > 0 && i < w.elements(); i += tokens) w.bytes.as<float>()[i] = 1.0f;
  if (call == 0) {
    const memory before = x.bytes;
    agrees(decode(x.view), before, x.bytes);
  } else if (call == 1) {
    const memory before = scores.bytes;
    const bool done = key_gemv(q.in(), 1.0f, scores.view);
    const float most = agrees(done, before, scores.bytes);
    for (std::int64_t i = 0; most >= 0.0f && i < scores.elements(); ++i)
      check(std::fabs(scores.floats()[i] - x.floats()[i * dim + channel]) <= 0.001f * most, "a score is an element");
  } else if (call == 2) {
    const memory before = sums.bytes;
    const bool done = value_gemv(w.in(), sums.view);
    const float most = agrees(done, before, sums.bytes);
    for (std::int64_t i = 0; most >= 0.0f && tokens > 0 && i < sums.elements(); ++i)
      check(std::fabs(sums.floats()[i] - x.floats()[(i / dim * tokens + token) * dim + i % dim]) <= 0.001f * most,
            "a sum is an element");
  } else {
    constexpr float scales[] = {0.125f, 1.0f, 1e30f, 0.0f, -1.0f, NAN, INFINITY};
    const float scale = scales[in.few(7) - 1];
    const memory before = sums.bytes;
    const bool done = attention(q.in(), scale, sums.view);
    const bool allowed = q.view.extent[1] <= tokens && scale > 0.0f && std::isfinite(scale);
    if (!allowed) return check(!done && before == sums.bytes, "attention refuses wrong scales and too many queries");
    const float most = agrees(done, before, sums.bytes);
    for (std::int64_t i = 0; most >= 0.0f && i < sums.elements(); ++i)
      check(std::fabs(sums.floats()[i]) <= 1.001f * most, "an output lies within the values that it is a mean of");
  }
}

}  // namespace fuzz
