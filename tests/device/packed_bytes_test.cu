// SPDX-License-Identifier: Apache-2.0
// The instructions of detail/packed_bytes.cuh against plain definitions, on random operands and on edges.
#include <packkv/core/checked.hpp>
#include <packkv/detail/packed_bytes.cuh>
#include <vector>

#include "../support/catch.hpp"
#include "../support/random.hpp"
#include "device_array.hpp"

using namespace packkv_test;
namespace pk = packkv;

namespace {

constexpr int results = 10;

/// Each instruction on three operands a thread; out [results][threads].
__global__ void run_instructions(const std::uint32_t* in, std::uint32_t* out, int threads) {
  using namespace pk::detail;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const std::uint32_t a = in[3 * i], b = in[3 * i + 1], c = in[3 * i + 2];
  const std::uint32_t all[results] = {min_floats16<false>(a, b),
                                      max_floats16<false>(a, b),
                                      min_floats16<true>(a, b),
                                      max_floats16<true>(a, b),
                                      min_pairs(a, b, c),
                                      max_pairs(a, b, c),
                                      select_bytes(a, b, c & 0x7777u),
                                      dot_bytes(a, b, c),
                                      byte_distances(a, b),
                                      bit_cast<std::uint32_t>(fma_rn(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f))};
  for (int k = 0; k < results; ++k) out[k * threads + i] = all[k];
}

std::uint32_t half(std::uint32_t x, int i) { return x >> 16 * i & 0xffffu; }
std::uint32_t byte(std::uint32_t x, int i) { return x >> 8 * i & 0xffu; }

/// Whether `got` is the smaller or the larger of two 16-bit floats, NaN if one is; zeros may have either sign.
bool is_extreme(std::uint32_t a, std::uint32_t b, std::uint32_t got, bool bfloat, bool larger) {
  const auto value = [&](std::uint32_t x) {
    return bfloat ? pk::bfloat16_to_float(static_cast<std::uint16_t>(x))
                  : pk::half_to_float(static_cast<std::uint16_t>(x));
  };
  const float x = value(a), y = value(b), z = value(got);
  if (pk::detail::is_nan(x) || pk::detail::is_nan(y)) return pk::detail::is_nan(z);
  return z == (larger ? pk::max_of(x, y) : pk::min_of(x, y));
}

}  // namespace

TEST_CASE("instructions on bytes and pairs give what their definitions say") {
  random_source random(31);
#if defined(PACKKV_SIMT_EXECUTOR)
  constexpr int threads = 1024;
#else
  constexpr int threads = 1 << 18;
#endif
  std::vector<std::uint32_t> in;
  const std::uint32_t edges[] = {0u, ~0u, 0x80008000u, 0x7c007c00u, 0xfc00fc00u, 0x7f80ff80u, 0x7fff7e00u, 0x00ff00ffu};
  for (int i = 0; i < 3 * threads; ++i)
    in.push_back(random.one_in(4) ? edges[random.between(0, 7)] : static_cast<std::uint32_t>(random.bits()));
  const device_array<std::uint32_t> operands(in);
  device_array<std::uint32_t> device(static_cast<std::size_t>(results) * threads);
  device.poison();
  REQUIRE(pk::detail::launch(run_instructions, dim3(threads / 256), 256, cudaStream_t{}, operands.data(), device.data(),
                             threads));
  const std::vector<std::uint32_t> out = device.host();
  int wrong[results] = {};
  for (int i = 0; i < threads; ++i) {
    const std::uint32_t *const x = in.data() + 3 * i, a = x[0], b = x[1], c = x[2];
    const auto got = [&](int k) { return out[static_cast<std::size_t>(k * threads + i)]; };
    for (int k = 0; k < 4; ++k)
      for (int h = 0; h < 2; ++h)
        wrong[k] += is_extreme(half(a, h), half(b, h), half(got(k), h), k >= 2, k % 2 == 1) ? 0 : 1;
    std::uint32_t dot = c;
    bool low = true, high = true, selected = true, distances = true;
    for (int h = 0; h < 2; ++h) {
      low = low && half(got(4), h) == pk::min_of(pk::min_of(half(a, h), half(b, h)), half(c, h));
      high = high && half(got(5), h) == pk::max_of(pk::max_of(half(a, h), half(b, h)), half(c, h));
    }
    for (int k = 0; k < 4; ++k) {
      const int from = static_cast<int>(c >> 4 * k & 7u);
      selected = selected && byte(got(6), k) == byte(from < 4 ? a : b, from % 4);
      dot += byte(a, k) * byte(b, k);
      const int distance = static_cast<int>(byte(a, k)) - static_cast<int>(byte(b, k));
      distances = distances && byte(got(8), k) == static_cast<std::uint32_t>(distance < 0 ? -distance : distance);
    }
    wrong[4] += low ? 0 : 1;
    wrong[5] += high ? 0 : 1;
    wrong[6] += selected ? 0 : 1;
    wrong[7] += got(7) == dot ? 0 : 1;
    wrong[8] += distances ? 0 : 1;
    wrong[9] += got(9) == pk::detail::bit_cast<std::uint32_t>(0x1p-11f + 0x1p-24f) ? 0 : 1;
  }
  for (int k = 0; k < results; ++k) {
    INFO("instruction " << k);
    CHECK(wrong[k] == 0);
  }
}
