// SPDX-License-Identifier: Apache-2.0
// A compressed cache of random data on the GPU, in several copies so that repeated launches do not read the L2
// cache. Shared by attention_time and the benchmarks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <packkv/packkv.cuh>
#include <vector>

namespace random_cache_detail {

/// Bell-shaped random 16-bit data, so that no code is rare and nothing is zero.
template <int Threads>
__global__ void fill_random(std::uint16_t* out, std::int64_t count, std::uint32_t seed) {
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * Threads + threadIdx.x; i < count;
       i += static_cast<std::int64_t>(gridDim.x) * Threads) {
    std::uint32_t x = static_cast<std::uint32_t>(i) * 2654435761u + seed;
    float sum = 0.0f;
    for (int k = 0; k < 4; ++k) {
      x ^= x << 13, x ^= x >> 17, x ^= x << 5;
      sum += static_cast<float>(x >> 8) / 16777216.0f - 0.5f;
    }
    out[i] = packkv::float_to_half(1.7f * sum);
  }
}

}  // namespace random_cache_detail

/// These programs end at the first error.
inline void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}
inline void require(const packkv::status& s) {
  if (s) return;
  std::fprintf(stderr, "packkv: %s\n", s.message);
  std::exit(1);
}

/// Device memory for the life of the object.
template <class T>
class device_buffer {
 public:
  explicit device_buffer(std::int64_t count) {
    require(cudaMalloc(reinterpret_cast<void**>(&data_), static_cast<std::size_t>(count) * sizeof(T)));
  }
  ~device_buffer() { (void)cudaFree(data_); }
  device_buffer(const device_buffer&) = delete;
  device_buffer& operator=(const device_buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

struct cache_size {
  int batch = 1, kv_heads = 8, group = 4, tokens = 32768;
  std::int64_t values(int dim) const { return std::int64_t{batch} * kv_heads * tokens * dim; }
};

/// Random K and V, their compressed copies, queries and outputs of one layer.
template <class Format>
class random_cache {
 public:
  static_assert(Format::key_head_dim == Format::value_head_dim, "these programs use one head dim");
  static constexpr int dim = Format::key_head_dim;
  static constexpr std::int64_t rotated_bytes = std::int64_t{256} << 20;  ///< several times the L2 cache of an H200

  explicit random_cache(const cache_size& s)
      : size(s),
        tiles((s.tokens + 63) / 64),
        set_bytes(std::int64_t{s.batch} * s.kv_heads * tiles * (Format::key_tile_bytes + Format::value_tile_bytes)),
        sets(static_cast<int>(std::clamp<std::int64_t>(rotated_bytes / set_bytes + 1, 1, 64))),
        input_(2 * size.values(dim)),
        pool_(set_bytes * sets),
        numbers_(2 * s.batch + 1),
        workspace_(workspace_bytes()),
        out_(queries_count()),
        scores_(std::int64_t{s.batch} * s.kv_heads * s.group * s.tokens) {
    random_cache_detail::fill_random<256><<<4096, 256>>>(input_.data(), 2 * size.values(dim), 12345u);
    require(cudaGetLastError());
    std::vector<std::int32_t> numbers(static_cast<std::size_t>(2 * s.batch + 1), s.tokens);
    for (int b = 0; b <= s.batch; ++b) numbers[static_cast<std::size_t>(s.batch + b)] = b;
    require(cudaMemcpy(numbers_.data(), numbers.data(), numbers.size() * 4, cudaMemcpyHostToDevice));
    require(packkv::initialize_workspace(exec()));
    require(cudaMemset(
        scores_.data(), 0x1c,
        static_cast<std::size_t>(std::int64_t{s.batch} * s.kv_heads * s.group * s.tokens) * 4));  // tiny weights
    for (int i = 0; i < sets; ++i) compress(i);
    require(cudaDeviceSynchronize());
  }

  void compress(int i) {
    require(packkv::compress(input(0), input(1), nullptr, parameters, view(i).pages, view(i).table, exec()));
  }
  void decompress(int i) {
    require(packkv::decompress(view(i).pages, view(i).table, nullptr, parameters, output(0), output(1), exec()));
  }
  void decode(int i) {
    packkv::attention_options options;
    options.softmax_scale = 1.0f / std::sqrt(static_cast<float>(dim));
    require(packkv::decode_attention(queries(), numbers_.data() + size.batch, view(i), parameters, out(), {}, options,
                                     exec()));
  }
  void key_gemv(int i) { require(packkv::key_gemv(queries(), view(i), parameters, 1.0f, scores_out(), exec())); }
  void value_gemv(int i) { require(packkv::value_gemv(scores_in(), view(i), parameters, out(), exec())); }

  cache_size size;
  std::int64_t tiles, set_bytes;  ///< bytes of one copy of the cache, K and V
  int sets;
  packkv::parameters<Format> parameters;

 private:
  std::int64_t heads() const { return std::int64_t{size.kv_heads} * size.group; }
  std::int64_t queries_count() const { return size.batch * heads() * dim; }
  std::int64_t workspace_bytes() const {
    return packkv::decode_workspace_bytes<Format>({size.batch, size.kv_heads, heads(), 1, size.tokens, 0});
  }
  packkv::exec exec() const {
    return {nullptr, workspace_.data(), static_cast<std::size_t>(workspace_bytes()), nullptr};
  }
  packkv::input_view<4> input(int side) const {
    return packkv::make_input(input_.data() + side * size.values(dim), packkv::dtype::float16,
                              {size.batch, size.kv_heads, size.tokens, dim});
  }
  packkv::output_view<4> output(int side) const {
    return packkv::make_output(input_.data() + side * size.values(dim), packkv::dtype::float16,
                               {size.batch, size.kv_heads, size.tokens, dim});
  }
  packkv::input_view<3> queries() const {
    return packkv::make_input(input_.data(), packkv::dtype::float16, {size.batch, heads(), dim});
  }
  packkv::output_view<3> out() const {
    return packkv::make_output(out_.data(), packkv::dtype::float16, {size.batch, heads(), dim});
  }
  packkv::output_view<3> scores_out() const {
    return packkv::make_output(scores_.data(), packkv::dtype::float32, {size.batch, heads(), size.tokens});
  }
  packkv::input_view<3> scores_in() const {
    return packkv::make_input(scores_.data(), packkv::dtype::float32, {size.batch, heads(), size.tokens});
  }
  packkv::cache_view view(int i) const {
    packkv::cache_view c;
    c.pages.key_data = pool_.data() + i % sets * set_bytes;
    c.pages.value_data = pool_.data() + i % sets * set_bytes + Format::key_tile_bytes;
    c.pages.num_pages = static_cast<std::int32_t>(size.batch * tiles);
    c.pages.kv_heads = size.kv_heads;
    c.pages.key_head_stride = c.pages.value_head_stride = Format::key_tile_bytes + Format::value_tile_bytes;
    c.pages.key_page_stride = c.pages.value_page_stride = size.kv_heads * c.pages.key_head_stride;
    c.table.row_stride = tiles;
    c.seq_lens = numbers_.data();
    c.batch = size.batch;
    c.max_seq_len = size.tokens;
    return c;
  }

  device_buffer<std::uint16_t> input_;
  device_buffer<std::uint8_t> pool_;
  device_buffer<std::int32_t> numbers_;
  device_buffer<std::uint8_t> workspace_;
  device_buffer<std::uint16_t> out_;
  device_buffer<float> scores_;
};

/// Median milliseconds of one call of f(i), i counting up, over rounds of `launches` calls between two events.
template <class F>
double median_ms(F&& f, int launches = 8, int rounds = 9) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin));
  require(cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = -2; round < rounds; ++round) {  // two rounds to warm up
    require(cudaEventRecord(begin));
    for (int i = 0; i < launches; ++i) f((round + 2) * launches + i);
    require(cudaEventRecord(end));
    require(cudaEventSynchronize(end));
    float ms = 0.0f;
    require(cudaEventElapsedTime(&ms, begin, end));
    if (round >= 0) times.push_back(ms / static_cast<float>(launches));
  }
  require(cudaEventDestroy(begin));
  require(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return static_cast<double>(times[times.size() / 2]);
}
