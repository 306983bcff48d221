// SPDX-License-Identifier: Apache-2.0
// What only a real device can show: CUDA graphs, several streams, failing launches.
#if !defined(PACKKV_SIMT_EXECUTOR)
#include "../support/catch.hpp"
#include "test_cache.hpp"

using namespace packkv_test;

namespace {

using format = pk::cache_format<pk::key_codec<128, pk::hadamard, pk::rms_scale, pk::plan<4, 3, 2, 2>>,
                                pk::value_codec<128, pk::hadamard, pk::rms_scale, pk::plan<3, 3, 2, 2, 2, 2, 2, 1>>>;

}  // namespace

TEST_CASE("a captured decode step stores a token and attends, with lengths that change between replays") {
  random_source random(3);
  constexpr int batch = 2, kv_heads = 2, group = 4, start = 60, steps = 80, dim = 128;
  cache_shape shape{batch, kv_heads, start + steps, 1, pk::dtype::float16};
  test_cache cache(random, shape, format{});
  cache.lengths = {start, start - 7};
  cache.fill();

  const std::int64_t heads = kv_heads * group;
  tensor_data queries(random, pk::dtype::float16, 1, batch, heads, dim);
  const auto all = queries.device();
  pk::input_view<3> q;
  q.data = all.data;
  for (int i = 0; i < 3; ++i) {
    q.extent[i] = all.extent[i + 1];
    q.stride[i] = all.stride[i + 1];
  }
  device_array<std::int32_t> query_start(std::vector<std::int32_t>{0, 1, 2});
  device_array<std::int64_t> slots(batch);
  device_array<std::uint16_t> new_keys(batch * kv_heads * dim), new_values(batch * kv_heads * dim);
  device_array<float> out(static_cast<std::size_t>(batch * heads * dim)), lse(static_cast<std::size_t>(batch * heads));
  pk::attention_options options;
  options.softmax_scale = 0.09f;
  options.base = pk::lse_base::e;
  options.splits = 3;
  device_array<std::uint8_t> workspace(
      static_cast<std::size_t>(pk::decode_workspace_bytes<format>({batch, kv_heads, heads, 1, shape.max_tokens, 3})));
  cudaStream_t stream;
  check_cuda(cudaStreamCreate(&stream));
  const pk::exec e{stream, workspace.data(), workspace.size(), cache.device_report.data()};
  REQUIRE(pk::initialize_workspace(e));
  const auto keys_in = pk::make_input(new_keys.data(), pk::dtype::float16, {batch, kv_heads, dim});
  const auto values_in = pk::make_input(new_values.data(), pk::dtype::float16, {batch, kv_heads, dim});
  const auto out_view = pk::make_output(out.data(), pk::dtype::float32, {batch, heads, dim});
  const auto lse_view = pk::make_output(lse.data(), pk::dtype::float32, {batch, heads});

  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  REQUIRE(pk::store_tokens(keys_in, values_in, slots.data(), cache.gpu_parameters(), cache.gpu_pages(), e));
  REQUIRE(pk::decode_attention(q, query_start.data(), cache.gpu_cache(), cache.gpu_parameters(), out_view, lse_view,
                               options, e));
  check_cuda(cudaStreamEndCapture(stream, &graph));
  check_cuda(cudaGraphInstantiate(&replay, graph, 0));

  for (int step = 0; step < steps; ++step) {
    std::vector<std::int64_t> slot(batch);
    std::vector<std::uint16_t> k, v;
    for (int b = 0; b < batch; ++b) {
      const int t = cache.lengths[static_cast<std::size_t>(b)]++;
      const auto table = cache.host_table();
      std::uint32_t flags = 0;
      slot[static_cast<std::size_t>(b)] =
          static_cast<std::int64_t>(pk::find_page(table, cache.host_pages().num_pages, b, t / 64, flags)) * 64 + t % 64;
      for (int h = 0; h < kv_heads; ++h)
        for (int c = 0; c < dim; ++c) {
          k.push_back(*static_cast<const std::uint16_t*>(pk::detail::address(cache.keys.host(), b, h, t, c)));
          v.push_back(*static_cast<const std::uint16_t*>(pk::detail::address(cache.values.host(), b, h, t, c)));
        }
    }
    slots.assign(slot);
    new_keys.assign(k);
    new_values.assign(v);
    cache.device_lengths.assign(cache.lengths);
    check_cuda(cudaGraphLaunch(replay, stream));
    const std::vector<float> got = out.host();
    if (step % 16 == 15) {
      cache.report = {};
      REQUIRE(cache.compress_reference());
      std::vector<float> expected(got.size());
      std::vector<std::int32_t> host_start{0, 1, 2};
      auto host_q = q;
      host_q.data = queries.host_bits.data();
      REQUIRE(pk::reference::decode_attention(host_q, host_start.data(), cache.host_cache(), cache.host_parameters(),
                                              pk::make_output(expected.data(), pk::dtype::float32, {batch, heads, dim}),
                                              {}, options, cache.report));
      CHECK(worst_row_error(got, expected, dim) < 2e-3);  // the fused kernel: q in 16 bits, weights in halves
    }
  }
  // The same state again and again: the same bits.
  const std::vector<float> first = out.host();
  int different = 0;
  for (int i = 0; i < 1000; ++i) {
    check_cuda(cudaGraphLaunch(replay, stream));
    const std::vector<float> again = out.host();
    different += std::memcmp(first.data(), again.data(), first.size() * 4) != 0;
  }
  CHECK(different == 0);
  CHECK(cache.gpu_report().flags == 0);
  check_cuda(cudaGraphExecDestroy(replay));
  check_cuda(cudaGraphDestroy(graph));
  check_cuda(cudaStreamDestroy(stream));
}

// Tagged, because compute-sanitizer counts the refused launch as an error of ours.
TEST_CASE("a launch that the runtime refuses is a status, and the next call works", "[refused-launch]") {
  const auto too_many_threads =
      pk::detail::launch(pk::kernel::merge_states<128>, dim3(1), 4096, nullptr, pk::kernel::merge_args{});
  CHECK(too_many_threads.code == pk::status_code::cuda_error);
  CHECK(cudaGetLastError() == cudaSuccess);
  device_array<std::uint8_t> workspace(static_cast<std::size_t>(pk::detail::workspace_counter_bytes));
  CHECK(pk::initialize_workspace(pk::exec{nullptr, workspace.data(), workspace.size(), nullptr}));
}
#endif
