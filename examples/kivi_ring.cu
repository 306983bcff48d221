// SPDX-License-Identifier: Apache-2.0
// How an engine keeps a cache of which whole tiles are coded (KIVI: keys have a step per channel and 32 tokens): the
// newest tokens stay in a ring of 16 bits, and a tile is coded from the ring when its last token has come.
// main() compares with attention in double on the same bytes.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <packkv/packkv.cuh>
#include <vector>
namespace pk = packkv;

constexpr int dim = 128, kv_heads = 2, heads = 8, capacity = 128, window = 128, most = 1024, steps = 1000;
using kivi = pk::cache_format<pk::grouped_key_codec<dim, 2>, pk::grouped_value_codec<dim, 2>>;

namespace {

void require(const pk::status& s) {
  if (s) return;
  std::fprintf(stderr, "kivi_ring: %s\n", s.message);
  std::exit(1);
}
void finish() {
  if (cudaDeviceSynchronize() != cudaSuccess) std::abort();
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
    std::printf("kivi_ring: no CUDA device, nothing to run on\n");
    return 0;
  }
  std::uint32_t state = 1;
  const auto noise = [&] {
    float x = 0.0f;
    for (int i = 0; i < 6; ++i)
      x += static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / 16777216.0f - 0.5f;
    return pk::float_to_half(1.4f * x);
  };
  // One sequence, whose page i has tile i: K and V of a head behind each other.
  constexpr int tiles = most / 64, tile_bytes = kivi::key_tile_bytes + kivi::value_tile_bytes;
  auto* pool = managed<std::uint8_t>(std::int64_t{tiles} * kv_heads * tile_bytes);
  auto* numbers = managed<std::int32_t>(3);  // length; query_start_loc
  numbers[0] = numbers[1] = 0, numbers[2] = 1;
  pk::cache_view cache;
  cache.pages.key_data = pool;
  cache.pages.value_data = pool + kivi::key_tile_bytes;
  cache.pages.key_head_stride = cache.pages.value_head_stride = tile_bytes;
  cache.pages.key_page_stride = cache.pages.value_page_stride = kv_heads * tile_bytes;
  cache.pages.num_pages = tiles;
  cache.pages.kv_heads = kv_heads;
  cache.table.row_stride = tiles;
  cache.seq_lens = numbers;
  cache.batch = 1;
  cache.max_seq_len = most;
  auto* ring = managed<std::uint16_t>(2 * kv_heads * capacity * dim);
  cache.ring.keys = pk::make_input(ring, pk::dtype::float16, {1, kv_heads, capacity, dim});
  cache.ring.values =
      pk::make_input(ring + kv_heads * capacity * dim, pk::dtype::float16, {1, kv_heads, capacity, dim});
  cache.ring.window = window;

  const pk::parameters<kivi> params;
  auto* move = managed<pk::tile_move>(1);
  auto* q = managed<std::uint16_t>(heads * dim);
  auto* out = managed<float>(heads * dim);
  const std::int64_t bytes = pk::decode_workspace_bytes<kivi>({1, kv_heads, heads, 1, most, 0});
  const pk::exec e{nullptr, managed<std::uint8_t>(bytes), static_cast<std::size_t>(bytes), nullptr};
  require(pk::initialize_workspace(e));
  const auto queries = pk::make_input(q, pk::dtype::float16, {1, heads, dim});
  pk::attention_options options;
  options.softmax_scale = 1.0f / std::sqrt(static_cast<float>(dim));

  double worst = 0.0;
  for (int step = 0; step < steps; ++step) {
    // [step]
    const int slot = step % capacity;  // the new token goes into the ring, where the oldest was
    for (int h = 0; h < 2 * kv_heads; ++h)
      for (int c = 0; c < dim; ++c) ring[(h * capacity + slot) * dim + c] = noise();
    numbers[0] = step + 1;
    if (numbers[0] % 64 == 0) {  // its tile is full: the ring still has all of it
      const int first = numbers[0] - 64;
      *move = {first, 0, first % capacity};  // page i is tile i, so that slot `first` is token `first`
      require(pk::store_tiles(cache.ring.keys, cache.ring.values, move, 1, params, cache.pages, e));
    }
    // [step]
    for (int i = 0; i < heads * dim; ++i) q[i] = noise();
    require(pk::decode_attention(queries, numbers + 1, cache, params,
                                 pk::make_output(out, pk::dtype::float32, {1, heads, dim}), {}, options, e));
    finish();
    if (step % 37 != 0) continue;
    std::vector<float> expected(heads * dim);
    pk::device_report report;
    require(pk::reference::decode_attention(queries, numbers + 1, cache, params,
                                            pk::make_output(expected.data(), pk::dtype::float32, {1, heads, dim}), {},
                                            options, report));
    for (int h = 0; h < heads; ++h) {
      double difference = 0.0, norm = 0.0;
      for (int c = h * dim; c < (h + 1) * dim; ++c) {
        const double want = expected[static_cast<std::size_t>(c)];
        difference += std::pow(static_cast<double>(out[c]) - want, 2);
        norm += want * want;
      }
      worst = std::fmax(worst, std::sqrt(difference / norm));
    }
  }
  std::printf("KIVI with a ring of %d tokens, %d steps: largest relative error %.1e\n", capacity, steps, worst);
  return worst < 2e-3 ? 0 : 1;
}
