// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <limits>
#include <packkv/core/divisor.hpp>
#include <random>

#include "../support/catch.hpp"

TEST_CASE("a divisor divides as the operator does", "[divisor]") {
  constexpr std::int32_t most = (std::numeric_limits<std::int32_t>::max)();
  const auto check = [](std::int32_t by) {
    const packkv::divisor d(by);
    const std::int32_t multiple = most / by * by;  // the last one
    for (const std::int32_t n : {0, 1, by - 1, by, by / 2, multiple - 1, multiple, most - 1, most}) {
      INFO(n << " / " << by);
      CHECK(d.quotient(n) == n / by);
    }
    return d;
  };
  for (std::int32_t by = 1; by <= 300; ++by) {
    const packkv::divisor d = check(by);
    bool same = true;
    for (std::int32_t n = 0; n < 5000; ++n) same = same && d.quotient(n) == n / by;
    INFO("by " << by);
    CHECK(same);
  }
  for (int bits = 1; bits < 31; ++bits)
    for (const int near : {-1, 0, 1}) check((std::int32_t{1} << bits) + near);
  for (const std::int32_t by : {most - 1, most}) check(by);
  std::mt19937 random(7);
  for (int i = 0; i < 1000; ++i) check(static_cast<std::int32_t>(random() >> 1 >> random() % 30) | 1);
  CHECK(packkv::divisor().value == 0);
}
