// SPDX-License-Identifier: Apache-2.0
// More than 2^31 elements: a context of that many, and pages, scores and outputs that lie beyond 2^32 bytes.
#include <cstdio>

#include "fused_problem.hpp"

using namespace packkv_test;

namespace {

#if defined(PACKKV_SIMT_EXECUTOR)
constexpr int copies = 3, heads_in_memory = 2, pages_in_memory = 5;
constexpr bool small_shapes = false;
constexpr std::int64_t apart = std::int64_t{1} << 18;  ///< bytes between pages
#else
constexpr int heads_in_memory = 8, pages_in_memory = 61;
const bool small_shapes = small_tests;
constexpr int copies = 538;  ///< 2,100,352 tokens x 8 heads x 128 channels = 2,150,760,448 elements
constexpr std::int64_t apart = std::int64_t{64} << 20;
#endif

pk::output_view<3> with_stride(pk::output_view<3> v, std::int64_t first) {
  v.stride[0] = first;
  return v;
}

}  // namespace

TEST_CASE("fused decode over more than 2^31 elements: a context that repeats its pages") {
  constexpr int distinct = 61, kv_heads = 8, group = 4;
  random_source random(9700);
  test_cache<two_bit> cache(random, cache_shape{1, kv_heads, 64 * distinct, 1, pk::dtype::float16}, two_bit{});
  auto problem = plain_problem(random, cache, group, 1);
  auto expected = problem.reference();
  // Every page as often as every other: the same output, and a sum of weights that many times as large.
  for (float& lse : expected.lse) lse += static_cast<float>(std::log(static_cast<double>(copies)));

  std::vector<std::int32_t> table;
  for (int i = 0; i < distinct * copies; ++i) table.push_back(cache.table[static_cast<std::size_t>(i % distinct)]);
  for (std::size_t i = table.size() - 1; i > 0; --i)
    std::swap(table[i], table[static_cast<std::size_t>(random.between(0, static_cast<int>(i)))]);
  const device_array<std::int32_t> device_table(table), length(std::vector<std::int32_t>{distinct * copies * 64});
  const auto got =
      problem.device([&](const auto& q, const std::int32_t* starts, pk::cache_view view, const auto& parameters,
                         const auto& out, const auto& lse, const auto& options, const pk::exec& e) {
        view.table = {};
        view.table.pages = device_table.data();
        view.table.row_stride = static_cast<std::int64_t>(table.size());
        view.seq_lens = length.data();
        view.max_seq_len = distinct * copies * 64;
        return pk::decode_attention(q, starts, view, parameters, out, lse, options, e);
      });
  check_rows<two_bit>(got, expected);
  CHECK(cache.gpu_report().flags == 0);
}

TEST_CASE("more than 2^31 elements, all of them in memory, are coded, attended to and decoded") {
  constexpr int distinct = pages_in_memory, kv_heads = heads_in_memory, group = 4, period = 64 * distinct;
  const int repeated = small_shapes ? 20 : copies;
  const std::int64_t tokens = std::int64_t{period} * repeated, elements = tokens * kv_heads * 128;
  constexpr std::int64_t tile_bytes = two_bit::key_tile_bytes, page_bytes = kv_heads * tile_bytes;
  static_assert(two_bit::value_tile_bytes == tile_bytes, "one size of tiles for both sides");
  random_source random(9702);
  test_cache<two_bit> cache(random, cache_shape{1, kv_heads, period, 1, pk::dtype::float16}, two_bit{});
  auto problem = plain_problem(random, cache, group, 1);
  auto expected = problem.reference();
  for (float& lse : expected.lse) lse += static_cast<float>(std::log(static_cast<double>(repeated)));

  device_array<std::uint16_t> keys, values;
  device_array<std::uint8_t> key_pool, value_pool;
  try {
    for (auto* x : {&keys, &values}) *x = device_array<std::uint16_t>(static_cast<std::size_t>(elements));
    for (auto* x : {&key_pool, &value_pool})
      *x = device_array<std::uint8_t>(static_cast<std::size_t>(tokens / 64 * page_bytes));
  } catch (const std::runtime_error& error) {
    (void)cudaGetLastError();
    std::printf("SKIPPED: %lld elements of K and of V in 16 bits: %s\n", static_cast<long long>(elements),
                error.what());
    return;
  }
  // The cache's sequence again and again.
  const auto place = [&](auto& x, std::int64_t h, std::int64_t copy) {
    return x.data() + (h * tokens + copy * period) * 128;
  };
  for (std::int64_t h = 0; h < kv_heads; ++h)
    for (std::int64_t copy = 0; copy < repeated; ++copy)
      for (const bool key : {true, false}) {
        const auto from = (key ? cache.keys : cache.values).device();
        check_cuda(cudaMemcpy2D(place(key ? keys : values, h, copy), 128 * 2, pk::detail::address(from, 0, h, 0, 0),
                                static_cast<std::size_t>(from.stride[2]), 128 * 2, period, cudaMemcpyDeviceToDevice));
      }
  pk::pages_view pages;
  pages.key_data = key_pool.data();
  pages.value_data = value_pool.data();
  pages.key_head_stride = pages.value_head_stride = tile_bytes;
  pages.key_page_stride = pages.value_page_stride = page_bytes;
  pages.num_pages = static_cast<std::int32_t>(tokens / 64);
  pages.kv_heads = kv_heads;
  pk::page_table contiguous;
  contiguous.row_stride = tokens / 64;
  const auto keys_in = pk::make_input(keys.data(), pk::dtype::float16, {1, kv_heads, tokens, 128}),
             values_in = pk::make_input(values.data(), pk::dtype::float16, {1, kv_heads, tokens, 128});
  REQUIRE(pk::compress(keys_in, values_in, nullptr, cache.gpu_parameters(), pages, contiguous, cache.exec()));

  // Every tile is the reference's.
  const pk::pages_view few = cache.host_pages();
  const std::vector<std::uint8_t> all_keys = key_pool.host(), all_values = value_pool.host();
  int different = 0;
  for (std::int64_t p = 0; p < pages.num_pages; ++p)
    for (int h = 0; h < kv_heads; ++h) {
      const auto at = static_cast<std::size_t>(p * page_bytes + h * tile_bytes);
      std::uint32_t flags = 0;
      const std::int32_t id = pk::find_page(cache.host_table(), few.num_pages, 0, p % distinct, flags);
      different += std::memcmp(all_keys.data() + at, pk::detail::key_tile(few, two_bit::key(), id, h, 0),
                               static_cast<std::size_t>(tile_bytes)) != 0;
      different += std::memcmp(all_values.data() + at, pk::detail::value_tile(few, two_bit::value(), id, h, 0),
                               static_cast<std::size_t>(tile_bytes)) != 0;
    }
  CHECK(different == 0);

  const device_array<std::int32_t> length(std::vector<std::int32_t>{static_cast<std::int32_t>(tokens)});
  const auto got =
      problem.device([&](const auto& q, const std::int32_t* starts, pk::cache_view view, const auto& parameters,
                         const auto& out, const auto& lse, const auto& options, const pk::exec& e) {
        view.pages = pages;
        view.table = contiguous;
        view.seq_lens = length.data();
        view.max_seq_len = static_cast<std::int32_t>(tokens);
        return pk::decode_attention(q, starts, view, parameters, out, lse, options, e);
      });
  check_rows<two_bit>(got, expected);

  // Decoded over what was coded: every copy is the reference's.
  tensor_data k(random, pk::dtype::float16, 1, kv_heads, period, 128),
      v(random, pk::dtype::float16, 1, kv_heads, period, 128);
  REQUIRE(pk::reference::decompress(few, cache.host_table(), nullptr, cache.host_parameters(), as_output(k.host()),
                                    as_output(v.host()), cache.report));
  keys.poison();
  values.poison();
  REQUIRE(pk::decompress(pages, contiguous, nullptr, cache.gpu_parameters(), as_output(keys_in), as_output(values_in),
                         cache.exec()));
  std::vector<std::uint16_t> some(static_cast<std::size_t>(period) * 128);
  different = 0;
  for (std::int64_t h = 0; h < kv_heads; ++h)
    for (std::int64_t copy = 0; copy < repeated; ++copy)
      for (const bool key : {true, false}) {
        check_cuda(
            cudaMemcpy(some.data(), place(key ? keys : values, h, copy), 2 * some.size(), cudaMemcpyDeviceToHost));
        const auto one = (key ? k : v).host();
        for (std::int64_t t = 0; t < period; ++t)
          different += std::memcmp(some.data() + t * 128, pk::detail::address(one, 0, h, t, 0), 128 * 2) != 0;
      }
  CHECK(different == 0);
  CHECK(cache.gpu_report().flags == 0);
#if !defined(PACKKV_SIMT_EXECUTOR)
  std::printf("RECORD: %lld elements of K in memory, and as many of V\n", static_cast<long long>(elements));
#endif
}

TEST_CASE("pages, scores and outputs beyond 2^32 bytes are read and written where they are") {
  constexpr int kv_heads = 2, group = 3, batch = 2, tokens = 150, pages = 80;
  random_source random(9701);
  test_cache<two_bit> cache(random, cache_shape{batch, kv_heads, tokens, 1, pk::dtype::float16}, two_bit{});
  auto problem = plain_problem(random, cache, group, 1);
  const pk::pages_view from = cache.host_pages();
  pk::pages_view to = from;
  const auto key_bytes = static_cast<std::size_t>(two_bit::key_tile_bytes),
             value_bytes = static_cast<std::size_t>(two_bit::value_tile_bytes);
  std::uint8_t* pool = nullptr;
  const cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&pool), static_cast<std::size_t>(pages * apart));
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    std::printf("SKIPPED: %lld bytes of device memory: %s\n", static_cast<long long>(pages * apart),
                cudaGetErrorString(error));
    return;
  }
  to.key_data = pool;
  to.value_data = pool + apart / 2;
  to.key_page_stride = to.value_page_stride = apart;
  to.key_head_stride = two_bit::key_tile_bytes;
  to.value_head_stride = two_bit::value_tile_bytes;
  to.num_pages = pages;
  std::vector<std::int32_t> table = cache.table;
  for (auto& id : table) {
    const std::int32_t far = pages - 1 - id;
    for (int h = 0; h < kv_heads; ++h) {
      check_cuda(cudaMemcpy(pk::detail::key_tile(to, two_bit::key(), far, h, 0),
                            pk::detail::key_tile(from, two_bit::key(), id, h, 0), key_bytes, cudaMemcpyHostToDevice));
      check_cuda(cudaMemcpy(pk::detail::value_tile(to, two_bit::value(), far, h, 0),
                            pk::detail::value_tile(from, two_bit::value(), id, h, 0), value_bytes,
                            cudaMemcpyHostToDevice));
    }
    id = far;
  }
  const device_array<std::int32_t> device_table(table);
  const auto moved = [&](pk::cache_view view) {
    view.pages = to;
    view.table = {};
    view.table.pages = device_table.data();
    view.table.row_stride = pk::ceil_div(tokens, pk::tile_tokens);
    return view;
  };

  const auto near_pages = problem.device();
  const auto far_pages =
      problem.device([&](const auto& q, const std::int32_t* starts, const pk::cache_view& view, const auto&... rest) {
        return pk::decode_attention(q, starts, moved(view), rest...);
      });
  CHECK(far_pages.out == near_pages.out);
  CHECK(far_pages.lse == near_pages.lse);

  // GEMVs: the second sequence's scores and outputs lie 3/4 of the pool behind the first's, between K and V of a page.
  const std::int64_t heads = problem.heads(), far_row = pages / 4 * 3 * apart, first_row = apart / 4;
  const pk::input_view<3> queries = problem.query_view(true);
  const pk::exec plain = cache.exec();
  device_array<float> scores(static_cast<std::size_t>(batch * heads * tokens)),
      outputs(static_cast<std::size_t>(batch * heads * 128));
  auto* const floats = reinterpret_cast<float*>(pool + first_row);
  const pk::cache_view near_view = cache.gpu_cache(), far_view = moved(near_view);
  REQUIRE(pk::key_gemv(queries, near_view, cache.gpu_parameters(), 0.1f,
                       pk::make_output(scores.data(), pk::dtype::float32, {batch, heads, tokens}), plain));
  REQUIRE(pk::key_gemv(queries, far_view, cache.gpu_parameters(), 0.1f,
                       with_stride(pk::make_output(floats, pk::dtype::float32, {batch, heads, tokens}), far_row),
                       plain));
  const std::vector<float> near_scores = scores.host();
  const auto weights = pk::make_input(scores.data(), pk::dtype::float32, {batch, heads, tokens});
  const auto far_floats = [&](std::size_t count) {
    std::vector<float> x(2 * count);
    for (std::size_t b = 0; b < 2; ++b)
      check_cuda(cudaMemcpy(x.data() + b * count, pool + first_row + static_cast<std::int64_t>(b) * far_row, count * 4,
                            cudaMemcpyDeviceToHost));
    return x;
  };
  check_cuda(cudaDeviceSynchronize());
  CHECK(far_floats(static_cast<std::size_t>(heads * tokens)) == near_scores);
  device_array<std::uint8_t> workspace(
      static_cast<std::size_t>(pk::value_gemv_workspace_bytes<two_bit>({batch, kv_heads, heads, 1, tokens, 0})));
  pk::exec e = plain;
  e.workspace = workspace.data();
  e.workspace_bytes = workspace.size();
  REQUIRE(pk::initialize_workspace(e));
  REQUIRE(pk::value_gemv(weights, near_view, cache.gpu_parameters(),
                         pk::make_output(outputs.data(), pk::dtype::float32, {batch, heads, 128}), e));
  REQUIRE(pk::value_gemv(weights, far_view, cache.gpu_parameters(),
                         with_stride(pk::make_output(floats, pk::dtype::float32, {batch, heads, 128}), far_row), e));
  const std::vector<float> near_outputs = outputs.host();
  CHECK(far_floats(static_cast<std::size_t>(heads * 128)) == near_outputs);
  CHECK(cache.gpu_report().flags == 0);
  check_cuda(cudaFree(pool));
}
