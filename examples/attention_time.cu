// SPDX-License-Identifier: Apache-2.0
// How long one decode step of attention takes on the 2-bit compressed cache, on FP8 and on 16 bits, on this GPU.
//   attention_time [tokens]        32 query heads, 8 KV heads, head dim 128, one sequence of random data
#include "random_cache.cuh"

namespace pk = packkv;

template <class Format>
double row(const char* name, int tokens, double reference_ms) {
  random_cache<Format> cache({1, 8, 4, tokens});
  const double ms = median_ms([&](int i) { cache.decode(i); });
  std::printf("%-12s %12.1f %12.4f %13.2fx\n", name, static_cast<double>(cache.set_bytes) / 1e6, ms,
              (reference_ms > 0.0 ? reference_ms : ms) / ms);
  return ms;
}

int main(int argc, char** argv) {
  const int tokens = argc > 1 ? std::atoi(argv[1]) : 32768;
  if (tokens < 1 || tokens > (1 << 22)) {
    std::fprintf(stderr, "attention_time: tokens must be 1..4194304\n");
    return 2;
  }
  cudaDeviceProp device;
  require(cudaGetDeviceProperties(&device, 0));
  constexpr int dim = 128;
  using two_bit = pk::cache_format<pk::key_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2>>,
                                   pk::value_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>>;
  std::printf("Attention of one decode step: %d tokens, 32 query heads, 8 KV heads, head dim %d, %s\n", tokens, dim,
              device.name);
  std::printf("%-12s %12s %12s %14s\n", "cache", "MB read", "ms", "against 16 bit");
  const double half = row<pk::cache_format<pk::float16_codec<dim>, pk::float16_codec<dim>>>("16 bit", tokens, 0.0);
  row<pk::cache_format<pk::fp8_codec<dim>, pk::fp8_codec<dim>>>("FP8", tokens, half);
  row<two_bit>("plan, 2 bit", tokens, half);
  std::printf("16 bit and FP8 run simple kernels, not tuned ones: they show what a byte costs there, not what 16 bits can do.\n");
  return 0;
}
