// SPDX-License-Identifier: Apache-2.0
// Tokens of one head that calibration looks at, as floats.
//   detail::samples s{head_dim, 0, {}};   detail::append_rows(s, keys, max_samples);   s.token(0)[c];
#pragma once

#include <cstdint>
#include <packkv/core/checked.hpp>
#include <packkv/core/views.hpp>
#include <packkv/detail/arith.hpp>
#include <vector>

namespace packkv::calibrate {

inline constexpr std::int64_t max_samples = 8192;  ///< tokens looked at, evenly spaced

namespace detail {

/// Up to max_samples tokens as floats [count, head_dim]; tokens with a non-finite channel are left out.
struct samples {
  int head_dim = 0;
  std::int64_t count = 0;
  std::vector<float> x;

  const float* token(std::int64_t t) const { return x.data() + t * head_dim; }
  float* token(std::int64_t t) { return x.data() + t * head_dim; }
};

inline void append_rows(samples& s, const input_view<2>& rows, std::int64_t limit) {
  const std::int64_t n = min_of(limit, rows.extent[0]);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t t = i * (rows.extent[0] / n) + i * (rows.extent[0] % n) / n;  // floor(i * tokens / n)
    bool finite = true;
    for (int c = 0; c < s.head_dim; ++c) {
      const float value = packkv::detail::load_element(packkv::detail::address(rows, t, c), rows.type);
      finite = finite && packkv::detail::is_finite(value);
      s.x.push_back(value);
    }
    if (finite)
      ++s.count;
    else
      s.x.resize(static_cast<std::size_t>(s.count) * static_cast<std::size_t>(s.head_dim));
  }
}

/// The queries [heads of the group, n, head_dim] as one list of rows.
inline samples load_queries(const input_view<3>& queries, int head_dim) {
  samples s{head_dim, 0, {}};
  if (queries.data == nullptr) return s;
  for (std::int64_t g = 0; g < queries.extent[0]; ++g) {
    input_view<2> rows;
    rows.data = static_cast<const char*>(queries.data) + g * queries.stride[0];
    rows.type = queries.type;
    for (int i = 0; i < 2; ++i) rows.extent[i] = queries.extent[i + 1], rows.stride[i] = queries.stride[i + 1];
    append_rows(s, rows, max_of<std::int64_t>(1, max_samples / queries.extent[0]));
  }
  return s;
}

}  // namespace detail
}  // namespace packkv::calibrate
