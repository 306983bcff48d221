// SPDX-License-Identifier: Apache-2.0
// The arithmetic of warp::lone_token beside that of the definition, and the tokens that it leaves.
#include <cmath>

#include "../support/catch.hpp"
#include "test_cache.hpp"

using namespace packkv_test;

namespace {

constexpr int threads = 128;

__global__ void __launch_bounds__(threads) find_row_scales(const double* mean, int count, std::uint32_t* found) {
  const int i = static_cast<int>(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
  if (i >= count) return;
  const pk::thread::row_scale_number scale(mean[i]);
  found[i] = scale.value == 0.0f ? ~0u : scale.half_bits();
}
__global__ void __launch_bounds__(threads) divide_all(const float* x, const float* by, int count, float* quotient) {
  const int i = static_cast<int>(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
  if (i < count) quotient[i] = pk::thread::repeated_division(by[i]).quotient(x[i]);
}
dim3 grid_of(std::size_t count) { return dim3(static_cast<unsigned>((count + threads - 1) / threads)); }

/// ~0: left to the definition.
std::vector<std::uint32_t> row_scales(const std::vector<double>& means) {
  const device_array<double> mean(means);
  device_array<std::uint32_t> found(means.size());
  REQUIRE(pk::detail::launch(find_row_scales, grid_of(means.size()), threads, cudaStream_t{},
                             static_cast<const double*>(mean.data()), static_cast<int>(means.size()), found.data()));
  return found.host();
}

/// Whether lane l's four channels of a token are coded at once; a warp a token.
template <class Codec, bool BFloat>
__global__ void __launch_bounds__(32) store_one_by_one(const std::uint16_t* x, std::uint8_t* tile, int* stored) {
  const int token = static_cast<int>(blockIdx.x);
  const auto bits = pk::detail::load8(x + token * Codec::head_dim + 4 * pk::detail::lane_id());
  pk::warp::lone_token<Codec, BFloat> coded(bits);
  coded.aim(token % 64, tile + token / 64 * Codec::spec().tile_bytes());
  const bool valid = coded.code();
  if (valid) coded.store();
  if (threadIdx.x == 0) stored[token] = valid ? 1 : 0;
}
template <class Codec>
int count_stored(const std::vector<std::uint16_t>& x, pk::dtype type) {
  const int tokens = static_cast<int>(x.size()) / Codec::head_dim;
  const device_array<std::uint16_t> data(x);
  device_array<std::uint8_t> tiles(
      std::vector<std::uint8_t>(static_cast<std::size_t>(tokens / 64 * Codec::spec().tile_bytes())));
  device_array<int> stored(static_cast<std::size_t>(tokens));
  REQUIRE(
      pk::detail::launch(type == pk::dtype::bfloat16 ? store_one_by_one<Codec, true> : store_one_by_one<Codec, false>,
                         dim3(static_cast<unsigned>(tokens)), 32, cudaStream_t{},
                         static_cast<const std::uint16_t*>(data.data()), tiles.data(), stored.data()));
  int sum = 0;
  for (const int one : stored.host()) sum += one;
  return sum;
}

}  // namespace

TEST_CASE("a root mean square becomes the half that the definition rounds it to, or is left to it") {
  random_source random(9100);
  std::vector<double> near, far;
  for (int i = 0; i < 20000 * repeats; ++i) {
    // A border between two halves, its square, and where roots begin to round to the border as floats.
    const double border = std::ldexp(2 * random.between(1024, 2047) + 1, random.between(-24, 4));
    const double float_unit = std::ldexp(1.0, std::ilogb(border) - 23);
    const double root =
        border + float_unit * (random.one_in(2) ? random.between(-4, 4) / 2.0 : 8 * random.uniform() - 4);
    double mean = root * root;
    for (int k = random.between(-2, 2); k != 0; k += k < 0 ? 1 : -1)
      mean = std::nextafter(mean, k < 0 ? 0.0 : INFINITY);
    near.push_back(mean);
    far.push_back(std::ldexp(1.0 + random.uniform(), random.between(-24, 29)));
  }
  const auto near_found = row_scales(near), far_found = row_scales(far);
  int left = 0, wrong = 0;
  for (std::size_t i = 0; i < near.size(); ++i) {
    if (near_found[i] == ~0u)
      ++left;
    else
      wrong += near_found[i] != pk::detail::row_scale_bits(near[i], 1);
    wrong += far_found[i] != pk::detail::row_scale_bits(far[i], 1);  // none is left
  }
  CHECK(wrong == 0);
  CHECK((left > 0 && left < static_cast<int>(near.size()) / 5));  // a half of a float from the border
}

TEST_CASE("what has no row scale of half's normal range, or none at all, is left to the definition") {
  const auto found = row_scales({0.0, 0x1p-29, 0x1p-26 * 0.9, 65001.0 * 65001.0, 0x1p40, 1e39, 1e300,
                                 static_cast<double>(INFINITY), static_cast<double>(NAN)});
  CHECK((found == std::vector<std::uint32_t>(found.size(), ~0u)));
}

TEST_CASE("a division by a number that is kept has the definition's bits") {
  random_source random(9101);
  std::vector<float> x, by;
  for (int i = 0; i < 50000 * repeats; ++i) {
    const auto significand = [&] {
      const int kind = random.between(0, 4);
      const auto bits = static_cast<std::uint32_t>(random.bits()) & 0x7fffffu;
      return pk::detail::bit_cast<float>(0x3f800000u | (kind == 0   ? 0u
                                                        : kind == 1 ? 0x7fffffu
                                                        : kind == 2 ? bits & 0x7f0000u
                                                                    : bits));
    };
    by.push_back(std::ldexp(significand(), random.between(-15, 16)));
    const float some = std::ldexp(significand(), random.between(-80, 20));
    // A border of codes, and beside it.
    const float border = by.back() * static_cast<float>(random.between(1, 128));
    const float beside = random.one_in(2) ? border : std::nextafter(border, random.one_in(2) ? 0.0f : 1e9f);
    const float value = random.one_in(2) ? some : beside;
    x.push_back(random.one_in(2) ? value : -value);
  }
  const device_array<float> device_x(x), device_by(by);
  device_array<float> quotients(x.size());
  REQUIRE(pk::detail::launch(divide_all, grid_of(x.size()), threads, cudaStream_t{},
                             static_cast<const float*>(device_x.data()), static_cast<const float*>(device_by.data()),
                             static_cast<int>(x.size()), quotients.data()));
  const auto got = quotients.host();
  int wrong = 0;
  for (std::size_t i = 0; i < x.size(); ++i) wrong += got[i] != pk::detail::div_rn(x[i], by[i]);
  CHECK(wrong == 0);
}

TEST_CASE("bell-shaped tokens are stored without the arithmetic of the definition") {
  using key = pk::key_codec<128, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2>>;
  using value = pk::value_codec<128, pk::identity, pk::rms_scale, pk::plan<8, 4, 3, 2, 2, 1, 1, 0>>;
  random_source random(9102);
  for (const pk::dtype type : {pk::dtype::float16, pk::dtype::bfloat16}) {
    std::vector<std::uint16_t> x(10 * 64 * 128);
    for (auto& y : x) {
      const float element = random.normal();
      y = type == pk::dtype::float16 ? pk::float_to_half(element) : pk::float_to_bfloat16(element);
    }
    CHECK(count_stored<key>(x, type) == 640);
    CHECK(count_stored<value>(x, type) == 640);
    for (std::size_t c = 0; c < 128; ++c) x[c] = 0;  // no scale
    CHECK(count_stored<key>(x, type) == 639);
    if (type == pk::dtype::float16) continue;
    for (std::size_t lane = 0; lane < 32; ++lane) x[(1 + lane) * 128 + 4 * lane + lane % 4] = 0x0001;
    CHECK(count_stored<value>(x, type) == 639 - 32);  // 2^-133, of which a division may lose the sign
  }
}
