// SPDX-License-Identifier: Apache-2.0
// The strip-adaptive format against a naive quantiser and against PackKV's: values, widths, sizes, damaged bytes.
#include <packkv/reference/strip_adaptive.hpp>

#include "../format/adaptive_decoder.hpp"
#include "grouped_fixture.hpp"
#include "pack_fixture.hpp"

namespace pk = packkv;
namespace ref = packkv::reference;
using namespace grouped_test;
using host_test::random_source;
using host_test::seed_of;

namespace {

/// Equal bits, or NaN both: what a NaN carries is no part of the format.
int count_different(const std::vector<float>& a, const std::vector<float>& b) {
  int different = a.size() != b.size();
  for (std::size_t i = 0; i < a.size() && i < b.size(); ++i)
    different += std::isnan(a[i]) || std::isnan(b[i]) ? std::isnan(a[i]) != std::isnan(b[i]) : a[i] != b[i];
  return different;
}

std::vector<float> documented(const adaptive_coded& e) {
  const pk::grouped_spec& g = e.spec.groups;
  clean::adaptive_format f;
  f.of = g.which == pk::side::key ? clean::side::key : clean::side::value;
  f.axis = g.axis == pk::group_axis::channel  ? clean::shares_step::tokens_of_channel
           : g.axis == pk::group_axis::vector ? clean::shares_step::channels_of_token
           : g.axis == pk::group_axis::token  ? clean::shares_step::heads_of_token
                                              : clean::shares_step::all_of_block;
  f.integer_zero = e.spec.zero == pk::pack_zero::integer;
  f.head_dim = g.head_dim;
  f.relative_step = e.spec.relative_step;
  f.hadamard = g.transform == pk::transform_kind::hadamard;
  f.centred = g.centred;
  f.heads = static_cast<int>(e.layout.heads);
  f.tokens = static_cast<int>(e.layout.tokens);
  f.recent = e.recent;
  return clean::decode_adaptive(f, e.bytes.data(), e.offsets.data());
}

}  // namespace

TEST_CASE("strip-adaptive values, widths and sizes equal a naive implementation", "[adaptive]") {
  const int dims[] = {64, 96, 128, 256};
  for (int round = 0; round < 80; ++round) {
    const std::uint64_t seed = seed_of(9000 + static_cast<std::uint64_t>(round));
    random_source random(seed);
    const int dim = random.pick(dims), heads = random.between(1, 3), tokens = random.between(1, 260);
    const int recent = random.chance(2) ? 0 : random.between(0, 130);
    const pk::adaptive_spec spec = random_adaptive(random, dim);
    const tensor16 x = random_tensor(random, heads, tokens, dim);
    INFO("seed " << seed << " " << describe(spec));
    const adaptive_coded e(spec, x, recent);
    const int coded_tokens = static_cast<int>(e.layout.coded_tokens);
    CHECK(coded_tokens == std::max(0, (tokens - recent) / 64 * 64));
    const naive_result naive = naive_adaptive(spec, x, coded_tokens);
    CHECK(e.report.flags == (naive.code_overflow ? pk::report_code_overflow : 0u));

    const int strip = spec.groups.which == pk::side::key && dim != 64 ? 32 : 16, strips = dim / strip;
    const std::int64_t scales = spec.groups.axis == pk::group_axis::channel  ? 4 * dim
                                : spec.groups.axis == pk::group_axis::vector ? 4 * 64
                                                                             : 0;
    int wrong_headers = 0, wrong_sizes = 0;
    for (int b = 0; b < coded_tokens / 64; ++b)
      for (int h = 0; h < heads; ++h) {
        const std::int64_t* at = e.offsets.data() + b * heads + h;
        std::int64_t expected = (2 * strips + 15) / 16 * 16 + scales;
        for (int s = 0; s < strips; ++s) {
          int low = 1000, high = -1;
          for (int t = 64 * b; t < 64 * b + 64; ++t)
            for (int c = s * strip; c < (s + 1) * strip; ++c) {
              low = std::min(low, naive.codes[x.at(h, t, c)]);
              high = std::max(high, naive.codes[x.at(h, t, c)]);
            }
          const int width = naive_width(high - low);
          wrong_headers += e.bytes.data()[at[0] + s] != width || e.bytes.data()[at[0] + strips + s] != low;
          expected += 64 * strip * width / 8;
        }
        wrong_sizes += at[1] - at[0] != expected;
      }
    CHECK(wrong_headers == 0);
    CHECK(wrong_sizes == 0);
    CHECK(e.offsets.back() <= e.layout.max_bytes);

    const std::vector<float> back = e.decode();
    int wrong = 0;
    for (int h = 0; h < heads; ++h)
      for (int t = 0; t < tokens; ++t) {
        std::vector<float> token(naive.y.begin() + static_cast<std::ptrdiff_t>(x.at(h, t, 0)),
                                 naive.y.begin() + static_cast<std::ptrdiff_t>(x.at(h, t, 0)) + dim);
        if (spec.groups.transform == pk::transform_kind::hadamard) clean::hadamard(token);
        for (int c = 0; c < dim; ++c) {
          float expected = token[static_cast<std::size_t>(c)];
          if (spec.groups.centred) expected += fp16_at(e.bytes.data(), 2 * (h * dim + c));
          if (t >= coded_tokens) expected = x.value(h, t, c);
          wrong += back[x.at(h, t, c)] != expected;
        }
      }
    CHECK(wrong == 0);
  }
}

TEST_CASE("a decoder written from the document reads strip-adaptive bytes as the reference does", "[adaptive]") {
  const int dims[] = {64, 96, 128, 192, 256, 512};
  for (int round = 0; round < 120; ++round) {
    const std::uint64_t seed = seed_of(9100 + static_cast<std::uint64_t>(round));
    random_source random(seed);
    const int dim = random.pick(dims), heads = random.between(1, 3), tokens = random.between(1, 200);
    const pk::adaptive_spec spec = random_adaptive(random, dim);
    tensor16 x = random_tensor(random, heads, tokens, dim);
    for (int i = random.chance(3) ? 5 : 0; i > 0; --i)
      x.bits[static_cast<std::size_t>(random.below(static_cast<int>(x.bits.size())))] =
          random.chance(2) ? 0x7c00 : 0xfe01;
    INFO("seed " << seed << " " << describe(spec));
    const adaptive_coded e(spec, x, random.chance(2) ? 0 : random.between(0, 130));
    CHECK(count_different(e.decode(), documented(e)) == 0);
  }
}

TEST_CASE("non-finite input makes its own strip-adaptive groups NaN and nothing else", "[adaptive]") {
  random_source random(seed_of(9200));
  for (const float poison : {std::nanf(""), INFINITY, -INFINITY})
    for (const auto axis : adaptive_axes)
      for (const float step : {1.0f, -0.1f, 0.1f, 1.0f / 255.0f}) {  // negative: with an integer zero point
        const pk::adaptive_spec spec =
            pk::make_adaptive(pk::side::key, 64, axis, std::fabs(step), pk::transform_kind::identity, false,
                              step < 0.0f ? pk::pack_zero::integer : pk::pack_zero::floating);
        tensor16 x = random_tensor(random, 2, 150, 64);
        const std::vector<float> before = adaptive_coded(spec, x).decode();
        x.bits[x.at(1, 70, 40)] = pk::float_to_half(poison);
        x.bits[x.at(0, 140, 3)] = pk::float_to_half(poison);  // in the tail: stays what it is
        const adaptive_coded e(spec, x);
        CHECK(e.report.flags == pk::report_nonfinite_input);
        std::vector<float> expected = before;
        for (int h = 0; h < 2; ++h)
          for (int t = 64; t < 128; ++t)
            for (int c = 0; c < 64; ++c)
              if (axis == pk::group_axis::channel  ? h == 1 && c == 40
                  : axis == pk::group_axis::vector ? h == 1 && t == 70
                  : axis == pk::group_axis::token  ? t == 70
                                                   : true)
                expected[x.at(h, t, c)] = NAN;
        expected[x.at(0, 140, 3)] = poison;
        INFO(describe(spec) << " poison " << poison);
        CHECK(count_different(e.decode(), expected) == 0);
      }
}

TEST_CASE("strip-adaptive bounds beyond fp16 are reported and decode as NaN", "[adaptive]") {
  tensor16 x(1, 64, 64);
  for (int c = 0; c < 64; ++c) x.bits[x.at(0, 9, c)] = pk::float_to_half(c % 2 == 0 ? 65504.0f : -65504.0f);
  for (const auto transform : {pk::transform_kind::identity, pk::transform_kind::hadamard})
    for (const auto axis : adaptive_axes) {
      const bool beyond = transform == pk::transform_kind::hadamard;  // one element becomes 8 x 65504
      const adaptive_coded e(pk::make_adaptive(pk::side::value, 64, axis, 1.0f, transform), x);
      INFO(describe(e.spec.groups));
      CHECK(e.report.flags == (beyond ? pk::report_scale_overflow : 0u));
      const std::vector<float> back = e.decode();
      for (int t = 0; t < 64; ++t)
        CHECK(std::isnan(back[x.at(0, t, 5)]) ==
              (beyond && (t == 9 || axis == pk::group_axis::channel || axis == pk::group_axis::block)));
    }
}

TEST_CASE("strip-adaptive codes stand for the numbers that PackKV's stand for", "[adaptive]") {
  constexpr int heads = 2, tokens = 128;
  for (const auto axis : adaptive_axes)
    for (const auto zero : zero_points)
      for (const float step : {0.3f, 0.1f, 0.01f}) {
        const std::uint64_t seed = seed_of(9400 + static_cast<std::uint64_t>(100.0f * step));
        random_source random(seed);
        pk::pack_format f;
        f.order = pk::token_order::none;
        f.kv_heads = heads;
        f.key.granularity = axis == pk::group_axis::channel  ? pk::pack_granularity::channel
                            : axis == pk::group_axis::vector ? pk::pack_granularity::vector
                            : axis == pk::group_axis::token  ? pk::pack_granularity::token
                                                             : pk::pack_granularity::block;
        f.key.zero = zero;
        f.key.head_dim = 64;
        f.key.relative_step = step;
        f.value = f.key;
        const tensor16 x = random_tensor(random, heads, tokens, 64);
        const auto in = pk::make_input<4>(x.bits.data(), pk::dtype::float16, {1, heads, tokens, 64});
        host_test::pack_memory key(f, pk::side::key, 2), value(f, pk::side::value, 2);
        pk::pack_report report;
        REQUIRE(ref::compress(f, in, in, 2, key.out(), value.out(), nullptr, report));
        std::vector<float> expected(x.bits.size());
        const auto out = pk::make_output<4>(expected.data(), pk::dtype::float32, {1, heads, tokens, 64});
        REQUIRE(ref::decompress(f, {key.in(), value.in(), 2}, out, out));
        const adaptive_coded e(
            pk::make_adaptive(pk::side::key, 64, axis, step, pk::transform_kind::identity, false, zero), x);
        INFO("seed " << seed << " " << describe(e.spec));
        CHECK(e.report.flags == 0);
        CHECK(count_different(e.decode(), expected) == 0);
      }
}

TEST_CASE("a code of 256 becomes 255 and is reported, with an integer zero point alone", "[adaptive]") {
  // The steps of a group from 0.5 to 255.5 are 1, and both halves are rounded to the even number.
  tensor16 x(1, 64, 64);
  for (int t = 0; t < 64; ++t)
    for (int c = 0; c < 64; ++c) x.bits[x.at(0, t, c)] = pk::float_to_half(c % 2 == 0 ? 0.5f : 255.5f);
  for (const auto axis : adaptive_axes)
    for (const auto zero : zero_points) {
      tensor16 y = x;
      for (int t = 0; t < 64 && axis == pk::group_axis::channel; ++t)
        for (int c = 0; c < 64; ++c) y.bits[y.at(0, t, c)] = pk::float_to_half(t % 2 == 0 ? 0.5f : 255.5f);
      const adaptive_coded e(
          pk::make_adaptive(pk::side::value, 64, axis, 1.0f / 255.0f, pk::transform_kind::identity, false, zero), y);
      INFO(describe(e.spec));
      const bool integer = zero == pk::pack_zero::integer;
      CHECK(e.report.flags == (integer ? pk::report_code_overflow : 0u));
      const std::vector<float> back = e.decode();
      const int last = axis == pk::group_axis::channel ? 1 : 0;  // the place of an element of 0.5, then of one of 255.5
      CHECK(back[y.at(0, 0, 0)] == (integer ? 0.0f : 0.5f));
      CHECK(back[y.at(0, last, 1)] == (integer ? 255.0f : 255.5f));
      CHECK(count_different(back, documented(e)) == 0);
    }
}

TEST_CASE("one level, and 255 levels, come back as the zero points say", "[adaptive]") {
  for (const auto axis : adaptive_axes)
    for (const int levels : {1, 255}) {
      tensor16 x(2, 64, 64);  // from -100 to 155 in every group: the ends alone, or every fourth integer and the ends
      for (int h = 0; h < 2; ++h)
        for (int t = 0; t < 64; ++t)
          for (int c = 0; c < 64; ++c) {
            const int place = axis == pk::group_axis::channel ? t : c;
            const int level = place == 63 ? 255 : levels == 1 ? 255 * (place % 2) : 4 * place;
            x.bits[x.at(h, t, c)] = pk::float_to_half(static_cast<float>(level - 100));
          }
      for (const auto zero : zero_points) {
        const adaptive_coded e(pk::make_adaptive(pk::side::value, 64, axis, 1.0f / static_cast<float>(levels),
                                                 pk::transform_kind::identity, false, zero),
                               x);
        INFO(levels << " levels above the first, " << describe(e.spec));
        CHECK(e.report.flags == 0);
        const std::vector<float> back = e.decode();
        int wrong = 0;
        for (int h = 0; h < 2; ++h)
          for (int t = 0; t < 64; ++t)
            for (int c = 0; c < 64; ++c) {
              // The multiples of a step of 255 next to -100 and 155 are 0 and 255.
              const float exact = x.value(h, t, c), multiple = exact < 0.0f ? 0.0f : 255.0f;
              wrong += back[x.at(h, t, c)] != (levels == 1 && zero == pk::pack_zero::integer ? multiple : exact);
            }
        CHECK(wrong == 0);
        for (int strip = 0; strip < 4; ++strip) CHECK(e.bytes.data()[e.offsets[0] + strip] == (levels == 1 ? 1 : 8));
      }
    }
}

TEST_CASE("a constant tensor takes no code bits", "[adaptive]") {
  tensor16 x(2, 128, 128);
  std::fill(x.bits.begin(), x.bits.end(), pk::float_to_half(3.25f));
  for (const auto axis : adaptive_axes)
    for (const auto zero : zero_points) {
      const adaptive_coded e(
          pk::make_adaptive(pk::side::key, 128, axis, 0.1f, pk::transform_kind::identity, false, zero), x, 0);
      INFO(describe(e.spec));
      const int numbers = axis == pk::group_axis::channel  ? 4 * 4 * 128
                          : axis == pk::group_axis::vector ? 4 * 4 * 64
                          : axis == pk::group_axis::token  ? 2 * 4 * 64
                                                           : 2 * 16;
      CHECK(e.offsets.back() == numbers + 4 * 16);  // of four tiles or two blocks, and four headers
      CHECK(pk::adaptive_total_bytes(e.layout, e.offsets.back()) == e.offsets.back() + 5 * 8);
      const std::vector<float> back = e.decode();
      CHECK(std::all_of(back.begin(), back.end(), [](float v) { return v == 3.25f; }));
    }
}

TEST_CASE("bad strip-adaptive formats, small buffers and damaged bytes are refused", "[adaptive]") {
  using pk::group_axis;
  using pk::side;
  CHECK(pk::check_adaptive(pk::make_adaptive(side::key, 128, group_axis::token, 1.0f / 255.0f)));
  CHECK(pk::check_adaptive(pk::make_adaptive(side::key, 128, group_axis::token, 0.0039f)).code ==
        pk::status_code::unsupported);
  for (const float step : {0.0f, -0.1f, 1.5f, std::nanf("")})
    CHECK(pk::check_adaptive(pk::make_adaptive(side::key, 128, group_axis::token, step)).code ==
          pk::status_code::invalid_argument);
  CHECK(pk::check_adaptive(pk::make_adaptive(side::key, 80, group_axis::token, 0.1f)).code ==
        pk::status_code::unsupported);
  for (const auto axis : adaptive_axes)
    for (const auto zero : zero_points) {
      const auto made = [&](float step) {
        return pk::make_adaptive(side::value, 64, axis, step, pk::transform_kind::hadamard, true, zero);
      };
      CHECK(pk::check_adaptive(made(0.1f)));
      CHECK(pk::check_adaptive(made(0.0039f)).code == pk::status_code::unsupported);
      pk::adaptive_spec bad = made(0.1f);
      bad.zero = static_cast<pk::pack_zero>(2);
      CHECK(pk::check_adaptive(bad).code == pk::status_code::invalid_argument);
      bad = made(0.1f);
      bad.groups.axis = static_cast<group_axis>(4);
      CHECK(pk::check_adaptive(bad).code == pk::status_code::invalid_argument);
      bad = made(0.1f);
      bad.groups.group = 32;  // another group than the format has: along tokens, of a vector, of all heads
      CHECK_FALSE(pk::check_adaptive(bad));
    }

  random_source random(seed_of(9500));
  const tensor16 x = random_tensor(random, 2, 130, 64);
  const pk::adaptive_spec spec = pk::make_adaptive(side::value, 64, group_axis::vector, 0.1f);
  adaptive_coded e(spec, x, 0);
  aligned_bytes small(e.layout.max_bytes - 16);
  pk::device_report report;
  std::vector<std::int64_t> offsets(e.offsets.size(), -7);
  CHECK(ref::encode_adaptive(spec, x.view(), 0, small.data(), small.size(), offsets.data(), report).code ==
        pk::status_code::workspace_too_small);
  pk::adaptive_spec unknown = spec;
  unknown.zero = static_cast<pk::pack_zero>(2);
  CHECK(ref::encode_adaptive(unknown, x.view(), 0, small.data(), e.layout.max_bytes, offsets.data(), report).code ==
        pk::status_code::invalid_argument);
  CHECK(small.untouched());
  CHECK(offsets == std::vector<std::int64_t>(e.offsets.size(), -7));

  std::vector<float> back(x.bits.size(), 42.0f);
  const auto out = pk::make_output<3>(back.data(), pk::dtype::float32, {2, 130, 64});
  const auto decode = [&](const std::vector<std::int64_t>& o, std::int64_t size) {
    return ref::decode_adaptive(spec, e.bytes.data(), size, o.data(), 0, out).code;
  };
  const std::int64_t size = e.offsets.back();
  CHECK(decode(e.offsets, size - 16) == pk::status_code::corrupt);
  for (std::size_t i = 0; i < e.offsets.size(); ++i)
    for (const std::int64_t bad :
         {std::int64_t{-1}, std::int64_t{0}, size + 16, e.offsets[i] + 16, e.offsets[i] + 1, INT64_MAX, INT64_MIN}) {
      std::vector<std::int64_t> o = e.offsets;
      o[i] = bad;
      CHECK(decode(o, size) == pk::status_code::corrupt);
    }
  std::uint8_t& width = e.bytes.data()[e.offsets[1]];
  const std::uint8_t kept = width;
  for (const int bad : {5, 6, 7, 9, 255, kept == 8 ? 4 : 8}) {
    width = static_cast<std::uint8_t>(bad);
    CHECK(decode(e.offsets, size) == pk::status_code::corrupt);
  }
  width = kept;
  CHECK(std::all_of(back.begin(), back.end(), [](float v) { return v == 42.0f; }));
  CHECK(decode(e.offsets, size) == pk::status_code::ok);
}
