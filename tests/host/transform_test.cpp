// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <packkv/codec/transform.hpp>

#include "fixture.hpp"

namespace pk = packkv;
using namespace host_test;

namespace {

constexpr int head_dims[] = {64, 96, 128, 192, 256, 512};

static_assert(pk::hadamard_block(64) == 64 && pk::hadamard_block(96) == 32 && pk::hadamard_block(128) == 128);
static_assert(pk::hadamard_block(192) == 64 && pk::hadamard_block(256) == 256 && pk::hadamard_block(512) == 512);

/// Entry (i, j) of the block-diagonal Sylvester-Hadamard matrix, scaled to be orthonormal.
double hadamard_entry(int block, int i, int j) {
  if (i / block != j / block) return 0.0;
  int common = (i % block) & (j % block), parity = 0;
  for (; common != 0; common &= common - 1) parity ^= 1;
  return (parity != 0 ? -1.0 : 1.0) / std::sqrt(static_cast<double>(block));
}

std::vector<float> random_token(random_source& random, int d) {
  std::vector<float> x;
  for (int i = 0; i < d; ++i) x.push_back(random.normal() * (random.chance(8) ? 30.0f : 1.0f));
  return x;
}

}  // namespace

TEST_CASE("the Hadamard scale is the float nearest to 1/sqrt of the block", "[transform]") {
  for (const int d : head_dims) {
    const int block = pk::hadamard_block(d);
    CHECK(pk::hadamard_scale(block) == static_cast<float>(1.0 / std::sqrt(static_cast<double>(block))));
  }
}

TEST_CASE("the Hadamard transform equals the matrix in double and keeps the norm", "[transform]") {
  for (const int d : head_dims) {
    const std::uint64_t seed = seed_of(300 + static_cast<std::uint64_t>(d));
    INFO("seed " << seed << " head_dim " << d);
    random_source random(seed);
    const int block = pk::hadamard_block(d);
    for (int round = 0; round < 8; ++round) {
      const std::vector<float> x = random_token(random, d);
      std::vector<float> y(x.size());
      pk::detail::transform_forward(pk::transform_kind::hadamard, {}, d, x.data(), y.data());
      double norm_x = 0.0, norm_y = 0.0, worst = 0.0;
      for (int i = 0; i < d; ++i) {
        double expected = 0.0;
        for (int j = 0; j < d; ++j)
          expected += hadamard_entry(block, i, j) * static_cast<double>(x[static_cast<std::size_t>(j)]);
        worst = std::fmax(worst, std::fabs(expected - static_cast<double>(y[static_cast<std::size_t>(i)])));
        norm_x += std::pow(static_cast<double>(x[static_cast<std::size_t>(i)]), 2);
        norm_y += std::pow(static_cast<double>(y[static_cast<std::size_t>(i)]), 2);
      }
      CHECK(worst < 2e-6 * std::sqrt(norm_x));
      CHECK(std::fabs(norm_y - norm_x) < 1e-6 * norm_x);
    }
  }
}

TEST_CASE("the Hadamard transform of a unit vector is a column of the matrix, zero outside its block", "[transform]") {
  for (const int d : head_dims) {
    const int block = pk::hadamard_block(d);
    const float scale = pk::hadamard_scale(block);
    int wrong = 0;
    for (int j = 0; j < d; ++j) {
      std::vector<float> x(static_cast<std::size_t>(d), 0.0f);
      x[static_cast<std::size_t>(j)] = 1.0f;
      pk::detail::hadamard_in_place(x.data(), d);
      for (int i = 0; i < d; ++i) {
        const double entry = hadamard_entry(block, i, j);
        const float expected = entry == 0.0 ? 0.0f : entry > 0.0 ? scale : -scale;
        wrong += x[static_cast<std::size_t>(i)] != expected;
      }
    }
    INFO("head_dim " << d);
    CHECK(wrong == 0);
  }
}

TEST_CASE("the inverse of each transform undoes it", "[transform]") {
  for (const int d : head_dims) {
    const std::uint64_t seed = seed_of(400 + static_cast<std::uint64_t>(d));
    INFO("seed " << seed << " head_dim " << d);
    random_source random(seed);
    std::vector<std::int16_t> order;
    for (int i = 0; i < d; ++i) order.push_back(static_cast<std::int16_t>(i));
    random.shuffle(order);
    const std::vector<float> x = random_token(random, d);
    std::vector<float> y(x.size()), back(x.size());
    for (const auto kind :
         {pk::transform_kind::identity, pk::transform_kind::permutation, pk::transform_kind::hadamard}) {
      pk::detail::transform_forward(kind, {order.data()}, d, x.data(), y.data());
      pk::detail::transform_inverse(kind, {order.data()}, d, y.data(), back.data());
      if (kind != pk::transform_kind::hadamard) {
        CHECK((back == x));
        int wrong = 0;
        for (std::size_t i = 0; i < x.size(); ++i)
          wrong += y[i] != x[kind == pk::transform_kind::permutation ? static_cast<std::size_t>(order[i]) : i];
        CHECK(wrong == 0);
        continue;
      }
      double norm = 0.0, error = 0.0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        norm += static_cast<double>(x[i]) * static_cast<double>(x[i]);
        error += std::pow(static_cast<double>(back[i]) - static_cast<double>(x[i]), 2);
      }
      CHECK(std::sqrt(error / norm) < 1e-6);
    }
  }
}

TEST_CASE("a basis is the matrix product in double, and its inverse undoes it", "[transform]") {
  for (const int d : head_dims) {
    const std::uint64_t seed = seed_of(500 + static_cast<std::uint64_t>(d));
    INFO("seed " << seed << " head_dim " << d);
    random_source random(seed);
    const auto n = static_cast<std::size_t>(d);
    std::vector<float> basis, inverse;
    append_basis(random, d, basis, inverse);
    const pk::transform_data data{nullptr, basis.data(), inverse.data()};
    const std::vector<float> x = random_token(random, d);
    std::vector<float> y(n), back(n);
    pk::detail::transform_forward(pk::transform_kind::basis, data, d, x.data(), y.data());
    pk::detail::transform_inverse(pk::transform_kind::basis, data, d, y.data(), back.data());
    double norm = 0.0, worst = 0.0, error = 0.0;
    for (std::size_t i = 0; i < n; ++i) {
      double expected = 0.0;
      for (std::size_t c = 0; c < n; ++c)
        expected += static_cast<double>(x[c]) * static_cast<double>(inverse[c * n + i]);
      worst = std::fmax(worst, std::fabs(expected - static_cast<double>(y[i])));
      norm += static_cast<double>(x[i]) * static_cast<double>(x[i]);
      error += std::pow(static_cast<double>(back[i]) - static_cast<double>(x[i]), 2);
    }
    CHECK(worst < 1e-5 * std::sqrt(norm));
    CHECK(std::sqrt(error) < 1e-5 * std::sqrt(norm));
  }
}
