// SPDX-License-Identifier: Apache-2.0
// Calibrates a plan codec's static data on real keys or values of one KV head: basis or permutation, steps, leading
// scales.
// One idea: each channel gets the step with the least error on tokens divided by their row scale, as they will be
// coded.
//   status s = calibrate::calibrate_head(spec, keys, queries, {permutation, column_scale, leading_scale, offset});
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <packkv/calibrate/basis.hpp>
#include <packkv/codec/quantize.hpp>

namespace packkv::calibrate {

/// Where calibrate_head writes one head's row of the arrays of side_parameters; null pointers skip a part, except
/// that a permutation codec needs `permutation` and a basis codec both matrices.
struct head_output {
  std::int16_t* permutation = nullptr;  ///< [head_dim]
  float* column_scale = nullptr;        ///< [head_dim], in the order of the transformed channels
  float* leading_scale = nullptr;       ///< [spec.leading]
  float* channel_offset = nullptr;      ///< [head_dim], original basis; null: the codec has no offset
  float* basis = nullptr;               ///< [head_dim, head_dim]
  float* basis_inverse = nullptr;       ///< [head_dim, head_dim]
};

inline constexpr float smallest_step = 1e-6f;  ///< step of a channel that was always zero
inline constexpr double leading_reach = 4.0;   ///< an 8-bit leading component covers 4 sigma

/// Steps tried for each channel: the Gaussian-optimal one times 0.3, 0.35, ... 2.2. Mean attention error, calibrated on
/// textA and judged on textB (Qwen2.5-Coder-1.5B | Gemma 3 270M, 2 bits, 16 sinks, 64 recent): one multiplier per
/// strip 0.098 | 0.185, one per channel in 0.6 .. 1.6 0.085 | 0.160, in 0.3 .. 2.2 0.083 | 0.161.
inline constexpr double first_multiplier = 0.3;
/// Between one multiplier and the next.
inline constexpr double multiplier_spacing = 0.05;
/// Multipliers tried.
inline constexpr int step_tries = 39;

namespace detail {

inline void transform_all(samples& s, transform_kind kind, const transform_data& data) {
  std::vector<float> y(static_cast<std::size_t>(s.head_dim));
  for (std::int64_t t = 0; t < s.count; ++t) {
    packkv::detail::transform_forward(kind, data, s.head_dim, s.token(t), y.data());
    std::copy(y.begin(), y.end(), s.token(t));
  }
}

/// E[x_c^2] of every channel; 1 everywhere if there are no samples.
inline std::vector<double> second_moments(const samples& s) {
  std::vector<double> m(static_cast<std::size_t>(s.head_dim), s.count > 0 ? 0.0 : 1.0);
  for (std::int64_t t = 0; t < s.count; ++t)
    for (int c = 0; c < s.head_dim; ++c)
      m[static_cast<std::size_t>(c)] += packkv::detail::add_square(0.0, s.token(t)[c]);
  for (double& x : m) x /= static_cast<double>(max_of<std::int64_t>(1, s.count));
  return m;
}

/// Subtracts the mean of each channel and writes it to `offset`.
inline void centre(samples& s, float* offset) {
  for (int c = 0; c < s.head_dim; ++c) {
    double sum = 0.0;
    for (std::int64_t t = 0; t < s.count; ++t) sum += static_cast<double>(s.token(t)[c]);
    offset[c] = static_cast<float>(sum / static_cast<double>(max_of<std::int64_t>(1, s.count)));
    for (std::int64_t t = 0; t < s.count; ++t) s.token(t)[c] -= offset[c];
  }
}

/// channel_order of samples that are already loaded.
inline void order_channels(const samples& tokens, const input_view<3>& queries, std::int16_t* permutation) {
  std::vector<double> contribution = second_moments(tokens);
  const std::vector<double> energy = second_moments(load_queries(queries, tokens.head_dim));
  for (std::size_t c = 0; c < contribution.size(); ++c) contribution[c] *= energy[c];
  for (int c = 0; c < tokens.head_dim; ++c) permutation[c] = static_cast<std::int16_t>(c);
  std::stable_sort(permutation, permutation + tokens.head_dim, [&](std::int16_t a, std::int16_t b) {
    return contribution[static_cast<std::size_t>(a)] > contribution[static_cast<std::size_t>(b)];
  });
}

/// Row scale of a token as the encoder stores it; 0 if it has none.
inline float row_scale(const float* y, int leading, int head_dim) {
  double sum = 0.0;
  for (int c = leading; c < head_dim; ++c) sum = packkv::detail::add_square(sum, y[c]);
  const float row = half_to_float(packkv::detail::row_scale_bits(sum, head_dim - leading));
  return packkv::detail::is_finite(row) ? row : 0.0f;
}

/// One channel of all tokens that have a row scale, relative to it.
inline std::vector<float> relative_channel(const samples& s, const std::vector<float>& rows, int channel) {
  std::vector<float> x;
  x.reserve(rows.size());
  for (std::int64_t t = 0; t < s.count; ++t) {
    const float row = rows[static_cast<std::size_t>(t)];
    if (row > 0.0f) x.push_back(s.token(t)[channel] / row);
  }
  return x;
}

inline double root_mean_square(const std::vector<float>& x) {
  double sum = 0.0;
  for (const float v : x) sum += static_cast<double>(v) * static_cast<double>(v);
  return x.empty() ? 0.0 : std::sqrt(sum / static_cast<double>(x.size()));
}

/// Squared error of a channel that is quantised with this step.
inline double squared_error(const std::vector<float>& x, double step, int width) {
  const float inverse = static_cast<float>(1.0 / step), reach = static_cast<float>(1 << (width - 1));
  double sum = 0.0;
  for (const float v : x) {
    const float u = v * inverse;
    const double error = static_cast<double>(u - (std::floor(max_of(-reach, min_of(u, reach - 0.5f))) + 0.5f));
    sum += error * error;
  }
  return sum * step * step;
}

/// The step with the least squared error among multiples of the Gaussian-optimal one; always usable.
inline float best_step(const std::vector<float>& x, int width) {
  const double gaussian = root_mean_square(x) * static_cast<double>(gaussian_step(width));
  if (!(gaussian > static_cast<double>(smallest_step))) return smallest_step;
  double best = gaussian, least = squared_error(x, gaussian, width);
  for (int i = 0; i < step_tries; ++i) {
    const double step = gaussian * (first_multiplier + i * multiplier_spacing), error = squared_error(x, step, width);
    if (error < least) least = error, best = step;
  }
  return max_of(smallest_step, static_cast<float>(best));
}

inline void column_steps(const codec_spec& spec, const samples& s, float* column_scale) {
  std::vector<float> rows(static_cast<std::size_t>(s.count));
  for (std::int64_t t = 0; t < s.count; ++t)
    rows[static_cast<std::size_t>(t)] = row_scale(s.token(t), spec.leading, spec.head_dim);
  for (int c = 0; c < spec.head_dim; ++c) {
    const int width = spec.strips.width[c / spec.strips.channels];
    // Channels without a code (width 0, leading) need a valid number that nobody reads.
    column_scale[c] = width == 0 || c < spec.leading ? 1.0f : best_step(relative_channel(s, rows, c), width);
  }
}

inline status check_calibration(const codec_spec& spec, const input_view<2>& x, const input_view<3>& queries,
                                const head_output& out) {
  if (spec.kind != codec_kind::plan) return refuse(status_code::unsupported, "only plan codecs are calibrated");
  if (const status s = check_codec(spec.strips.which, spec); !s) return s;
  if (const status s = packkv::detail::check_view(x); !s) return s;
  if (x.extent[0] < 1) return refuse(status_code::invalid_argument, "calibration needs at least one token");
  if (x.extent[1] != spec.head_dim) return refuse(status_code::shape_mismatch, "samples and codec differ in head_dim");
  if (spec.transform == transform_kind::permutation && out.permutation == nullptr)
    return refuse(status_code::invalid_argument, "a permutation codec needs head_output::permutation");
  if (spec.transform == transform_kind::basis && (out.basis == nullptr || out.basis_inverse == nullptr))
    return refuse(status_code::invalid_argument, "a basis codec needs head_output::basis and basis_inverse");
  if (queries.data == nullptr) return {};
  if (const status s = packkv::detail::check_view(queries); !s) return s;
  if (queries.extent[0] < 1 || queries.extent[1] < 1)
    return refuse(status_code::invalid_argument, "calibration needs at least one query, or a null view");
  if (queries.extent[2] != spec.head_dim)
    return refuse(status_code::shape_mismatch, "queries and codec differ in head_dim");
  return {};
}

/// The arrays of a head_output that calibrate_head writes.
class head_arrays {
 public:
  head_arrays(const codec_spec& spec, const head_output& out) {
    const std::size_t n = static_cast<std::size_t>(spec.head_dim);
    const auto sized = [](const auto* wanted, std::size_t size) { return wanted != nullptr ? size : 0; };
    if (spec.transform == transform_kind::permutation) permutation_.resize(sized(out.permutation, n));
    floats_[0].resize(sized(out.column_scale, n));
    floats_[1].resize(sized(out.leading_scale, static_cast<std::size_t>(spec.leading)));
    floats_[2].resize(sized(out.channel_offset, n));
    if (spec.transform != transform_kind::basis) return;
    floats_[3].resize(sized(out.basis, n * n));
    floats_[4].resize(sized(out.basis_inverse, n * n));
  }
  head_output view() {
    const auto at = [](auto& array) { return array.empty() ? nullptr : array.data(); };
    return {at(permutation_), at(floats_[0]), at(floats_[1]), at(floats_[2]), at(floats_[3]), at(floats_[4])};
  }
  bool finite() const {
    bool all = true;
    for (const std::vector<float>& x : floats_)
      all = all && packkv::detail::are_numbers(x.data(), static_cast<std::int64_t>(x.size()), false);
    return all;
  }
  void copy_to(const head_output& out) const {
    std::copy(permutation_.begin(), permutation_.end(), out.permutation);
    float* const to[] = {out.column_scale, out.leading_scale, out.channel_offset, out.basis, out.basis_inverse};
    for (int i = 0; i < 5; ++i) std::copy(floats_[i].begin(), floats_[i].end(), to[i]);
  }

 private:
  std::vector<std::int16_t> permutation_;
  std::vector<float> floats_[5];
};

/// calibrate_head of checked arguments.
inline void calibrate_into(const codec_spec& spec, const input_view<2>& x, const input_view<3>& queries,
                           const head_output& out) {
  samples tokens{spec.head_dim, 0, {}};
  append_rows(tokens, x, max_samples);
  if (out.channel_offset != nullptr) centre(tokens, out.channel_offset);
  if (spec.transform == transform_kind::permutation) order_channels(tokens, queries, out.permutation);
  if (spec.transform == transform_kind::basis) find_basis(tokens, queries, out.basis, out.basis_inverse);
  transform_all(tokens, spec.transform, {out.permutation, out.basis, out.basis_inverse});
  if (out.leading_scale != nullptr) {
    const std::vector<double> moments = second_moments(tokens);
    for (int i = 0; i < spec.leading; ++i) {
      const double scale =
          leading_reach * std::sqrt(tokens.count > 0 ? moments[static_cast<std::size_t>(i)] : 0.0) / 127.0;
      out.leading_scale[i] = max_of(1.17549435e-38f, static_cast<float>(scale));
    }
  }
  if (out.column_scale != nullptr) column_steps(spec, tokens, out.column_scale);
}

}  // namespace detail

/// Channels in order of falling contribution E[q_c^2] * E[x_c^2], ties by lower index. Without queries (a null view)
/// the first factor is 1: the order for values. x [tokens, head_dim], queries [heads of the group, n, head_dim].
inline void channel_order(const input_view<2>& x, const input_view<3>& queries, std::int16_t* permutation) {
  const int head_dim = static_cast<int>(x.extent[1]);
  detail::samples tokens{head_dim, 0, {}};
  detail::append_rows(tokens, x, max_samples);
  detail::order_channels(tokens, queries, permutation);
}

/// Calibrates one head of a plan codec from x [tokens, head_dim] (keys or values, any strides and dtype).
/// queries [heads of the group, n, head_dim] order the channels of keys; pass a null view for values.
/// - channel_offset (if asked for): the mean of each channel; all that follows sees centred channels;
/// - permutation (permutation transform only): channel_order;
/// - basis and basis_inverse (basis transform only): weighted_basis of the tokens and queries (calibrate/basis.hpp);
/// - column_scale: for each channel of y / row (row: the token's stored row scale) the step with the least squared
///   error among multiples of sigma * gaussian_step(width); always finite and > 0;
/// - leading_scale: 4 sigma / 127 of the component, at least the smallest normal float.
/// Tokens with a non-finite channel are left out. Refused where a result would not be finite, as of tokens near the
/// largest float. Nothing is written unless the status is ok.
inline status calibrate_head(const codec_spec& spec, const input_view<2>& x, const input_view<3>& queries,
                             const head_output& out) {
  if (const status s = detail::check_calibration(spec, x, queries, out); !s) return s;
  detail::head_arrays made(spec, out);
  detail::calibrate_into(spec, x, queries, made.view());
  if (!made.finite())
    return refuse(status_code::unsupported,
                  "the samples are too large or too small: what they give does not fit floats");
  made.copy_to(out);
  return {};
}

}  // namespace packkv::calibrate
