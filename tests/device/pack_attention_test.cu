// SPDX-License-Identifier: Apache-2.0
// Decompress, GEMVs and attention on packs, on the device: the reference's bits, and the reference's numbers within
// what float sums may differ.
#include <algorithm>
#include <cmath>
#include <functional>
#include <packkv/device/pack_attention.cuh>
#include <packkv/reference/pack_attention.hpp>
#include <string>
#include <vector>

#include "../support/catch.hpp"
#include "pack_batch.hpp"
#include "sequence_data.hpp"

using namespace packkv_test;

namespace {

using pk::dtype;
using pk::pack_granularity;
using pk::pack_zero;
using pk::side;
using pk::token_order;

/// Row i of the second dimension of [heads, n, length], as a batch of one.
template <class Pointer>
pk::tensor_view<Pointer, 3> query(const pk::tensor_view<Pointer, 3>& x, std::int64_t i) {
  auto out = one_row(pk::detail::as_batch(x));
  if (x.data != nullptr && x.extent[2] > 0) out.data = pk::detail::address(x, 0, i, 0);
  return out;
}

template <int KeyDim, int ValueDim>
struct dims {
  static constexpr int key = KeyDim, value = ValueDim;
};

/// The elements of a side in the order of its slots, the 16-bit tokens behind them.
std::vector<float> decoded(pack_case& c, side which) {
  pack_tensor& x = c.tensor(which);
  std::vector<float> elements;
  for (std::int64_t b = 0; b < x.extent[0]; ++b)
    for (std::int64_t h = 0; h < x.extent[1]; ++h)
      for (std::int64_t t = 0; t < x.extent[2]; ++t)
        for (std::int64_t i = 0; i < x.extent[3]; ++i)
          elements.push_back(x.type == dtype::float16 ? pk::half_to_float(x.at(b, h, t, i))
                                                      : pk::bfloat16_to_float(x.at(b, h, t, i)));
  std::vector<float> other(
      static_cast<std::size_t>(c.format.batch * c.format.kv_heads * x.extent[2] *
                               c.format.codec(which == side::key ? side::value : side::key).head_dim));
  const auto view = [&](side s) {
    pack_tensor& of = c.tensor(s);
    return pk::make_output<4>(s == which ? elements.data() : other.data(), dtype::float32,
                              {of.extent[0], of.extent[1], of.extent[2], of.extent[3]});
  };
  require(pk::reference::decompress(c.format, host_view(c), view(side::key), view(side::value)));
  return elements;
}

/// Workspace of just the bytes that the largest of the calls uses.
template <int ValueDim>
device_array<std::uint8_t> workspace_for(const pk::pack_format& f, std::int64_t query_heads, std::int64_t queries,
                                         std::int64_t tokens, pk::exec& e) {
  const auto grid = pk::policy::make_decode_grid(f.batch, f.kv_heads, query_heads / f.kv_heads * queries, tokens, 0);
  device_array<std::uint8_t> workspace = exact_workspace<ValueDim>(
      grid, pk::sequence_workspace_bytes<ValueDim>({f.batch, f.kv_heads, query_heads, queries, tokens, 0}));
  e.workspace = workspace.data();
  e.workspace_bytes = workspace.size();
  require(after_failures([&] { return pk::initialize_workspace(e); }));
  return workspace;
}

/// One sequence through check_sequence_calls.
template <int KeyDim, int ValueDim>
void check_sequence(random_source& random, pack_case& c) {
  INFO(name_of(c.format) << ", blocks " << c.blocks << " of " << c.keys.extent[2] << " tokens");
  const device_packs packs(c);
  const pk::input_view<4> key_tail = tail_of(c, c.keys.device()), value_tail = tail_of(c, c.values.device());
  const std::int64_t tail = key_tail.extent[2];
  sequence_calls calls;
  calls.key_gemv = [&](auto& q, float scale, auto& scores, auto& e) {
    for (std::int64_t i = 0; i < q.extent[1]; ++i)
      if (const pk::status s = pk::key_gemv<KeyDim>(c.format, packs.view(), query(q, i), scale, query(scores, i), e);
          !s)
        return s;
    return pk::status{};
  };
  calls.value_gemv = [&](auto& w, auto& out, auto& e) {
    for (std::int64_t i = 0; i < w.extent[1]; ++i)
      if (const pk::status s = pk::value_gemv<ValueDim>(c.format, packs.view(), query(w, i), query(out, i), e); !s)
        return s;
    return pk::status{};
  };
  calls.attention = [&](auto& q, float scale, auto& out, auto& lse, auto& e) {
    return pk::attention<KeyDim, ValueDim>(c.format, packs.view(), key_tail, value_tail, pk::detail::as_batch(q), scale,
                                           pk::detail::as_batch(out), pk::detail::as_batch(lse), e);
  };
  const auto side_of = [&](side which) {
    return decoded_side{c.format.kv_heads, c.keys.extent[2], c.format.codec(which).head_dim, decoded(c, which)};
  };
  check_sequence_calls<ValueDim>(random, side_of(side::key), side_of(side::value), c.blocks * 64,
                                 std::max<std::int64_t>(tail, 1), calls);
}

/// A batch with `group` query heads for each KV head, against the reference's calls. The bounds are those of
/// check_sequence_calls and what the reference, which reconstructs no element, rounds less.
template <int KeyDim, int ValueDim>
void check_batch(random_source& random, pack_case& c, int group, std::int64_t n) {
  INFO(name_of(c.format) << ", batch " << c.format.batch << ", blocks " << c.blocks << ", " << n << " queries");
  constexpr double ulp = 0x1p-24;
  const pk::pack_format& f = c.format;
  const device_packs packs(c);
  const std::int64_t heads = f.kv_heads * group, slots = c.blocks * 64, tokens = c.keys.extent[2];
  const float scale = 1.0f / std::sqrt(static_cast<float>(KeyDim));
  const auto type = random.one_in(2) ? dtype::float16 : dtype::bfloat16;
  const tensor_data q(random, type, f.batch, heads, n, KeyDim), one(random, type, f.batch, heads, 1, KeyDim),
      w(random, type, f.batch, heads, 1, slots);
  pk::exec e = c.exec();
  const device_array<std::uint8_t> workspace = workspace_for<ValueDim>(f, heads, n, tokens, e);
  batch_output scores(dtype::float32, f.batch, heads, 1, slots), sums(dtype::float32, f.batch, heads, 1, ValueDim),
      out(dtype::float32, f.batch, heads, n, ValueDim, walk::interleaved),
      lse(dtype::float32, f.batch, heads, n, 1, walk::interleaved);
  batch_output true_scores(dtype::float32, f.batch, heads, 1, slots),
      true_sums(dtype::float32, f.batch, heads, 1, ValueDim), true_out(dtype::float32, f.batch, heads, n, ValueDim),
      true_lse(dtype::float32, f.batch, heads, n, 1);
  const auto device = packs.view(), host = host_view(c);
  REQUIRE(after_failures(
      [&] { return pk::key_gemv<KeyDim>(f, device, one_row(one.device()), scale, one_row(scores.device()), e); }));
  REQUIRE(after_failures(
      [&] { return pk::value_gemv<ValueDim>(f, device, one_row(w.device()), one_row(sums.device()), e); }));
  REQUIRE(after_failures([&] {
    return pk::attention<KeyDim, ValueDim>(f, device, tail_of(c, c.keys.device()), tail_of(c, c.values.device()),
                                           q.device(), scale, out.device(), one_column(lse.device()), e);
  }));
  CHECK(c.flags() == 0);
  REQUIRE(pk::reference::key_gemv(f, host, one_row(one.host()), scale, one_row(true_scores.host())));
  REQUIRE(pk::reference::value_gemv(f, host, one_row(w.host()), one_row(true_sums.host())));
  REQUIRE(pk::reference::attention(f, host, tail_of(c, c.keys.host()), tail_of(c, c.values.host()), q.host(), scale,
                                   true_out.host(), one_column(true_lse.host())));
  for (batch_output* x : {&scores, &sums, &out, &lse}) x->fetch();

  const std::vector<float> k = decoded(c, side::key), v = decoded(c, side::value);
  const auto largest = [](const std::vector<float>& x) {
    double most = 0.0;
    for (const float y : x) most = std::max(most, std::fabs(static_cast<double>(y)));
    return most;
  };
  // An element is reconstructed with two roundings, of numbers up to twice the largest one.
  const double key_step = 4 * ulp * largest(k), value_step = 4 * ulp * largest(v);
  const auto sizes = [&](const tensor_data& x, std::int64_t b, std::int64_t h, std::int64_t i) {
    double sum = 0.0;
    for (std::int64_t j = 0; j < x.dim; ++j)
      sum +=
          std::fabs(static_cast<double>(pk::detail::load_element(pk::detail::address(x.host(), b, h, i, j), x.type)));
    return sum;
  };
  int wrong_scores = 0, wrong_sums = 0, wrong_outputs = 0;
  const auto near = [](float x, float y, double bound) {
    return std::fabs(static_cast<double>(x) - static_cast<double>(y)) <=
           bound + 2 * ulp * std::fabs(static_cast<double>(y));
  };
  for (std::int64_t b = 0; b < f.batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      const double score_bound = sizes(one, b, h, 0) * (32 * ulp * largest(k) + key_step) * static_cast<double>(scale);
      for (std::int64_t s = 0; s < slots; ++s)
        if (!near(scores.at(b, h, 0, s), true_scores.at(b, h, 0, s), score_bound)) ++wrong_scores;
      const double sum_bound = sizes(w, b, h, 0) * ((static_cast<double>(tokens) + 64) * ulp * largest(v) + value_step);
      for (std::int64_t i = 0; i < ValueDim; ++i)
        if (!near(sums.at(b, h, 0, i), true_sums.at(b, h, 0, i), sum_bound)) ++wrong_sums;
      for (std::int64_t i = 0; i < n; ++i) {
        const double bound = sizes(q, b, h, i) * (32 * ulp * largest(k) + key_step) * static_cast<double>(scale);
        const double weight_error = 2 * bound + 16 * ulp + (static_cast<double>(tokens) + 64) * ulp;
        const float expected = true_lse.at(b, h, i, 0);
        if (!near(lse.at(b, h, i, 0), expected, weight_error + 8 * ulp * std::fabs(static_cast<double>(expected))))
          ++wrong_outputs;
        for (std::int64_t j = 0; j < ValueDim; ++j)
          if (!near(out.at(b, h, i, j), true_out.at(b, h, i, j), 2 * weight_error * largest(v) + value_step))
            ++wrong_outputs;
      }
    }
  CHECK(wrong_scores == 0);
  CHECK(wrong_sums == 0);
  CHECK(wrong_outputs == 0);
}

/// A format of any kind for these head dims.
pk::pack_format random_format(random_source& random, int key_dim, int value_dim, int heads, int batch) {
  pk::pack_format f = random_example(random).format;
  f.key.head_dim = static_cast<std::int16_t>(key_dim);
  f.value.head_dim = static_cast<std::int16_t>(value_dim);
  f.kv_heads = heads;
  f.batch = batch;
  return f;
}

template <class Function>
void for_dims(Function&& f) {
  f(dims<64, 96>{});
  f(dims<128, 64>{});
  f(dims<256, 64>{});
}

/// Packs of three blocks, two heads and two batch rows, and everything that reads them.
struct damage_case {
  pack_case c;
  std::vector<float> keys, values;
  tensor_data q, w;

  damage_case(random_source& random, pack_granularity g, int pack_size)
      : c(format_of(token_order::none, pack_size, dtype::float16, 2, 2, codec(g, pack_zero::floating, 64, 0.02f),
                    codec(g, pack_zero::integer, 64, 0.1f)),
          3, walk::contiguous, 5),
        q(random, dtype::float16, 2, 2, 1, 64),
        w(random, dtype::float16, 2, 2, 1, 192) {
    c.fill(random);
    require(c.compress());
    keys = decoded(c, side::key);
    values = decoded(c, side::value);
    for (std::uint16_t& x : w.host_bits)
      if ((x & 0x7fff) == 0) x = 0x3c00;
    w.device_bits.assign(w.host_bits);
  }
  static std::size_t element(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t i) {
    return static_cast<std::size_t>(((b * 2 + h) * 197 + t) * 64 + i);
  }
  /// Runs all calls on packs of which `bad(side, batch row, head, token, channel)` says what must be NaN; the report's
  /// flags of each call are as said, or 0 where it reads nothing bad. A template: nvcc 13.0's front end does not end on
  /// this class with Catch2 3 if it is not.
  template <class Bad>
  void check(const pk::packs_view& packs, const Bad& bad, std::uint32_t flags) {
    const pk::pack_format& f = c.format;
    const auto reported = [&] {
      const std::uint32_t found = c.flags();
      c.report.assign(std::vector<pk::device_report>(1));
      return found;
    };
    bool any[2] = {};
    batch_output k(dtype::float32, 2, 2, 192, 64), v(dtype::float32, 2, 2, 192, 64);
    REQUIRE(pk::decompress<64, 64>(f, packs, k.device(), v.device(), c.exec()));
    CHECK(reported() == flags);
    int wrong = 0;
    for (const side which : {side::key, side::value}) {
      batch_output& x = which == side::key ? k : v;
      x.fetch();
      for (int b = 0; b < 2; ++b)
        for (int h = 0; h < 2; ++h)
          for (int t = 0; t < 192; ++t)
            for (int i = 0; i < 64; ++i) {
              const float expected = (which == side::key ? keys : values)[element(b, h, t, i)];
              const bool is_bad = bad(which, b, h, t, i);
              any[which == side::key ? 0 : 1] |= is_bad;
              if (is_bad ? !std::isnan(x.at(b, h, t, i)) : bits_of(x.at(b, h, t, i)) != bits_of(expected)) ++wrong;
            }
    }
    CHECK(wrong == 0);
    wrong = 0;

    batch_output scores(dtype::float32, 2, 2, 1, 192), sums(dtype::float32, 2, 2, 1, 64),
        few(dtype::float32, 2, 2, 1, 64), out(dtype::float32, 2, 2, 1, 64), lse(dtype::float32, 2, 2, 1, 1);
    REQUIRE(pk::key_gemv<64>(f, packs, one_row(q.device()), 1.0f, one_row(scores.device()), c.exec()));
    CHECK(reported() == (any[0] ? flags : 0u));
    REQUIRE(pk::value_gemv<64>(f, packs, one_row(w.device()), one_row(sums.device()), c.exec()));
    CHECK(reported() == (any[1] ? flags : 0u));
    REQUIRE(pk::attention<64, 64>(f, packs, tail_of(c, c.keys.device()), tail_of(c, c.values.device()), q.device(),
                                  0.125f, out.device(), one_column(lse.device()), c.exec()));
    CHECK(reported() == flags);
    // The same weights, but 0 for tokens that are bad.
    const std::vector<std::uint16_t> weights = w.host_bits;
    for (int b = 0; b < 2; ++b)
      for (int h = 0; h < 2; ++h)
        for (int t = 0; t < 192; ++t)
          for (int i = 0; i < 64; ++i)
            if (bad(side::value, b, h, t, i))
              w.host_bits[static_cast<std::size_t>((b * 2 + h) * (192 + w.pad) + t)] = 0;
    w.device_bits.assign(w.host_bits);
    REQUIRE(pk::value_gemv<64>(f, packs, one_row(w.device()), one_row(few.device()), c.exec()));
    (void)reported();
    for (batch_output* x : {&scores, &sums, &few, &out, &lse}) x->fetch();
    for (int b = 0; b < 2; ++b)
      for (int h = 0; h < 2; ++h) {
        bool key_bad = false, channel_bad[64] = {};
        for (int t = 0; t < 192; ++t) {
          bool token_bad = false;
          for (int i = 0; i < 64; ++i) {
            token_bad = token_bad || bad(side::key, b, h, t, i);
            channel_bad[i] = channel_bad[i] || bad(side::value, b, h, t, i);
          }
          if (std::isnan(scores.at(b, h, 0, t)) != token_bad) ++wrong;
          key_bad = key_bad || token_bad;
        }
        if (std::isnan(lse.at(b, h, 0, 0)) != key_bad) ++wrong;
        for (int i = 0; i < 64; ++i) {
          if (std::isnan(sums.at(b, h, 0, i)) != channel_bad[i]) ++wrong;
          if (std::isnan(out.at(b, h, 0, i)) != (key_bad || channel_bad[i])) ++wrong;
          double sum = 0.0, size = 0.0;
          for (int t = 0; t < 192; ++t) {
            const double x =
                static_cast<double>(pk::detail::load_element(pk::detail::address(w.host(), b, h, 0, t), w.type));
            if (x == 0.0) continue;
            sum += x * static_cast<double>(values[element(b, h, t, i)]);
            size += std::fabs(x * static_cast<double>(values[element(b, h, t, i)]));
          }
          if (!(std::fabs(static_cast<double>(few.at(b, h, 0, i)) - sum) <= 256 * 0x1p-24 * size)) ++wrong;
        }
      }
    CHECK(wrong == 0);
    w.host_bits = weights;
    w.device_bits.assign(weights);
  }
};

}  // namespace

TEST_CASE("packs are decompressed on the device to the reference's bits, and later tokens are left alone") {
  random_source random(1);
  int number = 0;
  const auto check = [&](auto d, const pk::pack_format& f, std::int64_t blocks) {
    using dim = decltype(d);
    pack_case c(f, blocks, walk::contiguous, 3);
    c.fill(random);
    REQUIRE(c.compress());
    const device_packs packs(c);
    const auto type = static_cast<dtype>(number % 3), other = static_cast<dtype>((number / 3 + number) % 3);
    const walk how = number % 2 == 0 ? walk::contiguous : walk::interleaved;
    ++number;
    INFO(name_of(f) << ", batch " << f.batch << ", types " << static_cast<int>(type) << " " << static_cast<int>(other));
    batch_output keys(type, f.batch, f.kv_heads, blocks * 64 + 2, dim::key, how),
        values(other, f.batch, f.kv_heads, blocks * 64 + random.between(0, 70), dim::value, walk::contiguous);
    REQUIRE(pk::reference::decompress(f, host_view(c), keys.host(), values.host()));
    REQUIRE(after_failures([&] {
      return pk::decompress<dim::key, dim::value>(f, packs.view(), keys.device(), values.device(), c.exec());
    }));
    CHECK((keys.device_bytes.host() == keys.host_bytes));
    CHECK((values.device_bytes.host() == values.host_bytes));
    CHECK(c.flags() == 0);
  };
  const std::vector<example> all = examples();
  check(dims<128, 64>{}, all[0].format, all[0].blocks);
  check(dims<96, 64>{}, all[1].format, all[1].blocks);
  check(dims<64, 256>{}, all[2].format, all[2].blocks);
  check(dims<64, 64>{}, all[3].format, all[3].blocks);
  check(dims<64, 96>{}, all[4].format, all[4].blocks);
  check(dims<128, 512>{}, all[5].format, all[5].blocks);
  for (int i = 0; i < 2 * random_examples; ++i) {
    const int batch = random.between(1, 3);
    check(dims<64, 96>{}, random_format(random, 64, 96, random.between(1, 2), batch), random.between(0, 2));
  }
}

TEST_CASE("packs of one sequence: scores, value sums and attention on the device are those of the decoded elements") {
  for (int round = 0; round < sequence_rounds / 2; ++round) {
    const std::uint64_t seed = 800 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    for_dims([&](auto d) {
      using dim = decltype(d);
      const int blocks = random.between(0, 2), tail = blocks == 0 ? random.between(1, 70) : random.between(0, 90);
      pack_case c(random_format(random, dim::key, dim::value, random.between(1, 2), 1), blocks,
                  random.one_in(2) ? walk::contiguous : walk::interleaved, tail);
      c.fill(random);
      REQUIRE(c.compress());
      check_sequence<dim::key, dim::value>(random, c);
    });
  }
}

TEST_CASE("packs without blocks, without a tail, and of more tokens than one split takes") {
  random_source random(2);
  struct shape {
    int blocks, tail;
  };
  for (const shape s : {shape{0, 1}, shape{0, 65}, shape{1, 0}, shape{2, 64}, shape{11, 70}}) {
    pk::pack_format f = random_format(random, 128, 64, 1, 1);
    f.order = token_order::median;
    pack_case c(f, s.blocks, walk::contiguous, s.tail);
    c.fill(random);
    REQUIRE(c.compress());
    CHECK((pk::policy::make_decode_grid(1, 1, 1, s.blocks * 64 + s.tail, 0).splits > 1) == (s.blocks > 8));
    CHECK((pk::policy::make_decode_grid(1, 1, 15, s.blocks * 64, 0).splits > 1) == (s.blocks > 8));
    check_sequence<128, 64>(random, c);
  }
}

TEST_CASE("a batch of packs: scores, value sums and attention on the device agree with the reference") {
  random_source random(3);
  for_dims([&](auto d) {
    using dim = decltype(d);
    pack_case c(random_format(random, dim::key, dim::value, random.between(1, 2), random.between(2, 3)),
                random.between(1, 2), random.one_in(2) ? walk::contiguous : walk::interleaved, random.between(3, 70));
    c.fill(random);
    REQUIRE(c.compress());
    check_batch<dim::key, dim::value>(random, c, random.between(2, 5), random.between(1, 3));
  });
  {  // several splits
    pk::pack_format f = random_format(random, 64, 96, 1, 2);
    f.order = token_order::median;
    pack_case c(f, 9, walk::interleaved, 1);
    c.fill(random);
    REQUIRE(c.compress());
    CHECK(pk::policy::make_decode_grid(2, 1, 3, 9 * 64, 0).splits > 1);
    check_batch<64, 96>(random, c, 3, 1);
  }
  {  // no tail: one query sees all
    pack_case c(random_format(random, 64, 96, 2, 2), 1);
    c.fill(random);
    REQUIRE(c.compress());
    check_batch<64, 96>(random, c, 2, 1);
  }
}

TEST_CASE("packs of 16 tokens with steps of tokens and vectors, which have kernels of their own, give the same") {
  random_source random(8);
  const auto check = [&](auto d, std::int64_t blocks, int group, std::int64_t n, std::int64_t tail) {
    using dim = decltype(d);
    pk::pack_format f = random_format(random, dim::key, dim::value, random.between(1, 2), random.between(1, 2));
    f.pack_size = 16;
    for (pk::pack_codec* c : {&f.key, &f.value})
      c->granularity = random.one_in(2) ? pack_granularity::token : pack_granularity::vector;
    pack_case c(f, blocks, random.one_in(2) ? walk::contiguous : walk::interleaved, tail);
    c.fill(random);
    REQUIRE(c.compress());
    check_batch<dim::key, dim::value>(random, c, group, n);
  };
  for (int round = 0; round < 2; ++round)
    for_dims([&](auto d) {
      check(d, random.between(1, 3), random.between(1, 5), random.between(1, 3), random.between(3, 140));
    });
  check(dims<128, 128>{}, 9, 1, 1, 0);    // several splits
  check(dims<192, 256>{}, 9, 2, 1, 130);  // 16-bit tokens in a split of their own, and a pass for two rows
  check(dims<128, 128>{}, 17, 4, 1, 64);
  check(dims<64, 64>{}, 0, 3, 2, 70);  // nothing is packed
  check(dims<64, 64>{}, 12, 9, 2, 5);  // several passes
}

TEST_CASE("scores of packs may grow from tile to tile as far as they like, and from slot to slot") {
  random_source random(9);
  const auto check = [&](auto&& size) {
    pk::pack_format f = random_format(random, 64, 64, 1, 1);
    f.pack_size = 16;
    f.order = token_order::none;
    f.key.granularity = f.value.granularity = pack_granularity::vector;
    pack_case c(f, 14, walk::contiguous, 3);
    c.values.fill([&](std::int64_t, std::int64_t, std::int64_t) { return random.normal(); });
    c.keys.fill([&](std::int64_t, std::int64_t t, std::int64_t) { return random.normal() * size(t); });
    REQUIRE(c.compress());
    check_batch<64, 64>(random, c, 2, 1);
  };
  for (const float growth : {0.3f, 4.0f, 40.0f})
    check([=](std::int64_t t) { return 0.05f * (1.0f + growth * static_cast<float>(t / 64)); });
  check([](std::int64_t t) { return t % 32 == 31 ? 200.0f : 0.05f; });
}

TEST_CASE("attention on packs does not need lse, and writes 16-bit elements") {
  random_source random(4);
  pack_case c(random_format(random, 64, 96, 1, 2), 1, walk::contiguous, 2);
  c.fill(random);
  REQUIRE(c.compress());
  const device_packs packs(c);
  const tensor_data q(random, dtype::float16, 2, 3, 2, 64);
  batch_output wide(dtype::float32, 2, 3, 2, 96), narrow(dtype::bfloat16, 2, 3, 2, 96), lse(dtype::float32, 2, 3, 2, 1);
  const auto run = [&](batch_output& out, const pk::output_view<3>& sums) {
    REQUIRE(pk::attention<64, 96>(c.format, packs.view(), tail_of(c, c.keys.device()), tail_of(c, c.values.device()),
                                  q.device(), 0.1f, out.device(), sums, c.exec()));
    out.fetch();
  };
  run(wide, one_column(lse.device()));
  run(narrow, {});
  bool same = true;
  for (int b = 0; b < 2; ++b)
    for (int h = 0; h < 3; ++h)
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 96; ++j)
          same = same && narrow.at(b, h, i, j) == pk::bfloat16_to_float(pk::float_to_bfloat16(wide.at(b, h, i, j)));
  CHECK(same);
}

TEST_CASE("damaged tiles of packs give NaN where they lie, are reported, and nothing outside them is read") {
  random_source random(5);
  for (const int pack_size : {16, 8}) {  // kernels of their own, and the general ones
    INFO("packs of " << pack_size);
    damage_case all(random, pack_granularity::vector, pack_size);
    const device_packs sound(all.c);
    all.check(
        sound.view(), [](side, int, int, int, int) { return false; }, 0);
    const auto tiles = [](side which, std::vector<int> numbers) {
      return [which, numbers](side s, int b, int h, int t, int) {
        const int tile = t / 64 * 4 + b * 2 + h;
        return s == which && t < 192 && std::find(numbers.begin(), numbers.end(), tile) != numbers.end();
      };
    };
    for (const side which : {side::key, side::value}) {
      host_side& packs = all.c.packs(which);
      const std::vector<std::int64_t> offsets = packs.offsets;
      INFO((which == side::key ? "K" : "V"));
      for (const std::int64_t bad : {std::int64_t{-16}, std::int64_t{1} << 60, offsets[6] + 8}) {
        INFO("offset " << bad);
        device_packs broken(all.c);
        std::vector<std::int64_t> changed = offsets;
        changed[6] = bad;  // the tile that ends here and the one that begins here
        (which == side::key ? broken.key : broken.value).offsets.assign(changed);
        all.check(broken.view(), tiles(which, {5, 6}), pk::report_tile_damaged);
      }
      for (const int tile : {0, 11}) {
        INFO("header of tile " << tile);
        device_packs broken(all.c);
        device_side& s = which == side::key ? broken.key : broken.value;
        std::vector<std::uint8_t> bytes = s.data.host();
        bytes[static_cast<std::size_t>(offsets[static_cast<std::size_t>(tile)]) + 1] = 5;
        s.data.assign(bytes);
        all.check(broken.view(), tiles(which, {tile}), pk::report_tile_damaged);
      }
      {  // the last tile ends behind what may be read
        device_packs broken(all.c);
        device_side& s = which == side::key ? broken.key : broken.value;
        std::vector<std::uint8_t> bytes = s.data.host();
        bytes.resize(bytes.size() - 16);
        s.data = device_array<std::uint8_t>(bytes);
        all.check(broken.view(), tiles(which, {11}), pk::report_tile_damaged);
      }
    }
  }
}

TEST_CASE("a group of packs whose range is NaN stays within its own elements") {
  random_source random(6);
  for (const pack_granularity g :
       {pack_granularity::token, pack_granularity::vector, pack_granularity::channel, pack_granularity::block}) {
    INFO("granularity " << static_cast<int>(g));
    damage_case all(random, g, 16);
    for (const side which : {side::key, side::value}) {
      const std::int64_t groups = pk::range_count(all.c.format, which);
      const int block = 1, b = 1, group = static_cast<int>(groups) - 1 - (groups > 1 ? 7 : 0);
      host_side& packs = all.c.packs(which);
      pk::pack_range& range = packs.ranges[static_cast<std::size_t>((block * 2 + b) * groups + group)];
      const pk::pack_range before = range;
      range.low = range.high = 0x7fff;
      const device_packs broken(all.c);
      range = before;
      all.check(
          broken.view(),
          [&](side s, int row, int h, int t, int i) {
            return s == which && row == b && t / 64 == block &&
                   pk::range_index(all.c.format.codec(which), h, t % 64, i) == group;
          },
          0);
    }
  }
}

TEST_CASE("calls on packs refuse what does not fit, and write nothing") {
  random_source random(7);
  using code = pk::status_code;
  const pk::pack_format good = format_of(token_order::none, 16, dtype::float16, 2, 1,
                                         codec(pack_granularity::token, pack_zero::integer, 64, 0.1f),
                                         codec(pack_granularity::token, pack_zero::integer, 96, 0.1f));
  pack_case c(good, 8, walk::contiguous, 2);
  c.fill(random);
  REQUIRE(c.compress());
  const device_packs packs(c);
  const tensor_data q(random, dtype::float16, 1, 4, 2, 64), one(random, dtype::float16, 1, 4, 1, 64),
      w(random, dtype::float16, 1, 4, 1, 512);
  batch_output keys(dtype::float32, 1, 2, 512, 64), values(dtype::float32, 1, 2, 512, 96),
      scores(dtype::float32, 1, 4, 1, 512), sums(dtype::float32, 1, 4, 1, 96), out(dtype::float32, 1, 4, 2, 96),
      lse(dtype::float32, 1, 4, 2, 1);
  pk::exec e = c.exec();
  const device_array<std::uint8_t> workspace = workspace_for<96>(good, 4, 2, 514, e);
  struct arguments {
    pk::pack_format f;
    pk::packs_view packs;
    pk::input_view<4> key_tail, value_tail, queries;
    pk::input_view<3> one, weights;
    pk::output_view<4> keys, values, out;
    pk::output_view<3> scores, sums, lse;
    pk::exec e;
  };
  const auto make = [&](auto change) {
    arguments a{good,
                packs.view(),
                tail_of(c, c.keys.device()),
                tail_of(c, c.values.device()),
                q.device(),
                one_row(one.device()),
                one_row(w.device()),
                keys.device(),
                values.device(),
                out.device(),
                one_row(scores.device()),
                one_row(sums.device()),
                one_column(lse.device()),
                e};
    change(a);
    return a;
  };
  const auto decompress = [&](auto change) {
    const arguments a = make(change);
    return pk::decompress<64, 96>(a.f, a.packs, a.keys, a.values, a.e).code;
  };
  const auto key_gemv = [&](auto change) {
    const arguments a = make(change);
    return pk::key_gemv<64>(a.f, a.packs, a.one, 1.0f, a.scores, a.e).code;
  };
  const auto value_gemv = [&](auto change) {
    const arguments a = make(change);
    return pk::value_gemv<96>(a.f, a.packs, a.weights, a.sums, a.e).code;
  };
  const auto attention = [&](auto change) {
    const arguments a = make(change);
    return pk::attention<64, 96>(a.f, a.packs, a.key_tail, a.value_tail, a.queries, 1.0f, a.out, a.lse, a.e).code;
  };
  {  // more rows than 63 bits count, and more blocks than a grid has, in views that hold one element
    const auto many = [&](std::int64_t count) {
      return attention([=](arguments& a) {
        for (auto* x : {&a.key_tail, &a.value_tail}) x->extent[2] = count;
        for (auto* extent : {a.queries.extent, a.out.extent, a.lse.extent}) extent[1] = extent[2] = count;
        for (auto* stride : {a.key_tail.stride, a.value_tail.stride, a.queries.stride, a.out.stride}) stride[2] = 0;
        for (auto* stride : {a.queries.stride, a.out.stride, a.lse.stride}) stride[1] = 0;
        a.lse.stride[2] = 0;
      });
    };
    CHECK(many(std::int64_t{1} << 40) == code::overflow);
    CHECK(many(std::int64_t{1} << 24) == code::overflow);
  }
  const auto everywhere = [&](code expected, auto change) {
    CHECK(decompress(change) == expected);
    CHECK(key_gemv(change) == expected);
    CHECK(value_gemv(change) == expected);
    CHECK(attention(change) == expected);
  };
  // The format and the packs.
  everywhere(code::invalid_argument, [](arguments& a) { a.f.pack_size = 12; });
  everywhere(code::invalid_argument, [](arguments& a) { a.packs.blocks = -1; });
  everywhere(code::overflow, [](arguments& a) { a.packs.blocks = std::int64_t{1} << 58; });
  everywhere(code::invalid_argument, [](arguments& a) { a.packs.key.offsets = nullptr; });
  everywhere(code::invalid_argument, [](arguments& a) { a.packs.value.offsets = nullptr; });
  everywhere(code::invalid_argument, [](arguments& a) { a.packs.key.ranges = nullptr; });
  everywhere(code::invalid_argument, [](arguments& a) { a.packs.value.data = nullptr; });
  everywhere(code::misaligned, [](arguments& a) { a.packs.key.data += 8; });
  everywhere(code::misaligned, [](arguments& a) {
    a.packs.value.offsets =
        reinterpret_cast<const std::int64_t*>(reinterpret_cast<std::uintptr_t>(a.packs.value.offsets) + 4);
  });
  everywhere(code::shape_mismatch, [](arguments& a) { a.f.batch = 2; });
  // The head dims that a call was compiled for.
  const auto nothing = [](arguments&) {};
  {
    const arguments a = make(nothing);
    CHECK(pk::decompress<96, 96>(a.f, a.packs, a.keys, a.values, a.e).code == code::shape_mismatch);
    CHECK(pk::decompress<64, 64>(a.f, a.packs, a.keys, a.values, a.e).code == code::shape_mismatch);
    CHECK(pk::key_gemv<128>(a.f, a.packs, a.one, 1.0f, a.scores, a.e).code == code::shape_mismatch);
    CHECK(pk::value_gemv<64>(a.f, a.packs, a.weights, a.sums, a.e).code == code::shape_mismatch);
    CHECK(pk::attention<128, 64>(a.f, a.packs, a.key_tail, a.value_tail, a.queries, 1.0f, a.out, a.lse, a.e).code ==
          code::shape_mismatch);
    CHECK(pk::attention<64, 64>(a.f, a.packs, a.key_tail, a.value_tail, a.queries, 1.0f, a.out, a.lse, a.e).code ==
          code::shape_mismatch);
  }
  // Tensors of decompress.
  CHECK(decompress([](arguments& a) { a.keys.extent[1] = 1; }) == code::shape_mismatch);
  CHECK(decompress([](arguments& a) { a.keys.extent[2] = 511; }) == code::shape_mismatch);
  CHECK(decompress([](arguments& a) { a.values.extent[2] = 448; }) == code::shape_mismatch);
  CHECK(decompress([](arguments& a) { a.values.extent[3] = 64; }) == code::shape_mismatch);
  CHECK(decompress([](arguments& a) { a.values.data = nullptr; }) == code::invalid_argument);
  CHECK(decompress([](arguments& a) { a.keys.stride[2] += 2; }) == code::misaligned);
  // Those of the GEMVs.
  CHECK(key_gemv([](arguments& a) { a.one.extent[2] = 63; }) == code::shape_mismatch);
  CHECK(key_gemv([](arguments& a) { a.one.extent[1] = a.scores.extent[1] = 3; }) == code::shape_mismatch);
  CHECK(key_gemv([](arguments& a) { a.one.extent[1] = a.scores.extent[1] = 0; }) == code::shape_mismatch);
  CHECK(key_gemv([](arguments& a) { a.one.extent[1] = 2; }) == code::shape_mismatch);
  CHECK(key_gemv([](arguments& a) { a.scores.extent[0] = 2; }) == code::shape_mismatch);
  CHECK(key_gemv([](arguments& a) { a.scores.extent[2] = 511; }) == code::shape_mismatch);
  CHECK(key_gemv([](arguments& a) { a.one.data = nullptr; }) == code::invalid_argument);
  CHECK(key_gemv([](arguments& a) { a.scores.data = nullptr; }) == code::invalid_argument);
  CHECK(value_gemv([](arguments& a) { a.weights.extent[2] = 513; }) == code::shape_mismatch);
  CHECK(value_gemv([](arguments& a) { a.weights.extent[1] = 2; }) == code::shape_mismatch);
  CHECK(value_gemv([](arguments& a) { a.sums.extent[2] = 64; }) == code::shape_mismatch);
  CHECK(value_gemv([](arguments& a) { a.sums.data = nullptr; }) == code::invalid_argument);
  // And of attention.
  CHECK(attention([](arguments& a) { a.key_tail.extent[2] = 1; }) == code::shape_mismatch);
  CHECK(attention([](arguments& a) { a.value_tail.extent[2] = 1; }) == code::shape_mismatch);
  CHECK(attention([](arguments& a) { a.key_tail.extent[2] = a.value_tail.extent[2] = 1; }) == code::shape_mismatch);
  CHECK(attention([](arguments& a) { a.key_tail.extent[2] = a.value_tail.extent[2] = 0; }) == code::shape_mismatch);
  CHECK(attention([](arguments& a) { a.key_tail.extent[1] = 1; }) == code::shape_mismatch);
  CHECK(attention([](arguments& a) { a.value_tail.extent[3] = 64; }) == code::shape_mismatch);
  CHECK(attention([](arguments& a) { a.value_tail.data = nullptr; }) == code::invalid_argument);
  CHECK(attention([](arguments& a) { a.queries.extent[3] = 96; }) == code::shape_mismatch);
  CHECK(attention([](arguments& a) { a.queries.extent[1] = 3; }) == code::shape_mismatch);
  CHECK(attention([](arguments& a) { a.queries.data = nullptr; }) == code::invalid_argument);
  CHECK(attention([](arguments& a) { a.out.extent[2] = 1; }) == code::shape_mismatch);
  CHECK(attention([](arguments& a) { a.out.extent[3] = 64; }) == code::shape_mismatch);
  for (int i = 0; i < 3; ++i) CHECK(attention([&](arguments& a) { a.lse.extent[i] += 1; }) == code::shape_mismatch);
  CHECK(attention([](arguments& a) { a.lse.stride[1] += 2; }) == code::misaligned);
  CHECK(attention([](arguments& a) {  // no blocks: one query needs a tail
          a.packs.blocks = 0;
          a.key_tail.extent[2] = a.value_tail.extent[2] = 0;
          a.queries.extent[2] = a.out.extent[2] = a.lse.extent[2] = 1;
        }) == code::shape_mismatch);
  // Workspaces.
  for (const auto& call : {std::function<code(std::function<void(arguments&)>)>(value_gemv),
                           std::function<code(std::function<void(arguments&)>)>(attention)}) {
    CHECK(call([](arguments& a) { a.e.workspace = nullptr; }) == code::invalid_argument);
    CHECK(call([](arguments& a) { a.e.workspace = static_cast<char*>(a.e.workspace) + 128; }) == code::misaligned);
    CHECK(call([&](arguments& a) {
            a.e.workspace_bytes =
                static_cast<std::size_t>(
                    pk::detail::split_bytes<96>(pk::policy::make_decode_grid(1, 2, 2, 512, 0)).value()) -
                1;
          }) == code::workspace_too_small);
  }
  for (const batch_output* x : {&keys, &values, &scores, &sums, &out, &lse}) CHECK(x->untouched());
  CHECK(c.flags() == 0);
  // What is needed by none of these.
  CHECK(key_gemv([](arguments& a) { a.e.workspace = nullptr; }) == code::ok);
  CHECK_FALSE(scores.untouched());
  CHECK(attention([](arguments& a) { a.lse = {}; }) == code::ok);
  CHECK(lse.untouched());
  CHECK_FALSE(out.untouched());
}
