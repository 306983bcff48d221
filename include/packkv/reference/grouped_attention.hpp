// SPDX-License-Identifier: Apache-2.0
// CPU definition of scores, value sums and attention on the stored bytes of the `grouped` formats, in double; the
// templates serve every format that has readers (reference/grouped_side.hpp).
// One idea: x^ = step * code + offset, so steps and offsets fold into q, S, P or O and no element is ever rebuilt:
//   q.x^ = sum (q step) code + q.offset     sum w x^ = step sum w code + offset sum w
#pragma once

#include <cmath>
#include <cstdint>
#include <packkv/reference/attention.hpp>
#include <packkv/reference/grouped.hpp>
#include <vector>

namespace packkv::reference {

namespace detail {

/// scores[t] = q . x^[t] for all tokens of the head that `read` reads.
template <class Reader>
void head_scores(const Reader& read, const float* q, double* scores) {
  const grouped_spec& spec = read.spec();
  const std::int64_t coded = read.coded_tokens();
  const int dim = spec.head_dim, run = group_run(spec);
  float basis[max_head_dim], x[max_head_dim];
  packkv::detail::transform_forward(spec.transform, {}, dim, q, basis);
  double offset = 0.0;
  for (int c = 0; c < dim; ++c) offset += static_cast<double>(q[c]) * static_cast<double>(read.mean(c));

  if (spec.axis == group_axis::channel) {  // steps fold into q, once per group of tokens
    double folded[max_head_dim];
    for (std::int64_t first = 0; first < coded; first += spec.group) {
      double zero = offset;
      for (int c = 0; c < dim; ++c) {
        const packkv::detail::group_values g = read.group(first, c);
        folded[c] = static_cast<double>(basis[c]) * static_cast<double>(g.step);
        zero += static_cast<double>(basis[c]) * g.offset();
      }
      for (std::int64_t t = first; t < first + spec.group; ++t) {
        scores[t] = zero;
        for (int c = 0; c < dim; ++c) scores[t] += folded[c] * read.code(t, c);
      }
    }
  } else {  // steps multiply partial scores
    for (std::int64_t t = 0; t < coded; ++t) {
      scores[t] = offset;
      for (int first = 0; first < dim; first += run) {
        const packkv::detail::group_values g = read.group(t, first);
        double codes = 0.0, sum = 0.0;
        for (int c = first; c < first + run; ++c) {
          codes += static_cast<double>(basis[c]) * read.code(t, c);
          sum += static_cast<double>(basis[c]);
        }
        scores[t] += static_cast<double>(g.step) * codes + g.offset() * sum;
      }
    }
  }
  for (std::int64_t t = coded; t < read.tokens(); ++t) {
    read.tail(t, x);
    scores[t] = dot(q, x, dim);
  }
}

/// out[c] = sum over t < count of weights[t] * x^[t, c]. Tokens at or past `count` are not read.
template <class Reader>
void head_sum(const Reader& read, const double* weights, std::int64_t count, double* out) {
  const grouped_spec& spec = read.spec();
  const int dim = spec.head_dim, run = group_run(spec);
  const std::int64_t coded = min_of(count, read.coded_tokens());
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
        sum[c] += static_cast<double>(g.step) * codes + g.offset() * weight;
      }
    }
  } else {  // steps fold into the weights
    for (std::int64_t t = 0; t < coded; ++t)
      for (int first = 0; first < dim; first += run) {
        const packkv::detail::group_values g = read.group(t, first);
        const double folded = weights[t] * static_cast<double>(g.step);
        const double zero = weights[t] * g.offset();
        for (int c = first; c < first + run; ++c) sum[c] += folded * read.code(t, c) + zero;
      }
  }

  float basis[max_head_dim], x[max_head_dim];
  for (int c = 0; c < dim; ++c) basis[c] = static_cast<float>(sum[c]);
  if (spec.transform != transform_kind::identity) {  // the basis is undone once, on the sum
    packkv::detail::transform_inverse(spec.transform, {}, dim, basis, x);
    for (int c = 0; c < dim; ++c) sum[c] = static_cast<double>(x[c]);
  }
  // Without coded tokens the means are those of nothing, and not read.
  for (int c = 0; c < dim; ++c) out[c] = sum[c] + (coded > 0 ? total * static_cast<double>(read.mean(c)) : 0.0);
  for (std::int64_t t = coded; t < count; ++t) {
    read.tail(t, x);
    for (int c = 0; c < dim; ++c) out[c] += weights[t] * static_cast<double>(x[c]);
  }
}

/// The calls below for a side of any format; `side` is memory for what open_side makes of a view.
template <class View, class Side>
status key_gemv_on(const input_view<3>& queries, const View& keys, float scale, const output_view<3>& scores,
                   Side& side) {
  using namespace packkv::detail;
  if (const status s = open_side(keys, side); !s) return s;
  const int dim = side.groups().head_dim;
  if (const status s = check_sequence_operand(queries, keys.heads, dim); !s) return s;
  if (const status s = check_sequence_output(scores, queries, keys.tokens); !s) return s;
  const std::int64_t group = queries.extent[0] / keys.heads;
  std::vector<double> row(static_cast<std::size_t>(keys.tokens));
  float q[max_head_dim];
  for (std::int64_t h = 0; h < queries.extent[0]; ++h)
    for (std::int64_t i = 0; i < queries.extent[1]; ++i) {
      load_token(address(queries, h, i, 0), queries.stride[2], queries.type, dim, q);
      head_scores(side.read(h / group), q, row.data());
      for (std::int64_t t = 0; t < keys.tokens; ++t)
        store_element(address(scores, h, i, t), scores.type,
                      static_cast<float>(static_cast<double>(scale) * row[static_cast<std::size_t>(t)]));
    }
  return {};
}

template <class View, class Side>
status value_gemv_on(const input_view<3>& weights, const View& values, const output_view<3>& out, Side& side) {
  using namespace packkv::detail;
  if (const status s = open_side(values, side); !s) return s;
  const int dim = side.groups().head_dim;
  if (const status s = check_sequence_operand(weights, values.heads, values.tokens); !s) return s;
  if (const status s = check_sequence_output(out, weights, dim); !s) return s;
  const std::int64_t group = weights.extent[0] / values.heads;
  std::vector<double> row(static_cast<std::size_t>(values.tokens));
  double sum[max_head_dim];
  for (std::int64_t h = 0; h < weights.extent[0]; ++h)
    for (std::int64_t i = 0; i < weights.extent[1]; ++i) {
      for (std::int64_t t = 0; t < values.tokens; ++t)
        row[static_cast<std::size_t>(t)] = load_element(address(weights, h, i, t), weights.type);
      head_sum(side.read(h / group), row.data(), values.tokens, sum);
      for (int c = 0; c < dim; ++c) store_element(address(out, h, i, c), out.type, static_cast<float>(sum[c]));
    }
  return {};
}

template <class View, class Side>
status attention_on(const input_view<3>& queries, const View& keys, const View& values, float scale,
                    const output_view<3>& out, Side& key_side, Side& value_side) {
  using namespace packkv::detail;
  if (const status s = open_side(keys, key_side); !s) return s;
  if (const status s = open_side(values, value_side); !s) return s;
  if (keys.heads != values.heads || keys.tokens != values.tokens)
    return refuse(status_code::shape_mismatch, "K and V disagree about heads or tokens");
  const int key_dim = key_side.groups().head_dim, value_dim = value_side.groups().head_dim;
  if (const status s = check_sequence_operand(queries, keys.heads, key_dim); !s) return s;
  if (const status s = check_sequence_output(out, queries, value_dim); !s) return s;
  const std::int64_t n = queries.extent[1], group = queries.extent[0] / keys.heads;
  if (const status s = check_sequence_queries(n, keys.tokens, scale); !s) return s;
  std::vector<double> row(static_cast<std::size_t>(keys.tokens));
  float q[max_head_dim];
  double sum[max_head_dim];
  for (std::int64_t h = 0; h < queries.extent[0]; ++h)
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t visible = keys.tokens - n + i + 1;
      load_token(address(queries, h, i, 0), queries.stride[2], queries.type, key_dim, q);
      head_scores(key_side.read(h / group), q, row.data());
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
      head_sum(value_side.read(h / group), row.data(), visible, sum);
      for (int c = 0; c < value_dim; ++c)
        store_element(address(out, h, i, c), out.type, static_cast<float>(sum[c] / total));
    }
  return {};
}

}  // namespace detail

/// scores[h, i, t] = scale * q[h, i, :] . x^[h / group, t, :]. queries [query_heads, n, head_dim], query_heads a
/// multiple of the coded heads; scores [query_heads, n, tokens].
inline status grouped_key_gemv(const input_view<3>& queries, const grouped_view& keys, float scale,
                               const output_view<3>& scores) {
  detail::grouped_side side;
  return detail::key_gemv_on(queries, keys, scale, scores, side);
}

/// out[h, i, :] = sum over t of weights[h, i, t] * x^[h / group, t, :]. weights [query_heads, n, tokens],
/// out [query_heads, n, head_dim].
inline status grouped_value_gemv(const input_view<3>& weights, const grouped_view& values, const output_view<3>& out) {
  detail::grouped_side side;
  return detail::value_gemv_on(weights, values, out, side);
}

/// softmax(scale * q.K^T) V on the stored bytes. queries [query_heads, n, D_k] are the last n positions: query i sees
/// the tokens 0 .. tokens - n + i. out [query_heads, n, D_v].
inline status grouped_attention(const input_view<3>& queries, const grouped_view& keys, const grouped_view& values,
                                float scale, const output_view<3>& out) {
  detail::grouped_side key_side, value_side;
  return detail::attention_on(queries, keys, values, scale, out, key_side, value_side);
}

}  // namespace packkv::reference
