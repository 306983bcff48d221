// SPDX-License-Identifier: Apache-2.0
// Device-wide calls on random caches larger than the L2: time of a launch, bytes of the compressed cache per second,
// and the read ceiling of this GPU for the same bytes, measured in the same run. Peers: the 16-bit and FP8 formats.
#include <benchmark/benchmark.h>

#include "../examples/random_cache.cuh"

namespace pk = packkv;

namespace {

constexpr int dim = 128;
using two_bit = pk::cache_format<pk::key_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2>>,
                                 pk::value_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>>;
using mixed = pk::cache_format<pk::key_codec<dim, pk::identity, pk::rms_scale, pk::plan<4, 2, 1, 1>>,
                               pk::value_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2, 1, 1, 1, 1>>>;
using four_bit = pk::cache_format<pk::key_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<4, 4, 4, 4>>,
                                  pk::value_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<4, 4, 4, 4, 4, 4, 4, 4>>>;
using fp8 = pk::cache_format<pk::fp8_codec<dim>, pk::fp8_codec<dim>>;
using half = pk::cache_format<pk::float16_codec<dim>, pk::float16_codec<dim>>;

/// Reads `count` 16-byte words and keeps their combination, which is written only if it has one improbable value.
template <int Threads>
__global__ void read_all(const uint4* data, std::int64_t count, uint4* sink) {
  uint4 sum{0, 0, 0, 0};
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * Threads + threadIdx.x; i < count;
       i += static_cast<std::int64_t>(gridDim.x) * Threads) {
    const uint4 x = data[i];
    sum.x ^= x.x, sum.y ^= x.y, sum.z ^= x.z, sum.w ^= x.w;
  }
  if (sum.x == 0x12345678u && sum.y == 0x9abcdef0u && sum.z == 42u) *sink = sum;
}

/// Milliseconds that this GPU needs to read `bytes`, launches rotated over more than the L2.
double read_ceiling_ms(std::int64_t bytes) {
  const std::int64_t words = bytes / 16;
  const int sets = static_cast<int>((std::int64_t{256} << 20) / bytes + 1);
  device_buffer<uint4> data(words * sets + 1);
  require(cudaMemset(data.data(), 0x5a, static_cast<std::size_t>(words * sets) * 16));
  return median_ms([&](int i) {
    read_all<512><<<132 * 4, 512>>>(data.data() + i % sets * words, words, data.data() + words * sets);
    require(cudaGetLastError());
  });
}

template <class Format, void (random_cache<Format>::*Call)(int)>
void run(benchmark::State& state) {
  random_cache<Format> cache({static_cast<int>(state.range(0)), 8, 4, static_cast<int>(state.range(1))});
  std::vector<double> times;
  for (auto _ : state) {
    const double ms = median_ms([&](int i) { (cache.*Call)(i); });
    times.push_back(ms);
    state.SetIterationTime(ms * 1e-3);
  }
  std::sort(times.begin(), times.end());
  const double ms = times[times.size() / 2];
  state.counters["cache_MB"] = static_cast<double>(cache.set_bytes) * 1e-6;
  state.counters["cache_GB/s"] = static_cast<double>(cache.set_bytes) / ms * 1e-6;
  state.counters["fp16_equiv_GB/s"] = static_cast<double>(4 * cache.size.values(dim)) / ms * 1e-6;
  state.counters["read_ceiling_ms"] = read_ceiling_ms(cache.set_bytes);
}

void sizes(benchmark::internal::Benchmark* b) {
  b->Args({1, 4096})
      ->Args({1, 32768})
      ->Args({8, 32768})
      ->ArgNames({"batch", "tokens"})
      ->UseManualTime()
      ->Iterations(3)
      ->Unit(benchmark::kMillisecond);
}

#define PACKKV_BENCHMARK(call, format) \
  BENCHMARK(run<format, &random_cache<format>::call>)->Name(#call "/" #format)->Apply(sizes)
PACKKV_BENCHMARK(decode, half);
PACKKV_BENCHMARK(decode, fp8);
PACKKV_BENCHMARK(decode, four_bit);
PACKKV_BENCHMARK(decode, two_bit);
PACKKV_BENCHMARK(decode, mixed);
PACKKV_BENCHMARK(key_gemv, half);
PACKKV_BENCHMARK(key_gemv, two_bit);
PACKKV_BENCHMARK(value_gemv, half);
PACKKV_BENCHMARK(value_gemv, two_bit);
PACKKV_BENCHMARK(compress, half);

}  // namespace

BENCHMARK_MAIN();
