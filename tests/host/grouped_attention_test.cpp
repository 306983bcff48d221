// SPDX-License-Identifier: Apache-2.0
// Attention on the stored bytes of the grouped formats against plain attention on the decoded tensors.
#include <packkv/reference/grouped_attention.hpp>

#include "grouped_fixture.hpp"

namespace pk = packkv;
namespace ref = packkv::reference;
using namespace grouped_test;
using host_test::random_source;
using host_test::seed_of;

namespace {

pk::grouped_view view_of(const coded& e) {
  return {e.spec, e.bytes.data(), e.bytes.size(), e.layout.heads, e.layout.tokens, e.recent, pk::dtype::float16};
}

/// A float tensor [heads, rows, columns].
struct tensor {
  int heads, rows, columns;
  std::vector<float> x;
  tensor(int h, int r, int c) : heads(h), rows(r), columns(c), x(static_cast<std::size_t>(h) * r * c) {}
  float* row(int h, int r) { return x.data() + (static_cast<std::size_t>(h) * rows + r) * columns; }
  pk::input_view<3> in() const { return pk::make_input<3>(x.data(), pk::dtype::float32, {heads, rows, columns}); }
  pk::output_view<3> out() { return pk::make_output<3>(x.data(), pk::dtype::float32, {heads, rows, columns}); }
};

tensor random_rows(random_source& random, int heads, int rows, int columns) {
  tensor t(heads, rows, columns);
  for (float& v : t.x) v = random.normal();
  return t;
}

/// |a - b| / |b|
double distance(const float* a, const double* b, int n) {
  double difference = 0.0, norm = 0.0;
  for (int i = 0; i < n; ++i) {
    difference += std::pow(a[i] - b[i], 2);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / std::fmax(norm, 1e-30));
}

}  // namespace

TEST_CASE("scores, value sums and attention on grouped bytes equal those on the decoded tensors", "[grouped]") {
  for (int round = 0; round < 24; ++round) {
    const std::uint64_t seed = seed_of(8000 + static_cast<std::uint64_t>(round));
    random_source random(seed);
    const int dims[] = {64, 96, 128, 256};
    const int key_dim = random.pick(dims), value_dim = random.pick(dims), heads = random.between(1, 2);
    const int group = random.between(1, 3), tokens = random.between(70, 280), n = random.between(1, 3);
    const int recent = random.chance(2) ? 0 : random.between(0, 100);
    const tensor16 k = random_tensor(random, heads, tokens, key_dim),
                   v = random_tensor(random, heads, tokens, value_dim);
    const coded ek(random_spec(random, pk::side::key, key_dim), k, recent);
    const coded ev(random_spec(random, pk::side::value, value_dim), v, recent);
    const std::vector<float> dk = ek.decode(), dv = ev.decode();
    const float scale = 0.5f / std::sqrt(static_cast<float>(key_dim));
    tensor q = random_rows(random, heads * group, n, key_dim), weights = random_rows(random, heads * group, n, tokens);
    tensor scores(heads * group, n, tokens), sums(heads * group, n, value_dim), out(heads * group, n, value_dim);
    INFO("seed " << seed << " K " << describe(ek.spec) << " V " << describe(ev.spec) << " tokens " << tokens);
    REQUIRE(ref::grouped_key_gemv(q.in(), view_of(ek), scale, scores.out()));
    REQUIRE(ref::grouped_value_gemv(weights.in(), view_of(ev), sums.out()));
    REQUIRE(ref::grouped_attention(q.in(), view_of(ek), view_of(ev), scale, out.out()));

    double worst_score = 0.0, worst_sum = 0.0, worst_out = 0.0;
    for (int h = 0; h < heads * group; ++h)
      for (int i = 0; i < n; ++i) {
        std::vector<double> s(static_cast<std::size_t>(tokens), 0.0), p, sum(static_cast<std::size_t>(value_dim), 0.0),
            o;
        for (int t = 0; t < tokens; ++t) {
          for (int c = 0; c < key_dim; ++c)
            s[static_cast<std::size_t>(t)] += static_cast<double>(q.row(h, i)[c]) * dk[k.at(h / group, t, c)];
          s[static_cast<std::size_t>(t)] *= scale;
        }
        o = sum;
        const int visible = tokens - n + i + 1;
        const double top = *std::max_element(s.begin(), s.begin() + visible);
        double total = 0.0;
        for (int t = 0; t < visible; ++t) total += std::exp(s[static_cast<std::size_t>(t)] - top);
        for (int t = 0; t < tokens; ++t)
          for (int c = 0; c < value_dim; ++c) {
            const double x = dv[v.at(h / group, t, c)];
            sum[static_cast<std::size_t>(c)] += weights.row(h, i)[t] * x;
            if (t < visible)
              o[static_cast<std::size_t>(c)] += std::exp(s[static_cast<std::size_t>(t)] - top) / total * x;
          }
        worst_score = std::fmax(worst_score, distance(scores.row(h, i), s.data(), tokens));
        worst_sum = std::fmax(worst_sum, distance(sums.row(h, i), sum.data(), value_dim));
        worst_out = std::fmax(worst_out, distance(out.row(h, i), o.data(), value_dim));
      }
    CHECK(worst_score < 5e-6);
    CHECK(worst_sum < 5e-6);
    CHECK(worst_out < 5e-5);  // an error of a score counts absolutely in the exponent
  }
}

TEST_CASE("attention on grouped bytes refuses operands that disagree", "[grouped]") {
  random_source random(seed_of(8500));
  const tensor16 x = random_tensor(random, 2, 128, 64);
  const coded k(pk::kivi_keys(64, 2), x), v(pk::kivi_values(64, 2), x);
  tensor q(4, 1, 64), out(4, 1, 64), odd(3, 1, 64), wide(4, 1, 128), scores(4, 1, 128);
  REQUIRE(ref::grouped_attention(q.in(), view_of(k), view_of(v), 1.0f, out.out()));
  const auto attend = [&](const tensor& queries, const pk::grouped_view& a, const pk::grouped_view& b, float scale) {
    return ref::grouped_attention(queries.in(), a, b, scale, out.out()).code;
  };
  CHECK(attend(odd, view_of(k), view_of(v), 1.0f) == pk::status_code::shape_mismatch);
  CHECK(attend(wide, view_of(k), view_of(v), 1.0f) == pk::status_code::shape_mismatch);
  CHECK(attend(q, view_of(k), view_of(v), 0.0f) == pk::status_code::invalid_argument);
  pk::grouped_view longer = view_of(v);
  longer.tokens = 192;
  CHECK(attend(q, view_of(k), longer, 1.0f) == pk::status_code::shape_mismatch);
  longer = view_of(k);
  longer.size -= 2;
  CHECK(attend(q, longer, view_of(v), 1.0f) == pk::status_code::shape_mismatch);
  CHECK(ref::grouped_key_gemv(q.in(), view_of(k), 1.0f, out.out()).code == pk::status_code::shape_mismatch);
  REQUIRE(ref::grouped_key_gemv(q.in(), view_of(k), 1.0f, scores.out()));
  CHECK(ref::grouped_value_gemv(q.in(), view_of(v), out.out()).code == pk::status_code::shape_mismatch);
}
