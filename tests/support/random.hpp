// SPDX-License-Identifier: Apache-2.0
// Reproducible random numbers for tests: the same sequence on every platform.
#pragma once

#include <cmath>
#include <cstdint>

namespace packkv_test {

/// SplitMix64 (Steele, Lea, Flood 2014).
class random_source {
 public:
  explicit random_source(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  /// Uniform integer in [low, high].
  int between(int low, int high) { return low + static_cast<int>(bits() % static_cast<std::uint64_t>(high - low + 1)); }
  /// Uniform in [0, 1).
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  /// Standard normal (Box-Muller).
  float normal() {
    const double r = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return static_cast<float>(r * std::cos(6.283185307179586 * uniform()));
  }
  bool one_in(int n) { return between(1, n) == 1; }

 private:
  std::uint64_t state_;
};

}  // namespace packkv_test
