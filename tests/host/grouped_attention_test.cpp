// SPDX-License-Identifier: Apache-2.0
// Attention on the stored bytes of the grouped formats against plain attention on the decoded tensors.
#include <packkv/reference/grouped_attention.hpp>

#include "grouped_fixture.hpp"
#include "plain_attention.hpp"

namespace pk = packkv;
namespace ref = packkv::reference;
using namespace grouped_test;
using host_test::random_source;
using host_test::seed_of;
using plain::random_rows;
using plain::tensor;

namespace {

pk::grouped_view view_of(const coded& e) {
  return {e.spec, e.bytes.data(), e.bytes.size(), e.layout.heads, e.layout.tokens, e.recent, pk::dtype::float16};
}

}  // namespace

TEST_CASE("scores, value sums and attention on grouped bytes equal those on the decoded tensors", "[grouped]") {
  for (int round = 0; round < 24; ++round) {
    const std::uint64_t seed = seed_of(8000 + static_cast<std::uint64_t>(round));
    random_source random(seed);
    const int dims[] = {64, 96, 128, 256};
    const int key_dim = random.pick(dims), value_dim = random.pick(dims), heads = random.between(1, 2);
    const bool whole = random.chance(3);  // no tail: the first of several queries sees a part of a group of tokens
    const int group = random.between(1, 3), tokens = whole ? 128 * random.between(1, 2) : random.between(70, 280);
    const int n = random.between(1, 3), recent = whole || random.chance(2) ? 0 : random.between(0, 100);
    const tensor16 k = random_tensor(random, heads, tokens, key_dim),
                   v = random_tensor(random, heads, tokens, value_dim);
    const coded ek(random_spec(random, pk::side::key, key_dim), k, recent);
    const coded ev(random_spec(random, pk::side::value, value_dim), v, recent);
    const float scale = 0.5f / std::sqrt(static_cast<float>(key_dim));
    tensor q = random_rows(random, heads * group, n, key_dim), weights = random_rows(random, heads * group, n, tokens);
    tensor scores(heads * group, n, tokens), sums(heads * group, n, value_dim), out(heads * group, n, value_dim);
    INFO("seed " << seed << " K " << describe(ek.spec) << " V " << describe(ev.spec) << " tokens " << tokens);
    REQUIRE(ref::grouped_key_gemv(q.in(), view_of(ek), scale, scores.out()));
    REQUIRE(ref::grouped_value_gemv(weights.in(), view_of(ev), sums.out()));
    REQUIRE(ref::grouped_attention(q.in(), view_of(ek), view_of(ev), scale, out.out()));

    tensor decoded_k(heads, tokens, key_dim), decoded_v(heads, tokens, value_dim);
    decoded_k.x = ek.decode();
    decoded_v.x = ev.decode();
    const plain::differences worst = plain::compare(decoded_k, decoded_v, q, weights, scale, scores, sums, out);
    CHECK(worst.scores < 5e-6);
    CHECK(worst.sums < 5e-6);
    CHECK(worst.out < 5e-5);  // an error of a score counts absolutely in the exponent
  }
}

TEST_CASE("attention on grouped bytes refuses what disagrees before anything is written", "[grouped]") {
  random_source random(seed_of(8500));
  const tensor16 x = random_tensor(random, 2, 128, 64);
  const coded k(pk::kivi_keys(64, 2), x), v(pk::kivi_values(64, 2), x);
  tensor q(4, 1, 64), out(4, 1, 64, 42.0f), odd(3, 1, 64), wide(4, 1, 128), many(4, 129, 64), scores(4, 1, 128, 42.0f);
  const auto attend = [&](const tensor& queries, const pk::grouped_view& a, const pk::grouped_view& b, float scale) {
    return ref::grouped_attention(queries.in(), a, b, scale, out.out()).code;
  };
  CHECK(attend(odd, view_of(k), view_of(v), 1.0f) == pk::status_code::shape_mismatch);
  CHECK(attend(wide, view_of(k), view_of(v), 1.0f) == pk::status_code::shape_mismatch);
  CHECK(attend(many, view_of(k), view_of(v), 1.0f) == pk::status_code::shape_mismatch);
  for (const float scale : {0.0f, -1.0f, INFINITY, std::nanf("")})
    CHECK(attend(q, view_of(k), view_of(v), scale) == pk::status_code::invalid_argument);
  pk::grouped_view bad = view_of(v);
  bad.tokens = 192;
  CHECK(attend(q, view_of(k), bad, 1.0f) == pk::status_code::shape_mismatch);
  bad = view_of(k);
  bad.size -= 2;
  CHECK(attend(q, bad, view_of(v), 1.0f) == pk::status_code::shape_mismatch);
  bad = view_of(k);
  bad.bytes += 4;
  CHECK(attend(q, bad, view_of(v), 1.0f) == pk::status_code::misaligned);
  bad.bytes = nullptr;
  CHECK(attend(q, view_of(k), bad, 1.0f) == pk::status_code::invalid_argument);
  bad = view_of(k);
  bad.tail_type = pk::dtype::float32;
  CHECK(attend(q, bad, view_of(v), 1.0f) == pk::status_code::invalid_argument);
  CHECK(ref::grouped_key_gemv(q.in(), bad, 1.0f, scores.out()).code == pk::status_code::invalid_argument);
  CHECK(ref::grouped_value_gemv(scores.in(), bad, out.out()).code == pk::status_code::invalid_argument);
  CHECK(ref::grouped_key_gemv(q.in(), view_of(k), 1.0f, out.out()).code == pk::status_code::shape_mismatch);
  CHECK(ref::grouped_value_gemv(q.in(), view_of(v), out.out()).code == pk::status_code::shape_mismatch);
  CHECK(out.all(42.0f));
  CHECK(scores.all(42.0f));
  REQUIRE(ref::grouped_attention(q.in(), view_of(k), view_of(v), 1.0f, out.out()));
  REQUIRE(ref::grouped_key_gemv(q.in(), view_of(k), 1.0f, scores.out()));
  CHECK_FALSE(out.all(42.0f));
}

TEST_CASE("means that no coded token has are not read", "[grouped]") {
  random_source random(seed_of(8100));
  const tensor16 x = random_tensor(random, 1, 40, 64);
  coded side(pk::make_grouped(pk::side::value, 64, pk::group_axis::vector, 64, 4, pk::step_rule::min_max,
                              pk::transform_kind::identity, true),
             x);
  REQUIRE(side.layout.coded_tokens == 0);
  for (int c = 0; c < 64; ++c) pk::reference::detail::store_bits(side.bytes.data(), 2 * c, 0x7e00);  // NaN
  const tensor weights(1, 1, 40, 1.0f);
  tensor sums(1, 1, 64);
  REQUIRE(ref::grouped_value_gemv(weights.in(), view_of(side), sums.out()));
  double expected = 0.0;
  for (int t = 0; t < 40; ++t) expected += static_cast<double>(x.value(0, t, 5));
  CHECK(std::fabs(static_cast<double>(sums.x[5]) - expected) < 1e-3);
}
