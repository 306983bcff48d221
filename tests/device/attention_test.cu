// SPDX-License-Identifier: Apache-2.0
#include "../support/catch.hpp"
#include "decode_problem.hpp"

using namespace packkv_test;

namespace {

// fp32 sums of at most 512 products and 700 tokens against double: rounding grows to about 1e-5.
constexpr double tolerance = 4e-5;

}  // namespace

TEST_CASE("decode_attention agrees with the reference for random formats, shapes, masks and overlays") {
  for (int round = 0; round < 3 * repeats; ++round) {
    const std::uint64_t seed = 5000 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    for_each_format(random, [&](const auto& format) {
      INFO("head dims " << format.key_head_dim << " " << format.value_head_dim);
      test_cache cache(random, random_shape(random, most_tokens), format);
      cache.fill();
      const int groups[] = {1, 2, 3, 4, 5, 6, 7, 8, 16};
      decode_problem problem(random, cache, groups[random.between(0, 8)]);
      const auto expected = problem.reference();
      const auto got = problem.device();
      CHECK(worst_row_error(got.out, expected.out, format.value_head_dim) < tolerance);
      CHECK(worst_lse_error(got.lse, expected.lse) < tolerance);
      CHECK(cache.gpu_report().flags == cache.report.flags);
    });
  }
}

TEST_CASE("decode_attention repeats bit for bit, and hardly depends on the number of splits") {
  random_source random(9);
  test_cache cache(
      random, cache_shape{2, 2, most_tokens, 1, pk::dtype::float16},
      pk::runtime_format<128>{random_codec(random, pk::side::key, 128), random_codec(random, pk::side::value, 128)});
  cache.fill();
  decode_problem problem(random, cache, 4);
  std::vector<float> whole;
  for (const int splits : {1, 2, 7}) {
    problem.options.splits = splits;
    const auto first = problem.device(), second = problem.device();
    CHECK(std::memcmp(first.out.data(), second.out.data(), first.out.size() * 4) == 0);
    CHECK(std::memcmp(first.lse.data(), second.lse.data(), first.lse.size() * 4) == 0);
    if (whole.empty()) whole = first.out;
    CHECK(worst_row_error(first.out, whole, 128) < tolerance);
  }
}

TEST_CASE("what lies in unused slots never reaches a result, at every length mod 64") {
  random_source random(11);
  for (const auto kind : {pk::codec_kind::plan, pk::codec_kind::float16, pk::codec_kind::fp8}) {
    pk::runtime_format<64> format;
    if (kind == pk::codec_kind::plan) {
      format.key_spec =
          pk::make_plan_codec(pk::side::key, 64, pk::transform_kind::identity, pk::plan<4, 3, 2, 1>::widths(), 1);
      format.value_spec =
          pk::make_plan_codec(pk::side::value, 64, pk::transform_kind::hadamard, pk::plan<3, 2, 2, 1>::widths());
    } else {
      format.key_spec = format.value_spec = pk::make_element_codec(kind, 64);
    }
    for (int length = 65; length<129; length += repeats> 1 ? 1 : 21) {
      INFO("length " << length);
      test_cache cache(random, cache_shape{1, 1, 128, 1, pk::dtype::float16}, format);
      cache.lengths = {length};
      cache.device_lengths.assign(cache.lengths);
      // Store token by token into poisoned pages, so that the slots behind the length keep 0xff: NaN scales and
      // elements.
      for (int t = 0; t < length; ++t) {
        std::int32_t page = cache.table[static_cast<std::size_t>(t / 64)];
        const std::int64_t slot = page * 64 + t % 64;
        auto k = cache.keys.host(), v = cache.values.host();
        pk::input_view<3> key, value;
        for (auto [to, from] : {std::pair(&key, &k), std::pair(&value, &v)}) {
          to->data = static_cast<const char*>(from->data) + t * from->stride[2];
          to->type = from->type;
          to->extent[0] = to->extent[1] = 1;
          to->extent[2] = 64;
          to->stride[0] = to->stride[1] = from->stride[2];
          to->stride[2] = 2;
        }
        REQUIRE(
            pk::reference::store_tokens(key, value, &slot, cache.host_parameters(), cache.host_pages(), cache.report));
      }
      cache.device_pages.assign(cache.pages);
      decode_problem problem(random, cache, 3);
      problem.query_start = {0, 1};
      problem.device_query_start.assign(problem.query_start);
      const auto expected = problem.reference();
      const auto got = problem.device();
      CHECK(worst_row_error(got.out, expected.out, 64) < tolerance);
      CHECK(worst_lse_error(got.lse, expected.lse) < tolerance);
    }
  }
}

TEST_CASE("hostile page ids, lengths and query ranges are left out and reported, as in the reference") {
  for (int round = 0; round < 2 * repeats; ++round) {
    const std::uint64_t seed = 7000 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    for_each_format(random, [&](const auto& format) {
      test_cache cache(random, random_shape(random, most_tokens), format);
      cache.lengths.assign(cache.lengths.size(), cache.shape.max_tokens);  // a length that is clamped finds tokens
      cache.fill();
      decode_problem problem(random, cache, random.between(1, 4));
      constexpr std::int32_t bad[] = {-1, -2147483647 - 1, 2147483647, 1000000};
      for (auto& id : cache.table)
        if (random.one_in(3)) id = bad[random.between(0, 3)];
      cache.device_table.assign(cache.table);
      for (auto& length : cache.lengths)
        if (random.one_in(4)) length = bad[random.between(0, 3)];
      cache.device_lengths.assign(cache.lengths);
      if (random.one_in(3)) problem.query_start.back() = bad[random.between(0, 3)];
      problem.device_query_start.assign(problem.query_start);
      const auto expected = problem.reference();
      const auto got = problem.device();
      CHECK(worst_row_error(got.out, expected.out, format.value_head_dim) < tolerance);
      CHECK(worst_lse_error(got.lse, expected.lse) < tolerance);
      // The kernel skips tiles that no query sees, the reference skips tokens: flags of the kernel may only be fewer.
      CHECK((cache.gpu_report().flags &
             ~(cache.report.flags | pk::report_page_missing | pk::report_page_out_of_range)) == 0);
    });
  }
}

TEST_CASE("outputs take the queries' type and any strides") {
  random_source random(21);
  pk::runtime_format<128> format;
  format.key_spec =
      pk::make_plan_codec(pk::side::key, 128, pk::transform_kind::identity, pk::plan<8, 4, 2, 1>::widths());
  format.value_spec = pk::make_plan_codec(pk::side::value, 128, pk::transform_kind::hadamard,
                                          pk::plan<4, 4, 4, 4, 4, 4, 4, 4>::widths());
  for (const auto type : {pk::dtype::float16, pk::dtype::bfloat16}) {
    test_cache cache(random, cache_shape{2, 2, 100, 1, type}, format);
    cache.fill();
    decode_problem problem(random, cache, 2);
    problem.options.splits = 1;
    const auto expected = problem.reference();
    device_array<std::uint16_t> out(static_cast<std::size_t>(problem.tokens * 4 * 128 * 2));
    out.poison(0x11);
    auto view = pk::make_output(out.data(), type, {problem.tokens, 4, 128});
    view.stride[2] = 4;  // every second element
    view.stride[1] = 512;
    view.stride[0] = 2048;
    REQUIRE(pk::decode_attention(problem.query_view(true), problem.device_query_start.data(), problem.view(true),
                                 cache.gpu_parameters(), view, {}, problem.with_arrays(true), cache.exec()));
    const auto bits = out.host();
    std::vector<float> got;
    int holes = 0;
    for (std::size_t i = 0; i < bits.size(); i += 2) {
      got.push_back(type == pk::dtype::float16 ? pk::half_to_float(bits[i]) : pk::bfloat16_to_float(bits[i]));
      holes += bits[i + 1] == 0x1111 ? 1 : 0;
    }
    CHECK(holes == static_cast<int>(bits.size() / 2));
    const std::size_t owned = static_cast<std::size_t>(problem.query_start.back()) * 4 * 128;
    CHECK(worst_row_error({got.begin(), got.begin() + static_cast<std::ptrdiff_t>(owned)},
                          {expected.out.begin(), expected.out.begin() + static_cast<std::ptrdiff_t>(owned)},
                          128) < (type == pk::dtype::float16 ? 1e-3 : 8e-3));
  }
}

TEST_CASE("key_gemv and value_gemv agree with the reference") {
  for (int round = 0; round < repeats; ++round) {
    const std::uint64_t seed = 8000 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    for_each_format(random, [&](const auto& format) {
      using format_type = std::decay_t<decltype(format)>;
      test_cache cache(random, random_shape(random, most_tokens), format);
      cache.fill();
      if (random.one_in(3)) cache.table[0] = -1;
      cache.device_table.assign(cache.table);
      const std::int64_t heads = random.between(1, 9) * cache.shape.kv_heads, batch = cache.shape.batch,
                         tokens = cache.shape.max_tokens;
      const auto three = [&](tensor_data& d, bool device) {
        const auto v = device ? d.device() : d.host();
        pk::input_view<3> q;
        q.data = v.data;
        q.type = v.type;
        const int from[] = {0, 1, 3};
        for (int i = 0; i < 3; ++i) {
          q.extent[i] = v.extent[from[i]];
          q.stride[i] = v.stride[from[i]];
        }
        return q;
      };
      tensor_data q(random, cache.shape.type, batch, heads, 1, format.key_head_dim);
      std::vector<float> expected(static_cast<std::size_t>(batch * heads * tokens), 7.0f);
      device_array<float> scores(expected);
      REQUIRE(pk::reference::key_gemv(three(q, false), cache.host_cache(), cache.host_parameters(), 0.25f,
                                      pk::make_output(expected.data(), pk::dtype::float32, {batch, heads, tokens}),
                                      cache.report));
      REQUIRE(cache.after_failures([&] {
        return pk::key_gemv(three(q, true), cache.gpu_cache(), cache.gpu_parameters(), 0.25f,
                            pk::make_output(scores.data(), pk::dtype::float32, {batch, heads, tokens}), cache.exec());
      }));
      auto got = scores.host();
      int infinities = 0;
      for (std::size_t i = 0; i < got.size(); ++i)
        if (std::isinf(expected[i])) {
          infinities += got[i] != expected[i];
          got[i] = expected[i] = 0.0f;
        }
      CHECK(infinities == 0);
      CHECK(worst_row_error(got, expected, static_cast<int>(tokens)) < tolerance);

      tensor_data w(random, cache.shape.type, batch, heads, 1, tokens);
      std::vector<float> out(static_cast<std::size_t>(batch * heads * format.value_head_dim), 7.0f);
      device_array<float> device_out(out);
      const int splits = random.between(0, 4);
      device_array<std::uint8_t> workspace = exact_workspace<format_type::value_head_dim>(
          pk::policy::make_decode_grid(batch, cache.shape.kv_heads, heads / cache.shape.kv_heads, tokens, splits),
          pk::value_gemv_workspace_bytes<format_type>({batch, cache.shape.kv_heads, heads, 1, tokens, splits}));
      pk::exec e = cache.exec();
      e.workspace = workspace.data();
      e.workspace_bytes = workspace.size();
      REQUIRE(after_failures([&] { return pk::initialize_workspace(e); }));
      REQUIRE(pk::reference::value_gemv(
          three(w, false), cache.host_cache(), cache.host_parameters(),
          pk::make_output(out.data(), pk::dtype::float32, {batch, heads, format.value_head_dim}), cache.report));
      REQUIRE(cache.after_failures([&] {
        return pk::value_gemv(
            three(w, true), cache.gpu_cache(), cache.gpu_parameters(),
            pk::make_output(device_out.data(), pk::dtype::float32, {batch, heads, format.value_head_dim}), e, splits);
      }));
      CHECK(worst_row_error(device_out.host(), out, format.value_head_dim) < tolerance);
      CHECK(cache.gpu_report().flags == cache.report.flags);
    });
  }
}

TEST_CASE("merge_states agrees with the reference in both bases, empty states included") {
  random_source random(31);
  for (const auto base : {pk::lse_base::e, pk::lse_base::two}) {
    const std::int64_t n = 5, tokens = 3, heads = 4, dim = 96;
    tensor_data outs(random, pk::dtype::float16, n, tokens, heads, dim);
    std::vector<float> lses(static_cast<std::size_t>(n * tokens * heads));
    for (auto& x : lses) x = random.one_in(4) ? -std::numeric_limits<float>::infinity() : 20.0f * random.normal();
    for (std::int64_t i = 0; i < n; ++i)
      lses[static_cast<std::size_t>(i * tokens * heads)] = -std::numeric_limits<float>::infinity();
    const device_array<float> device_lses(lses);
    std::vector<float> out(static_cast<std::size_t>(tokens * heads * dim)),
        lse(static_cast<std::size_t>(tokens * heads));
    device_array<float> device_out(out.size()), device_lse(lse.size());
    device_out.poison();
    device_lse.poison();
    const auto lse_in = [&](const float* p) { return pk::make_input(p, pk::dtype::float32, {n, tokens, heads}); };
    const auto out_to = [&](float* p) { return pk::make_output(p, pk::dtype::float32, {tokens, heads, dim}); };
    const auto lse_to = [&](float* p) { return pk::make_output(p, pk::dtype::float32, {tokens, heads}); };
    REQUIRE(
        pk::reference::merge_states(outs.host(), lse_in(lses.data()), out_to(out.data()), lse_to(lse.data()), base));
    REQUIRE(after_failures([&] {
      return pk::merge_states(outs.device(), lse_in(device_lses.data()), out_to(device_out.data()),
                              lse_to(device_lse.data()), base, pk::exec{});
    }));
    CHECK(worst_row_error(device_out.host(), out, dim) < tolerance);
    CHECK(worst_lse_error(device_lse.host(), lse) < tolerance);
    CHECK(std::isinf(lse[0]));
  }
}

TEST_CASE("a call with too small a workspace is refused and writes nothing") {
  random_source random(41);
  test_cache cache(random, cache_shape{1, 1, 300, 1, pk::dtype::float16}, pk::runtime_format<64>{});
  cache.fill();
  decode_problem problem(random, cache, 2);
  problem.options.splits = 3;
  device_array<float> out(static_cast<std::size_t>(problem.tokens * problem.heads() * 64));
  out.poison(0x22);
  const auto before = out.host();
  device_array<std::uint8_t> workspace(static_cast<std::size_t>(problem.workspace_bytes()));
  pk::exec e = cache.exec();
  e.workspace = workspace.data();
  e.workspace_bytes = 1024;
  const pk::status s =
      pk::decode_attention(problem.query_view(true), problem.device_query_start.data(), problem.view(true),
                           cache.gpu_parameters(), problem.out_view(out.data()), {}, problem.with_arrays(true), e);
  CHECK(s.code == pk::status_code::workspace_too_small);
  const auto after = out.host();
  CHECK(std::memcmp(before.data(), after.data(), before.size() * 4) == 0);
}
