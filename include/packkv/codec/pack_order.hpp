// SPDX-License-Identifier: Apache-2.0
// The integer arithmetic of PackKV's orders, one source for host and device.
//   if (packkv::greater_cosine(dot_a, norm_a, dot_b, norm_b)) ..
#pragma once

#include <cstdint>
#include <packkv/core/config.hpp>

namespace packkv {

/// Whether cosine dot_a / sqrt(norm_a) is greater than dot_b / sqrt(norm_b), exactly; norms are squared, both below
/// 2^42. A token of zeros has cosine 0.
PACKKV_HOST_DEVICE inline bool greater_cosine(std::uint64_t dot_a, std::uint64_t norm_a, std::uint64_t dot_b,
                                              std::uint64_t norm_b) {
#if defined(__CUDACC_RTC__)
  using wide = unsigned __int128;
#else
  __extension__ typedef unsigned __int128 wide;
#endif
  return static_cast<wide>(dot_a) * dot_a * (norm_b == 0 ? 1 : norm_b) >
         static_cast<wide>(dot_b) * dot_b * (norm_a == 0 ? 1 : norm_a);
}

/// sum / n rounded to nearest, ties to even.
PACKKV_HOST_DEVICE inline std::uint32_t rounded_mean(std::uint32_t sum, std::uint32_t n) {
  const std::uint32_t q = sum / n, twice = 2 * (sum % n);
  return q + (twice > n || (twice == n && (q & 1u) != 0) ? 1u : 0u);
}

/// What rounded_mean takes instead of a division.
PACKKV_HOST_DEVICE constexpr std::uint32_t mean_reciprocal(std::uint32_t n) { return 0xffffffffu / (2 * n) + 1; }
/// The same for sum < 2^14, n of at most 64 tokens and reciprocal = mean_reciprocal(n), without a division.
PACKKV_HOST_DEVICE inline std::uint32_t rounded_mean(std::uint32_t sum, std::uint32_t n, std::uint32_t reciprocal) {
  // The reciprocal is 2^32 / 2n, rounded up, if 2n is no power of two and exact if it is; (2 sum + n) * 2n < 2^32, so
  // the error stays below one 2n-th.
  const std::uint32_t twice = 2 * sum + n;
  const std::uint32_t up = static_cast<std::uint32_t>(std::uint64_t{twice} * reciprocal >> 32);
  return up - (up * 2 * n == twice ? up & 1u : 0u);
}

}  // namespace packkv
