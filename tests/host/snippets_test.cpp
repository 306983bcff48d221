// SPDX-License-Identifier: Apache-2.0
// The host code of docs/*.md: scripts/snippets copies the marked regions into the pages.
// [include]
#include <packkv/packkv.hpp>
namespace pk = packkv;
// [include]

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../support/catch.hpp"
#include "../support/npy.hpp"

namespace {

// [format]
using format = pk::cache_format<pk::key_codec<128, pk::basis, pk::rms_scale, pk::plan<4, 2, 1, 1>, pk::leading<1>>,
                                pk::value_codec<128, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>>;
// [format]

// [choices]
// Nothing to calibrate; keys are coded 64 tokens at a time. 4.5 and 4.25 bits per value.
using groups_4 =
    pk::cache_format<pk::grouped_key_codec<128, 4, 64>, pk::grouped_value_codec<128, 4, 128, pk::hadamard>>;
// KIVI: groups of 32 tokens and of 32 channels. 3 bits per value.
using kivi = pk::cache_format<pk::grouped_key_codec<128, 2>, pk::grouped_value_codec<128, 2>>;
// Calibrated; tokens are coded one by one. 3.1875 and 3.125 bits per value.
using basis_3 = pk::cache_format<pk::key_codec<128, pk::basis, pk::rms_scale, pk::plan<4, 3, 3, 2>, pk::leading<1>>,
                                 pk::value_codec<128, pk::hadamard, pk::rms_scale, pk::plan<3, 3, 3, 3, 3, 3, 3, 3>>>;
// Layers that stay in 16 bits.
using raw = pk::cache_format<pk::float16_codec<128>, pk::float16_codec<128>>;
static_assert(groups_4::key().bits_per_value() == 4.5);
static_assert(kivi::value_tile_bytes == 3 * 64 * 128 / 8);  // bytes of 64 tokens of a KV head
// [choices]
static_assert(groups_4::value().bits_per_value() == 4.25);
static_assert(kivi::key().bits_per_value() == 3.0 && kivi::value().bits_per_value() == 3.0);
static_assert(basis_3::key().bits_per_value() == 3.1875 && basis_3::value().bits_per_value() == 3.125);
static_assert(raw::key().bits_per_value() == 16.0);

void require(const pk::status& s) {
  INFO(s.message);
  REQUIRE(s);
}

constexpr int kv_heads = 2, query_heads = 12, group = query_heads / kv_heads, tokens = 512, page_tokens = 64,
              num_pages = tokens / page_tokens;

/// Layer 14 of a real model: the last tokens of the sample cache.
struct sample {
  packkv_test::half_array k = packkv_test::read_npy(PACKKV_SAMPLE_DATA "/k.npy"),
                          v = packkv_test::read_npy(PACKKV_SAMPLE_DATA "/v.npy"),
                          q = packkv_test::read_npy(PACKKV_SAMPLE_DATA "/q.npy");
  std::vector<std::uint16_t> queries;  ///< of the last position: [query_heads, 128]

  sample() {
    REQUIRE((k.extent[0] == kv_heads && k.extent[2] == 128 && q.extent[0] == query_heads));
    for (std::size_t h = 0; h < query_heads; ++h)
      for (std::size_t c = 0; c < 128; ++c) queries.push_back(q.at(h, q.extent[1] - 1, c));
  }
  /// [1, kv_heads, tokens, 128]: strides are those of the longer file.
  static pk::input_view<4> last(const packkv_test::half_array& x) {
    const auto all = static_cast<std::int64_t>(x.extent[1]);
    auto view = pk::make_input(x.bits.data() + (all - tokens) * 128, pk::dtype::float16,
                               {1, kv_heads, std::int64_t{tokens}, 128});
    view.stride[1] = all * 128 * 2;
    return view;
  }
};

/// The calibrated arrays of all KV heads.
struct calibration {
  std::vector<float> basis, basis_inverse, key_steps, key_offset, leading_scale, value_steps;
  pk::parameters<format> parameters;
};

pk::status calibrate(const sample& text, calibration& c) {
  const std::int64_t text_tokens = static_cast<std::int64_t>(text.k.extent[1]),
                     n = static_cast<std::int64_t>(text.q.extent[1]);
  const std::uint16_t *const text_keys = text.k.bits.data(), *const text_values = text.v.bits.data(),
                             *const text_queries = text.q.bits.data();
  std::vector<float>&basis = c.basis, &basis_inverse = c.basis_inverse, &key_steps = c.key_steps,
  &key_offset = c.key_offset, &leading_scale = c.leading_scale, &value_steps = c.value_steps;
  pk::parameters<format>& parameters = c.parameters;
  pk::status s;
  // [calibrate]
  // 16-bit tensors of a text: keys, values [kv_heads, text_tokens, 128], queries [query_heads, n, 128].
  const int matrix = 128 * 128;
  basis.resize(kv_heads * matrix), basis_inverse.resize(kv_heads * matrix), leading_scale.resize(kv_heads);
  key_steps.resize(kv_heads * 128), key_offset.resize(kv_heads * 128), value_steps.resize(kv_heads * 128);
  for (int h = 0; h < kv_heads && s; ++h) {
    const auto keys = pk::make_input(text_keys + h * text_tokens * 128, pk::dtype::float16, {text_tokens, 128});
    const auto values = pk::make_input(text_values + h * text_tokens * 128, pk::dtype::float16, {text_tokens, 128});
    const auto queries = pk::make_input(text_queries + h * group * n * 128, pk::dtype::float16, {group, n, 128});
    pk::calibrate::head_output key, value;
    key.basis = &basis[h * matrix];
    key.basis_inverse = &basis_inverse[h * matrix];
    key.column_scale = &key_steps[h * 128];
    key.channel_offset = &key_offset[h * 128];
    key.leading_scale = &leading_scale[h];
    value.column_scale = &value_steps[h * 128];
    s = pk::calibrate::calibrate_head(format::key(), keys, queries, key);
    if (s) s = pk::calibrate::calibrate_head(format::value(), values, {}, value);
  }
  parameters.key.basis = basis.data();
  parameters.key.basis_inverse = basis_inverse.data();
  parameters.key.column_scale = key_steps.data();
  parameters.key.channel_offset = key_offset.data();
  parameters.key.leading_scale = leading_scale.data();
  parameters.value.column_scale = value_steps.data();
  // [calibrate]
  return s;
}

pk::pages_view pages_of(std::vector<std::uint8_t>& pool) {
  // [pages]
  // A page: 64 tokens of every KV head, K then V. The library takes pointers and strides, and owns nothing.
  constexpr std::int64_t head_bytes = format::key_tile_bytes + format::value_tile_bytes;
  pool.resize(num_pages * kv_heads * head_bytes);  // 16-byte aligned, as all of new
  pk::pages_view pages;
  pages.key_data = pool.data();
  pages.value_data = pool.data() + format::key_tile_bytes;
  pages.key_head_stride = pages.value_head_stride = head_bytes;
  pages.key_page_stride = pages.value_page_stride = kv_heads * head_bytes;
  pages.num_pages = num_pages;
  pages.kv_heads = kv_heads;
  // [pages]
  return pages;
}

/// Mean over rows of |a - b| / |b|.
double mean_error(const std::vector<float>& a, const std::vector<float>& b) {
  double mean = 0.0;
  for (std::size_t h = 0; h < a.size(); h += 128) {
    double difference = 0.0, norm = 0.0;
    for (std::size_t i = h; i < h + 128; ++i) {
      difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
      norm += std::pow(static_cast<double>(b[i]), 2);
    }
    mean += std::sqrt(difference / norm) * 128 / static_cast<double>(a.size());
  }
  return mean;
}

template <class Format>
std::vector<float> attention(const pk::parameters<Format>& parameters, const pk::pages_view& pages,
                             const sample& data) {
  const std::uint16_t* const queries = data.queries.data();
  std::vector<float> out(query_heads * 128);
  pk::device_report report;
  pk::status s = pk::reference::compress(sample::last(data.k), sample::last(data.v), nullptr, parameters, pages,
                                         pk::page_table{nullptr, nullptr, num_pages}, report);
  require(s);
  // [attend]
  const std::vector<std::int32_t> seq_lens = {tokens}, query_start_loc = {0, 1};  // one sequence, one query token
  pk::cache_view cache;
  cache.pages = pages;
  cache.table.row_stride = num_pages;  // no ids: the sequence's pages are 0, 1, ...
  cache.seq_lens = seq_lens.data();
  cache.batch = 1;
  cache.max_seq_len = tokens;
  pk::attention_options options;
  options.softmax_scale = 1.0f / std::sqrt(128.0f);
  s = pk::reference::decode_attention(
      pk::make_input(queries, pk::dtype::float16, {1, query_heads, 128}), query_start_loc.data(), cache, parameters,
      pk::make_output(out.data(), pk::dtype::float32, {1, query_heads, 128}), {}, options, report);
  // [attend]
  require(s);
  CHECK(report.flags == 0);
  return out;
}

}  // namespace

TEST_CASE("documentation: a real cache is calibrated, compressed and attended to on the CPU") {
  const sample data;
  calibration c;
  require(calibrate(data, c));
  const pk::parameters<format>& parameters = c.parameters;
  std::vector<std::uint8_t> pool,
      raw_pool(std::size_t{num_pages} * kv_heads * (raw::key_tile_bytes + raw::value_tile_bytes));
  const pk::pages_view pages = pages_of(pool);
  const pk::input_view<4> keys = sample::last(data.k), values = sample::last(data.v);
  // [compress]
  pk::device_report report;  // what was found in the data, for instance elements that are not finite
  pk::page_table table;
  table.row_stride = num_pages;  // no ids: sequence b has the pages b * num_pages, b * num_pages + 1, ...
  const pk::status s = pk::reference::compress(keys, values, nullptr, parameters, pages, table, report);
  // [compress]
  require(s);
  CHECK(report.flags == 0);

  pk::pages_view raw_pages = pages;
  raw_pages.key_data = raw_pool.data();
  raw_pages.value_data = raw_pool.data() + raw::key_tile_bytes;
  raw_pages.key_head_stride = raw_pages.value_head_stride = raw::key_tile_bytes + raw::value_tile_bytes;
  raw_pages.key_page_stride = raw_pages.value_page_stride = kv_heads * raw_pages.key_head_stride;
  const double error =
      mean_error(attention(parameters, pages, data), attention(pk::parameters<raw>{}, raw_pages, data));
  INFO("error " << error);
  CHECK(error > 0.0);
  CHECK(error < 0.3);  // no sinks and no ring
}

TEST_CASE("documentation: a rank of a tensor-parallel group codes its KV heads as the whole model does") {
  const sample data;
  calibration c;
  require(calibrate(data, c));
  const pk::parameters<format>& parameters = c.parameters;
  const int first = 1;
  // [shard]
  // Arrays are [kv_heads, ...]: a rank that has the KV heads from `first` on begins at their rows.
  pk::parameters<format> shard = parameters;
  shard.key.basis += first * 128 * 128;
  shard.key.basis_inverse += first * 128 * 128;
  shard.key.column_scale += first * 128;
  shard.key.channel_offset += first * 128;
  shard.key.leading_scale += first * format::key().leading;
  shard.value.column_scale += first * 128;
  // [shard]
  std::vector<std::uint8_t> all_pool, shard_pool;
  const pk::pages_view all = pages_of(all_pool);
  pk::pages_view mine = pages_of(shard_pool);
  mine.kv_heads = 1;
  pk::page_table table;
  table.row_stride = num_pages;
  pk::device_report report;
  auto keys = sample::last(data.k), values = sample::last(data.v);
  require(pk::reference::compress(keys, values, nullptr, parameters, all, table, report));
  for (auto* x : {&keys, &values}) {
    x->data = static_cast<const char*>(x->data) + first * x->stride[1];
    x->extent[1] = 1;
  }
  require(pk::reference::compress(keys, values, nullptr, shard, mine, table, report));
  for (int page = 0; page < num_pages; ++page) {
    CHECK(std::memcmp(pk::key_tile(all, format::key(), page, first, 0), pk::key_tile(mine, format::key(), page, 0, 0),
                      format::key_tile_bytes) == 0);
    CHECK(std::memcmp(pk::value_tile(all, format::value(), page, first, 0),
                      pk::value_tile(mine, format::value(), page, 0, 0), format::value_tile_bytes) == 0);
  }
}

TEST_CASE("documentation: a page goes to another tier and comes back as a blob") {
  const sample data;
  calibration c;
  require(calibrate(data, c));
  const pk::parameters<format>& parameters = c.parameters;
  std::vector<std::uint8_t> pool, other_pool;
  const pk::pages_view pages = pages_of(pool), other_pages = pages_of(other_pool);
  for (std::size_t i = 0; i < pool.size(); ++i) pool[i] = static_cast<std::uint8_t>(i * 7 + i / 256);
  const std::string weights = "model and revision";
  const int layer = 14, page = 3, other_page = 5;
  // [blob]
  pk::blob_id id;
  id.model = pk::hash64(weights.data(), static_cast<std::int64_t>(weights.size()));  // a name of the caller's
  id.parameters = pk::parameters_id(parameters, kv_heads);                           // reads the arrays: host memory
  id.layer = layer;
  std::vector<std::uint8_t> blob(pk::encoded_bytes(format{}, kv_heads * pages.tiles_per_page));
  pk::status s = pk::write_blob(format{}, id, pages, page, blob.data(), static_cast<std::int64_t>(blob.size()));
  // Elsewhere, into any page: refused, with nothing written, unless format, id, size and checksum are these.
  if (s) s = pk::read_blob(format{}, id, blob.data(), static_cast<std::int64_t>(blob.size()), other_pages, other_page);
  // [blob]
  require(s);
  const std::size_t page_bytes = static_cast<std::size_t>(pages.key_page_stride);
  CHECK(std::memcmp(pool.data() + page * page_bytes, other_pool.data() + other_page * page_bytes, page_bytes) == 0);
  blob[100] ^= 1;
  CHECK(pk::read_blob(format{}, id, blob.data(), static_cast<std::int64_t>(blob.size()), other_pages, 0).code ==
        pk::status_code::corrupt);
}
