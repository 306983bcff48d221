// SPDX-License-Identifier: Apache-2.0
// Attention on packs: against loops over the reconstruction, and the same for every order of tokens.
#include <algorithm>
#include <array>
#include <packkv/reference/pack_attention.hpp>

#include "pack_fixture.hpp"

using namespace host_test;

namespace {

constexpr pk::token_order orders[] = {pk::token_order::none, pk::token_order::median, pk::token_order::greedy};

pk::pack_format format_of(pk::pack_granularity g, pk::pack_zero z) {
  pk::pack_format f;
  f.batch = 2;
  f.kv_heads = 2;
  f.key.head_dim = 96;
  f.value.head_dim = 64;
  f.key.granularity = f.value.granularity = g;
  f.key.zero = f.value.zero = z;
  return f;
}

void fill(random_source& random, pack_cache& cache) {
  cache.keys.fill([&] { return random.normal(); });
  cache.values.fill([&] { return random.chance(50) ? 4.0f : random.normal(); });
}

/// The tokens from `first` on.
pk::input_view<4> tail_of(const tensor<4>& x, std::int64_t first) {
  pk::input_view<4> v = x.in();
  v.data = pk::detail::address(v, 0, 0, first, 0);
  v.extent[2] -= first;
  return v;
}

struct outputs {
  std::vector<double> out, lse;
};

/// attention() of n queries on `p` and the tail behind it.
outputs attend(packs& p, const pack_cache& cache, const tensor<4>& queries, float scale) {
  const pk::pack_format& f = p.format;
  const std::int64_t heads = queries.in().extent[1], n = queries.in().extent[2];
  tensor<4> out(pk::dtype::float32, {f.batch, heads, n, f.value.head_dim});
  tensor<3> lse(pk::dtype::float32, {f.batch, heads, n});
  const pk::status s =
      pk::reference::attention(f, p.view(), tail_of(cache.keys, p.blocks * 64), tail_of(cache.values, p.blocks * 64),
                               queries.in(), scale, out.out(), lse.out());
  INFO(s.message);
  REQUIRE(s);
  outputs o;
  for (std::int64_t b = 0; b < f.batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t i = 0; i < n; ++i) {
        o.lse.push_back(static_cast<double>(lse.get(b, h, i)));
        for (int c = 0; c < f.value.head_dim; ++c) o.out.push_back(static_cast<double>(out.get(b, h, i, c)));
      }
  return o;
}

/// Keys and values with the packed tokens replaced by their reconstruction, in the order of the slots.
std::array<tensor<4>, 2> reconstructed(packs& p, const pack_cache& cache) {
  const pk::pack_format& f = p.format;
  const std::int64_t tokens = cache.keys.in().extent[2];
  std::array<tensor<4>, 2> x{tensor<4>(pk::dtype::float32, {f.batch, f.kv_heads, tokens, f.key.head_dim}),
                             tensor<4>(pk::dtype::float32, {f.batch, f.kv_heads, tokens, f.value.head_dim})};
  for (int s = 0; s < 2; ++s) {
    const tensor<4>& from = s == 0 ? cache.keys : cache.values;
    for (std::int64_t b = 0; b < f.batch; ++b)
      for (std::int64_t h = 0; h < f.kv_heads; ++h)
        for (std::int64_t t = 0; t < tokens; ++t)
          for (std::int64_t c = 0; c < from.in().extent[3]; ++c)
            x[static_cast<std::size_t>(s)].set(from.get(b, h, t, c), b, h, t, c);
  }
  REQUIRE(pk::reference::decompress(f, p.view(), x[0].out(), x[1].out()));
  return x;
}

outputs naive_attend(const std::array<tensor<4>, 2>& x, const tensor<4>& queries, double scale) {
  const pk::input_view<4> q = queries.in(), k = x[0].in(), v = x[1].in();
  outputs o;
  for (std::int64_t b = 0; b < q.extent[0]; ++b)
    for (std::int64_t h = 0; h < q.extent[1]; ++h)
      for (std::int64_t i = 0; i < q.extent[2]; ++i) {
        const std::int64_t head = h / (q.extent[1] / k.extent[1]), visible = k.extent[2] - q.extent[2] + 1 + i;
        double total = 0.0;
        std::vector<double> sum(static_cast<std::size_t>(v.extent[3]), 0.0);
        for (std::int64_t t = 0; t < visible; ++t) {
          double s = 0.0;
          for (std::int64_t c = 0; c < k.extent[3]; ++c)
            s += static_cast<double>(queries.get(b, h, i, c)) * static_cast<double>(x[0].get(b, head, t, c));
          const double w = std::exp(scale * s);
          total += w;
          for (std::int64_t c = 0; c < v.extent[3]; ++c)
            sum[static_cast<std::size_t>(c)] += w * static_cast<double>(x[1].get(b, head, t, c));
        }
        o.lse.push_back(std::log(total));
        for (const double y : sum) o.out.push_back(y / total);
      }
  return o;
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::fabs(a[i] - b[i]));
  return largest;
}

}  // namespace

TEST_CASE("packs: attention is that of the reconstruction, and no order of tokens changes it", "[packs]") {
  const std::uint64_t seed = base_seed() + 500;
  INFO("seed " << seed);
  random_source random(seed);
  for (int g = 0; g < 4; ++g)
    for (const pk::pack_zero z : {pk::pack_zero::integer, pk::pack_zero::floating}) {
      pk::pack_format f = format_of(static_cast<pk::pack_granularity>(g), z);
      pack_cache cache(f, 192 + 130, random, walk::scrambled);
      fill(random, cache);
      for (const std::int64_t n : {1, 3}) {
        tensor<4> queries(pk::dtype::float16, {f.batch, 4, n, f.key.head_dim}, walk::scrambled, &random);
        queries.fill([&] { return random.normal(); });
        outputs first;
        for (const pk::token_order order : orders) {
          f.order = order;
          packs p(f, cache, 3);
          REQUIRE(p.state);
          const outputs o = attend(p, cache, queries, 0.1f);
          const outputs expected = naive_attend(reconstructed(p, cache), queries, static_cast<double>(0.1f));
          CHECK(largest_difference(o.out, expected.out) < 2e-6);
          CHECK(largest_difference(o.lse, expected.lse) < 2e-6);
          if (order == pk::token_order::none) {
            first = o;
            continue;
          }
          CHECK(p.order != std::vector<std::uint8_t>(p.order.size(), 0));
          CHECK(largest_difference(o.out, first.out) < 1e-6);
          CHECK(largest_difference(o.lse, first.lse) < 1e-6);
        }
      }
    }
}

TEST_CASE("packs: an order moves whole tokens of K, V, all heads and batch rows, and changes no element", "[packs]") {
  random_source random(base_seed() + 600);
  for (int g = 0; g < 4; ++g) {
    pk::pack_format f = format_of(static_cast<pk::pack_granularity>(g), pk::pack_zero::integer);
    pack_cache cache(f, 128, random);
    fill(random, cache);
    f.order = pk::token_order::none;
    packs plain(f, cache, 2);
    const std::array<tensor<4>, 2> expected = reconstructed(plain, cache);
    for (const pk::token_order order : {pk::token_order::median, pk::token_order::greedy}) {
      f.order = order;
      packs p(f, cache, 2);
      const std::array<tensor<4>, 2> x = reconstructed(p, cache);
      std::int64_t wrong = 0, moved = 0;
      for (int block = 0; block < 2; ++block) {
        std::vector<int> seen(64, 0);
        for (int slot = 0; slot < 64; ++slot) {
          const int token = p.order[static_cast<std::size_t>(block * 64 + slot)];
          REQUIRE(token < 64);
          ++seen[static_cast<std::size_t>(token)];
          moved += token != slot;
          for (std::size_t s = 0; s < 2; ++s)
            for (int b = 0; b < 2; ++b)
              for (int h = 0; h < 2; ++h)
                for (std::int64_t c = 0; c < x[s].in().extent[3]; ++c)
                  wrong += !(x[s].get(b, h, block * 64 + slot, c) == expected[s].get(b, h, block * 64 + token, c));
        }
        CHECK(seen == std::vector<int>(64, 1));
      }
      CHECK(wrong == 0);
      CHECK((order == pk::token_order::median || moved > 0));  // medians may all be equal
    }
  }
}

TEST_CASE("packs: key_gemv and value_gemv are those of the reconstruction", "[packs]") {
  random_source random(base_seed() + 700);
  for (int g = 0; g < 4; ++g)
    for (const pk::pack_zero z : {pk::pack_zero::integer, pk::pack_zero::floating}) {
      const pk::pack_format f = format_of(static_cast<pk::pack_granularity>(g), z);
      pack_cache cache(f, 128, random);
      fill(random, cache);
      packs p(f, cache, 2);
      const std::array<tensor<4>, 2> x = reconstructed(p, cache);
      tensor<3> queries(pk::dtype::float32, {2, 6, f.key.head_dim}), scores(pk::dtype::float32, {2, 6, 128});
      tensor<3> weights(pk::dtype::float32, {2, 6, 128}), out(pk::dtype::float32, {2, 6, f.value.head_dim});
      queries.fill([&] { return random.normal(); });
      weights.fill([&] { return random.normal(); });
      REQUIRE(pk::reference::key_gemv(f, p.view(), queries.in(), 0.5f, scores.out()));
      REQUIRE(pk::reference::value_gemv(f, p.view(), weights.in(), out.out()));
      double worst = 0.0;
      for (int b = 0; b < 2; ++b)
        for (int h = 0; h < 6; ++h) {
          for (int t = 0; t < 128; ++t) {
            double s = 0.0;
            for (int c = 0; c < f.key.head_dim; ++c)
              s += static_cast<double>(queries.get(b, h, c)) * static_cast<double>(x[0].get(b, h / 3, t, c));
            worst = std::max(worst, std::fabs(0.5 * s - static_cast<double>(scores.get(b, h, t))));
          }
          for (int c = 0; c < f.value.head_dim; ++c) {
            double s = 0.0;
            for (int t = 0; t < 128; ++t)
              s += static_cast<double>(weights.get(b, h, t)) * static_cast<double>(x[1].get(b, h / 3, t, c));
            worst = std::max(worst, std::fabs(s - static_cast<double>(out.get(b, h, c))));
          }
        }
      CHECK(worst < 1e-4);
      tensor<3> narrow(pk::dtype::float32, {2, 6, 64});
      CHECK(pk::reference::key_gemv(f, p.view(), narrow.in(), 1.0f, scores.out()).code ==
            pk::status_code::shape_mismatch);
      CHECK(pk::reference::value_gemv(f, p.view(), narrow.in(), out.out()).code == pk::status_code::shape_mismatch);
    }
}

TEST_CASE("packs: impossible numbers of blocks, and scales that are none, are refused before anything is written",
          "[packs]") {
  random_source random(base_seed() + 710);
  const pk::pack_format f = format_of(pk::pack_granularity::token, pk::pack_zero::integer);
  pack_cache cache(f, 128, random);
  fill(random, cache);
  packs p(f, cache, 1);
  tensor<3> queries(pk::dtype::float32, {2, 2, 96}), scores(pk::dtype::float32, {2, 2, 64}),
      sums(pk::dtype::float32, {2, 2, 64});
  tensor<4> query(pk::dtype::float32, {2, 2, 1, 96}), out(pk::dtype::float32, {2, 2, 1, 64});
  queries.fill([&] { return random.normal(); });
  query.fill([&] { return random.normal(); });
  const auto bytes = [&] {
    return std::array<std::vector<std::uint8_t>, 3>{scores.bytes(), sums.bytes(), out.bytes()};
  };
  const auto before = bytes();
  const auto attention = [&](const pk::packs_view& view, float scale) {
    return pk::reference::attention(f, view, tail_of(cache.keys, 64), tail_of(cache.values, 64), query.in(), scale,
                                    out.out(), {});
  };
  for (const std::int64_t blocks : {std::int64_t{-1}, std::int64_t{1} << 57, std::int64_t{1} << 62}) {
    pk::packs_view view = p.view();
    view.blocks = blocks;
    const pk::status_code expected = blocks < 0 ? pk::status_code::invalid_argument : pk::status_code::overflow;
    CHECK(pk::reference::key_gemv(f, view, queries.in(), 1.0f, scores.out()).code == expected);
    CHECK(pk::reference::value_gemv(f, view, scores.in(), sums.out()).code == expected);
    CHECK(attention(view, 1.0f).code == expected);
  }
  for (const float scale : {0.0f, -1.0f, NAN, INFINITY})
    CHECK(attention(p.view(), scale).code == pk::status_code::invalid_argument);
  CHECK((bytes() == before));
  CHECK(attention(p.view(), 1.0f));
}
