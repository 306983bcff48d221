// SPDX-License-Identifier: Apache-2.0
// exec::settled_cache: what the kernel before a call makes while the call has begun is waited for, and what the kernels
// before that one made is seen. Only a real device has two kernels at once.
#if !defined(PACKKV_SIMT_EXECUTOR)
#include "fused_problem.hpp"

using namespace packkv_test;

namespace {

using format = two_bit;

struct word_copy {
  const std::uint16_t* from;
  std::uint16_t* to;
  int count;

  __device__ void run() const {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += 256) to[i] = from[i];
  }
};

/// What a late kernel makes.
struct word_copies {
  word_copy of[5] = {};
};

/// Makes its outputs after a while. The kernel behind it may begin before, as soon as those before it have ended.
__global__ void __launch_bounds__(256) make_late(word_copies late, int cycles) {
  pk::detail::wait_for_kernel_before();
  for (const long long begin = clock64(); clock64() - begin < cycles;) {
  }
  for (const word_copy& x : late.of) x.run();
}
/// Sets lengths, and makes NaN of what make_late will make.
__global__ void __launch_bounds__(256) begin_round(word_copy lengths, word_copies late) {
  lengths.run();
  for (const word_copy& x : late.of)
    for (int i = static_cast<int>(threadIdx.x); i < x.count; i += 256) x.to[i] = 0x7fff;
}

/// Longer than it takes the call behind to begin.
constexpr int late_cycles = 20000;
constexpr int sets = 2;  ///< of lengths, which take turns

/// A cache with two sets of lengths, and a graph of rounds: lengths, then late inputs, then a call.
class late_rounds {
 public:
  /// Of one sequence or three, of up to `tokens` tokens.
  late_rounds(int batch, int tokens) : random(11), cache(random, shape_of(batch, tokens), format{}) {
    std::vector<std::int32_t> lengths[sets] = {{tokens, 131, 64}, {90, tokens, 1}};
    cache.fill();  // of the cache's own lengths, and then of the longest
    cache.lengths.assign(static_cast<std::size_t>(batch), tokens);
    cache.fill();
    for (int k = 0; k < sets; ++k) {
      lengths[k].resize(static_cast<std::size_t>(batch));
      of_set[k] = device_array<std::int32_t>(lengths[k]);
    }
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  ~late_rounds() { (void)cudaStreamDestroy(stream); }
  late_rounds(const late_rounds&) = delete;

  static cache_shape shape_of(int batch, int tokens) { return {batch, 2, tokens, 1, pk::dtype::float16}; }
  void set_lengths(int k) {
    cache.lengths = of_set[k].host();
    cache.device_lengths.assign(cache.lengths);
  }
  static word_copy copy_of(const tensor_data& from, device_array<std::uint16_t>& to) {
    to = device_array<std::uint16_t>(from.host_bits.size());
    return {from.device_bits.data(), to.data(), static_cast<int>(from.host_bits.size())};
  }
  /// Replays a graph of a round for each set of lengths: call(k) puts a call with a settled cache into the stream,
  /// whose result out(k) returns after the graph. How many results are not expected[k].
  template <class Call, class Out>
  int different(const word_copies& late, const std::vector<float> (&expected)[sets], Call&& call, Out&& out) {
    check_cuda(cudaDeviceSynchronize());
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int k = 0; k < sets; ++k) {
      const word_copy lengths{reinterpret_cast<const std::uint16_t*>(of_set[k].data()),
                              reinterpret_cast<std::uint16_t*>(cache.device_lengths.data()), 2 * cache.shape.batch};
      REQUIRE(pk::detail::launch(begin_round, dim3(1), 256, stream, lengths, late));
      REQUIRE(pk::detail::launch_early(make_late, dim3(1), 256, stream, late, int{late_cycles}));
      REQUIRE(call(k));
    }
    check_cuda(cudaStreamEndCapture(stream, &graph));
    check_cuda(cudaGraphInstantiate(&replay, graph, 0));
    int wrong = 0;
    for (int round = 0; round < (small_tests ? 5 : 300); ++round) {
      check_cuda(cudaGraphLaunch(replay, stream));
      check_cuda(cudaStreamSynchronize(stream));
      for (int k = 0; k < sets; ++k) {
        const std::vector<float> got = out(k);
        wrong += std::memcmp(got.data(), expected[k].data(), 4 * got.size()) != 0;
      }
    }
    check_cuda(cudaGraphExecDestroy(replay));
    check_cuda(cudaGraphDestroy(graph));
    return wrong;
  }

  random_source random;
  test_cache<format> cache;
  device_array<std::int32_t> of_set[sets];
  cudaStream_t stream = nullptr;
};

void check_late_queries(int batch, int tokens, int group, int query_len) {
  INFO(batch << " sequences, group " << group << ", " << query_len << " query tokens");
  late_rounds rounds(batch, tokens);
  decode_problem problem(rounds.random, rounds.cache, group, 1);
  problem.options = {};
  problem.options.base = pk::lse_base::e;
  problem.options.softmax_scale = 0.1f;
  problem.options.max_query_len = query_len;
  problem.with_kv_begin = problem.with_context = false;
  problem.sinks = 20;
  problem.sink_keys = problem.overlay(rounds.random, batch, problem.sinks, format::key_head_dim);
  problem.sink_values = problem.overlay(rounds.random, batch, problem.sinks, format::value_head_dim);
  problem.set_ring(rounds.random, 40);
  for (int b = 0; b < batch; ++b) problem.query_start[static_cast<std::size_t>(b + 1)] = query_len * (b + 1);
  problem.device_query_start.assign(problem.query_start);
  problem.tokens = query_len * batch;
  problem.queries =
      tensor_data(rounds.random, pk::dtype::float16, 1, problem.tokens, problem.heads(), format::key_head_dim);
  std::vector<float> expected[sets];
  device_array<float> out[sets];
  device_array<float> lse(static_cast<std::size_t>(problem.tokens * problem.heads()));
  for (int k = 0; k < sets; ++k) {
    rounds.set_lengths(k);
    expected[k] = problem.device().out;
    out[k] = device_array<float>(expected[k].size());
  }
  REQUIRE(expected[0] != expected[1]);
  device_array<std::uint16_t> made[5];  // queries, and keys and values of ring and sinks
  word_copies late;
  const tensor_data* const of[5] = {&problem.queries, &problem.ring_keys, &problem.ring_values, &problem.sink_keys,
                                    &problem.sink_values};
  for (int i = 0; i < 5; ++i) late.of[i] = late_rounds::copy_of(*of[i], made[i]);
  device_array<std::uint8_t> workspace = problem.decode_workspace();
  check_cuda(cudaDeviceSynchronize());
  pk::exec e{rounds.stream, workspace.data(), workspace.size(), rounds.cache.device_report.data()};
  REQUIRE(pk::initialize_workspace(e));
  e.settled_cache = true;
  const auto call = [&](int k) {
    pk::input_view<3> q = problem.query_view(true);
    pk::cache_view view = problem.view(true);
    q.data = made[0].data();
    view.ring.keys.data = made[1].data();
    view.ring.values.data = made[2].data();
    view.sinks.keys.data = made[3].data();
    view.sinks.values.data = made[4].data();
    return pk::decode_attention(q, problem.device_query_start.data(), view, rounds.cache.gpu_parameters(),
                                problem.out_view(out[k].data()), problem.lse_view(lse.data()),
                                problem.with_arrays(true), e);
  };
  CHECK(rounds.different(late, expected, call, [&](int k) { return out[k].host(); }) == 0);
}

}  // namespace

TEST_CASE("decode attention with a settled cache waits for queries, sinks and ring, and sees the lengths before them") {
  check_late_queries(3, 400, 4, 1);
  check_late_queries(3, 400, 8, 1);
  check_late_queries(3, 400, 4, 4);
  check_late_queries(1, 400, 4, 1);
  check_late_queries(1, 5000, 4, 1);
  check_late_queries(1, 5000, 4, 4);
}

namespace {

void check_late_gemv(int sequences, int most) {
  INFO(sequences << " sequences");
  late_rounds rounds(sequences, most);
  test_cache<format>& cache = rounds.cache;
  const int batch = cache.shape.batch, heads = cache.shape.kv_heads, tokens = cache.shape.max_tokens;
  cache.key_data = {}, cache.value_data = {};
  const tensor_data in[2] = {tensor_data(rounds.random, pk::dtype::float16, 1, batch, heads, 128),
                             tensor_data(rounds.random, pk::dtype::float16, 1, batch, heads, tokens)};
  device_array<std::uint8_t> workspace(
      static_cast<std::size_t>(pk::value_gemv_workspace_bytes<format>({batch, heads, heads, 1, tokens, 0})));
  pk::exec e{rounds.stream, workspace.data(), workspace.size(), cache.device_report.data()};
  REQUIRE(pk::initialize_workspace(e));
  for (const bool keys : {true, false}) {
    INFO((keys ? "keys" : "values"));
    const tensor_data& from = in[keys ? 0 : 1];
    const std::int64_t columns = keys ? tokens : 128;
    const auto multiply = [&](const pk::input_view<3>& x, float* to) {
      const auto result = pk::make_output(to, pk::dtype::float32, {batch, heads, columns});
      return keys ? pk::key_gemv(x, cache.gpu_cache(), cache.gpu_parameters(), 0.1f, result, e)
                  : pk::value_gemv(x, cache.gpu_cache(), cache.gpu_parameters(), result, e);
    };
    std::vector<float> expected[sets];
    device_array<float> out[sets];
    e.settled_cache = false;
    for (int k = 0; k < sets; ++k) {
      rounds.set_lengths(k);
      out[k] = device_array<float>(std::vector<float>(static_cast<std::size_t>(batch * heads * columns), 7.0f));
      check_cuda(cudaDeviceSynchronize());
      REQUIRE(multiply(sequence(from.device()), out[k].data()));
      check_cuda(cudaStreamSynchronize(rounds.stream));
      expected[k] = out[k].host();
      out[k].assign(std::vector<float>(expected[k].size(), 7.0f));
    }
    REQUIRE(expected[0] != expected[1]);
    device_array<std::uint16_t> late;
    word_copies copies;
    copies.of[0] = late_rounds::copy_of(from, late);
    e.settled_cache = true;
    const auto call = [&](int k) {
      pk::input_view<3> x = sequence(from.device());
      x.data = late.data();
      return multiply(x, out[k].data());
    };
    CHECK(rounds.different(copies, expected, call, [&](int k) { return out[k].host(); }) == 0);
  }
}

}  // namespace

TEST_CASE("GEMVs with a settled cache wait for queries and weights, and see the lengths before them") {
  check_late_gemv(3, 400);
  check_late_gemv(1, 5000);
}
#endif
