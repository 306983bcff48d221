// SPDX-License-Identifier: Apache-2.0
// CPU definition of scores, value sums and attention on the stored bytes of the `grouped` formats, in double.
// One idea: x^ = step * code + minimum, so steps and minima fold into q, S, P or O and no element is ever rebuilt:
//   q.x^ = sum (q step) code + q.minimum     sum w x^ = step sum w code + minimum sum w
#pragma once

#include <cmath>
#include <cstdint>
#include <packkv/reference/attention.hpp>
#include <packkv/reference/grouped.hpp>
#include <vector>

namespace packkv::reference {

namespace detail {

/// Reads codes, groups, means and the tail of one KV head.
class grouped_reader {
 public:
  grouped_reader(const grouped_view& view, const grouped_layout& layout, std::int64_t head)
      : view_(view), layout_(layout), head_(head) {}

  std::uint32_t code(std::int64_t token, int channel) const {
    const grouped_spec& spec = view_.spec;
    const int in_block = static_cast<int>(token % spec.block_tokens());
    const std::uint32_t* words =
        reinterpret_cast<const std::uint32_t*>(block(token) + grouped_tile_offset(spec, head_, in_block / tile_tokens));
    return read_code(words, locate(spec.strips, in_block % tile_tokens, channel));
  }
  packkv::detail::group_values group(std::int64_t token, int channel) const {
    const int in_block = static_cast<int>(token % view_.spec.block_tokens());
    return group_at(view_.spec, layout_.heads, block(token), head_, in_block, channel);
  }
  double mean(int channel) const {
    if (!view_.spec.centred) return 0.0;
    return half_to_float(load_bits(view_.bytes, 2 * (head_ * view_.spec.head_dim + channel)));
  }
  void tail(std::int64_t token, float* x) const {
    const std::int64_t at = head_ * (layout_.tokens - layout_.coded_tokens) + token - layout_.coded_tokens;
    load_token(view_.bytes + layout_.tail_offset + at * view_.spec.head_dim * 2, 2, view_.tail_type,
               view_.spec.head_dim, x);
  }

 private:
  const std::uint8_t* block(std::int64_t token) const {
    return view_.bytes + layout_.blocks_offset +
           token / view_.spec.block_tokens() * view_.spec.block_bytes(layout_.heads);
  }

  const grouped_view& view_;
  const grouped_layout& layout_;
  std::int64_t head_;
};

/// Channels of a run that has one group at a given token.
inline int group_run(const grouped_spec& spec) {
  return spec.axis == group_axis::channel ? 1 : spec.axis == group_axis::vector ? spec.group : spec.head_dim;
}

/// scores[t] = q . x^[t] for all tokens of a KV head.
inline void grouped_scores(const grouped_view& view, const grouped_layout& layout, std::int64_t head, const float* q,
                           double* scores) {
  const grouped_spec& spec = view.spec;
  const int dim = spec.head_dim, run = group_run(spec);
  const grouped_reader read(view, layout, head);
  float basis[max_head_dim], x[max_head_dim];
  packkv::detail::transform_forward(spec.transform, nullptr, dim, q, basis);
  double offset = 0.0;
  for (int c = 0; c < dim; ++c) offset += static_cast<double>(q[c]) * read.mean(c);

  if (spec.axis == group_axis::channel) {  // steps fold into q, once per group of tokens
    double folded[max_head_dim];
    for (std::int64_t first = 0; first < layout.coded_tokens; first += spec.group) {
      double zero = offset;
      for (int c = 0; c < dim; ++c) {
        const packkv::detail::group_values g = read.group(first, c);
        folded[c] = static_cast<double>(basis[c]) * static_cast<double>(g.step);
        zero += static_cast<double>(basis[c]) * static_cast<double>(g.minimum);
      }
      for (std::int64_t t = first; t < first + spec.group; ++t) {
        scores[t] = zero;
        for (int c = 0; c < dim; ++c) scores[t] += folded[c] * read.code(t, c);
      }
    }
  } else {  // steps multiply partial scores
    for (std::int64_t t = 0; t < layout.coded_tokens; ++t) {
      scores[t] = offset;
      for (int first = 0; first < dim; first += run) {
        const packkv::detail::group_values g = read.group(t, first);
        double codes = 0.0, sum = 0.0;
        for (int c = first; c < first + run; ++c) {
          codes += static_cast<double>(basis[c]) * read.code(t, c);
          sum += static_cast<double>(basis[c]);
        }
        scores[t] += static_cast<double>(g.step) * codes + static_cast<double>(g.minimum) * sum;
      }
    }
  }
  for (std::int64_t t = layout.coded_tokens; t < layout.tokens; ++t) {
    read.tail(t, x);
    scores[t] = dot(q, x, dim);
  }
}

/// out[c] = sum over t < count of weights[t] * x^[t, c]. Tokens at or past `count` are not read.
inline void grouped_sum(const grouped_view& view, const grouped_layout& layout, std::int64_t head,
                        const double* weights, std::int64_t count, double* out) {
  const grouped_spec& spec = view.spec;
  const int dim = spec.head_dim, run = group_run(spec);
  const grouped_reader read(view, layout, head);
  const std::int64_t coded = min_of(count, layout.coded_tokens);
  double sum[max_head_dim] = {}, total = 0.0;
  for (std::int64_t t = 0; t < coded; ++t) total += weights[t];

  if (spec.axis == group_axis::channel) {  // steps multiply sums over a group of tokens
    for (std::int64_t first = 0; first < coded; first += spec.group) {
      const std::int64_t end = min_of<std::int64_t>(first + spec.group, coded);
      double weight = 0.0;
      for (std::int64_t t = first; t < end; ++t) weight += weights[t];
      for (int c = 0; c < dim; ++c) {
        const packkv::detail::group_values g = read.group(first, c);
        double codes = 0.0;
        for (std::int64_t t = first; t < end; ++t) codes += weights[t] * read.code(t, c);
        sum[c] += static_cast<double>(g.step) * codes + static_cast<double>(g.minimum) * weight;
      }
    }
  } else {  // steps fold into the weights
    for (std::int64_t t = 0; t < coded; ++t)
      for (int first = 0; first < dim; first += run) {
        const packkv::detail::group_values g = read.group(t, first);
        const double folded = weights[t] * static_cast<double>(g.step);
        const double zero = weights[t] * static_cast<double>(g.minimum);
        for (int c = first; c < first + run; ++c) sum[c] += folded * read.code(t, c) + zero;
      }
  }

  float basis[max_head_dim], x[max_head_dim];
  for (int c = 0; c < dim; ++c) basis[c] = static_cast<float>(sum[c]);
  if (spec.transform != transform_kind::identity) {  // the basis is undone once, on the sum
    packkv::detail::transform_inverse(spec.transform, nullptr, dim, basis, x);
    for (int c = 0; c < dim; ++c) sum[c] = static_cast<double>(x[c]);
  }
  for (int c = 0; c < dim; ++c) out[c] = sum[c] + total * read.mean(c);
  for (std::int64_t t = coded; t < count; ++t) {
    read.tail(t, x);
    for (int c = 0; c < dim; ++c) out[c] += weights[t] * static_cast<double>(x[c]);
  }
}

}  // namespace detail

/// scores[h, i, t] = scale * q[h, i, :] . x^[h / group, t, :]. queries [query_heads, n, head_dim], query_heads a
/// multiple of the coded heads; scores [query_heads, n, tokens].
inline status grouped_key_gemv(const input_view<3>& queries, const grouped_view& keys, float scale,
                               const output_view<3>& scores) {
  using namespace packkv::detail;
  grouped_layout layout;
  if (const status s = check_grouped_view(keys, layout); !s) return s;
  if (const status s = check_sequence_operand(queries, keys.heads, keys.spec.head_dim); !s) return s;
  if (const status s = check_sequence_output(scores, queries, keys.tokens); !s) return s;
  const std::int64_t group = queries.extent[0] / keys.heads;
  std::vector<double> row(static_cast<std::size_t>(keys.tokens));
  float q[max_head_dim];
  for (std::int64_t h = 0; h < queries.extent[0]; ++h)
    for (std::int64_t i = 0; i < queries.extent[1]; ++i) {
      detail::load_token(address(queries, h, i, 0), queries.stride[2], queries.type, keys.spec.head_dim, q);
      detail::grouped_scores(keys, layout, h / group, q, row.data());
      for (std::int64_t t = 0; t < keys.tokens; ++t)
        store_element(address(scores, h, i, t), scores.type,
                      static_cast<float>(static_cast<double>(scale) * row[static_cast<std::size_t>(t)]));
    }
  return {};
}

/// out[h, i, :] = sum over t of weights[h, i, t] * x^[h / group, t, :]. weights [query_heads, n, tokens],
/// out [query_heads, n, head_dim].
inline status grouped_value_gemv(const input_view<3>& weights, const grouped_view& values, const output_view<3>& out) {
  using namespace packkv::detail;
  grouped_layout layout;
  if (const status s = check_grouped_view(values, layout); !s) return s;
  if (const status s = check_sequence_operand(weights, values.heads, values.tokens); !s) return s;
  if (const status s = check_sequence_output(out, weights, values.spec.head_dim); !s) return s;
  const std::int64_t group = weights.extent[0] / values.heads;
  std::vector<double> row(static_cast<std::size_t>(values.tokens));
  double sum[max_head_dim];
  for (std::int64_t h = 0; h < weights.extent[0]; ++h)
    for (std::int64_t i = 0; i < weights.extent[1]; ++i) {
      for (std::int64_t t = 0; t < values.tokens; ++t)
        row[static_cast<std::size_t>(t)] = load_element(address(weights, h, i, t), weights.type);
      detail::grouped_sum(values, layout, h / group, row.data(), values.tokens, sum);
      for (int c = 0; c < values.spec.head_dim; ++c)
        store_element(address(out, h, i, c), out.type, static_cast<float>(sum[c]));
    }
  return {};
}

/// softmax(scale * q.K^T) V on the stored bytes. queries [query_heads, n, D_k] are the last n positions: query i sees
/// the tokens 0 .. tokens - n + i. out [query_heads, n, D_v].
inline status grouped_attention(const input_view<3>& queries, const grouped_view& keys, const grouped_view& values,
                                float scale, const output_view<3>& out) {
  using namespace packkv::detail;
  grouped_layout key_layout, value_layout;
  if (const status s = check_grouped_view(keys, key_layout); !s) return s;
  if (const status s = check_grouped_view(values, value_layout); !s) return s;
  if (keys.heads != values.heads || keys.tokens != values.tokens)
    return refuse(status_code::shape_mismatch, "K and V disagree about heads or tokens");
  if (const status s = check_sequence_operand(queries, keys.heads, keys.spec.head_dim); !s) return s;
  if (const status s = check_sequence_output(out, queries, values.spec.head_dim); !s) return s;
  const std::int64_t n = queries.extent[1], group = queries.extent[0] / keys.heads;
  if (const status s = check_sequence_queries(n, keys.tokens, scale); !s) return s;
  std::vector<double> row(static_cast<std::size_t>(keys.tokens));
  float q[max_head_dim];
  double sum[max_head_dim];
  for (std::int64_t h = 0; h < queries.extent[0]; ++h)
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t visible = keys.tokens - n + i + 1;
      detail::load_token(address(queries, h, i, 0), queries.stride[2], queries.type, keys.spec.head_dim, q);
      detail::grouped_scores(keys, key_layout, h / group, q, row.data());
      double top = -INFINITY, total = 0.0;
      for (std::int64_t t = 0; t < visible; ++t) {
        double& s = row[static_cast<std::size_t>(t)];
        s *= static_cast<double>(scale);
        top = s > top ? s : top;
      }
      for (std::int64_t t = 0; t < visible; ++t) {
        double& s = row[static_cast<std::size_t>(t)];
        total += s = std::exp(s - top);
      }
      detail::grouped_sum(values, value_layout, h / group, row.data(), visible, sum);
      for (int c = 0; c < values.spec.head_dim; ++c)
        store_element(address(out, h, i, c), out.type, static_cast<float>(sum[c] / total));
    }
  return {};
}

}  // namespace packkv::reference
