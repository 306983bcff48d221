// SPDX-License-Identifier: Apache-2.0
// Caches whose keys are grouped along tokens and whose values are grouped along channels (KIVI), in pages: coding,
// decoding, GEMV, and the fused decode kernel.
#include <type_traits>

#include "fused_problem.hpp"

using namespace packkv_test;

namespace {

using kivi_192 = grouped_format<192, 4, 32, 128, 8, 128>;
/// One side of each kind.
using grouped_keys =
    pk::cache_format<pk::grouped_key_codec<128, 3, 64>,
                     pk::value_codec<128, pk::hadamard, pk::rms_scale, pk::plan<4, 4, 4, 4, 4, 4, 4, 4>>>;
using grouped_values = pk::cache_format<pk::key_codec<128, pk::hadamard, pk::rms_scale, pk::plan<4, 4, 4, 4>>,
                                        pk::grouped_value_codec<128, 4, 64>>;

template <int Dim>
pk::runtime_format<Dim> random_format(random_source& random) {
  constexpr int widths[] = {1, 2, 3, 4, 8};
  constexpr pk::transform_kind transforms[] = {pk::transform_kind::identity, pk::transform_kind::hadamard};
  pk::runtime_format<Dim> f;
  f.key_spec = pk::make_grouped_codec(pk::side::key, Dim, widths[random.between(0, 4)], random.one_in(2) ? 32 : 64,
                                      transforms[random.between(0, 1)]);
  const int group = random.one_in(3) ? Dim : Dim % 32 == 0 && random.one_in(2) ? 32 : 16;
  f.value_spec = pk::make_grouped_codec(pk::side::value, Dim, widths[random.between(0, 4)], group,
                                        transforms[random.between(0, 1)]);
  if (random.one_in(4)) f.value_spec = random_codec(random, pk::side::value, Dim);
  return f;
}
template <class Function>
void for_each_grouped_format(random_source& random, Function&& f) {
  f(random_format<64>(random));
  f(random_format<96>(random));
  f(random_format<128>(random));
}

}  // namespace

TEST_CASE("grouped pages: compress and decompress on the device give the reference's bytes and bits") {
  for (int round = 0; round < 2 * repeats; ++round) {
    const std::uint64_t seed = 8500 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    for_each_grouped_format(random, [&](const auto& format) {
      test_cache cache(random, random_shape(random, most_tokens), format);
      // What no group can hold: a NaN in a key, an infinity in a value, and values that leave the range of halves.
      const bool nan = random.one_in(2);
      change(cache.keys, [&](auto, auto, auto t, auto c, float x) { return nan && t == 3 && c == 5 ? NAN : x; });
      change(cache.values, [&](auto, auto, auto t, auto c, float x) {
        return nan && t == 1 && c == 7 ? INFINITY : t == 2 ? x * 60000.0f : x;
      });
      REQUIRE(cache.compress_reference());
      REQUIRE(cache.after_failures([&] {
        return pk::compress(cache.keys.device(), cache.values.device(), cache.device_lengths.data(),
                            cache.gpu_parameters(), cache.gpu_pages(), cache.gpu_table(), cache.exec());
      }));
      CHECK((cache.device_pages.host() == cache.pages));
      CHECK(cache.gpu_report().flags == cache.report.flags);
      if (nan && *std::max_element(cache.lengths.begin(), cache.lengths.end()) > 3)
        CHECK((cache.report.flags & pk::report_nonfinite_input) != 0);

      tensor_data k(random, pk::dtype::float16, cache.shape.batch, cache.shape.kv_heads, cache.shape.max_tokens,
                    format.key_head_dim);
      tensor_data v(random, pk::dtype::bfloat16, cache.shape.batch, cache.shape.kv_heads, cache.shape.max_tokens,
                    format.value_head_dim);
      REQUIRE(cache.after_failures([&] {
        return pk::decompress(cache.gpu_pages(), cache.gpu_table(), cache.device_lengths.data(), cache.gpu_parameters(),
                              as_output(k.device()), as_output(v.device()), cache.exec());
      }));
      REQUIRE(pk::reference::decompress(cache.host_pages(), cache.host_table(), cache.lengths.data(),
                                        cache.host_parameters(), as_output(k.host()), as_output(v.host()),
                                        cache.report));
      CHECK((k.device_bits.host() == k.host_bits));
      CHECK((v.device_bits.host() == v.host_bits));
    });
  }
}

TEST_CASE("grouped pages: a group of one token is coded") {
  random_source random(8540);
  for (const int tokens : {1, 33, 65}) {
    test_cache<pk::runtime_format<64>> cache(
        random, cache_shape{1, 1, tokens, 1, pk::dtype::float16},
        {pk::make_grouped_codec(pk::side::key, 64, 2, 32), pk::make_grouped_codec(pk::side::value, 64, 2, 32)});
    cache.lengths = {tokens};
    cache.device_lengths.assign(cache.lengths);
    REQUIRE(cache.compress_reference());
    REQUIRE(pk::compress(cache.keys.device(), cache.values.device(), cache.device_lengths.data(),
                         cache.gpu_parameters(), cache.gpu_pages(), cache.gpu_table(), cache.exec()));
    CHECK((cache.device_pages.host() == cache.pages));
  }
}

TEST_CASE("store_tiles gives the bytes of compress, from a ring as well, and reports what is out of range") {
  for (int round = 0; round < repeats; ++round) {
    const std::uint64_t seed = 8550 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    const auto check = [&](const auto& format) {
      cache_shape shape = random_shape(random, 320);
      shape.max_tokens = std::max(shape.max_tokens, 128);
      test_cache cache(random, shape, format);
      const std::int64_t page_tokens = 64 * shape.tiles_per_page;
      const auto slot_of = [&](int b, int t) {
        std::uint32_t flags = 0;
        const auto page = pk::find_page(cache.host_table(), cache.host_pages().num_pages, b, t / page_tokens, flags);
        return page * page_tokens + t % page_tokens;
      };
      // Tensors that are rings: token t of row r lies at (t + 70 * r) % tokens.
      const std::int64_t tokens = shape.max_tokens;
      std::vector<pk::tile_move> moves;
      for (int b = 0; b < shape.batch; ++b)
        for (int t = 0; t + 64 <= shape.max_tokens; t += 64)
          moves.push_back({slot_of(b, t), b, static_cast<std::int32_t>((t + 70 * b) % tokens)});
      for (std::size_t i = moves.size(); i > 1; --i)
        std::swap(moves[i - 1], moves[static_cast<std::size_t>(random.between(0, static_cast<int>(i) - 1))]);
      tensor_data k = tensor_data(random, shape.type, shape.batch, shape.kv_heads, tokens, format.key_head_dim);
      tensor_data v = tensor_data(random, shape.type, shape.batch, shape.kv_heads, tokens, format.value_head_dim);
      const auto turn = [&](tensor_data& ring, const tensor_data& from) {
        change(ring, [&](auto r, auto h, auto at, auto c, float) {
          const std::int64_t t = (at - 70 * r % tokens + tokens) % tokens;
          return pk::detail::load_element(pk::detail::address(from.host(), r, h, t, c), from.type);
        });
      };
      turn(k, cache.keys);
      turn(v, cache.values);
      for (auto& length : cache.lengths) length = shape.max_tokens / 64 * 64;
      REQUIRE(cache.compress_reference());
      const auto compressed = cache.pages;
      // And moves that go nowhere.
      const std::int64_t beyond = cache.host_pages().num_pages * page_tokens;
      const std::vector<std::pair<pk::tile_move, std::uint32_t>> bad = {
          {{-1, 0, 0}, 0u},
          {{-64, 1 << 30, -5}, 0u},
          {{beyond, 0, 0}, pk::report_page_out_of_range},
          {{(std::int64_t{1} << 62), 0, 0}, pk::report_page_out_of_range},
          {{1, 0, 0}, pk::report_page_out_of_range},
          {{0, -1, 0}, pk::report_ring_row_out_of_range},
          {{0, shape.batch, 0}, pk::report_ring_row_out_of_range},
          {{0, 0, -1}, pk::report_length_out_of_range},
          {{0, 0, static_cast<std::int32_t>(tokens)}, pk::report_length_out_of_range}};
      const pk::device_report coded = cache.report;
      for (std::size_t extra = 0; extra <= bad.size(); ++extra) {
        auto all = moves;
        std::uint32_t expected = coded.flags;
        for (std::size_t i = 0; i < bad.size(); ++i)
          if (extra == bad.size() || i == extra) {
            all.insert(all.begin() + random.between(0, static_cast<int>(all.size())), bad[i].first);
            expected |= bad[i].second;
          }
        cache.device_report.poison(0);
        cache.device_pages.poison();
        std::fill(cache.pages.begin(), cache.pages.end(), std::uint8_t{0xff});
        pk::device_report report;
        const device_array<pk::tile_move> device_moves(all);
        const auto n = static_cast<std::int64_t>(all.size());
        REQUIRE(pk::reference::store_tiles(k.host(), v.host(), all.data(), n, cache.host_parameters(),
                                           cache.host_pages(), report));
        REQUIRE(cache.after_failures([&] {
          return pk::store_tiles(k.device(), v.device(), device_moves.data(), n, cache.gpu_parameters(),
                                 cache.gpu_pages(), cache.exec());
        }));
        CHECK((cache.pages == compressed));
        CHECK((cache.device_pages.host() == compressed));
        CHECK(report.flags == expected);
        CHECK(cache.gpu_report().flags == expected);
        CHECK(report.leading_clamps == coded.leading_clamps);
        CHECK(cache.gpu_report().leading_clamps == coded.leading_clamps);
        if (repeats == 1 && extra == 0) extra = bad.size() - 2;
      }
    };
    check(random_format<128>(random));
    check(pk::runtime_format<64>{random_codec(random, pk::side::key, 64), random_codec(random, pk::side::value, 64)});
  }
}

TEST_CASE("grouped pages: tokens are stored one by one where no keys share their groups, else refused untouched") {
  random_source random(8580);
  const auto check = [&](const auto& format, bool possible) {
    test_cache cache(random, cache_shape{1, 2, 100, 1, pk::dtype::bfloat16}, format);
    std::vector<std::int64_t> slots;
    for (int t = 0; t < 100; ++t) slots.push_back(cache.table[static_cast<std::size_t>(t / 64)] * 64 + t % 64);
    const auto poisoned = cache.pages;
    const device_array<std::int64_t> device_slots(slots);
    const pk::status host =
        pk::reference::store_tokens(one_by_one(cache.keys.host()), one_by_one(cache.values.host()), slots.data(),
                                    cache.host_parameters(), cache.host_pages(), cache.report);
    const pk::status device =
        pk::store_tokens(one_by_one(cache.keys.device()), one_by_one(cache.values.device()), device_slots.data(),
                         cache.gpu_parameters(), cache.gpu_pages(), cache.exec());
    CHECK(host.code == (possible ? pk::status_code::ok : pk::status_code::unsupported));
    CHECK(device.code == host.code);
    CHECK((cache.pages == poisoned) == !possible);
    CHECK((cache.device_pages.host() == cache.pages));
  };
  check(grouped_values{}, true);
  check(kivi{}, false);
  check(grouped_keys{}, false);
}

TEST_CASE("grouped pages: the simple kernels agree with the reference, plans known at run time alone") {
  for (int round = 0; round < repeats; ++round) {
    const std::uint64_t seed = 8600 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    for_each_grouped_format(random, [&](const auto& format) {
      test_cache cache(random, random_shape(random, most_tokens), format);
      cache.fill();
      decode_problem problem(random, cache, random.between(1, 5));
      const auto expected = problem.reference();
      const auto got = problem.device();
      CHECK(worst_row_error(got.out, expected.out, format.value_head_dim) < 4e-5);
      CHECK(worst_lse_error(got.lse, expected.lse) < 4e-5);
      CHECK(cache.gpu_report().flags == cache.report.flags);
    });
  }
}

TEST_CASE("grouped pages: GEMVs of formats known at run time agree with the reference, offsets included") {
  random_source random(8640);
  for_each_grouped_format(random, [&](const auto& format) {
    using type = std::decay_t<decltype(format)>;
    constexpr int dim = type::key_head_dim, kv_heads = 2, heads = 8, tokens = 130;
    test_cache<type> cache(random, cache_shape{1, kv_heads, tokens, 1, pk::dtype::float16}, format);
    for (side_data* side : {&cache.key_data, &cache.value_data}) {
      side->offset.clear();
      for (int i = 0; i < kv_heads * dim; ++i) side->offset.push_back(0.5f * random.normal());
      side->device_offset = device_array<float>(side->offset);
    }
    cache.lengths = {tokens};
    cache.device_lengths.assign(cache.lengths);
    cache.fill();
    const auto numbers = [&](int count) {
      std::vector<float> x;
      for (int i = 0; i < heads * count; ++i) x.push_back(random.normal());
      return x;
    };
    const auto in = [&](const float* x, int n) { return pk::make_input(x, pk::dtype::float32, {1, heads, n}); };
    const auto out = [&](float* x, int n) { return pk::make_output(x, pk::dtype::float32, {1, heads, n}); };
    device_array<std::uint8_t> workspace(
        static_cast<std::size_t>(pk::value_gemv_workspace_bytes<type>({1, kv_heads, heads, 1, tokens, 0})));
    pk::exec e = cache.exec();
    e.workspace = workspace.data();
    e.workspace_bytes = workspace.size();
    REQUIRE(pk::initialize_workspace(e));

    const std::vector<float> queries = numbers(dim), weights = numbers(tokens);
    const device_array<float> device_queries(queries), device_weights(weights);
    std::vector<float> scores(heads * tokens), sums(heads * dim);
    device_array<float> device_scores(scores.size()), device_sums(sums.size());
    REQUIRE(pk::reference::key_gemv(in(queries.data(), dim), cache.host_cache(), cache.host_parameters(), 0.5f,
                                    out(scores.data(), tokens), cache.report));
    REQUIRE(cache.after_failures([&] {
      return pk::key_gemv(in(device_queries.data(), dim), cache.gpu_cache(), cache.gpu_parameters(), 0.5f,
                          out(device_scores.data(), tokens), e);
    }));
    CHECK(worst_row_error(device_scores.host(), scores, tokens) < 4e-5);
    REQUIRE(pk::reference::value_gemv(in(weights.data(), tokens), cache.host_cache(), cache.host_parameters(),
                                      out(sums.data(), dim), cache.report));
    REQUIRE(cache.after_failures([&] {
      return pk::value_gemv(in(device_weights.data(), tokens), cache.gpu_cache(), cache.gpu_parameters(),
                            out(device_sums.data(), dim), e);
    }));
    CHECK(worst_row_error(device_sums.host(), sums, dim) < 4e-5);
  });
}

TEST_CASE("grouped pages: the fused kernel agrees with the reference for random shapes, masks and overlays") {
  for (int round = 0; round < 2 * repeats; ++round) {
    const std::uint64_t seed = 8650 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    constexpr int groups[] = {1, 2, 3, 4, 5, 6, 7, 8, 16};
    const auto group = [&] { return groups[random.between(0, 8)]; };
    check_random_call<kivi>(random, 4);
    check_random_call<kivi>(random, group());
    check_random_call<kivi_64>(random, group());
    check_random_call<kivi_192>(random, group());
    check_random_call<grouped_keys>(random, group());
    check_random_call<grouped_values>(random, group());
  }
}

TEST_CASE("grouped pages: what is not coded yet is read from the ring, and nothing else of its tiles") {
  random_source random(8700);
  for (const int length : {1, 63, 64, 65, 100, 127, 128, 129, 190, 192}) {
    if (repeats == 1 && length % 3 == 1) continue;
    test_cache<kivi> cache(random, cache_shape{1, 2, length, 2, pk::dtype::float16}, kivi{});
    auto problem = plain_problem(random, cache, 1 + length % 5, 1);
    problem.set_ring(random, 64);
    const auto fill_ring = [&](tensor_data& ring, const tensor_data& all) {
      change(ring, [&](auto, auto h, auto slot, auto c, float) {
        const std::int64_t newest = length - 1, t = newest - (newest - slot + ring.tokens) % ring.tokens;
        return t < 0 ? NAN : pk::detail::load_element(pk::detail::address(all.host(), 0, h, t, c), all.type);
      });
    };
    fill_ring(problem.ring_keys, cache.keys);
    fill_ring(problem.ring_values, cache.values);
    const auto expected = problem.reference();  // of pages in which the last tile is coded, too
    std::fill(cache.pages.begin(), cache.pages.end(), std::uint8_t{0xff});
    const std::int64_t page_tokens = 128;
    std::vector<pk::tile_move> moves;
    for (int t = 0; t + 64 <= length; t += 64) {
      std::uint32_t flags = 0;
      const auto page = pk::find_page(cache.host_table(), cache.host_pages().num_pages, 0, t / page_tokens, flags);
      moves.push_back({page * page_tokens + t % page_tokens, 0, t});
    }
    cache.device_pages.assign(cache.pages);
    const device_array<pk::tile_move> device_moves(moves);
    const auto n = static_cast<std::int64_t>(moves.size());
    const bool full = length >= 64;
    const pk::status s = pk::store_tiles(cache.keys.device(), cache.values.device(), device_moves.data(), n,
                                         cache.gpu_parameters(), cache.gpu_pages(), cache.exec());
    CHECK(s.code == pk::status_code::ok);
    INFO("length " << length << ", tiles " << n);
    CHECK(full == (n > 0));
    check_rows<kivi>(problem.device(), expected);
  }
}

TEST_CASE("grouped pages: a NaN makes exactly the rows NaN that see its group") {
  for (const int group : {1, 2, 4}) {
    for (const bool key : {true, false}) {
      random_source random(8750);
      test_cache<kivi> cache(random, cache_shape{1, 1, 200, 1, pk::dtype::float16}, kivi{});
      auto problem = plain_problem(random, cache, group, 4);
      // Query i of 4 sees the tokens 126 + i to 196 + i: the last alone sees token 199, and its group of keys, the
      // first two the groups of 127, whose values all may be seen by one row and hidden from its neighbour.
      problem.options.window = 71;
      const int token = key ? 97 : group == 4 ? 127 : 199;
      change(key ? cache.keys : cache.values,
             [&](auto, auto, auto t, auto c, float x) { return t == token && c == 17 ? NAN : x; });
      cache.fill();
      INFO("group " << group << ", token " << token);
      const auto expected = problem.reference(), got = problem.device();
      int wrong = 0, rows = 0, free = 0;
      for (std::size_t row = 0; row < got.lse.size(); ++row) {
        bool nan = false, expected_nan = false;
        for (std::size_t i = row * 128; i < row * 128 + 128; ++i) {
          nan = nan || std::isnan(got.out[i]);
          expected_nan = expected_nan || std::isnan(expected.out[i]);
          wrong += std::isnan(expected.out[i]) && !std::isnan(got.out[i]) ? 1 : 0;
        }
        wrong += nan != expected_nan ? 1 : 0;
        rows += nan ? 1 : 0;
        free += nan ? 0 : 1;
      }
      CHECK(wrong == 0);
      CHECK(rows > 0);
      CHECK(free > 0);
    }
  }
}

TEST_CASE("grouped pages: extremes of scales and scores, and many equal weights") {
  int tokens = 64 * 9 + 17;
  const auto check = [&](pk::dtype type, auto key, auto value, auto query, float scale = 0.0f, double floor = 1e-3) {
    for (const int group : {2, 4, 8}) {
      random_source random(8800u + static_cast<unsigned>(group));
      test_cache<kivi> cache(random, cache_shape{1, 1, tokens, 2, type}, kivi{});
      cache.key_data.clear_offset();
      cache.value_data.clear_offset();
      change(cache.keys, [&](auto, auto, auto t, auto c, float x) { return key(static_cast<float>(t), c, x); });
      change(cache.values, [&](auto, auto, auto t, auto c, float x) { return value(static_cast<float>(t), c, x); });
      auto problem = plain_problem(random, cache, group, 2);
      change(problem.queries, [&](auto, auto, auto, auto c, float x) { return query(0.0f, c, x); });
      problem.options.splits = group / 2;
      if (scale > 0.0f) problem.options.softmax_scale = scale;
      INFO("group " << group);
      const auto expected = problem.reference(), got = problem.device();
      check_rows<kivi>(got, expected, fused_tolerance<kivi>(), floor);
    }
  };
  const auto same = [](float, auto, float x) { return x; };
  const auto zeros = [](float, auto, float) { return 0.0f; };
  const auto ones = [](float, auto, float) { return 1.0f; };
  check(pk::dtype::float16, same, same, zeros);  // all weights are equal
  check(pk::dtype::float16, zeros, same, same);
  check(pk::dtype::float16, same, zeros, same);
  check(pk::dtype::float16, same, ones, same);  // ranges of 0
  check(
      pk::dtype::float16, [](float t, auto, float) { return 0.01f * t; }, same, ones);
  check(
      pk::dtype::float16, [](float t, auto, float) { return 5.0f - 0.02f * t; }, same, ones);
  check(
      pk::dtype::float16, [](float t, auto, float) { return t == 333.0f ? 60.0f : 0.0f; }, same, ones);
  // Ranges that no half holds, and that change from tile to tile.
  check(
      pk::dtype::float16, same, [](float, auto c, float) { return c % 2 == 0 ? 65000.0f : -65000.0f; }, same);
  check(
      pk::dtype::float16, same, [](float t, auto, float x) { return std::ldexp(x, static_cast<int>(t) / 40 - 8); },
      same);
  check(
      pk::dtype::float16, same, [](float t, auto, float x) { return std::ldexp(x, 8 - static_cast<int>(t) / 40); },
      same);
  check(
      pk::dtype::float16, [](float, auto c, float) { return c % 2 == 0 ? 65000.0f : -65000.0f; }, same,
      [](float, auto, float x) { return x * 1e-3f; }, 1e-3f);
  check(
      pk::dtype::bfloat16, same, same, [](float, auto, float x) { return x * 1e30f; }, 1e-31f);
  check(pk::dtype::bfloat16, same, same, [](float, auto, float x) { return x * 1e-30f; });
  check(
      pk::dtype::bfloat16, [](float, auto, float x) { return x * 1e-3f; }, same,
      [](float, auto, float x) { return x * 1e30f; }, 1e-28f);
  check(
      pk::dtype::float16, same, [](float, auto, float x) { return x * 1e-3f; }, same, 0.0f, 1e-6);
  // One channel, and one group of channels, that stand out: the last.
  check(
      pk::dtype::bfloat16, same, same, [](float, auto c, float x) { return c == 127 ? 1e6f : x; }, 1e-6f);
  check(
      pk::dtype::float16, same, [](float, auto c, float x) { return std::ldexp(x, c >= 96 ? 12 : -8); }, same);
  // So many tiles that a warp has several.
  tokens = 64 * 40 + 17;
  check(
      pk::dtype::float16, [](float t, auto, float) { return 0.004f * t; }, same, ones);
  check(
      pk::dtype::float16, same, [](float t, auto, float x) { return std::ldexp(x, static_cast<int>(t) / 160 - 8); },
      same);
}

TEST_CASE("grouped pages: what rounding does to weights leaves out of the sum what is 0") {
  // In every group of channels the first is 2048 and the others, which count from the middle of the range, are 0: the
  // product of a weight and half the range needs no rounding of its own.
  for (const int group : {2, 4, 8})
    for (const float step : {0.005f, 0.01f, 0.018f, 0.03f}) {
      random_source random(8840);
      test_cache<kivi> cache(random, cache_shape{1, 1, 300, 1, pk::dtype::float16}, kivi{});
      cache.key_data.clear_offset();
      cache.value_data.clear_offset();
      change(cache.keys, [&](auto, auto, auto t, auto, float) { return t % 2 == 0 ? 0.0f : -step; });
      change(cache.values, [](auto, auto, auto, auto c, float) { return c % 32 == 0 ? 2048.0f : 0.0f; });
      auto problem = plain_problem(random, cache, group, 2);
      change(problem.queries, [](auto...) { return 1.0f; });
      const auto got = problem.device();
      float least = INFINITY, most = 0.0f;
      for (std::size_t i = 0; i < got.out.size(); ++i)
        if (i % 32 == 0)
          least = std::min(least, got.out[i]);
        else
          most = std::max(most, std::fabs(got.out[i]));
      INFO("group " << group << ", step " << step);
      CHECK(least > 2047.0f);
      CHECK(most < 0.02f);
    }
}

TEST_CASE("grouped pages: queries that are not finite give NaN in their rows alone") {
  for (const int group : {1, 4}) {
    random_source random(8850);
    test_cache<kivi_64> cache(random, cache_shape{1, 1, 100, 1, pk::dtype::float16}, kivi_64{});
    auto problem = plain_problem(random, cache, group, 3);
    // With such offsets an infinite query makes every score -inf.
    cache.key_data.offset.assign(64, -0.5f);
    cache.key_data.device_offset = device_array<float>(cache.key_data.offset);
    for (const int channel : {40, 63}) {
      change(problem.queries, [&](auto, auto i, auto, auto c, float x) {
        return i != 1 ? x : c != channel ? 0.5f : channel == 40 ? NAN : INFINITY;
      });
      const auto got = problem.device();
      for (std::size_t i = 0; i < got.out.size(); ++i)
        CHECK(std::isnan(got.out[i]) == (i / (64 * static_cast<std::size_t>(group)) == 1));
    }
  }
}
