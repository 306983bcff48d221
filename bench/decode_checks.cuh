// SPDX-License-Identifier: Apache-2.0
// What bench/decode.cu is compared with, and whether both are right: the 16-bit peer on random K and V, and the checks,
// which end the program where a result is wrong.
#pragma once

#include "decode_cache.cuh"
#include "half_decode.cuh"

namespace checks {

/// Attention of one query per block over K and V of one KV head, [tokens, Dim] float16, in float32. A warp takes every
/// eighth token.
template <int Dim>
__global__ void plain_attention(const std::uint16_t* queries, const std::uint16_t* keys, const std::uint16_t* values,
                                std::int64_t tokens, float scale, float* out) {
  constexpr int warps = 8, of_lane = Dim / 32;
  const int lane = packkv::detail::lane_id(), warp = packkv::detail::warp_id();
  const auto element = [&](const std::uint16_t* row, int i) { return packkv::half_to_float(row[lane + 32 * i]); };
  float q[of_lane], sum_v[of_lane] = {}, maximum = -1e30f, sum = 0.0f;
  for (int i = 0; i < of_lane; ++i) q[i] = scale * element(queries + std::int64_t{blockIdx.x} * Dim, i);
  for (std::int64_t t = warp; t < tokens; t += warps) {
    float score = 0.0f;
    for (int i = 0; i < of_lane; ++i) score += q[i] * element(keys + t * Dim, i);
    score = packkv::detail::warp_sum(score);
    const float m = fmaxf(maximum, score), keep = expf(maximum - m), p = expf(score - m);
    for (int i = 0; i < of_lane; ++i) sum_v[i] = sum_v[i] * keep + p * element(values + t * Dim, i);
    sum = sum * keep + p;
    maximum = m;
  }
  __shared__ float rows[warps][Dim], maxima[warps], sums[warps];
  for (int i = 0; i < of_lane; ++i) rows[warp][lane + 32 * i] = sum_v[i];
  if (lane == 0) maxima[warp] = maximum, sums[warp] = sum;
  __syncthreads();
  if (warp != 0) return;
  for (int w = 0; w < warps; ++w) maximum = fmaxf(maximum, maxima[w]);
  float total = 0.0f;
  for (int w = 0; w < warps; ++w) total += sums[w] * expf(maxima[w] - maximum);
  for (int i = 0; i < of_lane; ++i) {
    float value = 0.0f;
    for (int w = 0; w < warps; ++w) value += rows[w][lane + 32 * i] * expf(maxima[w] - maximum);
    out[std::int64_t{blockIdx.x} * Dim + lane + 32 * i] = value / total;
  }
}

inline std::vector<float> to_float(const std::vector<std::uint16_t>& halves) {
  std::vector<float> floats;
  for (const std::uint16_t h : halves) floats.push_back(packkv::half_to_float(h));
  return floats;
}

/// Largest error of a row of `row` values, as a part of the row's length. Ends the program above `bound`.
inline double require_close(const char* what, const std::vector<float>& x, const std::vector<float>& exact, int row,
                            double bound) {
  double worst = 0.0;
  for (std::size_t begin = 0; begin < exact.size(); begin += static_cast<std::size_t>(row)) {
    double error = 0.0, length = 0.0;
    for (std::size_t i = begin; i < begin + static_cast<std::size_t>(row); ++i) {
      const double difference = static_cast<double>(x[i]) - static_cast<double>(exact[i]);
      error += difference * difference;
      length += static_cast<double>(exact[i]) * static_cast<double>(exact[i]);
    }
    const double part = std::sqrt(error / length);
    if (!(part <= bound)) {
      std::fprintf(stderr, "WRONG RESULT: %s: row %zu differs by %.3g of its length (bound %.3g)\n", what,
                   begin / static_cast<std::size_t>(row), part, bound);
      std::exit(1);
    }
    worst = std::max(worst, part);
  }
  return worst;
}

/// Ends the program unless a call with exec::settled_cache gives the same bits.
template <class T>
void require_same(const char* what, const std::vector<T>& settled, const std::vector<T>& plain) {
  if (settled == plain) return;
  std::fprintf(stderr, "WRONG RESULT: %s with exec::settled_cache gives something else\n", what);
  std::exit(1);
}

/// Of one query head, on random data, where a tile left out of a million tokens makes 8e-3.
inline constexpr double query_bound = 5e-3;

/// decode_attention on two short sequences against its definition, packkv::reference::decode_attention.
template <class Format>
void decode_is_right(const decode_case& like, storage how) {
  decode_case small = like;
  small.name += " (short)";
  small.batch = 2, small.kv_heads = 2, small.tokens = 0;
  small.given_lengths = {333, how == storage::bare ? 322 : 170};
  const decode_cache<Format> cache(small, how, 2);
  cache.decode(1, nullptr);
  const auto out = to_host(cache.out(), cache.queries_count());
  const auto queries = to_host(cache.queries(), cache.queries_count());
  // The copy as 16-byte words, which is its alignment.
  auto copy = to_host(reinterpret_cast<const packkv::detail::bytes16*>(cache.pool() + cache.copy_stride()),
                      cache.copy_stride() / 16);
  const auto view = cache.view(reinterpret_cast<std::uint8_t*>(copy.data()), cache.table.data(), cache.lengths.data());
  std::vector<std::uint16_t> exact(out.size());
  packkv::device_report report{};
  require(packkv::reference::decode_attention(
      packkv::make_input<3>(queries.data(), packkv::dtype::float16,
                            {small.batch * small.query_len, cache.heads(), cache.dim}),
      cache.query_begin.data(), view, cache.host_parameters(), cache.output_view(exact.data()), {}, cache.options(),
      report));
  require_close(small.name.c_str(), to_float(out), to_float(exact), cache.dim, query_bound);
}

/// The last query of the last sequence and KV head of the case itself, against plain attention over what
/// packkv::decompress makes of the same pages. \return the largest error of a query head
template <class Format>
double long_decode_is_right(const decode_cache<Format>& cache) {
  constexpr int dim = Format::key_head_dim;
  const decode_case& c = cache.of;
  const std::int64_t b = c.batch - 1, length = cache.lengths.back(), head_bytes = length * dim * 2;
  const std::int64_t values = length * c.kv_heads * dim;
  device_buffer<std::uint16_t> decoded(2 * values);
  std::uint16_t* side[2] = {decoded.data(), decoded.data() + values};
  packkv::cache_view v = cache.view(0);
  v.table.pages = v.table.pages != nullptr ? v.table.pages + b * v.table.row_stride : nullptr;
  if (cache.how == storage::bare) {
    v.pages.key_data = static_cast<std::uint8_t*>(v.pages.key_data) + b * v.pages.key_page_stride;
    v.pages.value_data = static_cast<std::uint8_t*>(v.pages.value_data) + b * v.pages.value_page_stride;
    v.pages.num_pages = 1;
  }
  const auto to = [&](int i) {
    return packkv::make_output<4>(side[i], packkv::dtype::float16, {1, c.kv_heads, length, dim});
  };
  require(packkv::decompress(v.pages, v.table, nullptr, cache.parameters, to(0), to(1), packkv::exec{}));
  const auto overlay = [&](int i, const packkv::input_view<4>& from, std::int64_t slot, std::int64_t token,
                           std::int64_t count) {
    require(cudaMemcpy2D(side[i] + token * dim, static_cast<std::size_t>(head_bytes),
                         packkv::detail::address(from, b, 0, slot, 0), static_cast<std::size_t>(from.stride[1]),
                         static_cast<std::size_t>(count * dim * 2), static_cast<std::size_t>(c.kv_heads),
                         cudaMemcpyDeviceToDevice));
  };
  if (cache.how != storage::bare)
    for (int i = 0; i < 2; ++i) {
      overlay(i, i == 0 ? v.sinks.keys : v.sinks.values, 0, 0, std::min<std::int64_t>(cache.sink_tokens, length));
      const std::int64_t first = std::max<std::int64_t>(cache.sink_tokens, length - v.ring.window);
      for (std::int64_t t = first; t < length; ++t)
        overlay(i, i == 0 ? v.ring.keys : v.ring.values, t % cache.ring_capacity(), t, 1);
    }
  device_buffer<float> exact(c.group * dim);
  const std::int64_t row = cache.queries_count() - c.group * dim;  // of the last KV head of the last query
  const std::int64_t last = (c.kv_heads - 1) * length * dim;
  plain_attention<dim><<<static_cast<unsigned>(c.group), 256>>>(cache.queries() + row, side[0] + last, side[1] + last,
                                                                length, cache.options().softmax_scale, exact.data());
  require(cudaGetLastError());
  cache.decode(0, nullptr, true);
  const auto settled = to_host(cache.out(), cache.queries_count());
  cache.decode(0, nullptr);
  require_same(c.name.c_str(), settled, to_host(cache.out(), cache.queries_count()));
  return require_close(c.name.c_str(), to_float(to_host(cache.out() + row, c.group * dim)),
                       to_host(exact.data(), c.group * dim), dim, query_bound);
}

// ----------------------------------------------------------------------------------------------------------- the peer
/// half_decode on random K and V of the same shape, in copies that take turns.
class half_peer {
 public:
  static bool serves(const decode_case& c, int dim) {
    return dim == half_decode::dim && c.group <= half_decode::heads && c.query_len == 1;
  }
  static std::int64_t bytes_of(const std::vector<std::int32_t>& lengths, int kv_heads) {
    std::int64_t tokens = 0;
    for (const std::int32_t n : lengths) tokens += n;
    return 4 * tokens * kv_heads * half_decode::dim;
  }

  half_peer(const decode_case& c, int sms)
      : lengths(c.lengths()),
        copy_bytes(bytes_of(lengths, c.kv_heads)),
        copies(timing::copies_for(copy_bytes)),
        sequences_(c.batch + 1),
        data_(copy_bytes * copies / 2),
        queries_(queries_of(c)),
        out_(queries_of(c)),
        counters_(c.batch * c.kv_heads),
        partial_(half_decode::partial_floats(sms)) {
    std::vector<half_decode::sequence> list;
    std::int64_t token = 0, step = 0;
    for (const std::int32_t n : lengths) {
      list.push_back({token, step, n});
      token += n;
      step += (n + half_decode::step_tokens - 1) / half_decode::step_tokens;
    }
    list.push_back({token, step, 0});
    blocks_ = half_decode::blocks_for(step * c.kv_heads, sms);
    require(cudaMemcpy(sequences_.data(), list.data(), list.size() * sizeof(list[0]), cudaMemcpyHostToDevice));
    require(cudaMemset(counters_.data(), 0, static_cast<std::size_t>(c.batch * c.kv_heads) * 4));
    random_cache_detail::fill_random<256><<<4096, 256>>>(data_.data(), copy_bytes * copies / 2, 99u);
    random_cache_detail::fill_random<256><<<256, 256>>>(queries_.data(), queries_of(c), 5u);
    require(cudaDeviceSynchronize());
    a_ = {data_.data(),
          nullptr,
          queries_.data(),
          out_.data(),
          sequences_.data(),
          partial_.data(),
          counters_.data(),
          c.batch,
          c.kv_heads,
          c.group,
          1.0f / std::sqrt(static_cast<float>(half_decode::dim))};
  }

  void decode(int copy, cudaStream_t stream) const {
    half_decode::arguments a = a_;
    a.keys = data_.data() + copy_bytes / 2 * copy;
    a.values = a.keys + copy_bytes / 4;
    require(half_decode::launch(a, blocks_, stream));
  }

  /// Copy 0 against plain attention: the (sequence, KV head) pairs from `first_pair` on.
  void is_right(const decode_case& c, std::int64_t first_pair) const {
    constexpr int dim = half_decode::dim;
    const std::int64_t of_pair = c.group * dim;
    device_buffer<float> exact(queries_of(c));
    std::int64_t pair = 0;
    const std::uint16_t* keys = data_.data();
    for (const std::int32_t n : lengths)
      for (int h = 0; h < c.kv_heads; ++h, ++pair, keys += std::int64_t{n} * dim) {
        if (pair < first_pair) continue;
        plain_attention<dim><<<static_cast<unsigned>(c.group), 256>>>(
            queries_.data() + pair * of_pair, keys, keys + copy_bytes / 4, n, a_.scale, exact.data() + pair * of_pair);
        require(cudaGetLastError());
      }
    decode(0, nullptr);
    const std::int64_t first = first_pair * of_pair, count = queries_of(c) - first;
    require_close("the 16-bit peer", to_float(to_host(out_.data() + first, count)),
                  to_host(exact.data() + first, count), dim, 3e-3);
  }
  /// The last pair of a case.
  void is_right(const decode_case& c) const { is_right(c, std::int64_t{c.batch} * c.kv_heads - 1); }
  /// Short sequences, twice, since a launch leaves its counters to the next.
  static void works(int sms) {
    for (const int group : {1, 4, 7, 8}) {
      decode_case c;
      c.batch = 4, c.kv_heads = 3, c.group = group;
      c.given_lengths = {1, 5000, 129, 777};
      const half_peer peer(c, sms);
      for (int i = 0; i < 2; ++i) peer.is_right(c, 0);
    }
  }

  const std::uint16_t* data() const { return data_.data(); }
  const std::vector<std::int32_t> lengths;
  const std::int64_t copy_bytes;
  const int copies;

 private:
  static std::int64_t queries_of(const decode_case& c) {
    return std::int64_t{c.batch} * c.kv_heads * c.group * half_decode::dim;
  }

  device_buffer<half_decode::sequence> sequences_;
  device_buffer<std::uint16_t> data_, queries_, out_;
  device_buffer<std::uint32_t> counters_;
  device_buffer<float> partial_;
  std::int64_t blocks_ = 0;
  half_decode::arguments a_{};
};

}  // namespace checks
