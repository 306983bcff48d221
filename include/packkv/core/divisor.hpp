// SPDX-License-Identifier: Apache-2.0
// A division by what the host knows before a launch, as a multiplication on the device.
// One idea: q = (n * (multiplier + 2^32)) >> (32 + shift), in 32 bits (Granlund, Montgomery 1994, figure 4.1).
//   divisor by(6);   by.quotient(20) == 3
#pragma once

#include <cstdint>
#include <packkv/core/config.hpp>

namespace packkv {

/// Divides integers 0 .. 2^31 - 1.
struct divisor {
  std::int32_t value = 0;  ///< 0: none, which divides nothing
  std::uint32_t multiplier = 0, shift = 0;

  divisor() = default;
  /// `value_` >= 0.
  PACKKV_HOST_DEVICE constexpr explicit divisor(std::int32_t value_) : value(value_) {
    if (value == 0) return;
    while ((std::uint64_t{1} << shift) < static_cast<std::uint32_t>(value)) ++shift;
    const std::uint64_t rest = (std::uint64_t{1} << shift) - static_cast<std::uint32_t>(value);
    multiplier = static_cast<std::uint32_t>((rest << 32) / static_cast<std::uint32_t>(value) + 1);
  }
  /// n / value of n >= 0.
  PACKKV_HOST_DEVICE std::int32_t quotient(std::int32_t n) const {
    const auto x = static_cast<std::uint32_t>(n);
#if defined(__CUDA_ARCH__)
    const std::uint32_t high = __umulhi(x, multiplier);
#else
    const auto high = static_cast<std::uint32_t>((std::uint64_t{x} * multiplier) >> 32);
#endif
    return static_cast<std::int32_t>((high + x) >> shift);
  }
};

}  // namespace packkv
