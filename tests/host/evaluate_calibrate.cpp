// SPDX-License-Identifier: Apache-2.0
// Properties of packkv/calibrate/columns.hpp.
#include <algorithm>
#include <cmath>
#include <packkv/calibrate/columns.hpp>
#include <packkv/reference/tile.hpp>
#include <vector>

#include "../support/catch.hpp"
#include "../support/random.hpp"

using namespace packkv;

namespace {

constexpr int dim = 128;

/// Tokens whose channel c is Gaussian with deviation sigma[c].
std::vector<float> gaussian_tokens(int tokens, const std::vector<float>& sigma, std::uint64_t seed) {
  packkv_test::random_source random(seed);
  std::vector<float> x;
  for (int t = 0; t < tokens; ++t)
    for (const float s : sigma) x.push_back(s * random.normal());
  return x;
}

input_view<2> rows_of(const std::vector<float>& x, int head_dim = dim) {
  return make_input<2>(x.data(), dtype::float32, {static_cast<std::int64_t>(x.size()) / head_dim, head_dim});
}

codec_spec key_spec(transform_kind transform, std::initializer_list<int> widths, int leading = 0) {
  strip_widths w;
  for (const int width : widths) w.width[w.count++] = static_cast<std::uint8_t>(width);
  return make_plan_codec(side::key, dim, transform, w, leading);
}

/// Mean squared error of coding the tokens, relative to their energy.
double coding_error(const codec_spec& spec, const packkv::detail::head_parameters& head, const std::vector<float>& x) {
  std::vector<std::uint32_t> tile(static_cast<std::size_t>(spec.tile_bytes()) / 4);
  auto* bytes = reinterpret_cast<std::uint8_t*>(tile.data());
  double error = 0.0, energy = 0.0;
  float y[max_head_dim];
  for (std::size_t t = 0; t < x.size() / dim; ++t) {
    device_report report;
    reference::encode_token(spec, head, x.data() + t * dim, static_cast<int>(t % 64), bytes, report);
    reference::decode_token(spec, head, bytes, static_cast<int>(t % 64), y);
    for (int c = 0; c < dim; ++c) {
      const double v = static_cast<double>(x[t * dim + static_cast<std::size_t>(c)]);
      error += (v - static_cast<double>(y[c])) * (v - static_cast<double>(y[c]));
      energy += v * v;
    }
  }
  return error / energy;
}

/// Mean squared error of the queries' products with coded tokens.
double score_error(const codec_spec& spec, const packkv::detail::head_parameters& head, const std::vector<float>& x,
                   const std::vector<float>& queries) {
  std::vector<std::uint32_t> tile(static_cast<std::size_t>(spec.tile_bytes()) / 4);
  auto* bytes = reinterpret_cast<std::uint8_t*>(tile.data());
  double sum = 0.0;
  float y[max_head_dim];
  for (std::size_t t = 0; t < x.size() / dim; ++t) {
    device_report report;
    reference::encode_token(spec, head, x.data() + t * dim, 0, bytes, report);
    reference::decode_token(spec, head, bytes, 0, y);
    for (std::size_t q = 0; q < queries.size() / dim; ++q) {
      double score = 0.0;
      for (std::size_t c = 0; c < dim; ++c)
        score += static_cast<double>(queries[q * dim + c]) *
                 (static_cast<double>(x[t * dim + c]) - static_cast<double>(y[c]));
      sum += score * score;
    }
  }
  return sum / static_cast<double>(x.size() / dim * (queries.size() / dim));
}

}  // namespace

TEST_CASE("calibrate: with an offset, constant channel biases cost nothing, and the offset is the mean") {
  std::vector<float> plain(500 * dim), biased;
  std::uint32_t state = 7;
  for (float& x : plain) {
    x = 0.0f;
    for (int i = 0; i < 4; ++i)
      x += static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / 16777216.0f - 0.5f;
  }
  for (std::size_t i = 0; i < plain.size(); ++i) biased.push_back(plain[i] + (i % dim % 7 == 3 ? 20.0f : 0.0f));
  const codec_spec spec = key_spec(transform_kind::identity, {2, 2, 2, 2});
  std::vector<float> steps(dim), offset(dim), steps_of_biased(dim);
  REQUIRE(calibrate::calibrate_head(spec, rows_of(biased), {}, {nullptr, steps.data(), nullptr, offset.data()}));
  REQUIRE(calibrate::calibrate_head(spec, rows_of(biased), {}, {nullptr, steps_of_biased.data(), nullptr}));
  for (int c = 0; c < dim; ++c)
    CHECK(std::abs(offset[static_cast<std::size_t>(c)] - (c % 7 == 3 ? 20.0f : 0.0f)) < 0.2f);

  // Energies: coding_error is relative to the biased tokens, 20^2 / 7 of energy against 1/3.
  const double with = coding_error(spec, {steps.data(), nullptr, nullptr, 1.0f, offset.data()}, biased);
  const double without = coding_error(spec, {steps_of_biased.data(), nullptr, nullptr, 1.0f, nullptr}, biased);
  CHECK(with < 0.2 * (1.0 / 3.0) / (400.0 / 7.0));
  CHECK(without > 2.0 * with);
}

TEST_CASE("calibrate: channels are ordered by contribution, ties by index") {
  const std::vector<float> ones(4 * dim, 1.0f);
  std::vector<std::int16_t> order(dim);
  calibrate::channel_order(rows_of(ones), {}, order.data());
  for (int c = 0; c < dim; ++c) REQUIRE(order[static_cast<std::size_t>(c)] == c);

  std::vector<float> keys = ones, query(dim, 1.0f);
  for (std::size_t t = 0; t < 4; ++t) keys[t * dim + 5] = -3.0f, keys[t * dim + 9] = 2.0f;
  query[9] = 2.0f;  // channel 9: 4 * 4, channel 5: 9 * 1
  query[0] = 0.5f;
  calibrate::channel_order(rows_of(keys), make_input<3>(query.data(), dtype::float32, {1, 1, dim}), order.data());
  CHECK(order[0] == 9);
  CHECK(order[1] == 5);
  CHECK(order[2] == 1);
  CHECK(order[dim - 1] == 0);
  calibrate::channel_order(rows_of(keys), {}, order.data());
  CHECK(order[0] == 5);
  std::sort(order.begin(), order.end());
  for (int c = 0; c < dim; ++c) REQUIRE(order[static_cast<std::size_t>(c)] == c);
}

TEST_CASE("calibrate: Gaussian channels get about the Gaussian step") {
  const std::vector<float> x = gaussian_tokens(4000, std::vector<float>(dim, 1.0f), 21);
  const codec_spec spec = key_spec(transform_kind::identity, {4, 3, 2, 1});
  std::vector<float> steps(dim);
  REQUIRE(calibrate::calibrate_head(spec, rows_of(x), {}, {nullptr, steps.data(), nullptr}));
  for (int c = 0; c < dim; ++c) {
    const float ratio = steps[static_cast<std::size_t>(c)] / gaussian_step(4 - c / 32);
    INFO("channel " << c << " ratio " << ratio);
    CHECK(std::fabs(ratio - 1.0f) < 0.2f);
  }
}

TEST_CASE("calibrate: steps follow unequal channels and lower the error on other tokens") {
  std::vector<float> sigma(dim);
  for (int c = 0; c < dim; ++c)
    sigma[static_cast<std::size_t>(c)] = c % 16 == 3 ? 20.0f : 0.1f + 0.01f * static_cast<float>(c);
  const std::vector<float> x = gaussian_tokens(2000, sigma, 22), other = gaussian_tokens(500, sigma, 23);
  std::vector<float> steps(dim), permuted_steps(dim);
  std::vector<std::int16_t> order(dim);
  const codec_spec plain = key_spec(transform_kind::identity, {2, 2, 2, 2});
  const codec_spec permuted = key_spec(transform_kind::permutation, {4, 2, 1, 1});
  REQUIRE(calibrate::calibrate_head(plain, rows_of(x), {}, {nullptr, steps.data(), nullptr}));
  REQUIRE(calibrate::calibrate_head(permuted, rows_of(x), {}, {order.data(), permuted_steps.data(), nullptr}));
  const double uncalibrated = coding_error(plain, {nullptr, nullptr, nullptr, 1.0f}, other);
  const double calibrated = coding_error(plain, {steps.data(), nullptr, nullptr, 1.0f}, other);
  const double sorted = coding_error(permuted, {permuted_steps.data(), order.data(), nullptr, 1.0f}, other);
  CAPTURE(uncalibrated, calibrated, sorted);
  CHECK(calibrated < 0.5 * uncalibrated);
  CHECK(sorted < 0.5 * calibrated);
}

TEST_CASE("calibrate: a basis separates what is mixed, follows the queries and comes with its inverse") {
  // Tokens are few strong directions, mixed by a reflection; queries look at 16 channels.
  std::vector<float> sigma(dim, 0.05f), axis(dim);
  for (int c = 0; c < 8; ++c) sigma[static_cast<std::size_t>(c)] = 4.0f;
  double norm = 0.0;
  for (int c = 0; c < dim; ++c) {
    axis[static_cast<std::size_t>(c)] = 1.0f + 0.1f * static_cast<float>(c % 11);
    norm += std::pow(static_cast<double>(axis[static_cast<std::size_t>(c)]), 2);
  }
  const auto reflected = [&](std::vector<float> x) {
    for (std::size_t t = 0; t < x.size() / dim; ++t) {
      double along = 0.0;
      for (std::size_t c = 0; c < dim; ++c) along += static_cast<double>(x[t * dim + c]) * static_cast<double>(axis[c]);
      for (std::size_t c = 0; c < dim; ++c)
        x[t * dim + c] -= static_cast<float>(2.0 * along * static_cast<double>(axis[c]) / norm);
    }
    return x;
  };
  const std::vector<float> x = reflected(gaussian_tokens(1000, sigma, 31)),
                           other = reflected(gaussian_tokens(300, sigma, 32));
  std::vector<float> query_sigma(dim, 0.0f);
  for (int c = 0; c < 16; ++c) query_sigma[static_cast<std::size_t>(c)] = 3.0f;
  const std::vector<float> queries = gaussian_tokens(200, query_sigma, 33);
  const auto query_view = make_input<3>(queries.data(), dtype::float32, {2, 100, dim});

  const codec_spec spec = key_spec(transform_kind::basis, {4, 2, 1, 0}),
                   plain = key_spec(transform_kind::identity, {2, 2, 2, 2});
  constexpr auto size = static_cast<std::size_t>(dim) * dim;
  std::vector<float> steps(dim), plain_steps(dim), basis(size), inverse(size);
  REQUIRE(calibrate::calibrate_head(spec, rows_of(x), {},
                                    {nullptr, steps.data(), nullptr, nullptr, basis.data(), inverse.data()}));
  REQUIRE(calibrate::calibrate_head(plain, rows_of(x), {}, {nullptr, plain_steps.data(), nullptr}));
  const auto product_error = [&] {
    double worst = 0.0;
    for (std::size_t i = 0; i < dim; ++i)
      for (std::size_t j = 0; j < dim; ++j) {
        double sum = 0.0;
        for (std::size_t c = 0; c < dim; ++c)
          sum += static_cast<double>(basis[i * dim + c]) * static_cast<double>(inverse[c * dim + j]);
        worst = std::max(worst, std::fabs(sum - (i == j ? 1.0 : 0.0)));
      }
    return worst;
  };
  CHECK(product_error() < 1e-4);
  for (std::size_t i = 0; i < dim; ++i)  // without queries the basis is orthogonal
    for (std::size_t c = 0; c < dim; ++c) REQUIRE(std::fabs(basis[i * dim + c] - inverse[c * dim + i]) < 1e-5f);
  const auto head = [&] {
    packkv::detail::head_parameters p;
    p.column_scale = steps.data(), p.basis = basis.data(), p.basis_inverse = inverse.data();
    return p;
  };
  CHECK(coding_error(spec, head(), other) < 0.5 * coding_error(plain, {plain_steps.data()}, other));

  // Tokens alike in all directions: only the queries say what matters.
  const std::vector<float> alike = gaussian_tokens(1000, std::vector<float>(dim, 1.0f), 34);
  const auto error_of_scores = [&](const input_view<3>& seen) {
    REQUIRE(calibrate::calibrate_head(spec, rows_of(alike), seen,
                                      {nullptr, steps.data(), nullptr, nullptr, basis.data(), inverse.data()}));
    CHECK(product_error() < 1e-4);
    return score_error(spec, head(), alike, queries);
  };
  const double without = error_of_scores({}), with = error_of_scores(query_view);
  CAPTURE(without, with);
  CHECK(with < 0.2 * without);
  CHECK_FALSE(calibrate::calibrate_head(spec, rows_of(x), query_view,
                                        {nullptr, steps.data(), nullptr, nullptr, basis.data(), nullptr}));
}

TEST_CASE("calibrate: what it writes is finite and positive for dead, constant and non-finite data") {
  std::vector<float> sigma(dim, 1.0f);
  sigma[7] = sigma[40] = 0.0f;
  std::vector<float> x = gaussian_tokens(100, sigma, 24), zeros(3 * dim, 0.0f), nans(2 * dim, std::nanf(""));
  x[3 * dim + 2] = std::nanf("");
  x[5 * dim + 9] = INFINITY;
  const codec_spec spec = key_spec(transform_kind::permutation, {8, 3, 1, 0}, 2);
  for (std::vector<float>* data : {&x, &zeros, &nans}) {
    std::vector<float> steps(dim, -1.0f), leading_scale(2, -1.0f);
    std::vector<std::int16_t> order(dim, -1);
    REQUIRE(calibrate::calibrate_head(spec, rows_of(*data), {}, {order.data(), steps.data(), leading_scale.data()}));
    for (const float s : steps) CHECK((std::isfinite(s) && s > 0.0f));
    for (const float s : leading_scale) CHECK((std::isfinite(s) && s >= 1.17549435e-38f));
    std::sort(order.begin(), order.end());
    for (int c = 0; c < dim; ++c) REQUIRE(order[static_cast<std::size_t>(c)] == c);

    std::vector<float> basis(dim * dim, -1.0f), inverse(dim * dim, -1.0f);
    const input_view<3> queries = make_input<3>(data->data(), dtype::float32, {1, 2, dim});
    REQUIRE(calibrate::calibrate_head(key_spec(transform_kind::basis, {8, 3, 1, 0}), rows_of(*data), queries,
                                      {nullptr, steps.data(), nullptr, nullptr, basis.data(), inverse.data()}));
    for (const float s : steps) CHECK((std::isfinite(s) && s > 0.0f));
    for (std::size_t i = 0; i < basis.size(); ++i) REQUIRE((std::isfinite(basis[i]) && std::isfinite(inverse[i])));
  }
}

TEST_CASE("calibrate: a leading component's scale covers four deviations") {
  std::vector<float> sigma(dim, 1.0f);
  sigma[0] = 10.0f;
  const std::vector<float> x = gaussian_tokens(4000, sigma, 25);
  float scale = 0.0f;
  REQUIRE(calibrate::calibrate_head(key_spec(transform_kind::identity, {2, 2, 2, 2}, 1), rows_of(x), {},
                                    {nullptr, nullptr, &scale}));
  CHECK(std::fabs(scale * 127.0f - 40.0f) < 2.0f);
}

TEST_CASE("calibrate: wrong arguments are refused") {
  const std::vector<float> x(2 * dim, 1.0f);
  const codec_spec spec = key_spec(transform_kind::permutation, {2, 2, 2, 2});
  std::vector<float> steps(dim);
  CHECK_FALSE(calibrate::calibrate_head(spec, rows_of(x), {}, {nullptr, steps.data(), nullptr}));
  const codec_spec plain = key_spec(transform_kind::identity, {2, 2, 2, 2});
  CHECK_FALSE(calibrate::calibrate_head(plain, rows_of(x, 64), {}, {nullptr, steps.data(), nullptr}));
  CHECK_FALSE(calibrate::calibrate_head(plain, make_input<2>(x.data(), dtype::float32, {0, dim}), {},
                                        {nullptr, steps.data(), nullptr}));
  CHECK_FALSE(calibrate::calibrate_head(plain, rows_of(x), make_input<3>(x.data(), dtype::float32, {1, 2, 64}),
                                        {nullptr, steps.data(), nullptr}));
  CHECK_FALSE(calibrate::calibrate_head(make_element_codec(codec_kind::fp8, dim), rows_of(x), {},
                                        {nullptr, steps.data(), nullptr}));
}

TEST_CASE("calibrate: samples whose arrays would not be finite are refused before anything is written") {
  std::vector<float> x(2 * dim, 3e38f);
  std::fill(x.begin() + dim, x.end(), -3e38f);
  std::vector<float> basis(dim * dim, 7.0f), inverse = basis, steps(dim, 7.0f), offset = steps, leading(2, 7.0f);
  std::vector<std::int16_t> order(dim, 7);
  const calibrate::head_output out{order.data(),  steps.data(), leading.data(),
                                   offset.data(), basis.data(), inverse.data()};
  const auto all = [](const auto& array, float value) {
    return std::all_of(array.begin(), array.end(), [=](auto e) { return static_cast<float>(e) == value; });
  };
  const codec_spec spec = key_spec(transform_kind::basis, {2, 2, 2, 2}, 2);
  CHECK(calibrate::calibrate_head(spec, rows_of(x), {}, out).code == status_code::unsupported);
  CHECK((all(order, 7.0f) && all(steps, 7.0f) && all(offset, 7.0f) && all(leading, 7.0f) && all(basis, 7.0f) &&
         all(inverse, 7.0f)));
  // A codec without a basis or a permutation leaves theirs as they were.
  for (float& e : x) e *= 1e-38f;
  CHECK(calibrate::calibrate_head(key_spec(transform_kind::identity, {2, 2, 2, 2}, 2), rows_of(x), {}, out));
  CHECK((all(order, 7.0f) && all(basis, 7.0f) && all(inverse, 7.0f) && !all(steps, 7.0f)));
}
