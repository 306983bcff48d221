// SPDX-License-Identifier: Apache-2.0
// CPU definitions of decode_attention, key_gemv, value_gemv and merge_states, in double precision.
// They decode each token with reference::decode_token and apply the textbook formulas.
#pragma once

#include <cmath>
#include <cstdint>
#include <packkv/codec/checks.hpp>
#include <packkv/reference/compress.hpp>
#include <vector>

namespace packkv::reference {

namespace detail {

/// Softmax statistics and the unnormalised output of one query head, added token by token in double.
class attention_sum {
 public:
  explicit attention_sum(int value_dim) : output_(static_cast<std::size_t>(value_dim), 0.0) {}

  /// Adds a token with natural-base score `s` and value `v`.
  void add(double s, const float* v) {
    const double m = s > max_ ? s : max_;
    const double keep = max_ == m ? 1.0 : std::exp(max_ - m);
    const double p = std::exp(s - m);
    max_ = m;
    sum_ = sum_ * keep + p;
    for (std::size_t c = 0; c < output_.size(); ++c) output_[c] = output_[c] * keep + p * static_cast<double>(v[c]);
  }
  double output(std::size_t c) const { return sum_ == 0.0 ? 0.0 : output_[c] / sum_; }
  /// Natural log-sum-exp; -inf when nothing was added.
  double log_sum_exp() const { return sum_ == 0.0 ? -INFINITY : max_ + std::log(sum_); }

 private:
  double max_ = -INFINITY;
  double sum_ = 0.0;
  std::vector<double> output_;
};

inline double dot(const float* a, const float* b, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

/// Decodes one coded token of K or V in the original basis; false if its page is missing.
template <class Format>
bool decode_cached(const cache_view& cache, const parameters<Format>& params, side which, std::int64_t b, int head,
                   std::int64_t t, float* x, std::uint32_t& flags) {
  using namespace packkv::detail;
  const codec_spec spec = which == side::key ? params.format.key() : params.format.value();
  const std::int64_t index = t / tile_tokens;
  const std::int32_t page = find_page(cache.table, cache.pages.num_pages, b, index / cache.pages.tiles_per_page, flags);
  if (page < 0) return false;
  const int slot = static_cast<int>(index % cache.pages.tiles_per_page);
  const std::uint8_t* tile = which == side::key ? key_tile(cache.pages, spec, page, head, slot)
                                                : value_tile(cache.pages, spec, page, head, slot);
  decode_token(spec, of_head(spec, which == side::key ? params.key : params.value, head), tile,
               static_cast<int>(t % tile_tokens), x);
  return true;
}

}  // namespace detail

/// scores[b, h, t] = scale * q[b, h, :] . k^[b, t, :] for t < seq_lens[b]; later scores are left as they were,
/// tokens without a page give -inf. queries [batch, query_heads, D_k], scores [batch, query_heads, max_seq_len].
template <class Format>
status key_gemv(const input_view<3>& queries, const cache_view& cache, const parameters<Format>& params, float scale,
                const output_view<3>& scores, device_report& report) {
  using namespace packkv::detail;
  if (const status s = check_gemv(cache, params, queries, scores, Format::key_head_dim, cache.max_seq_len); !s)
    return s;
  if (const status s = check_parameter_arrays(params, cache.pages.kv_heads); !s) return s;
  const int group = static_cast<int>(queries.extent[1] / cache.pages.kv_heads);
  float q[max_head_dim], k[max_head_dim];
  for (std::int64_t b = 0; b < cache.batch; ++b) {
    const std::int32_t length = clamp_length(cache.seq_lens, b, cache.max_seq_len, report.flags);
    for (int head = 0; head < cache.pages.kv_heads; ++head)
      for (std::int64_t t = 0; t < length; ++t) {
        const bool present = detail::decode_cached(cache, params, side::key, b, head, t, k, report.flags);
        for (int g = 0; g < group; ++g) {
          const std::int64_t h = static_cast<std::int64_t>(head) * group + g;
          detail::load_token(address(queries, b, h, 0), queries.stride[2], queries.type, Format::key_head_dim, q);
          const double s = present ? static_cast<double>(scale) * detail::dot(q, k, Format::key_head_dim) : -INFINITY;
          store_element(address(scores, b, h, t), scores.type, static_cast<float>(s));
        }
      }
  }
  return {};
}

/// out[b, h, :] = sum over t < seq_lens[b] of weights[b, h, t] * v^[b, t, :]; tokens without a page count as 0.
/// weights [batch, query_heads, max_seq_len], out [batch, query_heads, D_v].
template <class Format>
status value_gemv(const input_view<3>& weights, const cache_view& cache, const parameters<Format>& params,
                  const output_view<3>& out, device_report& report) {
  using namespace packkv::detail;
  if (const status s = check_gemv(cache, params, weights, out, cache.max_seq_len, Format::value_head_dim); !s) return s;
  if (const status s = check_parameter_arrays(params, cache.pages.kv_heads); !s) return s;
  const int group = static_cast<int>(weights.extent[1] / cache.pages.kv_heads);
  constexpr int dim = Format::value_head_dim;
  float v[max_head_dim];
  std::vector<double> sum(static_cast<std::size_t>(group) * dim);
  for (std::int64_t b = 0; b < cache.batch; ++b) {
    const std::int32_t length = clamp_length(cache.seq_lens, b, cache.max_seq_len, report.flags);
    for (int head = 0; head < cache.pages.kv_heads; ++head) {
      sum.assign(sum.size(), 0.0);
      for (std::int64_t t = 0; t < length; ++t) {
        if (!detail::decode_cached(cache, params, side::value, b, head, t, v, report.flags)) continue;
        for (int g = 0; g < group; ++g) {
          const double w =
              load_element(address(weights, b, static_cast<std::int64_t>(head) * group + g, t), weights.type);
          for (int c = 0; c < dim; ++c) sum[static_cast<std::size_t>(g) * dim + c] += w * static_cast<double>(v[c]);
        }
      }
      for (int g = 0; g < group; ++g)
        for (int c = 0; c < dim; ++c)
          store_element(address(out, b, static_cast<std::int64_t>(head) * group + g, c), out.type,
                        static_cast<float>(sum[static_cast<std::size_t>(g) * dim + c]));
    }
  }
  return {};
}

/// softmax(scale * q.K^T) V over a cache; shapes and options as in packkv::decode_attention.
template <class Format>
status decode_attention(const input_view<3>& queries, const std::int32_t* query_start_loc, const cache_view& cache,
                        const parameters<Format>& params, const output_view<3>& out, const output_view<2>& lse,
                        const attention_options& options, device_report& report) {
  using namespace packkv::detail;
  if (const status s = check_decode(queries, query_start_loc, cache, params, out, lse, options); !s) return s;
  if (const status s = check_parameter_arrays(params, cache.pages.kv_heads); !s) return s;
  const int group = static_cast<int>(queries.extent[1] / cache.pages.kv_heads);
  const double log2e = 1.4426950408889634;
  float q[max_head_dim], k[max_head_dim], v[max_head_dim];
  for (std::int64_t b = 0; b < cache.batch; ++b) {
    const std::int32_t length = clamp_length(cache.seq_lens, b, cache.max_seq_len, report.flags);
    const std::int64_t begin = query_start_loc[b], count = query_start_loc[b + 1] - begin;
    if (begin < 0 || count < 0 || begin + count > queries.extent[0] || count > options.max_query_len) {
      report.flags |= report_length_out_of_range;
      continue;
    }
    if (count == 0) continue;
    const visibility view = make_visibility(cache, options, b, length, report.flags);
    const std::int64_t context = options.context_lens != nullptr ? options.context_lens[b] : length;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t position = context - count + i;
      for (std::int64_t h = 0; h < queries.extent[1]; ++h) {
        const int head = static_cast<int>(h / group);
        detail::load_token(address(queries, begin + i, h, 0), queries.stride[2], queries.type, Format::key_head_dim, q);
        detail::attention_sum sum(Format::value_head_dim);
        for (std::int64_t t = 0; t < length; ++t) {
          if (!view.visible(t, position)) continue;
          if (view.raw(t, position)) {
            const bool sink = t < view.sinks;
            const input_view<4>& keys = sink ? cache.sinks.keys : cache.ring.keys;
            const input_view<4>& values = sink ? cache.sinks.values : cache.ring.values;
            const std::int64_t row = sink || cache.ring.row == nullptr ? b : cache.ring.row[b];
            const std::int64_t slot = sink ? t : t % keys.extent[2];
            detail::load_token(address(keys, row, head, slot, 0), keys.stride[3], keys.type, Format::key_head_dim, k);
            detail::load_token(address(values, row, head, slot, 0), values.stride[3], values.type,
                               Format::value_head_dim, v);
          } else if (!detail::decode_cached(cache, params, side::key, b, head, t, k, report.flags) ||
                     !detail::decode_cached(cache, params, side::value, b, head, t, v, report.flags)) {
            continue;
          }
          double s = static_cast<double>(options.softmax_scale) * detail::dot(q, k, Format::key_head_dim);
          if (options.soft_cap > 0.0f) s = options.soft_cap * std::tanh(s / options.soft_cap);
          sum.add(s, v);
        }
        for (int c = 0; c < Format::value_head_dim; ++c)
          store_element(address(out, begin + i, h, c), out.type,
                        static_cast<float>(sum.output(static_cast<std::size_t>(c))));
        if (lse.data != nullptr)
          store_element(address(lse, begin + i, h), lse.type,
                        static_cast<float>(sum.log_sum_exp() * (options.base == lse_base::two ? log2e : 1.0)));
      }
    }
  }
  return {};
}

/// Merges n attention results over disjoint tokens: out = sum_i out_i * 2^(lse_i) / sum_i 2^(lse_i) (or base e).
/// outs [n, tokens, heads, D], lses float32 [n, tokens, heads]; lse may be a null view. A state with lse -inf is
/// ignored.
inline status merge_states(const input_view<4>& outs, const input_view<3>& lses, const output_view<3>& out,
                           const output_view<2>& lse, lse_base base) {
  using namespace packkv::detail;
  if (const status s = check_merge(outs, lses, out, lse, base); !s) return s;
  const double unit = base == lse_base::two ? 0.6931471805599453 : 1.0;
  for (std::int64_t t = 0; t < out.extent[0]; ++t)
    for (std::int64_t h = 0; h < out.extent[1]; ++h) {
      double m = -INFINITY, total = 0.0;
      for (std::int64_t i = 0; i < outs.extent[0]; ++i)
        m = std::fmax(m, unit * load_element(address(lses, i, t, h), dtype::float32));
      std::vector<double> sum(static_cast<std::size_t>(out.extent[2]), 0.0);
      for (std::int64_t i = 0; i < outs.extent[0]; ++i) {
        const double l = unit * load_element(address(lses, i, t, h), dtype::float32);
        if (l == -INFINITY) continue;
        const double weight = std::exp(l - m);
        total += weight;
        for (std::int64_t c = 0; c < out.extent[2]; ++c)
          sum[static_cast<std::size_t>(c)] +=
              weight * static_cast<double>(load_element(address(outs, i, t, h, c), outs.type));
      }
      for (std::int64_t c = 0; c < out.extent[2]; ++c)
        store_element(address(out, t, h, c), out.type,
                      total == 0.0 ? 0.0f : static_cast<float>(sum[static_cast<std::size_t>(c)] / total));
      if (lse.data != nullptr)
        store_element(address(lse, t, h), dtype::float32,
                      total == 0.0 ? -packkv::detail::infinity() : static_cast<float>((m + std::log(total)) / unit));
    }
  return {};
}

}  // namespace packkv::reference
