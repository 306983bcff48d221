// SPDX-License-Identifier: Apache-2.0
// The edges that random shapes meet by luck only. Each of these tests is here because a seeded defect
// (tests/simt/mutants.py) went unseen without it.
#include <limits>

#include "../support/catch.hpp"
#include "test_cache.hpp"

using namespace packkv_test;

namespace {

constexpr double tolerance = 4e-5;  // as in attention_test.cu

template <int HeadDim>
pk::runtime_format<HeadDim> format_of(const pk::codec_spec& key, const pk::codec_spec& value) {
  pk::runtime_format<HeadDim> format;
  format.key_spec = key;
  format.value_spec = value;
  return format;
}

pk::runtime_format<64> small_format() {
  return format_of<64>(
      pk::make_plan_codec(pk::side::key, 64, pk::transform_kind::hadamard, pk::plan<4, 3, 2, 1>::widths(), 1),
      pk::make_plan_codec(pk::side::value, 64, pk::transform_kind::identity, pk::plan<4, 3, 2, 1>::widths()));
}

/// One decode call on reference and device; overlays and options are for the test to set.
template <class Format>
struct decode_case {
  test_cache<Format>& cache;
  std::vector<std::int32_t> query_start;
  std::int64_t heads;
  tensor_data queries, sink_keys, sink_values, ring_keys, ring_values;
  std::int32_t ring_window = 0;
  pk::attention_options options;

  decode_case(random_source& random, test_cache<Format>& c, int group, std::vector<std::int32_t> start)
      : cache(c), query_start(std::move(start)), heads(static_cast<std::int64_t>(group) * c.shape.kv_heads) {
    queries = tensor_data(random, cache.shape.type, 1, query_start.back(), heads, Format::key_head_dim);
    options.softmax_scale = 0.3f;
    options.base = pk::lse_base::two;
    options.splits = 1;
  }
  pk::cache_view with_overlays(pk::cache_view c, bool device) const {
    const auto view = [&](const tensor_data& x) { return device ? x.device() : x.host(); };
    if (sink_keys.tokens > 0) c.sinks = {view(sink_keys), view(sink_values)};
    if (ring_keys.tokens > 0) c.ring = {view(ring_keys), view(ring_values), nullptr, ring_window};
    return c;
  }
  void check() {
    const std::int64_t tokens = query_start.back(), dim = Format::value_head_dim;
    std::vector<float> out(static_cast<std::size_t>(tokens * heads * dim), 7.0f),
        lse(static_cast<std::size_t>(tokens * heads), 7.0f);
    device_array<float> device_out(out), device_lse(lse);
    const device_array<std::int32_t> device_start(query_start);
    const auto out_to = [&](float* p) { return pk::make_output(p, pk::dtype::float32, {tokens, heads, dim}); };
    const auto lse_to = [&](float* p) { return pk::make_output(p, pk::dtype::float32, {tokens, heads}); };
    REQUIRE(pk::reference::decode_attention(sequence(queries.host()), query_start.data(),
                                            with_overlays(cache.host_cache(), false), cache.host_parameters(),
                                            out_to(out.data()), lse_to(lse.data()), options, cache.report));
    REQUIRE(pk::decode_attention(sequence(queries.device()), device_start.data(),
                                 with_overlays(cache.gpu_cache(), true), cache.gpu_parameters(),
                                 out_to(device_out.data()), lse_to(device_lse.data()), options, cache.exec()));
    CHECK(worst_row_error(device_out.host(), out, static_cast<int>(dim)) < tolerance);
    CHECK(worst_row_error(device_lse.host(), lse, 1) < tolerance);
    CHECK(cache.gpu_report().flags == cache.report.flags);
  }
};

template <class Format>
void check_compress(test_cache<Format>& cache) {
  cache.lengths.assign(cache.lengths.size(), cache.shape.max_tokens);
  cache.device_lengths.assign(cache.lengths);
  cache.keys.device_bits.assign(cache.keys.host_bits);
  cache.values.device_bits.assign(cache.values.host_bits);
  REQUIRE(cache.compress_reference());
  REQUIRE(pk::compress(cache.keys.device(), cache.values.device(), cache.device_lengths.data(), cache.gpu_parameters(),
                       cache.gpu_pages(), cache.gpu_table(), cache.exec()));
  CHECK((cache.device_pages.host() == cache.pages));
  CHECK(cache.gpu_report().flags == cache.report.flags);
  CHECK(cache.gpu_report().leading_clamps == cache.report.leading_clamps);
}

/// Sets channel c of the first row's token (head 0).
void put(tensor_data& x, int token, int c, float value) {
  x.host_bits[static_cast<std::size_t>(token * (x.dim + x.pad) + c)] =
      x.type == pk::dtype::float16 ? pk::float_to_half(value) : pk::float_to_bfloat16(value);
}

}  // namespace

TEST_CASE("a query that sees one token returns its value, in whichever lane the token lies") {
  random_source random(101);
  for (const int length : {1, 31, 32, 33, 64}) {
    INFO("length " << length);
    test_cache cache(random, cache_shape{1, 1, 64, 1, pk::dtype::float16}, small_format());
    cache.lengths = {length};
    cache.device_lengths.assign(cache.lengths);
    cache.fill();
    decode_case call(random, cache, 2, {0, 1});
    call.options.window = 1;
    call.check();
  }
}

TEST_CASE("warps that take several tiles each agree with the reference: coded, sinks and ring") {
  random_source random(102);
  constexpr int tokens = 580;
  test_cache cache(random, cache_shape{1, 1, tokens, 1, pk::dtype::float16}, small_format());
  cache.lengths = {tokens};
  cache.device_lengths.assign(cache.lengths);
  cache.fill();
  const auto overlay = [&](int count) { return tensor_data(random, pk::dtype::float16, 1, 1, count, 64); };
  for (const bool overlaid : {false, true}) {
    decode_case call(random, cache, 4, {0, 1});
    if (overlaid) {
      call.sink_keys = overlay(150);
      call.sink_values = overlay(150);
      call.ring_window = 250;
      call.ring_keys = overlay(260);
      call.ring_values = overlay(260);
    }
    call.check();
  }

  // Nine tiles are enough for key_gemv to take two splits.
  tensor_data queries(random, pk::dtype::float16, 1, 1, 4, 64), weights(random, pk::dtype::float16, 1, 1, 4, tokens);
  std::vector<float> scores(4 * tokens, 7.0f), sums(4 * 64, 7.0f);
  device_array<float> device_scores(scores), device_sums(sums);
  const auto scores_to = [](float* p) { return pk::make_output(p, pk::dtype::float32, {1, 4, tokens}); };
  const auto sums_to = [](float* p) { return pk::make_output(p, pk::dtype::float32, {1, 4, 64}); };
  REQUIRE(pk::reference::key_gemv(sequence(queries.host()), cache.host_cache(), cache.host_parameters(), 0.5f,
                                  scores_to(scores.data()), cache.report));
  REQUIRE(pk::key_gemv(sequence(queries.device()), cache.gpu_cache(), cache.gpu_parameters(), 0.5f,
                       scores_to(device_scores.data()), cache.exec()));
  REQUIRE(pk::reference::value_gemv(sequence(weights.host()), cache.host_cache(), cache.host_parameters(),
                                    sums_to(sums.data()), cache.report));
  REQUIRE(pk::value_gemv(sequence(weights.device()), cache.gpu_cache(), cache.gpu_parameters(),
                         sums_to(device_sums.data()), cache.exec(), 1));
  CHECK(worst_row_error(device_scores.host(), scores, tokens) < tolerance);
  CHECK(worst_row_error(device_sums.host(), sums, 64) < tolerance);
  CHECK(cache.gpu_report().flags == cache.report.flags);
}

TEST_CASE("pages that no query needs may be missing: before the window, and of sequences without queries") {
  random_source random(103);
  test_cache cache(random, cache_shape{2, 1, 128, 1, pk::dtype::float16}, small_format());
  cache.lengths = {128, 128};
  cache.device_lengths.assign(cache.lengths);
  cache.fill();
  const std::int32_t last = cache.table[2 * 128 / 64 - 1];
  for (auto& page : cache.table) page = -1;
  cache.table[2 * 128 / 64 - 1] = last;  // positions 64..127 of sequence 1
  cache.device_table.assign(cache.table);
  decode_case call(random, cache, 4, {0, 0, 1});
  call.options.window = 64;
  call.check();
}

TEST_CASE("what compress and decode_attention leave out is reported, even if it is all there is") {
  random_source random(110);
  test_cache cache(random, cache_shape{1, 1, 64, 1, pk::dtype::float16}, small_format());
  cache.lengths = {64};
  cache.device_lengths.assign(cache.lengths);
  cache.fill();
  decode_case call(random, cache, 1, {0, 3});  // more queries than options.max_query_len
  call.check();
  CHECK(cache.report.flags == pk::report_length_out_of_range);

  pk::page_table none;
  none.row_stride = 1;
  const std::vector<std::int32_t> missing{-1};
  const device_array<std::int32_t> device_missing(missing);
  none.pages = device_missing.data();
  REQUIRE(pk::compress(cache.keys.device(), cache.values.device(), cache.device_lengths.data(), cache.gpu_parameters(),
                       cache.gpu_pages(), none, cache.exec()));
  CHECK(cache.gpu_report().flags == (pk::report_length_out_of_range | pk::report_page_missing));
}

TEST_CASE("key_gemv and value_gemv report a missing page, each by itself") {
  random_source random(111);
  test_cache cache(random, cache_shape{1, 1, 64, 1, pk::dtype::float16}, small_format());
  cache.lengths = {64};
  cache.device_lengths.assign(cache.lengths);
  pk::cache_view view = cache.gpu_cache();
  const device_array<std::int32_t> missing(std::vector<std::int32_t>{-1});
  view.table = {};
  view.table.row_stride = 1;
  view.table.pages = missing.data();
  tensor_data in(random, pk::dtype::float16, 1, 1, 1, 64);  // a query, or 64 weights
  device_array<float> out(64);
  const auto to = pk::make_output(out.data(), pk::dtype::float32, {1, 1, 64});
  const auto report_is = [&](std::uint32_t flags) {
    const bool same = cache.gpu_report().flags == flags;
    cache.device_report.assign(std::vector<pk::device_report>(1));
    return same;
  };
  REQUIRE(pk::key_gemv(sequence(in.device()), view, cache.gpu_parameters(), 1.0f, to, cache.exec()));
  CHECK(report_is(pk::report_page_missing));
  REQUIRE(pk::value_gemv(sequence(in.device()), view, cache.gpu_parameters(), to, cache.exec(), 1));
  CHECK(report_is(pk::report_page_missing));
}

TEST_CASE("merge_states of one state returns it") {
  random_source random(104);
  constexpr int tokens = 2, heads = 3, dim = 64;
  tensor_data outs(random, pk::dtype::float16, 1, tokens, heads, dim);
  const std::vector<float> lses(tokens * heads, 3.5f);
  const device_array<float> device_lses(lses);
  std::vector<float> out(tokens * heads * dim);
  device_array<float> device_out(out), device_lse(lses.size());
  const auto lse_in = [](const float* p) { return pk::make_input(p, pk::dtype::float32, {1, tokens, heads}); };
  const auto out_to = [](float* p) { return pk::make_output(p, pk::dtype::float32, {tokens, heads, dim}); };
  const auto lse_to = [](float* p) { return pk::make_output(p, pk::dtype::float32, {tokens, heads}); };
  std::vector<float> lse(lses.size());
  REQUIRE(pk::reference::merge_states(outs.host(), lse_in(lses.data()), out_to(out.data()), lse_to(lse.data()),
                                      pk::lse_base::two));
  REQUIRE(pk::merge_states(outs.device(), lse_in(device_lses.data()), out_to(device_out.data()),
                           lse_to(device_lse.data()), pk::lse_base::two, pk::exec{}));
  CHECK(worst_row_error(device_out.host(), out, dim) < tolerance);
  CHECK(worst_row_error(device_lse.host(), lses, 1) < tolerance);
}

TEST_CASE("one bad channel alone is reported, in whichever lane it lies") {
  random_source random(105);
  for (const int c : {0, 1, 31, 32, 63}) {
    INFO("channel " << c);
    test_cache cache(random, cache_shape{1, 1, 64, 1, pk::dtype::bfloat16}, small_format());
    put(cache.keys, 5, c, std::numeric_limits<float>::quiet_NaN());
    put(cache.values, 7, c, std::numeric_limits<float>::infinity());
    check_compress(cache);
    CHECK(cache.report.flags == pk::report_nonfinite_input);
  }
  for (int c = 0; c < pk::max_leading; ++c) {  // a leading component is no part of the row's scale
    INFO("leading component " << c);
    const auto format = format_of<64>(pk::make_plan_codec(pk::side::key, 64, pk::transform_kind::identity,
                                                          pk::plan<4, 3, 2, 1>::widths(), pk::max_leading),
                                      small_format().value_spec);
    test_cache cache(random, cache_shape{1, 1, 64, 1, pk::dtype::bfloat16}, format);
    cache.key_data.offset.assign(64, 0.0f);
    cache.key_data.offset[static_cast<std::size_t>(c)] = -3e38f;
    cache.key_data.device_offset = device_array<float>(cache.key_data.offset);
    for (int t = 0; t < 64; ++t) put(cache.keys, t, c, t == 5 ? 3e38f : -3e38f);
    check_compress(cache);
    CHECK((cache.report.flags & pk::report_scale_overflow) != 0);
  }
}

TEST_CASE("FP8 takes its largest values without a report") {
  random_source random(106);
  const auto fp8 = pk::make_element_codec(pk::codec_kind::fp8, 64);
  test_cache cache(random, cache_shape{1, 1, 64, 1, pk::dtype::float16}, format_of<64>(fp8, fp8));
  cache.key_data.tensor_scale = cache.value_data.tensor_scale = 1.0f;
  put(cache.keys, 5, 9, 448.0f);
  put(cache.values, 6, 40, -448.0f);
  check_compress(cache);
  CHECK(cache.report.flags == 0);
}

TEST_CASE("a plan of 8 bits everywhere fills the staging words of compress") {
  random_source random(107);
  const auto format = format_of<64>(
      pk::make_plan_codec(pk::side::key, 64, pk::transform_kind::identity, pk::plan<8, 8, 8, 8>::widths()),
      pk::make_plan_codec(pk::side::value, 64, pk::transform_kind::identity, pk::plan<8, 8, 8, 8>::widths()));
  test_cache cache(random, cache_shape{1, 1, 70, 1, pk::dtype::float16}, format);
  check_compress(cache);
}

TEST_CASE("slot 0 is a slot") {
  random_source random(108);
  test_cache cache(random, cache_shape{1, 1, 64, 1, pk::dtype::float16}, small_format());
  const auto token = [](const pk::input_view<4>& v) {  // [1, 1, tokens, dim]: token 3 as [1, 1, dim]
    pk::input_view<3> out = sequence(v);
    out.data = static_cast<const char*>(out.data) + 3 * out.stride[1];
    out.extent[1] = 1;
    return out;
  };
  const std::int64_t slot = 0;
  const device_array<std::int64_t> device_slot(std::vector<std::int64_t>{slot});
  const auto before = cache.pages;
  REQUIRE(pk::reference::store_tokens(token(cache.keys.host()), token(cache.values.host()), &slot,
                                      cache.host_parameters(), cache.host_pages(), cache.report));
  REQUIRE(pk::store_tokens(token(cache.keys.device()), token(cache.values.device()), device_slot.data(),
                           cache.gpu_parameters(), cache.gpu_pages(), cache.exec()));
  CHECK((cache.pages != before));
  CHECK((cache.device_pages.host() == cache.pages));
}

TEST_CASE("tokens of a missing page are NaN in every channel, at every head dim") {
  random_source random(109);
  for_each_format(random, [&](const auto& format) {
    INFO("head dims " << format.key_head_dim << " " << format.value_head_dim);
    test_cache cache(random, cache_shape{1, 1, 3, 1, pk::dtype::float16}, format);
    cache.lengths = {3};
    cache.device_lengths.assign(cache.lengths);
    cache.fill();
    pk::page_table none;  // no page for any tile
    std::vector<std::int32_t> pages{-1};
    const device_array<std::int32_t> device_pages(pages);
    none.row_stride = 1;
    none.pages = device_pages.data();
    tensor_data k(random, pk::dtype::float16, 1, 1, 3, format.key_head_dim);
    tensor_data v(random, pk::dtype::bfloat16, 1, 1, 3, format.value_head_dim);
    const auto before_k = k.host_bits, before_v = v.host_bits;
    REQUIRE(pk::decompress(cache.gpu_pages(), none, cache.device_lengths.data(), cache.gpu_parameters(),
                           as_output(k.device()), as_output(v.device()), cache.exec()));
    none.pages = pages.data();
    REQUIRE(pk::reference::decompress(cache.host_pages(), none, cache.lengths.data(), cache.host_parameters(),
                                      as_output(k.host()), as_output(v.host()), cache.report));
    CHECK((k.device_bits.host() == k.host_bits));
    CHECK((v.device_bits.host() == v.host_bits));
    CHECK((k.host_bits != before_k && v.host_bits != before_v));
    CHECK(cache.gpu_report().flags == pk::report_page_missing);
  });
}
