// SPDX-License-Identifier: Apache-2.0
// Formats that the fused decode kernel serves, and comparisons with the reference, for tests.
#pragma once

#include "../support/catch.hpp"
#include "decode_problem.hpp"

namespace packkv_test {

template <int KeyDim, int ValueDim, class KeyPlan, class ValuePlan, class KeyTransform = pk::hadamard,
          class ValueTransform = pk::hadamard, int Leading = 0>
using fused_format = pk::cache_format<pk::key_codec<KeyDim, KeyTransform, pk::rms_scale, KeyPlan, pk::leading<Leading>>,
                                      pk::value_codec<ValueDim, ValueTransform, pk::rms_scale, ValuePlan>>;

using two_bit = fused_format<128, 128, pk::plan<2, 2, 2, 2>, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>;
using four_bit =
    fused_format<128, 128, pk::plan<4, 4, 4, 4>, pk::plan<4, 4, 4, 4, 4, 4, 4, 4>, pk::identity, pk::hadamard>;
using mixed =
    fused_format<128, 128, pk::plan<4, 3, 1, 0>, pk::plan<8, 4, 3, 2, 2, 1, 1, 0>, pk::permutation, pk::identity, 2>;
using dim_64 = fused_format<64, 64, pk::plan<8, 4, 3, 1>, pk::plan<3, 2, 1, 1>, pk::hadamard, pk::permutation, 1>;

/// Keys grouped along tokens, values along channels, as in KIVI.
template <int KeyDim, int KeyWidth, int KeyGroup, int ValueDim, int ValueWidth, int ValueGroup,
          class KeyTransform = pk::identity, class ValueTransform = pk::identity>
using grouped_format = pk::cache_format<pk::grouped_key_codec<KeyDim, KeyWidth, KeyGroup, KeyTransform>,
                                        pk::grouped_value_codec<ValueDim, ValueWidth, ValueGroup, ValueTransform>>;
using kivi = grouped_format<128, 2, 32, 128, 2, 32>;
using kivi_64 = grouped_format<64, 1, 64, 64, 3, 16, pk::hadamard, pk::hadamard>;

/// Queries in 16 bits, weights in halves: against double, relative to the norm of an output row. Queries are rounded
/// after they are multiplied by the steps of the codes, so that channels of 8 bits get few of the 16 where others
/// have 1.
template <class Format>
constexpr double fused_tolerance() {
  constexpr pk::codec_spec spec = Format::key();
  bool fine = false;
  int least = 8;
  for (int i = 0; i < spec.strips.count; ++i) {
    const int width = spec.strips.width[i];
    fine = fine || width == 8;
    if (width > 0) least = width < least ? width : least;
  }
  // In proportion to the largest step: 1.596 of 1 bit, 0.996 of 2. Measured with 8 bits beside 2 at head dim
  // 512: 2.4e-3, with 2 bits everywhere 2.5e-4.
  return !fine || least > 2 ? 2e-3 : least == 1 ? 6e-3 : 4e-3;
}

/// The rows that the device gives are the reference's, within the tolerance. Rows differ relative to their norm or, if
/// that is larger, `floor`.
template <class Format, class Result>
void check_rows(const Result& got, const Result& expected, double tolerance = fused_tolerance<Format>(),
                double floor = 1e-3) {
  constexpr int dim = Format::value_head_dim;
  double worst = 0.0;
  for (std::size_t first = 0; first < got.out.size(); first += static_cast<std::size_t>(dim)) {
    double difference = 0.0, norm = 0.0;
    for (std::size_t i = first; i < first + static_cast<std::size_t>(dim); ++i) {
      difference += std::pow(static_cast<double>(got.out[i]) - expected.out[i], 2);
      norm += std::pow(static_cast<double>(expected.out[i]), 2);
    }
    const double error = std::sqrt(difference) / std::max(std::sqrt(norm), floor);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  CHECK(worst < tolerance);
  CHECK(worst_lse_error(got.lse, expected.lse) < tolerance);
}

struct row_errors {
  double mean = 0.0, worst = 0.0;
};
/// Of rows of `dim` values, each relative to its norm.
template <class Result>
row_errors errors_of_rows(const Result& got, const Result& expected, std::size_t dim) {
  row_errors e;
  for (std::size_t row = 0; row < got.lse.size(); ++row) {
    double difference = 0.0, norm = 0.0;
    for (std::size_t i = row * dim; i < (row + 1) * dim; ++i) {
      difference += std::pow(static_cast<double>(got.out[i]) - expected.out[i], 2);
      norm += std::pow(static_cast<double>(expected.out[i]), 2);
    }
    const double error = std::sqrt(difference / norm);
    e.mean += error / static_cast<double>(got.lse.size());
    e.worst = std::isnan(error) ? INFINITY : std::max(e.worst, error);
  }
  return e;
}

/// One random call of a format.
template <class Format>
void check_random_call(random_source& random, int group) {
  test_cache<Format> cache(random, random_shape(random, most_tokens), Format{});
  cache.fill();
  decode_problem<Format> problem(random, cache, group, 8);
  INFO("head dims " << Format::key_head_dim << " " << Format::value_head_dim << ", group " << group << ", query tokens "
                    << problem.options.max_query_len);
  const auto expected = problem.reference(), got = problem.device();
  check_rows<Format>(got, expected);
  CHECK(cache.gpu_report().flags == cache.report.flags);
}

/// Fills a cache, every sequence up to its end, and makes a problem of `query_len` query tokens each, in which nothing
/// but causality hides tokens; a test changes what it is about.
template <class Format>
decode_problem<Format> plain_problem(random_source& random, test_cache<Format>& cache, int group, int query_len) {
  for (auto& length : cache.lengths) length = cache.shape.max_tokens;
  cache.device_lengths.assign(cache.lengths);
  cache.fill();
  decode_problem<Format> problem(random, cache, group, 1);
  problem.options = {};
  problem.options.softmax_scale = 1.0f / std::sqrt(static_cast<float>(Format::key_head_dim));
  problem.options.base = pk::lse_base::e;
  problem.options.max_query_len = query_len;
  problem.sinks = problem.ring_capacity = 0;
  problem.with_kv_begin = problem.with_context = false;
  for (std::size_t b = 0; b < problem.query_start.size(); ++b)
    problem.query_start[b] = static_cast<std::int32_t>(b) * query_len;
  problem.device_query_start.assign(problem.query_start);
  problem.tokens = problem.query_start.back();
  problem.queries = tensor_data(random, cache.shape.type, 1, problem.tokens,
                                static_cast<std::int64_t>(group) * cache.shape.kv_heads, Format::key_head_dim);
  return problem;
}

}  // namespace packkv_test
