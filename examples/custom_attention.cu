// SPDX-License-Identifier: Apache-2.0
// A kernel author's own attention step: ALiBi attention over a compressed cache. The pieces are packkv's, the loop,
// the mask and the output are ours. main() checks it against the same formula on the decoded tokens.
#include <cmath>
#include <cstdio>
#include <packkv/packkv.cuh>
#include <vector>
namespace pk = packkv;

constexpr int dim = 128, rows = 4, warps = 4;  // four query heads share the KV head; a warp finishes each
using format = pk::cache_format<pk::key_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<4, 4, 3, 3>>,
                                pk::value_codec<dim, pk::hadamard, pk::rms_scale, pk::plan<3, 3, 3, 3, 2, 2, 2, 2>>>;

// [kernel]
// One block per KV head. queries [kv_heads * rows, dim], out likewise; score of token t: q.k/sqrt(dim) - slope[head] *
// (n-1-t).
__global__ void alibi_attention(pk::pages_view pages, pk::parameters<format> params, const float* queries,
                                const float* slopes, int n, float* out) {
  using keys = pk::warp::key_scores<dim, rows>;
  using merge = pk::block::row_merge<dim, rows>;
  __shared__ keys::temp_storage query_storage;
  __shared__ merge::temp_storage merge_storage;
  const pk::codec_spec key = format::key(), value = format::value();
  const int head = static_cast<int>(blockIdx.x), warp = static_cast<int>(threadIdx.x) / 32,
            lane = static_cast<int>(threadIdx.x) % 32;
  const auto key_head = pk::of_head(key, params.key, head), value_head = pk::of_head(value, params.value, head);

  keys::prepare(
      query_storage, key, key_head, [&](int r, int c) { return queries[(head * rows + r) * dim + c]; }, warp, warps);
  __syncthreads();
  pk::warp::online_softmax<rows> softmax;
  pk::warp::value_sum<dim, rows> sum;
  for (int tile = warp; tile < (n + 63) / 64; tile += warps) {
    const int page = tile / pages.tiles_per_page, slot = tile % pages.tiles_per_page;  // a contiguous cache
    float weights[2][rows], rescale[rows];
    keys::compute(query_storage, key, pk::key_tile(pages, key, page, head, slot), weights);
    for (int j = 0; j < 2; ++j)
      for (int r = 0; r < rows; ++r) {
        const int t = 64 * tile + lane + 32 * j;
        const float score = weights[j][r] / sqrtf(dim) - slopes[head * rows + r] * static_cast<float>(n - 1 - t);
        weights[j][r] = t < n ? score * 1.44269504f : -INFINITY;  // base 2
      }
    softmax.weigh(weights, rescale);
    sum.rescale(rescale);
    sum.add(value, pk::value_tile(pages, value, page, head, slot), weights);
  }
  auto row = merge::merge(merge_storage, softmax, sum);
  merge::finish(merge_storage, value, value_head, row);
  for (int i = 0; i < dim / 32; ++i) out[(head * rows + warp) * dim + lane + 32 * i] = row.channel[i] / row.sum;
}
// [kernel]

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("custom_attention: no CUDA device, nothing to run on\n");
    return 0;
  }
  constexpr int kv_heads = 2, n = 1000, tiles = (n + 63) / 64;
  std::uint32_t state = 1;
  const auto noise = [&] {  // roughly normal
    float x = 0.0f;
    for (int i = 0; i < 6; ++i)
      x += static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / 16777216.0f - 0.5f;
    return 1.4f * x;
  };
  const auto managed = [](std::size_t bytes) {
    void* p = nullptr;
    if (cudaMallocManaged(&p, bytes) != cudaSuccess) std::abort();
    return p;
  };
  auto* k = static_cast<std::uint16_t*>(managed(kv_heads * n * dim * 2));
  auto* v = static_cast<std::uint16_t*>(managed(kv_heads * n * dim * 2));
  auto* q = static_cast<float*>(managed(kv_heads * rows * dim * 4));
  auto* slopes = static_cast<float*>(managed(kv_heads * rows * 4));
  auto* out = static_cast<float*>(managed(kv_heads * rows * dim * 4));
  for (int i = 0; i < kv_heads * n * dim; ++i) k[i] = pk::float_to_half(noise());
  for (int i = 0; i < kv_heads * n * dim; ++i) v[i] = pk::float_to_half(noise());
  for (int i = 0; i < kv_heads * rows * dim; ++i) q[i] = noise();
  for (int i = 0; i < kv_heads * rows; ++i) slopes[i] = std::exp2(-static_cast<float>(i + 1));

  pk::pages_view pages;  // one page of `tiles` tiles for every head
  pages.num_pages = 1;
  pages.kv_heads = kv_heads;
  pages.tiles_per_page = tiles;
  pages.key_head_stride = tiles * format::key_tile_bytes;
  pages.value_head_stride = tiles * format::value_tile_bytes;
  pages.key_page_stride = kv_heads * pages.key_head_stride;
  pages.value_page_stride = kv_heads * pages.value_head_stride;
  pages.key_data = managed(static_cast<std::size_t>(pages.key_page_stride));
  pages.value_data = managed(static_cast<std::size_t>(pages.value_page_stride));
  pk::page_table table;  // contiguous
  table.row_stride = 1;
  const pk::parameters<format> params;
  const auto keys = pk::make_input(k, pk::dtype::float16, {1, kv_heads, n, dim}),
             values = pk::make_input(v, pk::dtype::float16, {1, kv_heads, n, dim});
  if (const pk::status s = pk::compress(keys, values, nullptr, params, pages, table, pk::exec{}); !s) {
    std::fprintf(stderr, "compress: %s\n", s.message);
    return 1;
  }
  alibi_attention<<<kv_heads, warps * 32>>>(pages, params, q, slopes, n, out);
  if (cudaDeviceSynchronize() != cudaSuccess) return 1;

  double worst = 0.0;
  for (int h = 0; h < kv_heads * rows; ++h) {
    pk::reference::detail::attention_sum expected(dim);
    for (int t = 0; t < n; ++t) {
      float kt[dim], vt[dim];
      const int head = h / rows;
      pk::reference::decode_token(format::key(), pk::of_head(format::key(), params.key, head),
                                  pk::key_tile(pages, format::key(), 0, head, t / 64), t % 64, kt);
      pk::reference::decode_token(format::value(), pk::of_head(format::value(), params.value, head),
                                  pk::value_tile(pages, format::value(), 0, head, t / 64), t % 64, vt);
      expected.add(pk::reference::detail::dot(q + h * dim, kt, dim) / std::sqrt(128.0) -
                       static_cast<double>(slopes[h]) * (n - 1 - t),
                   vt);
    }
    double difference = 0.0, norm = 0.0;
    for (int c = 0; c < dim; ++c) {
      difference += std::pow(out[h * dim + c] - expected.output(static_cast<std::size_t>(c)), 2);
      norm += std::pow(expected.output(static_cast<std::size_t>(c)), 2);
    }
    worst = std::fmax(worst, std::sqrt(difference / norm));
  }
  std::printf(
      "custom_attention: ALiBi over %d compressed tokens, %.2f bits per value, largest error against double %.1e\n", n,
      (format::key().bits_per_value() + format::value().bits_per_value()) / 2, worst);
  return worst < 1e-4 ? 0 : 1;
}
