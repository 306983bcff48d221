// SPDX-License-Identifier: Apache-2.0
// Packs of the fuzz targets: head dim 64, arrays of any numbers, or compressed elements that a few edits have changed.
//   const auto f = fuzz::any_pack_format(in);   fuzz::pack_side_arrays s[2] = {{in, f, side::key, 1}, {in, f,
//   side::value, 1}};
#pragma once

#include <packkv/reference/pack_attention.hpp>
#include <vector>

#include "input.hpp"

namespace fuzz {

constexpr int dim = 64, canary = 0x5a;

inline pk::pack_format any_pack_format(input& in) {
  pk::pack_format f;
  for (pk::pack_codec* c : {&f.key, &f.value}) {
    const int how = in.byte();
    c->granularity = static_cast<pk::pack_granularity>(how & 3);
    c->zero = static_cast<pk::pack_zero>(how >> 2 & 1);
    constexpr float steps[] = {0.1f, 1.0f, 1.0f / 255, 0.004f, 1e-30f};
    c->head_dim = dim, c->relative_step = steps[in.few(5) - 1];
  }
  f.pack_size = 2 << (4 - in.below(5));
  const int order = in.few(16);  // the greedy one takes most of the time
  f.order = order == 4 ? pk::token_order::greedy : order % 2 == 0 ? pk::token_order::median : pk::token_order::none;
  f.element = in.flag() ? pk::dtype::bfloat16 : pk::dtype::float16;
  f.kv_heads = in.few(2), f.batch = in.few(2);
  return f;
}

/// Arrays of one side, of any numbers.
struct pack_side_arrays {
  memory ranges, offsets, data;

  pack_side_arrays(input& in, const pk::pack_format& f, pk::side which, int blocks)
      : ranges(4 * blocks * f.batch * pk::range_count(f, which)),
        offsets(8 * (pk::tile_count(f, blocks) + 1)),
        data(0) {
    const std::int64_t tiles = pk::tile_count(f, blocks);
    std::int64_t at = 0;
    for (std::int64_t i = 1; i <= tiles; ++i) {
      const int how = in.byte();
      at = how < 250 ? at + 16 * (how < 192 ? how % 4 : how) : in.near<std::int64_t>(64);
      offsets.as<std::int64_t>()[i] = at;
      if (at < 0 || at > 1 << 16) at = 0;
    }
    data = memory(at);
    constexpr std::uint16_t ends[] = {0xbc00, 0x3c00, 0xfbff, 0x7bff, 0xff7f, 0x7f7f, 0, 0x7c00};
    const bool some = in.flag();
    const std::uint16_t low = some ? in.pick(ends) : static_cast<std::uint16_t>(in.bits(2));
    const std::uint16_t high = some ? in.pick(ends) : static_cast<std::uint16_t>(in.bits(2));
    for (std::int64_t i = 0; i < ranges.size() / 4; ++i) ranges.as<pk::pack_range>()[i] = {low, high};
    in.fill(data);
  }
  pk::const_pack_side view() {
    return {ranges.as<pk::pack_range>(), offsets.as<std::int64_t>(), data.data(), data.size()};
  }
};

/// Compressed elements, and a few edits of them.
inline void compress_and_edit(input& in, const pk::pack_format& f, int blocks, pack_side_arrays (&s)[2]) {
  std::uint64_t edit[3];
  const int edits = in.below(4);
  for (int i = 0; i < edits; ++i) edit[i] = in.bits(4);
  tensor<4> x[2] = {{f.element, {f.batch, f.kv_heads, 64 * blocks, dim}},
                    {f.element, {f.batch, f.kv_heads, 64 * blocks, dim}}};
  in.fill(x[0].bytes), in.fill(x[1].bytes);
  pk::pack_side out[2];
  for (int i = 0; i < 2; ++i) {
    s[i].data = memory(pk::max_pack_bytes(f, pk::side(i), blocks), canary);
    out[i] = {s[i].ranges.as<pk::pack_range>(), s[i].offsets.as<std::int64_t>(), s[i].data.data(), s[i].data.size()};
  }
  memory order(64 * blocks);
  pk::pack_report report;
  memory order_alone(64 * blocks);
  const bool coded =
      static_cast<bool>(pk::reference::compress(f, x[0].in(), x[1].in(), blocks, out[0], out[1], order.data(), report));
  check(coded == static_cast<bool>(pk::reference::token_orders(f, x[0].in(), x[1].in(), blocks, order_alone.data())),
        "token_orders takes what compress takes");
  if (!coded) return;
  check(order == order_alone, "token_orders gives the order of compress");
  for (int i = 0; i < 2; ++i) {  // no byte more than they need
    memory exact(s[i].offsets.as<std::int64_t>()[pk::tile_count(f, blocks)]);
    if (exact.size() > 0) std::memcpy(exact.data(), s[i].data.data(), static_cast<std::size_t>(exact.size()));
    s[i].data = std::move(exact);
  }
  check(edits > 0 || pk::reference::check_packs(f, {s[0].view(), s[1].view(), blocks}), "what compress writes is good");
  for (int i = 0; i < edits; ++i) {
    pack_side_arrays& of = s[edit[i] >> 8 & 1];
    memory& m = (edit[i] >> 9 & 7) == 0 ? of.offsets : (edit[i] >> 9 & 7) == 1 ? of.ranges : of.data;
    if (m.size() > 0) m[static_cast<std::int64_t>(edit[i] >> 12) % m.size()] = static_cast<std::uint8_t>(edit[i]);
  }
}

}  // namespace fuzz
