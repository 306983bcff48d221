// SPDX-License-Identifier: Apache-2.0
// Scores, value sums and attention by plain loops in double, for the tests of attention on coded bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <packkv/core/views.hpp>
#include <vector>

#include "fixture.hpp"

namespace plain {

/// A float tensor [heads, rows, columns].
struct tensor {
  int heads, rows, columns;
  std::vector<float> x;
  tensor(int h, int r, int c, float value = 0.0f)
      : heads(h), rows(r), columns(c), x(static_cast<std::size_t>(h) * r * c, value) {}
  std::size_t at(int h, int r) const { return (static_cast<std::size_t>(h) * rows + r) * columns; }
  float* row(int h, int r) { return x.data() + at(h, r); }
  const float* row(int h, int r) const { return x.data() + at(h, r); }
  packkv::input_view<3> in() const {
    return packkv::make_input<3>(x.data(), packkv::dtype::float32, {heads, rows, columns});
  }
  packkv::output_view<3> out() {
    return packkv::make_output<3>(x.data(), packkv::dtype::float32, {heads, rows, columns});
  }
  bool all(float value) const {
    return std::all_of(x.begin(), x.end(), [&](float e) { return e == value; });
  }
};

inline tensor random_rows(host_test::random_source& random, int heads, int rows, int columns) {
  tensor t(heads, rows, columns);
  for (float& v : t.x) v = random.normal();
  return t;
}

/// |a - b| / |b|
inline double distance(const float* a, const double* b, int n) {
  double difference = 0.0, norm = 0.0;
  for (int i = 0; i < n; ++i) {
    difference += std::pow(a[i] - b[i], 2);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / std::fmax(norm, 1e-30));
}

/// The largest distances of any query's scores, value sums and outputs from those of the decoded tensors `k`, `v`
/// [heads, tokens, dim].
struct differences {
  double scores = 0.0, sums = 0.0, out = 0.0;
};

inline differences compare(const tensor& k, const tensor& v, const tensor& q, const tensor& weights, float scale,
                           const tensor& scores, const tensor& sums, const tensor& out) {
  differences worst;
  const int group = q.heads / k.heads, tokens = k.rows, n = q.rows;
  for (int h = 0; h < q.heads; ++h)
    for (int i = 0; i < n; ++i) {
      std::vector<double> s(static_cast<std::size_t>(tokens), 0.0), sum(static_cast<std::size_t>(v.columns), 0.0);
      std::vector<double> o = sum;
      for (int t = 0; t < tokens; ++t) {
        double& score = s[static_cast<std::size_t>(t)];
        for (int c = 0; c < k.columns; ++c)
          score += static_cast<double>(q.row(h, i)[c]) * static_cast<double>(k.row(h / group, t)[c]);
        score *= static_cast<double>(scale);
      }
      const int visible = tokens - n + i + 1;
      const double top = *std::max_element(s.begin(), s.begin() + visible);
      double total = 0.0;
      for (int t = 0; t < visible; ++t) total += std::exp(s[static_cast<std::size_t>(t)] - top);
      for (int t = 0; t < tokens; ++t)
        for (int c = 0; c < v.columns; ++c) {
          const double x = v.row(h / group, t)[c];
          sum[static_cast<std::size_t>(c)] += static_cast<double>(weights.row(h, i)[t]) * x;
          if (t < visible) o[static_cast<std::size_t>(c)] += std::exp(s[static_cast<std::size_t>(t)] - top) / total * x;
        }
      worst.scores = std::fmax(worst.scores, distance(scores.row(h, i), s.data(), tokens));
      worst.sums = std::fmax(worst.sums, distance(sums.row(h, i), sum.data(), v.columns));
      worst.out = std::fmax(worst.out, distance(out.row(h, i), o.data(), v.columns));
    }
  return worst;
}

}  // namespace plain
