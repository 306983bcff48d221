// SPDX-License-Identifier: Apache-2.0
// The kernels that unpack packs of 16 tokens: GEMVs must read what decompress reads, whatever widths, order of slots
// and bytes, damaged ones too.
#include <cmath>
#include <functional>
#include <packkv/device/pack_attention.cuh>
#include <string>
#include <vector>

#include "../support/catch.hpp"
#include "pack_batch.hpp"
#include "test_cache.hpp"
#include "workspace.hpp"

using namespace packkv_test;

namespace {

using pk::dtype;
using pk::pack_granularity;
using pk::pack_zero;
using pk::side;
using pk::token_order;

constexpr double ulp = 0x1p-24;

/// Weights or queries of a batch, [batch, heads, length] of float32, float16 or bfloat16.
struct batch_input {
  dtype type;
  std::int64_t extent[3];
  std::vector<float> values;
  device_array<std::uint8_t> bytes;

  template <class Value>
  batch_input(dtype t, std::int64_t b, std::int64_t h, std::int64_t n, Value&& value) : type(t), extent{b, h, n} {
    const auto count = static_cast<std::size_t>(b * h * n), unit = static_cast<std::size_t>(pk::bytes_of(t));
    std::vector<std::uint8_t> stored(count * unit);
    for (std::size_t i = 0; i < count; ++i) {
      void* const to = stored.data() + i * unit;
      pk::detail::store_element(to, t, value(static_cast<std::int64_t>(i)));
      values.push_back(pk::detail::load_element(to, t));
    }
    bytes = device_array<std::uint8_t>(stored);
  }
  pk::input_view<3> device() const { return pk::make_input<3>(bytes.data(), type, {extent[0], extent[1], extent[2]}); }
  double at(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return static_cast<double>(values[static_cast<std::size_t>((b * extent[1] + h) * extent[2] + i)]);
  }
};

dtype any_type(random_source& random) {
  constexpr dtype types[] = {dtype::float32, dtype::float16, dtype::bfloat16};
  return types[random.between(0, 2)];
}

/// Fields of widths 0 to 8, whatever the step: channels from constant ones to such that use all of a token's range.
void fill_widths(random_source& random, pack_tensor& x) {
  x.fill([&](std::int64_t, std::int64_t t, std::int64_t c) {
    if (c == 0) return t % 2 == 0 ? 1.0f : -1.0f;
    const float size = std::exp2(-static_cast<float>(c % 10));
    return size * static_cast<float>(2.0 * random.uniform() - 1.0) + (c % 3 == 0 ? 0.0f : 0.9f * (1.0f - size));
  });
}

/// How many packs there are of each width, 0..8, in the tiles of a side.
std::vector<int> widths_of(const pk::pack_format& f, side which, host_side& s) {
  std::vector<int> count(9);
  for (std::size_t i = 0; i + 1 < s.offsets.size(); ++i) {
    const std::uint8_t* const tile = s.data() + s.offsets[i];
    const pk::pack_tile shape{f.pack_size, f.codec(which).head_dim, tile[0], tile[1]};
    for (int n = 0; n < shape.packs(); ++n) {
      int width = 0;
      for (int bit = 0; bit < shape.width_bits; ++bit) {
        const int at = n * shape.width_bits + bit;
        width |= (tile[shape.widths_offset() + at / 8] >> at % 8 & 1) << bit;
      }
      ++count[static_cast<std::size_t>(width)];
    }
  }
  return count;
}

/// GEMVs of `group` query heads for each KV head against sums in double over what decompress gives for the same bytes:
/// NaN where that has a NaN that counts, and otherwise within what float elements round. Reports must agree.
template <int Dim>
void check_gemvs(pack_case& c, const pk::packs_view& packs, int group, const batch_input& q, const batch_input& w) {
  const pk::pack_format& f = c.format;
  const std::int64_t heads = f.kv_heads * group, tokens = packs.blocks * 64;
  const auto flags = [&] {
    const std::uint32_t found = c.flags();
    c.report.assign(std::vector<pk::device_report>(1));
    return found;
  };
  batch_output k(dtype::float32, f.batch, f.kv_heads, tokens, Dim), v(dtype::float32, f.batch, f.kv_heads, tokens, Dim);
  REQUIRE(after_failures([&] { return pk::decompress<Dim, Dim>(f, packs, k.device(), v.device(), c.exec()); }));
  const std::uint32_t decompressed = flags();
  k.fetch(), v.fetch();
  batch_output scores(dtype::float32, f.batch, heads, 1, tokens), sums(dtype::float32, f.batch, heads, 1, Dim);
  pk::exec e = c.exec();
  const auto grid = pk::policy::make_decode_grid(f.batch, f.kv_heads, group, tokens, 0);
  const device_array<std::uint8_t> workspace = exact_workspace<Dim>(
      grid, pk::sequence_workspace_bytes<Dim>({f.batch, f.kv_heads, heads, 1, std::max<std::int64_t>(tokens, 1), 0}));
  e.workspace = const_cast<std::uint8_t*>(workspace.data());
  e.workspace_bytes = workspace.size();
  REQUIRE(after_failures([&] { return pk::initialize_workspace(e); }));
  constexpr float scale = 0.125f;
  REQUIRE(after_failures([&] { return pk::key_gemv<Dim>(f, packs, q.device(), scale, one_row(scores.device()), e); }));
  std::uint32_t found = flags();
  REQUIRE(after_failures([&] { return pk::value_gemv<Dim>(f, packs, w.device(), one_row(sums.device()), e); }));
  found |= flags();
  CHECK(found == decompressed);
  scores.fetch(), sums.fetch();

  int wrong_scores = 0, wrong_sums = 0;
  const auto agrees = [](float x, double exact, double bound) {
    return std::isnan(exact) ? std::isnan(x)
                             : std::fabs(static_cast<double>(x) - exact) <= bound + ulp * std::fabs(exact);
  };
  // An element is code * scale + offset, rounded twice; neither is larger than this.
  const auto largest = [&](side which, batch_output& x, std::int64_t b, int h, std::int64_t t) {
    const pk::pack_codec& codec = f.codec(which);
    const pk::pack_range range = c.packs(which).ranges[static_cast<std::size_t>(
        (t / 64 * f.batch + b) * pk::range_count(f, which) + pk::range_index(codec, h, static_cast<int>(t % 64), 0))];
    double most = 0.0;
    for (int i = 0; i < Dim; ++i) most = std::fmax(most, std::fabs(static_cast<double>(x.at(b, h, t, i))));
    return most + std::fabs(static_cast<double>(pk::range_value(f.element, range.low)));
  };
  for (std::int64_t b = 0; b < f.batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      std::vector<double> sum(Dim), size(Dim);
      for (std::int64_t t = 0; t < tokens; ++t) {
        double score = 0.0, score_size = 0.0;
        for (int i = 0; i < Dim; ++i) {
          const double term = q.at(b, h, i) * static_cast<double>(k.at(b, h / group, t, i));
          score += term;
          score_size += std::fabs(q.at(b, h, i));
        }
        if (!agrees(scores.at(b, h, 0, t), score * static_cast<double>(scale),
                    8 * ulp * score_size * static_cast<double>(scale) *
                        largest(side::key, k, b, static_cast<int>(h / group), t)))
          ++wrong_scores;
        const double weight = w.at(b, h, t);
        if (weight == 0.0) continue;
        const double range = largest(side::value, v, b, static_cast<int>(h / group), t);
        for (std::size_t i = 0; i < Dim; ++i) {
          sum[i] += weight * static_cast<double>(v.at(b, h / group, t, static_cast<std::int64_t>(i)));
          size[i] += std::fabs(weight) * range;
        }
      }
      for (std::size_t i = 0; i < Dim; ++i)
        if (!agrees(sums.at(b, h, 0, static_cast<std::int64_t>(i)), sum[i], 16 * ulp * size[i])) ++wrong_sums;
    }
  CHECK(wrong_scores == 0);
  CHECK(wrong_sums == 0);
}

/// Packs of 16 tokens with steps of a token or a vector.
pk::pack_format fast_format(random_source& random, int dim, int heads, int batch) {
  const auto side_of = [&] {
    constexpr float steps[] = {0.2f, 0.1f, 0.05f, 0.01f, 0.004f};
    return codec(random.one_in(2) ? pack_granularity::token : pack_granularity::vector,
                 random.one_in(2) ? pack_zero::integer : pack_zero::floating, dim, steps[random.between(0, 4)]);
  };
  const pk::pack_codec key = side_of(), value = side_of();
  return format_of(random.one_in(2) ? token_order::none : token_order::median, 16,
                   random.one_in(2) ? dtype::float16 : dtype::bfloat16, heads, batch, key, value);
}

template <int Dim>
struct dim_of {
  static constexpr int value = Dim;
};
template <class Function>
void for_dims(Function&& f) {
  f(dim_of<64>{});
  f(dim_of<96>{});
  f(dim_of<128>{});
  f(dim_of<192>{});
  f(dim_of<256>{});
}

/// Queries and weights: bell-shaped, some weights 0.
batch_input any_queries(random_source& random, const pack_case& c, int group, int dim) {
  return batch_input(any_type(random), c.format.batch, c.format.kv_heads * group, dim,
                     [&](std::int64_t) { return random.normal(); });
}
batch_input any_weights(random_source& random, const pack_case& c, int group) {
  return batch_input(any_type(random), c.format.batch, c.format.kv_heads * group, c.blocks * 64,
                     [&](std::int64_t) { return random.one_in(8) ? 0.0f : random.normal(); });
}

}  // namespace

TEST_CASE("GEMVs on packs of 16 tokens read what decompress reads, for every head dim, width and group") {
  random_source random(11);
  std::vector<int> widths(9);
  for_dims([&](auto d) {
    constexpr int dim = decltype(d)::value;
    for (int round = 0; round < 2; ++round) {
      const int group = random.between(1, 5);
      pk::pack_format f = fast_format(random, dim, random.between(1, 2), random.between(1, 2));
      if (round == 0) f.key.relative_step = 0.004f;
      pack_case c(f, random.between(1, round == 0 ? 3 : 9), random.one_in(2) ? walk::contiguous : walk::interleaved);
      INFO(name_of(f) << ", group " << group << ", blocks " << c.blocks << ", batch " << f.batch);
      if (round == 0) {
        fill_widths(random, c.keys);
        fill_widths(random, c.values);
      } else {
        c.fill(random);
      }
      REQUIRE(c.compress());
      for (const side which : {side::key, side::value}) {
        const std::vector<int> found = widths_of(f, which, c.packs(which));
        for (std::size_t w = 0; w < 9; ++w) widths[w] += found[w];
      }
      const device_packs packs(c);
      check_gemvs<dim>(c, packs.view(), group, any_queries(random, c, group, dim), any_weights(random, c, group));
    }
  });
  for (const int count : widths) CHECK(count > 0);
}

TEST_CASE("GEMVs on packs agree with decompress whatever the bytes of a tile") {
  random_source random(12);
  int damaged = 0, sound = 0;
  const auto check = [&](auto d) {
    constexpr int dim = decltype(d)::value;
    pk::pack_format f = fast_format(random, dim, 2, 1);
    pack_case c(f, 3);
    fill_widths(random, c.keys);
    c.values.fill([&](std::int64_t, std::int64_t, std::int64_t) { return random.normal(); });
    REQUIRE(c.compress());
    for (const side which : {side::key, side::value}) {
      host_side& s = c.packs(which);
      for (std::size_t tile = 0; tile + 1 < s.offsets.size(); ++tile) {
        std::uint8_t* const data = s.data() + s.offsets[tile];
        const std::int64_t bytes = s.offsets[tile + 1] - s.offsets[tile];
        const pk::pack_tile shape{16, dim, data[0], data[1]};
        // What is left alone, header, starts, widths, minima, payload, a range, any byte.
        const int parts[] = {-1, 0, 4, shape.widths_offset(), shape.minima_offset(), shape.payload_offset(), -2, -3};
        const int which_part = random.between(0, 7), part = parts[which_part];
        if (part == -2) {
          const auto range = static_cast<std::size_t>(
              static_cast<std::int64_t>(tile) / 2 * pk::range_count(f, which) +
              pk::range_index(f.codec(which), static_cast<int>(tile % 2), random.between(0, 63), 0));
          s.ranges[range] = random.one_in(2) ? pk::pack_range{0x7fff, 0x7fff}
                                             : pk::pack_range{pk::range_bits(f.element, 3.0f * random.normal()),
                                                              pk::range_bits(f.element, 3.0f * random.normal())};
        } else if (part != -1) {
          const int end = part == -3 || which_part == 5 ? static_cast<int>(bytes) : parts[which_part + 1];
          const int at = part == -3 ? random.between(0, end - 1) : random.between(part, std::max(part, end - 1));
          data[std::min<std::int64_t>(at, bytes - 1)] ^= static_cast<std::uint8_t>(1 << random.between(0, 7));
        }
      }
    }
    const device_packs packs(c);
    const int group = random.between(1, 3);
    INFO(name_of(f) << ", group " << group);
    check_gemvs<dim>(c, packs.view(), group, any_queries(random, c, group, dim), any_weights(random, c, group));
    (pk::reference::check_packs(f, host_view(c)) ? sound : damaged) += 1;
  };
  for (int round = 0; round < (repeats > 1 ? 40 : 8); ++round) {
    check(dim_of<64>{});
    check(dim_of<128>{});
  }
  for_dims(check);
  CHECK(damaged > 0);
}

TEST_CASE("a minimum and a field that together are above 255 wrap, as in decompress") {
  random_source random(13);
  pk::pack_format f = fast_format(random, 64, 1, 1);
  f.key.relative_step = f.value.relative_step = 0.004f;
  pack_case c(f, 2);
  const auto high = [&](std::int64_t, std::int64_t t, std::int64_t i) {
    return i < 2 ? (i == 0 ? 1.0f : -1.0f) : 0.99f - 0.01f * static_cast<float>(t * i % 5);
  };
  c.keys.fill(high);
  c.values.fill(high);
  REQUIRE(c.compress());
  int raised = 0;
  for (const side which : {side::key, side::value}) {
    host_side& s = c.packs(which);
    for (std::size_t tile = 0; tile + 1 < s.offsets.size(); ++tile) {
      std::uint8_t* const data = s.data() + s.offsets[tile];
      const pk::pack_tile shape{16, 64, data[0], data[1]};
      if (shape.min_bits != 8) continue;
      for (int i = shape.minima_offset(); i < shape.payload_offset(); ++i) data[i] = 0xff;
      ++raised;
    }
  }
  CHECK(raised > 0);
  const device_packs packs(c);
  check_gemvs<64>(c, packs.view(), 1, any_queries(random, c, 1, 64), any_weights(random, c, 1));
}

TEST_CASE("weights of packs may have any size, and grow and shrink from tile to tile") {
  random_source random(14);
  for (const pack_zero zero : {pack_zero::integer, pack_zero::floating})
    for (const float step : {1e-6f, 1.0f, 64.0f}) {
      pk::pack_format f = fast_format(random, 64, 1, 1);
      f.value.zero = zero;
      pack_case c(f, 40);
      c.fill(random);
      REQUIRE(c.compress());
      const device_packs packs(c);
      const batch_input w(dtype::float32, 1, 3, c.blocks * 64, [&](std::int64_t i) {
        const auto tile = static_cast<float>(i % (c.blocks * 64) / 64);
        const float size = i / (c.blocks * 64) == 0   ? std::exp2(tile - 20.0f)
                           : i / (c.blocks * 64) == 1 ? std::exp2(-3.0f * tile)
                                                      : 1.0f;
        return step * size * random.normal();
      });
      check_gemvs<64>(c, packs.view(), 3, any_queries(random, c, 3, 64), w);
    }
}

TEST_CASE("queries and weights on packs that are not finite give NaN in their own rows alone") {
  random_source random(15);
  pack_case c(fast_format(random, 128, 1, 1), 2);
  c.fill(random);
  REQUIRE(c.compress());
  const device_packs packs(c);
  for (const float bad : {INFINITY, -INFINITY, static_cast<float>(NAN)}) {
    const batch_input q(dtype::float32, 1, 4, 128,
                        [&](std::int64_t i) { return i == 128 + 77 ? bad : random.normal(); });
    const batch_input w(dtype::float32, 1, 4, 128,
                        [&](std::int64_t i) { return i == 128 + 77 ? bad : random.normal(); });
    batch_output scores(dtype::float32, 1, 4, 1, 128), sums(dtype::float32, 1, 4, 1, 128);
    REQUIRE(pk::key_gemv<128>(c.format, packs.view(), q.device(), 1.0f, one_row(scores.device()), c.exec()));
    REQUIRE(pk::value_gemv<128>(c.format, packs.view(), w.device(), one_row(sums.device()), c.exec()));
    scores.fetch(), sums.fetch();
    int wrong = 0;
    for (int h = 0; h < 4; ++h)
      for (int i = 0; i < 128; ++i)
        wrong += (std::isnan(scores.at(0, h, 0, i)) != (h == 1)) + (std::isnan(sums.at(0, h, 0, i)) != (h == 1));
    CHECK(wrong == 0);
  }
}

TEST_CASE("packs that every lane copies, as before sm_90, give the bits of those that the copy engine brings") {
  random_source random(17);
  using engine = pk::warp::copy_engine;
  pack_case c(fast_format(random, 64, 2, 1), 11, walk::contiguous, 5);
  c.fill(random);
  REQUIRE(c.compress());
  const device_packs packs(c);
  const auto view = packs.view();
  const tensor_data q(random, dtype::float16, 1, 6, 1, 64), w(random, dtype::float16, 1, 6, 1, 11 * 64);
  const auto run = [&](auto which) {
    constexpr engine e = decltype(which)::value;
    batch_output scores(dtype::float32, 1, 6, 1, 11 * 64), sums(dtype::float32, 1, 6, 1, 64),
        out(dtype::float32, 1, 6, 1, 64);
    pk::exec x = c.exec();
    device_array<std::uint8_t> workspace(
        static_cast<std::size_t>(pk::sequence_workspace_bytes<64>({1, 2, 6, 1, 11 * 64 + 5, 0})));
    x.workspace = workspace.data();
    x.workspace_bytes = workspace.size();
    REQUIRE(pk::initialize_workspace(x));
    const auto keys = pk::detail::pack_side_source(c.format, side::key, view, tail_of(c, c.keys.device())),
               values = pk::detail::pack_side_source(c.format, side::value, view, tail_of(c, c.values.device()));
    REQUIRE(pk::detail::launch_pack_key_gemv<64, e>(keys, q.device(), 2, 1.0f, scores.device(), x));
    REQUIRE(pk::detail::launch_pack_value_gemv<64, e>(values, w.device(), 2, sums.device(), x));
    REQUIRE(pk::detail::launch_pack_attention<64, 64, e>(keys, values, q.device(), 2, 0.1f, out.device(), {}, x));
    std::vector<std::uint8_t> bytes;
    for (batch_output* o : {&scores, &sums, &out}) {
      o->fetch();
      bytes.insert(bytes.end(), o->host_bytes.begin(), o->host_bytes.end());
    }
    return bytes;
  };
  const auto expected = run(std::integral_constant<engine, engine::best>{});
  CHECK(run(std::integral_constant<engine, engine::per_thread>{}) == expected);
}

TEST_CASE("packs without blocks have no scores, and sums of 0") {
  random_source random(16);
  pack_case c(fast_format(random, 64, 2, 1), 0);
  REQUIRE(c.compress());
  const device_packs none(c);
  batch_output scores(dtype::float32, 1, 2, 1, 0), sums(dtype::float32, 1, 2, 1, 64);
  const batch_input q = any_queries(random, c, 1, 64), w = any_weights(random, c, 1);
  REQUIRE(pk::value_gemv<64>(c.format, none.view(), w.device(), one_row(sums.device()), c.exec()));
  sums.fetch();
  int wrong = 0;
  for (int h = 0; h < 2; ++h)
    for (int i = 0; i < 64; ++i) wrong += sums.at(0, h, 0, i) != 0.0f;
  CHECK(wrong == 0);
}
