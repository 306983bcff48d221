// SPDX-License-Identifier: Apache-2.0
#include "../support/catch.hpp"
#include "test_cache.hpp"

using namespace packkv_test;

namespace {

/// One result per 16-bit pattern: what the device makes of it in both directions.
struct conversions {
  std::uint32_t half, bfloat16, e4m3, e5m2;  // bits of the float that the pattern stands for
  std::uint16_t to_half, to_bfloat16;        // of a float made from the pattern
  std::uint16_t to_e4m3, to_e5m2;            // wide, so that the struct has no padding
};

/// A float whose rounding to 16 bits is interesting: the pattern in the upper half, a tie or near-tie below.
PACKKV_HOST_DEVICE inline float probe(std::uint32_t pattern, std::uint32_t below) {
  return pk::detail::bit_cast<float>((pattern << 16) | below);
}

PACKKV_HOST_DEVICE inline conversions convert(std::uint32_t pattern, std::uint32_t below) {
  const auto h = static_cast<std::uint16_t>(pattern);
  const auto b = static_cast<std::uint8_t>(pattern);
  const float x = probe(pattern, below);
  return {pk::detail::bit_cast<std::uint32_t>(pk::half_to_float(h)),
          pk::detail::bit_cast<std::uint32_t>(pk::bfloat16_to_float(h)),
          pk::detail::bit_cast<std::uint32_t>(pk::e4m3_to_float(b)),
          pk::detail::bit_cast<std::uint32_t>(pk::e5m2_to_float(b)),
          pk::float_to_half(x),
          pk::float_to_bfloat16(x),
          pk::float_to_e4m3(x),
          pk::float_to_e5m2(x)};
}

template <int Threads>
__global__ void convert_all(conversions* out, std::uint32_t below) {
  const unsigned i = blockIdx.x * Threads + threadIdx.x;
  out[i] = convert(i, below);
}

}  // namespace

TEST_CASE("conversions of all 65,536 patterns have the same bits on device and host") {
  device_array<conversions> device(65536);
  for (const std::uint32_t below : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu, 0x1000u, 0x2000u}) {
    REQUIRE(pk::detail::launch(convert_all<256>, dim3(256), 256, nullptr, device.data(), below));
    const std::vector<conversions> result = device.host();
    int wrong = 0;
    for (std::uint32_t i = 0; i < 65536; ++i) {
      const conversions expected = convert(i, below), got = result[i];
      wrong += expected.half != got.half || expected.bfloat16 != got.bfloat16 || expected.e4m3 != got.e4m3 ||
               expected.e5m2 != got.e5m2 || expected.to_half != got.to_half ||
               expected.to_bfloat16 != got.to_bfloat16 || expected.to_e4m3 != got.to_e4m3 ||
               expected.to_e5m2 != got.to_e5m2;
    }
    CHECK(wrong == 0);
  }
}
