// SPDX-License-Identifier: Apache-2.0
// key_gemv and value_gemv of formats whose plans are known at compile time.
#include "../support/catch.hpp"
#include "test_cache.hpp"

using namespace packkv_test;

namespace {

template <int KeyDim, int ValueDim, class KeyPlan, class ValuePlan, class KeyTransform = pk::hadamard,
          class ValueTransform = pk::hadamard, int Leading = 0>
using static_format =
    pk::cache_format<pk::key_codec<KeyDim, KeyTransform, pk::rms_scale, KeyPlan, pk::leading<Leading>>,
                     pk::value_codec<ValueDim, ValueTransform, pk::rms_scale, ValuePlan>>;

using two_bit = static_format<128, 128, pk::plan<2, 2, 2, 2>, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>;
using mixed =
    static_format<128, 128, pk::plan<4, 3, 1, 0>, pk::plan<8, 4, 3, 2, 2, 1, 1, 0>, pk::permutation, pk::identity, 2>;
using dim_64 = static_format<64, 64, pk::plan<8, 4, 3, 1>, pk::plan<3, 2, 1, 1>, pk::hadamard, pk::permutation, 4>;
using dim_192 =
    static_format<192, 128, pk::plan<4, 2, 2, 1, 1, 0>, pk::plan<1, 1, 1, 1, 1, 1, 1, 1>, pk::basis, pk::basis>;
using dim_256 = static_format<256, 256, pk::plan<4, 2, 2, 2, 0, 0, 0, 0>,
                              pk::plan<4, 4, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0>, pk::identity, pk::identity>;
using no_bits = static_format<64, 64, pk::plan<0, 0, 0, 0>, pk::plan<0, 0, 0, 0>, pk::identity, pk::identity, 1>;
using kivi = pk::cache_format<pk::grouped_key_codec<128, 2>, pk::grouped_value_codec<128, 2>>;
using kivi_64 =
    pk::cache_format<pk::grouped_key_codec<64, 1, 64, pk::hadamard>, pk::grouped_value_codec<64, 3, 16, pk::hadamard>>;

// Weights times row scales in halves; queries times column scales in 16 bits, the largest of which sets the unit.
constexpr double tolerance = 1e-3, key_tolerance = 4e-3;

pk::dtype random_type(random_source& random) {
  constexpr pk::dtype types[] = {pk::dtype::float16, pk::dtype::bfloat16, pk::dtype::float32};
  return types[random.between(0, 2)];
}
/// Rounding of a stored element, relative.
double unit_of(pk::dtype type) {
  return type == pk::dtype::float32 ? 0.0 : type == pk::dtype::float16 ? 0x1p-11 : 0x1p-8;
}

/// [batch, heads, n] of any type, on host and device; rows may be padded and elements apart.
struct operand {
  pk::dtype type;
  std::int64_t batch, heads, n, step, row;  ///< in elements
  std::vector<std::uint8_t> bytes;
  device_array<std::uint8_t> device_bytes;

  operand(random_source& random, pk::dtype t, std::int64_t b, std::int64_t h, std::int64_t count)
      : type(t), batch(b), heads(h), n(count), step(random.one_in(4) ? random.between(2, 3) : 1) {
    row = (n - 1) * step + 1 + (random.one_in(2) ? random.between(0, 3) : 0);
    if (random.one_in(2)) row += row % 2;
    bytes.assign(static_cast<std::size_t>(batch * heads * row * pk::bytes_of(type)), 0xff);
  }
  template <class View, class Pointer>
  View view(Pointer p) const {
    View v;
    v.data = p;
    v.type = type;
    const std::int64_t extent[] = {batch, heads, n}, stride[] = {heads * row, row, step};
    for (int i = 0; i < 3; ++i) {
      v.extent[i] = extent[i];
      v.stride[i] = stride[i] * pk::bytes_of(type);
    }
    return v;
  }
  pk::input_view<3> in() const { return view<pk::input_view<3>>(static_cast<const void*>(bytes.data())); }
  pk::output_view<3> out() { return view<pk::output_view<3>>(static_cast<void*>(bytes.data())); }
  pk::input_view<3> device_in() {
    device_bytes = device_array<std::uint8_t>(bytes);
    return view<pk::input_view<3>>(static_cast<const void*>(device_bytes.data()));
  }
  pk::output_view<3> device_out() {
    device_bytes = device_array<std::uint8_t>(bytes);
    return view<pk::output_view<3>>(static_cast<void*>(device_bytes.data()));
  }
  template <class F>
  void fill(F&& value) {
    for (std::int64_t b = 0; b < batch; ++b)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t i = 0; i < n; ++i)
          pk::detail::store_element(pk::detail::address(out(), b, h, i), type, value(b, h, i));
  }
  /// The elements of a copy of the bytes; `between` gets all that belongs to no element.
  std::vector<float> floats(const std::vector<std::uint8_t>& of, std::vector<std::uint8_t>& between) const {
    std::vector<float> x;
    between = of;
    auto v = view<pk::input_view<3>>(static_cast<const void*>(of.data()));
    for (std::int64_t b = 0; b < batch; ++b)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t i = 0; i < n; ++i) {
          const auto* const at = static_cast<const std::uint8_t*>(pk::detail::address(v, b, h, i));
          x.push_back(pk::detail::load_element(at, type));
          std::fill_n(between.begin() + (at - of.data()), pk::bytes_of(type), std::uint8_t{0});
        }
    return x;
  }
};

/// max over rows of |a - b| / |b|, or of |a - b| / (share * typical |b|) where that is less; rows of 0 and elements
/// that are not finite must be the same.
double worst_relative(const std::vector<float>& a, const std::vector<float>& b, std::int64_t n, double share) {
  std::vector<double> difference, norm;
  double all = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (i % static_cast<std::size_t>(n) == 0) difference.push_back(0.0), norm.push_back(0.0);
    if (std::isinf(b[i]) && a[i] == b[i]) continue;
    difference.back() += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    norm.back() += std::pow(static_cast<double>(b[i]), 2);
    all += std::pow(static_cast<double>(b[i]), 2);
  }
  double worst = 0.0;
  for (std::size_t row = 0; row < norm.size(); ++row) {
    const double floor = share > 0.0 ? share * std::sqrt(all / static_cast<double>(norm.size())) : 0.0;
    const double error =
        difference[row] == 0.0 ? 0.0 : std::sqrt(difference[row]) / std::max(std::sqrt(norm[row]), floor);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  return worst;
}

/// SharedKib 0: the library's own calls. Else its kernels as they are compiled for SMs with so much shared memory.
template <class Format, pk::warp::copy_engine Engine = pk::warp::copy_engine::best, int SharedKib = 0>
struct gemvs {
  test_cache<Format>& cache;
  std::int64_t batch, heads;
  device_array<std::uint8_t> workspace;
  int calls = 0;

  gemvs(test_cache<Format>& c, int group)
      : cache(c), batch(c.shape.batch), heads(std::int64_t{group} * c.shape.kv_heads) {}

  /// Without a workspace. Two of four calls have a settled cache: all has been made before.
  pk::exec exec() {
    pk::exec e = cache.exec();
    e.settled_cache = calls++ / 2 % 2 == 0;
    return e;
  }
  /// With memory of just the size that the library asks for, poisoned.
  pk::exec exec(int splits) {
    const std::int64_t bytes =
        pk::value_gemv_workspace_bytes<Format>({batch, cache.shape.kv_heads, heads, 1, cache.shape.max_tokens, splits});
    workspace = device_array<std::uint8_t>(static_cast<std::size_t>(bytes));
    workspace.poison();
    pk::exec e = exec();
    e.workspace = workspace.data();
    e.workspace_bytes = workspace.size();
    REQUIRE(after_failures([&] { return pk::initialize_workspace(e); }));
    return e;
  }
  /// `got` on the device against `expected` on the host, and nothing between their elements.
  double compare(operand& got, operand& expected, double share) {
    std::vector<std::uint8_t> between, untouched;
    const auto a = got.floats(got.device_bytes.host(), between), b = expected.floats(expected.bytes, untouched);
    CHECK(between == untouched);
    return worst_relative(a, b, got.n, share);
  }

  void keys(operand& queries, operand& scores, float scale) {
    scores.fill([](auto...) { return 7.0f; });
    const pk::output_view<3> to = scores.device_out();
    const pk::input_view<3> in = queries.device_in();
    const pk::exec e = exec();
    if constexpr (SharedKib == 0) {
      REQUIRE(cache.after_failures(
          [&] { return pk::key_gemv(in, cache.gpu_cache(), cache.gpu_parameters(), scale, to, e); }));
    } else {
      pk::kernel::fused_gemv_args args{};
      REQUIRE(pk::detail::make_fused_gemv_args(cache.gpu_cache(), in, to, cache.gpu_parameters().key, scale, e, args));
      REQUIRE(pk::detail::launch_key_gemv<Format, Engine, SharedKib>(args, e));
    }
    REQUIRE(pk::reference::key_gemv(queries.in(), cache.host_cache(), cache.host_parameters(), scale, scores.out(),
                                    cache.report));
    // Scores of one query and few keys may be next to nothing.
    CHECK(compare(scores, scores, 0.5) < key_tolerance + unit_of(scores.type));
  }
  void values(operand& weights, operand& out, int splits) {
    const pk::output_view<3> to = out.device_out();
    const pk::input_view<3> in = weights.device_in();
    const pk::exec e = exec(splits);
    if constexpr (SharedKib == 0) {
      REQUIRE(cache.after_failures(
          [&] { return pk::value_gemv(in, cache.gpu_cache(), cache.gpu_parameters(), to, e, splits); }));
    } else {
      pk::kernel::fused_gemv_args args{};
      REQUIRE(pk::detail::make_fused_gemv_args(cache.gpu_cache(), in, to, cache.gpu_parameters().value, 1.0f, e, args));
      REQUIRE(pk::detail::launch_value_gemv<Format, Engine, SharedKib>(args, e, splits));
    }
    REQUIRE(
        pk::reference::value_gemv(weights.in(), cache.host_cache(), cache.host_parameters(), out.out(), cache.report));
    CHECK(compare(out, out, 0.0) < tolerance + unit_of(out.type));
  }
};

template <class Format, pk::warp::copy_engine Engine = pk::warp::copy_engine::best, int SharedKib = 0>
void agrees(random_source& random, const cache_shape& shape, int group) {
  test_cache<Format> cache(random, shape, Format{});
  cache.fill();
  if (cache.lengths[0] == shape.max_tokens && random.one_in(4)) cache.lengths[0] += 9;  // is clamped, and reported
  cache.device_lengths.assign(cache.lengths);
  if (random.one_in(3)) cache.table[0] = random.one_in(2) ? -1 : 1 << 20;
  cache.device_table.assign(cache.table);
  INFO("head dims " << Format::key_head_dim << " " << Format::value_head_dim << ", group " << group);
  gemvs<Format, Engine, SharedKib> g(cache, group);
  const std::int64_t tokens = cache.shape.max_tokens;
  operand q(random, random_type(random), g.batch, g.heads, Format::key_head_dim);
  q.fill([&](auto...) { return random.normal(); });
  operand scores(random, random_type(random), g.batch, g.heads, tokens);
  g.keys(q, scores, random.one_in(2) ? 0.25f : -1.5f);
  operand weights(random, random_type(random), g.batch, g.heads, tokens);
  weights.fill([&](auto...) { return random.one_in(5) ? 0.0f : random.normal(); });
  operand out(random, random_type(random), g.batch, g.heads, Format::value_head_dim);
  g.values(weights, out, random.between(0, 4));
  CHECK(cache.gpu_report().flags == cache.report.flags);
}

template <class Format, pk::warp::copy_engine Engine = pk::warp::copy_engine::best, int SharedKib = 0>
void agrees(random_source& random, int group, int max_tokens = most_tokens) {
  agrees<Format, Engine, SharedKib>(random, random_shape(random, max_tokens), group);
}

template <class Format>
void check_weights_of_any_size() {
  random_source random(8301);
  cache_shape shape;
  shape.kv_heads = 2;
  shape.max_tokens = 27 * 64 - 5;  // several tiles of a warp
  test_cache<Format> cache(random, shape, Format{});
  cache.lengths[0] = shape.max_tokens;
  cache.device_lengths.assign(cache.lengths);
  cache.fill();
  // Tokens that are not finite, on the device alone: their row scales are NaN, or their first groups. To the reference
  // NaN times 0 is NaN.
  constexpr int hidden[] = {3, 64, 200, 201, 640};
  const tensor_data& v = cache.values;
  for (const int t : hidden)
    for (int h = 0; h < shape.kv_heads; ++h)
      cache.values.host_bits[static_cast<std::size_t>((h * v.tokens + t) * (v.dim + v.pad))] = 0x7fff;
  const std::vector<std::uint8_t> pages = cache.pages;
  cache.fill();
  cache.pages = pages;
  int shift = 0;
  for (const int group : {1, 1, 1, 1, 3, 6, 12}) {
    shift += 2;  // one row a head: other weights every time
    gemvs<Format> g(cache, group);
    operand weights(random, pk::dtype::float32, 1, g.heads, shape.max_tokens);
    weights.fill([&](std::int64_t, std::int64_t h, std::int64_t t) {
      if (std::count(std::begin(hidden), std::end(hidden), t) > 0) return 0.0f;
      const auto tokens = static_cast<double>(shape.max_tokens), x = static_cast<double>(t);
      const auto power = [&](double e) { return static_cast<float>(std::exp2(e)) * random.normal(); };
      switch ((h + group + shift) % 8) {
        case 0:
          return power(-110.0);
        case 1:
          return power(110.0);
        case 2:
          return power(-100.0 + 200.0 * x / tokens);  // the sums are rescaled again and again
        case 3:
          return power(100.0 - 200.0 * x / tokens);
        case 4:
          return t == 333 ? -1e36f : power(0.0);
        case 5:
          return random.one_in(40) ? power(random.between(-60, 60)) : 0.0f;
        case 6:
          return t == 7 ? 1e-30f : 0.0f;
        default:
          return 0.0f;
      }
    });
    operand out(random, pk::dtype::float32, 1, g.heads, Format::value_head_dim);
    g.values(weights, out, random.between(0, 5));
    CHECK(cache.report.flags == 0);
  }

  // What is not finite stays in its row, and a token in its group of channels.
  constexpr pk::codec_spec spec = Format::value();
  constexpr int reach = spec.kind == pk::codec_kind::grouped ? spec.group : spec.head_dim;
  for (const int group : {1, 2}) {
    gemvs<Format> g(cache, group);
    const std::int64_t last = g.heads - 1;
    operand weights(random, pk::dtype::float32, 1, g.heads, shape.max_tokens);
    weights.fill([&](std::int64_t, std::int64_t h, std::int64_t t) {
      if (h == 0 && t == 100) return INFINITY;
      if (h == last && t == 64) return 1.0f;  // a hidden token
      return std::count(std::begin(hidden), std::end(hidden), t) > 0 ? 0.0f : random.normal();
    });
    operand out(random, pk::dtype::float32, 1, g.heads, Format::value_head_dim);
    const pk::output_view<3> to = out.device_out();
    REQUIRE(pk::value_gemv(weights.device_in(), cache.gpu_cache(), cache.gpu_parameters(), to, g.exec(0)));
    std::vector<std::uint8_t> between;
    const auto x = out.floats(out.device_bytes.host(), between);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const auto h = static_cast<std::int64_t>(i) / out.n;
      const bool spoilt = static_cast<std::int64_t>(i) % out.n < reach;
      CHECK(std::isfinite(x[i]) == (h != 0 && (h != last || !spoilt)));
    }
  }
}

template <class Format>
void check_query_that_is_not_finite() {
  constexpr int dim = Format::key_head_dim, tokens = 70;
  random_source random(8302);
  test_cache<Format> cache(random, cache_shape{1, 1, tokens, 1, pk::dtype::float16}, Format{});
  // With such offsets a score of an infinite query is -inf, but for the rule that it is NaN.
  cache.key_data.offset.assign(dim, -0.5f);
  cache.key_data.device_offset = device_array<float>(cache.key_data.offset);
  cache.fill();
  for (const int channel : {9, 31, dim - 1}) {
    operand q(random, pk::dtype::float32, 1, 5, dim);
    q.fill([&](std::int64_t, std::int64_t h, std::int64_t c) {
      return h == 2 && c == channel ? INFINITY : random.normal();
    });
    operand scores(random, pk::dtype::float16, 1, 5, tokens);
    const pk::output_view<3> to = scores.device_out();
    REQUIRE(pk::key_gemv(q.device_in(), cache.gpu_cache(), cache.gpu_parameters(), 1.0f, to, cache.exec()));
    std::vector<std::uint8_t> between;
    const auto x = scores.floats(scores.device_bytes.host(), between);
    INFO("channel " << channel);
    for (std::size_t i = 0; i < x.size(); ++i)
      if (static_cast<int>(i % tokens) < cache.lengths[0]) CHECK(std::isnan(x[i]) == (i / tokens == 2));
  }
}

/// Lane 31 has token 47 of a tile, its sixth, for row 3 of four.
template <class Format>
void check_weights_of_one_lane() {
  random_source random(8304);
  constexpr int tokens = 64 * 40;
  test_cache<Format> cache(random, cache_shape{1, 1, tokens, 2, pk::dtype::float16}, Format{});
  cache.lengths[0] = tokens;
  cache.device_lengths.assign(cache.lengths);
  cache.fill();
  gemvs<Format> g(cache, 4);
  operand weights(random, pk::dtype::float32, 1, g.heads, tokens);
  weights.fill([&](std::int64_t, std::int64_t h, std::int64_t t) {
    return random.normal() * (h == 3 && t >= tokens / 2 && t % 64 == 47 ? 1e6f : 1.0f);
  });
  operand out(random, pk::dtype::float32, 1, g.heads, Format::value_head_dim);
  g.values(weights, out, 1);
}

}  // namespace

TEST_CASE("static key_gemv and value_gemv agree with the reference for random shapes") {
  for (int round = 0; round < repeats; ++round) {
    const std::uint64_t seed = 8200 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    const auto group = [&] { return random.one_in(3) ? 1 : random.between(2, 16); };
    agrees<two_bit>(random, 1, 3 * most_tokens);
    agrees<mixed>(random, 1);
    agrees<two_bit>(random, group());
    agrees<mixed>(random, random.between(1, 4));
    agrees<mixed>(random, random.between(5, 16));
    agrees<dim_64>(random, group());
    agrees<dim_192>(random, group());
    agrees<dim_256>(random, group());
    agrees<no_bits>(random, group());
    agrees<dim_64>(random, random.between(17, 40));
  }
}

TEST_CASE("static GEMVs of one sequence agree with the reference where the launch has blocks to spare") {
  random_source random(8260);
  for (int round = 0; round < 4; ++round)
    for (const int kv_heads : {5, 7}) {
      agrees<two_bit>(random, cache_shape{1, kv_heads, 300, 1, pk::dtype::float16}, 1);
      agrees<dim_64>(random, cache_shape{1, kv_heads, 100, 2, pk::dtype::bfloat16}, 3);
    }
}

TEST_CASE("GEMVs of grouped keys and values agree with the reference for random shapes") {
  random_source random(8270);
  for (int round = 0; round < repeats; ++round) {
    agrees<kivi>(random, 1, 3 * most_tokens);
    agrees<kivi>(random, random.between(2, 16));
    agrees<kivi_64>(random, random.between(1, 16));
  }
}

TEST_CASE("static GEMVs with cp.async and the shared memory of other architectures agree with the reference") {
  random_source random(8290);
  for (int round = 0; round < repeats; ++round) {
    agrees<dim_64, pk::warp::copy_engine::per_thread, 164>(random, random.one_in(2) ? 1 : random.between(2, 16));
    agrees<dim_256, pk::warp::copy_engine::per_thread, 100>(random, random.one_in(2) ? 1 : random.between(2, 16));
  }
}

TEST_CASE("value_gemv takes weights of any size, and a weight of 0 hides its token") {
  check_weights_of_any_size<two_bit>();
  check_weights_of_any_size<kivi>();
}

TEST_CASE("value_gemv of groups of channels whose ranges lie far apart, the last beyond the others") {
  random_source random(8303);
  test_cache<kivi> cache(random, cache_shape{1, 1, 300, 1, pk::dtype::float16}, kivi{});
  change(cache.values, [](auto, auto, auto, auto c, float x) { return c >= 96 ? std::ldexp(x, 12) : x; });
  cache.lengths[0] = 300;
  cache.device_lengths.assign(cache.lengths);
  cache.fill();
  for (const int group : {1, 4, 8}) {
    gemvs<kivi> g(cache, group);
    operand weights(random, pk::dtype::float32, 1, g.heads, 300);
    weights.fill([&](auto...) { return random.normal(); });
    operand out(random, pk::dtype::float32, 1, g.heads, 128);
    g.values(weights, out, 1);
  }
}

TEST_CASE("static key_gemv of a query that is not finite gives NaN in its row alone") {
  check_query_that_is_not_finite<two_bit>();
  check_query_that_is_not_finite<mixed>();
  check_query_that_is_not_finite<kivi>();
}

TEST_CASE("value_gemv: weights that one lane alone has stand out, behind tiles that have set the unit") {
  check_weights_of_one_lane<two_bit>();
  check_weights_of_one_lane<kivi>();
}

TEST_CASE("static value_gemv repeats bit for bit, whatever the splits") {
  random_source random(8303);
  test_cache<mixed> cache(random, cache_shape{3, 2, 330, 2, pk::dtype::bfloat16}, mixed{});
  cache.fill();
  gemvs<mixed> g(cache, 3);
  operand weights(random, pk::dtype::bfloat16, g.batch, g.heads, 330);
  weights.fill([&](auto...) { return random.normal() * 100.0f; });
  operand out(random, pk::dtype::float32, g.batch, g.heads, mixed::value_head_dim);
  for (const int splits : {0, 1, 3}) {
    g.values(weights, out, splits);
    const auto once = out.device_bytes.host();
    const pk::exec e = g.exec(splits);
    for (int i = 0; i < 2; ++i) {  // the second call finds the workspace as the first one left it
      const pk::output_view<3> to = out.device_out();
      REQUIRE(pk::value_gemv(weights.device_in(), cache.gpu_cache(), cache.gpu_parameters(), to, e, splits));
      CHECK(out.device_bytes.host() == once);
    }
  }
}

TEST_CASE("static GEMVs of more sequences than one launch takes, most of them empty") {
  random_source random(8304);
  cache_shape shape;
  shape.batch = 259;
  shape.max_tokens = 67;
  test_cache<dim_64> cache(random, shape, dim_64{});
  for (int b = 0; b < shape.batch; ++b)
    cache.lengths[static_cast<std::size_t>(b)] = b % 37 == 5 || b == 258 ? 67 - b % 3 : 0;
  cache.lengths[1] = 68;  // too long
  cache.lengths[2] = -1;
  cache.device_lengths.assign(cache.lengths);
  cache.fill();
  gemvs<dim_64> g(cache, 1);
  operand q(random, pk::dtype::float16, g.batch, g.heads, dim_64::key_head_dim);
  q.fill([&](auto...) { return random.normal(); });
  operand scores(random, pk::dtype::float32, g.batch, g.heads, shape.max_tokens);
  g.keys(q, scores, 1.0f);
  CHECK(cache.gpu_report().flags == cache.report.flags);
  operand weights(random, pk::dtype::float16, g.batch, g.heads, shape.max_tokens);
  weights.fill([&](auto...) { return random.normal(); });
  operand out(random, pk::dtype::float32, g.batch, g.heads, dim_64::value_head_dim);
  g.values(weights, out, 2);
}

TEST_CASE("static GEMVs that are refused write nothing") {
  random_source random(8305);
  test_cache<two_bit> cache(random, cache_shape{2, 2, 130, 1, pk::dtype::float16}, two_bit{});
  cache.fill();
  gemvs<two_bit> g(cache, 2);
  operand q(random, pk::dtype::float16, 2, 4, 128), scores(random, pk::dtype::float16, 2, 4, 130);
  operand weights(random, pk::dtype::float16, 2, 4, 130), out(random, pk::dtype::float16, 2, 4, 128);
  const auto to_scores = scores.device_out(), to = out.device_out();
  const auto params = cache.gpu_parameters();
  const auto refused = [&](pk::status_code code, pk::exec e, pk::input_view<3> w, int splits = 0) {
    CHECK(pk::value_gemv(w, cache.gpu_cache(), params, to, e, splits).code == code);
  };
  const pk::exec good = g.exec(0);
  const pk::input_view<3> w = weights.device_in();
  pk::exec e = good;
  e.workspace_bytes -= 1;
  refused(pk::status_code::workspace_too_small, e, w);
  e = good;
  e.workspace = nullptr;
  refused(pk::status_code::invalid_argument, e, w);
  e = good;
  e.workspace = static_cast<std::uint8_t*>(e.workspace) + 128;
  refused(pk::status_code::misaligned, e, w);
  refused(pk::status_code::invalid_argument, good, w, -1);
  refused(pk::status_code::invalid_argument, good, w, 4097);
  auto narrow = w;
  narrow.extent[2] = 129;
  refused(pk::status_code::shape_mismatch, good, narrow);
  auto few = q.device_in();
  few.extent[1] = 3;
  CHECK(pk::key_gemv(few, cache.gpu_cache(), params, 1.0f, to_scores, good).code == pk::status_code::shape_mismatch);
  CHECK(scores.device_bytes.host() == scores.bytes);
  CHECK(out.device_bytes.host() == out.bytes);
  CHECK(pk::value_gemv_workspace_bytes<two_bit>({-1, 2, 4, 1, 130, 0}) == -1);
  CHECK(pk::value_gemv_workspace_bytes<two_bit>({1, 2, 3, 1, 130, 0}) == -1);
  // What serves many sequences serves few, whose blocks are shaped otherwise.
  for (const int splits : {0, 1, 50, 4096})
    for (const int batch : {1, 16, 17, 64})
      CHECK(pk::value_gemv_workspace_bytes<two_bit>({64, 8, 32, 1, 130, splits}) >=
            pk::value_gemv_workspace_bytes<two_bit>({batch, 8, 32, 1, 130, splits}));
}
