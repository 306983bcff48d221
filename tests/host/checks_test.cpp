// SPDX-License-Identifier: Apache-2.0
#include <functional>
#include <limits>
#include <packkv/codec/checks.hpp>
#include <packkv/reference/attention.hpp>
#include <packkv/reference/compress.hpp>

#include "fixture.hpp"

namespace pk = packkv;
namespace ref = packkv::reference;
using namespace host_test;

namespace {

using code = pk::status_code;
using format = pk::runtime_format<128, 64>;

constexpr std::int64_t huge = std::int64_t{1} << 62;
constexpr std::int64_t lowest = (std::numeric_limits<std::int64_t>::min)();

/// A valid call of everything; a test breaks one thing of it.
struct call {
  pk::parameters<format> params = make_parameters();
  pool memory{params.format, 4, 2, 1, pool_kind::padded, 0x77};
  pk::pages_view pages = memory.pages;
  std::vector<std::int32_t> page_ids{0, 1, 2, 3}, indptr{0, 2, 4}, lengths{70, 65}, starts{0, 2, 3}, ring_rows{0, 1};
  pk::page_table table{page_ids.data(), nullptr, 2};

  tensor<4> key_data{pk::dtype::float16, {2, 2, 70, 128}}, value_data{pk::dtype::float16, {2, 2, 70, 64}};
  pk::input_view<4> keys = key_data.in(), values = value_data.in();
  tensor<4> key_out_data{pk::dtype::float16, {2, 2, 70, 128}}, value_out_data{pk::dtype::float16, {2, 2, 70, 64}};
  pk::output_view<4> key_out = key_out_data.out(), value_out = value_out_data.out();
  tensor<3> key_token_data{pk::dtype::float16, {3, 2, 128}}, value_token_data{pk::dtype::float16, {3, 2, 64}};
  pk::input_view<3> key_tokens = key_token_data.in(), value_tokens = value_token_data.in();
  std::int64_t slots[3] = {0, 5, 9};
  const std::int64_t* slot_ids = slots;

  pk::cache_view cache;
  tensor<4> sink_k{pk::dtype::float16, {2, 2, 4, 128}}, sink_v{pk::dtype::float16, {2, 2, 4, 64}};
  tensor<4> ring_k{pk::dtype::float16, {2, 2, 17, 128}}, ring_v{pk::dtype::float16, {2, 2, 17, 64}};
  tensor<3> query_data{pk::dtype::float16, {3, 4, 128}}, out_data{pk::dtype::float32, {3, 4, 64}};
  tensor<2> lse_data{pk::dtype::float32, {3, 4}};
  pk::input_view<3> queries = query_data.in();
  pk::output_view<3> out = out_data.out();
  pk::output_view<2> lse = lse_data.out();
  const std::int32_t* query_starts = starts.data();
  pk::attention_options options;

  tensor<3> gemv_query_data{pk::dtype::float16, {2, 4, 128}}, score_data{pk::dtype::float32, {2, 4, 70}};
  tensor<3> weight_data{pk::dtype::float32, {2, 4, 70}}, sum_data{pk::dtype::float32, {2, 4, 64}};
  pk::input_view<3> gemv_queries = gemv_query_data.in(), weights = weight_data.in();
  pk::output_view<3> scores = score_data.out(), sums = sum_data.out();

  tensor<4> state_data{pk::dtype::float32, {3, 2, 4, 64}};
  tensor<3> state_lse_data{pk::dtype::float32, {3, 2, 4}}, merged_data{pk::dtype::float32, {2, 4, 64}};
  tensor<2> merged_lse_data{pk::dtype::float32, {2, 4}};
  pk::input_view<4> states = state_data.in();
  pk::input_view<3> state_lses = state_lse_data.in();
  pk::output_view<3> merged = merged_data.out();
  pk::output_view<2> merged_lse = merged_lse_data.out();
  pk::lse_base merge_base = pk::lse_base::e;

  pk::device_report report;

  call() {
    const auto one = [] { return 1.0f; };
    key_data.fill(one), value_data.fill(one), key_token_data.fill(one), value_token_data.fill(one),
        query_data.fill(one);
    gemv_query_data.fill(one), weight_data.fill(one), state_data.fill(one), state_lse_data.fill(one);
    sink_k.fill(one), sink_v.fill(one), ring_k.fill(one), ring_v.fill(one);
    cache.pages = pages, cache.table = table, cache.seq_lens = lengths.data(), cache.batch = 2, cache.max_seq_len = 70;
    cache.sinks = {sink_k.in(), sink_v.in()};
    cache.ring = {ring_k.in(), ring_v.in(), nullptr, 16};
    options.base = pk::lse_base::e, options.softmax_scale = 0.1f, options.max_query_len = 2;
  }
  static pk::parameters<format> make_parameters() {
    pk::parameters<format> p;
    p.format.key_spec =
        pk::make_plan_codec(pk::side::key, 128, pk::transform_kind::identity, flat_plan(pk::side::key, 128, 2));
    p.format.value_spec =
        pk::make_plan_codec(pk::side::value, 64, pk::transform_kind::hadamard, flat_plan(pk::side::value, 64, 2));
    return p;
  }

  pk::status compress() { return ref::compress(keys, values, lengths.data(), params, pages, table, report); }
  pk::status decompress() { return ref::decompress(pages, table, lengths.data(), params, key_out, value_out, report); }
  pk::status store() { return ref::store_tokens(key_tokens, value_tokens, slot_ids, params, pages, report); }
  pk::status decode() { return ref::decode_attention(queries, query_starts, cache, params, out, lse, options, report); }
  pk::cache_view coded_only() const {
    pk::cache_view c = cache;
    if (!gemv_overlays) c.sinks = {}, c.ring = {};
    return c;
  }
  bool gemv_overlays = false;
  pk::status key_gemv() { return ref::key_gemv(gemv_queries, coded_only(), params, 0.1f, scores, report); }
  pk::status value_gemv() { return ref::value_gemv(weights, coded_only(), params, sums, report); }
  pk::status merge() { return ref::merge_states(states, state_lses, merged, merged_lse, merge_base); }

  /// Everything that a call may write, as bytes.
  std::vector<std::uint8_t> written() {
    std::vector<std::uint8_t> all = memory.snapshot();
    const auto add = [&](const std::vector<std::uint8_t>& bytes) { all.insert(all.end(), bytes.begin(), bytes.end()); };
    add(key_out_data.bytes()), add(value_out_data.bytes()), add(out_data.bytes()), add(lse_data.bytes());
    add(score_data.bytes()), add(sum_data.bytes()), add(merged_data.bytes()), add(merged_lse_data.bytes());
    return all;
  }
};

/// Turns a view of 16-bit elements into a well-formed one of float32, which nothing may read.
template <class View>
void widen(View& view) {
  view.type = pk::dtype::float32;
  for (std::int64_t& s : view.stride) s *= 2;
}

using entry = pk::status (call::*)();

/// Breaks a valid call and checks that it is refused with the code, and that not a byte was written or reported.
void refuses(std::initializer_list<entry> entries, code expected, const std::function<void(call&)>& damage, int line) {
  for (const entry e : entries) {
    call c;
    damage(c);
    const std::vector<std::uint8_t> before = c.written();
    const pk::status s = (c.*e)();
    INFO("line " << line << ": " << s.message);
    CHECK(static_cast<int>(s.code) == static_cast<int>(expected));
    CHECK((c.written() == before));
    CHECK((c.report.flags == 0 && c.report.leading_clamps == 0));
    CHECK((s.message != nullptr && std::strlen(s.message) > 10));
  }
}

#define REFUSES(entries, expected, damage) \
  refuses(                                 \
      entries, expected, [](call& c) { damage; }, __LINE__)

const std::initializer_list<entry> coders = {&call::compress, &call::decompress, &call::store};
const std::initializer_list<entry> readers = {&call::decode, &call::key_gemv, &call::value_gemv};
const std::initializer_list<entry> compress = {&call::compress}, decompress = {&call::decompress},
                                   store = {&call::store};
const std::initializer_list<entry> tabled = {&call::compress, &call::decompress};
const std::initializer_list<entry> decode = {&call::decode}, merge = {&call::merge};
const std::initializer_list<entry> gemvs = {&call::key_gemv, &call::value_gemv};
const std::initializer_list<entry> key_gemv = {&call::key_gemv}, value_gemv = {&call::value_gemv};

}  // namespace

TEST_CASE("the calls that the refusal tests start from are accepted", "[checks]") {
  for (const entry e : {&call::compress, &call::decompress, &call::store, &call::decode, &call::key_gemv,
                        &call::value_gemv, &call::merge}) {
    call c;
    const std::vector<std::uint8_t> before = c.written();
    CHECK((c.*e)());
    CHECK((c.written() != before));
  }
}

TEST_CASE("bad page pools are refused before anything is written", "[checks]") {
  const auto both = [](code expected, const std::function<void(pk::pages_view&)>& damage, int line) {
    refuses(
        coders, expected, [&](call& c) { damage(c.pages); }, line);
    refuses(
        readers, expected, [&](call& c) { damage(c.cache.pages); }, line);
  };
#define BAD_PAGES(expected, damage) \
  both(                             \
      expected, [](pk::pages_view& p) { damage; }, __LINE__)
  BAD_PAGES(code::invalid_argument, p.num_pages = -1);
  BAD_PAGES(code::invalid_argument, p.kv_heads = 0);
  BAD_PAGES(code::invalid_argument, p.kv_heads = -2);
  BAD_PAGES(code::invalid_argument, p.tiles_per_page = 0);
  BAD_PAGES(code::invalid_argument, p.tiles_per_page = -1);
  BAD_PAGES(code::invalid_argument, p.key_data = nullptr);
  BAD_PAGES(code::invalid_argument, p.value_data = nullptr);
  BAD_PAGES(code::misaligned, p.key_data = static_cast<char*>(p.key_data) + 8);
  BAD_PAGES(code::misaligned, p.value_data = static_cast<char*>(p.value_data) + 1);
  BAD_PAGES(code::misaligned, p.key_page_stride += 8);
  BAD_PAGES(code::misaligned, p.key_head_stride += 4);
  BAD_PAGES(code::misaligned, p.value_page_stride += 2);
  BAD_PAGES(code::misaligned, p.value_head_stride += 1);
  BAD_PAGES(code::invalid_argument, p.key_page_stride = -p.key_page_stride);
  BAD_PAGES(code::invalid_argument, p.key_head_stride = -p.key_head_stride);
  BAD_PAGES(code::invalid_argument, p.value_page_stride = -p.value_page_stride);
  BAD_PAGES(code::invalid_argument, p.value_head_stride = -p.value_head_stride);
  BAD_PAGES(code::invalid_argument, p.key_head_stride = 0);
  BAD_PAGES(code::invalid_argument, p.value_head_stride = 16);
  BAD_PAGES(code::invalid_argument, p.key_page_stride = 0);
  BAD_PAGES(code::invalid_argument, p.value_page_stride = 16);
  BAD_PAGES(code::invalid_argument, p.tiles_per_page = 2);  // no longer fits the strides
  BAD_PAGES(code::overflow, p.key_page_stride = huge);
  BAD_PAGES(code::overflow, p.value_page_stride = huge);
  BAD_PAGES(code::overflow, p.key_head_stride = huge);
  BAD_PAGES(code::overflow, p.value_head_stride = huge);
#undef BAD_PAGES
}

TEST_CASE("bad codecs and parameters are refused before anything is written", "[checks]") {
  const std::initializer_list<entry> all = {&call::compress, &call::decompress, &call::store,
                                            &call::decode,   &call::key_gemv,   &call::value_gemv};
  REFUSES(all, code::shape_mismatch, c.params.format.key_spec.head_dim = 64);
  REFUSES(all, code::shape_mismatch, c.params.format.value_spec.head_dim = 100);
  REFUSES(all, code::invalid_argument, std::swap(c.params.format.key_spec.strips, c.params.format.value_spec.strips));
  REFUSES(all, code::invalid_argument, c.params.format.key_spec.strips.width[0] = 5);
  REFUSES(all, code::invalid_argument, c.params.format.value_spec.strips.width[3] = 3);  // not widest first
  REFUSES(all, code::invalid_argument, c.params.format.key_spec.leading = 5);
  REFUSES(all, code::unsupported, c.params.format.value_spec.leading = 1);
  REFUSES(all, code::invalid_argument, c.params.format.key_spec.leading = 1);  // no leading_scale
  REFUSES(all, code::invalid_argument,
          c.params.format.key_spec.transform = pk::transform_kind::permutation);                         // none given
  REFUSES(all, code::invalid_argument, c.params.format.key_spec.transform = pk::transform_kind::basis);  // none given
  alignas(16) static float matrix[65 * 64] = {};
  REFUSES(all, code::misaligned, c.params.value.basis = matrix + 1);
  const std::initializer_list<entry> encoders = {&call::compress, &call::store};
  REFUSES(encoders, code::invalid_argument,
          (c.params.format.value_spec.transform = pk::transform_kind::basis, c.params.value.basis = matrix));
  REFUSES(all, code::invalid_argument, c.params.format.key_spec.kind = static_cast<pk::codec_kind>(9));
  REFUSES(all, code::unsupported, c.params.format.value_spec.kind = pk::codec_kind::fp8);  // keeps its transform
  for (const float scale : {0.0f, -1.0f, NAN, INFINITY})
    refuses(
        all, code::invalid_argument,
        [=](call& c) {
          c.params.format.value_spec = pk::make_element_codec(pk::codec_kind::fp8, 64);
          c.params.value.tensor_scale = scale;
        },
        __LINE__);
}

TEST_CASE("arrays of parameters that a format cannot use are refused before anything is written", "[checks]") {
  const std::initializer_list<entry> all = {&call::compress, &call::decompress, &call::store,
                                            &call::decode,   &call::key_gemv,   &call::value_gemv};
  // Of the last of two heads.
  struct arrays {
    std::vector<std::int16_t> order;
    std::vector<float> column = std::vector<float>(256, 0.5f), offset = column, leading = std::vector<float>(4, 0.1f),
                       matrix = std::vector<float>(2 * 64 * 64 + 4), inverse = matrix;
    arrays() {
      for (int i = 0; i < 256; ++i) order.push_back(static_cast<std::int16_t>(i * 5 % 128));
    }
    void give(call& c, pk::transform_kind transform) {
      c.params.format.key_spec = pk::make_plan_codec(pk::side::key, 128, transform, flat_plan(pk::side::key, 128, 1),
                                                     2);  // no larger than before
      c.params.format.value_spec.transform = pk::transform_kind::basis;
      c.params.key.permutation = order.data(), c.params.key.column_scale = column.data();
      c.params.key.leading_scale = leading.data(), c.params.key.channel_offset = offset.data();
      float* const basis = matrix.data() + (16 - reinterpret_cast<std::uintptr_t>(matrix.data()) % 16) % 16 / 4;
      c.params.value.basis = basis, c.params.value.basis_inverse = inverse.data();
    }
  };
  arrays good;
  call accepted;
  good.give(accepted, pk::transform_kind::permutation);
  for (const entry e : all) CHECK((accepted.*e)());
  CHECK(pk::check_parameter_arrays(accepted.params, 2));
  const auto refused = [&](const std::function<void(arrays&)>& damage, int line) {
    arrays a;
    damage(a);
    refuses(
        all, code::invalid_argument, [&](call& c) { a.give(c, pk::transform_kind::permutation); }, line);
  };
  for (const std::int16_t channel : {std::int16_t{-1}, std::int16_t{128}, std::int16_t{32767}, good.order[254]})
    refused([=](arrays& a) { a.order[255] = channel; }, __LINE__);
  for (const float x : {0.0f, -1.0f, NAN, INFINITY}) {
    refused([=](arrays& a) { a.column[255] = x; }, __LINE__);
    refused([=](arrays& a) { a.leading[3] = x; }, __LINE__);
  }
  for (const float x : {NAN, -INFINITY}) {
    refused([=](arrays& a) { a.offset[255] = x; }, __LINE__);
    refused([=](arrays& a) { a.matrix[2 * 64 * 64 - 1] = x; }, __LINE__);
    refused([=](arrays& a) { a.inverse[2 * 64 * 64 - 1] = x; }, __LINE__);
  }
  // What the format does not read may hold anything.
  arrays unread;
  unread.order[255] = 5000;
  call identity;
  unread.give(identity, pk::transform_kind::identity);
  CHECK(identity.compress());
}

TEST_CASE("numbers that do not fit a codec's fields make a codec that is refused", "[checks]") {
  const pk::strip_widths plan = flat_plan(pk::side::key, 128, 2);
  for (const int number : {-1, 5, 65536 + 1, -65536 + 1, 2147483647}) {
    INFO(number);
    const auto leading = pk::make_plan_codec(pk::side::key, 128, pk::transform_kind::identity, plan, number);
    CHECK_FALSE(pk::check_codec(pk::side::key, leading));
    CHECK_FALSE(pk::check_codec(pk::side::key, pk::make_grouped_codec(pk::side::key, 128, 2, number)));
    CHECK_FALSE(pk::check_codec(pk::side::key, pk::make_element_codec(pk::codec_kind::fp8, number)));
  }
}

TEST_CASE("bad key and value tensors are refused before anything is written", "[checks]") {
  REFUSES(compress, code::invalid_argument, c.keys.data = nullptr);
  REFUSES(compress, code::invalid_argument, c.values.data = nullptr);
  REFUSES(compress, code::invalid_argument, c.keys.extent[2] = -1);
  REFUSES(compress, code::misaligned, c.keys.data = static_cast<const char*>(c.keys.data) + 1);
  REFUSES(compress, code::misaligned, c.values.stride[1] += 1);
  REFUSES(compress, code::overflow, c.keys.stride[0] = lowest);
  REFUSES(compress, code::overflow, (c.keys.extent[2] = c.values.extent[2] = huge, c.keys.stride[2] = 4));
  REFUSES(compress, code::overflow, (c.keys.extent[2] = c.values.extent[2] = std::int64_t{1} << 31));
  REFUSES(compress, code::overflow, (c.keys.extent[0] = c.values.extent[0] = std::int64_t{1} << 31));
  REFUSES(compress, code::unsupported, widen(c.keys));
  REFUSES(compress, code::unsupported, widen(c.values));
  REFUSES(compress, code::invalid_argument, c.values.type = static_cast<pk::dtype>(3));
  REFUSES(compress, code::shape_mismatch, c.keys.extent[0] = 1);
  REFUSES(compress, code::shape_mismatch, c.values.extent[2] = 69);
  REFUSES(compress, code::shape_mismatch, (c.keys.extent[1] = 1, c.values.extent[1] = 1));
  REFUSES(compress, code::shape_mismatch, c.keys.extent[3] = 64);
  REFUSES(compress, code::shape_mismatch, c.values.extent[3] = 128);
  REFUSES(decompress, code::invalid_argument, c.key_out.data = nullptr);
  REFUSES(decompress, code::unsupported, widen(c.value_out));
  REFUSES(decompress, code::misaligned, c.value_out.data = static_cast<char*>(c.value_out.data) + 1);
  REFUSES(decompress, code::shape_mismatch, c.key_out.extent[3] = 96);
  REFUSES(store, code::invalid_argument, c.slot_ids = nullptr);
  REFUSES(store, code::invalid_argument, c.key_tokens.data = nullptr);
  REFUSES(store, code::shape_mismatch, c.key_tokens.extent[0] = 2);
  REFUSES(store, code::shape_mismatch, (c.key_tokens.extent[1] = c.value_tokens.extent[1] = 1));
  REFUSES(store, code::shape_mismatch, c.value_tokens.extent[2] = 96);
  REFUSES(store, code::unsupported, widen(c.key_tokens));
}

TEST_CASE("bad page tables are refused before anything is written", "[checks]") {
  REFUSES(tabled, code::invalid_argument, (c.table.indptr = c.indptr.data(), c.table.pages = nullptr));
  REFUSES(tabled, code::invalid_argument, c.table.row_stride = -1);
  REFUSES(tabled, code::overflow, c.table.row_stride = huge);
  REFUSES(readers, code::invalid_argument, (c.cache.table.indptr = c.indptr.data(), c.cache.table.pages = nullptr));
  REFUSES(readers, code::invalid_argument, c.cache.table.row_stride = -1);
  REFUSES(readers, code::overflow, c.cache.table.row_stride = huge);
}

TEST_CASE("bad caches are refused before anything is written", "[checks]") {
  REFUSES(readers, code::invalid_argument, c.cache.batch = -1);
  REFUSES(readers, code::invalid_argument, c.cache.max_seq_len = -1);
  REFUSES(readers, code::overflow, c.cache.max_seq_len = 2147483647 - 127);
  REFUSES(readers, code::invalid_argument, c.cache.seq_lens = nullptr);
}

TEST_CASE("bad arguments of decode_attention are refused before anything is written", "[checks]") {
  REFUSES(decode, code::invalid_argument, c.queries.data = nullptr);
  REFUSES(decode, code::invalid_argument, c.out.data = nullptr);
  REFUSES(decode, code::invalid_argument, c.query_starts = nullptr);
  REFUSES(decode, code::unsupported, widen(c.queries));
  REFUSES(decode, code::unsupported, c.out.type = pk::dtype::bfloat16);  // neither the queries' type nor float32
  REFUSES(decode, code::misaligned, c.out.data = static_cast<char*>(c.out.data) + 2);
  REFUSES(decode, code::misaligned, c.out.stride[1] += 2);
  REFUSES(decode, code::shape_mismatch, c.queries.extent[0] = 2);
  REFUSES(decode, code::shape_mismatch, c.queries.extent[1] = 3);  // not a multiple of kv_heads
  REFUSES(decode, code::shape_mismatch, c.queries.extent[1] = 0);
  REFUSES(decode, code::shape_mismatch, c.queries.extent[1] = 2);  // differs from the output
  REFUSES(decode, code::shape_mismatch, c.queries.extent[2] = 64);
  REFUSES(decode, code::shape_mismatch, c.out.extent[2] = 128);
  REFUSES(decode, code::unsupported, c.lse.type = pk::dtype::float16);
  REFUSES(decode, code::shape_mismatch, c.lse.extent[0] = 2);
  REFUSES(decode, code::shape_mismatch, c.lse.extent[1] = 3);
  REFUSES(decode, code::misaligned, c.lse.stride[0] += 2);
  for (const float x : {0.0f, -0.1f, NAN, INFINITY, -INFINITY})
    refuses(
        decode, code::invalid_argument, [=](call& c) { c.options.softmax_scale = x; }, __LINE__);
  for (const float x : {-1.0f, NAN, INFINITY})
    refuses(
        decode, code::invalid_argument, [=](call& c) { c.options.soft_cap = x; }, __LINE__);
  REFUSES(decode, code::invalid_argument, c.options.window = -1);
  REFUSES(decode, code::invalid_argument, c.options.base = static_cast<pk::lse_base>(2));
  REFUSES(decode, code::invalid_argument, c.options.base = pk::lse_base::unset);
  REFUSES(decode, code::invalid_argument, c.options.position_stride = 0);
  REFUSES(decode, code::invalid_argument, c.options.position_offset = -1);
  REFUSES(decode, code::invalid_argument, c.options.position_stride = 2);  // without context_lens
  REFUSES(decode, code::invalid_argument, c.options.position_offset = 1);
  REFUSES(decode, code::invalid_argument, c.options.max_query_len = 0);
  REFUSES(decode, code::invalid_argument, c.options.splits = -1);
  REFUSES(decode, code::invalid_argument, c.options.splits = 4097);
}

TEST_CASE("bad sinks and rings are refused before anything is written", "[checks]") {
  REFUSES(decode, code::invalid_argument, c.cache.sinks.keys.data = nullptr);
  REFUSES(decode, code::invalid_argument, c.cache.sinks.values.data = nullptr);
  REFUSES(decode, code::unsupported, widen(c.cache.sinks.keys));
  REFUSES(decode, code::misaligned, c.cache.sinks.values.stride[2] += 1);
  REFUSES(decode, code::shape_mismatch, c.cache.sinks.keys.extent[2] = 3);
  REFUSES(decode, code::shape_mismatch, c.cache.sinks.keys.extent[1] = 1);
  REFUSES(decode, code::shape_mismatch, c.cache.sinks.keys.extent[3] = 64);
  REFUSES(decode, code::shape_mismatch, c.cache.sinks.values.extent[3] = 128);
  REFUSES(decode, code::shape_mismatch, (c.cache.sinks.keys.extent[0] = c.cache.sinks.values.extent[0] = 1));
  REFUSES(decode, code::invalid_argument, c.cache.ring.keys.data = nullptr);
  REFUSES(decode, code::invalid_argument, c.cache.ring.values.data = nullptr);
  REFUSES(decode, code::unsupported, widen(c.cache.ring.values));
  REFUSES(decode, code::shape_mismatch, c.cache.ring.keys.extent[0] = 1);
  REFUSES(decode, code::shape_mismatch, c.cache.ring.values.extent[2] = 16);
  REFUSES(decode, code::shape_mismatch, (c.cache.ring.keys.extent[0] = c.cache.ring.values.extent[0] = 1));
  REFUSES(decode, code::invalid_argument, c.cache.ring.window = 0);
  REFUSES(decode, code::invalid_argument, c.cache.ring.window = -5);
  REFUSES(decode, code::invalid_argument, c.cache.ring.window = 17);  // capacity 17 < 17 + 2 - 1
  REFUSES(decode, code::invalid_argument, c.cache.ring.window = 2147483647);
  REFUSES(decode, code::invalid_argument, c.options.max_query_len = 3);  // capacity 17 < 16 + 3 - 1
  REFUSES(decode, code::invalid_argument, c.options.max_query_len = 2147483647);
}

TEST_CASE("bad arguments of the GEMVs are refused before anything is written", "[checks]") {
  REFUSES(gemvs, code::unsupported, c.gemv_overlays = true);
  REFUSES(key_gemv, code::invalid_argument, c.gemv_queries.data = nullptr);
  REFUSES(key_gemv, code::invalid_argument, c.scores.data = nullptr);
  REFUSES(key_gemv, code::shape_mismatch, c.gemv_queries.extent[0] = 1);
  REFUSES(key_gemv, code::shape_mismatch, (c.gemv_queries.extent[1] = c.scores.extent[1] = 3));
  REFUSES(key_gemv, code::shape_mismatch, c.gemv_queries.extent[2] = 64);
  REFUSES(key_gemv, code::shape_mismatch, c.scores.extent[2] = 69);
  REFUSES(key_gemv, code::shape_mismatch, c.scores.extent[0] = 1);
  REFUSES(key_gemv, code::misaligned, c.scores.stride[2] = 2);
  REFUSES(value_gemv, code::shape_mismatch, c.weights.extent[2] = 71);
  REFUSES(value_gemv, code::shape_mismatch, c.sums.extent[2] = 128);
  REFUSES(value_gemv, code::shape_mismatch, c.sums.extent[1] = 2);
  REFUSES(value_gemv, code::invalid_argument, c.sums.data = nullptr);
}

TEST_CASE("bad arguments of merge_states are refused before anything is written", "[checks]") {
  REFUSES(merge, code::invalid_argument, c.states.data = nullptr);
  REFUSES(merge, code::invalid_argument, c.state_lses.data = nullptr);
  REFUSES(merge, code::invalid_argument, c.merged.data = nullptr);
  REFUSES(merge, code::invalid_argument, (c.states.extent[0] = c.state_lses.extent[0] = 0));
  REFUSES(merge, code::shape_mismatch, c.state_lses.extent[0] = 2);
  REFUSES(merge, code::shape_mismatch, c.state_lses.extent[2] = 3);
  REFUSES(merge, code::shape_mismatch, c.merged.extent[0] = 1);
  REFUSES(merge, code::shape_mismatch, c.merged.extent[2] = 128);
  REFUSES(merge, code::shape_mismatch, c.merged_lse.extent[1] = 3);
  REFUSES(merge, code::unsupported, c.state_lses.type = pk::dtype::float16);
  REFUSES(merge, code::unsupported, c.merged_lse.type = pk::dtype::bfloat16);
  REFUSES(merge, code::misaligned, c.merged.data = static_cast<char*>(c.merged.data) + 1);
}

TEST_CASE("merge_states refuses an unknown base of the log-sum-exp", "[checks]") {
  REFUSES(merge, code::invalid_argument, c.merge_base = static_cast<pk::lse_base>(2));
}

TEST_CASE("empty calls are accepted without pointers", "[checks]") {
  call c;
  c.keys.extent[2] = c.values.extent[2] = 0, c.keys.data = c.values.data = nullptr;
  CHECK(ref::compress(c.keys, c.values, nullptr, c.params, c.pages, c.table, c.report));
  c.key_tokens.extent[0] = c.value_tokens.extent[0] = 0, c.key_tokens.data = c.value_tokens.data = nullptr,
  c.slot_ids = nullptr;
  CHECK(c.store());
  c.cache.batch = 0, c.cache.seq_lens = nullptr, c.cache.table = {}, c.cache.sinks = {}, c.cache.ring = {};
  c.queries.extent[0] = c.out.extent[0] = 0, c.queries.data = nullptr, c.out.data = nullptr, c.query_starts = nullptr;
  CHECK(ref::decode_attention(c.queries, nullptr, c.cache, c.params, c.out, {}, c.options, c.report));
  CHECK(c.report.flags == 0);
}

TEST_CASE("checked sizes stay invalid after an overflow or a negative operand", "[checks]") {
  constexpr std::int64_t most = (std::numeric_limits<std::int64_t>::max)();
  STATIC_REQUIRE((pk::checked(3) * 4 + 5).value() == 17);
  STATIC_REQUIRE(!(pk::checked(most) + 1).valid());
  STATIC_REQUIRE((pk::checked(most) + 0).valid());
  STATIC_REQUIRE(!(pk::checked(huge) * 2).valid());
  STATIC_REQUIRE(!(pk::checked(huge) * 2 * 0).valid());
  STATIC_REQUIRE(!(pk::checked(-1) * 0).valid());
  STATIC_REQUIRE(!(pk::checked(1) + -1).valid());
  STATIC_REQUIRE((pk::checked(huge) * 2).value() == 0);
  STATIC_REQUIRE(pk::checked(17).rounded_up(16).value() == 32);
  STATIC_REQUIRE(pk::checked(16).rounded_up(16).value() == 16);
  STATIC_REQUIRE(!pk::checked(most).rounded_up(16).valid());
}
