// SPDX-License-Identifier: Apache-2.0
// What the tests of the grouped formats share: a second implementation of docs/format-grouped.md, slow and plain, that
// uses nothing of packkv (code words are read by tests/format/decoder.hpp), random tensors, and aligned buffers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <packkv/reference/grouped.hpp>
#include <packkv/reference/strip_adaptive.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "../format/decoder.hpp"
#include "fixture.hpp"

namespace grouped_test {

namespace pk = packkv;

/// A 16-bit tensor [heads, tokens, dim], contiguous.
struct tensor16 {
  int heads, tokens, dim;
  std::vector<std::uint16_t> bits;

  tensor16(int h, int t, int d) : heads(h), tokens(t), dim(d), bits(static_cast<std::size_t>(h) * t * d) {}
  std::size_t at(int h, int t, int c) const { return (static_cast<std::size_t>(h) * tokens + t) * dim + c; }
  float value(int h, int t, int c) const { return clean::from_fp16(bits[at(h, t, c)]); }
  pk::input_view<3> view() const { return pk::make_input<3>(bits.data(), pk::dtype::float16, {heads, tokens, dim}); }
};

/// Normal elements with channel offsets, channel scales and a few outliers, as keys have them.
inline tensor16 random_tensor(host_test::random_source& random, int heads, int tokens, int dim) {
  tensor16 x(heads, tokens, dim);
  for (int h = 0; h < heads; ++h)
    for (int c = 0; c < dim; ++c) {
      const float offset = random.chance(6) ? 20.0f * random.normal() : 0.3f * random.normal();
      const float scale = random.chance(8) ? 5.0f : 1.0f;
      for (int t = 0; t < tokens; ++t) x.bits[x.at(h, t, c)] = pk::float_to_half(offset + scale * random.normal());
    }
  return x;
}

/// Bytes at a 16-byte boundary.
class aligned_bytes {
 public:
  explicit aligned_bytes(std::int64_t size) : size_(size), blocks_(static_cast<std::size_t>(size / 16 + 1)) {
    std::memset(blocks_.data(), 0xa5, blocks_.size() * 16);
  }
  std::uint8_t* data() { return blocks_[0].byte; }
  const std::uint8_t* data() const { return blocks_[0].byte; }
  std::int64_t size() const { return size_; }
  bool untouched() const {
    return std::all_of(data(), data() + blocks_.size() * 16, [](std::uint8_t b) { return b == 0xa5; });
  }

 private:
  struct alignas(16) block {
    std::uint8_t byte[16];
  };
  std::int64_t size_;
  std::vector<block> blocks_;
};

/// An encoded tensor.
struct coded {
  pk::grouped_spec spec;
  pk::grouped_layout layout;
  aligned_bytes bytes{0};
  pk::device_report report;
  int recent = 0;

  coded(const pk::grouped_spec& s, const tensor16& x, int recent_tokens = 0) : spec(s), recent(recent_tokens) {
    INFO("status " << pk::make_grouped_layout(spec, x.heads, x.tokens, recent, layout).message);
    REQUIRE(pk::make_grouped_layout(spec, x.heads, x.tokens, recent, layout));
    bytes = aligned_bytes(layout.total_bytes);
    const pk::status state = pk::reference::encode_grouped(spec, x.view(), recent, bytes.data(), bytes.size(), report);
    INFO(state.message);
    REQUIRE(state);
  }
  std::vector<float> decode() const {
    std::vector<float> x(static_cast<std::size_t>(layout.heads * layout.tokens * spec.head_dim));
    const auto out = pk::make_output<3>(x.data(), pk::dtype::float32, {layout.heads, layout.tokens, spec.head_dim});
    const pk::status state = pk::reference::decode_grouped(spec, bytes.data(), bytes.size(), recent, out);
    INFO(state.message);
    REQUIRE(state);
    return x;
  }
};

/// An encoded tensor of the strip-adaptive format.
struct adaptive_coded {
  pk::adaptive_spec spec;
  pk::adaptive_layout layout;
  aligned_bytes bytes{0};
  std::vector<std::int64_t> offsets;
  pk::device_report report;
  int recent = 0;

  adaptive_coded(const pk::adaptive_spec& s, const tensor16& x, int recent_tokens = 0)
      : spec(s), recent(recent_tokens) {
    REQUIRE(pk::make_adaptive_layout(spec, x.heads, x.tokens, recent, layout));
    bytes = aligned_bytes(layout.max_bytes);
    offsets.resize(static_cast<std::size_t>(layout.tiles) + 1);
    REQUIRE(pk::reference::encode_adaptive(spec, x.view(), recent, bytes.data(), bytes.size(), offsets.data(), report));
  }
  std::vector<float> decode() const {
    const std::int64_t dim = spec.groups.head_dim;
    std::vector<float> x(static_cast<std::size_t>(layout.heads * layout.tokens * dim));
    const auto out = pk::make_output<3>(x.data(), pk::dtype::float32, {layout.heads, layout.tokens, dim});
    REQUIRE(pk::reference::decode_adaptive(spec, bytes.data(), offsets.back(), offsets.data(), recent, out));
    return x;
  }
};

// ---- the second implementation -------------------------------------------------------------------------------------

/// The finite fp16 numbers in ascending order, +0 only.
inline const std::vector<float>& half_numbers() {
  static const std::vector<float> numbers = [] {
    std::vector<float> n;
    for (std::uint32_t bits = 0; bits < 0x10000u; ++bits)
      if ((bits & 0x7c00u) != 0x7c00u && bits != 0x8000u)
        n.push_back(clean::from_fp16(static_cast<std::uint16_t>(bits)));
    std::sort(n.begin(), n.end());
    return n;
  }();
  return numbers;
}
inline float naive_half_above(float x) { return *std::lower_bound(half_numbers().begin(), half_numbers().end(), x); }
inline float naive_half_below(float x) {
  return *(std::upper_bound(half_numbers().begin(), half_numbers().end(), x) - 1);
}
inline float naive_half(double x) {  // nearest, ties to the even mantissa
  const float low = naive_half_below(static_cast<float>(x)), high = naive_half_above(static_cast<float>(x));
  const double d = (x - low) - (high - x);
  if (d != 0.0) return d < 0.0 ? low : high;
  return (pk::float_to_half(low) & 1u) == 0 ? low : high;
}

struct naive_group {
  float scale = 0.0f, minimum = 0.0f;
};

/// Bounds of finite numbers in fp16: minimum and what is above it.
inline naive_group naive_bounds(float lowest, float highest) {
  naive_group g;
  g.minimum = naive_half_below(lowest);
  g.scale = naive_half_above(highest) - g.minimum;
  return g;
}

/// Scale (min_max: the step) and minimum of a list of finite numbers.
inline naive_group naive_scale(pk::step_rule rule, int width, const std::vector<float>& x) {
  naive_group g;
  const double top = std::pow(2.0, width) - 1.0;
  if (rule == pk::step_rule::min_max) {
    g = naive_bounds(*std::min_element(x.begin(), x.end()), *std::max_element(x.begin(), x.end()));
    g.scale /= static_cast<float>(top);
    return g;
  }
  double sum = 0.0, squares = 0.0;
  for (const float v : x) sum += v;
  const float mean = rule == pk::step_rule::gaussian ? 0.0f : static_cast<float>(sum / static_cast<double>(x.size()));
  for (const float v : x) squares += std::pow(static_cast<double>(v - mean), 2);
  const float deviation = static_cast<float>(std::sqrt(squares / static_cast<double>(x.size())));
  if (rule == pk::step_rule::gaussian) {
    g.scale = naive_half(deviation);
  } else {
    g.scale = naive_half(deviation * clean::default_step(width));
    g.minimum = naive_half(mean - static_cast<float>(top / 2) * g.scale);
  }
  return g;
}

/// The code of x and what it stands for.
inline std::pair<int, float> naive_code(pk::step_rule rule, int width, const naive_group& g, float x) {
  const int top = (1 << width) - 1;
  if (rule == pk::step_rule::gaussian) {
    const float step = g.scale * clean::default_step(width);
    const float u = step > 0.0f ? x / step : 0.0f;
    const int code = std::clamp(static_cast<int>(std::floor(std::clamp(u, -1e6f, 1e6f))) + (top + 1) / 2, 0, top);
    return {code, step * (static_cast<float>(code) - static_cast<float>(top) / 2.0f)};
  }
  const float u = g.scale > 0.0f ? (x - g.minimum) / g.scale : 0.0f;
  const int code = static_cast<int>(std::clamp(std::nearbyint(u), 0.0f, static_cast<float>(top)));
  const volatile float product = g.scale * static_cast<float>(code);  // keeps the two roundings apart
  return {code, product + g.minimum};
}

/// The strip-adaptive code of x, which may be too large by one, and what the code at most 255 stands for.
inline std::pair<int, float> naive_adaptive_code(pk::pack_zero zero, const naive_group& g, float x) {
  if (zero == pk::pack_zero::floating || g.scale == 0.0f) return naive_code(pk::step_rule::min_max, 8, g, x);
  const float lowest = std::nearbyint(g.minimum / g.scale);
  const int code = static_cast<int>(std::nearbyint(x / g.scale) - lowest);
  return {code, g.scale * (static_cast<float>(std::min(code, 255)) + lowest)};
}

/// Codes and reconstruction [heads, tokens, dim] of the coded tokens, before the inverse transform is applied to it.
struct naive_result {
  std::vector<int> codes;
  std::vector<float> y;
  bool code_overflow = false;  ///< of strip-adaptive codes: one was 256 and is 255
};

inline naive_result naive_quantise(const pk::grouped_spec& spec, const tensor16& x, int coded_tokens) {
  const int d = x.dim;
  std::vector<float> y(x.bits.size());
  for (int h = 0; h < x.heads; ++h) {
    std::vector<float> mean(static_cast<std::size_t>(d), 0.0f);
    for (int c = 0; c < d && spec.centred; ++c) {
      double sum = 0.0;
      for (int t = 0; t < coded_tokens; ++t) sum += x.value(h, t, c);
      mean[static_cast<std::size_t>(c)] = naive_half(static_cast<float>(sum / coded_tokens));
    }
    for (int t = 0; t < coded_tokens; ++t) {
      std::vector<float> token;
      for (int c = 0; c < d; ++c) token.push_back(x.value(h, t, c) - mean[static_cast<std::size_t>(c)]);
      if (spec.transform == pk::transform_kind::hadamard) clean::hadamard(token);
      std::copy(token.begin(), token.end(), y.begin() + static_cast<std::ptrdiff_t>(x.at(h, t, 0)));
    }
  }
  naive_result r{std::vector<int>(y.size()), std::vector<float>(y.size())};
  const auto quantise = [&](const std::vector<std::size_t>& members) {
    std::vector<float> values;
    for (const std::size_t i : members) values.push_back(y[i]);
    const naive_group g = naive_scale(spec.step, spec.width, values);
    for (const std::size_t i : members) std::tie(r.codes[i], r.y[i]) = naive_code(spec.step, spec.width, g, y[i]);
  };
  std::vector<std::size_t> members;
  if (spec.axis == pk::group_axis::token) {
    for (int t = 0; t < coded_tokens; ++t, members.clear()) {
      for (int h = 0; h < x.heads; ++h)
        for (int c = 0; c < d; ++c) members.push_back(x.at(h, t, c));
      quantise(members);
    }
  } else if (spec.axis == pk::group_axis::vector) {
    for (int h = 0; h < x.heads; ++h)
      for (int t = 0; t < coded_tokens; ++t)
        for (int first = 0; first < d; first += spec.group, members.clear()) {
          for (int c = first; c < first + spec.group; ++c) members.push_back(x.at(h, t, c));
          quantise(members);
        }
  } else {
    for (int h = 0; h < x.heads; ++h)
      for (int first = 0; first < coded_tokens; first += spec.group)
        for (int c = 0; c < d; ++c, members.clear()) {
          for (int t = first; t < first + spec.group; ++t) members.push_back(x.at(h, t, c));
          quantise(members);
        }
  }
  return r;
}

/// The same for strip-adaptive codes, group by group.
inline naive_result naive_adaptive(const pk::adaptive_spec& spec, const tensor16& x, int coded_tokens) {
  pk::grouped_spec wide = spec.groups;
  const int d = x.dim;
  std::vector<float> y(x.bits.size());
  for (int h = 0; h < x.heads; ++h) {
    std::vector<float> mean(static_cast<std::size_t>(d), 0.0f);
    for (int c = 0; c < d && wide.centred; ++c) {
      double sum = 0.0;
      for (int t = 0; t < coded_tokens; ++t) sum += x.value(h, t, c);
      mean[static_cast<std::size_t>(c)] = coded_tokens > 0 ? naive_half(static_cast<float>(sum / coded_tokens)) : 0.0f;
    }
    for (int t = 0; t < coded_tokens; ++t) {
      std::vector<float> token;
      for (int c = 0; c < d; ++c) token.push_back(x.value(h, t, c) - mean[static_cast<std::size_t>(c)]);
      if (wide.transform == pk::transform_kind::hadamard) clean::hadamard(token);
      std::copy(token.begin(), token.end(), y.begin() + static_cast<std::ptrdiff_t>(x.at(h, t, 0)));
    }
  }
  // The group of an element, as a number.
  const auto group_of = [&](int h, int t, int c) {
    return wide.axis == pk::group_axis::channel  ? (t / 64 * x.heads + h) * d + c
           : wide.axis == pk::group_axis::vector ? h * x.tokens + t
           : wide.axis == pk::group_axis::token  ? t
                                                 : t / 64;
  };
  const std::size_t count = static_cast<std::size_t>(x.heads) * x.tokens * d;
  std::vector<float> low(count, 1e30f), high(count, -1e30f);
  naive_result r{std::vector<int>(count), std::vector<float>(count)};
  for (int pass = 0; pass < 2; ++pass)
    for (int h = 0; h < x.heads; ++h)
      for (int t = 0; t < coded_tokens; ++t)
        for (int c = 0; c < d; ++c) {
          const std::size_t i = x.at(h, t, c), g = static_cast<std::size_t>(group_of(h, t, c));
          if (pass == 0) {
            low[g] = std::min(low[g], y[i]);
            high[g] = std::max(high[g], y[i]);
            continue;
          }
          naive_group n = naive_bounds(low[g], high[g]);
          n.scale *= spec.relative_step;
          std::tie(r.codes[i], r.y[i]) = naive_adaptive_code(spec.zero, n, y[i]);
          r.code_overflow = r.code_overflow || r.codes[i] > 255;
          r.codes[i] = std::min(r.codes[i], 255);
        }
  return r;
}

/// The narrowest width that holds 0 .. largest.
inline int naive_width(int largest) {
  for (const int w : {0, 1, 2, 3, 4, 8})
    if (largest < (1 << w)) return w;
  return -1;
}

// ---- a decoder from docs/format-grouped.md -------------------------------------------------------------------------

inline float fp16_at(const std::uint8_t* bytes, long long offset) {
  std::uint16_t bits;
  std::memcpy(&bits, bytes + offset, 2);
  return clean::from_fp16(bits);
}

/// One token of a side that was coded with no recent tokens. Of the library only the names of the spec's fields are
/// used.
inline std::vector<float> documented_token(const pk::grouped_spec& spec, const std::uint8_t* bytes, int heads,
                                           int tokens, int h, int token) {
  const bool by_channel = spec.axis == pk::group_axis::channel, by_token = spec.axis == pk::group_axis::token;
  const bool minima = spec.step != pk::step_rule::gaussian;
  const int D = spec.head_dim, w = spec.width, g = spec.group, B = by_channel && g == 128 ? 128 : 64;
  const long long S = by_token || B == 128 ? 0 : by_channel ? 64 / g * D : 64 * (D / g);
  const long long U = by_token ? 64 : B == 128 ? static_cast<long long>(heads) * D : 0;
  const long long tile_size = 8ll * w * D + 2 * S * (minima ? 2 : 1);
  const long long block_size = heads * (B / 64) * tile_size + 2 * U * (minima ? 2 : 1);
  const long long means = spec.centred ? 2ll * heads * D : 0;
  const int coded = tokens / B * B;
  std::vector<float> x;
  if (token >= coded) {
    const long long tail = means + coded / B * block_size + 2ll * ((h * (tokens - coded) + token - coded) * D);
    for (int c = 0; c < D; ++c) x.push_back(fp16_at(bytes, tail + 2 * c));
    return x;
  }
  const long long block = means + token / B * block_size;
  const long long tile = block + (h * (B / 64) + token % B / 64) * tile_size;
  const int t = token % 64, r = t % 8 * 8 + t / 8;
  clean::description f;
  f.of = spec.which == pk::side::key ? clean::side::key : clean::side::value;
  f.head_dim = D;
  f.widths.assign(static_cast<std::size_t>(D / clean::strip_channels(f)), w);
  std::vector<std::uint8_t> words(bytes + tile, bytes + tile + 8 * w * D);
  words.resize(words.size() + 128);  // clean::decode reads the row scales of a plan tile, too
  const std::vector<std::uint16_t> codes = clean::decode(words.data(), f, t).codes;
  const long long numbers = U > 0 ? block + heads * (B / 64) * tile_size : tile + 8 * w * D;
  for (int c = 0; c < D; ++c) {
    const long long index = by_token ? r : !by_channel ? c / g * 64 + r : g == 128 ? h * D + c : t / g * D + c;
    float s = fp16_at(bytes, numbers + 2 * index);
    const float code = static_cast<float>(codes[static_cast<std::size_t>(c)]);
    if (minima) {
      const float m = fp16_at(bytes, numbers + 2 * (S + U + index));
      if (spec.step == pk::step_rule::min_max) s = (s - m) / static_cast<float>((1 << w) - 1);
      const volatile float product = s * code;
      x.push_back(product + m);
    } else {
      x.push_back(s * clean::default_step(w) * (code - static_cast<float>((1 << w) - 1) * 0.5f));
    }
  }
  if (spec.transform == pk::transform_kind::hadamard) clean::hadamard(x);
  for (int c = 0; c < D && spec.centred; ++c) x[static_cast<std::size_t>(c)] += fp16_at(bytes, 2 * (h * D + c));
  return x;
}

/// All formats worth testing at a head dim: axes x groups x widths x rules x transform x centring, thinned at random.
inline pk::grouped_spec random_spec(host_test::random_source& random, pk::side which, int dim) {
  const int widths[] = {1, 2, 3, 4, 8}, token_groups[] = {32, 64, 128}, channel_groups[] = {16, 32, dim};
  const pk::step_rule rules[] = {pk::step_rule::min_max, pk::step_rule::gaussian, pk::step_rule::gaussian_mean};
  const pk::group_axis axes[] = {pk::group_axis::channel, pk::group_axis::vector, pk::group_axis::token};
  const pk::group_axis axis = random.pick(axes);
  const int group = axis == pk::group_axis::channel  ? random.pick(token_groups)
                    : axis == pk::group_axis::vector ? random.pick(channel_groups)
                                                     : 0;
  return pk::make_grouped(which, dim, axis, group, random.pick(widths), random.pick(rules),
                          random.chance(2) ? pk::transform_kind::hadamard : pk::transform_kind::identity,
                          random.chance(3));
}

constexpr pk::group_axis adaptive_axes[] = {pk::group_axis::channel, pk::group_axis::vector, pk::group_axis::token,
                                            pk::group_axis::block};
constexpr pk::pack_zero zero_points[] = {pk::pack_zero::floating, pk::pack_zero::integer};

inline pk::adaptive_spec random_adaptive(host_test::random_source& random, int dim) {
  const float steps[] = {1.0f, 0.4f, 0.2f, 0.1f, 0.05f, 0.01f, 1.0f / 255.0f};
  return pk::make_adaptive(random.chance(2) ? pk::side::key : pk::side::value, dim, random.pick(adaptive_axes),
                           random.pick(steps),
                           random.chance(2) ? pk::transform_kind::hadamard : pk::transform_kind::identity,
                           random.chance(3), random.pick(zero_points));
}

inline std::string describe(const pk::grouped_spec& s) {
  return "side " + std::to_string(static_cast<int>(s.which)) + " axis " + std::to_string(static_cast<int>(s.axis)) +
         " group " + std::to_string(s.group) + " width " + std::to_string(s.width) + " rule " +
         std::to_string(static_cast<int>(s.step)) + " transform " + std::to_string(static_cast<int>(s.transform)) +
         " centred " + std::to_string(s.centred) + " head_dim " + std::to_string(s.head_dim);
}
inline std::string describe(const pk::adaptive_spec& s) {
  return describe(s.groups) + " relative step " + std::to_string(s.relative_step) + " zero point " +
         std::to_string(static_cast<int>(s.zero));
}

}  // namespace grouped_test
