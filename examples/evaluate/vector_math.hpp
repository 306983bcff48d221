// SPDX-License-Identifier: Apache-2.0
// The two inner loops of attention in double precision, with lanes and accumulators spelled out: the order of the
// additions is fixed by the source, so results do not depend on compiler flags.
#pragma once

#include <cstring>

namespace evaluate {

/// Four doubles that compilers map to vector registers of any width.
typedef double lanes __attribute__((vector_size(32)));

/// Sum of a[i] * b[i]; n is a multiple of 16.
inline double dot(const double* a, const double* b, int n) {
  lanes sum[4] = {};
  for (int i = 0; i < n; i += 16)
    for (int j = 0; j < 4; ++j) {
      lanes x, y;
      std::memcpy(&x, a + i + 4 * j, sizeof x);
      std::memcpy(&y, b + i + 4 * j, sizeof y);
      sum[j] += x * y;
    }
  const lanes s = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

/// out[c] += sum over t < count of weight[t] * rows[t][c] for c < n; n is a multiple of 16.
inline void add_weighted(const double* const* rows, const double* weight, int count, double* out, int n) {
  for (int c = 0; c < n; c += 16) {
    lanes sum[4];
    std::memcpy(sum, out + c, sizeof sum);
    for (int t = 0; t < count; ++t) {
      lanes x[4];
      std::memcpy(x, rows[t] + c, sizeof x);
      for (int j = 0; j < 4; ++j) sum[j] += x[j] * weight[t];
    }
    std::memcpy(out + c, sum, sizeof sum);
  }
}

}  // namespace evaluate
