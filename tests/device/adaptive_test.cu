// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <packkv/device/adaptive.cuh>
#include <packkv/reference/strip_adaptive.hpp>

#include "../support/catch.hpp"
#include "sequence_data.hpp"

using namespace packkv_test;

namespace {

constexpr pk::group_axis axes[] = {pk::group_axis::channel, pk::group_axis::vector, pk::group_axis::token,
                                   pk::group_axis::block};
constexpr pk::pack_zero zero_points[] = {pk::pack_zero::floating, pk::pack_zero::integer};

pk::adaptive_spec random_spec(random_source& random, pk::side which, int head_dim) {
  constexpr float steps[] = {1.0f / 255, 0.02f, 0.1f, 0.3f, 1.0f};
  return pk::make_adaptive(which, head_dim, axes[random.between(0, 3)], steps[random.between(0, 4)],
                           random.one_in(2) ? pk::transform_kind::hadamard : pk::transform_kind::identity,
                           random.one_in(2), zero_points[random.between(0, 1)]);
}

/// A side of a sequence, coded by the reference; `device` and `device_offsets` are for the kernels.
struct coded_side {
  pk::adaptive_spec spec;
  tensor_data x;
  std::int64_t recent;
  pk::adaptive_layout layout;
  aligned_bytes bytes;
  std::vector<std::int64_t> offsets;
  pk::device_report report;
  device_array<std::uint8_t> device;
  device_array<std::int64_t> device_offsets;

  coded_side(random_source& random, pk::side which, int head_dim, int heads, int tokens)
      : coded_side(random_spec(random, which, head_dim),
                   random_sequence(random, random.one_in(2) ? pk::dtype::float16 : pk::dtype::bfloat16, heads, tokens,
                                   head_dim),
                   random.between(0, 40)) {}
  coded_side(const pk::adaptive_spec& s, tensor_data data, std::int64_t recent_tokens)
      : spec(s), x(std::move(data)), recent(recent_tokens) {
    require(pk::make_adaptive_layout(spec, x.heads, x.tokens, recent, layout));
    bytes = aligned_bytes(layout.max_bytes);
    offsets.resize(static_cast<std::size_t>(layout.tiles) + 1);
    require(pk::reference::encode_adaptive(spec, sequence(x.host()), recent, bytes.data(), layout.max_bytes,
                                           offsets.data(), report));
    device = device_array<std::uint8_t>(used());
    device_offsets = device_array<std::int64_t>(offsets);
  }
  /// The bytes up to the end of the last tile.
  std::vector<std::uint8_t> used() const { return {bytes.data(), bytes.data() + offsets.back()}; }
  pk::adaptive_view gpu() const {
    return {spec, device.data(), offsets.back(), device_offsets.data(), x.heads, x.tokens, recent, x.type};
  }
  decoded_side decoded() const {
    decoded_side d{x.heads, x.tokens, x.dim, std::vector<float>(static_cast<std::size_t>(x.heads * x.tokens * x.dim))};
    require(pk::reference::decode_adaptive(
        spec, bytes.data(), offsets.back(), offsets.data(), recent,
        pk::make_output<3>(d.x.data(), pk::dtype::float32, {x.heads, x.tokens, x.dim}), x.type));
    return d;
  }
  /// Encodes on the device and compares.
  template <int HeadDim>
  void check_encoder() {
    INFO("axis " << static_cast<int>(spec.groups.axis) << " step " << spec.relative_step << " zero point "
                 << static_cast<int>(spec.zero) << " tokens " << x.tokens);
    device_array<std::uint8_t> out(static_cast<std::size_t>(layout.max_bytes));
    device_array<std::int64_t> out_offsets(offsets.size());
    out.poison();
    device_reporter reporter;
    const auto call = [&] {
      return pk::encode_adaptive<HeadDim>(spec, sequence(x.device()), recent, out.data(), layout.max_bytes,
                                          out_offsets.data(), reporter.exec());
    };
    REQUIRE((HeadDim == 64 ? after_failures(call) : call()));  // several launches, again and again: small calls alone
    CHECK((out_offsets.host() == offsets));
    std::vector<std::uint8_t> expected = used();
    expected.resize(static_cast<std::size_t>(layout.max_bytes), 0xff);  // nothing behind the last tile is touched
    CHECK((out.host() == expected));
    CHECK(reporter.read().flags == report.flags);
  }
};

/// The calls on keys of head dim 128 and values of 64, which must outlive `calls`.
void set_calls(const coded_side& key, const coded_side& value, sequence_calls& calls) {
  calls.key_gemv = [&](auto& q, float scale, auto& scores, auto& e) {
    return pk::adaptive_key_gemv<128>(q, key.gpu(), scale, scores, e);
  };
  calls.value_gemv = [&](auto& w, auto& out, auto& e) { return pk::adaptive_value_gemv<64>(w, value.gpu(), out, e); };
  calls.attention = [&](auto& q, float scale, auto& out, auto& lse, auto& e) {
    return pk::adaptive_attention<128, 64>(q, key.gpu(), value.gpu(), scale, out, lse, e, calls.options);
  };
}

template <class Function>
void for_head_dims(Function&& f) {
  f(std::integral_constant<int, 64>{});
  f(std::integral_constant<int, 96>{});
  f(std::integral_constant<int, 128>{});
  f(std::integral_constant<int, 512>{});
}

}  // namespace

TEST_CASE("strip-adaptive tiles are encoded on the device to the reference's bytes") {
  for (int round = 0; round < sequence_rounds; ++round) {
    const std::uint64_t seed = 500 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    for_head_dims([&](auto dim) {
      for (const pk::side which : {pk::side::key, pk::side::value})
        coded_side(random, which, dim, random.between(1, 3), random.between(1, sequence_tokens))
            .template check_encoder<decltype(dim)::value>();
    });
  }
}

TEST_CASE("strip-adaptive: numbers that cannot be coded give the reference's bytes and reports") {
  random_source random(8);
  for (const auto axis : axes)
    for (const float bad : {NAN, INFINITY, 3e38f, 1e6f, 0.0f}) {
      const auto spec = pk::make_adaptive(pk::side::key, 64, axis, 0.1f);
      tensor_data x = random_sequence(random, pk::dtype::bfloat16, 2, 130, 64);
      for (const int token : {3, 40, 129})  // the last lane, too, has to be asked
        x.host_bits[static_cast<std::size_t>((130 + token) * (x.dim + x.pad) + (std::isnan(bad) ? 63 : 5))] =
            pk::float_to_bfloat16(bad);
      // Another token of the same block overflows, whatever the first ones do.
      x.host_bits[static_cast<std::size_t>(20 * (x.dim + x.pad) + 9)] = pk::float_to_bfloat16(-3e38f);
      x.device_bits.assign(x.host_bits);
      coded_side side(spec, std::move(x), 0);
      INFO("element " << bad);
      side.check_encoder<64>();
      CHECK(((side.report.flags & pk::report_nonfinite_input) != 0) == !std::isfinite(bad));
    }
}

TEST_CASE("strip-adaptive: a code of 256 becomes 255 on the device as in the reference, and is reported") {
  random_source random(19);
  for (const auto axis : axes)
    for (const auto zero : zero_points)
      for (const bool everywhere : {false, true}) {
        // Halves round to even numbers: a group from 0.5 to 255.5 in steps of 1 has the codes 0 and 256.
        tensor_data x(random, pk::dtype::float16, 1, 2, 128, 64);
        const std::int64_t row = x.dim + x.pad;
        for (std::int64_t i = 0; i < 2 * 128 * row; ++i) {
          const bool last = i % row == 63 || i / row % 64 == 63;  // a channel, and a token of each tile
          const bool there = everywhere || i / row == 128 + 127;  // else in the last token of the last head alone
          x.host_bits[static_cast<std::size_t>(i)] = pk::float_to_half(last && there ? 255.5f : 0.5f);
        }
        x.device_bits.assign(x.host_bits);
        coded_side side(
            pk::make_adaptive(pk::side::value, 64, axis, 1.0f / 255, pk::transform_kind::identity, false, zero),
            std::move(x), 0);
        INFO("everywhere " << everywhere);
        // A token whose elements are all 255.5 has steps of 0, if no other element shares them.
        const bool reached = everywhere || axis != pk::group_axis::vector;
        CHECK(side.report.flags == (reached && zero == pk::pack_zero::integer ? pk::report_code_overflow : 0u));
        side.check_encoder<64>();
      }
}

TEST_CASE("strip-adaptive tiles are decoded on the device to the reference's bits") {
  for (int round = 0; round < sequence_rounds; ++round) {
    const std::uint64_t seed = 600 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    for_head_dims([&](auto dim) {
      const coded_side side(random, random.one_in(2) ? pk::side::key : pk::side::value, dim, random.between(1, 3),
                            random.between(1, sequence_tokens));
      tensor_output expected(static_cast<pk::dtype>(random.between(0, 2)), side.x.heads, side.x.tokens, dim);
      REQUIRE(pk::reference::decode_adaptive(side.spec, side.bytes.data(), side.offsets.back(), side.offsets.data(),
                                             side.recent, expected.host(), side.x.type));
      REQUIRE(after_failures(
          [&] { return pk::decode_adaptive<decltype(dim)::value>(side.gpu(), expected.device(), pk::exec{}); }));
      CHECK((expected.device_bytes.host() == expected.host_bytes));
    });
  }
}

TEST_CASE("strip-adaptive: scores, value sums and attention on the device are those of the decoded elements") {
  for (int round = 0; round < sequence_rounds; ++round) {
    const std::uint64_t seed = 700 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    const int heads = random.between(1, 2), tokens = random.between(1, sequence_tokens);
    const coded_side key(random, pk::side::key, 128, heads, tokens), value(random, pk::side::value, 64, heads, tokens);
    sequence_calls calls;
    set_calls(key, value, calls);
    draw_options(random, key.x, value.x, calls);
    check_sequence_calls<64>(random, key.decoded(), value.decoded(), tokens, tokens, calls);
  }
}

TEST_CASE("strip-adaptive: sequences of several splits, with and without 16-bit tokens") {
  random_source random(10);
  constexpr int tokens = 600;
  const coded_side key(random, pk::side::key, 128, 1, tokens), value(random, pk::side::value, 64, 1, tokens);
  sequence_calls calls;
  set_calls(key, value, calls);
  check_sequence_workspace<128, 64>(random, 1, tokens, calls);
  CHECK(pk::policy::make_decode_grid(1, 1, 15, tokens, 0).splits > 1);
  check_sequence_calls<64>(random, key.decoded(), value.decoded(), tokens, 3, calls);
  calls.keys = &key.x;
  calls.values = &value.x;
  calls.options = {sequence(key.x.device()), sequence(value.x.device()), 70, 40, 300};
  check_sequence_calls<64>(random, key.decoded(), value.decoded(), tokens, 3, calls);
}

TEST_CASE("strip-adaptive: tokens of one query alone, and of one lane alone") {
  random_source random(16);
  const auto make = [&](pk::side which, int head_dim) {
    return coded_side(pk::make_adaptive(which, head_dim, pk::group_axis::vector, 0.1f),
                      random_sequence(random, pk::dtype::float16, 1, 65, head_dim), 0);
  };
  const coded_side key = make(pk::side::key, 128), value = make(pk::side::value, 64);
  sequence_calls calls;
  set_calls(key, value, calls);
  check_tile_boundary<64>(random, key.decoded(), value.decoded(), calls);
}

TEST_CASE("strip-adaptive: what lies behind the coded tokens and heads does not reach the coded bytes") {
  random_source random(17);
  for (const auto axis : axes) {
    INFO("axis " << static_cast<int>(axis));
    const auto spec = pk::make_adaptive(pk::side::key, 64, axis, 0.1f);
    tensor_data x = random_sequence(random, pk::dtype::float16, 3, 70, 64);
    const std::int64_t row = x.dim + x.pad;
    for (std::int64_t i = 0; i < 3 * 70 * row; ++i)  // a third head, and a tail
      if (i / row >= 2 * 70 || i / row % 70 >= 64) x.host_bits[static_cast<std::size_t>(i)] = 0x7c00;
    x.device_bits.assign(x.host_bits);
    auto host = sequence(x.host()), device = sequence(x.device());
    host.extent[0] = device.extent[0] = 2;
    pk::adaptive_layout layout;
    REQUIRE(pk::make_adaptive_layout(spec, 2, 70, 0, layout));
    aligned_bytes bytes(layout.max_bytes);
    std::vector<std::int64_t> offsets(3);
    pk::device_report report{};
    REQUIRE(pk::reference::encode_adaptive(spec, host, 0, bytes.data(), layout.max_bytes, offsets.data(), report));
    std::vector<std::uint8_t> expected = bytes.copy();
    expected.resize(static_cast<std::size_t>(offsets[2]));
    expected.resize(static_cast<std::size_t>(layout.max_bytes), 0xff);
    device_array<std::uint8_t> out(expected.size());
    device_array<std::int64_t> out_offsets(std::vector<std::int64_t>(4, -7));
    out.poison();
    device_reporter reporter;
    REQUIRE(
        pk::encode_adaptive<64>(spec, device, 0, out.data(), layout.max_bytes, out_offsets.data(), reporter.exec()));
    offsets.push_back(-7);  // behind the offsets
    CHECK((out_offsets.host() == offsets));
    CHECK((out.host() == expected));
    CHECK(report.flags == 0);
    CHECK(reporter.read().flags == 0);
  }
}

TEST_CASE("strip-adaptive tiles without code words are encoded and read, whatever the codes they begin at") {
  random_source random(18);
  for (const auto axis : axes)
    for (const float low : {1.5f, -2.0f}) {  // of the channels behind the first strip; its own codes are 10, or 0
      tensor_data x(random, pk::dtype::float16, 1, 2, 128, 64);
      for (std::size_t i = 0; i < x.host_bits.size(); ++i)
        x.host_bits[i] = pk::float_to_half(i % static_cast<std::size_t>(x.dim + x.pad) < 16 ? 1.5f : low);
      x.device_bits.assign(x.host_bits);
      coded_side side(pk::make_adaptive(pk::side::value, 64, axis, 0.1f), std::move(x), 0);
      REQUIRE(side.offsets[1] - side.offsets[0] == side.spec.header_bytes() + side.spec.number_bytes());
      side.check_encoder<64>();
      tensor_output decoded(pk::dtype::float32, 2, 128, 64);
      REQUIRE(pk::reference::decode_adaptive(side.spec, side.bytes.data(), side.offsets.back(), side.offsets.data(),
                                             side.recent, decoded.host(), side.x.type));
      device_reporter reporter;
      REQUIRE(pk::decode_adaptive<64>(side.gpu(), decoded.device(), reporter.exec()));
      CHECK(reporter.read().flags == 0);
      CHECK((decoded.device_bytes.host() == decoded.host_bytes));
    }
}

TEST_CASE("strip-adaptive kernels stride over what their grid does not cover") {
  random_source random(11);
  for (const auto axis : axes) {
    INFO("axis " << static_cast<int>(axis));
    const auto spec = pk::make_adaptive(pk::side::key, 64, axis, 0.1f, pk::transform_kind::identity, true);
    tensor_data x = random_sequence(random, pk::dtype::float16, 3, 400, 64);
    for (const int token : {7, 383})  // in the first block and in the last
      x.host_bits[static_cast<std::size_t>((800 + token) * (x.dim + x.pad) + 5)] = 0x7c00;
    x.device_bits.assign(x.host_bits);
    coded_side side(spec, std::move(x), 10);
    REQUIRE(side.layout.tiles == 18);
    std::vector<std::uint8_t> expected = side.used();
    expected.resize(static_cast<std::size_t>(side.layout.max_bytes), 0xff);
    tensor_output decoded(pk::dtype::float32, 3, 400, 64);
    const std::vector<std::uint8_t> untouched = decoded.host_bytes;
    REQUIRE(pk::reference::decode_adaptive(spec, side.bytes.data(), side.offsets.back(), side.offsets.data(),
                                           side.recent, decoded.host(), side.x.type));
    for (const unsigned blocks : {1u, 2u}) {
      INFO(blocks << " blocks");
      device_reporter reporter;
      device_array<std::uint8_t> bytes(expected.size());
      device_array<std::int64_t> offsets(side.offsets.size());
      bytes.poison();
      const auto in = sequence(side.x.device());
      const auto run = [&](auto kernel, int threads, auto... arguments) {
        REQUIRE(pk::detail::launch(kernel, dim3(blocks), threads, cudaStream_t{}, arguments...));
      };
      constexpr int threads = pk::kernel::grouped_warps * 32;
      run(pk::kernel::channel_means<64>, 64, in, side.layout.coded_tokens, bytes.data());
      run(pk::kernel::copy_tail<64>, 64, in, side.layout.coded_tokens, bytes.data() + side.layout.tail_offset);
      const pk::kernel::adaptive_args a{spec, side.layout, in, bytes.data(), offsets.data(), reporter.exec().report};
      if (spec.groups.shared_numbers()) run(pk::kernel::adaptive_shared_numbers<64>, threads, a);
      run(pk::kernel::measure_adaptive<64>, threads, a);
      REQUIRE(pk::detail::launch(pk::kernel::scan_offsets<64>, dim3(1), 64, cudaStream_t{}, offsets.data(),
                                 side.layout.tiles, side.layout.tiles_offset));
      run(pk::kernel::write_adaptive<64>, threads, a);
      CHECK((offsets.host() == side.offsets));
      CHECK((bytes.host() == expected));
      CHECK(reporter.read().flags == side.report.flags);
      pk::warp::adaptive_source source;
      REQUIRE(pk::warp::make_source(side.gpu(), 64, source));
      decoded.device_bytes.assign(untouched);
      run(pk::kernel::sequence_decompress<64, pk::warp::adaptive_source>, pk::kernel::sequence_warps * 32, source,
          pk::detail::as_batch(decoded.device()), std::int64_t{400}, reporter.exec().report);
      CHECK((decoded.device_bytes.host() == decoded.host_bytes));
    }
  }
}

TEST_CASE("strip-adaptive: no tokens, and tokens that all stay 16-bit") {
  random_source random(13);
  struct shape {
    int tokens, recent;
  };
  for (const shape s : {shape{0, 0}, shape{0, 40}, shape{1, 0}, shape{63, 0}, shape{100, 100}, shape{70, 1000}})
    for (const bool centred : {false, true}) {
      INFO("tokens " << s.tokens << " recent " << s.recent << " centred " << centred);
      const auto make = [&](pk::side which, int head_dim) {
        return coded_side(
            pk::make_adaptive(which, head_dim, pk::group_axis::token, 0.1f, pk::transform_kind::hadamard, centred),
            random_sequence(random, pk::dtype::float16, 2, s.tokens, head_dim), s.recent);
      };
      coded_side key = make(pk::side::key, 128), value = make(pk::side::value, 64);
      REQUIRE(key.layout.tiles == 0);
      key.check_encoder<128>();
      value.check_encoder<64>();
      tensor_output decoded(pk::dtype::bfloat16, 2, s.tokens, 64);
      REQUIRE(pk::reference::decode_adaptive(value.spec, value.bytes.data(), value.offsets.back(), value.offsets.data(),
                                             s.recent, decoded.host(), value.x.type));
      REQUIRE(pk::decode_adaptive<64>(value.gpu(), decoded.device(), pk::exec{}));
      CHECK((decoded.device_bytes.host() == decoded.host_bytes));
      sequence_calls calls;
      set_calls(key, value, calls);
      if (s.tokens > 0)
        check_sequence_calls<64>(random, key.decoded(), value.decoded(), s.tokens, s.tokens, calls);
      else
        check_no_tokens<128, 64>(calls);
    }
}

TEST_CASE("damaged strip-adaptive tiles read as NaN, are reported, and nothing outside them is read") {
  random_source random(9);
  const coded_side side(pk::make_adaptive(pk::side::value, 64, pk::group_axis::vector, 0.1f),
                        random_sequence(random, pk::dtype::float16, 1, 192, 64), 0);
  REQUIRE(side.layout.tiles == 3);
  const auto decode = [&](const std::vector<std::uint8_t>& bytes, const std::vector<std::int64_t>& offsets) {
    const device_array<std::uint8_t> device(bytes);
    const device_array<std::int64_t> device_offsets(offsets);
    pk::adaptive_view view = side.gpu();
    view.bytes = device.data();
    view.size = static_cast<std::int64_t>(bytes.size());
    view.offsets = device_offsets.data();
    tensor_output x(pk::dtype::float32, 1, 192, 64);
    device_reporter reporter;
    REQUIRE(pk::decode_adaptive<64>(view, x.device(), reporter.exec()));
    x.fetch();
    int damaged = 0;  // tiles that are NaN throughout
    for (int tile = 0; tile < 3; ++tile) {
      int nans = 0;
      for (int t = 64 * tile; t < 64 * tile + 64; ++t)
        for (int c = 0; c < 64; ++c) nans += std::isnan(x.at(0, t, c)) ? 1 : 0;
      CHECK((nans == 0 || nans == 64 * 64));
      damaged += nans > 0 ? 1 : 0;
    }
    CHECK(reporter.read().flags == (damaged > 0 ? pk::report_tile_damaged : 0u));
    return damaged;
  };
  const std::vector<std::uint8_t> bytes = side.used();
  CHECK(decode(bytes, side.offsets) == 0);
  for (const std::int64_t bad : {std::int64_t{-16}, std::int64_t{1} << 60, side.offsets[1] + 8, side.offsets[1] + 16,
                                 side.offsets[3] + 16, std::int64_t{0}}) {
    std::vector<std::int64_t> offsets = side.offsets;
    offsets[1] = bad;
    INFO("offset " << bad);
    CHECK(decode(bytes, offsets) == 2);  // the tile that begins there and the one that ends there
  }
  for (const int width : {5, 8, 255}) {
    std::vector<std::uint8_t> header = bytes;
    header[static_cast<std::size_t>(side.offsets[1])] = static_cast<std::uint8_t>(width);
    INFO("width " << width);
    CHECK(decode(header, side.offsets) == (bytes[static_cast<std::size_t>(side.offsets[1])] == width ? 0 : 1));
  }
  {  // the last strip of the last tile, in a tile of the size that such a width would have
    std::vector<std::uint8_t> header = bytes;
    std::vector<std::int64_t> offsets = side.offsets;
    pk::strip_widths widths;
    widths.count = side.spec.strip_count();
    for (int i = 0; i < widths.count; ++i) widths.width[i] = header[static_cast<std::size_t>(offsets[2] + i)];
    widths.width[widths.count - 1] = header[static_cast<std::size_t>(offsets[2] + widths.count - 1)] = 5;
    offsets[3] = offsets[2] + side.spec.header_bytes() + side.spec.number_bytes() +
                 pk::make_strips(pk::side::value, 64, widths).words * 4;
    header.resize(static_cast<std::size_t>(offsets[3]));
    CHECK(decode(header, offsets) == 1);
  }
  std::vector<std::uint8_t> cut(bytes.begin(), bytes.end() - 16);
  CHECK(decode(cut, side.offsets) == 1);
}

TEST_CASE("strip-adaptive calls on the device refuse what does not fit, and write nothing") {
  random_source random(12);
  coded_side side(random, pk::side::key, 64, 2, 100);
  const auto before = side.device.host();
  using pk::status_code;
  const pk::exec none{};
  const auto encode = [&](std::int64_t capacity, std::int64_t* offsets, std::uint8_t* bytes) {
    return pk::encode_adaptive<64>(side.spec, sequence(side.x.device()), side.recent, bytes, capacity, offsets, none)
        .code;
  };
  CHECK(encode(side.layout.max_bytes - 1, side.device_offsets.data(), side.device.data()) ==
        status_code::workspace_too_small);
  CHECK(encode(side.layout.max_bytes, nullptr, side.device.data()) == status_code::invalid_argument);
  for (const auto& change : std::vector<std::function<void(pk::adaptive_spec&)>>{
           [](auto& s) { s.zero = static_cast<pk::pack_zero>(2); }, [](auto& s) { s.groups.group += 32; },
           [](auto& s) { s.relative_step = 0.003f; }}) {
    pk::adaptive_spec bad = side.spec;
    change(bad);
    CHECK(pk::encode_adaptive<64>(bad, sequence(side.x.device()), side.recent, side.device.data(),
                                  side.layout.max_bytes, side.device_offsets.data(), none)
              .code == pk::check_adaptive(bad).code);
    CHECK_FALSE(pk::check_adaptive(bad));
  }
  CHECK(encode(side.layout.max_bytes, side.device_offsets.data(), nullptr) == status_code::invalid_argument);
  CHECK(encode(side.layout.max_bytes, side.device_offsets.data(), side.device.data() + 8) == status_code::misaligned);
  CHECK(pk::encode_adaptive<128>(side.spec, sequence(side.x.device()), side.recent, side.device.data(),
                                 side.layout.max_bytes, side.device_offsets.data(), none)
            .code == status_code::shape_mismatch);
  tensor_output x(pk::dtype::float32, 2, 100, 64);
  auto view = side.gpu();
  view.offsets = nullptr;
  CHECK(pk::decode_adaptive<64>(view, x.device(), none).code == status_code::invalid_argument);
  view = side.gpu();
  view.size = side.layout.tiles_offset - 1;
  CHECK(pk::decode_adaptive<64>(view, x.device(), none).code == status_code::corrupt);
  view = side.gpu();
  view.tokens = 99;
  CHECK(!pk::decode_adaptive<64>(view, x.device(), none));
  CHECK((side.device.host() == before));
  CHECK((x.device_bytes.host() == x.host_bytes));
}
