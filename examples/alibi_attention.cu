// SPDX-License-Identifier: Apache-2.0
// Attention with a bias of one's own through the library's kernel: a functor changes every score, nothing is copied.
// main() compares with the same formula on the decoded tokens.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <packkv/packkv.cuh>
#include <vector>
namespace pk = packkv;

constexpr int dim = 128, kv_heads = 2, group = 4, heads = kv_heads * group, n = 1000, tiles = (n + 63) / 64;
using format = pk::cache_format<pk::key_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<4, 4, 3, 3>>,
                                pk::value_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<3, 3, 3, 3, 2, 2, 2, 2>>>;

// [variant]
/// ALiBi: a score falls with the distance between query and key, in each head at its own slope.
struct alibi {
  static constexpr bool active = true;
  const float* slopes;  // device memory, one per query head
  __device__ float operator()(float score, int head, std::int64_t query, std::int64_t key) const {
    return score - slopes[head] * static_cast<float>(query - key);
  }
};
// [variant]

namespace {

void require(const pk::status& s) {
  if (s) return;
  std::fprintf(stderr, "alibi_attention: %s\n", s.message);
  std::exit(1);
}
template <class T>
T* managed(std::int64_t count) {
  void* p = nullptr;
  if (cudaMallocManaged(&p, static_cast<std::size_t>(count) * sizeof(T)) != cudaSuccess) std::abort();
  return static_cast<T*>(p);
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("alibi_attention: no CUDA device, nothing to run on\n");
    return 0;
  }
  std::uint32_t state = 1;
  const auto noise = [&] {
    float x = 0.0f;
    for (int i = 0; i < 6; ++i)
      x += static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / 16777216.0f - 0.5f;
    return 1.4f * x;
  };
  // The cache: one sequence, one page, K and V tiles of each head behind each other.
  auto* pool = managed<std::uint8_t>(kv_heads * tiles * (format::key_tile_bytes + format::value_tile_bytes));
  pk::cache_view cache;
  cache.pages.key_data = pool;
  cache.pages.value_data = pool + kv_heads * tiles * format::key_tile_bytes;
  cache.pages.key_head_stride = cache.pages.key_page_stride = tiles * format::key_tile_bytes;
  cache.pages.value_head_stride = cache.pages.value_page_stride = tiles * format::value_tile_bytes;
  cache.pages.num_pages = 1;
  cache.pages.kv_heads = kv_heads;
  cache.pages.tiles_per_page = tiles;
  cache.table.row_stride = 1;
  auto* numbers = managed<std::int32_t>(3);
  numbers[0] = n, numbers[1] = 0, numbers[2] = 1;  // length; query_start_loc
  cache.seq_lens = numbers;
  cache.batch = 1;
  cache.max_seq_len = n;
  auto* kv = managed<std::uint16_t>(2 * kv_heads * n * dim);
  for (int i = 0; i < 2 * kv_heads * n * dim; ++i) kv[i] = pk::float_to_half(noise());
  const auto keys = pk::make_input(kv, pk::dtype::float16, {1, kv_heads, n, dim});
  const auto values = pk::make_input(kv + kv_heads * n * dim, pk::dtype::float16, {1, kv_heads, n, dim});
  const pk::parameters<format> params;
  require(pk::compress(keys, values, nullptr, params, cache.pages, cache.table, pk::exec{}));

  auto* q = managed<std::uint16_t>(heads * dim);
  for (int i = 0; i < heads * dim; ++i) q[i] = pk::float_to_half(noise());
  auto* slopes = managed<float>(heads);
  for (int h = 0; h < heads; ++h) slopes[h] = std::exp2(-static_cast<float>(h + 1));
  auto* out = managed<float>(heads * dim);
  const std::int64_t bytes = pk::decode_workspace_bytes<format>({1, kv_heads, heads, 1, n, 0});
  const pk::exec e{nullptr, managed<std::uint8_t>(bytes), static_cast<std::size_t>(bytes), nullptr};
  pk::attention_options options;
  options.softmax_scale = 1.0f / std::sqrt(static_cast<float>(dim));
  require(pk::initialize_workspace(e));
  require(pk::decode_attention(pk::make_input(q, pk::dtype::float16, {1, heads, dim}), numbers + 1, cache, params,
                               pk::make_output(out, pk::dtype::float32, {1, heads, dim}), {}, options, alibi{slopes},
                               e));
  if (cudaDeviceSynchronize() != cudaSuccess) return 1;

  double worst = 0.0;
  for (int h = 0; h < heads; ++h) {
    std::vector<double> sum(dim, 0.0);
    double total = 0.0;
    for (int t = 0; t < n; ++t) {
      float k[dim], v[dim];
      const int head = h / group;
      pk::reference::decode_token(format::key(), pk::of_head(format::key(), params.key, head),
                                  pk::key_tile(cache.pages, format::key(), 0, head, t / 64), t % 64, k);
      pk::reference::decode_token(format::value(), pk::of_head(format::value(), params.value, head),
                                  pk::value_tile(cache.pages, format::value(), 0, head, t / 64), t % 64, v);
      double s = 0.0;
      for (int c = 0; c < dim; ++c) s += static_cast<double>(pk::half_to_float(q[h * dim + c])) * k[c];
      const double w = std::exp(s * options.softmax_scale - static_cast<double>(slopes[h]) * (n - 1 - t));
      total += w;
      for (int c = 0; c < dim; ++c) sum[static_cast<std::size_t>(c)] += w * v[c];
    }
    double difference = 0.0, norm = 0.0;
    for (int c = 0; c < dim; ++c) {
      const double want = sum[static_cast<std::size_t>(c)] / total;
      difference += std::pow(static_cast<double>(out[h * dim + c]) - want, 2);
      norm += want * want;
    }
    worst = std::fmax(worst, std::sqrt(difference / norm));
  }
  std::printf("ALiBi attention on %d compressed tokens, %d heads: largest relative error %.1e\n", n, heads, worst);
  return worst < 2e-3 ? 0 : 1;
}
