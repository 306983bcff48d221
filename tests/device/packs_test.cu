// SPDX-License-Identifier: Apache-2.0
// Packs on the device: the bytes of the reference's compress, and tiles read by a warp, sound or damaged.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <packkv/device/packs.cuh>
#include <packkv/reference/packs.hpp>
#include <packkv/warp/pack_tokens.cuh>
#include <string>
#include <vector>

#include "../support/catch.hpp"
#include "pack_data.hpp"

using namespace packkv_test;
namespace pk = packkv;

namespace {

using pk::dtype;
using pk::pack_granularity;
using pk::pack_zero;
using pk::side;
using pk::token_order;

/// The order's buffer, filled as the reference did or to be filled.
struct device_order {
  device_array<std::uint8_t> slots;
  pk::pack_order order;

  explicit device_order(const pack_case& c) : slots(c.order) {
    if (c.format.order == token_order::greedy) {
      order.given = slots.data();
    } else {
      slots.poison();
      order.computed = slots.data();
    }
  }
};

/// Every slot of every tile of a side, twice: ascending, and again every fifth. out [tiles][64][HeadDim].
template <int HeadDim>
__global__ void read_tiles(const __grid_constant__ pk::warp::pack_source source, float* out, float* some,
                           std::uint32_t* flags) {
  const pk::pack_format& f = source.format;
  const std::int64_t number = blockIdx.x, row = number / f.kv_heads;
  std::uint32_t found = 0;
  float y[HeadDim / 32];
  {
    pk::warp::pack_source::reader<HeadDim> tile(source, row % f.batch, static_cast<int>(number % f.kv_heads),
                                                row / f.batch, found);
    for (int slot = 0; slot < 64; ++slot) {
      tile.load(slot, y);
      for (int i = 0; i < HeadDim / 32; ++i) out[(number * 64 + slot) * HeadDim + threadIdx.x + 32 * i] = y[i];
    }
  }
  pk::warp::pack_source::reader<HeadDim> tile(source, row % f.batch, static_cast<int>(number % f.kv_heads),
                                              row / f.batch, found);
  for (int slot = 3; slot < 64; slot += 5) {
    tile.load(slot, y);
    for (int i = 0; i < HeadDim / 32; ++i) some[(number * 64 + slot) * HeadDim + threadIdx.x + 32 * i] = y[i];
  }
  if (threadIdx.x == 31) flags[number] = found;  // the flag is set in every lane
}

struct tiles_read {
  std::vector<float> all, some;
  std::vector<std::uint32_t> flags;
};

tiles_read read(const pk::pack_format& f, side which, const pk::const_pack_side& packs, std::int64_t blocks) {
  const std::int64_t tiles = pk::tile_count(f, blocks);
  const int dim = f.codec(which).head_dim;
  device_array<float> out(static_cast<std::size_t>(tiles * 64 * dim)), some(out.size());
  device_array<std::uint32_t> flags(static_cast<std::size_t>(tiles));
  some.poison();
  pk::warp::pack_source source;
  source.format = f;
  source.which = which;
  source.packs = packs;
  source.blocks = blocks;
  const dim3 grid(static_cast<unsigned>(tiles));
  const auto run = [&](auto kernel) {
    REQUIRE(pk::detail::launch(kernel, grid, 32, cudaStream_t{}, source, out.data(), some.data(), flags.data()));
  };
  switch (dim) {
    case 64:
      run(read_tiles<64>);
      break;
    case 96:
      run(read_tiles<96>);
      break;
    case 128:
      run(read_tiles<128>);
      break;
    case 256:
      run(read_tiles<256>);
      break;
    default:
      run(read_tiles<512>);
  }
  return {out.host(), some.host(), flags.host()};
}

/// The reconstruction of tile `number` from checked bytes, [64][D].
std::vector<float> decoded(const pk::pack_format& f, side which, const pk::const_pack_side& packs,
                           std::int64_t number) {
  const pk::pack_codec& c = f.codec(which);
  const pk::pack_range* const ranges = packs.ranges + number / f.kv_heads * pk::range_count(f, which);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(64 * c.head_dim));
  pk::reference::decode_pack_tile(f.pack_size, c.head_dim, packs.data + packs.offsets[number], codes.data());
  std::vector<float> x;
  for (int i = 0; i < 64 * c.head_dim; ++i) {
    const pk::pack_range r =
        ranges[pk::range_index(c, static_cast<int>(number % f.kv_heads), i / c.head_dim, i % c.head_dim)];
    const pk::pack_step step =
        pk::make_pack_step(c, pk::range_value(f.element, r.low), pk::range_value(f.element, r.high));
    x.push_back(pk::decode_code(c, step, codes[static_cast<std::size_t>(i)]));
  }
  return x;
}

/// Whether tile `number` was read as `expected`, both times; empty: as NaN.
bool reads_as(const tiles_read& got, std::int64_t number, int dim, const std::vector<float>& expected) {
  if ((got.flags[static_cast<std::size_t>(number)] == pk::report_tile_damaged) != expected.empty()) return false;
  for (int i = 0; i < 64 * dim; ++i) {
    const std::size_t at = static_cast<std::size_t>(number * 64 * dim + i);
    const auto wrong = [&](float x) {
      return expected.empty() ? !pk::detail::is_nan(x) : bits_of(x) != bits_of(expected[static_cast<std::size_t>(i)]);
    };
    if (wrong(got.all[at]) || (i / dim % 5 == 3 && wrong(got.some[at]))) return false;
  }
  return true;
}

/// Compresses on the device and compares everything with the reference.
void check_compress(pack_case& c) {
  device_side key(c.format, side::key, c.blocks), value(c.format, side::value, c.blocks);
  device_order order(c);
  REQUIRE(after_failures([&] {
    return pk::compress(c.format, c.keys.device(), c.values.device(), c.blocks, key.out(), value.out(), order.order,
                        c.exec());
  }));
  CHECK(order.slots.host() == c.order);
  CHECK(key.equals(c.key));
  CHECK(value.equals(c.value));
  CHECK(c.flags() == 0);
}

/// Reads the reference's packs.
void check_read(pack_case& c) {
  for (const side which : {side::key, side::value}) {
    const device_side packs(c.packs(which));
    const tiles_read got = read(c.format, which, packs.in(), c.blocks);
    for (std::int64_t i = 0; i < pk::tile_count(c.format, c.blocks); ++i)
      CHECK(reads_as(got, i, c.format.codec(which).head_dim, decoded(c.format, which, c.packs(which).in(), i)));
  }
}

}  // namespace

TEST_CASE("offsets are the sums of the sizes before them, for counts around the chunks of the scan") {
  random_source random(11);
  for (const std::int64_t first : {0, 48})
    for (const int count : {0, 1, 31, 32, 33, 255, 256, 257, 511, 512, 513, 700}) {
      std::vector<std::int64_t> offsets{-1}, expected{first};
      for (int i = 0; i < count; ++i) {
        offsets.push_back(std::int64_t{random.between(0, 1000)} << random.between(0, 40));
        expected.push_back(expected.back() + offsets.back());
      }
      if (first != 0) {  // behind the array, which ends with its memory otherwise
        offsets.push_back(-7);
        expected.push_back(-7);
      }
      device_array<std::int64_t> device(offsets);
      REQUIRE(pk::detail::launch(pk::kernel::scan_offsets<pk::kernel::scan_threads>, dim3(1), pk::kernel::scan_threads,
                                 cudaStream_t{}, device.data(), std::int64_t{count}, first));
      INFO(count);
      CHECK(device.host() == expected);
    }
}

TEST_CASE("packs compressed on the device are the reference's bytes, and nothing else is touched") {
  random_source random(1);
  std::vector<example> all = examples();
  for (int i = 0; i < random_examples; ++i) all.push_back(random_example(random));
  for (const example& e : all) {
    INFO(name_of(e.format));
    pack_case c(e.format, e.blocks, e.how, 7);
    c.fill(random);
    REQUIRE(c.compress());
    check_compress(c);
  }
}

TEST_CASE("codes up to 255 in the median order, and tiles without a payload") {
  random_source random(12);
  {  // tokens whose medians are spread over all codes
    const pk::pack_codec all = codec(pack_granularity::block, pack_zero::floating, 64, 1.0f / 255.0f);
    pack_case c(format_of(token_order::median, 16, dtype::float16, 2, 1, all, all), 1);
    for (pack_tensor* x : {&c.keys, &c.values})
      x->fill([&](std::int64_t, std::int64_t t, std::int64_t) {
        return static_cast<float>((63 - t) * 37 % 64 * 4) + 3.0f * static_cast<float>(random.uniform());
      });
    REQUIRE(c.compress());
    check_compress(c);
    check_read(c);
  }
  {  // a minimum of one bit a channel, and packs of width 0: the minima end with the tile
    const pk::pack_codec flat = codec(pack_granularity::block, pack_zero::floating, 96, 1.0f);
    pack_case c(format_of(token_order::median, 32, dtype::float16, 1, 1, flat, flat), 1);
    for (pack_tensor* x : {&c.keys, &c.values})
      x->fill([](std::int64_t, std::int64_t, std::int64_t channel) { return channel % 5 == 1 ? 2.0f : 1.0f; });
    REQUIRE(c.compress());
    REQUIRE(c.key.offsets[1] == pk::pack_tile{32, 96, 1, 0}.payload_offset());
    check_compress(c);
    check_read(c);
  }
}

TEST_CASE("an order that is not asked for is not needed, and the reference's orders can be had alone") {
  random_source random(2);
  pk::pack_format f;
  f.order = token_order::none;
  f.key.head_dim = f.value.head_dim = 64;
  pack_case c(f, 1);
  c.fill(random);
  REQUIRE(c.compress());
  device_side key(f, side::key, 1), value(f, side::value, 1);
  REQUIRE(pk::compress(f, c.keys.device(), c.values.device(), 1, key.out(), value.out(), {}, c.exec()));
  CHECK(key.equals(c.key));
  CHECK(value.equals(c.value));
  for (const token_order o : {token_order::median, token_order::greedy}) {
    c.format.order = o;
    REQUIRE(c.compress());
    std::vector<std::uint8_t> order(64);
    REQUIRE(pk::reference::token_orders(c.format, c.keys.host(), c.values.host(), 1, order.data()));
    CHECK(order == c.order);
  }
}

TEST_CASE("kernels of packs stride over what their grid does not cover") {
  random_source random(3);
  const example e = examples()[3];
  const pk::pack_format& f = e.format;
  pack_case c(f, e.blocks, e.how);
  c.fill(random);
  REQUIRE(c.compress());
  device_side key(f, side::key, e.blocks), value(f, side::value, e.blocks);
  device_array<std::uint8_t> order(c.order.size());
  const pk::kernel::pack_args k{f, side::key, c.keys.device(), key.out(), e.blocks, order.data(), c.report.data()};
  const pk::kernel::pack_args v{f,        side::value,  c.values.device(), value.out(),
                                e.blocks, order.data(), c.report.data()};
  constexpr int warps = 2, threads = 32 * warps;
  const auto run = [&](auto kernel, const pk::kernel::pack_args& a, int shared_bytes) {
    REQUIRE(pk::detail::launch(kernel, dim3(1), pk::detail::block_size(threads, shared_bytes), cudaStream_t{}, a));
  };
  run(pk::kernel::find_pack_ranges<warps>, k, 0);
  run(pk::kernel::find_pack_ranges<warps>, v, 0);
  REQUIRE(pk::detail::launch(pk::kernel::order_packs<warps>, dim3(1), threads, cudaStream_t{}, v, order.data()));
  run(pk::kernel::check_pack_order<warps>, v, 0);
  run(pk::kernel::move_pack_ranges<warps>, v, 0);  // the keys' ranges are those of channels
  for (const pk::kernel::pack_args& a : {k, v}) {
    run(pk::kernel::measure_packs<warps>, a, 64 * f.codec(a.which).head_dim);
    REQUIRE(pk::detail::launch(pk::kernel::scan_offsets<threads>, dim3(1), threads, cudaStream_t{}, a.out.offsets,
                               pk::tile_count(f, e.blocks), std::int64_t{0}));
    run(pk::kernel::write_packs<warps>, a, 64 * f.codec(a.which).head_dim);
  }
  CHECK(key.equals(c.key));
  CHECK(value.equals(c.value));
  CHECK(c.flags() == 0);
}

TEST_CASE("groups that the reference refuses are reported, and read as NaN or with their codes at most 255") {
  random_source random(4);
  const auto run = [&](pack_case& c, device_side& key, device_side& value) {
    REQUIRE(pk::compress(c.format, c.keys.device(), c.values.device(), 1, key.out(), value.out(), {}, c.exec()));
    for (const side which : {side::key, side::value}) {  // all tiles are sound
      const device_side& s = which == side::key ? key : value;
      for (const std::uint32_t flag : read(c.format, which, s.in(), 1).flags) CHECK(flag == 0);
    }
  };
  const auto codecs = [](float r) {
    return format_of(token_order::none, 16, dtype::bfloat16, 2, 1,
                     codec(pack_granularity::vector, pack_zero::integer, 64, r),
                     codec(pack_granularity::channel, pack_zero::floating, 64, r));
  };
  struct damage {
    float first, second;  // of group 5 of head 1: token 5, channel 5
    std::uint32_t flag;
  };
  for (const damage d :
       {damage{NAN, 1.0f, pk::report_nonfinite_input}, damage{-INFINITY, 0.0f, pk::report_nonfinite_input},
        damage{INFINITY, 0.0f, pk::report_nonfinite_input}, damage{-3e38f, 3e38f, pk::report_scale_overflow}}) {
    const pk::pack_format f = codecs(0.1f);
    pack_case c(f, 1);
    c.fill(random);
    for (int i = 0; i < 64; ++i) {  // the reference: a group of zeros, whose range is exchanged
      c.keys.set(0, 1, 5, i, 0.0f);
      c.values.set(0, 1, i, 5, 0.0f);
    }
    REQUIRE(c.compress());
    c.key.ranges[64 + 5] = c.value.ranges[64 + 5] = {0x7fff, 0x7fff};
    for (pack_tensor* x : {&c.keys, &c.values}) {
      const bool keys = x == &c.keys;
      for (int i = 0; i < 64; ++i) x->set(0, 1, keys ? 5 : i, keys ? i : 5, random.normal());
      x->set(0, 1, keys ? 5 : 60, keys ? 60 : 5, d.first);
      x->set(0, 1, keys ? 5 : 61, keys ? 61 : 5, d.second);
      x->upload();
    }
    device_side key(f, side::key, 1), value(f, side::value, 1);
    run(c, key, value);
    CHECK(key.equals(c.key));
    CHECK(value.equals(c.value));
    CHECK(c.flags() == d.flag);
    for (const side which : {side::key, side::value}) {
      const tiles_read got = read(f, which, (which == side::key ? key : value).in(), 1);
      bool right = true;
      for (int i = 0; i < 2 * 64 * 64; ++i) {
        const bool group = i >= 64 * 64 && (which == side::key ? i / 64 % 64 : i % 64) == 5;
        right = right && pk::detail::is_nan(got.all[static_cast<std::size_t>(i)]) == group;
      }
      CHECK(right);
    }
  }
  {
    const pk::pack_format f = codecs(0.003f);
    pack_case c(f, 1);
    c.fill(random);
    CHECK(c.compress().code == pk::status_code::unsupported);
    device_side key(f, side::key, 1), value(f, side::value, 1);
    run(c, key, value);
    CHECK(c.flags() == pk::report_code_overflow);
    for (const side which : {side::key, side::value}) {
      const device_side& packs = which == side::key ? key : value;
      const auto ranges = packs.ranges.host();
      const tiles_read got = read(f, which, packs.in(), 1);
      bool right = true, clamped = false;
      for (int i = 0; i < 2 * 64 * 64; ++i) {
        const int h = i / 4096, t = i / 64 % 64, channel = i % 64;
        const pk::pack_range r = ranges[static_cast<std::size_t>(pk::range_index(f.codec(which), h, t, channel))];
        const pk::pack_step s =
            pk::make_pack_step(f.codec(which), pk::bfloat16_to_float(r.low), pk::bfloat16_to_float(r.high));
        const float code =
            pk::encode_code(f.codec(which), s, pk::bfloat16_to_float(c.tensor(which).at(0, h, t, channel)));
        clamped = clamped || code > 255.0f;
        const float x = pk::decode_code(f.codec(which), s, code > 255.0f ? 255 : static_cast<int>(code));
        right = right && bits_of(got.all[static_cast<std::size_t>(i)]) == bits_of(x);
      }
      CHECK(right);
      CHECK(clamped);
    }
  }
}

TEST_CASE("an order that is no permutation is reported, and its entries are taken modulo 64") {
  random_source random(5);
  pk::pack_format f;
  f.key.head_dim = f.value.head_dim = 64;
  f.kv_heads = 2;
  pack_case c(f, 2);
  c.fill(random);
  REQUIRE(c.compress());
  for (const int wrong : {0, 1, 2}) {
    std::vector<std::uint8_t> slots = c.order;
    if (wrong == 1) slots[64 + 3] = slots[64 + 40];                                  // one token twice
    if (wrong == 2) slots[64 + 3] = static_cast<std::uint8_t>(192 + slots[64 + 3]);  // the same modulo 64
    c.report.assign(std::vector<pk::device_report>(1));
    const device_array<std::uint8_t> device(slots);
    device_side key(f, side::key, 2), value(f, side::value, 2);
    REQUIRE(pk::compress(f, c.keys.device(), c.values.device(), 2, key.out(), value.out(), {device.data(), nullptr},
                         c.exec()));
    CHECK(key.equals(c.key) == (wrong != 1));
    CHECK(value.equals(c.value) == (wrong != 1));
    CHECK(c.flags() == (wrong != 0 ? pk::report_order_invalid : 0u));
  }
}

TEST_CASE("a refused compress of packs launches nothing") {
  random_source random(6);
  pk::pack_format good;
  good.order = token_order::median;
  good.key.head_dim = 64;
  good.value.head_dim = 96;
  pack_case c(good, 1);
  c.fill(random);
  device_side key(good, side::key, 1), value(good, side::value, 1);
  device_array<std::uint8_t> slots(64);
  struct arguments {
    pk::pack_format f;
    pk::input_view<4> keys, values;
    std::int64_t blocks;
    pk::pack_side key, value;
    pk::pack_order order;
  };
  const auto refused = [&](auto change) {
    arguments a{good, c.keys.device(), c.values.device(), 1, key.out(), value.out(), {nullptr, slots.data()}};
    change(a);
    return pk::compress(a.f, a.keys, a.values, a.blocks, a.key, a.value, a.order, c.exec());
  };
  using code = pk::status_code;
  CHECK(refused([](arguments& a) { a.f.pack_size = 12; }).code == code::invalid_argument);
  CHECK(refused([](arguments& a) { a.blocks = -1; }).code == code::invalid_argument);
  CHECK(refused([](arguments& a) { a.blocks = 2; }).code == code::shape_mismatch);
  CHECK(refused([](arguments& a) { a.keys.extent[3] = 96; }).code == code::shape_mismatch);
  CHECK(refused([](arguments& a) { a.values.type = dtype::bfloat16; }).code == code::invalid_argument);
  CHECK(refused([](arguments& a) { a.key.ranges = nullptr; }).code == code::invalid_argument);
  CHECK(refused([](arguments& a) { a.value.data += 8; }).code == code::misaligned);
  for (const side which : {side::key, side::value}) {
    const pk::status s = refused([&](arguments& a) { (which == side::key ? a.key : a.value).capacity -= 1; });
    CHECK(s.code == code::overflow);
    CHECK(s.detail == pk::max_pack_bytes(good, which, 1));
  }
  CHECK(refused([](arguments& a) { a.order.computed = nullptr; }).code == code::invalid_argument);
  CHECK(refused([](arguments& a) { a.order.given = a.order.computed; }).code == code::invalid_argument);
  CHECK(refused([](arguments& a) { a.f.order = token_order::greedy, a.order = {}; }).code == code::invalid_argument);
  CHECK(refused([](arguments& a) {
          a.f.order = token_order::greedy;
          a.order.given = a.order.computed;
        }).code == code::invalid_argument);
  CHECK(refused([](arguments& a) {
          a.f.order = token_order::none;
          a.order.given = a.order.computed;
        }).code == code::invalid_argument);

  std::vector<std::uint8_t> orders(64);
  CHECK(!pk::reference::token_orders(good, c.values.host(), c.values.host(), 1, orders.data()));
  CHECK(!pk::reference::token_orders(good, c.keys.host(), c.values.host(), 1, nullptr));

  CHECK(key.offsets.host() == std::vector<std::int64_t>(2, -1));  // as poisoned
  CHECK(value.data.host() == std::vector<std::uint8_t>(value.data.size(), 0xff));
  CHECK(c.flags() == 0);
  REQUIRE(refused([](arguments& a) { a.blocks = 0, a.order = {}, a.key.capacity = 0; }));  // no blocks: offsets alone
  CHECK(key.offsets.host() == std::vector<std::int64_t>{0, -1});
}

TEST_CASE("a warp reads the reference's reconstruction of packs, bit for bit") {
  random_source random(7);
  for (const example& e : examples()) {
    INFO(name_of(e.format));
    pack_case c(e.format, e.blocks);
    c.fill(random);
    REQUIRE(c.compress());
    check_read(c);
  }
  pk::warp::pack_source source;
  source.blocks = 3;
  CHECK(source.coded_tokens() == 192);
}

TEST_CASE("a damaged tile of packs reads as NaN and is reported, and nothing beyond it is read") {
  random_source random(8);
  const pk::pack_format f = format_of(token_order::none, 4, dtype::float16, 1, 1,
                                      codec(pack_granularity::token, pack_zero::integer, 64, 0.004f), pk::pack_codec{});
  pack_case c(f, 3);
  c.fill(random);
  REQUIRE(c.compress());
  const auto tile = [&](std::size_t i) {
    return std::vector<std::uint8_t>(c.key.data() + c.key.offsets[i], c.key.data() + c.key.offsets[i + 1]);
  };
  const std::vector<std::uint8_t> sound = tile(1);
  const pk::pack_tile shape = pk::reference::detail::stored_shape(sound.data(), f.pack_size, 64);
  REQUIRE(shape.width_bits == 4);

  // The bytes of the middle one of three tiles, in memory that ends with the last.
  const auto check = [&](const std::vector<std::uint8_t>& middle) {
    host_side packs(f, side::key, 3);
    packs.ranges = c.key.ranges;
    std::int64_t end = 0;
    for (const std::size_t i : {0u, 1u, 2u}) {
      const std::vector<std::uint8_t> bytes = i == 1 ? middle : tile(i);
      std::copy(bytes.begin(), bytes.end(), packs.data() + end);
      packs.offsets[i + 1] = end += static_cast<std::int64_t>(bytes.size());
    }
    const device_side device(packs);
    const tiles_read got = read(f, side::key, device.in(), 3);
    const pk::status s =
        pk::reference::check_pack_tile(f.pack_size, 64, middle.data(), static_cast<std::int64_t>(middle.size()));
    const bool readable = s || std::strstr(s.message, "beyond 255") != nullptr;  // such codes are taken modulo 256
    bool right = true;
    for (const std::int64_t i : {0, 1, 2})
      right = right &&
              reads_as(got, i, 64, i == 1 && !readable ? std::vector<float>{} : decoded(f, side::key, packs.in(), i));
    CHECK(right);
    return readable;
  };
  const auto changed = [&](int at, int difference) {
    std::vector<std::uint8_t> bytes = sound;
    bytes[static_cast<std::size_t>(at)] = static_cast<std::uint8_t>(bytes[static_cast<std::size_t>(at)] + difference);
    return bytes;
  };
  CHECK(check(sound));
  CHECK_FALSE(check(changed(0, 9 - shape.min_bits)));
  CHECK_FALSE(check(changed(0, 255 - shape.min_bits)));
  CHECK_FALSE(check(changed(1, 1)));
  CHECK_FALSE(check(changed(2, 1)));
  CHECK_FALSE(check(changed(3, 1)));
  for (const int group : {0, 1, 15}) {
    CHECK_FALSE(check(changed(pk::pack_tile::starts_offset + 2 * group, 1)));
    CHECK_FALSE(check(changed(pk::pack_tile::starts_offset + 2 * group + 1, 128)));
  }
  for (const int pack : {0, 40, 63, 64 * 16 - 1})
    for (const int width : {9, 15}) {
      std::vector<std::uint8_t> bytes = sound;
      std::uint8_t& pair = bytes[static_cast<std::size_t>(shape.widths_offset() + pack / 2)];
      pair = static_cast<std::uint8_t>(pack % 2 == 0 ? (pair & 0xf0) | width : (pair & 0x0f) | width << 4);
      CHECK_FALSE(check(bytes));
    }
  for (const std::size_t bytes : {0u, 16u, 32u, 48u, 64u, 512u, 1024u, 1040u, 1648u}) {
    REQUIRE(bytes < sound.size());
    CHECK_FALSE(check(std::vector<std::uint8_t>(sound.begin(), sound.begin() + static_cast<std::ptrdiff_t>(bytes))));
  }
  std::vector<std::uint8_t> longer = sound;
  longer.resize(sound.size() + 16);
  CHECK_FALSE(check(longer));
  int readable = 0;
  for (int round = 0; round < 40; ++round) {
    std::vector<std::uint8_t> bytes = sound;
    for (int i = random.between(1, 3); i > 0; --i)
      bytes[static_cast<std::size_t>(random.between(0, static_cast<int>(bytes.size()) - 1))] =
          static_cast<std::uint8_t>(random.bits());
    readable += check(bytes) ? 1 : 0;
  }
  CHECK(readable > 0);
  CHECK(readable < 40);
}

TEST_CASE("a tile of packs whose offsets are damaged reads as NaN") {
  random_source random(9);
  const pk::pack_format f = format_of(token_order::none, 8, dtype::float16, 1, 1,
                                      codec(pack_granularity::block, pack_zero::floating, 64, 0.1f), pk::pack_codec{});
  pack_case c(f, 1);
  c.fill(random);
  REQUIRE(c.compress());
  const std::int64_t bytes = c.key.offsets[1], most = (std::numeric_limits<std::int64_t>::max)();
  device_side packs(c.key);
  const auto check = [&](std::int64_t begin, std::int64_t end, bool sound = false) {
    INFO("from " << begin << " to " << end << " of " << bytes);
    packs.offsets.assign({begin, end});
    CHECK(reads_as(read(f, side::key, packs.in(), 1), 0, 64,
                   sound ? decoded(f, side::key, c.key.in(), 0) : std::vector<float>{}));
  };
  check(0, bytes, true);
  for (const std::int64_t begin :
       {std::int64_t{-16}, std::int64_t{8}, std::int64_t{16}, bytes - 16, bytes, bytes + 16, most - 15, -most - 1})
    check(begin, bytes);
  for (const std::int64_t end : {std::int64_t{0}, std::int64_t{3}, std::int64_t{4}, std::int64_t{16}, bytes - 16,
                                 bytes - 1, bytes + 1, bytes + 16, most, std::int64_t{-16}, -most - 1})
    check(0, end);
  check(bytes, 0);
  check(16, bytes + 16);
  check(-16, bytes - 16);
  check(most / 16 * 16, -most - 1);
  check(-most - 1, most);
}
