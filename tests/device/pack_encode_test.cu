// SPDX-License-Identifier: Apache-2.0
// The kernels that compress packs whose channels lie side by side: the bytes of the reference, for every head dim, pack
// size and element type, for units of one and of several batch rows, and next to the boundaries of codes.
#include <algorithm>
#include <cmath>
#include <packkv/device/packs.cuh>
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

/// Compresses on the device and compares everything with the reference.
void check_compress(pack_case& c) {
  INFO(name_of(c.format) << ", heads " << c.format.kv_heads << ", batch " << c.format.batch << ", blocks " << c.blocks);
  REQUIRE(c.compress());
  device_side key(c.format, side::key, c.blocks), value(c.format, side::value, c.blocks);
  device_array<std::uint8_t> slots(c.order.size());
  slots.poison();
  c.report.assign(std::vector<pk::device_report>(1));
  pk::exec e = c.exec();
  device_array<std::uint8_t> workspace(static_cast<std::size_t>(pk::pack_workspace_bytes(c.format, c.blocks)));
  workspace.poison();
  e.workspace = workspace.data();
  e.workspace_bytes = workspace.size();
  REQUIRE(pk::compress(c.format, c.keys.device(), c.values.device(), c.blocks, key.out(), value.out(),
                       {nullptr, slots.data()}, e));
  CHECK(slots.host() == c.order);
  CHECK(key.equals(c.key));
  CHECK(value.equals(c.value));
  CHECK(c.flags() == 0);
}

pk::pack_codec random_codec(random_source& random) {
  constexpr int dims[] = {64, 96, 128, 192, 256, 512};
  return codec(random.one_in(2) ? pack_granularity::token : pack_granularity::vector,
               random.one_in(2) ? pack_zero::integer : pack_zero::floating, dims[random.between(0, 5)],
               std::exp(-5.5f * static_cast<float>(random.uniform())));
}

}  // namespace

TEST_CASE("the fast encoder of packs writes the reference's bytes") {
  random_source random(21);
#if defined(PACKKV_SIMT_EXECUTOR)
  constexpr int rounds = 24;
#else
  constexpr int rounds = 200;
#endif
  for (int round = 0; round < rounds; ++round) {
    const pk::pack_codec key = random_codec(random), value = random_codec(random);
    const int heads = random.one_in(6) ? random.between(4, 20) : random.between(1, 4);
    pack_case c(format_of(static_cast<token_order>(random.between(0, 2)), 1 << random.between(1, 5),
                          random.one_in(2) ? dtype::float16 : dtype::bfloat16, heads, random.between(1, 2), key, value),
                random.between(1, heads > 4 ? 1 : 3), walk::contiguous, random.between(0, 9));
    c.fill(random);
    check_compress(c);
  }
}
