// SPDX-License-Identifier: Apache-2.0
// What only a real device can show: CUDA graphs, several streams, failing launches.
#if !defined(PACKKV_SIMT_EXECUTOR)
#include <cstdio>
#include <memory>
#include <thread>

#include "decode_problem.hpp"

using namespace packkv_test;

namespace {

using format = pk::cache_format<pk::key_codec<128, pk::hadamard, pk::rms_scale, pk::plan<4, 3, 2, 2>>,
                                pk::value_codec<128, pk::hadamard, pk::rms_scale, pk::plan<3, 3, 2, 2, 2, 2, 2, 1>>>;

/// A cache and the calls on it in one stream, with memory of their own.
class stream_job {
 public:
  explicit stream_job(std::uint64_t seed)
      : random_(seed), cache_(random_, drawn_shape(), format{}), problem_(random_, cache_, random_.between(1, 6)) {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    cache_.fill();
    const auto batch = static_cast<std::size_t>(cache_.shape.batch), heads = static_cast<std::size_t>(problem_.heads()),
               tokens = static_cast<std::size_t>(cache_.shape.max_tokens);
    out_ = device_array<float>(static_cast<std::size_t>(problem_.tokens) * heads * 128);
    lse_ = device_array<float>(static_cast<std::size_t>(problem_.tokens) * heads);
    scores_ = device_array<float>(batch * heads * tokens);
    sums_ = device_array<float>(batch * heads * 128);
    one_query_ = tensor_data(random_, pk::dtype::float16, 1, cache_.shape.batch, problem_.heads(), 128);
    weights_ =
        tensor_data(random_, pk::dtype::float16, 1, cache_.shape.batch, problem_.heads(), cache_.shape.max_tokens);
    workspace_ = device_array<std::uint8_t>(static_cast<std::size_t>(
        std::max(problem_.workspace_bytes(),
                 pk::value_gemv_workspace_bytes<format>(
                     {cache_.shape.batch, cache_.shape.kv_heads, problem_.heads(), 1, cache_.shape.max_tokens, 0}))));
    if (const pk::status s = pk::initialize_workspace(exec()); !s) throw std::runtime_error(s.message);
    forget();
  }
  stream_job(const stream_job&) = delete;
  ~stream_job() { (void)cudaStreamDestroy(stream_); }

  /// Enqueues everything: pages from 16 bits, attention, GEMVs. Nothing here may wait.
  pk::status enqueue() {
    const pk::exec e = exec();
    const std::int64_t batch = cache_.shape.batch, heads = problem_.heads(), tokens = cache_.shape.max_tokens;
    pk::status s = pk::compress(cache_.keys.device(), cache_.values.device(), cache_.device_lengths.data(),
                                cache_.gpu_parameters(), cache_.gpu_pages(), cache_.gpu_table(), e);
    if (s)
      s = pk::decode_attention(problem_.query_view(true), problem_.device_query_start.data(), problem_.view(true),
                               cache_.gpu_parameters(), problem_.out_view(out_.data()), problem_.lse_view(lse_.data()),
                               problem_.with_arrays(true), e);
    if (s)
      s = pk::key_gemv(sequence(one_query_.device()), cache_.gpu_cache(), cache_.gpu_parameters(), 0.1f,
                       pk::make_output(scores_.data(), pk::dtype::float32, {batch, heads, tokens}), e);
    if (s)
      s = pk::value_gemv(sequence(weights_.device()), cache_.gpu_cache(), cache_.gpu_parameters(),
                         pk::make_output(sums_.data(), pk::dtype::float32, {batch, heads, 128}), e);
    return s;
  }
  /// Pages and outputs as if nothing had been computed.
  void forget() {
    cache_.device_pages.poison();
    for (device_array<float>* x : {&out_, &lse_, &scores_, &sums_}) x->poison();
    check_cuda(cudaDeviceSynchronize());
  }
  /// What has been computed so far, bit for bit.
  std::vector<std::uint8_t> bits() const {
    std::vector<std::uint8_t> all;
    for (const device_array<float>* x : {&out_, &lse_, &scores_, &sums_}) {
      const std::vector<float> host = x->host();
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(host.data());
      all.insert(all.end(), bytes, bytes + 4 * host.size());
    }
    return all;
  }
  bool pages_are_the_references() { return cache_.device_pages.host() == cache_.pages; }

 private:
  cache_shape drawn_shape() {
    cache_shape s = random_shape(random_, most_tokens);
    s.batch += 2;
    return s;
  }
  pk::exec exec() { return {stream_, workspace_.data(), workspace_.size(), cache_.device_report.data()}; }

  random_source random_;
  test_cache<format> cache_;
  decode_problem<format> problem_;
  cudaStream_t stream_ = nullptr;
  tensor_data one_query_, weights_;
  device_array<float> out_, lse_, scores_, sums_;
  device_array<std::uint8_t> workspace_;
};

}  // namespace

TEST_CASE("sixteen streams, from one thread and from sixteen, give the bits of one after the other") {
  constexpr int streams = 16;
  const int rounds = small_tests ? 1 : 50;  // racecheck keeps gigabytes for each, until the device is waited for
  std::vector<std::unique_ptr<stream_job>> jobs;
  std::vector<std::vector<std::uint8_t>> expected;
  for (int i = 0; i < streams; ++i) {
    jobs.push_back(std::make_unique<stream_job>(3100 + static_cast<std::uint64_t>(i)));
    REQUIRE(jobs.back()->enqueue());
    expected.push_back(jobs.back()->bits());
    CHECK(jobs.back()->pages_are_the_references());
    jobs.back()->forget();
  }
  const auto check = [&] {
    for (std::size_t i = 0; i < streams; ++i) {
      CHECK((jobs[i]->bits() == expected[i]));
      CHECK(jobs[i]->pages_are_the_references());
      jobs[i]->forget();
    }
  };
  int refused = 0;
  for (int round = 0; round < rounds; ++round)
    for (auto& job : jobs) refused += !job->enqueue();
  check();

  std::vector<int> refused_by(streams);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < streams; ++i)
    threads.emplace_back([&, i] {
      for (int round = 0; round < rounds; ++round) refused_by[i] += !jobs[i]->enqueue();
    });
  for (auto& thread : threads) thread.join();
  for (const int n : refused_by) refused += n;
  check();
  CHECK(refused == 0);
  std::printf("RECORD: %d streams, %d rounds from one thread and %d from as many\n", streams, rounds, rounds);
}

TEST_CASE("a thousand replays of a graph, with other lengths and pages each time, give the bits of direct calls") {
  random_source random(17);
  constexpr int batch = 3, kv_heads = 2, group = 4, tokens = 700, replays = 1000;
  test_cache cache(random, cache_shape{batch, kv_heads, tokens, 1, pk::dtype::float16}, format{});
  cache.fill();
  const std::int64_t heads = kv_heads * group;
  const tensor_data queries(random, pk::dtype::float16, 1, batch, heads, 128);
  const device_array<std::int32_t> query_start(std::vector<std::int32_t>{0, 1, 2, 3});
  const std::vector<std::int32_t> ids = cache.table;
  const auto count = static_cast<std::size_t>(batch * heads * 128);
  device_array<float> out(count), direct(count);
  pk::attention_options options;
  options.softmax_scale = 0.09f;
  device_array<std::uint8_t> workspace(
      static_cast<std::size_t>(pk::decode_workspace_bytes<format>({batch, kv_heads, heads, 1, tokens, 0})));
  cudaStream_t stream;
  check_cuda(cudaStreamCreate(&stream));
  const pk::exec e{stream, workspace.data(), workspace.size(), cache.device_report.data()};
  REQUIRE(pk::initialize_workspace(e));
  const auto call = [&](float* to) {
    pk::cache_view view = cache.gpu_cache();
    view.table = {};
    view.table.pages = cache.device_table.data();
    view.table.row_stride = static_cast<std::int64_t>(ids.size()) / batch;
    return pk::decode_attention(sequence(queries.device()), query_start.data(), view, cache.gpu_parameters(),
                                pk::make_output(to, pk::dtype::float32, {batch, heads, 128}), {}, options, e);
  };
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  REQUIRE(call(out.data()));
  check_cuda(cudaStreamEndCapture(stream, &graph));
  check_cuda(cudaGraphInstantiate(&replay, graph, 0));
  const int most = small_tests ? 50 : replays;
  int different = 0, empty = 0;
  for (int i = 0; i < most; ++i) {
    for (auto& length : cache.lengths) {
      length = random.one_in(8) ? 0 : random.between(1, tokens);
      empty += length == 0;
    }
    for (auto& id : cache.table)
      id = ids[static_cast<std::size_t>(random.between(0, static_cast<int>(ids.size()) - 1))];
    cache.device_lengths.assign(cache.lengths);
    cache.device_table.assign(cache.table);
    out.poison();
    check_cuda(cudaGraphLaunch(replay, stream));
    REQUIRE(call(direct.data()));
    const std::vector<float> a = out.host(), b = direct.host();
    different += std::memcmp(a.data(), b.data(), 4 * count) != 0;
  }
  CHECK(different == 0);
  CHECK(empty > 0);
  CHECK(cache.gpu_report().flags == 0);
  std::printf("RECORD: %d replays with other lengths and pages each time\n", most);
  check_cuda(cudaGraphExecDestroy(replay));
  check_cuda(cudaGraphDestroy(graph));
  check_cuda(cudaStreamDestroy(stream));
}

TEST_CASE("a captured decode step stores a token and attends, with lengths that change between replays") {
  random_source random(3);
  constexpr int batch = 2, kv_heads = 2, group = 4, start = 60, steps = 80, dim = 128;
  cache_shape shape{batch, kv_heads, start + steps, 1, pk::dtype::float16};
  test_cache cache(random, shape, format{});
  cache.lengths = {start, start - 7};
  cache.fill();

  const std::int64_t heads = kv_heads * group;
  tensor_data queries(random, pk::dtype::float16, 1, batch, heads, dim);
  const pk::input_view<3> q = sequence(queries.device());
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
  for (int i = 0; i < (small_tests ? 20 : 1000); ++i) {
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

namespace {

void read_new_tokens_from_ring(decode_problem<format>& problem, random_source& random, int window) {
  problem.options.window = 0;
  problem.options.position_stride = 1;
  problem.options.position_offset = 0;
  problem.with_kv_begin = problem.with_context = false;
  problem.sinks = 0;
  problem.set_ring(random, window);
}
/// As the fast encoders take K and V.
template <class Format>
void take_away_padding(test_cache<Format>& cache) {
  for (tensor_data* x : {&cache.keys, &cache.values}) {
    x->pad = 0;
    x->host_bits.resize(static_cast<std::size_t>(x->rows * x->heads * x->tokens * x->dim));
    x->device_bits = device_array<std::uint16_t>(x->host_bits);
  }
}

/// Stores the last token of each sequence again and again beside attention that reads it from a ring of `window`
/// tokens, in another stream or behind it in its own. With a ring of less than a tile attention reads others of the
/// same tile.
void check_store_beside_attention(int window, bool same_stream) {
  INFO("window " << window << ", same stream " << same_stream);
  random_source random(4);
  cache_shape shape{5, 2, 700, 1, pk::dtype::float16};
  test_cache cache(random, shape, format{});
  cache.fill();
  decode_problem problem(random, cache, 4, 1);
  read_new_tokens_from_ring(problem, random, window);
  const std::vector<float> expected = problem.device().out;

  // The last token of each sequence, from its own tensors (number `batch`) or from others, and its slot.
  const pk::page_table table = cache.host_table();
  std::uint32_t flags = 0;
  std::vector<std::int64_t> slot;
  for (int b = 0; b < shape.batch; ++b) {
    const int t = cache.lengths[static_cast<std::size_t>(b)] - 1;
    const std::int32_t page = t < 0 ? -1 : pk::find_page(table, cache.host_pages().num_pages, b, t / 64, flags);
    slot.push_back(page < 0 ? -1 : std::int64_t{page} * 64 + t % 64);
  }
  REQUIRE(std::count_if(slot.begin(), slot.end(), [](std::int64_t at) { return at >= 0; }) > 2);
  const device_array<std::int64_t> slots(slot);
  const auto token_of = [](const pk::input_view<4>& all, int b, int t) {
    pk::input_view<3> x = one_by_one(all);
    x.data = static_cast<const char*>(all.data) + b * all.stride[0] + t * all.stride[2];
    x.extent[0] = 1;
    return x;
  };
  cudaStream_t stream, side;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check_cuda(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
  const auto store = [&](int b, int t) {
    pk::exec e = cache.exec();
    e.stream = same_stream ? stream : side;
    e.beside_previous = same_stream;
    return pk::store_tokens(token_of(cache.keys.device(), b, t), token_of(cache.values.device(), b, t),
                            slots.data() + b, cache.gpu_parameters(), cache.gpu_pages(), e);
  };

  device_array<float> out(expected.size());
  device_array<float> lse(static_cast<std::size_t>(problem.tokens * problem.heads()));
  device_array<std::uint8_t> workspace = problem.decode_workspace();
  check_cuda(cudaDeviceSynchronize());  // its poison must not come behind what follows in another stream
  const pk::exec e{stream, workspace.data(), workspace.size(), cache.device_report.data()};
  REQUIRE(pk::initialize_workspace(e));
  int different = 0;
  const int rounds = small_tests ? 10 : 200;
  for (int round = 0; round < rounds; ++round) {
    out.assign(std::vector<float>(expected.size(), 7.0f));
    check_cuda(cudaDeviceSynchronize());
    for (int b = 0; b < shape.batch; ++b) REQUIRE(store(b, (round * 37 + b) % shape.max_tokens));
    REQUIRE(pk::decode_attention(problem.query_view(true), problem.device_query_start.data(), problem.view(true),
                                 cache.gpu_parameters(), problem.out_view(out.data()), problem.lse_view(lse.data()),
                                 problem.with_arrays(true), e));
    for (int b = 0; b < shape.batch; ++b) REQUIRE(store(b, (round * 41 + b) % shape.max_tokens));
    check_cuda(cudaDeviceSynchronize());
    const std::vector<float> got = out.host();
    different += std::memcmp(got.data(), expected.data(), 4 * got.size()) != 0;
  }
  CHECK(different == 0);
  // The tokens' own codes again, and no other bit has changed.
  for (int b = 0; b < shape.batch; ++b)
    if (slot[static_cast<std::size_t>(b)] >= 0) REQUIRE(store(b, cache.lengths[static_cast<std::size_t>(b)] - 1));
  check_cuda(cudaDeviceSynchronize());
  CHECK(cache.device_pages.host() == cache.pages);
  check_cuda(cudaStreamDestroy(side));
  check_cuda(cudaStreamDestroy(stream));
}

}  // namespace

TEST_CASE("store_tokens beside attention that has the new tokens in its ring changes nothing that is read") {
  for (const int window : {64, 20})
    for (const bool same_stream : {false, true}) check_store_beside_attention(window, same_stream);
}

namespace {

/// Copies words after a while; the kernel behind it may begin at once, if it is launched early.
__global__ void __launch_bounds__(256) copy_late(const std::uint16_t* from, std::uint16_t* to, int count, int cycles) {
  pk::detail::let_next_kernel_begin();
  for (const long long begin = clock64(); clock64() - begin < cycles;) {
  }
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 256) to[i] = from[i];
}

}  // namespace

// Attention lets store_tokens begin when the tokens are there; 100,000 cycles are more than it takes to begin both.
TEST_CASE("store_tokens beside attention finds the tokens that a kernel before it makes, and the next call waits") {
  random_source random(6);
  test_cache cache(random, cache_shape{3, 2, 200, 1, pk::dtype::float16}, format{});
  cache.lengths = {200, 200, 200};
  cache.device_lengths.assign(cache.lengths);
  take_away_padding(cache);
  cache.fill();
  decode_problem problem(random, cache, 4, 1);
  read_new_tokens_from_ring(problem, random, 64);
  const std::vector<float> expected = problem.device().out;
  std::vector<std::int64_t> slot;  // of those tokens of sequence 0 that lie in the ring
  for (int t = 0; t < cache.shape.max_tokens; ++t)
    slot.push_back(t < 136 ? -1 : std::int64_t{cache.table[static_cast<std::size_t>(t / 64)]} * 64 + t % 64);
  const device_array<std::int64_t> slots(slot);
  const auto made = [&](const tensor_data& x) { return device_array<std::uint16_t>(x.host_bits.size()); };
  device_array<std::uint16_t> keys = made(cache.keys), values = made(cache.values);
  const auto tokens_in = [](device_array<std::uint16_t>& data, const tensor_data& like) {
    pk::input_view<4> all = like.device();
    all.data = data.data();
    return one_by_one(all);
  };
  cudaStream_t stream;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  device_array<std::uint8_t> workspace = problem.decode_workspace();
  device_array<float> out(expected.size());
  device_array<float> lse(static_cast<std::size_t>(problem.tokens * problem.heads()));
  check_cuda(cudaDeviceSynchronize());
  pk::exec e{stream, workspace.data(), workspace.size(), cache.device_report.data()};
  REQUIRE(pk::initialize_workspace(e));
  pk::exec beside = e;
  beside.beside_previous = true;
  const auto attend = [&] {
    return pk::decode_attention(problem.query_view(true), problem.device_query_start.data(), problem.view(true),
                                cache.gpu_parameters(), problem.out_view(out.data()), problem.lse_view(lse.data()),
                                problem.with_arrays(true), e);
  };
  int different = 0;
  for (int round = 0; round < (small_tests ? 3 : 50); ++round) {
    // Keys and values take each other's places first, so that a call that stores nothing is seen, too.
    REQUIRE(pk::store_tokens(one_by_one(cache.values.device()), one_by_one(cache.keys.device()), slots.data(),
                             cache.gpu_parameters(), cache.gpu_pages(), e));
    REQUIRE(cache.device_pages.host() != cache.pages);
    for (device_array<std::uint16_t>* x : {&keys, &values}) x->poison();
    out.assign(std::vector<float>(expected.size(), 7.0f));
    check_cuda(cudaDeviceSynchronize());
    for (const auto& [from, to] : {std::pair{&cache.keys, &keys}, std::pair{&cache.values, &values}})
      REQUIRE(pk::detail::launch(copy_late, dim3(1), 256, stream,
                                 static_cast<const std::uint16_t*>(from->device_bits.data()), to->data(),
                                 static_cast<int>(to->size()), 100000));
    REQUIRE(attend());
    REQUIRE(pk::store_tokens(tokens_in(keys, cache.keys), tokens_in(values, cache.values), slots.data(),
                             cache.gpu_parameters(), cache.gpu_pages(), beside));
    const std::vector<float> got = out.host();  // behind store_tokens, and so behind attention
    different += std::memcmp(got.data(), expected.data(), 4 * got.size()) != 0;
    different += cache.device_pages.host() != cache.pages;
  }
  CHECK(different == 0);
  check_cuda(cudaStreamDestroy(stream));
}

// The kernel of values begins beside that of keys, and the GEMV early, too. On an H200 this holds without the wait at
// the end of the kernel of values as well (docs/reliability.md).
TEST_CASE("a GEMV launched right behind compress sees all keys") {
  using uneven = pk::cache_format<pk::key_codec<128, pk::hadamard, pk::rms_scale, pk::plan<8, 8, 8, 8>>,
                                  pk::value_codec<64, pk::identity, pk::rms_scale, pk::plan<1, 1, 1, 1>>>;
  random_source random(5);
  constexpr int heads = 2;
  test_cache cache(random, cache_shape{1, heads, (small_tests ? 3 : 40) * 64, 1, pk::dtype::float16}, uneven{});
  cache.key_data = {}, cache.value_data = {};
  cache.lengths = {cache.shape.max_tokens};
  cache.device_lengths.assign(cache.lengths);
  std::fill(cache.keys.host_bits.begin(), cache.keys.host_bits.end(), std::uint16_t{0});  // all coded twice
  take_away_padding(cache);
  const tensor_data queries(random, pk::dtype::float16, 1, 1, heads, 128);
  const auto count = static_cast<std::size_t>(heads * cache.shape.max_tokens);
  device_array<float> scores(count);
  cudaStream_t stream;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const pk::exec e{stream, nullptr, 0, cache.device_report.data()};
  const auto score = [&] {
    return pk::key_gemv(sequence(queries.device()), cache.gpu_cache(), cache.gpu_parameters(), 0.1f,
                        pk::make_output(scores.data(), pk::dtype::float32, {1, heads, cache.shape.max_tokens}), e);
  };
  cache.fill();
  REQUIRE(score());
  const std::vector<float> expected = scores.host();
  int different = 0;
  for (int round = 0; round < (small_tests ? 2 : 200); ++round) {
    cache.device_pages.poison();
    scores.poison();
    check_cuda(cudaDeviceSynchronize());
    REQUIRE(pk::compress(cache.keys.device(), cache.values.device(), cache.device_lengths.data(),
                         cache.gpu_parameters(), cache.gpu_pages(), cache.gpu_table(), e));
    REQUIRE(score());  // launched early, too: it waits for the kernel before it, that of values
    const std::vector<float> got = scores.host();
    different += std::memcmp(got.data(), expected.data(), 4 * count) != 0;
  }
  CHECK(different == 0);
  CHECK(cache.device_pages.host() == cache.pages);
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
