// SPDX-License-Identifier: Apache-2.0
// The host's plan of a decode call is what the kernel's blocks do: a score variant writes down which block it runs in.
#include <packkv/device/decode_plan.cuh>

#include "fused_problem.hpp"

using namespace packkv_test;

namespace {

/// block_of[query position][query head][token]: sequences have lengths of their own, so positions tell them apart.
struct note_block {
  static constexpr bool active = true;
  std::int32_t* block_of;
  std::int64_t heads, tokens;
  __device__ float operator()(float score, int head, std::int64_t query, std::int64_t key) const {
    atomicExch(block_of + (query * heads + head) * tokens + key, static_cast<std::int32_t>(blockIdx.x));
    return score;
  }
};

template <class Format>
void check_plan(random_source& random, int batch, int group, int splits, bool overlays) {
  constexpr int kv_heads = 2, most = 420, page_tokens = 128;
  test_cache<Format> cache(random, cache_shape{batch, kv_heads, most, 2, pk::dtype::float16}, Format{});
  auto problem = plain_problem(random, cache, group, 1);
  for (int b = 0; b < batch; ++b)  // all of them different
    cache.lengths[static_cast<std::size_t>(b)] = b == 0 ? most : random.between(0, most / batch - 1) + b * most / batch;
  cache.device_lengths.assign(cache.lengths);
  cache.fill();
  problem.options.splits = splits;
  problem.options.window = random.one_in(2) ? 200 : 0;
  constexpr int ring_window = 70;
  if (overlays) {
    problem.sinks = 20;
    problem.sink_keys = problem.overlay(random, batch, 20, Format::key_head_dim);
    problem.sink_values = problem.overlay(random, batch, 20, Format::value_head_dim);
    problem.set_ring(random, ring_window);
  }

  pk::decode_plan plan;
  REQUIRE(after_failures([&] {
    return pk::plan_decode<Format>(problem.query_view(false), problem.query_start.data(), problem.view(false),
                                   problem.options, plan);
  }));
  INFO("batch " << batch << ", group " << group << ", splits " << splits << ", overlays " << overlays << "\n"
                << pk::describe(plan));
  CHECK(plan.launches == 1);
  CHECK(plan.report == 0);
  CHECK(plan.query_rows == (group <= 4 ? 4 : group <= 8 ? 8 : 16));

  const std::int64_t heads = problem.heads(), tokens = pk::ceil_div(most, page_tokens) * page_tokens;
  device_array<std::int32_t> notes(static_cast<std::size_t>((most + 1) * heads * tokens));
  notes.poison(0xff);
  const note_block variant{notes.data(), heads, tokens};
  const auto got =
      problem.device([&](const auto& q, const std::int32_t* starts, const auto& view, const auto& parameters,
                         const auto& out, const auto& lse, const auto& options, const pk::exec& e) {
        return pk::decode_attention(q, starts, view, parameters, out, lse, options, variant, e);
      });
  check_rows<Format>(got, problem.reference());

  const std::vector<std::int32_t> block_of = notes.host();
  std::vector<int> times(block_of.size());
  int wrong = 0, ends = 0;
  for (const pk::decode_share& s : plan.shares) {
    const std::int32_t length = cache.lengths[static_cast<std::size_t>(s.sequence)];
    const std::int64_t query = length - 1;
    ends += s.raw ? 1 : 0;
    for (int r = s.first_row; r < std::min(group, s.first_row + plan.query_rows); ++r)
      for (std::int64_t t = s.first_tile * 64; t < std::min<std::int64_t>(s.end_tile * 64, length); ++t) {
        const auto at = static_cast<std::size_t>((query * heads + s.kv_head * group + r) * tokens + t);
        ++times[at];
        const bool raw = overlays && (t < 20 || t > query - ring_window);  // the unit's end may have seen it last
        wrong += !raw && block_of[at] != s.block ? 1 : 0;
      }
  }
  CHECK(wrong == 0);
  int units = 0, missed = 0;
  for (int b = 0; b < batch; ++b) {
    const std::int32_t length = cache.lengths[static_cast<std::size_t>(b)];
    units += kv_heads * pk::ceil_div(group, plan.query_rows);
    for (std::int64_t h = 0; h < heads && length > 0; ++h)
      for (std::int64_t t = 0; t < length; ++t) {
        const std::int64_t query = length - 1;
        const bool coded = (problem.options.window == 0 || t > query - problem.options.window) &&
                           !(overlays && (t < 20 || t > query - ring_window));
        missed += coded && times[static_cast<std::size_t>((query * heads + h) * tokens + t)] != 1 ? 1 : 0;
      }
  }
  CHECK(missed == 0);
  CHECK(ends == units);
}

}  // namespace

TEST_CASE("the host's plan says which block has which tokens of which query heads") {
  random_source random(9600);
  for (const bool overlays : {false, true})
    for (const int splits : {0, 3}) {
      check_plan<dim_64>(random, 1, 1, splits, overlays);
      check_plan<dim_64>(random, 4, random.between(5, 8), splits, overlays);
      check_plan<dim_64>(random, 3, random.between(17, 24), splits, overlays);
    }
}

TEST_CASE("a plan is refused, and empty, for what cannot be a call") {
  random_source random(9601);
  test_cache<dim_64> cache(random, cache_shape{2, 1, 100, 1, pk::dtype::float16}, dim_64{});
  auto problem = plain_problem(random, cache, 2, 1);
  pk::decode_plan plan;
  const auto code = [&](const pk::cache_view& view, const pk::attention_options& options, int shared_kib = 228) {
    plan.blocks = 7;
    const pk::status s =
        pk::plan_decode<dim_64>(problem.query_view(false), problem.query_start.data(), view, options, plan, shared_kib);
    CHECK((s || (plan.blocks == 0 && plan.shares.empty())));
    return s.code;
  };
  using wrong = pk::status_code;
  pk::cache_view view = problem.view(false);
  pk::attention_options options = problem.options;
  CHECK(code(view, options) == wrong::ok);
  CHECK(code(view, options, 8) == wrong::unsupported);
  options.max_query_len = 0;
  CHECK(code(view, options) == wrong::invalid_argument);
  options.max_query_len = 0x7fffffff;
  CHECK(code(view, options) == wrong::overflow);
  options = problem.options;
  view.batch = -1;
  CHECK(code(view, options) == wrong::invalid_argument);
  view = problem.view(false);
  view.pages.kv_heads = 3;
  CHECK(code(view, options) == wrong::invalid_argument);
  // A length that the kernel would clamp and report.
  view = problem.view(false);
  const std::vector<std::int32_t> lengths = {100, -5};
  view.seq_lens = lengths.data();
  CHECK(code(view, options) == wrong::ok);
  CHECK(plan.report == pk::report_length_out_of_range);
  CHECK(pk::describe(plan).find("sequence 0, KV head 0, rows from 0, tiles 0 to") != std::string::npos);
}
