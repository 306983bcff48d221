// SPDX-License-Identifier: Apache-2.0
// The grouped formats against a second, naive implementation: codes, scales, reconstruction, sizes, refusals.
#include <limits>
#include <packkv/codec/grouped.hpp>
#include <packkv/reference/grouped.hpp>
#include <tuple>

#include "grouped_fixture.hpp"

namespace pk = packkv;
namespace ref = packkv::reference;
using namespace grouped_test;
using host_test::random_source;
using host_test::seed_of;

namespace {

constexpr int head_dims[] = {64, 96, 128, 192, 256, 512};
constexpr int all_widths[] = {1, 2, 3, 4, 8};

/// The code of an element, read by the second decoder of the plan's code words.
std::vector<std::uint16_t> stored_codes(const coded& e, int head, int token) {
  const pk::grouped_spec& s = e.spec;
  clean::description f;
  f.of = s.which == pk::side::key ? clean::side::key : clean::side::value;
  f.head_dim = s.head_dim;
  f.widths.assign(static_cast<std::size_t>(s.strips.count), s.width);
  const int block = token / s.block_tokens(), in_block = token % s.block_tokens();
  const std::uint8_t* tile = e.bytes.data() + e.layout.blocks_offset + block * s.block_bytes(e.layout.heads) +
                             (head * s.tiles_per_block() + in_block / 64) * s.tile_bytes();
  std::vector<std::uint8_t> copy(tile, tile + s.code_bytes());
  copy.resize(copy.size() + 128);  // row scales of a plan tile, which this is not
  return clean::decode(copy.data(), f, in_block % 64).codes;
}

pk::grouped_spec per_vector(pk::side which, int dim, int width) {
  return pk::make_grouped(which, dim, pk::group_axis::vector, dim, width);
}

}  // namespace

TEST_CASE("grouped codes and reconstructions equal a naive implementation to the bit", "[grouped]") {
  for (int round = 0; round < 60; ++round) {
    const std::uint64_t seed = seed_of(5000 + static_cast<std::uint64_t>(round));
    random_source random(seed);
    const int dim = random.pick(head_dims), heads = random.between(1, 3), tokens = random.between(64, 300);
    const int recent = random.chance(2) ? 0 : random.between(0, 130);
    const pk::grouped_spec spec = random_spec(random, random.chance(2) ? pk::side::key : pk::side::value, dim);
    const tensor16 x = random_tensor(random, heads, tokens, dim);
    INFO("seed " << seed << " " << describe(spec) << " heads " << heads << " tokens " << tokens);
    const coded e(spec, x, recent);
    const int coded_tokens = static_cast<int>(e.layout.coded_tokens);
    CHECK(coded_tokens == std::max(0, (tokens - recent) / spec.block_tokens() * spec.block_tokens()));
    CHECK(e.report.flags == 0);

    const naive_result naive = naive_quantise(spec, x, coded_tokens);
    const std::vector<float> decoded = e.decode();
    int wrong_codes = 0, wrong_values = 0, wrong_tail = 0;
    for (int h = 0; h < heads; ++h) {
      for (int t = 0; t < coded_tokens; ++t) {
        const std::vector<std::uint16_t> codes = stored_codes(e, h, t);
        std::vector<float> back(naive.y.begin() + static_cast<std::ptrdiff_t>(x.at(h, t, 0)),
                                naive.y.begin() + static_cast<std::ptrdiff_t>(x.at(h, t, 0)) + dim);
        if (spec.transform == pk::transform_kind::hadamard) clean::hadamard(back);
        for (int c = 0; c < dim; ++c) {
          float expected = back[static_cast<std::size_t>(c)];
          if (spec.centred) {
            std::uint16_t mean;
            std::memcpy(&mean, e.bytes.data() + 2 * (h * dim + c), 2);
            expected += clean::from_fp16(mean);
          }
          wrong_codes += codes[static_cast<std::size_t>(c)] != naive.codes[x.at(h, t, c)];
          wrong_values += decoded[x.at(h, t, c)] != expected;
        }
      }
      for (int t = coded_tokens; t < tokens; ++t)
        for (int c = 0; c < dim; ++c) wrong_tail += decoded[x.at(h, t, c)] != x.value(h, t, c);
    }
    CHECK(wrong_codes == 0);
    CHECK(wrong_values == 0);
    CHECK(wrong_tail == 0);
  }
}

TEST_CASE("a decoder written from docs/format-grouped.md reads the bytes as the reference does", "[grouped]") {
  for (int round = 0; round < 40; ++round) {
    const std::uint64_t seed = seed_of(5500 + static_cast<std::uint64_t>(round));
    random_source random(seed);
    const int dim = random.pick(head_dims), heads = random.between(1, 3), tokens = random.between(128, 260);
    const pk::grouped_spec spec = random_spec(random, random.chance(2) ? pk::side::key : pk::side::value, dim);
    const tensor16 x = random_tensor(random, heads, tokens, dim);
    INFO("seed " << seed << " " << describe(spec));
    const coded e(spec, x);
    const std::vector<float> decoded = e.decode();
    int wrong = 0;
    for (int h = 0; h < heads; ++h)
      for (int t = 0; t < tokens; ++t) {
        const std::vector<float> token = documented_token(spec, e.bytes.data(), heads, tokens, h, t);
        for (int c = 0; c < dim; ++c) wrong += token[static_cast<std::size_t>(c)] != decoded[x.at(h, t, c)];
      }
    CHECK(wrong == 0);
  }
}

TEST_CASE("strided and bfloat16 tensors code as their contiguous copies do", "[grouped]") {
  random_source random(seed_of(5900));
  const pk::grouped_spec spec = pk::make_grouped(pk::side::key, 64, pk::group_axis::vector, 32, 4);
  tensor16 x = random_tensor(random, 2, 150, 64);
  const coded plain(spec, x);
  std::vector<std::uint16_t> turned(x.bits.size());  // [tokens, heads, dim]
  for (int h = 0; h < 2; ++h)
    for (int t = 0; t < 150; ++t)
      for (int c = 0; c < 64; ++c) turned[(static_cast<std::size_t>(t) * 2 + h) * 64 + c] = x.bits[x.at(h, t, c)];
  pk::input_view<3> view = x.view();
  view.data = turned.data();
  view.stride[0] = 128;
  view.stride[1] = 256;
  aligned_bytes bytes(plain.bytes.size());
  pk::device_report report;
  REQUIRE(ref::encode_grouped(spec, view, 0, bytes.data(), bytes.size(), report));
  CHECK(std::memcmp(bytes.data(), plain.bytes.data(), static_cast<std::size_t>(bytes.size())) == 0);

  // Numbers that fp16 and bfloat16 both hold: the coded part is the same, the tail keeps its own bits.
  for (std::uint16_t& b : x.bits) b = pk::float_to_half(static_cast<float>(random.between(-100, 100)));
  const coded half(spec, x);
  std::vector<std::uint16_t> brain;
  for (const std::uint16_t b : x.bits) brain.push_back(pk::float_to_bfloat16(pk::half_to_float(b)));
  view = x.view();
  view.data = brain.data();
  view.type = pk::dtype::bfloat16;
  REQUIRE(ref::encode_grouped(spec, view, 0, bytes.data(), bytes.size(), report));
  CHECK(std::memcmp(bytes.data(), half.bytes.data(), static_cast<std::size_t>(half.layout.tail_offset)) == 0);
  std::vector<float> y(x.bits.size());
  const auto out = pk::make_output<3>(y.data(), pk::dtype::float32, {2, 150, 64});
  REQUIRE(ref::decode_grouped(spec, bytes.data(), bytes.size(), 0, out, pk::dtype::bfloat16));
  CHECK((y == half.decode()));
}

TEST_CASE("a min-max code lies within half a step of the element and is never clamped", "[grouped]") {
  for (const int width : all_widths)
    for (int round = 0; round < 2000; ++round) {
      const std::uint64_t seed = seed_of(6000 + static_cast<std::uint64_t>(round));
      random_source random(seed);
      const pk::grouped_spec spec = per_vector(pk::side::value, 64, width);
      const float magnitude = std::ldexp(1.0f, random.between(-26, 14)), offset = magnitude * 3.0f * random.normal();
      std::vector<float> x;
      for (int i = 0; i < 32; ++i)
        x.push_back(offset * 0.1f + magnitude * 0.2f * random.normal());  // seldom a number of fp16
      const float low = *std::min_element(x.begin(), x.end()), high = *std::max_element(x.begin(), x.end());
      const pk::detail::group_numbers n = pk::detail::min_max_numbers(low, high);
      INFO("seed " << seed << " width " << width << " low " << low << " high " << high);
      REQUIRE(n.valid());
      const pk::detail::group_values v = pk::detail::values_of(spec, n);
      double worst = 0.0;
      for (const float value : x) {
        const float u = (value - v.minimum) / v.step;
        if (v.step > 0.0f) REQUIRE((u >= 0.0f && u <= static_cast<float>(pk::top_code(width)) + 0.01f));
        const float back = pk::detail::decode_in(spec, v, pk::detail::encode_in(spec, v, value));
        worst = std::fmax(worst, std::fabs(static_cast<double>(back) - value));
      }
      REQUIRE(worst <= 0.5 * v.step + 1e-6 * std::fmax(std::fabs(low), std::fabs(high)));
    }
}

TEST_CASE("a group of one value, zero or the smallest subnormal comes back exactly", "[grouped]") {
  for (const float value : {0.0f, -0.0f, 1.0f, -3.5f, 65504.0f, -65504.0f, std::ldexp(1.0f, -24)})
    for (const auto axis : {pk::group_axis::channel, pk::group_axis::vector, pk::group_axis::token})
      for (const auto rule : {pk::step_rule::min_max, pk::step_rule::gaussian_mean})
        for (const int width : all_widths) {
          const int group = axis == pk::group_axis::token ? 0 : 32;
          const pk::grouped_spec spec = pk::make_grouped(pk::side::key, 64, axis, group, width, rule);
          tensor16 x(2, 64, 64);
          std::fill(x.bits.begin(), x.bits.end(), pk::float_to_half(value));
          INFO(describe(spec) << " value " << value);
          const coded e(spec, x);
          CHECK(e.report.flags == 0);
          const std::vector<float> back = e.decode();
          CHECK(std::all_of(back.begin(), back.end(), [&](float b) { return b == value; }));
        }
}

TEST_CASE("2^width evenly spaced levels come back exactly", "[grouped]") {
  // 255 steps between 256 levels at 8 bits, and 255 levels of them.
  for (const int width : all_widths)
    for (const int levels : {1 << width, std::max(1, (1 << width) - 1)}) {
      const pk::grouped_spec spec = pk::make_grouped(pk::side::value, 512, pk::group_axis::vector, 512, width);
      tensor16 x(1, 64, 512);
      for (int t = 0; t < 64; ++t)
        for (int c = 0; c < 512; ++c) {
          // One element at each end keeps the step at 1 whatever levels the others take.
          const int level = c == 0 ? (1 << width) - 1 : c == 1 ? 0 : (c * 7 + t) % levels;
          x.bits[x.at(0, t, c)] = pk::float_to_half(static_cast<float>(level) - 3.0f);
        }
      const coded e(spec, x);
      const std::vector<float> back = e.decode();
      int wrong = 0;
      for (std::size_t i = 0; i < back.size(); ++i) wrong += back[i] != clean::from_fp16(x.bits[i]);
      INFO("width " << width << " levels " << levels);
      CHECK(wrong == 0);
    }
}

TEST_CASE("non-finite input makes its own groups NaN and nothing else", "[grouped]") {
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity()};
  random_source random(seed_of(6500));
  for (const float poison : bad)
    for (const auto axis : {pk::group_axis::channel, pk::group_axis::vector, pk::group_axis::token})
      for (const auto rule : {pk::step_rule::min_max, pk::step_rule::gaussian, pk::step_rule::gaussian_mean}) {
        const pk::grouped_spec spec =
            pk::make_grouped(pk::side::key, 64, axis, axis == pk::group_axis::token ? 0 : 32, 3, rule);
        tensor16 x = random_tensor(random, 2, 128, 64);
        const std::vector<float> before = coded(spec, x).decode();
        x.bits[x.at(1, 70, 40)] = pk::float_to_half(poison);
        const coded e(spec, x);
        CHECK(e.report.flags == pk::report_nonfinite_input);
        const std::vector<float> after = e.decode();
        int wrong = 0;
        for (int h = 0; h < 2; ++h)
          for (int t = 0; t < 128; ++t)
            for (int c = 0; c < 64; ++c) {
              const bool inside = axis == pk::group_axis::channel  ? h == 1 && t >= 64 && t < 96 && c == 40
                                  : axis == pk::group_axis::vector ? h == 1 && t == 70 && c >= 32
                                                                   : t == 70;
              const std::size_t i = x.at(h, t, c);
              wrong += inside ? !std::isnan(after[i]) : after[i] != before[i];
            }
        INFO(describe(spec) << " poison " << poison);
        CHECK(wrong == 0);
      }
}

TEST_CASE("numbers beyond fp16 are reported and decode as NaN, the whole range of fp16 does not", "[grouped]") {
  tensor16 x(1, 64, 64);
  for (int c = 0; c < 64; ++c) x.bits[x.at(0, 9, c)] = pk::float_to_half(c % 2 == 0 ? 65504.0f : -65504.0f);
  for (const int width : all_widths) {  // the step is 131008 at one bit
    const coded e(per_vector(pk::side::value, 64, width), x);
    CHECK(e.report.flags == 0);
    const std::vector<float> back = e.decode();
    for (int c = 0; c < 64; ++c) CHECK(std::fabs(back[x.at(0, 9, c)] - x.value(0, 9, c)) < 0.02f);
  }
  using pk::step_rule;
  for (const auto rule : {step_rule::min_max, step_rule::gaussian}) {
    const coded e(
        pk::make_grouped(pk::side::value, 64, pk::group_axis::vector, 64, 1, rule, pk::transform_kind::hadamard), x);
    INFO(describe(e.spec));  // the transform makes one element 8 x 65504; the RMS is 65504
    CHECK(e.report.flags == (rule == step_rule::min_max ? pk::report_scale_overflow : 0u));
    const std::vector<float> back = e.decode();
    for (int t = 0; t < 64; ++t) CHECK(std::isnan(back[x.at(0, t, 5)]) == (t == 9 && rule == step_rule::min_max));
  }
}

TEST_CASE("the bounds of a group are the nearest fp16 numbers outside it", "[grouped]") {
  const std::vector<float>& numbers = half_numbers();
  const auto check = [](float x) {
    const std::uint16_t below = pk::detail::half_not_above(x), above = pk::detail::half_not_below(x);
    INFO(x);
    REQUIRE(clean::from_fp16(below) == naive_half_below(x));
    REQUIRE(clean::from_fp16(above) == naive_half_above(x));
    REQUIRE(below != 0x8000u);
    REQUIRE(above != 0x8000u);
  };
  check(-0.0f);
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    check(numbers[i]);
    if (i + 1 == numbers.size()) break;
    check(std::nextafter(numbers[i], INFINITY));
    check(std::nextafter(numbers[i + 1], -INFINITY));
    check((numbers[i] + numbers[i + 1]) / 2);
  }
  const float beyond = std::nextafter(65504.0f, INFINITY);
  CHECK(pk::detail::half_not_below(beyond) == 0x7c00u);
  CHECK(pk::detail::half_not_above(beyond) == 0x7bffu);
  CHECK(pk::detail::half_not_below(-beyond) == 0xfbffu);
  CHECK(pk::detail::half_not_above(-beyond) == 0xfc00u);
  CHECK_FALSE(pk::detail::min_max_numbers(0.0f, beyond).valid());
  CHECK_FALSE(pk::detail::min_max_numbers(-beyond, 0.0f).valid());
  CHECK_FALSE(pk::detail::min_max_numbers(1e30f, 2e30f).valid());
}

TEST_CASE("min-max codes of fp16 numbers are those of the published arithmetic in float", "[grouped]") {
  for (int round = 0; round < 20; ++round) {
    const std::uint64_t seed = seed_of(6900 + static_cast<std::uint64_t>(round));
    random_source random(seed);
    const int width = random.pick(all_widths);
    const tensor16 x = random_tensor(random, 1, 64, 128);
    const coded keys(pk::kivi_keys(128, width), x), values(pk::kivi_values(128, width), x);
    int wrong = 0;
    const auto check = [&](const coded& e, const std::vector<float>& back, int t0, int tokens, int c0, int channels) {
      float low = INFINITY, high = -INFINITY;
      for (int t = t0; t < t0 + tokens; ++t)
        for (int c = c0; c < c0 + channels; ++c) {
          low = std::min(low, x.value(0, t, c));
          high = std::max(high, x.value(0, t, c));
        }
      const float scale = (high - low) / static_cast<float>((1 << width) - 1);
      for (int t = t0; t < t0 + tokens; ++t)
        for (int c = c0; c < c0 + channels; ++c) {
          const float code = scale > 0.0f ? std::nearbyint((x.value(0, t, c) - low) / scale) : 0.0f;
          const volatile float product = code * scale;
          wrong += stored_codes(e, 0, t)[static_cast<std::size_t>(c)] != code;
          wrong += back[x.at(0, t, c)] != product + low;
        }
    };
    const std::vector<float> k = keys.decode(), v = values.decode();
    for (int t = 0; t < 64; t += 32)
      for (int c = 0; c < 128; ++c) check(keys, k, t, 32, c, 1);
    for (int t = 0; t < 64; ++t)
      for (int c = 0; c < 128; c += 32) check(values, v, t, 1, c, 32);
    INFO("seed " << seed << " width " << width);
    CHECK(wrong == 0);
  }
}

TEST_CASE("every byte of a grouped side is counted", "[grouped]") {
  // KIVI at 2 bits and groups of 32: 2 bits of code and 2 x 16 bits for 32 elements, 3 bits a value.
  for (const auto& spec : {pk::kivi_keys(128, 2), pk::kivi_values(128, 2)}) {
    pk::grouped_layout l;
    REQUIRE(pk::make_grouped_layout(spec, 2, 1024, 0, l));
    CHECK(8.0 * static_cast<double>(l.total_bytes) / (2 * 1024 * 128) == 3.0);
  }
  const auto bits = [](const pk::grouped_spec& spec, int heads) {
    pk::grouped_layout l;
    REQUIRE(pk::make_grouped_layout(spec, heads, 1024, 0, l));
    return 8.0 * static_cast<double>(l.total_bytes) / (heads * 1024 * spec.head_dim);
  };
  using pk::group_axis;
  using pk::side;
  using pk::step_rule;
  CHECK(bits(pk::kivi_keys(128, 4), 2) == 5.0);
  CHECK(bits(pk::make_grouped(side::key, 64, group_axis::channel, 64, 3), 2) == 3.5);
  CHECK(bits(pk::make_grouped(side::key, 64, group_axis::channel, 128, 3), 2) == 3.25);
  CHECK(bits(pk::make_grouped(side::key, 64, group_axis::token, 0, 4), 8) == 4.0 + 32.0 / (64 * 8));
  CHECK(bits(pk::make_grouped(side::value, 128, group_axis::vector, 128, 8), 2) == 8.25);
  CHECK(bits(pk::make_grouped(side::value, 128, group_axis::vector, 128, 2, step_rule::gaussian), 2) == 2.125);

  for (int round = 0; round < 100; ++round) {
    const std::uint64_t seed = seed_of(7000 + static_cast<std::uint64_t>(round));
    random_source random(seed);
    const int dim = random.pick(head_dims), heads = random.between(1, 9), tokens = random.between(0, 700);
    const pk::grouped_spec spec = random_spec(random, random.chance(2) ? side::key : side::value, dim);
    pk::grouped_layout l;
    const int recent = random.between(0, 200);
    REQUIRE(pk::make_grouped_layout(spec, heads, tokens, recent, l));
    INFO("seed " << seed << " " << describe(spec));
    CHECK(pk::count_grouped(spec, l).total() == l.total_bytes);
    CHECK(l.tail_offset % 16 == 0);
    CHECK(spec.tile_bytes() % 16 == 0);
    CHECK(spec.block_bytes(heads) % 16 == 0);
    CHECK(pk::count_grouped(spec, l).codes == l.coded_tokens * heads * dim * spec.width / 8);
  }
}

TEST_CASE("no two groups of a block share a byte, and none lies on codes", "[grouped]") {
  random_source random(seed_of(7500));
  for (int round = 0; round < 40; ++round) {
    const int dim = random.pick(head_dims), heads = random.between(1, 3);
    const pk::grouped_spec spec = random_spec(random, random.chance(2) ? pk::side::key : pk::side::value, dim);
    std::vector<int> owners(static_cast<std::size_t>(spec.block_bytes(heads)), 0);
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < spec.tiles_per_block(); ++i)
        for (int b = 0; b < spec.code_bytes(); ++b)
          ++owners[static_cast<std::size_t>(pk::grouped_tile_offset(spec, h, i) + b)];
    ref::detail::for_each_group(spec, heads, [&](const ref::detail::group_box& box) {
      const pk::group_place p = pk::locate_group(spec, heads, box.head, box.token, box.channel);
      for (int b = 0; b < 2; ++b) {
        ++owners[static_cast<std::size_t>(p.first + b)];
        if (spec.has_minima()) ++owners[static_cast<std::size_t>(p.minimum + b)];
      }
    });
    INFO(describe(spec));
    CHECK(std::all_of(owners.begin(), owners.end(), [](int n) { return n == 1; }));
  }
}

TEST_CASE("bad grouped formats and buffers are refused before anything is written", "[grouped]") {
  using pk::group_axis;
  using pk::side;
  const auto code = [](const pk::grouped_spec& s) { return pk::check_grouped(s).code; };
  CHECK(code(per_vector(side::key, 128, 4)) == pk::status_code::ok);
  for (const int width : {-1, 0, 5, 6, 7, 9, 12, 16, 1 << 20}) {
    INFO(width);
    CHECK(code(per_vector(side::key, 128, width)) == pk::status_code::unsupported);
  }
  CHECK(std::string(pk::check_grouped(per_vector(side::key, 128, 9)).message) ==
        "codes wider than 8 bits are not stored");
  CHECK(code(per_vector(side::key, 100, 4)) == pk::status_code::unsupported);
  CHECK(code(pk::make_grouped(side::key, 128, group_axis::channel, 16, 4)) == pk::status_code::unsupported);
  CHECK(code(pk::make_grouped(side::key, 128, group_axis::channel, 256, 4)) == pk::status_code::unsupported);
  CHECK(code(pk::make_grouped(side::key, 96, group_axis::vector, 64, 4)) == pk::status_code::unsupported);
  CHECK(code(pk::make_grouped(side::key, 128, group_axis::vector, 0, 4)) == pk::status_code::unsupported);
  CHECK(code(pk::make_grouped(side::key, 128, group_axis::vector, 8, 4)) == pk::status_code::unsupported);
  CHECK(code(pk::make_grouped(side::key, 128, group_axis::token, 32, 4)) == pk::status_code::invalid_argument);
  const pk::grouped_spec block = pk::make_grouped(side::key, 128, group_axis::block, 0, 4);
  CHECK(code(block) == pk::status_code::unsupported);
  pk::grouped_layout nothing;
  CHECK(pk::make_grouped_layout(block, 2, 128, 0, nothing).code == pk::status_code::unsupported);
  CHECK(nothing.blocks == 0);
  CHECK(code(pk::make_grouped(side::key, 128, group_axis::vector, 32, 4, pk::step_rule::min_max,
                              pk::transform_kind::permutation)) == pk::status_code::unsupported);
  pk::grouped_spec torn = pk::kivi_keys(128, 2);
  torn.which = side::value;
  CHECK(code(torn) == pk::status_code::invalid_argument);
  torn = pk::kivi_keys(128, 2);
  torn.width = 4;
  CHECK(code(torn) == pk::status_code::invalid_argument);
  torn = pk::kivi_keys(128, 3);  // code words elsewhere, beyond the tile
  torn.strips.low[3] = 60000;
  CHECK(code(torn) == pk::status_code::invalid_argument);
  torn = pk::kivi_keys(128, 3);
  torn.strips.high[0] = 60000;
  CHECK(code(torn) == pk::status_code::invalid_argument);

  const pk::grouped_spec spec = pk::kivi_keys(64, 2);
  const tensor16 x(1, 128, 64);
  pk::grouped_layout l;
  REQUIRE(pk::make_grouped_layout(spec, 1, 128, 0, l));
  aligned_bytes bytes(l.total_bytes + 32);
  pk::device_report report;
  const auto encode = [&](const pk::input_view<3>& view, std::int64_t recent, std::uint8_t* to, std::int64_t size) {
    return ref::encode_grouped(spec, view, recent, to, size, report).code;
  };
  CHECK(encode(x.view(), 0, bytes.data(), l.total_bytes - 1) == pk::status_code::shape_mismatch);
  CHECK(encode(x.view(), 0, bytes.data() + 4, l.total_bytes) == pk::status_code::misaligned);
  CHECK(encode(x.view(), 0, nullptr, l.total_bytes) == pk::status_code::invalid_argument);
  CHECK(encode(x.view(), -1, bytes.data(), l.total_bytes) == pk::status_code::invalid_argument);
  CHECK(encode(tensor16(1, 128, 96).view(), 0, bytes.data(), l.total_bytes) == pk::status_code::shape_mismatch);
  pk::input_view<3> wide = x.view();
  wide.type = pk::dtype::float32;
  wide.stride[0] = wide.stride[1] = wide.stride[2] = 0;
  std::vector<float> one(1);
  wide.data = one.data();
  CHECK(encode(wide, 0, bytes.data(), l.total_bytes) == pk::status_code::unsupported);
  CHECK(bytes.untouched());
  CHECK(pk::make_grouped_layout(spec, 0, 1, 0, l).code == pk::status_code::invalid_argument);
  CHECK(pk::make_grouped_layout(spec, 4, std::int64_t{1} << 60, 0, l).code == pk::status_code::overflow);
}
