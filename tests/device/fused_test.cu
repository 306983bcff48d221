// SPDX-License-Identifier: Apache-2.0
// The fused decode kernel (formats whose plans are known at compile time): shapes, masks, tables and hostile data.
#include "fused_problem.hpp"

using namespace packkv_test;

namespace {

using dim_96 = fused_format<96, 96, pk::plan<4, 2, 2>, pk::plan<4, 4, 2, 2, 1, 1>, pk::hadamard, pk::hadamard, 3>;
using dim_192 =
    fused_format<192, 128, pk::plan<4, 2, 2, 1, 1, 1>, pk::plan<1, 1, 1, 1, 1, 1, 1, 1>, pk::basis, pk::basis>;
using dim_256 =
    fused_format<256, 256, pk::plan<8, 4, 4, 2, 2, 2, 2, 1>, pk::plan<4, 4, 4, 3, 3, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 0>,
                 pk::permutation, pk::hadamard, 4>;
using dim_512 = fused_format<
    512, 512, pk::plan<8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 4, 4, 3, 2>,
    pk::plan<2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2>>;

/// Stores a cache's only sequence token by token, so that the slots behind its length keep what they held: 0xff, which
/// are NaN row scales.
template <class Format>
void fill_token_by_token(test_cache<Format>& cache) {
  const int page_tokens = cache.shape.tiles_per_page * pk::tile_tokens;
  for (int t = 0; t < cache.lengths[0]; ++t) {
    const std::int32_t page =
        cache.host_table().pages == nullptr ? t / page_tokens : cache.table[static_cast<std::size_t>(t / page_tokens)];
    const std::int64_t slot = std::int64_t{page} * page_tokens + t % page_tokens;
    pk::input_view<3> token[2];
    for (int i = 0; i < 2; ++i) {
      const pk::input_view<4> all = i == 0 ? cache.keys.host() : cache.values.host();
      token[i].data = static_cast<const char*>(all.data) + t * all.stride[2];
      token[i].type = all.type;
      token[i].extent[0] = 1;
      token[i].extent[1] = all.extent[1];
      token[i].extent[2] = all.extent[3];
      token[i].stride[0] = all.stride[2];
      token[i].stride[1] = all.stride[1];
      token[i].stride[2] = all.stride[3];
    }
    const pk::status s = pk::reference::store_tokens(token[0], token[1], &slot, cache.host_parameters(),
                                                     cache.host_pages(), cache.report);
    if (!s) throw std::runtime_error(s.message);
  }
  cache.device_pages.assign(cache.pages);
}

template <class Format>
void check_poisoned_slots(random_source& random, int length, int group) {
  test_cache<Format> cache(random, cache_shape{1, 2, 192, 1, pk::dtype::float16}, Format{});
  cache.lengths = {length};
  cache.device_lengths.assign(cache.lengths);
  fill_token_by_token(cache);
  decode_problem<Format> problem(random, cache, group);
  problem.query_start = {0, 1};
  problem.device_query_start.assign(problem.query_start);
  INFO("length " << length << ", head dim " << Format::key_head_dim << ", group " << group);
  const auto expected = problem.reference(), got = problem.device();
  check_rows<Format>(got, expected);
}

static_assert(pk::is_fused<two_bit> && pk::is_fused<kivi>);
static_assert(!pk::is_fused<pk::runtime_format<128>> &&
              !pk::is_fused<pk::cache_format<pk::float16_codec<128>, pk::float16_codec<128>>>);

constexpr std::uint32_t page_flags = pk::report_page_missing | pk::report_page_out_of_range;

template <class Format>
void check_hostile_call(random_source& random) {
  test_cache<Format> cache(random, random_shape(random, most_tokens), Format{});
  cache.lengths.assign(cache.lengths.size(), cache.shape.max_tokens);  // a length that is clamped finds tokens
  cache.fill();
  decode_problem<Format> problem(random, cache, random.between(1, 4));
  constexpr std::int32_t bad[] = {-1, -2147483647 - 1, 2147483647, 1000000};
  for (auto& id : cache.table)
    if (random.one_in(3)) id = bad[random.between(0, 3)];
  cache.device_table.assign(cache.table);
  for (auto& length : cache.lengths)
    if (random.one_in(4)) length = bad[random.between(0, 3)];
  cache.device_lengths.assign(cache.lengths);
  if (random.one_in(3)) problem.query_start.back() = bad[random.between(0, 3)];
  if (random.one_in(3)) problem.query_start.front() = random.one_in(2) ? -1 : -2147483647 - 1;
  problem.device_query_start.assign(problem.query_start);
  const auto expected = problem.reference(), got = problem.device();
  check_rows<Format>(got, expected);
  if (problem.tokens == 0) return;  // nothing is launched, and nothing reported
  // The kernel looks up the pages of tiles that a query may see, the reference those of tokens that one sees.
  const std::uint32_t flags = cache.gpu_report().flags;
  CHECK((flags & ~page_flags) == (cache.report.flags & ~page_flags));
  CHECK((cache.report.flags & page_flags & ~flags) == 0);
}

}  // namespace

TEST_CASE("fused decode agrees with the reference for random shapes, masks and overlays") {
  for (int round = 0; round < 2 * repeats; ++round) {
    const std::uint64_t seed = 8100 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    constexpr int groups[] = {1, 2, 3, 4, 5, 6, 7, 8, 16};
    const auto group = [&] { return groups[random.between(0, 8)]; };
    check_random_call<two_bit>(random, 4);
    check_random_call<two_bit>(random, group());
    check_random_call<mixed>(random, group());
    check_random_call<dim_64>(random, group());
    check_random_call<dim_96>(random, group());
    check_random_call<dim_192>(random, group());
    check_random_call<dim_256>(random, group());
    check_random_call<dim_512>(random, group());
    check_random_call<dim_512>(random, 16);  // blocks of two warps
  }
}

TEST_CASE("fused decode: what lies in unused slots never reaches a result, at every length mod 64") {
  random_source random(8201);
  constexpr int groups[] = {1, 3, 4, 6, 8, 12};
  const int step = repeats > 1 ? 1 : 13;
  int next = 0;
  for (int length = 65; length < 129; length += step) {
    check_poisoned_slots<dim_64>(random, length, groups[next++ % 6]);
    check_poisoned_slots<mixed>(random, length, groups[next % 6]);
  }
}

TEST_CASE("fused decode: hostile page ids, lengths and query ranges are left out and reported, as in the reference") {
  for (int round = 0; round < 5 * repeats; ++round) {
    const std::uint64_t seed = 8300 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    check_hostile_call<two_bit>(random);
    check_hostile_call<dim_64>(random);
  }
}

TEST_CASE("fused decode: every missing page is left out and reported, whichever block visits it") {
  random_source random(8351);
  int tables = 0;
  for (const int splits : {0, 1, 2, 3, 5}) {
    test_cache<dim_64> cache(random, cache_shape{1, 1, 640, 2, pk::dtype::float16}, dim_64{});
    auto problem = plain_problem(random, cache, 2, 1);
    problem.options.splits = splits;
    const bool table = cache.host_table().pages != nullptr;
    if (table) cache.table = {-1, cache.table[1], 1 << 20, cache.table[3], -7};
    cache.device_table.assign(cache.table);
    const auto expected = problem.reference(), got = problem.device();
    check_rows<dim_64>(got, expected);
    CHECK(cache.gpu_report().flags == cache.report.flags);
    CHECK(cache.report.flags == (table ? page_flags : 0u));
    tables += table ? 1 : 0;
  }
  CHECK(tables > 0);
}

TEST_CASE("fused decode repeats bit for bit, and hardly depends on the number of splits") {
  random_source random(8401);
  for (const int group : {2, 5, 16}) {
    test_cache<two_bit> cache(random, cache_shape{2, 2, most_tokens + 170, 1, pk::dtype::float16}, two_bit{});
    cache.lengths = {most_tokens + 170, 70};
    cache.device_lengths.assign(cache.lengths);
    cache.fill();
    decode_problem<two_bit> problem(random, cache, group);
    decode_problem<two_bit>::result whole;
    for (const int splits : {1, 2, 5, 17, 0}) {
      if (repeats == 1 && splits == 2) continue;  // the executor is slow
      problem.options.splits = splits;
      INFO("group " << group << ", splits " << splits);
      const auto first = problem.device(), second = problem.device();
      CHECK(std::memcmp(first.out.data(), second.out.data(), first.out.size() * 4) == 0);
      CHECK(std::memcmp(first.lse.data(), second.lse.data(), first.lse.size() * 4) == 0);
      if (whole.out.empty()) whole = first;
      check_rows<two_bit>(first, whole, 5e-4);
    }
    check_rows<two_bit>(whole, problem.reference());
  }
}

TEST_CASE("fused decode: 16-bit tokens beside so many tiles that the warps which attend to them have some, too") {
  random_source random(8451);
  for (const int group : {3, 16}) {
    test_cache<dim_64> cache(random, cache_shape{1, 1, 64 * 70 - 5, 2, pk::dtype::float16}, dim_64{});
    auto problem = plain_problem(random, cache, group, 1);
    problem.set_ring(random, 70);
    problem.options.splits = 1;  // one block has the tiles and the ring
    INFO("group " << group);
    const auto expected = problem.reference(), got = problem.device();
    check_rows<dim_64>(got, expected);
  }
}

TEST_CASE("fused decode: outputs take the queries' type and any strides, and the log-sum-exp may be left out") {
  random_source random(8501);
  for (const auto type : {pk::dtype::float16, pk::dtype::bfloat16}) {
    test_cache<mixed> cache(random, cache_shape{2, 2, 100, 1, type}, mixed{});
    cache.fill();
    decode_problem<mixed> problem(random, cache, 2);
    problem.options.splits = 2;
    const auto expected = problem.reference();
    device_array<std::uint16_t> out(static_cast<std::size_t>(problem.tokens * 4 * 128 * 2));
    out.poison(0x11);
    auto view = pk::make_output(out.data(), type, {problem.tokens, 4, 128});
    view.stride[2] = 4;  // every second element
    view.stride[1] = 512;
    view.stride[0] = 2048;
    device_array<std::uint8_t> workspace = problem.decode_workspace();
    pk::exec e{nullptr, workspace.data(), workspace.size(), nullptr};  // no report, either
    REQUIRE(pk::initialize_workspace(e));
    REQUIRE(pk::decode_attention(problem.query_view(true), problem.device_query_start.data(), problem.view(true),
                                 cache.gpu_parameters(), view, {}, problem.with_arrays(true), e));
    const auto bits = out.host();
    std::vector<float> got;
    std::size_t holes = 0;
    for (std::size_t i = 0; i < bits.size(); i += 2) {
      got.push_back(type == pk::dtype::float16 ? pk::half_to_float(bits[i]) : pk::bfloat16_to_float(bits[i]));
      holes += bits[i + 1] == 0x1111 ? 1 : 0;
    }
    CHECK(holes == bits.size() / 2);
    const auto owned = static_cast<std::ptrdiff_t>(problem.query_start.back()) * 4 * 128;
    CHECK(worst_row_error({got.begin(), got.begin() + owned}, {expected.out.begin(), expected.out.begin() + owned},
                          128) < (type == pk::dtype::float16 ? fused_tolerance<mixed>() : 8e-3));
  }
}

namespace {

/// Hides the keys before a position, another one for every third query head.
struct hide_before {
  static constexpr bool active = true;
  int first[3];
  __device__ float operator()(float score, int head, std::int64_t, std::int64_t key) const {
    return key < first[head % 3] ? -pk::detail::infinity() : score;
  }
};

}  // namespace

// Whole tiles, the first of each warp among them, have no key that a row sees, while other rows of the same lane do.
TEST_CASE("fused decode: a variant that hides keys is as padding on the left, for each row") {
  for (const int group : {4, 8, 16})
    for (const int splits : {1, 3}) {
      INFO("group " << group << ", splits " << splits);
      random_source random(77);
      constexpr int tokens = 1300;
      constexpr std::ptrdiff_t dim = two_bit::value_head_dim;
      test_cache<two_bit> cache(random, cache_shape{1, 1, tokens, 1, pk::dtype::float16}, two_bit{});
      auto problem = plain_problem(random, cache, group, 1);
      problem.options.splits = splits;
      const hide_before variant{{0, 1100, tokens}};  // the last see nothing
      const auto got =
          problem.device([&](const auto& q, const std::int32_t* starts, const auto& view, const auto& parameters,
                             const auto& out, const auto& lse, const auto& options, const pk::exec& e) {
            return pk::decode_attention(q, starts, view, parameters, out, lse, options, variant, e);
          });
      problem.with_kv_begin = true;
      for (int i = 0; i < 3; ++i) {
        problem.kv_begin = {variant.first[i]};
        const auto expected = problem.reference();
        auto rows = expected;  // of other heads
        for (int h = i; h < group; h += 3) {
          std::copy_n(got.out.begin() + h * dim, dim, rows.out.begin() + h * dim);
          rows.lse[static_cast<std::size_t>(h)] = got.lse[static_cast<std::size_t>(h)];
        }
        check_rows<two_bit>(rows, expected);
      }
    }
}

TEST_CASE("fused decode: sequences without tokens, and queries that see nothing, give 0 and -inf") {
  random_source random(8601);
  for (const bool overlays : {false, true}) {
    test_cache<dim_64> cache(random, cache_shape{4, 2, 130, 1, pk::dtype::bfloat16}, dim_64{});
    auto problem = plain_problem(random, cache, 3, 4);
    cache.lengths = {0, 130, 2, 100};  // no token; all hidden by kv_begin; two queries stand before the first token
    cache.device_lengths.assign(cache.lengths);
    problem.with_kv_begin = true;
    problem.kv_begin = {0, 130, 0, 98};  // of the last, two queries stand before kv_begin
    problem.device_kv_begin.assign(problem.kv_begin);
    if (overlays) {
      problem.sinks = 3;
      problem.sink_keys = problem.overlay(random, 4, 3, 64);
      problem.sink_values = problem.overlay(random, 4, 3, 64);
    }
    const auto expected = problem.reference(), got = problem.device();
    check_rows<dim_64>(got, expected);
    for (std::size_t row = 0; row < got.lse.size(); ++row) {
      const std::size_t token = row / 6, b = token / 4, i = token % 4;
      const bool sees = (b == 2 && i >= 2) || (b == 3 && i >= 2);
      CHECK(std::isinf(got.lse[row]) == !sees);
      const auto first = got.out.begin() + static_cast<std::ptrdiff_t>(row * 64);
      CHECK(std::all_of(first, first + 64, [](float x) { return x == 0.0f; }) == !sees);
    }
  }
}

TEST_CASE("fused decode: a batch may have more sequences than a launch takes") {
  random_source random(8701);
  constexpr int batch = pk::block::max_split_sequences + 44;
  for (const int splits : {0, 1}) {
    test_cache<dim_64> cache(random, cache_shape{batch, 1, 70, 1, pk::dtype::float16}, dim_64{});
    for (auto& length : cache.lengths) length = random.one_in(3) ? random.between(1, 70) : 0;
    cache.lengths.back() = 70;
    cache.device_lengths.assign(cache.lengths);
    cache.fill();
    decode_problem<dim_64> problem(random, cache, 1, 1);
    problem.options.splits = splits;
    const auto expected = problem.reference(), got = problem.device();
    check_rows<dim_64>(got, expected);
    CHECK(cache.gpu_report().flags == cache.report.flags);
  }
}

TEST_CASE("fused decode: an upper bound of lengths far above them takes more launches, or is refused") {
  random_source random(8702);
  test_cache<dim_64> cache(random, cache_shape{40, 1, 130, 1, pk::dtype::float16}, dim_64{});
  for (auto& length : cache.lengths) length = random.between(0, 130);
  cache.device_lengths.assign(cache.lengths);
  cache.fill();
  auto problem = plain_problem(random, cache, 2, 1);
  const auto expected = problem.reference(), near_bound = problem.device();
  check_rows<dim_64>(near_bound, expected);

  device_array<std::uint8_t> workspace = problem.decode_workspace();
  workspace.poison(0);
  device_array<float> out(expected.out.size()), lse(expected.lse.size());
  const auto call = [&](std::int32_t max_seq_len, std::int32_t max_query_len) {
    pk::cache_view view = problem.view(true);
    view.max_seq_len = max_seq_len;
    pk::attention_options options = problem.with_arrays(true);
    options.max_query_len = max_query_len;
    pk::exec e = cache.exec();
    e.workspace = workspace.data();
    e.workspace_bytes = workspace.size();
    return pk::decode_attention(problem.query_view(true), problem.device_query_start.data(), view,
                                cache.gpu_parameters(), problem.out_view(out.data()), problem.lse_view(lse.data()),
                                options, e);
  };
  const std::int32_t most = 0x7fffffff - 128;
  REQUIRE(pk::block::max_launch_sequences(1, pk::ceil_div(most, pk::tile_tokens), 0) < 40);
  REQUIRE(call(most, 1));
  check_rows<dim_64>({out.host(), lse.host()}, expected);
  CHECK(call(most, 16 * 32).code == pk::status_code::overflow);
}

TEST_CASE("fused decode leaves rows that no sequence owns as they are") {
  random_source random(8801);
  test_cache<dim_64> cache(random, cache_shape{3, 1, 90, 1, pk::dtype::float16}, dim_64{});
  auto problem = plain_problem(random, cache, 4, 3);
  problem.query_start = {2, 5, 5, 7};  // of nine
  problem.device_query_start.assign(problem.query_start);
  const auto expected = problem.reference(), got = problem.device();
  check_rows<dim_64>(got, expected);
  for (std::size_t row = 0; row < got.lse.size(); ++row) {
    const bool owned = row / 4 >= 2 && row / 4 < 7;
    CHECK((got.lse[row] == 7.0f) == !owned);
    CHECK((got.out[row * 64] == 7.0f && got.out[row * 64 + 63] == 7.0f) == !owned);
  }
}

TEST_CASE("fused decode: the last row of a pass alone sees a tile, and alone does not see a token") {
  random_source random(8802);
  for (const int queries : {4, 8, 16}) {  // as many as a pass has rows
    const int tokens = 192 + 1;           // the last of them in a tile of its own
    test_cache<dim_64> cache(random, cache_shape{1, 1, tokens, 1, pk::dtype::float16}, dim_64{});
    auto problem = plain_problem(random, cache, 1, queries);
    problem.options.window = 64;  // the last sees the tokens from 129 on, the one before it from 128 on
    INFO(queries << " query tokens");
    check_rows<dim_64>(problem.device(), problem.reference());
  }
}

TEST_CASE("fused decode with a workspace a byte too small is refused and writes nothing") {
  random_source random(8901);
  test_cache<dim_64> cache(random, cache_shape{1, 1, 300, 1, pk::dtype::float16}, dim_64{});
  for (const int group : {2, 7, 12})
    for (const int splits : {0, 1, 3}) {
      auto problem = plain_problem(random, cache, group, 1);
      problem.options.splits = splits;
      device_array<float> out(static_cast<std::size_t>(problem.heads() * 64));
      out.poison(0x22);
      device_array<std::uint8_t> workspace = problem.decode_workspace();
      workspace.poison(0);
      const auto before = out.host();
      // What the library says that all calls within the maxima need is what a call of the most rows of a pass needs.
      const std::size_t bytes =
          group == 7 ? static_cast<std::size_t>(
                           pk::detail::fused_blocks(pk::kernel::fused_shape<dim_64, 8>(228, 1), 1, splits) *
                               pk::detail::fused_part_bytes<dim_64, 8> +
                           pk::detail::workspace_counter_bytes)
                     : workspace.size();
      for (const std::size_t size : {bytes - 1, std::size_t{0}}) {
        const pk::exec e{nullptr, workspace.data(), size, nullptr};
        const pk::status s = pk::decode_attention(problem.query_view(true), problem.device_query_start.data(),
                                                  problem.view(true), cache.gpu_parameters(),
                                                  problem.out_view(out.data()), {}, problem.with_arrays(true), e);
        CHECK(s.code == pk::status_code::workspace_too_small);
      }
      const auto after = out.host();
      CHECK(std::memcmp(before.data(), after.data(), before.size() * 4) == 0);
      const auto used = workspace.host();
      CHECK(std::all_of(used.begin(), used.end(), [](std::uint8_t x) { return x == 0; }));
    }
}
