// SPDX-License-Identifier: Apache-2.0
// Times of launches whose data does not lie in the L2: CUDA graphs of 24 launches, and single launches, in rounds that
// go through all calls that are compared. One idea: a call gets the number of a copy of its data and the copies,
// together several times the L2, take turns over all graphs and rounds.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "../examples/random_cache.cuh"

namespace timing {

inline constexpr int launches_of_graph = 24;
inline constexpr std::int64_t cold_bytes = std::int64_t{320} << 20;  ///< more than four times the L2 of an H200

/// Copies of `bytes` that together exceed cold_bytes; at least two, so that no launch follows one on the same data.
inline int copies_for(std::int64_t bytes) {
  return static_cast<int>(std::max<std::int64_t>(2, (cold_bytes + bytes - 1) / bytes));
}
/// The same for copies of which `part` bytes are read in another way than the others, which may leave the L2 to them:
/// those exceed cold_bytes, too, as far as 24 GiB go.
inline int copies_for(std::int64_t bytes, std::int64_t part) {
  if (part == 0) return copies_for(bytes);
  const std::int64_t most = (std::int64_t{24} << 30) / bytes;
  return std::max(copies_for(bytes), static_cast<int>(std::min<std::int64_t>(copies_for(part), most)));
}

struct spread {
  double median = 0.0, p5 = 0.0, p95 = 0.0;  ///< milliseconds of a launch
};

inline spread spread_of(std::vector<double> times) {
  if (times.empty()) return {};
  std::sort(times.begin(), times.end());
  const auto at = [&](double part) {
    return times[static_cast<std::size_t>(part * static_cast<double>(times.size() - 1) + 0.5)];
  };
  return {at(0.5), at(0.05), at(0.95)};
}

/// Keeps the stream busy while the CPU fills it, so that the time of launching is not measured.
template <int Cycles>
__global__ void busy() {
  const long long begin = clock64();
  while (clock64() - begin < Cycles) {
  }
}

/// The stream that everything is timed in, and two events.
class stopwatch {
 public:
  stopwatch() {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    require(cudaEventCreate(&begin_));
    require(cudaEventCreate(&end_));
  }
  ~stopwatch() {
    (void)cudaEventDestroy(begin_);
    (void)cudaEventDestroy(end_);
    (void)cudaStreamDestroy(stream_);
  }
  stopwatch(const stopwatch&) = delete;
  stopwatch& operator=(const stopwatch&) = delete;
  cudaStream_t stream() const { return stream_; }

  /// Milliseconds from the first to the last of what `f` puts into the stream, which is ready before the GPU begins.
  template <class F>
  double time(F&& f) {
    busy<100000><<<1, 1, 0, stream_>>>();  // about 55 microseconds
    require(cudaGetLastError());
    require(cudaEventRecord(begin_, stream_));
    f();
    require(cudaEventRecord(end_, stream_));
    require(cudaEventSynchronize(end_));
    float ms = 0.0f;
    require(cudaEventElapsedTime(&ms, begin_, end_));
    return static_cast<double>(ms);
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

/// One call that is timed: f(copy) puts one launch into the stopwatch's stream.
class timed_call {
 public:
  timed_call(stopwatch& watch, int copies, std::function<void(int)> f)
      : watch_(watch), copies_(copies), call_(std::move(f)) {
    call_(0);  // whatever a first launch does beside launching
    require(cudaStreamSynchronize(watch_.stream()));
    const int graphs = std::min((copies_ + launches_of_graph - 1) / launches_of_graph, 16);
    for (int g = 0; g < graphs; ++g) {
      cudaGraph_t graph;
      require(cudaStreamBeginCapture(watch_.stream(), cudaStreamCaptureModeThreadLocal));
      for (int i = 0; i < launches_of_graph; ++i) call_((g * launches_of_graph + i) % copies_);
      require(cudaStreamEndCapture(watch_.stream(), &graph));
      cudaGraphExec_t ready;
      require(cudaGraphInstantiate(&ready, graph, 0));
      require(cudaGraphDestroy(graph));
      require(cudaGraphUpload(ready, watch_.stream()));
      graphs_.push_back(ready);
    }
    warm_ms_ = replay();
    for (int i = 0; i < 4 && warm_ms_ < 0.5; ++i) warm_ms_ = std::min(warm_ms_, replay());
  }
  ~timed_call() {
    for (const cudaGraphExec_t g : graphs_) (void)cudaGraphExecDestroy(g);
  }
  timed_call(const timed_call&) = delete;
  timed_call& operator=(const timed_call&) = delete;

  double warm_ms() const { return warm_ms_; }  ///< of a launch, a first impression
  void graph_round() { graph_times_.push_back(replay()); }
  void single_round() {
    single_times_.push_back(watch_.time([&] { call_(next_single_); }));
    next_single_ = (next_single_ + 1) % copies_;
  }
  spread graph() const { return spread_of(graph_times_); }
  spread single() const { return spread_of(single_times_); }

 private:
  double replay() {
    const cudaGraphExec_t g = graphs_[next_graph_];
    next_graph_ = (next_graph_ + 1) % graphs_.size();
    return watch_.time([&] { require(cudaGraphLaunch(g, watch_.stream())); }) / launches_of_graph;
  }

  stopwatch& watch_;
  int copies_, next_single_ = 0;
  std::function<void(int)> call_;
  std::vector<cudaGraphExec_t> graphs_;
  std::size_t next_graph_ = 0;
  double warm_ms_ = 0.0;
  std::vector<double> graph_times_, single_times_;
};

/// Times all calls, in turn within a round: 11 to 41 graphs and 24 single launches each; 3 of both where a round takes
/// more than 0.2 s, which is far from the speed of memory. \return rounds of graphs
inline int time_calls(const std::vector<timed_call*>& calls) {
  double round_ms = 0.0;
  for (const timed_call* c : calls) round_ms += c->warm_ms() * launches_of_graph;
  const bool slow = round_ms > 200.0;
  const int rounds = slow ? 3 : std::clamp(static_cast<int>(150.0 / round_ms), 11, 41);
  for (int i = 0; i < rounds; ++i)
    for (timed_call* c : calls) c->graph_round();
  for (int i = 0; i < (slow ? 3 : launches_of_graph); ++i)
    for (timed_call* c : calls) c->single_round();
  return rounds;
}

// ------------------------------------------------------------------------------------------------------- read ceiling
/// Reads `count` 16-byte words, Unroll loads of a thread under way, and keeps their combination, which is written only
/// if it has one improbable value.
template <int Threads, int Unroll>
__global__ void __launch_bounds__(Threads) read_words(const uint4* data, std::int64_t count, uint4* sink) {
  uint4 sum{0, 0, 0, 0};
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * Threads * Unroll;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * Threads * Unroll + threadIdx.x; i < count;
       i += stride) {
    uint4 x[Unroll];
#pragma unroll
    for (int u = 0; u < Unroll; ++u) {
      const std::int64_t at = i + u * Threads;
      x[u] = at < count ? __ldcs(data + at) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int u = 0; u < Unroll; ++u) sum.x ^= x[u].x, sum.y ^= x[u].y, sum.z ^= x[u].z, sum.w ^= x[u].w;
  }
  if (sum.x == 0x12345678u && sum.y == 0x9abcdef0u && sum.z == 42u) *sink = sum;
}

struct read_variant {
  void (*kernel)(const uint4*, std::int64_t, uint4*);
  int threads, unroll, blocks_of_sm;
};
inline const std::vector<read_variant>& read_variants() {
  static const std::vector<read_variant> all = {{read_words<1024, 1>, 1024, 1, 2}, {read_words<512, 2>, 512, 2, 4},
                                                {read_words<512, 4>, 512, 4, 2},   {read_words<512, 4>, 512, 4, 4},
                                                {read_words<256, 8>, 256, 8, 4},   {read_words<256, 8>, 256, 8, 8}};
  return all;
}

/// A plain read of the first `bytes` of each copy, in the fastest of the ways above for this many bytes.
inline std::unique_ptr<timed_call> read_ceiling(stopwatch& watch, const void* data, std::int64_t bytes,
                                                std::int64_t copy_stride, int copies, uint4* sink, int sms) {
  std::unique_ptr<timed_call> best;
  for (const read_variant& v : read_variants()) {
    const std::int64_t words = bytes / 16, of_block = std::int64_t{v.threads} * v.unroll;
    const auto blocks = static_cast<unsigned>(
        std::min<std::int64_t>((words + of_block - 1) / of_block, std::int64_t{sms} * v.blocks_of_sm));
    auto call = std::make_unique<timed_call>(watch, copies, [=, &watch](int copy) {
      const auto* from = static_cast<const std::uint8_t*>(data) + copy * copy_stride;
      v.kernel<<<blocks, static_cast<unsigned>(v.threads), 0, watch.stream()>>>(reinterpret_cast<const uint4*>(from),
                                                                                words, sink);
      require(cudaGetLastError());
    });
    if (best == nullptr || call->warm_ms() < best->warm_ms()) best = std::move(call);
  }
  return best;
}

}  // namespace timing
