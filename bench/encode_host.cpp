// SPDX-License-Identifier: Apache-2.0
// Speed of the CPU encoder and decoder on Gaussian data: bytes are 16-bit input bytes (encode) or output bytes
// (decode).
#include <benchmark/benchmark.h>

#include <cstdint>
#include <memory>
#include <packkv/packkv.hpp>
#include <vector>

#include "../tests/support/random.hpp"

namespace pk = packkv;

namespace {

constexpr int dim = 128, kv_heads = 2, tokens = 2048;
constexpr std::int64_t input_bytes = std::int64_t{2} * 2 * kv_heads * tokens * dim;

using two_bit = pk::cache_format<pk::key_codec<dim, pk::identity, pk::rms_scale, pk::plan<2, 2, 2, 2>>,
                                 pk::value_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>>;
using mixed = pk::cache_format<pk::key_codec<dim, pk::identity, pk::rms_scale, pk::plan<4, 3, 2, 1>>,
                               pk::value_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<3, 3, 2, 2, 2, 2, 1, 1>>>;
using fp8 = pk::cache_format<pk::fp8_codec<dim>, pk::fp8_codec<dim>>;

template <class Format>
struct host_cache {
  std::vector<std::uint16_t> keys, values;
  std::vector<std::uint32_t> memory;  // aligned words
  pk::pages_view pages;
  pk::page_table table;
  pk::device_report report;

  host_cache()
      : keys(kv_heads * tokens * dim),
        values(keys.size()),
        memory(kv_heads * (tokens / 64) * (Format::key_tile_bytes + Format::value_tile_bytes) / 4 + 4) {
    packkv_test::random_source random(1);
    for (auto& x : keys) x = pk::float_to_half(random.normal());
    for (auto& x : values) x = pk::float_to_half(random.normal());
    void* p = memory.data();
    std::size_t space = memory.size() * 4;
    auto* base = static_cast<std::uint8_t*>(std::align(16, space - 16, p, space));
    pages.num_pages = tokens / 64;
    pages.kv_heads = kv_heads;
    pages.key_head_stride = pages.value_head_stride = Format::key_tile_bytes + Format::value_tile_bytes;
    pages.key_page_stride = pages.value_page_stride = kv_heads * pages.key_head_stride;
    pages.key_data = base;
    pages.value_data = base + Format::key_tile_bytes;
    table.row_stride = pages.num_pages;
  }
  pk::status encode() {
    return pk::reference::compress(pk::make_input(keys.data(), pk::dtype::float16, {1, kv_heads, tokens, dim}),
                                   pk::make_input(values.data(), pk::dtype::float16, {1, kv_heads, tokens, dim}),
                                   nullptr, pk::parameters<Format>{}, pages, table, report);
  }
  pk::status decode() {
    return pk::reference::decompress(pages, table, nullptr, pk::parameters<Format>{},
                                     pk::make_output(keys.data(), pk::dtype::float16, {1, kv_heads, tokens, dim}),
                                     pk::make_output(values.data(), pk::dtype::float16, {1, kv_heads, tokens, dim}),
                                     report);
  }
};

template <class Format>
void encode(benchmark::State& state) {
  host_cache<Format> cache;
  for (auto _ : state)
    if (!cache.encode()) state.SkipWithError("compress was refused");
  state.SetBytesProcessed(state.iterations() * input_bytes);
}
template <class Format>
void decode(benchmark::State& state) {
  host_cache<Format> cache;
  if (!cache.encode()) state.SkipWithError("compress was refused");
  for (auto _ : state)
    if (!cache.decode()) state.SkipWithError("decompress was refused");
  state.SetBytesProcessed(state.iterations() * input_bytes);
}

/// PackKV on 4096 tokens x 8 KV heads x 128 channels: quantise by token, order, pack.
struct packed_cache {
  static constexpr int heads = 8, length = 4096;
  static constexpr std::int64_t bytes = std::int64_t{2} * 2 * heads * length * dim, blocks = length / 64;
  struct one_side {
    std::vector<pk::pack_range> ranges;
    std::vector<std::int64_t> offsets;
    std::vector<std::uint32_t> memory;
    pk::pack_side view;

    one_side(const pk::pack_format& f, pk::side which)
        : ranges(blocks * pk::range_count(f, which)),
          offsets(pk::tile_count(f, blocks) + 1),
          memory(pk::max_pack_bytes(f, which, blocks) / 4 + 4) {
      void* p = memory.data();
      std::size_t space = memory.size() * 4;
      view = {ranges.data(), offsets.data(), static_cast<std::uint8_t*>(std::align(16, space - 16, p, space)),
              pk::max_pack_bytes(f, which, blocks)};
    }
    pk::const_pack_side read() const { return {view.ranges, view.offsets, view.data, offsets.back()}; }
  };
  pk::pack_format format;
  std::vector<std::uint16_t> keys, values;
  one_side key, value;
  pk::pack_report report;

  static pk::pack_format make_format(pk::token_order order) {
    pk::pack_format f;
    f.order = order;
    f.kv_heads = heads;
    return f;
  }
  explicit packed_cache(pk::token_order order)
      : format(make_format(order)),
        keys(heads * length * dim),
        values(keys.size()),
        key(format, pk::side::key),
        value(format, pk::side::value) {
    packkv_test::random_source random(1);
    for (auto& x : keys) x = pk::float_to_half(random.normal());
    for (auto& x : values) x = pk::float_to_half(random.normal());
  }
  pk::status encode() {
    return pk::reference::compress(format, pk::make_input(keys.data(), pk::dtype::float16, {1, heads, length, dim}),
                                   pk::make_input(values.data(), pk::dtype::float16, {1, heads, length, dim}), blocks,
                                   key.view, value.view, nullptr, report);
  }
  pk::status decode() {
    return pk::reference::decompress(format, {key.read(), value.read(), blocks},
                                     pk::make_output(keys.data(), pk::dtype::float16, {1, heads, length, dim}),
                                     pk::make_output(values.data(), pk::dtype::float16, {1, heads, length, dim}));
  }
};

template <pk::token_order Order>
void encode_packs(benchmark::State& state) {
  packed_cache cache(Order);
  for (auto _ : state)
    if (!cache.encode()) state.SkipWithError("compress was refused");
  state.SetBytesProcessed(state.iterations() * packed_cache::bytes);
}
void decode_packs(benchmark::State& state) {
  packed_cache cache(pk::token_order::none);
  if (!cache.encode()) state.SkipWithError("compress was refused");
  for (auto _ : state)
    if (!cache.decode()) state.SkipWithError("decompress was refused");
  state.SetBytesProcessed(state.iterations() * packed_cache::bytes);
}

/// One side of 2048 tokens x 2 KV heads x 128 channels in a format of groups.
struct grouped_cache {
  static constexpr std::int64_t bytes = input_bytes / 2;
  std::vector<std::uint16_t> elements;
  std::vector<std::uint32_t> memory;
  std::vector<std::int64_t> offsets;
  pk::device_report report;

  explicit grouped_cache(std::int64_t size)
      : elements(kv_heads * tokens * dim),
        memory(static_cast<std::size_t>(size) / 4 + 4),
        offsets(kv_heads * tokens / 64 + 1) {
    packkv_test::random_source random(1);
    for (auto& x : elements) x = pk::float_to_half(random.normal());
  }
  std::uint8_t* data() {
    void* p = memory.data();
    std::size_t space = memory.size() * 4;
    return static_cast<std::uint8_t*>(std::align(16, space - 16, p, space));
  }
  pk::input_view<3> in() const { return pk::make_input(elements.data(), pk::dtype::float16, {kv_heads, tokens, dim}); }
  pk::output_view<3> out() { return pk::make_output(elements.data(), pk::dtype::float16, {kv_heads, tokens, dim}); }
};

constexpr pk::grouped_spec kivi_keys = pk::kivi_keys(dim, 2);
constexpr pk::grouped_spec vector_values = pk::make_grouped(pk::side::value, dim, pk::group_axis::vector, dim, 2,
                                                            pk::step_rule::min_max, pk::transform_kind::hadamard);
constexpr pk::adaptive_spec strip_keys = pk::make_adaptive(pk::side::key, dim, pk::group_axis::token, 0.1f);
constexpr pk::adaptive_spec strip_values =
    pk::make_adaptive(pk::side::value, dim, pk::group_axis::vector, 0.1f, pk::transform_kind::hadamard);

template <const pk::grouped_spec& Spec>
void encode_grouped(benchmark::State& state) {
  pk::grouped_layout layout;
  if (!pk::make_grouped_layout(Spec, kv_heads, tokens, 0, layout)) state.SkipWithError("the spec was refused");
  grouped_cache cache(layout.total_bytes);
  for (auto _ : state)
    if (!pk::reference::encode_grouped(Spec, cache.in(), 0, cache.data(), layout.total_bytes, cache.report))
      state.SkipWithError("encode_grouped was refused");
  state.SetBytesProcessed(state.iterations() * grouped_cache::bytes);
}
template <const pk::grouped_spec& Spec>
void decode_grouped(benchmark::State& state) {
  pk::grouped_layout layout;
  if (!pk::make_grouped_layout(Spec, kv_heads, tokens, 0, layout)) state.SkipWithError("the spec was refused");
  grouped_cache cache(layout.total_bytes);
  if (!pk::reference::encode_grouped(Spec, cache.in(), 0, cache.data(), layout.total_bytes, cache.report))
    state.SkipWithError("encode_grouped was refused");
  for (auto _ : state)
    if (!pk::reference::decode_grouped(Spec, cache.data(), layout.total_bytes, 0, cache.out()))
      state.SkipWithError("decode_grouped was refused");
  state.SetBytesProcessed(state.iterations() * grouped_cache::bytes);
}
template <const pk::adaptive_spec& Spec>
void encode_adaptive(benchmark::State& state) {
  pk::adaptive_layout layout;
  if (!pk::make_adaptive_layout(Spec, kv_heads, tokens, 0, layout)) state.SkipWithError("the spec was refused");
  grouped_cache cache(layout.max_bytes);
  for (auto _ : state)
    if (!pk::reference::encode_adaptive(Spec, cache.in(), 0, cache.data(), layout.max_bytes, cache.offsets.data(),
                                        cache.report))
      state.SkipWithError("encode_adaptive was refused");
  state.SetBytesProcessed(state.iterations() * grouped_cache::bytes);
}
template <const pk::adaptive_spec& Spec>
void decode_adaptive(benchmark::State& state) {
  pk::adaptive_layout layout;
  if (!pk::make_adaptive_layout(Spec, kv_heads, tokens, 0, layout)) state.SkipWithError("the spec was refused");
  grouped_cache cache(layout.max_bytes);
  if (!pk::reference::encode_adaptive(Spec, cache.in(), 0, cache.data(), layout.max_bytes, cache.offsets.data(),
                                      cache.report))
    state.SkipWithError("encode_adaptive was refused");
  for (auto _ : state)
    if (!pk::reference::decode_adaptive(Spec, cache.data(), cache.offsets.back(), cache.offsets.data(), 0, cache.out()))
      state.SkipWithError("decode_adaptive was refused");
  state.SetBytesProcessed(state.iterations() * grouped_cache::bytes);
}

BENCHMARK_TEMPLATE(encode, two_bit)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(encode, mixed)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(encode, fp8)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(decode, two_bit)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(decode, mixed)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(encode_packs, pk::token_order::none)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(encode_packs, pk::token_order::median)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(encode_packs, pk::token_order::greedy)->Unit(benchmark::kMillisecond);
BENCHMARK(decode_packs)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(encode_grouped, kivi_keys)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(encode_grouped, vector_values)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(decode_grouped, kivi_keys)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(decode_grouped, vector_values)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(encode_adaptive, strip_keys)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(encode_adaptive, strip_values)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(decode_adaptive, strip_keys)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(decode_adaptive, strip_values)->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
