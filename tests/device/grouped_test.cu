// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <packkv/device/grouped.cuh>
#include <packkv/reference/grouped.hpp>

#include "../support/catch.hpp"
#include "sequence_data.hpp"

using namespace packkv_test;

namespace {

/// A random format of one side.
pk::grouped_spec random_spec(random_source& random, pk::side which, int head_dim) {
  constexpr int widths[] = {1, 2, 3, 4, 8}, tokens[] = {32, 64, 128};
  const auto axis = static_cast<pk::group_axis>(random.between(0, 2));
  int group = 0;
  if (axis == pk::group_axis::channel) group = tokens[random.between(0, 2)];
  if (axis == pk::group_axis::vector) {
    do group = 16 * random.between(1, head_dim / 16);
    while (head_dim % group != 0);
  }
  return pk::make_grouped(
      which, head_dim, axis, group, widths[random.between(0, 4)], static_cast<pk::step_rule>(random.between(0, 2)),
      random.one_in(2) ? pk::transform_kind::hadamard : pk::transform_kind::identity, random.one_in(2));
}

/// A side of a sequence, coded by the reference; `device` is memory for the kernels' bytes.
struct coded_side {
  pk::grouped_spec spec;
  tensor_data x;
  std::int64_t recent;
  pk::grouped_layout layout;
  aligned_bytes bytes;
  pk::device_report report;
  device_array<std::uint8_t> device;

  coded_side(random_source& random, pk::side which, int head_dim, int heads, int tokens)
      : coded_side(random_spec(random, which, head_dim),
                   random_sequence(random, random.one_in(2) ? pk::dtype::float16 : pk::dtype::bfloat16, heads, tokens,
                                   head_dim),
                   random.between(0, 40)) {}
  coded_side(const pk::grouped_spec& s, tensor_data data, std::int64_t recent_tokens)
      : spec(s), x(std::move(data)), recent(recent_tokens) {
    require(pk::make_grouped_layout(spec, x.heads, x.tokens, recent, layout));
    bytes = aligned_bytes(layout.total_bytes);
    require(pk::reference::encode_grouped(spec, sequence(x.host()), recent, bytes.data(), layout.total_bytes, report));
    device = device_array<std::uint8_t>(bytes.copy());
  }
  pk::grouped_view gpu() const { return {spec, device.data(), layout.total_bytes, x.heads, x.tokens, recent, x.type}; }
  decoded_side decoded() const {
    decoded_side d{x.heads, x.tokens, x.dim, std::vector<float>(static_cast<std::size_t>(x.heads * x.tokens * x.dim))};
    require(pk::reference::decode_grouped(
        spec, bytes.data(), layout.total_bytes, recent,
        pk::make_output<3>(d.x.data(), pk::dtype::float32, {x.heads, x.tokens, x.dim}), x.type));
    return d;
  }
};

template <int KeyDim, int ValueDim>
struct dims {
  static constexpr int key = KeyDim, value = ValueDim;
};

template <class Function>
void for_dims(Function&& f) {
  f(dims<64, 64>{});
  f(dims<96, 128>{});
  f(dims<256, 192>{});
  f(dims<512, 96>{});
}

/// The calls on these sides, which must outlive `calls`.
template <int KeyDim, int ValueDim>
void set_calls(const coded_side& key, const coded_side& value, sequence_calls& calls) {
  calls.key_gemv = [&](auto& q, float scale, auto& scores, auto& e) {
    return pk::grouped_key_gemv<KeyDim>(q, key.gpu(), scale, scores, e);
  };
  calls.value_gemv = [&](auto& w, auto& out, auto& e) {
    return pk::grouped_value_gemv<ValueDim>(w, value.gpu(), out, e);
  };
  calls.attention = [&](auto& q, float scale, auto& out, auto& lse, auto& e) {
    return pk::grouped_attention<KeyDim, ValueDim>(q, key.gpu(), value.gpu(), scale, out, lse, e, calls.options);
  };
}

int random_tokens(random_source& random) { return random.between(1, sequence_tokens); }

}  // namespace

TEST_CASE("grouped formats are encoded on the device to the reference's bytes") {
  for (int round = 0; round < sequence_rounds; ++round) {
    const std::uint64_t seed = 100 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    for_dims([&](auto d) {
      for (const pk::side which : {pk::side::key, pk::side::value}) {
        constexpr int dim = decltype(d)::key;
        // Fewer tokens of large head dims, whose groups of channels take long on the executor.
        const int tokens = random_tokens(random) * 128 / std::max(dim, 128) + 1;
        coded_side side(random, which, dim, random.between(1, 3), tokens);
        INFO("axis " << static_cast<int>(side.spec.axis) << " group " << side.spec.group << " width " << side.spec.width
                     << " step " << static_cast<int>(side.spec.step) << " tokens " << side.x.tokens);
        device_reporter reporter;
        side.device.poison();
        REQUIRE(after_failures([&] {
          return pk::encode_grouped<dim>(side.spec, sequence(side.x.device()), side.recent, side.device.data(),
                                         side.layout.total_bytes, reporter.exec());
        }));
        CHECK((side.device.host() == side.bytes.copy()));
        CHECK(reporter.read().flags == side.report.flags);
      }
    });
  }
}

TEST_CASE("grouped formats: numbers that cannot be coded give the reference's bytes and reports") {
  random_source random(7);
  for (int axis = 0; axis < 3; ++axis)
    for (int step = 0; step < 3; ++step) {
      const int group = axis == 0 ? 32 : axis == 1 ? 64 : 0;
      for (const float bad : {NAN, -INFINITY, 3e38f, 1e6f, 0.0f, 1e-9f}) {
        const auto spec = pk::make_grouped(pk::side::key, 64, static_cast<pk::group_axis>(axis), group, 2,
                                           static_cast<pk::step_rule>(step));
        tensor_data x = random_sequence(random, pk::dtype::bfloat16, 2, 70, 64);
        for (const int token : {3, 40, 66})  // the last lane, too, has to be asked
          x.host_bits[static_cast<std::size_t>((70 + token) * (x.dim + x.pad) + (std::isnan(bad) ? 63 : 5))] =
              pk::float_to_bfloat16(bad);
        // Another token of the same block overflows, whatever the first ones do.
        x.host_bits[static_cast<std::size_t>(20 * (x.dim + x.pad) + 9)] = pk::float_to_bfloat16(-3e38f);
        x.device_bits.assign(x.host_bits);
        coded_side side(spec, std::move(x), 0);
        INFO("axis " << axis << " step " << step << " element " << bad);
        device_reporter reporter;
        REQUIRE(pk::encode_grouped<64>(spec, sequence(side.x.device()), 0, side.device.data(), side.layout.total_bytes,
                                       reporter.exec()));
        CHECK((side.device.host() == side.bytes.copy()));
        CHECK(reporter.read().flags == side.report.flags);
        CHECK(((side.report.flags & pk::report_nonfinite_input) != 0) == !std::isfinite(bad));
      }
    }
}

TEST_CASE("grouped formats are decoded on the device to the reference's bits") {
  for (int round = 0; round < sequence_rounds; ++round) {
    const std::uint64_t seed = 200 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    for_dims([&](auto d) {
      constexpr int dim = decltype(d)::value;
      const coded_side side(random, random.one_in(2) ? pk::side::key : pk::side::value, dim, random.between(1, 3),
                            random_tokens(random));
      const auto type = static_cast<pk::dtype>(random.between(0, 2));
      tensor_output expected(type, side.x.heads, side.x.tokens, dim);
      REQUIRE(pk::reference::decode_grouped(side.spec, side.bytes.data(), side.layout.total_bytes, side.recent,
                                            expected.host(), side.x.type));
      REQUIRE(after_failures([&] { return pk::decode_grouped<dim>(side.gpu(), expected.device(), pk::exec{}); }));
      CHECK((expected.device_bytes.host() == expected.host_bytes));
    });
  }
}

TEST_CASE("grouped formats: scores, value sums and attention on the device agree with the reference") {
  for (int round = 0; round < sequence_rounds; ++round) {
    const std::uint64_t seed = 300 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    for_dims([&](auto d) {
      constexpr int key_dim = decltype(d)::key, value_dim = decltype(d)::value;
      const int heads = random.between(1, 2), tokens = random_tokens(random);
      const coded_side key(random, pk::side::key, key_dim, heads, tokens),
          value(random, pk::side::value, value_dim, heads, tokens);
      sequence_calls calls;
      set_calls<key_dim, value_dim>(key, value, calls);
      draw_options(random, key.x, value.x, calls);
      check_sequence_calls<value_dim>(random, key.decoded(), value.decoded(), tokens, tokens, calls);
    });
  }
}

TEST_CASE("grouped formats: sequences of several splits, with and without 16-bit tokens") {
  random_source random(12);
  constexpr int tokens = 600;
  const coded_side key(random, pk::side::key, 64, 1, tokens), value(random, pk::side::value, 64, 1, tokens);
  sequence_calls calls;
  set_calls<64, 64>(key, value, calls);
  check_sequence_workspace<64, 64>(random, 1, tokens, calls);
  for (const int window : {0, 300}) {
    CHECK(pk::policy::make_decode_grid(1, 1, 15, tokens, 0).splits > 1);
    check_sequence_calls<64>(random, key.decoded(), value.decoded(), tokens, 3, calls);
    calls.keys = &key.x;
    calls.values = &value.x;
    calls.options = {sequence(key.x.device()), sequence(value.x.device()), 70, 40, window};
  }
  check_sequence_calls<64>(random, key.decoded(), value.decoded(), tokens, 3, calls);
}

TEST_CASE("grouped formats: tokens of one query alone, and of one lane alone") {
  random_source random(16);
  const auto make = [&](pk::side which) {
    return coded_side(pk::make_grouped(which, 64, pk::group_axis::channel, 32, 4, pk::step_rule::min_max),
                      random_sequence(random, pk::dtype::float16, 1, 65, 64), 0);
  };
  const coded_side key = make(pk::side::key), value = make(pk::side::value);
  sequence_calls calls;
  set_calls<64, 64>(key, value, calls);
  check_tile_boundary<64>(random, key.decoded(), value.decoded(), calls);
}

TEST_CASE("grouped formats: what lies behind the coded tokens and heads does not reach the coded bytes") {
  random_source random(17);
  for (const auto axis : {pk::group_axis::channel, pk::group_axis::vector, pk::group_axis::token}) {
    INFO("axis " << static_cast<int>(axis));
    const auto spec =
        pk::make_grouped(pk::side::key, 64, axis, axis == pk::group_axis::token ? 0 : 32, 4, pk::step_rule::min_max);
    tensor_data x = random_sequence(random, pk::dtype::float16, 3, 70, 64);
    const std::int64_t row = x.dim + x.pad;
    for (std::int64_t i = 0; i < 3 * 70 * row; ++i)  // a third head, and a tail
      if (i / row >= 2 * 70 || i / row % 70 >= 64) x.host_bits[static_cast<std::size_t>(i)] = 0x7c00;
    x.device_bits.assign(x.host_bits);
    auto host = sequence(x.host()), device = sequence(x.device());
    host.extent[0] = device.extent[0] = 2;
    pk::grouped_layout layout;
    REQUIRE(pk::make_grouped_layout(spec, 2, 70, 0, layout));
    aligned_bytes bytes(layout.total_bytes);
    pk::device_report report{};
    REQUIRE(pk::reference::encode_grouped(spec, host, 0, bytes.data(), layout.total_bytes, report));
    device_array<std::uint8_t> out(static_cast<std::size_t>(layout.total_bytes));
    device_reporter reporter;
    REQUIRE(pk::encode_grouped<64>(spec, device, 0, out.data(), layout.total_bytes, reporter.exec()));
    CHECK((out.host() == bytes.copy()));
    CHECK(report.flags == 0);
    CHECK(reporter.read().flags == 0);
  }
}

TEST_CASE("grouped kernels stride over what their grid does not cover") {
  random_source random(13);
  for (const auto axis : {pk::group_axis::channel, pk::group_axis::vector, pk::group_axis::token}) {
    INFO("axis " << static_cast<int>(axis));
    const auto spec = pk::make_grouped(pk::side::key, 64, axis, axis == pk::group_axis::token ? 0 : 32, 2,
                                       pk::step_rule::min_max, pk::transform_kind::identity, true);
    tensor_data x = random_sequence(random, pk::dtype::float16, 3, 400, 64);
    for (const int token : {7, 383})  // in the first block and in the last
      x.host_bits[static_cast<std::size_t>((800 + token) * (x.dim + x.pad) + 5)] = 0x7c00;
    x.device_bits.assign(x.host_bits);
    coded_side side(spec, std::move(x), 10);
    REQUIRE(side.layout.blocks == 6);
    std::vector<std::uint8_t> expected = side.bytes.copy();
    expected.resize(expected.size() + 16, 0xff);  // nothing behind the bytes is touched
    tensor_output decoded(pk::dtype::float32, 3, 400, 64);
    const std::vector<std::uint8_t> untouched = decoded.host_bytes;
    REQUIRE(pk::reference::decode_grouped(spec, side.bytes.data(), side.layout.total_bytes, side.recent, decoded.host(),
                                          side.x.type));
    for (const unsigned blocks : {1u, 2u}) {
      INFO(blocks << " blocks");
      device_reporter reporter;
      device_array<std::uint8_t> memory(expected.size());
      memory.poison();
      std::uint8_t* const bytes = memory.data();
      REQUIRE(pk::detail::clear(bytes, static_cast<std::size_t>(side.layout.tail_offset), cudaStream_t{}));
      const auto in = sequence(side.x.device());
      const auto run = [&](auto kernel, int threads, auto... arguments) {
        REQUIRE(pk::detail::launch(kernel, dim3(blocks), threads, cudaStream_t{}, arguments...));
      };
      run(pk::kernel::channel_means<64>, 64, in, side.layout.coded_tokens, bytes);
      run(pk::kernel::copy_tail<64>, 64, in, side.layout.coded_tokens, bytes + side.layout.tail_offset);
      const pk::kernel::grouped_args a{spec, side.layout, in, bytes, reporter.exec().report};
      constexpr int threads = pk::kernel::grouped_warps * 32;
      if (axis == pk::group_axis::channel)
        run(pk::kernel::encode_token_groups<64>, threads, a);
      else
        run(pk::kernel::encode_channel_groups<64>, threads, a);
      CHECK((memory.host() == expected));
      CHECK(reporter.read().flags == side.report.flags);
      pk::warp::grouped_source source;
      REQUIRE(pk::warp::make_source(side.gpu(), 64, source));
      decoded.device_bytes.assign(untouched);
      run(pk::kernel::sequence_decompress<64, pk::warp::grouped_source>, pk::kernel::sequence_warps * 32, source,
          pk::detail::as_batch(decoded.device()), std::int64_t{400}, reporter.exec().report);
      CHECK((decoded.device_bytes.host() == decoded.host_bytes));
    }
  }
}

TEST_CASE("grouped formats: no tokens, and tokens that all stay 16-bit") {
  random_source random(14);
  struct shape {
    int tokens, recent;
  };
  for (const shape s :
       {shape{0, 0}, shape{0, 40}, shape{1, 0}, shape{63, 0}, shape{100, 100}, shape{127, 64}, shape{70, 1000}})
    for (const bool centred : {false, true}) {
      INFO("tokens " << s.tokens << " recent " << s.recent << " centred " << centred);
      const auto make = [&](pk::side which) {
        return coded_side(pk::make_grouped(which, 64, pk::group_axis::vector, 32, 4, pk::step_rule::min_max,
                                           pk::transform_kind::hadamard, centred),
                          random_sequence(random, pk::dtype::float16, 2, s.tokens, 64), s.recent);
      };
      coded_side key = make(pk::side::key), value = make(pk::side::value);
      REQUIRE(key.layout.blocks == 0);
      device_reporter reporter;
      key.device.poison();
      REQUIRE(pk::encode_grouped<64>(key.spec, sequence(key.x.device()), s.recent, key.device.data(),
                                     key.layout.total_bytes, reporter.exec()));
      CHECK((key.device.host() == key.bytes.copy()));
      CHECK(reporter.read().flags == 0);
      tensor_output decoded(pk::dtype::float16, 2, s.tokens, 64);
      REQUIRE(pk::reference::decode_grouped(key.spec, key.bytes.data(), key.layout.total_bytes, s.recent,
                                            decoded.host(), key.x.type));
      REQUIRE(pk::decode_grouped<64>(key.gpu(), decoded.device(), pk::exec{}));
      CHECK((decoded.device_bytes.host() == decoded.host_bytes));
      sequence_calls calls;
      set_calls<64, 64>(key, value, calls);
      if (s.tokens > 0) {
        check_sequence_calls<64>(random, key.decoded(), value.decoded(), s.tokens, s.tokens, calls);
        continue;
      }
      check_no_tokens<64, 64>(calls);
    }
}

TEST_CASE("grouped calls on the device refuse what does not fit, and write nothing") {
  random_source random(11);
  const coded_side key(random, pk::side::key, 64, 2, 100), value(random, pk::side::value, 64, 2, 100);
  tensor_output scores(pk::dtype::float32, 4, 1, 100), out(pk::dtype::float32, 4, 1, 64);
  const tensor_data q(random, pk::dtype::float16, 1, 4, 1, 64), w(random, pk::dtype::float16, 1, 4, 1, 100);
  const pk::exec none{};
  const auto code = [](const pk::status& s) { return s.code; };
  using pk::status_code;
  const auto queries = sequence(q.device()), weights = sequence(w.device());
  auto view = key.gpu();
  view.size -= 16;
  CHECK(code(pk::grouped_key_gemv<64>(queries, view, 1.0f, scores.device(), none)) == status_code::shape_mismatch);
  view = key.gpu();
  view.bytes += 8;
  CHECK(code(pk::grouped_key_gemv<64>(queries, view, 1.0f, scores.device(), none)) == status_code::misaligned);
  CHECK(code(pk::grouped_key_gemv<128>(queries, key.gpu(), 1.0f, scores.device(), none)) ==
        status_code::shape_mismatch);
  CHECK(code(pk::grouped_key_gemv<64>(weights, key.gpu(), 1.0f, scores.device(), none)) == status_code::shape_mismatch);
  CHECK(code(pk::grouped_value_gemv<64>(queries, value.gpu(), out.device(), none)) == status_code::shape_mismatch);
  auto few = queries;
  few.extent[0] = 3;
  CHECK(code(pk::grouped_attention<64, 64>(few, key.gpu(), value.gpu(), 1.0f, out.device(), {}, none)) ==
        status_code::shape_mismatch);
  CHECK(code(pk::grouped_attention<64, 64>(queries, key.gpu(), value.gpu(), -1.0f, out.device(), {}, none)) ==
        status_code::invalid_argument);
  auto shorter = value.gpu();
  shorter.tokens = 99;
  CHECK(!pk::grouped_attention<64, 64>(queries, key.gpu(), shorter, 1.0f, out.device(), {}, none));
  CHECK(code(pk::decode_grouped<64>(key.gpu(), out.device(), none)) == status_code::shape_mismatch);
  CHECK(code(pk::encode_grouped<64>(key.spec, sequence(key.x.device()), key.recent, nullptr, key.layout.total_bytes,
                                    none)) == status_code::invalid_argument);
  CHECK((out.device_bytes.host() == out.host_bytes));
  CHECK((scores.device_bytes.host() == scores.host_bytes));
}
