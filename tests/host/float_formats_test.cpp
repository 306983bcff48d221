// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <packkv/core/float_formats.hpp>

#include "fixture.hpp"

namespace pk = packkv;
using namespace host_test;

namespace {

/// A small float format, defined by arithmetic alone.
struct naive_format {
  int exponent_bits, mantissa_bits;
  bool infinite;  ///< all-ones exponent: infinity and NaN; otherwise only all ones is NaN, and overflow saturates

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  std::uint32_t sign() const { return 1u << (exponent_bits + mantissa_bits); }
  bool is_nan(std::uint32_t magnitude) const { return infinite ? magnitude > infinity() : magnitude == sign() - 1; }
  std::uint32_t infinity() const { return sign() - (1u << mantissa_bits); }
  double value(std::uint32_t magnitude) const {
    const int exponent = static_cast<int>(magnitude >> mantissa_bits);
    const int mantissa = static_cast<int>(magnitude & ((1u << mantissa_bits) - 1));
    if (infinite && magnitude == infinity()) return INFINITY;
    if (exponent == 0) return std::ldexp(mantissa, 1 - bias() - mantissa_bits);
    return std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias() - mantissa_bits);
  }
  /// All finite magnitudes, ascending; the index is the bit pattern.
  std::vector<double> finite() const {
    std::vector<double> values;
    const std::uint32_t end = infinite ? infinity() : sign() - 1;
    for (std::uint32_t m = 0; m < end; ++m) values.push_back(value(m));
    return values;
  }
};

/// Nearest, ties to the even pattern, by searching the list of all values.
std::uint32_t naive_round(const naive_format& f, const std::vector<double>& values, float x) {
  const std::uint32_t sign = std::signbit(x) ? f.sign() : 0;
  if (std::isnan(x)) return sign | (f.sign() - 1);
  const double a = std::fabs(static_cast<double>(x));
  const auto last = static_cast<std::uint32_t>(values.size() - 1);
  // As if the exponent range had no end; what is rounded beyond the last value overflows.
  const double next = values[last] + (values[last] - values[last - 1]);
  const bool beyond = a > (values[last] + next) / 2 || (a == (values[last] + next) / 2 && last % 2 != 0);
  if (beyond || std::isinf(a)) return sign | (f.infinite ? f.infinity() : last);
  if (a >= values[last]) return sign | last;
  const auto above = static_cast<std::uint32_t>(std::upper_bound(values.begin(), values.end(), a) - values.begin());
  const double low = a - values[above - 1], high = values[above] - a;
  return sign | (low < high || (low == high && (above - 1) % 2 == 0) ? above - 1 : above);
}

std::uint32_t bits_of(float x) { return pk::detail::bit_cast<std::uint32_t>(x); }

template <class Decode, class Encode>
void check_format(const naive_format& f, Decode&& decode, Encode&& encode, std::uint64_t salt) {
  const std::uint64_t seed = seed_of(salt);
  INFO("seed " << seed);
  const std::vector<double> values = f.finite();
  int wrong_decode = 0, wrong_identity = 0, wrong_nan = 0;
  for (std::uint32_t p = 0; p < 2 * f.sign(); ++p) {
    const std::uint32_t magnitude = p & (f.sign() - 1);
    const float x = decode(p);
    const bool negative = (p & f.sign()) != 0;
    if (f.is_nan(magnitude)) {
      if (!std::isnan(x) || std::signbit(x) != negative) ++wrong_nan;
      if (encode(x) != (p | (f.sign() - 1))) ++wrong_nan;
      continue;
    }
    if (std::fabs(static_cast<double>(x)) != f.value(magnitude) || std::signbit(x) != negative) ++wrong_decode;
    const bool saturates = !f.infinite && std::isinf(x);
    if (!saturates && encode(x) != p) ++wrong_identity;
  }
  CHECK(wrong_decode == 0);
  CHECK(wrong_identity == 0);
  CHECK(wrong_nan == 0);

  int wrong_rounding = 0, tested = 0;
  const auto test = [&](float x) {
    for (const float y : {x, -x}) {
      ++tested;
      if (encode(y) != naive_round(f, values, y) && ++wrong_rounding < 4)
        UNSCOPED_INFO("float bits " << bits_of(y) << " encode " << encode(y) << " expected "
                                    << naive_round(f, values, y));
    }
  };
  const auto around = [&](double a) {
    const float x = static_cast<float>(a);
    test(x), test(std::nextafter(x, 0.0f)), test(std::nextafter(x, INFINITY));
  };
  for (std::size_t i = 1; i < values.size(); ++i) around(values[i]), around((values[i - 1] + values[i]) / 2);
  const double largest = values.back(), ulp = largest - values[values.size() - 2];
  for (int quarter = 0; quarter <= 12; ++quarter) around(largest + ulp * quarter / 4);
  for (const float x : {0.0f, INFINITY, NAN, std::numeric_limits<float>::max(), std::numeric_limits<float>::min(),
                        std::numeric_limits<float>::denorm_min(), 1e-30f, 1e30f})
    test(x);
  random_source random(seed);
  for (int i = 0; i < 300000; ++i) {
    test(pk::detail::bit_cast<float>(static_cast<std::uint32_t>(random.bits())));
    test(random.normal() * std::ldexp(1.0f, random.between(-f.bias() - 4, f.bias() + 2)));
  }
  CHECK(tested > 1000000);
  CHECK(wrong_rounding == 0);
}

}  // namespace

TEST_CASE("half: every pattern decodes exactly, survives encoding, and rounding is to nearest even", "[float]") {
  check_format(
      {5, 10, true}, [](std::uint32_t p) { return pk::half_to_float(static_cast<std::uint16_t>(p)); },
      [](float x) { return std::uint32_t{pk::float_to_half(x)}; }, 1);
}
TEST_CASE("bfloat16: every pattern decodes exactly, survives encoding, and rounding is to nearest even", "[float]") {
  check_format(
      {8, 7, true}, [](std::uint32_t p) { return pk::bfloat16_to_float(static_cast<std::uint16_t>(p)); },
      [](float x) { return std::uint32_t{pk::float_to_bfloat16(x)}; }, 2);
}
TEST_CASE("E4M3: every pattern decodes exactly, survives encoding, rounds to nearest even and saturates", "[float]") {
  check_format(
      {4, 3, false}, [](std::uint32_t p) { return pk::e4m3_to_float(static_cast<std::uint8_t>(p)); },
      [](float x) { return std::uint32_t{pk::float_to_e4m3(x)}; }, 3);
  CHECK(pk::e4m3_to_float(0x7e) == 448.0f);
  CHECK(pk::float_to_e4m3(1e9f) == 0x7e);
  CHECK(pk::float_to_e4m3(-INFINITY) == 0xfe);
}
TEST_CASE("E5M2: every pattern decodes exactly, survives encoding, and rounding is to nearest even", "[float]") {
  check_format(
      {5, 2, true}, [](std::uint32_t p) { return pk::e5m2_to_float(static_cast<std::uint8_t>(p)); },
      [](float x) { return std::uint32_t{pk::float_to_e5m2(x)}; }, 4);
  CHECK(pk::e5m2_to_float(0x7b) == 57344.0f);
  CHECK(pk::float_to_e5m2(1e9f) == 0x7c);
}

TEST_CASE("known constants of the small formats", "[float]") {
  CHECK(pk::float_to_half(1.0f) == 0x3c00);
  CHECK(pk::float_to_half(-2.0f) == 0xc000);
  CHECK(pk::float_to_half(65504.0f) == 0x7bff);
  CHECK(pk::float_to_half(65519.996f) == 0x7bff);
  CHECK(pk::float_to_half(65520.0f) == 0x7c00);
  CHECK(pk::float_to_half(0x1p-24f) == 0x0001);
  CHECK(pk::float_to_half(0x1p-25f) == 0x0000);
  CHECK(pk::float_to_half(0x1.000002p-25f) == 0x0001);
  CHECK(pk::float_to_half(NAN) == 0x7fff);
  CHECK(pk::float_to_bfloat16(1.0f) == 0x3f80);
  CHECK(pk::float_to_bfloat16(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(pk::float_to_e4m3(1.0f) == 0x38);
  CHECK(pk::float_to_e5m2(1.0f) == 0x3c);
}
