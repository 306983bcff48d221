// SPDX-License-Identifier: Apache-2.0
// Attention on the stored bytes of the strip-adaptive format against plain attention on the decoded tensors; what the
// calls refuse; damaged offsets and headers.
#include <packkv/reference/strip_adaptive_attention.hpp>

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

pk::adaptive_view view_of(const adaptive_coded& e) {
  return {e.spec,         e.bytes.data(),  e.offsets.back(), e.offsets.data(),
          e.layout.heads, e.layout.tokens, e.recent,         pk::dtype::float16};
}

tensor decoded(const adaptive_coded& e) {
  tensor t(static_cast<int>(e.layout.heads), static_cast<int>(e.layout.tokens), e.spec.groups.head_dim);
  t.x = e.decode();
  return t;
}

/// A key and a value side of one shape, and operands of calls on them.
struct attention_case {
  adaptive_coded k, v;
  tensor q, weights, scores, sums, out;

  attention_case(random_source& random, const pk::adaptive_spec& key, const pk::adaptive_spec& value, const tensor16& a,
                 const tensor16& b, int recent, int group, int n)
      : k(key, a, recent),
        v(value, b, recent),
        q(random_rows(random, a.heads * group, n, a.dim)),
        weights(random_rows(random, a.heads * group, n, a.tokens)),
        scores(a.heads * group, n, a.tokens, 42.0f),
        sums(a.heads * group, n, b.dim, 42.0f),
        out(a.heads * group, n, b.dim, 42.0f) {}
};

void check_attention(attention_case& c) {
  const float scale = 0.5f / std::sqrt(static_cast<float>(c.q.columns));
  REQUIRE(ref::adaptive_key_gemv(c.q.in(), view_of(c.k), scale, c.scores.out()));
  REQUIRE(ref::adaptive_value_gemv(c.weights.in(), view_of(c.v), c.sums.out()));
  REQUIRE(ref::adaptive_attention(c.q.in(), view_of(c.k), view_of(c.v), scale, c.out.out()));
  const plain::differences worst =
      plain::compare(decoded(c.k), decoded(c.v), c.q, c.weights, scale, c.scores, c.sums, c.out);
  CHECK(worst.scores < 5e-6);
  CHECK(worst.sums < 5e-6);
  CHECK(worst.out < 5e-5);  // an error of a score counts absolutely in the exponent
}

}  // namespace

TEST_CASE("scores, value sums and attention on strip-adaptive bytes equal those on the decoded tensors", "[adaptive]") {
  const pk::transform_kind transforms[] = {pk::transform_kind::identity, pk::transform_kind::hadamard};
  int number = 0;
  for (const auto axis : adaptive_axes)
    for (const auto transform : transforms)
      for (const bool centred : {false, true})
        for (const int n : {1, 3})
          for (const int group : {1, 3}) {
            const std::uint64_t seed = seed_of(9600 + static_cast<std::uint64_t>(number++));
            random_source random(seed);
            const int dims[] = {64, 96, 128, 256};
            const float steps[] = {0.3f, 0.1f, 0.05f, 1.0f / 255.0f};
            const bool whole = random.chance(3);  // no tail: the first of several queries sees a part of a tile
            const int heads = random.between(1, 2),
                      tokens = whole ? 64 * random.between(2, 3) : random.between(70, 220);
            const int recent = whole || random.chance(2) ? 0 : random.between(0, 100);
            const tensor16 a = random_tensor(random, heads, tokens, random.pick(dims));
            const tensor16 b = random_tensor(random, heads, tokens, random.pick(dims));
            // V has the next axis, so that every pair of unlike axes comes up, too.
            attention_case c(
                random,
                pk::make_adaptive(pk::side::key, a.dim, axis, random.pick(steps), transform, centred,
                                  random.pick(zero_points)),
                pk::make_adaptive(pk::side::value, b.dim, adaptive_axes[(number / 4 + static_cast<int>(axis)) % 4],
                                  random.pick(steps), transforms[number % 2], random.chance(2),
                                  random.pick(zero_points)),
                a, b, recent, group, n);
            INFO("seed " << seed << " K " << describe(c.k.spec) << " V " << describe(c.v.spec) << " tokens " << tokens
                         << " recent " << recent);
            check_attention(c);
          }
}

TEST_CASE("strip-adaptive attention on a cache that is all tail, and on constant tensors", "[adaptive]") {
  random_source random(seed_of(9700));
  const pk::adaptive_spec key = pk::make_adaptive(pk::side::key, 128, pk::group_axis::token, 0.1f),
                          value = pk::make_adaptive(pk::side::value, 64, pk::group_axis::vector, 0.1f,
                                                    pk::transform_kind::hadamard, true);
  attention_case tail(random, key, value, random_tensor(random, 2, 100, 128), random_tensor(random, 2, 100, 64), 64, 2,
                      2);
  CHECK(tail.k.layout.tiles == 0);
  check_attention(tail);
  tensor16 k(2, 100, 128), v(2, 100, 64);
  std::fill(k.bits.begin(), k.bits.end(), pk::float_to_half(-1.5f));
  std::fill(v.bits.begin(), v.bits.end(), pk::float_to_half(3.25f));
  attention_case constant(random, key, value, k, v, 0, 2, 2);  // widths of 0
  check_attention(constant);
}

TEST_CASE("a NaN group reaches the scores and sums of its tokens and channels only", "[adaptive]") {
  random_source random(seed_of(9800));
  for (const auto axis : adaptive_axes) {
    tensor16 x = random_tensor(random, 2, 192, 64);
    x.bits[x.at(1, 70, 40)] = 0x7e00;
    attention_case c(random, pk::make_adaptive(pk::side::key, 64, axis, 0.1f),
                     pk::make_adaptive(pk::side::value, 64, axis, 0.1f), x, x, 0, 1, 1);
    REQUIRE(ref::adaptive_key_gemv(c.q.in(), view_of(c.k), 1.0f, c.scores.out()));
    REQUIRE(ref::adaptive_value_gemv(c.weights.in(), view_of(c.v), c.sums.out()));
    int wrong = 0;
    for (int h = 0; h < 2; ++h) {
      for (int t = 0; t < 192; ++t)
        wrong += std::isnan(c.scores.row(h, 0)[t]) != (axis == pk::group_axis::channel  ? h == 1 && t / 64 == 1
                                                       : axis == pk::group_axis::vector ? h == 1 && t == 70
                                                       : axis == pk::group_axis::token  ? t == 70
                                                                                        : t / 64 == 1);
      for (int ch = 0; ch < 64; ++ch)
        wrong += std::isnan(c.sums.row(h, 0)[ch]) != (axis == pk::group_axis::channel  ? h == 1 && ch == 40
                                                      : axis == pk::group_axis::vector ? h == 1
                                                                                       : true);
    }
    INFO("axis " << static_cast<int>(axis));
    CHECK(wrong == 0);
  }
}

TEST_CASE("strip-adaptive attention refuses what disagrees or is damaged before anything is written", "[adaptive]") {
  using pk::status_code;
  random_source random(seed_of(9900));
  for (const auto axis : adaptive_axes) {
    const tensor16 x = random_tensor(random, 2, 130, 64);
    attention_case c(random, pk::make_adaptive(pk::side::key, 64, axis, 0.1f),
                     pk::make_adaptive(pk::side::value, 64, axis, 0.1f), x, x, 0, 2, 1);
    const pk::adaptive_view k = view_of(c.k), v = view_of(c.v);
    const auto attend = [&](const tensor& q, const pk::adaptive_view& a, const pk::adaptive_view& b, float scale) {
      return ref::adaptive_attention(q.in(), a, b, scale, c.out.out()).code;
    };
    CHECK(attend(tensor(3, 1, 64), k, v, 1.0f) == status_code::shape_mismatch);
    CHECK(attend(tensor(4, 1, 96), k, v, 1.0f) == status_code::shape_mismatch);
    CHECK(attend(tensor(4, 2, 64), k, v, 1.0f) == status_code::shape_mismatch);
    for (const float scale : {0.0f, -1.0f, INFINITY, std::nanf("")})
      CHECK(attend(c.q, k, v, scale) == status_code::invalid_argument);
    CHECK(ref::adaptive_key_gemv(c.q.in(), k, 1.0f, c.out.out()).code == status_code::shape_mismatch);
    CHECK(ref::adaptive_value_gemv(c.q.in(), v, c.sums.out()).code == status_code::shape_mismatch);
    tensor many(4, 131, 64), more(4, 131, 64, 42.0f);
    CHECK(ref::adaptive_attention(many.in(), k, v, 1.0f, more.out()).code == status_code::shape_mismatch);

    // All calls on one bad view, as K and as V.
    const auto refused = [&](const pk::adaptive_view& bad, status_code code) {
      CHECK(attend(c.q, bad, v, 1.0f) == code);
      CHECK(attend(c.q, k, bad, 1.0f) == code);
      CHECK(ref::adaptive_key_gemv(c.q.in(), bad, 1.0f, c.scores.out()).code == code);
      CHECK(ref::adaptive_value_gemv(c.weights.in(), bad, c.sums.out()).code == code);
    };
    const auto changed = [&](const auto& change) {
      pk::adaptive_view bad = k;
      change(bad);
      return bad;
    };
    using view = pk::adaptive_view;
    refused(changed([](view& b) { b.heads = 0; }), status_code::invalid_argument);
    refused(changed([](view& b) { b.tokens = -1; }), status_code::invalid_argument);
    refused(changed([](view& b) { b.recent = -1; }), status_code::invalid_argument);
    refused(changed([](view& b) { b.recent = 100; }), status_code::corrupt);
    refused(changed([](view& b) { b.tail_type = pk::dtype::float32; }), status_code::invalid_argument);
    refused(changed([](view& b) { b.bytes = nullptr; }), status_code::invalid_argument);
    refused(changed([](view& b) { b.offsets = nullptr; }), status_code::invalid_argument);
    refused(changed([](view& b) { b.bytes += 8; }), status_code::misaligned);
    refused(changed([](view& b) { b.size -= 16; }), status_code::corrupt);
    refused(changed([](view& b) { b.size += 16; }), status_code::corrupt);
    refused(changed([](view& b) { b.size = INT64_MIN; }), status_code::corrupt);
    refused(changed([](view& b) { b.spec.relative_step = 0.0f; }), status_code::invalid_argument);
    refused(changed([](view& b) { b.spec.groups.width = 4; }), status_code::invalid_argument);
    refused(changed([](view& b) { b.spec.zero = static_cast<pk::pack_zero>(2); }), status_code::invalid_argument);

    for (const std::int64_t size : {INT64_MIN, std::int64_t{-16}, std::int64_t{0}, k.size - 16, INT64_MAX}) {
      std::vector<std::int64_t> offsets = c.k.offsets;
      offsets.back() = size;
      refused(changed([&](view& b) {
                b.offsets = offsets.data();
                b.size = size;
              }),
              status_code::corrupt);
    }
    for (std::size_t i = 0; i < c.k.offsets.size(); ++i)
      for (const std::int64_t offset : {std::int64_t{-1}, std::int64_t{0}, k.size + 16, c.k.offsets[i] + 16,
                                        c.k.offsets[i] - 16, c.k.offsets[i] + 1, INT64_MAX, INT64_MIN}) {
        if (offset == c.k.offsets[i]) continue;
        std::vector<std::int64_t> offsets = c.k.offsets;
        offsets[i] = offset;
        refused(changed([&](view& b) { b.offsets = offsets.data(); }), status_code::corrupt);
      }
    for (int tile = 0; tile < c.k.layout.tiles; ++tile)
      for (int strip = 0; strip < 4; ++strip) {
        std::uint8_t& width = c.k.bytes.data()[c.k.offsets[static_cast<std::size_t>(tile)] + strip];
        const std::uint8_t kept = width;
        for (const int bad : {5, 6, 7, 9, 16, 255, kept == 8 ? 4 : 8, kept == 0 ? 1 : 0}) {
          width = static_cast<std::uint8_t>(bad);
          refused(k, status_code::corrupt);
        }
        width = kept;
      }
    int same_size = 0;  // widths that are not in the list in a tile whose size agrees
    for (int strip = 0; strip + 1 < 4; ++strip) {
      std::uint8_t* const widths = c.k.bytes.data() + c.k.offsets[1] + strip;
      const std::uint8_t kept[] = {widths[0], widths[1]};
      for (const int bad : {5, 6, 7}) {
        if (kept[0] + kept[1] < bad) continue;
        ++same_size;
        widths[0] = static_cast<std::uint8_t>(bad);
        widths[1] = static_cast<std::uint8_t>(kept[0] + kept[1] - bad);
        refused(k, status_code::corrupt);
        std::copy_n(kept, 2, widths);
      }
    }
    CHECK(same_size > 0);
    CHECK(c.out.all(42.0f));
    CHECK(c.scores.all(42.0f));
    CHECK(c.sums.all(42.0f));
    CHECK(more.all(42.0f));
    CHECK(attend(c.q, k, v, 1.0f) == status_code::ok);
  }
}

TEST_CASE("strip-adaptive bytes with random damage are read within their bounds or refused", "[adaptive]") {
  int refused = 0;
  for (int round = 0; round < 300; ++round) {
    const std::uint64_t seed = seed_of(10000 + static_cast<std::uint64_t>(round));
    random_source random(seed);
    const tensor16 x = random_tensor(random, 2, 128, 64);
    attention_case c(random, random_adaptive(random, 64), random_adaptive(random, 64), x, x, 0, 1, 1);
    INFO("seed " << seed);
    for (int i = random.between(1, 4); i > 0; --i) {
      const std::int64_t tile = c.k.offsets[static_cast<std::size_t>(random.below(4))];
      const bool header = random.chance(2);
      c.k.bytes.data()[header ? tile + random.below(8) : random.below(static_cast<int>(c.k.offsets.back()))] =
          static_cast<std::uint8_t>(random.chance(2) ? random.below(256) : random.below(9));
    }
    // A copy of just the bytes that may be read.
    std::vector<std::uint8_t> heap(static_cast<std::size_t>(c.k.offsets.back()) + 16);
    std::uint8_t* exact = heap.data();
    while (reinterpret_cast<std::uintptr_t>(exact) % 16 != 0) ++exact;
    std::memcpy(exact, c.k.bytes.data(), static_cast<std::size_t>(c.k.offsets.back()));
    pk::adaptive_view k = view_of(c.k);
    k.bytes = exact;
    const pk::status s = ref::adaptive_attention(c.q.in(), k, view_of(c.v), 1.0f, c.out.out());
    if (s) continue;
    ++refused;
    CHECK(s.code == pk::status_code::corrupt);
    CHECK(c.out.all(42.0f));
  }
  CHECK(refused > 30);
  CHECK(refused < 300);
}
