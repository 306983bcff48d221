// SPDX-License-Identifier: Apache-2.0
// Random matrices for formats with a basis.
#pragma once

#include <cstddef>
#include <vector>

namespace packkv_test {

/// Appends a basis [head_dim, head_dim] that is not orthogonal, and its inverse: a reflection times a diagonal.
/// `random` has normal() and uniform().
template <class Random>
void append_basis(Random& random, int head_dim, std::vector<float>& basis, std::vector<float>& inverse) {
  std::vector<double> axis, size;
  double norm = 0.0;
  for (int c = 0; c < head_dim; ++c) {
    axis.push_back(static_cast<double>(random.normal()));
    size.push_back(0.5 + random.uniform());
    norm += axis.back() * axis.back();
  }
  for (std::size_t i = 0; i < axis.size(); ++i)
    for (std::size_t c = 0; c < axis.size(); ++c) {
      const double reflection = (i == c ? 1.0 : 0.0) - 2.0 * axis[i] * axis[c] / norm;
      basis.push_back(static_cast<float>(size[i] * reflection));
      inverse.push_back(static_cast<float>(reflection / size[c]));
    }
}

}  // namespace packkv_test
