// SPDX-License-Identifier: Apache-2.0
// Random decode calls for tests: queries, overlays, options and outputs, on host and device alike.
#pragma once

#include <limits>

#include "test_cache.hpp"
#include "workspace.hpp"

namespace packkv_test {

/// Queries, overlays, options and outputs of one decode call on host and device.
template <class Format>
struct decode_problem {
  test_cache<Format>& cache;
  int group;
  tensor_data queries;  // [1, tokens, query_heads, D_k]
  std::vector<std::int32_t> query_start{0}, kv_begin, ring_rows, context;
  tensor_data sink_keys, sink_values, ring_keys, ring_values;
  device_array<std::int32_t> device_query_start, device_kv_begin, device_ring_rows, device_context;
  pk::attention_options options;
  int sinks = 0, ring_capacity = 0;
  bool with_kv_begin = false, with_rows = false, with_context = false;
  std::int64_t tokens = 0;

  decode_problem(random_source& random, test_cache<Format>& c, int group_size, int most_queries = 5)
      : cache(c), group(group_size) {
    options.softmax_scale = 1.0f / std::sqrt(static_cast<float>(Format::key_head_dim));
    options.max_query_len = random.one_in(2) ? 1 : random.between(1, most_queries);
    options.base = random.one_in(2) ? pk::lse_base::e : pk::lse_base::two;
    options.causal = !random.one_in(5);
    if (random.one_in(4)) options.soft_cap = 5.0f;
    if (random.one_in(3)) options.window = random.between(1, cache.shape.max_tokens + 10);
    if (random.one_in(2)) options.splits = random.between(1, 5);
    for (int b = 0; b < cache.shape.batch; ++b)
      query_start.push_back(query_start.back() + (random.one_in(5) ? 0 : random.between(1, options.max_query_len)));
    tokens = query_start.back() + random.between(0, 1);  // perhaps a row that no sequence owns
    queries = tensor_data(random, cache.shape.type, 1, tokens, static_cast<std::int64_t>(group) * cache.shape.kv_heads,
                          Format::key_head_dim);
    with_kv_begin = random.one_in(3);
    for (int b = 0; b < cache.shape.batch; ++b) kv_begin.push_back(random.between(0, cache.shape.max_tokens / 2));
    if (random.one_in(2)) {
      sinks = random.between(1, 80);
      sink_keys = overlay(random, cache.shape.batch, sinks, Format::key_head_dim);
      sink_values = overlay(random, cache.shape.batch, sinks, Format::value_head_dim);
    }
    if (random.one_in(2)) {
      const int window = random.between(1, 90);
      ring_capacity = window + options.max_query_len - 1 + random.between(0, 3);
      with_rows = random.one_in(2);
      const int rows = cache.shape.batch + 2;
      ring_keys = overlay(random, rows, ring_capacity, Format::key_head_dim);
      ring_values = overlay(random, rows, ring_capacity, Format::value_head_dim);
      for (int b = 0; b < cache.shape.batch; ++b)
        ring_rows.push_back(random.one_in(4) ? (random.one_in(2) ? -1 : rows + 7) : rows - 1 - b);
      ring_window = window;
    }
    if (random.one_in(4)) {  // this cache holds every second position of a longer context
      with_context = true;
      options.position_stride = 2;
      options.position_offset = random.between(0, 1);
      for (int b = 0; b < cache.shape.batch; ++b)
        context.push_back(2 * cache.lengths[static_cast<std::size_t>(b)] + random.between(0, 1));
    }
    device_query_start = device_array<std::int32_t>(query_start);
    device_kv_begin = device_array<std::int32_t>(kv_begin);
    device_ring_rows = device_array<std::int32_t>(ring_rows);
    device_context = device_array<std::int32_t>(context);
  }

  /// A ring of each sequence's last `window` tokens.
  void set_ring(random_source& random, int window) {
    ring_capacity = window + options.max_query_len + 1;
    ring_window = window;
    with_rows = false;
    ring_keys = overlay(random, cache.shape.batch, ring_capacity, Format::key_head_dim);
    ring_values = overlay(random, cache.shape.batch, ring_capacity, Format::value_head_dim);
  }
  tensor_data overlay(random_source& random, int rows, int count, int dim) {
    return tensor_data(random, cache.shape.type, rows, cache.shape.kv_heads, count, dim, 0.7f);
  }
  pk::input_view<3> query_view(bool device) const { return sequence(device ? queries.device() : queries.host()); }
  pk::cache_view view(bool device) {
    pk::cache_view c = device ? cache.gpu_cache() : cache.host_cache();
    if (with_kv_begin) c.kv_begin = device ? device_kv_begin.data() : kv_begin.data();
    if (sinks > 0)
      c.sinks = {device ? sink_keys.device() : sink_keys.host(), device ? sink_values.device() : sink_values.host()};
    if (ring_capacity > 0)
      c.ring = {device ? ring_keys.device() : ring_keys.host(), device ? ring_values.device() : ring_values.host(),
                with_rows ? (device ? device_ring_rows.data() : ring_rows.data()) : nullptr, ring_window};
    return c;
  }
  pk::attention_options with_arrays(bool device) const {
    pk::attention_options o = options;
    if (with_context) o.context_lens = device ? device_context.data() : context.data();
    return o;
  }
  std::int64_t heads() const { return queries.tokens; }
  pk::output_view<3> out_view(float* data) const {
    return pk::make_output(data, pk::dtype::float32, {tokens, heads(), Format::value_head_dim});
  }
  pk::output_view<2> lse_view(float* data) const {
    return pk::make_output(data, pk::dtype::float32, {tokens, heads()});
  }
  std::int64_t workspace_bytes() const {
    return pk::decode_workspace_bytes<Format>({cache.shape.batch, cache.shape.kv_heads, heads(), options.max_query_len,
                                               cache.shape.max_tokens, options.splits});
  }

  /// Of just the bytes that a call uses.
  device_array<std::uint8_t> decode_workspace() const {
    if constexpr (pk::is_fused<Format>) {
      device_array<std::uint8_t> workspace(static_cast<std::size_t>(workspace_bytes()));
      workspace.poison();
      return workspace;
    } else {
      const auto grid = pk::policy::make_decode_grid(cache.shape.batch, cache.shape.kv_heads,
                                                     std::int64_t{group} * options.max_query_len,
                                                     cache.shape.max_tokens, options.splits);
      return exact_workspace<Format::value_head_dim>(grid, workspace_bytes());
    }
  }

  struct result {
    std::vector<float> out, lse;
  };
  result reference() {
    result r{std::vector<float>(static_cast<std::size_t>(tokens * heads() * Format::value_head_dim), 7.0f),
             std::vector<float>(static_cast<std::size_t>(tokens * heads()), 7.0f)};
    const pk::status s = pk::reference::decode_attention(query_view(false), query_start.data(), view(false),
                                                         cache.host_parameters(), out_view(r.out.data()),
                                                         lse_view(r.lse.data()), with_arrays(false), cache.report);
    if (!s) throw std::runtime_error(s.message);
    return r;
  }
  result device() {
    return device([&](auto&&... arguments) { return pk::decode_attention(arguments...); });
  }
  /// By a function that takes what decode_attention takes. Every second time with exec::settled_cache: all has been
  /// made before.
  template <class Call>
  result device(Call&& call) {
    device_array<float> out(
        std::vector<float>(static_cast<std::size_t>(tokens * heads() * Format::value_head_dim), 7.0f));
    device_array<float> lse(std::vector<float>(static_cast<std::size_t>(tokens * heads()), 7.0f));
    device_array<std::uint8_t> workspace = decode_workspace();
    pk::exec e = cache.exec();
    e.workspace = workspace.data();
    e.workspace_bytes = workspace.size();
    e.settled_cache = settled_next_;
    settled_next_ = !settled_next_;
    pk::status s = after_failures([&] { return pk::initialize_workspace(e); });
    if (s)
      s = cache.after_failures([&] {
        return call(query_view(true), device_query_start.data(), view(true), cache.gpu_parameters(),
                    out_view(out.data()), lse_view(lse.data()), with_arrays(true), e);
      });
    if (!s) throw std::runtime_error(s.message);
    const auto bytes = workspace.host();
    for (std::int64_t i = 0; i < pk::detail::workspace_counter_bytes; ++i)
      if (bytes[static_cast<std::size_t>(i)] != 0) throw std::runtime_error("a counter is not zero after the launch");
    return {out.host(), lse.host()};
  }

 private:
  std::int32_t ring_window = 0;
  bool settled_next_ = true;
};

inline double worst_lse_error(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;  // also -inf
    const double error =
        std::abs(static_cast<double>(a[i]) - b[i]) / std::max(1.0, std::abs(static_cast<double>(b[i])));
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  return worst;
}

}  // namespace packkv_test
