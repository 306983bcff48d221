// SPDX-License-Identifier: Apache-2.0
// What the device tests of whole-sequence formats share: tensors of one sequence, reports, and the check of GEMVs and
// attention against plain sums in double over the decoded elements.
#pragma once

#include <cmath>
#include <functional>
#include <packkv/device/sequences.cuh>
#include <string>

#include "../support/catch.hpp"
#include "test_cache.hpp"
#include "workspace.hpp"

namespace packkv_test {

/// Rounds and tokens of the random tests: what they cost is the host's loops in double, on a GPU as well.
inline const int sequence_rounds = repeats > 1 ? 6 : 4;
inline constexpr int sequence_tokens = 300;

inline void require(const pk::status& s) {
  if (!s) throw std::runtime_error(s.message);
}

/// A report on the device.
class device_reporter {
 public:
  pk::exec exec() { return {nullptr, nullptr, 0, report_.data()}; }
  pk::device_report read() const { return report_.host()[0]; }

 private:
  device_array<pk::device_report> report_{std::vector<pk::device_report>(1)};
};

/// One sequence whose channels have offsets, as keys have them.
inline tensor_data random_sequence(random_source& random, pk::dtype type, int heads, int tokens, int dim) {
  tensor_data x(random, type, 1, heads, tokens, dim);
  const std::int64_t row = x.dim + x.pad;
  for (std::int64_t i = 0; i < heads * row; ++i) {
    const float offset = random.one_in(6) ? 8.0f * random.normal() : 0.3f * random.normal();
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::uint16_t& bits = x.host_bits[static_cast<std::size_t>((i / row * tokens + t) * row + i % row)];
      const float y = (type == pk::dtype::float16 ? pk::half_to_float(bits) : pk::bfloat16_to_float(bits)) + offset;
      bits = type == pk::dtype::float16 ? pk::float_to_half(y) : pk::float_to_bfloat16(y);
    }
  }
  x.device_bits.assign(x.host_bits);
  return x;
}

/// Host memory at a 16-byte boundary.
class aligned_bytes {
 public:
  explicit aligned_bytes(std::int64_t size = 0)
      : size_(static_cast<std::size_t>(size)), chunks_(static_cast<std::size_t>(size / 16 + 1)) {}
  std::uint8_t* data() { return chunks_[0].byte; }
  const std::uint8_t* data() const { return chunks_[0].byte; }
  std::vector<std::uint8_t> copy() const { return {data(), data() + size_}; }

 private:
  struct alignas(16) chunk {
    std::uint8_t byte[16];
  };
  std::size_t size_;
  std::vector<chunk> chunks_;
};

/// Poisoned output [heads, rows, length] on host and device, with a gap behind each row.
struct tensor_output {
  pk::dtype type;
  std::int64_t heads, rows, length, gap = 2;
  std::vector<std::uint8_t> host_bytes;
  device_array<std::uint8_t> device_bytes;

  tensor_output(pk::dtype t, std::int64_t h, std::int64_t r, std::int64_t l)
      : type(t),
        heads(h),
        rows(r),
        length(l),
        host_bytes(static_cast<std::size_t>(h * r * (l + gap)) * static_cast<std::size_t>(pk::bytes_of(t)), 0xff),
        device_bytes(host_bytes) {}
  pk::output_view<3> view(void* data) const {
    auto v = pk::make_output<3>(data, type, {heads, rows, length});
    v.stride[1] = (length + gap) * pk::bytes_of(type);
    v.stride[0] = rows * v.stride[1];
    return v;
  }
  pk::output_view<3> host() { return view(host_bytes.data()); }
  pk::output_view<3> device() { return view(device_bytes.data()); }
  /// Element of what the device wrote, after fetch().
  void fetch() { host_bytes = device_bytes.host(); }
  double at(std::int64_t h, std::int64_t r, std::int64_t i) {
    return static_cast<double>(pk::detail::load_element(pk::detail::address(host(), h, r, i), type));
  }
};

/// Decoded elements [heads, tokens, dim] of a side.
struct decoded_side {
  std::int64_t heads, tokens, dim;
  std::vector<float> x;
  double at(std::int64_t h, std::int64_t t, std::int64_t c) const {
    return static_cast<double>(x[static_cast<std::size_t>((h * tokens + t) * dim + c)]);
  }
};

/// The calls of a format over fixed K and V of one sequence.
struct sequence_calls {
  std::function<pk::status(const pk::input_view<3>&, float, const pk::output_view<3>&, const pk::exec&)> key_gemv;
  std::function<pk::status(const pk::input_view<3>&, const pk::output_view<3>&, const pk::exec&)> value_gemv;
  std::function<pk::status(const pk::input_view<3>&, float, const pk::output_view<3>&, const pk::output_view<2>&,
                           const pk::exec&)>
      attention;
  // What attention does with 16-bit tokens, whose data these are; null: nothing.
  const tensor_data *keys = nullptr, *values = nullptr;
  pk::sequence_options options = {};
};

/// Options of attention for a sequence with these tensors: one draw in two none, else any.
inline void draw_options(random_source& random, const tensor_data& keys, const tensor_data& values,
                         sequence_calls& calls) {
  if (random.one_in(2)) return;
  calls.keys = &keys;
  calls.values = &values;
  calls.options.keys = sequence(keys.device());
  calls.options.values = sequence(values.device());
  calls.options.sinks = random.one_in(2) ? random.between(1, 80) : 0;
  calls.options.recent = random.one_in(2) ? random.between(1, 90) : 0;
  calls.options.window = random.one_in(2) ? random.between(1, static_cast<int>(keys.tokens) + 9) : 0;
}

/// Runs the calls on random queries and weights and compares with sums in double. `scored` of the tokens are those that
/// the GEMVs know (all but a tail that they do not take). Bounds follow from float sums of that many terms. `group`
/// query heads for each KV head and `n` queries, or, where 0, as drawn.
template <int ValueDim>
void check_sequence_calls(random_source& random, const decoded_side& keys, const decoded_side& values,
                          std::int64_t scored, std::int64_t most_queries, const sequence_calls& calls, int group = 0,
                          std::int64_t n = 0) {
  constexpr double ulp = 0x1p-24;
  if (group == 0) group = random.between(1, 5);
  if (n == 0) n = random.between(1, static_cast<int>(std::min<std::int64_t>(most_queries, 3)));
  const std::int64_t heads = keys.heads * group, tokens = keys.tokens;
  const float scale = 1.0f / std::sqrt(static_cast<float>(keys.dim));
  const auto type = random.one_in(2) ? pk::dtype::float16 : pk::dtype::bfloat16;
  const tensor_data q(random, type, 1, heads, n, keys.dim), w(random, type, 1, heads, n, scored);
  const auto grid = pk::policy::make_decode_grid(1, keys.heads, group * n, tokens, 0);
  device_array<std::uint8_t> workspace =
      exact_workspace<ValueDim>(grid, pk::sequence_workspace_bytes<ValueDim>({1, keys.heads, heads, n, tokens, 0}));
  device_reporter reporter;
  pk::exec e = reporter.exec();
  e.workspace = workspace.data();
  e.workspace_bytes = workspace.size();
  require(after_failures([&] { return pk::initialize_workspace(e); }));

  tensor_output scores(pk::dtype::float32, heads, n, scored), sums(pk::dtype::float32, heads, n, values.dim),
      out(pk::dtype::float32, heads, n, values.dim), lse(pk::dtype::float32, 1, heads, n);
  const std::vector<std::uint8_t> untouched = sums.host_bytes;
  require(after_failures([&] { return calls.key_gemv(sequence(q.device()), scale, scores.device(), e); }));
  require(after_failures([&] { return calls.value_gemv(sequence(w.device()), sums.device(), e); }));
  pk::output_view<2> lse_view = pk::make_output<2>(lse.device_bytes.data(), pk::dtype::float32, {heads, n});
  lse_view.stride[0] = lse.device().stride[1];
  require(after_failures([&] { return calls.attention(sequence(q.device()), scale, out.device(), lse_view, e); }));
  for (tensor_output* x : {&scores, &sums, &out, &lse}) x->fetch();
  CHECK(reporter.read().flags == 0);

  const auto load = [](const tensor_data& x, std::int64_t h, std::int64_t i, std::int64_t c) {
    return static_cast<double>(pk::detail::load_element(pk::detail::address(x.host(), 0, h, i, c), x.type));
  };
  const pk::sequence_options& o = calls.options;
  const auto distance = [&](std::int64_t i, std::int64_t t) { return tokens - n + i - t; };
  const auto seen = [&](std::int64_t i, std::int64_t t) {
    return distance(i, t) >= 0 && (o.window == 0 || distance(i, t) < o.window);
  };
  const auto raw = [&](std::int64_t i, std::int64_t t) {
    return seen(i, t) && (t < o.sinks || distance(i, t) < o.recent);
  };
  int wrong_scores = 0, wrong_sums = 0, wrong_outputs = 0;
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t kv = h / group;
      std::vector<double> p(static_cast<std::size_t>(tokens));
      double top = -INFINITY, largest = 0.0, total = 0.0;
      for (std::int64_t t = 0; t < tokens; ++t) {
        double sum = 0.0, size = 0.0;
        for (std::int64_t c = 0; c < keys.dim; ++c) {
          const double term = load(q, h, i, c) * keys.at(kv, t, c);
          sum += term;
          size += std::fabs(term);
        }
        const double s = sum * static_cast<double>(scale);
        size *= static_cast<double>(scale);
        if (t < scored && !(std::fabs(scores.at(h, i, t) - s) <= 32 * ulp * size)) ++wrong_scores;
        double& score = p[static_cast<std::size_t>(t)] = s;
        if (raw(i, t)) {
          score = 0.0;
          for (std::int64_t c = 0; c < keys.dim; ++c)
            score += load(q, h, i, c) * load(*calls.keys, kv, t, c) * static_cast<double>(scale);
        }
        largest = std::max(largest, size);
        if (seen(i, t)) top = std::max(top, score);
      }
      for (std::int64_t t = 0; t < tokens; ++t)
        if (seen(i, t)) total += std::exp(p[static_cast<std::size_t>(t)] - top);
      const double weight_error = 2 * 32 * ulp * largest + 16 * ulp + (static_cast<double>(tokens) + 64) * ulp;
      if (!(std::fabs(lse.at(0, h, i) - (top + std::log(total))) <= weight_error + 8 * ulp * std::fabs(top)))
        ++wrong_outputs;
      for (std::int64_t c = 0; c < values.dim; ++c) {
        double sum = 0.0, size = 0.0, mean = 0.0, mean_size = 0.0;
        for (std::int64_t t = 0; t < tokens; ++t) {
          double x = values.at(kv, t, c);
          if (t < scored) {
            sum += load(w, h, i, t) * x;
            size += std::fabs(load(w, h, i, t) * x);
          }
          if (!seen(i, t)) continue;
          if (raw(i, t)) x = load(*calls.values, kv, t, c);
          const double weight = std::exp(p[static_cast<std::size_t>(t)] - top) / total;
          mean += weight * x;
          mean_size += weight * std::fabs(x);
        }
        if (!(std::fabs(sums.at(h, i, c) - sum) <= (static_cast<double>(tokens) + 64) * ulp * size)) ++wrong_sums;
        if (!(std::fabs(out.at(h, i, c) - mean) <= 2 * weight_error * mean_size)) ++wrong_outputs;
      }
    }
  CHECK(wrong_scores == 0);
  CHECK(wrong_sums == 0);
  CHECK(wrong_outputs == 0);
  // The gaps between rows are as they were.
  int touched = 0;
  for (tensor_output* x : {&scores, &sums, &out, &lse})
    for (std::int64_t r = 0; r < x->heads * x->rows; ++r)
      for (std::int64_t i = x->length; i < x->length + x->gap; ++i)
        if (std::memcmp(x->host_bytes.data() + (r * (x->length + x->gap) + i) * 4, untouched.data(), 4) != 0) ++touched;
  CHECK(touched == 0);
}

/// Calls over tokens that take several splits refuse a workspace that is null, misaligned or too small, and write
/// nothing; scores need none.
template <int KeyDim, int ValueDim>
void check_sequence_workspace(random_source& random, std::int64_t kv_heads, std::int64_t tokens,
                              const sequence_calls& calls) {
  const tensor_data q(random, pk::dtype::float16, 1, kv_heads, 1, KeyDim),
      w(random, pk::dtype::float16, 1, kv_heads, 1, tokens);
  tensor_output scores(pk::dtype::float32, kv_heads, 1, tokens), out(pk::dtype::float32, kv_heads, 1, ValueDim);
  const auto grid = pk::policy::make_decode_grid(1, kv_heads, 1, tokens, 0);
  REQUIRE(grid.splits > 1);
  const std::int64_t used = pk::detail::split_bytes<ValueDim>(grid).value();
  device_array<std::uint8_t> workspace(static_cast<std::size_t>(used) + 256);
  const pk::exec good{nullptr, workspace.data(), static_cast<std::size_t>(used), nullptr};
  require(pk::initialize_workspace(good));
  pk::exec null = good, odd = good, small = good;
  null.workspace = nullptr;
  odd.workspace = workspace.data() + 128;
  small.workspace_bytes -= 1;
  struct refusal {
    pk::exec e;
    pk::status_code code;
  };
  for (const refusal& r : {refusal{null, pk::status_code::invalid_argument},
                           {odd, pk::status_code::misaligned},
                           {small, pk::status_code::workspace_too_small}}) {
    const pk::status value = calls.value_gemv(sequence(w.device()), out.device(), r.e);
    const pk::status attention = calls.attention(sequence(q.device()), 1.0f, out.device(), {}, r.e);
    CHECK(value.code == r.code);
    CHECK(attention.code == r.code);
    if (r.code == pk::status_code::workspace_too_small) CHECK((value.detail == used && attention.detail == used));
  }
  CHECK((out.device_bytes.host() == out.host_bytes));
  CHECK(calls.key_gemv(sequence(q.device()), 1.0f, scores.device(), null));
  CHECK(calls.value_gemv(sequence(w.device()), out.device(), good));
  CHECK(calls.attention(sequence(q.device()), 1.0f, out.device(), {}, good));
}

/// Calls over no tokens of two KV heads: no scores, sums of 0, and no query that attention could answer.
template <int KeyDim, int ValueDim>
void check_no_tokens(const sequence_calls& calls) {
  random_source random(15);
  const tensor_data q(random, pk::dtype::float16, 1, 4, 1, KeyDim), w(random, pk::dtype::float16, 1, 4, 1, 0);
  tensor_output scores(pk::dtype::float32, 4, 1, 0), sums(pk::dtype::float32, 4, 1, ValueDim),
      out(pk::dtype::float32, 4, 1, ValueDim);
  REQUIRE(calls.key_gemv(sequence(q.device()), 1.0f, scores.device(), pk::exec{}));
  CHECK((scores.device_bytes.host() == scores.host_bytes));
  REQUIRE(calls.value_gemv(sequence(w.device()), sums.device(), pk::exec{}));
  sums.fetch();
  bool zero = true;
  for (int h = 0; h < 4; ++h)
    for (int i = 0; i < ValueDim; ++i) zero = zero && sums.at(h, 0, i) == 0.0;
  CHECK(zero);
  CHECK(calls.attention(sequence(q.device()), 1.0f, out.device(), {}, pk::exec{}).code ==
        pk::status_code::shape_mismatch);
  auto no_queries = sequence(q.device());
  auto no_outputs = out.device();
  no_queries.extent[1] = no_outputs.extent[1] = 0;
  CHECK(calls.attention(no_queries, 1.0f, no_outputs, {}, pk::exec{}));
  CHECK((out.device_bytes.host() == out.host_bytes));
}

/// Calls of a format that codes 64 tokens at once over 65 tokens of one KV head: the last one is seen by the last query
/// alone, which is the last row of its block; and of the tile before it only the last token is in a window of 2.
template <int ValueDim>
void check_tile_boundary(random_source& random, const decoded_side& keys, const decoded_side& values,
                         sequence_calls& calls) {
  REQUIRE(keys.tokens == 65);
  check_sequence_calls<ValueDim>(random, keys, values, 65, 2, calls, 3, 2);
  calls.options.window = 2;
  check_sequence_calls<ValueDim>(random, keys, values, 65, 1, calls, 1, 1);
  calls.options.window = 0;
}

}  // namespace packkv_test
