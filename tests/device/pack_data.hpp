// SPDX-License-Identifier: Apache-2.0
// What the device tests of packs share: formats and tensors, and packs by the reference, on host and device.
#pragma once

#include <cmath>
#include <cstring>
#include <packkv/codec/pages.hpp>
#include <packkv/reference/packs.hpp>
#include <string>
#include <vector>

#include "../support/random.hpp"
#include "cuda_failures.hpp"
#include "device_array.hpp"

namespace packkv_test {

namespace pk = packkv;

/// How a tensor lies in memory: contiguous; or token after token, backwards, every other element.
enum class walk { contiguous, interleaved };

/// 16-bit tensor [batch, kv_heads, tokens, dim], on host and device.
struct pack_tensor {
  pk::dtype type;
  walk how;
  std::int64_t extent[4];
  std::vector<std::uint16_t> bits;
  device_array<std::uint16_t> device_bits;

  pack_tensor(const pk::pack_format& f, pk::side which, std::int64_t tokens, walk w)
      : type(f.element), how(w), extent{f.batch, f.kv_heads, tokens, f.codec(which).head_dim} {
    bits.assign(static_cast<std::size_t>(2 * extent[0] * extent[1] * extent[2] * extent[3]), 0x7fff);
  }
  pk::input_view<4> view(const std::uint16_t* data) const {
    auto v = pk::make_input(data, type, {extent[0], extent[1], extent[2], extent[3]});
    if (how == walk::contiguous) return v;
    v.stride[3] = 4;
    v.stride[1] = extent[3] * v.stride[3];
    v.stride[0] = extent[1] * v.stride[1];
    v.stride[2] = -extent[0] * v.stride[0];
    v.data = data - (extent[2] - 1) * v.stride[2] / 2;
    return v;
  }
  pk::input_view<4> host() const { return view(bits.data()); }
  pk::input_view<4> device() const { return view(device_bits.data()); }
  std::uint16_t& at(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t c) {
    return *const_cast<std::uint16_t*>(static_cast<const std::uint16_t*>(pk::detail::address(host(), b, h, t, c)));
  }
  void set(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t c, float x) {
    at(b, h, t, c) = type == pk::dtype::float16 ? pk::float_to_half(x) : pk::float_to_bfloat16(x);
  }
  /// value(head, token, channel) for every element.
  template <class Value>
  void fill(Value&& value) {
    for (std::int64_t b = 0; b < extent[0]; ++b)
      for (std::int64_t h = 0; h < extent[1]; ++h)
        for (std::int64_t t = 0; t < extent[2]; ++t)
          for (std::int64_t c = 0; c < extent[3]; ++c) set(b, h, t, c, value(h, t, c));
    upload();
  }
  void upload() { device_bits = device_array<std::uint16_t>(bits); }
};

/// Normal numbers with extremes in the last element of a token, with outlying channels, channels of one value, which is
/// -0 for some, and tokens of one value.
inline void fill_random(random_source& random, pack_tensor& x) {
  x.fill([&](std::int64_t h, std::int64_t t, std::int64_t c) {
    if (h + 1 == x.extent[1] && c + 1 == x.extent[3]) return t % 64 == 63 ? -60.0f : t % 2 == 0 ? 40.0f : -50.0f;
    if (c % 11 == 3) return c % 2 == 0 ? -0.0f : 0.0f;
    if (c % 13 == 5) return 0.75f;
    if (t % 64 == 9) return -2.5f;
    return random.normal() * (c % 17 == 2 ? 9.0f : t % 3 == 0 ? 0.2f : 1.0f);
  });
}

/// One side of packs in memory of the host.
struct host_side {
  std::vector<pk::pack_range> ranges;
  std::vector<std::int64_t> offsets;
  std::vector<std::uint64_t> words;  ///< data, 0xff where nothing has been written
  std::int64_t capacity = 0;

  host_side(const pk::pack_format& f, pk::side which, std::int64_t blocks)
      : ranges(static_cast<std::size_t>(blocks * f.batch * pk::range_count(f, which))),
        offsets(static_cast<std::size_t>(pk::tile_count(f, blocks)) + 1),
        words(static_cast<std::size_t>(pk::max_pack_bytes(f, which, blocks) / 16 * 2 + 4), ~std::uint64_t{0}),
        capacity(pk::max_pack_bytes(f, which, blocks)) {}
  std::uint8_t* data() {
    return reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(words.data()) + 15) / 16 * 16);
  }
  pk::pack_side out() { return {ranges.data(), offsets.data(), data(), capacity}; }
  pk::const_pack_side in() { return {ranges.data(), offsets.data(), data(), offsets.back()}; }
};

/// The same on the device.
struct device_side {
  device_array<pk::pack_range> ranges;
  device_array<std::int64_t> offsets;
  device_array<std::uint8_t> data;

  device_side(const pk::pack_format& f, pk::side which, std::int64_t blocks)
      : ranges(static_cast<std::size_t>(blocks * f.batch * pk::range_count(f, which))),
        offsets(static_cast<std::size_t>(pk::tile_count(f, blocks)) + 1),
        data(static_cast<std::size_t>(pk::max_pack_bytes(f, which, blocks))) {
    ranges.poison();
    offsets.poison();
    data.poison();
  }
  explicit device_side(host_side& from)
      : ranges(from.ranges),
        offsets(from.offsets),
        data(std::vector<std::uint8_t>(from.data(), from.data() + from.offsets.back())) {}
  pk::pack_side out() { return {ranges.data(), offsets.data(), data.data(), static_cast<std::int64_t>(data.size())}; }
  pk::const_pack_side in() const {
    return {ranges.data(), offsets.data(), data.data(), static_cast<std::int64_t>(data.size())};
  }
  /// Everything, up to the capacity.
  bool equals(host_side& other) const {
    const auto r = ranges.host();
    return offsets.host() == other.offsets &&
           std::memcmp(r.data(), other.ranges.data(), r.size() * sizeof(pk::pack_range)) == 0 &&
           data.host() == std::vector<std::uint8_t>(other.data(), other.data() + other.capacity);
  }
};

/// Keys and values of a format, and both sides' packs by the reference.
struct pack_case {
  pk::pack_format format;
  std::int64_t blocks;
  pack_tensor keys, values;
  host_side key, value;
  std::vector<std::uint8_t> order;
  device_array<pk::device_report> report{std::vector<pk::device_report>(1)};

  pack_case(const pk::pack_format& f, std::int64_t n, walk how = walk::contiguous, std::int64_t more_tokens = 0)
      : format(f),
        blocks(n),
        keys(f, pk::side::key, n * 64 + more_tokens, how),
        values(f, pk::side::value, n * 64 + more_tokens, how),
        key(f, pk::side::key, n),
        value(f, pk::side::value, n),
        order(static_cast<std::size_t>(n) * 64) {}
  void fill(random_source& random) {
    fill_random(random, keys);
    fill_random(random, values);
  }
  pk::status compress() {
    pk::pack_report sizes;
    return pk::reference::compress(format, keys.host(), values.host(), blocks, key.out(), value.out(), order.data(),
                                   sizes);
  }
  pack_tensor& tensor(pk::side which) { return which == pk::side::key ? keys : values; }
  host_side& packs(pk::side which) { return which == pk::side::key ? key : value; }
  pk::exec exec() { return pk::exec{nullptr, nullptr, 0, report.data()}; }
  std::uint32_t flags() const { return report.host()[0].flags; }
};

inline pk::pack_format format_of(pk::token_order order, int pack_size, pk::dtype element, int heads, int batch,
                                 pk::pack_codec key, pk::pack_codec value) {
  pk::pack_format f;
  f.order = order;
  f.pack_size = pack_size;
  f.element = element;
  f.kv_heads = heads;
  f.batch = batch;
  f.key = key;
  f.value = value;
  return f;
}

inline pk::pack_codec codec(pk::pack_granularity g, pk::pack_zero z, int head_dim, float r) {
  return {g, z, static_cast<std::int16_t>(head_dim), r};
}

struct example {
  pk::pack_format format;
  std::int64_t blocks;
  walk how;
};

/// Every granularity, zero point, order, pack size and element type; steps for widths from 0 to 8.
inline std::vector<example> examples() {
  using g = pk::pack_granularity;
  using z = pk::pack_zero;
  using o = pk::token_order;
  constexpr pk::dtype half = pk::dtype::float16, bfloat = pk::dtype::bfloat16;
  return {
      {format_of(o::median, 16, half, 2, 1, codec(g::token, z::integer, 128, 0.1f),
                 codec(g::token, z::integer, 64, 0.05f)),
       2, walk::contiguous},
      {format_of(o::greedy, 8, bfloat, 2, 2, codec(g::vector, z::floating, 96, 0.02f),
                 codec(g::channel, z::integer, 64, 0.2f)),
       1, walk::interleaved},
      {format_of(o::none, 32, half, 1, 2, codec(g::block, z::integer, 64, 1.0f),
                 codec(g::token, z::floating, 256, 0.004f)),
       1, walk::interleaved},
      {format_of(o::median, 2, bfloat, 3, 1, codec(g::channel, z::integer, 64, 0.01f),
                 codec(g::vector, z::floating, 64, 0.3f)),
       2, walk::contiguous},
      {format_of(o::median, 4, half, 1, 2, codec(g::block, z::floating, 64, 0.004f),
                 codec(g::block, z::integer, 96, 0.005f)),
       1, walk::interleaved},
      {format_of(o::greedy, 16, half, 1, 1, codec(g::channel, z::floating, 128, 0.03f),
                 codec(g::vector, z::integer, 512, 0.1f)),
       1, walk::contiguous},
  };
}

#if defined(PACKKV_SIMT_EXECUTOR)
inline constexpr int random_examples = 3;
#else
inline constexpr int random_examples = 12;
#endif

inline example random_example(random_source& random) {
  const auto side_of = [&] {
    constexpr int dims[] = {64, 96, 128, 192};
    return codec(static_cast<pk::pack_granularity>(random.between(0, 3)),
                 static_cast<pk::pack_zero>(random.between(0, 1)), dims[random.between(0, 3)],
                 std::exp(-5.5f * static_cast<float>(random.uniform())));
  };
  const pk::pack_codec key = side_of(), value = side_of();
  return {format_of(static_cast<pk::token_order>(random.between(0, 2)), 1 << random.between(1, 5),
                    random.one_in(2) ? pk::dtype::float16 : pk::dtype::bfloat16, random.between(1, 3),
                    random.between(1, 2), key, value),
          random.between(1, 2), random.one_in(2) ? walk::contiguous : walk::interleaved};
}

inline std::string name_of(const pk::pack_format& f) {
  std::string s = "order " + std::to_string(static_cast<int>(f.order)) + ", packs of " + std::to_string(f.pack_size);
  for (const pk::pack_codec& c : {f.key, f.value})
    s += ", granularity " + std::to_string(static_cast<int>(c.granularity)) + " zero " +
         std::to_string(static_cast<int>(c.zero)) + " D " + std::to_string(c.head_dim);
  return s;
}

inline std::uint32_t bits_of(float x) { return pk::detail::bit_cast<std::uint32_t>(x); }

}  // namespace packkv_test
