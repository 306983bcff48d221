// SPDX-License-Identifier: Apache-2.0
// Checked 64-bit size arithmetic: a running value that remembers whether any step overflowed.
//   auto bytes = checked(tiles) * tile_bytes + header;   if (!bytes.valid()) return refuse(...);
#pragma once

#include <cstdint>
#include <limits>
#include <packkv/core/config.hpp>

namespace packkv {

/// A non-negative 64-bit size. Negative operands and overflow make it, and all that follows, invalid.
class checked {
 public:
  PACKKV_HOST_DEVICE constexpr checked(std::int64_t value) : value_(value), valid_(value >= 0) {}

  PACKKV_HOST_DEVICE constexpr bool valid() const { return valid_; }
  /// The value; 0 if a step overflowed.
  PACKKV_HOST_DEVICE constexpr std::int64_t value() const { return valid_ ? value_ : 0; }

  PACKKV_HOST_DEVICE friend constexpr checked operator*(checked a, checked b) {
    if (!a.valid_ || !b.valid_) return invalid();
    if (a.value_ != 0 && b.value_ > limit / a.value_) return invalid();
    return checked(a.value_ * b.value_);
  }
  PACKKV_HOST_DEVICE friend constexpr checked operator+(checked a, checked b) {
    if (!a.valid_ || !b.valid_ || b.value_ > limit - a.value_) return invalid();
    return checked(a.value_ + b.value_);
  }
  /// Rounds up to a multiple of `unit` (> 0).
  PACKKV_HOST_DEVICE constexpr checked rounded_up(std::int64_t unit) const {
    const checked padded = *this + (unit - 1);
    return padded.valid_ ? checked(padded.value_ / unit * unit) : invalid();
  }

 private:
  static constexpr std::int64_t limit = (std::numeric_limits<std::int64_t>::max)();
  PACKKV_HOST_DEVICE static constexpr checked invalid() { return checked(-1); }

  std::int64_t value_;
  bool valid_;
};

/// ceil(a / b) for a >= 0, b > 0.
template <class Integer>
PACKKV_HOST_DEVICE constexpr Integer ceil_div(Integer a, Integer b) {
  return a / b + (a % b != 0 ? 1 : 0);
}

namespace detail {

/// a / b and a % b for a >= 0, b > 0; in 32 bits, which take a fifth of the time, where a has no more.
struct quotient {
  std::int64_t whole;
  std::int32_t rest;
  PACKKV_HOST_DEVICE quotient(std::int64_t a, std::int32_t b)
      : whole(a <= 0xffffffff ? static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b) : a / b),
        rest(static_cast<std::int32_t>(a - whole * b)) {}
};

}  // namespace detail

/// Minimum and maximum that survive `#define min` and need no host header on the device.
template <class T>
PACKKV_HOST_DEVICE constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
/// See min_of.
template <class T>
PACKKV_HOST_DEVICE constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

}  // namespace packkv
