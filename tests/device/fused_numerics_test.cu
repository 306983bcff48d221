// SPDX-License-Identifier: Apache-2.0
// Numerics of the fused decode kernel: NaN, zeros, extremes of scales and scores, and its error on a real cache.
#include "../support/npy.hpp"
#include "fused_problem.hpp"

using namespace packkv_test;

namespace {

/// Sets keys, values and queries of a problem, then compares with the reference.
/// key(t, c, x), value(t, c, x) and query(i, c, x) give what stands there instead of the random x.
template <class Format, class Key, class Value, class Query>
void check_data(pk::dtype type, int group, int splits, Key&& key, Value&& value, Query&& query, double floor = 1e-3,
                float scale = 0.0f) {
  random_source random(8000u + static_cast<unsigned>(group));
  test_cache<Format> cache(random, cache_shape{1, 1, 64 * 9 + 17, 2, type}, Format{});
  cache.key_data.clear_offset();
  change(cache.keys, [&](auto, auto, auto t, auto c, float x) { return key(static_cast<float>(t), c, x); });
  change(cache.values, [&](auto, auto, auto t, auto c, float x) { return value(static_cast<int>(t), c, x); });
  auto problem = plain_problem(random, cache, group, 2);
  change(problem.queries, [&](auto, auto, auto i, auto c, float x) { return query(i, c, x); });
  problem.options.splits = splits;
  if (scale > 0.0f) problem.options.softmax_scale = scale;
  INFO("group " << group << ", splits " << splits);
  const auto expected = problem.reference(), got = problem.device();
  check_rows<Format>(got, expected, fused_tolerance<Format>(), floor);
}
/// With 4, 8 and 16 rows a pass, and one or more blocks a unit.
template <class Format, class Key, class Value, class Query>
void check_all(pk::dtype type, Key&& key, Value&& value, Query&& query, double floor = 1e-3, float scale = 0.0f) {
  check_data<Format>(type, 2, 1, key, value, query, floor, scale);
  check_data<Format>(type, 4, 2, key, value, query, floor, scale);
  check_data<Format>(type, 8, 3, key, value, query, floor, scale);
}

constexpr auto same = [](auto, auto, float x) { return x; };
constexpr auto ones = [](auto, auto, float) { return 1.0f; };
constexpr auto zeros = [](auto, auto, float) { return 0.0f; };

half_array read_sample(const std::string& name) {
  return read_npy(std::string(PACKKV_TEST_DATA) + "/../../examples/data/sample/" + name);
}

/// Mean and largest error of the kernel beside attention in double on the same codes, over the sample's last queries.
template <class Format>
void check_sample(int splits) {
  constexpr int tokens = 2048, kv_heads = 2, query_heads = 12, all_queries = 16, dim = 128;
  const int queries = repeats > 1 ? all_queries : 2;
  random_source random(1);
  test_cache<Format> cache(random, cache_shape{1, kv_heads, tokens, 4, pk::dtype::float16}, Format{});
  const auto take = [](tensor_data& to, const std::string& name) {
    const half_array from = read_sample(name);
    std::size_t next = 0;
    change(to, [&](auto, auto, auto, auto, float) { return pk::half_to_float(from.bits[next++]); });
  };
  take(cache.keys, "k.npy");
  take(cache.values, "v.npy");
  cache.key_data.columns.clear();
  cache.value_data.columns.clear();
  if (Format::key().transform == pk::transform_kind::identity)  // static scales of channels, as calibration gives them
    for (int h = 0; h < kv_heads; ++h) {
      std::vector<double> power(dim, 0.0);
      double all = 0.0;
      change(cache.keys, [&](auto, auto head, auto, auto c, float x) {
        if (head == h) power[static_cast<std::size_t>(c)] += static_cast<double>(x) * x;
        return x;
      });
      for (const double p : power) all += p / dim;
      for (const double p : power)
        cache.key_data.columns.push_back(static_cast<float>(std::sqrt(p / all)) *
                                         pk::gaussian_step(Format::key().strips.width[0]));
    }
  cache.key_data.device_columns = device_array<float>(cache.key_data.columns);
  cache.value_data.device_columns = device_array<float>(cache.value_data.columns);
  cache.key_data.clear_offset();
  cache.value_data.clear_offset();
  auto problem = plain_problem(random, cache, query_heads / kv_heads, queries);
  const half_array from = read_sample("q.npy");
  change(problem.queries, [&](auto, auto i, auto h, auto c, float) {
    return pk::half_to_float(
        from.bits[static_cast<std::size_t>((h * all_queries + all_queries - queries + i) * dim + c)]);
  });
  problem.options.splits = splits;
  const auto expected = problem.reference(), got = problem.device();
  const auto [mean, worst] = errors_of_rows(got, expected, dim);
  INFO("splits " << splits << ", mean " << mean << ", worst " << worst);
  CHECK(mean <= 1e-3);
  CHECK(worst <= 3e-2);
  CHECK(worst_lse_error(got.lse, expected.lse) < fused_tolerance<Format>());
}

/// Exactly the elements that are NaN in the reference are NaN; at least so many rows have one, but not all.
template <class Result>
void check_nan_rows(const Result& got, const Result& expected, int dim, int at_least) {
  int wrong = 0, rows = 0;
  bool spoilt = false;
  for (std::size_t i = 0; i < got.out.size(); ++i) {
    wrong += std::isnan(got.out[i]) != std::isnan(expected.out[i]) ? 1 : 0;
    spoilt = std::isnan(expected.out[i]) || (spoilt && i % static_cast<std::size_t>(dim) != 0);
    rows += spoilt && (i + 1) % static_cast<std::size_t>(dim) == 0 ? 1 : 0;
  }
  CHECK(wrong == 0);
  CHECK(rows >= at_least);
  CHECK(rows < static_cast<int>(got.lse.size()));
}

/// Lane 31 has token 47 of a tile, its sixth, for row 3 of four. Other rows see keys that hardly differ.
template <class Format>
void check_score_of_one_lane() {
  random_source random(8950);
  test_cache<Format> cache(random, cache_shape{1, 1, 64 * 40 + 17, 2, pk::dtype::float16}, Format{});
  cache.key_data.clear_offset();
  change(cache.keys, [](auto, auto, auto t, auto, float x) {
    return t >= 64 * 20 && t % 64 == 47 ? 10.0f + 0.02f * static_cast<float>(t) : 0.1f * x;
  });
  auto problem = plain_problem(random, cache, 4, 1);
  change(problem.queries, [](auto, auto, auto h, auto, float x) { return h == 3 ? 1.0f : 0.01f * x; });
  const auto expected = problem.reference();
  for (const int splits : {1, 2}) {  // with two, more tiles a block than warps, and then those of the other block
    INFO("splits " << splits);
    problem.options.splits = splits;
    check_rows<Format>(problem.device(), expected);
  }
}

/// `spoil` puts NaN into a problem whose rows then see different tokens; `least`: rows that are NaN then.
template <class Format, class Spoil>
void check_spoilt(int group, int splits, int window, int least, Spoil&& spoil) {
  random_source random(8901);
  test_cache<Format> cache(random, cache_shape{1, 1, 200, 1, pk::dtype::float16}, Format{});
  auto problem = plain_problem(random, cache, group, 4);
  problem.options.window = window;
  problem.options.splits = splits;
  spoil(cache, problem);
  INFO("group " << group << ", splits " << splits << ", window " << window);
  const auto expected = problem.reference(), got = problem.device();
  check_nan_rows(got, expected, Format::value_head_dim, least);
}

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
const auto nan_at = [](std::int64_t token, int channel) {
  return [=](auto, auto, auto t, auto c, float x) { return t == token && c == channel ? not_a_number : x; };
};

}  // namespace

TEST_CASE("fused decode: a NaN key or value makes exactly the rows NaN that see its token") {
  for (const int group : {1, 2, 4})
    for (const int splits : {1, 3}) {
      const auto coded = [&](auto which, std::int64_t token, int window, int least) {
        check_spoilt<mixed>(group, splits, window, least, [&](auto& cache, auto& problem) {
          if (splits > 1) problem.options.soft_cap = 20.0f;
          change(decltype(which)::value == 0 ? cache.keys : cache.values, nan_at(token, 17));
          cache.fill();
        });
      };
      const std::integral_constant<int, 0> key;
      const std::integral_constant<int, 1> value;
      coded(key, 198, 0, 2 * group);   // the last two queries see it
      coded(value, 199, 0, group);     // the last
      coded(key, 127, 71, 2 * group);  // the first two, through the window
      coded(value, 127, 70, group);    // the first
    }
}

TEST_CASE("fused decode: a NaN in sinks, ring or queries makes exactly the rows NaN that see it") {
  for (const int group : {1, 2, 4}) {
    check_spoilt<dim_64>(group, 2, 195, group, [&](auto&, auto& problem) {
      random_source random(1);
      problem.options.soft_cap = 20.0f;
      problem.sinks = 7;
      problem.sink_keys = problem.overlay(random, 1, 7, 64);
      problem.sink_values = problem.overlay(random, 1, 7, 64);
      change(problem.sink_keys, nan_at(2, 63));  // which the first query sees
    });
    // A value that the first query sees, in the first lane that loads it and in the last.
    for (const auto& [token, channel] : {std::pair(0, 0), std::pair(7, 63)})
      check_spoilt<dim_64>(group, 1, 197 - token, group, [&, spoilt = nan_at(token, channel)](auto&, auto& problem) {
        random_source random(2);
        problem.sinks = 16;
        problem.sink_keys = problem.overlay(random, 1, 16, 64);
        problem.sink_values = problem.overlay(random, 1, 16, 64);
        change(problem.sink_values, spoilt);
      });
    check_spoilt<dim_64>(group, 2, 0, 2, [&](auto&, auto& problem) {
      change(problem.queries, [](auto, auto i, auto h, auto c, float x) {
        return (i == 1 && h == 0 && c == 40) || (i == 3 && h == 0 && c == 0) ? not_a_number : x;
      });
    });
  }
}

TEST_CASE("fused decode: 16-bit tokens of another type than queries of which one channel stands out") {
  random_source random(8960);
  test_cache<dim_64> cache(random, cache_shape{1, 1, 100, 1, pk::dtype::bfloat16}, dim_64{});
  auto problem = plain_problem(random, cache, 4, 1);
  problem.sinks = 16;
  problem.sink_keys = tensor_data(random, pk::dtype::float16, 1, 1, 16, 64);
  problem.sink_values = tensor_data(random, pk::dtype::float16, 1, 1, 16, 64);
  for (const int channel : {0, 31, 63}) {
    change(problem.queries, [&](auto, auto, auto, auto c, float x) { return c == channel ? 1e5f : x; });
    problem.options.softmax_scale = 1e-5f;
    INFO("channel " << channel);
    check_rows<dim_64>(problem.device(), problem.reference());
    change(problem.queries, [&](auto, auto, auto, auto c, float x) { return c == channel ? 1.0f : x; });
  }
}

TEST_CASE("fused decode: a large element of a query where keys have no bits costs the others none of theirs") {
  random_source random(8970);
  test_cache<mixed> cache(random, cache_shape{1, 1, 100, 1, pk::dtype::bfloat16}, mixed{});
  cache.key_data.clear_offset();
  auto& order = cache.key_data.permutation;
  for (int i = 0; i < 128; ++i) order[static_cast<std::size_t>(i)] = static_cast<std::int16_t>(127 - i);
  cache.key_data.device_permutation = device_array<std::int16_t>(order);
  auto problem = plain_problem(random, cache, 4, 1);
  change(problem.queries, [](auto, auto, auto, auto c, float x) { return c < 32 ? 1e4f * x : x; });
  check_rows<mixed>(problem.device(), problem.reference());
}

TEST_CASE("fused decode: values with row scales of zero and below the normal halves keep their weights") {
  constexpr auto some = [](float scale) { return [=](int t, auto, float x) { return t % 3 == 0 ? x : x * scale; }; };
  for (const float scale : {0.0f, 1e-6f, 2e-5f}) {
    INFO("scale " << scale);
    check_all<two_bit>(pk::dtype::bfloat16, same, some(scale), same);
    check_all<dim_64>(
        pk::dtype::bfloat16, same, [=](int, auto, float x) { return x * scale; }, same, 1e-9);
  }
  // Whole tiles of them, before and behind what counts.
  check_all<two_bit>(
      pk::dtype::bfloat16, same, [](int t, auto, float x) { return t < 300 ? 0.0f : x; }, same);
  check_all<two_bit>(
      pk::dtype::bfloat16, same, [](int t, auto, float x) { return t < 300 ? x : x * 1e-6f; }, same);
}

TEST_CASE("fused decode: values with large row scales do not overflow") {
  for (const float scale : {3e3f, 2e4f}) {
    INFO("scale " << scale);
    constexpr auto clipped = [](float x) { return std::min(std::max(x, -6e4f), 6e4f); };
    check_all<two_bit>(
        pk::dtype::float16, same, [&](int, auto, float x) { return clipped(x * scale); }, same);
    check_all<dim_64>(
        pk::dtype::float16, same, [&](int t, auto, float x) { return clipped(t % 70 == 0 ? x * scale : x); }, same);
  }
}

TEST_CASE("fused decode: scores that rise, fall, stay equal or stand out, slowly and fast") {
  constexpr auto along = [](auto factor_of) {
    return [=](float t, auto c, float x) { return factor_of(t) * (c % 2 == 0 ? 1.0f : 0.9f) + 0.02f * x; };
  };
  const auto check = [&](auto factor_of) { check_all<dim_64>(pk::dtype::bfloat16, along(factor_of), same, ones); };
  check([](float t) { return 0.002f * t; });        // by 0.015 a token
  check([](float t) { return 0.02f * t - 6.0f; });  // by 10 a tile
  check([](float t) { return 0.2f * t - 60.0f; });  // by 100 a tile
  check([](float t) { return 5.0f - 0.02f * t; });  // falling
  check([](float) { return 1.0f; });                // equal
  check([](float) { return -30.0f; });              // equal, and far below 0
  check([](float t) { return t == 333.0f ? 60.0f : 0.0f; });
  check([](float t) { return t == 333.0f ? -60.0f : 0.0f; });
  check([](float t) { return t == 592.0f ? 60.0f : t == 0.0f ? 59.0f : 0.0f; });
  // Weights that a half still holds relative to a maximum that lags behind.
  check([](float t) { return 0.7f * std::floor(t / 64.0f); });
  check_all<two_bit>(pk::dtype::float16, along([](float t) { return 0.01f * t; }), same, ones);
}

TEST_CASE("fused decode: a score that one lane alone has stands out, behind tiles that have set the unit") {
  check_score_of_one_lane<two_bit>();
  check_score_of_one_lane<kivi>();
}

TEST_CASE("fused decode: keys of zeros, and queries of zeros and of extreme size") {
  check_all<dim_64>(pk::dtype::float16, zeros, same, same);
  check_all<two_bit>(
      pk::dtype::float16, [](float t, auto, float x) { return std::fmod(t, 3.0f) == 0.0f ? 0.0f : x; }, same, same);
  check_all<dim_64>(pk::dtype::float16, same, same, zeros);
  check_all<dim_64>(pk::dtype::float16, same, same, [](auto i, auto, float x) { return i == 0 ? 0.0f : x; });
  check_all<dim_64>(pk::dtype::bfloat16, same, same, [](auto, auto, float x) { return x * 1e-30f; });
  check_all<dim_64>(
      pk::dtype::float16, same, same, [](auto, auto, float x) { return x < 0 ? -6e4f : 6e4f; }, 1e-3, 2e-6f);
  check_all<dim_64>(
      pk::dtype::bfloat16, same, same, [](auto, auto, float x) { return x * 1e30f; }, 1e-3, 1e-31f);
  check_all<dim_64>(
      pk::dtype::bfloat16, [](auto, auto, float x) { return x * 1e-5f; }, same,
      [](auto, auto, float x) { return x * 1e30f; }, 1e-3, 1e-26f);
}

TEST_CASE("fused decode adds little to the error of the codes on a real cache") {
  check_sample<two_bit>(7);
  check_sample<four_bit>(1);
}
