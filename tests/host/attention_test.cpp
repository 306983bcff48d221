// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <packkv/reference/attention.hpp>

#include "fixture.hpp"

namespace pk = packkv;
namespace ref = packkv::reference;
using namespace host_test;

namespace {

/// A cache of random sequences: coded pages, their reconstruction, and optional 16-bit overlays.
template <int Dk, int Dv>
struct cache_fixture {
  using format_type = pk::runtime_format<Dk, Dv>;

  cache_fixture(random_source& random, const format_type& f, std::vector<std::int32_t> lens, int heads, int max_len)
      : format(f),
        kv_heads(heads),
        lengths(std::move(lens)),
        longest(max_len),
        tiles(random.between(1, 2)),
        params(arrays.make(f, heads, random, random.chance(2))),
        place(random.pick(table_kinds), lengths, 64 * tiles, random),
        coded(f, place.num_pages, heads, tiles, random.pick(pool_kinds), 0xff),
        keys(pk::dtype::float16, {batch(), heads, max_len, Dk}),
        values(pk::dtype::float16, {batch(), heads, max_len, Dv}),
        keys_back(pk::dtype::bfloat16, {batch(), heads, max_len, Dk}),
        values_back(pk::dtype::bfloat16, {batch(), heads, max_len, Dv}) {
    keys.fill([&] { return random.normal(); });
    values.fill([&] { return random.normal(); });
    pk::device_report report;
    REQUIRE(ref::compress(keys.in(), values.in(), lengths.data(), params, coded.pages, place.view, report));
    cache.pages = coded.pages;
    cache.table = place.view;
    cache.seq_lens = lengths.data();
    cache.batch = batch();
    cache.max_seq_len = max_len;
  }
  std::int32_t batch() const { return static_cast<std::int32_t>(lengths.size()); }

  /// The reconstruction of a coded token in float: decompress into 16 bits would round, so tile by tile.
  std::vector<double> token(pk::side which, int b, int head, std::int64_t t) {
    const bool key = which == pk::side::key;
    const pk::codec_spec& spec = key ? format.key_spec : format.value_spec;
    float x[pk::max_head_dim];
    ref::decode_token(
        spec, pk::detail::of_head(spec, key ? params.key : params.value, head),
        coded.tile(which, place.page(b, static_cast<int>(t / (64 * tiles))), head, static_cast<int>(t / 64 % tiles)),
        static_cast<int>(t % 64), x);
    return std::vector<double>(x, x + spec.head_dim);
  }

  format_type format;
  int kv_heads;
  std::vector<std::int32_t> lengths;
  int longest, tiles;
  parameter_arrays arrays;
  pk::parameters<format_type> params;
  table place;
  pool coded;
  tensor<4> keys, values, keys_back, values_back;
  pk::cache_view cache;
};

template <class View>
std::vector<double> raw_token(const View& v, std::int64_t row, std::int64_t head, std::int64_t slot) {
  std::vector<double> x;
  for (std::int64_t c = 0; c < v.extent[3]; ++c)
    x.push_back(static_cast<double>(pk::detail::load_element(pk::detail::address(v, row, head, slot, c), v.type)));
  return x;
}

struct naive_result {
  std::vector<double> out;
  double lse;  ///< natural
};

/// softmax(scale q.K) V of one query from its definition: collect, then two passes in long double.
template <int Dk, int Dv>
naive_result naive_attention(cache_fixture<Dk, Dv>& f, const std::vector<double>& q, int b, int head,
                             std::int64_t query_position, const pk::attention_options& o) {
  struct seen {
    long double score;
    std::vector<double> value;
  };
  std::vector<seen> tokens;
  const pk::cache_view& cache = f.cache;
  const std::int64_t length = f.lengths[static_cast<std::size_t>(b)];
  for (std::int64_t t = 0; t < length; ++t) {
    const std::int64_t position = o.position_stride * t + o.position_offset;
    if (cache.kv_begin != nullptr && position < cache.kv_begin[b]) continue;
    if (o.causal && position > query_position) continue;
    if (o.window > 0 && position <= query_position - o.window) continue;
    std::vector<double> k, v;
    const bool sink = cache.sinks.keys.data != nullptr && t < cache.sinks.keys.extent[2];
    bool ring = false;
    std::int64_t row = b;
    if (cache.ring.keys.data != nullptr) {
      if (cache.ring.row != nullptr) row = cache.ring.row[b];
      ring = row >= 0 && t >= length - cache.ring.keys.extent[2] && position > query_position - cache.ring.window;
    }
    if (sink) {
      k = raw_token(cache.sinks.keys, b, head, t), v = raw_token(cache.sinks.values, b, head, t);
    } else if (ring) {
      const std::int64_t slot = t % cache.ring.keys.extent[2];
      k = raw_token(cache.ring.keys, row, head, slot), v = raw_token(cache.ring.values, row, head, slot);
    } else {
      k = f.token(pk::side::key, b, head, t), v = f.token(pk::side::value, b, head, t);
    }
    long double s = 0.0L;
    for (std::size_t c = 0; c < k.size(); ++c) s += static_cast<long double>(q[c]) * k[c];
    s *= o.softmax_scale;
    if (o.soft_cap > 0.0f) s = o.soft_cap * std::tanh(s / o.soft_cap);
    tokens.push_back({s, v});
  }
  naive_result r{std::vector<double>(Dv, 0.0), -INFINITY};
  if (tokens.empty()) return r;
  long double top = tokens[0].score, total = 0.0L;
  for (const seen& s : tokens) top = std::max(top, s.score);
  for (const seen& s : tokens) total += std::exp(s.score - top);
  for (int c = 0; c < Dv; ++c) {
    long double sum = 0.0L;
    for (const seen& s : tokens) sum += std::exp(s.score - top) / total * s.value[static_cast<std::size_t>(c)];
    r.out[static_cast<std::size_t>(c)] = static_cast<double>(sum);
  }
  r.lse = static_cast<double>(top + std::log(total));
  return r;
}

/// A random call of decode_attention with every option, against the definition.
template <int Dk, int Dv>
void check_attention(random_source& random, bool plain) {
  pk::runtime_format<Dk, Dv> format;
  format.key_spec = random_codec(random, pk::side::key, Dk);
  format.value_spec = random_codec(random, pk::side::value, Dv);
  const int batch = random.between(1, 3), heads = random.between(1, 2), group = random.between(1, 8);
  const int max_len = random.between(1, 200), max_q = random.between(1, 8),
            capacity_more = random.chance(2) ? 0 : random.below(20);
  std::vector<std::int32_t> lengths, starts{random.below(3)};
  for (int b = 0; b < batch; ++b) lengths.push_back(random.chance(5) ? 0 : random.below(max_len + 1));
  for (int b = 0; b < batch; ++b)
    starts.push_back(starts.back() + (random.chance(5) ? 0 : random.chance(2) ? max_q : random.between(1, max_q)));
  const std::int32_t rows = starts.back() + random.below(2);
  cache_fixture<Dk, Dv> f(random, format, lengths, heads, max_len);

  pk::attention_options o;
  o.softmax_scale = static_cast<float>((0.5 + random.uniform()) / std::sqrt(static_cast<double>(Dk)));
  o.base = random.chance(2) ? pk::lse_base::e : pk::lse_base::two;
  o.max_query_len = max_q;
  std::vector<std::int32_t> begin, context, ring_row;
  tensor<4> sink_keys(pk::dtype::bfloat16, {batch, heads, random.between(1, 40), Dk}, walk::scrambled, &random);
  tensor<4> sink_values(pk::dtype::float16, {batch, heads, sink_keys.in().extent[2], Dv}, walk::scrambled, &random);
  const int ring_window = random.between(1, 70);
  const std::int64_t ring_rows = batch + 1, capacity = ring_window + max_q - 1 + capacity_more;
  tensor<4> ring_keys(pk::dtype::float16, {ring_rows, heads, capacity, Dk}, walk::scrambled, &random);
  tensor<4> ring_values(pk::dtype::bfloat16, {ring_rows, heads, capacity, Dv}, walk::scrambled, &random);
  if (!plain) {
    o.causal = !random.chance(4);
    if (random.chance(3)) o.soft_cap = static_cast<float>(0.5 + 3.0 * random.uniform());
    if (random.chance(3)) o.window = random.between(1, 100);
    if (random.chance(3)) {
      for (int b = 0; b < batch; ++b) begin.push_back(random.between(-3, max_len));
      f.cache.kv_begin = begin.data();
    }
    if (random.chance(4)) {
      o.position_stride = random.between(1, 4), o.position_offset = random.below(o.position_stride);
      for (int b = 0; b < batch; ++b)
        context.push_back(lengths[static_cast<std::size_t>(b)] * o.position_stride + random.below(o.position_stride));
      o.context_lens = context.data();
    }
    if (random.chance(2)) {
      sink_keys.fill([&] { return random.normal(); });
      sink_values.fill([&] { return random.normal(); });
      f.cache.sinks = {sink_keys.in(), sink_values.in()};
    }
    if (random.chance(2)) {
      ring_keys.fill([&] { return random.normal(); });
      ring_values.fill([&] { return random.normal(); });
      f.cache.ring.keys = ring_keys.in(), f.cache.ring.values = ring_values.in();
      f.cache.ring.window = ring_window;
      for (int b = 0; b < batch; ++b) ring_row.push_back(random.chance(4) ? -1 : random.below(batch + 1));
      if (random.chance(2)) f.cache.ring.row = ring_row.data();
    }
  }
  CAPTURE(Dk, Dv, batch, heads, group, max_len, max_q, rows, o.causal, o.window, o.soft_cap, o.position_stride);
  CAPTURE(f.cache.kv_begin != nullptr, f.cache.sinks.keys.data != nullptr, f.cache.ring.keys.data != nullptr,
          ring_window, capacity);

  const pk::dtype type = random.chance(2) ? pk::dtype::float16 : pk::dtype::bfloat16;
  tensor<3> q(type, {rows, heads * group, Dk}, walk::scrambled, &random);
  q.fill([&] { return 2.0f * random.normal(); });
  tensor<3> out(random.chance(3) ? type : pk::dtype::float32, {rows, heads * group, Dv}, walk::scrambled, &random);
  tensor<2> lse(pk::dtype::float32, {rows, heads * group}, walk::scrambled, &random);
  pk::device_report report;
  const bool with_lse = !random.chance(4);
  REQUIRE(ref::decode_attention(q.in(), starts.data(), f.cache, f.params, out.out(),
                                with_lse ? lse.out() : pk::output_view<2>{}, o, report));
  CHECK(report.flags == 0);
  CHECK(out.canaries_intact());
  CHECK(lse.canaries_intact());
  const double unit = out.in().type == pk::dtype::float32 ? 1e-6 : type == pk::dtype::float16 ? 0x1p-11 : 0x1p-8;
  int wrong = 0, wrong_lse = 0, touched = 0;
  std::vector<bool> owned(static_cast<std::size_t>(rows), false);
  for (int b = 0; b < batch; ++b)
    for (int row = starts[static_cast<std::size_t>(b)]; row < starts[static_cast<std::size_t>(b) + 1]; ++row) {
      owned[static_cast<std::size_t>(row)] = true;
      const std::int64_t context_len =
          o.context_lens != nullptr ? o.context_lens[b] : lengths[static_cast<std::size_t>(b)];
      const std::int64_t position = context_len - (starts[static_cast<std::size_t>(b) + 1] - row);
      for (int h = 0; h < heads * group; ++h) {
        std::vector<double> query;
        for (int c = 0; c < Dk; ++c) query.push_back(static_cast<double>(q.get(row, h, c)));
        const naive_result want = naive_attention(f, query, b, h / group, position, o);
        for (int c = 0; c < Dv; ++c) {
          const double x = want.out[static_cast<std::size_t>(c)];
          wrong += !(std::fabs(static_cast<double>(out.get(row, h, c)) - x) <= 1.01 * unit * std::fabs(x) + 1e-6);
          if (want.lse == -INFINITY) wrong += out.get(row, h, c) != 0.0f;
        }
        if (!with_lse) continue;
        const double l = want.lse * (o.base == pk::lse_base::two ? 1.0 / std::log(2.0) : 1.0);
        const double got = static_cast<double>(lse.get(row, h));
        wrong_lse += !(got == l || std::fabs(got - l) <= 1e-6 * (1.0 + std::fabs(l)));
      }
    }
  for (int row = 0; row < rows; ++row)  // rows of no sequence are padding
    for (int h = 0; h < heads * group && !owned[static_cast<std::size_t>(row)]; ++h)
      for (int c = 0; c < Dv; ++c) touched += out.raw(row, h, c) != 0xcdcd;
  CHECK(wrong == 0);
  CHECK(wrong_lse == 0);
  CHECK(touched == 0);
}

template <int Dk, int Dv>
void check_attentions(int rounds) {
  for (int i = 0; i < rounds; ++i) {
    const std::uint64_t seed = seed_of(static_cast<std::uint64_t>(9000000 + Dk * 1000 + Dv + 100000 * i));
    INFO("seed " << seed);
    random_source random(seed);
    check_attention<Dk, Dv>(random, i % 4 == 0);
  }
}

using small = pk::runtime_format<64>;

small plan_format(int key_width = 4, int value_width = 4) {
  small f;
  f.key_spec =
      pk::make_plan_codec(pk::side::key, 64, pk::transform_kind::hadamard, flat_plan(pk::side::key, 64, key_width));
  f.value_spec = pk::make_plan_codec(pk::side::value, 64, pk::transform_kind::hadamard,
                                     flat_plan(pk::side::value, 64, value_width));
  return f;
}

}  // namespace

TEST_CASE("decode_attention is softmax(scale q.K) V for random shapes and options, head_dim 64", "[attention]") {
  check_attentions<64, 64>(60);
}
TEST_CASE("decode_attention is softmax(scale q.K) V for random shapes and options, head_dim 96 and 128",
          "[attention]") {
  check_attentions<96, 96>(12);
  check_attentions<128, 128>(24);
}
TEST_CASE("decode_attention is softmax(scale q.K) V for random shapes and options, head_dim 192/128", "[attention]") {
  check_attentions<192, 128>(16);
}
TEST_CASE("decode_attention is softmax(scale q.K) V for random shapes and options, head_dim 256 and 512/64",
          "[attention]") {
  check_attentions<256, 256>(8);
  check_attentions<512, 64>(6);
}

TEST_CASE("every group size 1 to 8 and 16 reads its own KV head", "[attention]") {
  for (int group = 1; group <= 16; group = group == 8 ? 16 : group + 1) {
    const std::uint64_t seed = seed_of(static_cast<std::uint64_t>(600 + group));
    INFO("seed " << seed << " group " << group);
    random_source random(seed);
    cache_fixture<64, 64> f(random, plan_format(), {70}, 3, 70);
    tensor<3> q(pk::dtype::float16, {1, 3 * group, 64}), out(pk::dtype::float32, {1, 3 * group, 64});
    q.fill([&] { return random.normal(); });
    const std::int32_t starts[] = {0, 1};
    pk::attention_options o;
    o.base = pk::lse_base::e, o.softmax_scale = 0.125f;
    pk::device_report report;
    REQUIRE(ref::decode_attention(q.in(), starts, f.cache, f.params, out.out(), {}, o, report));
    double worst = 0.0;
    for (int h = 0; h < 3 * group; ++h) {
      std::vector<double> query;
      for (int c = 0; c < 64; ++c) query.push_back(static_cast<double>(q.get(0, h, c)));
      const naive_result want = naive_attention(f, query, 0, h / group, 69, o);
      for (int c = 0; c < 64; ++c)
        worst =
            std::fmax(worst, std::fabs(want.out[static_cast<std::size_t>(c)] - static_cast<double>(out.get(0, h, c))));
    }
    CHECK(worst < 1e-6);
  }
}

TEST_CASE("every length with poisoned unused slots attends as a cache without them", "[attention]") {
  const std::uint64_t seed = seed_of(700);
  INFO("seed " << seed);
  random_source random(seed);
  const small format = plan_format(3, 2);
  const pk::parameters<small> params{format, {}, {}};
  tensor<4> keys(pk::dtype::float16, {1, 1, 192, 64}), values(pk::dtype::float16, {1, 1, 192, 64});
  tensor<3> q(pk::dtype::float16, {2, 2, 64});
  for (tensor<4>* t : {&keys, &values}) t->fill([&] { return random.normal(); });
  q.fill([&] { return random.normal(); });
  for (std::int32_t length = 1; length <= 130; ++length) {
    float results[2][2 * 2 * 65];
    for (const int poisoned : {0, 1}) {
      pool p(format, 3, 1, 1, pool_kind::one_pool, poisoned ? 0xff : 0x00);
      pk::device_report report;
      std::vector<std::int64_t> slots;
      for (int t = 0; t < 192; ++t) slots.push_back(t < length ? t : -1);
      pk::input_view<3> k, v;
      k.data = keys.in().data, v.data = values.in().data;
      k.extent[0] = v.extent[0] = 192, k.extent[1] = v.extent[1] = 1, k.extent[2] = v.extent[2] = 64;
      k.stride[0] = v.stride[0] = 128, k.stride[1] = v.stride[1] = 0, k.stride[2] = v.stride[2] = 2;
      REQUIRE(ref::store_tokens(k, v, slots.data(), params, p.pages, report));
      pk::cache_view cache;
      cache.pages = p.pages, cache.table.row_stride = 3, cache.seq_lens = &length, cache.batch = 1,
      cache.max_seq_len = 192;
      pk::attention_options o;
      o.base = pk::lse_base::e, o.softmax_scale = 0.125f, o.max_query_len = 2;
      const std::int32_t starts[] = {0, 2};
      const std::int64_t shape[] = {2, 2, 64}, lse_shape[] = {2, 2};
      REQUIRE(ref::decode_attention(
          q.in(), starts, cache, params, pk::make_output<3>(results[poisoned], pk::dtype::float32, shape),
          pk::make_output<2>(results[poisoned] + 256, pk::dtype::float32, lse_shape), o, report));
      CHECK(report.flags == 0);
    }
    INFO("length " << length);
    CHECK(std::memcmp(results[0], results[1], sizeof results[0]) == 0);
    CHECK(std::isfinite(results[1][255]));
  }
}

TEST_CASE("a query that sees no token gives 0 and -inf in both bases", "[attention]") {
  random_source random(seed_of(710));
  for (const pk::lse_base base : {pk::lse_base::e, pk::lse_base::two}) {
    cache_fixture<64, 64> f(random, plan_format(), {0, 5, 40}, 1, 64);
    const std::int32_t begin[] = {0, 0, 40}, starts[] = {0, 2, 8, 9};
    f.cache.kv_begin = begin;
    tensor<3> q(pk::dtype::float16, {9, 1, 64}), out(pk::dtype::float32, {9, 1, 64});
    tensor<2> lse(pk::dtype::float32, {9, 1});
    q.fill([&] { return random.normal(); });
    pk::attention_options o;
    o.softmax_scale = 1.0f, o.base = base, o.max_query_len = 8;
    pk::device_report report;
    REQUIRE(ref::decode_attention(q.in(), starts, f.cache, f.params, out.out(), lse.out(), o, report));
    // An empty sequence, the first of six queries over five tokens, and a sequence that is all padding.
    for (int row = 0; row < 9; ++row) {
      const bool empty = row < 2 || row == 2 || row == 8;
      INFO("row " << row);
      CHECK((lse.get(row, 0) == -INFINITY) == empty);
      CHECK((out.get(row, 0, 3) == 0.0f) == empty);
    }
  }
}

TEST_CASE("interleaved halves of a sequence, merged, are the attention over the whole", "[attention]") {
  for (int ways = 2; ways <= 4; ++ways)
    for (const pk::lse_base base : {pk::lse_base::e, pk::lse_base::two}) {
      const std::uint64_t seed = seed_of(static_cast<std::uint64_t>(720 + ways));
      INFO("seed " << seed << " ways " << ways);
      random_source random(seed);
      const std::int32_t total = random.between(90, 180);
      const small format = plan_format(4, 2);
      cache_fixture<64, 64> whole(random, format, {total}, 2, total);
      whole.params = {format, {}, {}};
      pk::device_report report;
      REQUIRE(ref::compress(whole.keys.in(), whole.values.in(), nullptr, whole.params, whole.coded.pages,
                            whole.place.view, report));
      pk::attention_options o;
      o.softmax_scale = 0.2f, o.base = base, o.max_query_len = 5, o.window = random.chance(2) ? 70 : 0;
      const std::int32_t starts[] = {0, 5}, begin = 3;
      whole.cache.kv_begin = &begin;
      tensor<3> q(pk::dtype::float16, {5, 4, 64}), out(pk::dtype::float32, {5, 4, 64}),
          merged(pk::dtype::float32, {5, 4, 64});
      tensor<2> lse(pk::dtype::float32, {5, 4}), merged_lse(pk::dtype::float32, {5, 4});
      q.fill([&] { return 2.0f * random.normal(); });
      REQUIRE(ref::decode_attention(q.in(), starts, whole.cache, whole.params, out.out(), lse.out(), o, report));

      tensor<4> parts(pk::dtype::float32, {ways, 5, 4, 64});
      tensor<3> part_lses(pk::dtype::float32, {ways, 5, 4});
      for (int rank = 0; rank < ways; ++rank) {
        const std::int32_t local = (total - rank + ways - 1) / ways;
        pk::input_view<4> k = whole.keys.in(), v = whole.values.in();
        for (pk::input_view<4>* view : {&k, &v}) {
          view->data = static_cast<const char*>(view->data) + rank * view->stride[2];
          view->stride[2] *= ways;
          view->extent[2] = local;
        }
        pool p(format, 2, 2, 2);
        pk::cache_view cache;
        cache.pages = p.pages, cache.table.row_stride = 2, cache.seq_lens = &local, cache.batch = 1,
        cache.max_seq_len = total;
        cache.kv_begin = &begin;
        REQUIRE(ref::compress(k, v, nullptr, whole.params, p.pages, cache.table, report));
        pk::attention_options mine = o;
        mine.position_stride = ways, mine.position_offset = rank, mine.context_lens = &total;
        pk::output_view<3> part = pk::make_output<3>(parts.out().data, pk::dtype::float32, {5, 4, 64});
        part.data = static_cast<char*>(parts.out().data) + rank * parts.out().stride[0];
        pk::output_view<2> part_lse = pk::make_output<2>(nullptr, pk::dtype::float32, {5, 4});
        part_lse.data = static_cast<char*>(part_lses.out().data) + rank * part_lses.out().stride[0];
        REQUIRE(ref::decode_attention(q.in(), starts, cache, whole.params, part, part_lse, mine, report));
      }
      REQUIRE(ref::merge_states(parts.in(), part_lses.in(), merged.out(), merged_lse.out(), base));
      CHECK(report.flags == 0);
      double worst = 0.0, worst_lse = 0.0;
      for (int i = 0; i < 5; ++i)
        for (int h = 0; h < 4; ++h) {
          worst_lse = std::fmax(worst_lse, std::fabs(lse.get(i, h) - merged_lse.get(i, h)));
          for (int c = 0; c < 64; ++c) worst = std::fmax(worst, std::fabs(out.get(i, h, c) - merged.get(i, h, c)));
        }
      CHECK(worst < 2e-6);
      CHECK(worst_lse < 2e-6);
    }
}

TEST_CASE("a ring that repeats the coded tokens' input changes only the tokens it covers", "[attention]") {
  // fp16 tiles and a ring of the same data: the overlay must be invisible, whatever window, rows and query length.
  for (int round = 0; round < 20; ++round) {
    const std::uint64_t seed = seed_of(static_cast<std::uint64_t>(740 + round));
    INFO("seed " << seed);
    random_source random(seed);
    const std::int32_t length = random.between(1, 180);
    cache_fixture<64, 64> f(random, small{}, {length, length / 2}, 2, length);
    const int window = random.between(1, 90), queries = random.between(1, 4);
    const std::int64_t capacity = window + queries - 1 + random.below(9);
    tensor<4> rk(pk::dtype::float16, {3, 2, capacity, 64}), rv(pk::dtype::float16, {3, 2, capacity, 64});
    rk.fill([] { return NAN; });
    rv.fill([] { return NAN; });
    const std::int32_t rows[] = {2, 0}, starts[] = {0, queries, 2 * queries};
    for (int b = 0; b < 2; ++b)
      for (int t = 0; t < f.lengths[static_cast<std::size_t>(b)]; ++t)
        for (int h = 0; h < 2; ++h)
          for (int c = 0; c < 64; ++c) {
            rk.set(f.keys.get(b, h, t, c), rows[b], h, t % capacity, c);
            rv.set(f.values.get(b, h, t, c), rows[b], h, t % capacity, c);
          }
    tensor<3> q(pk::dtype::float16, {2 * queries, 2, 64}), with(pk::dtype::float32, {2 * queries, 2, 64});
    tensor<3> without(pk::dtype::float32, {2 * queries, 2, 64});
    q.fill([&] { return random.normal(); });
    pk::attention_options o;
    o.base = pk::lse_base::e, o.softmax_scale = 0.3f, o.max_query_len = queries;
    pk::device_report report;
    REQUIRE(ref::decode_attention(q.in(), starts, f.cache, f.params, without.out(), {}, o, report));
    f.cache.ring = {rk.in(), rv.in(), rows, window};
    REQUIRE(ref::decode_attention(q.in(), starts, f.cache, f.params, with.out(), {}, o, report));
    CHECK((with.bytes() == without.bytes()));
  }
}

TEST_CASE("lengths, query counts and pages out of range are reported and read nothing outside the cache",
          "[attention]") {
  random_source random(seed_of(760));
  cache_fixture<64, 64> f(random, plan_format(), {100}, 1, 100);
  tensor<3> q(pk::dtype::float16, {2, 1, 64}), out(pk::dtype::float32, {2, 1, 64});
  tensor<2> lse(pk::dtype::float32, {2, 1});
  q.fill([&] { return random.normal(); });
  pk::attention_options o;
  o.base = pk::lse_base::e, o.softmax_scale = 0.125f, o.max_query_len = 2;
  const auto flags = [&](std::int32_t length, std::int32_t begin, std::int32_t end) {
    const std::int32_t starts[] = {begin, end};
    pk::cache_view cache = f.cache;
    cache.seq_lens = &length;
    pk::device_report report;
    REQUIRE(ref::decode_attention(q.in(), starts, cache, f.params, out.out(), lse.out(), o, report));
    return report.flags;
  };
  CHECK(flags(100, 0, 2) == 0);
  CHECK(flags(101, 0, 2) == pk::report_length_out_of_range);
  CHECK(flags(-1, 0, 2) == pk::report_length_out_of_range);
  CHECK(flags(2147483647, 0, 1) == pk::report_length_out_of_range);
  CHECK(flags(100, 0, 3) == pk::report_length_out_of_range);
  CHECK(flags(100, 1, 3) == pk::report_length_out_of_range);
  CHECK(flags(100, -1, 1) == pk::report_length_out_of_range);
  CHECK(flags(100, 2, 1) == pk::report_length_out_of_range);
  CHECK(flags(100, 2147483647, -2147483647) == pk::report_length_out_of_range);
  // A missing page: its tokens are left out.
  pk::cache_view cache = f.cache;
  const std::int32_t none[] = {-1, -1, -1}, starts[] = {0, 1};
  cache.table = {none, nullptr, 3};
  pk::device_report report;
  REQUIRE(ref::decode_attention(q.in(), starts, cache, f.params, out.out(), lse.out(), o, report));
  CHECK(report.flags == pk::report_page_missing);
  CHECK(lse.get(0, 0) == -INFINITY);
  CHECK(out.get(0, 0, 0) == 0.0f);
}

TEST_CASE("a ring row beyond the ring is reported and not read", "[attention]") {
  random_source random(seed_of(770));
  cache_fixture<64, 64> f(random, plan_format(), {100}, 1, 100);
  tensor<3> q(pk::dtype::float16, {1, 1, 64}), out(pk::dtype::float32, {1, 1, 64}),
      coded_only(pk::dtype::float32, {1, 1, 64});
  q.fill([&] { return random.normal(); });
  // The ring view shows one row of a larger allocation; the row behind it holds NaN.
  tensor<4> rk(pk::dtype::float16, {2, 1, 8, 64}), rv(pk::dtype::float16, {2, 1, 8, 64});
  rk.fill([] { return NAN; });
  rv.fill([] { return NAN; });
  pk::attention_options o;
  o.softmax_scale = 0.125f;
  const std::int32_t starts[] = {0, 1}, row = 1;
  pk::device_report report;
  REQUIRE(ref::decode_attention(q.in(), starts, f.cache, f.params, coded_only.out(), {}, o, report));
  f.cache.ring = {rk.in(), rv.in(), &row, 8};
  f.cache.ring.keys.extent[0] = f.cache.ring.values.extent[0] = 1;
  REQUIRE(ref::decode_attention(q.in(), starts, f.cache, f.params, out.out(), {}, o, report));
  CHECK(report.flags != 0);
  CHECK((out.bytes() == coded_only.bytes()));
}

namespace {

template <int Dk, int Dv>
void check_gemvs(random_source& random) {
  pk::runtime_format<Dk, Dv> format;
  format.key_spec = random_codec(random, pk::side::key, Dk);
  format.value_spec = random_codec(random, pk::side::value, Dv);
  const int batch = random.between(1, 3), heads = random.between(1, 2), group = random.between(1, 8),
            max_len = random.between(1, 150);
  std::vector<std::int32_t> lengths;
  for (int b = 0; b < batch; ++b) lengths.push_back(random.below(max_len + 1));
  cache_fixture<Dk, Dv> f(random, format, lengths, heads, max_len);
  tensor<3> q(pk::dtype::bfloat16, {batch, heads * group, Dk}, walk::scrambled, &random);
  tensor<3> scores(pk::dtype::float32, {batch, heads * group, max_len}, walk::scrambled, &random);
  tensor<3> weights(pk::dtype::float32, {batch, heads * group, max_len}, walk::scrambled, &random);
  tensor<3> out(pk::dtype::float32, {batch, heads * group, Dv}, walk::scrambled, &random);
  q.fill([&] { return random.normal(); });
  weights.fill([&] { return random.normal(); });
  pk::device_report report;
  REQUIRE(ref::key_gemv(q.in(), f.cache, f.params, 0.25f, scores.out(), report));
  REQUIRE(ref::value_gemv(weights.in(), f.cache, f.params, out.out(), report));
  CHECK(report.flags == 0);
  CHECK(scores.canaries_intact());
  CHECK(out.canaries_intact());
  int wrong = 0;
  for (int b = 0; b < batch; ++b)
    for (int h = 0; h < heads * group; ++h) {
      std::vector<double> sum(Dv, 0.0);
      double bound = 1e-6;
      for (int t = 0; t < max_len; ++t) {
        if (t >= lengths[static_cast<std::size_t>(b)]) {
          wrong += scores.raw(b, h, t) != 0xcdcd;
          continue;
        }
        const std::vector<double> k = f.token(pk::side::key, b, h / group, t),
                                  v = f.token(pk::side::value, b, h / group, t);
        double s = 0.0, size = 0.0;
        for (int c = 0; c < Dk; ++c) {
          const double term = static_cast<double>(q.get(b, h, c)) * k[static_cast<std::size_t>(c)];
          s += term, size += std::fabs(term);
        }
        wrong += !(std::fabs(static_cast<double>(scores.get(b, h, t)) - 0.25 * s) <= 1e-7 * size + 1e-9);
        for (int c = 0; c < Dv; ++c) {
          sum[static_cast<std::size_t>(c)] +=
              static_cast<double>(weights.get(b, h, t)) * v[static_cast<std::size_t>(c)];
          bound += 1e-8 * std::fabs(v[static_cast<std::size_t>(c)]);
        }
      }
      for (int c = 0; c < Dv; ++c)
        wrong += !(std::fabs(static_cast<double>(out.get(b, h, c)) - sum[static_cast<std::size_t>(c)]) <= bound);
    }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("key_gemv and value_gemv are sums over the decoded tokens for random shapes", "[attention]") {
  for (int i = 0; i < 20; ++i) {
    const std::uint64_t seed = seed_of(static_cast<std::uint64_t>(800 + i));
    INFO("seed " << seed);
    random_source random(seed);
    check_gemvs<64, 64>(random);
    if (i % 2 == 0) check_gemvs<128, 128>(random);
    if (i % 4 == 0) check_gemvs<192, 128>(random);
  }
}

TEST_CASE("a missing page gives scores of -inf and adds nothing to a weighted sum", "[attention]") {
  random_source random(seed_of(830));
  cache_fixture<64, 64> f(random, plan_format(), {130}, 1, 130);
  const std::int32_t none[] = {-1, 999, -1};
  f.cache.table = {none, nullptr, 3};
  tensor<3> q(pk::dtype::float16, {1, 1, 64}), s(pk::dtype::float32, {1, 1, 130}), out(pk::dtype::float32, {1, 1, 64});
  q.fill([&] { return random.normal(); });
  pk::device_report report;
  REQUIRE(ref::key_gemv(q.in(), f.cache, f.params, 1.0f, s.out(), report));
  CHECK(s.get(0, 0, 0) == -INFINITY);
  CHECK(s.get(0, 0, 129) == -INFINITY);
  s.fill([] { return 1.0f; });
  REQUIRE(ref::value_gemv(s.in(), f.cache, f.params, out.out(), report));
  CHECK(out.get(0, 0, 63) == 0.0f);
  CHECK(report.flags == (f.tiles == 1 ? pk::report_page_missing | pk::report_page_out_of_range
                                      : pk::report_page_missing | pk::report_page_out_of_range));
}

TEST_CASE("merging states in any grouping gives the same state, and -inf states vanish", "[attention]") {
  for (const pk::lse_base base : {pk::lse_base::e, pk::lse_base::two}) {
    const std::uint64_t seed = seed_of(850);
    INFO("seed " << seed);
    random_source random(seed);
    constexpr int n = 7, tokens = 3, heads = 2, dim = 40;
    tensor<4> outs(pk::dtype::float32, {n, tokens, heads, dim}, walk::scrambled, &random);
    tensor<3> lses(pk::dtype::float32, {n, tokens, heads}, walk::scrambled, &random);
    outs.fill([&] { return random.normal(); });
    lses.fill([&] { return 3.0f * random.normal(); });
    for (int i = 0; i < n; ++i) {
      const bool empty = i == 2 || i == 5;
      for (int h = 0; h < heads; ++h) {
        if (!empty) continue;
        lses.set(-INFINITY, i, 0, h);
        for (int c = 0; c < dim; ++c) outs.set(i == 2 ? NAN : 0.0f, i, 0, h, c);  // of no weight, even NaN
      }
      for (int h = 0; h < heads; ++h) lses.set(-INFINITY, i, 2, h);  // token 2 saw nothing anywhere
    }
    const auto part = [](auto view, std::int64_t first, std::int64_t count) {
      view.data = static_cast<const char*>(view.data) + first * view.stride[0];
      view.extent[0] = count;
      return view;
    };
    struct state {
      tensor<3> out{pk::dtype::float32, {tokens, heads, dim}};
      tensor<2> lse{pk::dtype::float32, {tokens, heads}};
    };
    state all;
    REQUIRE(ref::merge_states(outs.in(), lses.in(), all.out.out(), all.lse.out(), base));
    // The definition.
    const double unit = base == pk::lse_base::two ? std::log(2.0) : 1.0;
    double worst = 0.0;
    for (int t = 0; t < 2; ++t)
      for (int h = 0; h < heads; ++h) {
        double total = 0.0, sum = 0.0;
        for (int i = 0; i < n; ++i) {
          const double w = std::exp(unit * static_cast<double>(lses.get(i, t, h)));
          total += w;
          if (w > 0.0) sum += w * static_cast<double>(outs.get(i, t, h, 11));
        }
        worst = std::fmax(worst, std::fabs(sum / total - static_cast<double>(all.out.get(t, h, 11))));
        worst = std::fmax(worst, std::fabs(std::log(total) / unit - static_cast<double>(all.lse.get(t, h))));
      }
    CHECK(worst < 1e-6);
    CHECK(all.lse.get(2, 0) == -INFINITY);
    CHECK(all.out.get(2, 1, 7) == 0.0f);
    // Groups first, then the groups.
    for (int cut = 1; cut < n; ++cut) {
      tensor<4> two(pk::dtype::float32, {2, tokens, heads, dim});
      tensor<3> two_lse(pk::dtype::float32, {2, tokens, heads});
      for (const int half : {0, 1}) {
        state s;
        const int first = half == 0 ? 0 : cut, count = half == 0 ? cut : n - cut;
        REQUIRE(ref::merge_states(part(outs.in(), first, count), part(lses.in(), first, count), s.out.out(),
                                  s.lse.out(), base));
        for (int t = 0; t < tokens; ++t)
          for (int h = 0; h < heads; ++h) {
            two_lse.set(s.lse.get(t, h), half, t, h);
            for (int c = 0; c < dim; ++c) two.set(s.out.get(t, h, c), half, t, h, c);
          }
      }
      state merged;
      REQUIRE(ref::merge_states(two.in(), two_lse.in(), merged.out.out(), merged.lse.out(), base));
      double difference = 0.0;
      for (int t = 0; t < 2; ++t)
        for (int h = 0; h < heads; ++h) {
          difference = std::fmax(difference, std::fabs(all.lse.get(t, h) - merged.lse.get(t, h)));
          for (int c = 0; c < dim; ++c)
            difference = std::fmax(difference, std::fabs(all.out.get(t, h, c) - merged.out.get(t, h, c)));
        }
      CHECK(difference < 3e-6);
      CHECK(merged.lse.get(2, 0) == -INFINITY);
      CHECK(merged.out.get(2, 0, 0) == 0.0f);
    }
  }
}

TEST_CASE("merging states with far apart log-sum-exps neither overflows nor loses the larger", "[attention]") {
  const float outs[] = {1.0f, 2.0f}, lses[] = {3000.0f, -3000.0f};
  float out = 0.0f, lse = 0.0f;
  REQUIRE(ref::merge_states(pk::make_input<4>(outs, pk::dtype::float32, {2, 1, 1, 1}),
                            pk::make_input<3>(lses, pk::dtype::float32, {2, 1, 1}),
                            pk::make_output<3>(&out, pk::dtype::float32, {1, 1, 1}),
                            pk::make_output<2>(&lse, pk::dtype::float32, {1, 1}), pk::lse_base::two));
  CHECK((out == 1.0f));
  CHECK(lse == 3000.0f);
}
