// SPDX-License-Identifier: Apache-2.0
// What the tests of packs share: caches in 16 bits, and packs in memory of their own between canaries.
#pragma once

#include <cstring>
#include <packkv/reference/packs.hpp>
#include <vector>

#include "fixture.hpp"

namespace host_test {

/// Keys and values of a cache.
struct pack_cache {
  tensor<4> keys, values;

  pack_cache(const pk::pack_format& f, std::int64_t tokens, random_source& random, walk how = walk::contiguous)
      : keys(f.element, {f.batch, f.kv_heads, tokens, f.key.head_dim}, how, &random),
        values(f.element, {f.batch, f.kv_heads, tokens, f.value.head_dim}, how, &random) {}
};

/// One side's packs; `canary` fills everything that has not been written.
struct pack_memory {
  static constexpr std::uint8_t canary = 0xc7;
  std::vector<pk::pack_range> ranges;
  std::vector<std::int64_t> offsets;
  std::vector<std::uint64_t> words;  ///< data, begins 16-byte aligned at data()
  std::int64_t capacity = 0;

  pack_memory(const pk::pack_format& f, pk::side which, std::int64_t blocks)
      : pack_memory(f, which, blocks, pk::max_pack_bytes(f, which, blocks)) {}
  pack_memory(const pk::pack_format& f, pk::side which, std::int64_t blocks, std::int64_t bytes) : capacity(bytes) {
    ranges.resize(static_cast<std::size_t>(blocks * f.batch * pk::range_count(f, which)));
    offsets.resize(static_cast<std::size_t>(pk::tile_count(f, blocks)) + 1);
    words.resize(static_cast<std::size_t>(bytes / 8 + 4));
    std::memset(static_cast<void*>(ranges.data()), canary, ranges.size() * sizeof(pk::pack_range));
    std::memset(offsets.data(), canary, offsets.size() * 8);
    std::memset(words.data(), canary, words.size() * 8);
  }
  std::uint8_t* data() {
    const std::uintptr_t p = reinterpret_cast<std::uintptr_t>(words.data());
    return reinterpret_cast<std::uint8_t*>((p + 15) / 16 * 16);
  }
  pk::pack_side out() { return {ranges.data(), offsets.data(), data(), capacity}; }
  pk::const_pack_side in() { return {ranges.data(), offsets.data(), data(), offsets.back()}; }
  bool untouched() const {
    const auto all = [](const void* p, std::size_t n) {
      for (std::size_t i = 0; i < n; ++i)
        if (static_cast<const std::uint8_t*>(p)[i] != canary) return false;
      return true;
    };
    return all(ranges.data(), ranges.size() * sizeof(pk::pack_range)) && all(offsets.data(), offsets.size() * 8) &&
           all(words.data(), words.size() * 8);
  }
};

/// Both sides of some blocks, compressed.
struct packs {
  pk::pack_format format;
  std::int64_t blocks;
  pack_memory key, value;
  std::vector<std::uint8_t> order;
  pk::pack_report report;
  pk::status state;

  packs(const pk::pack_format& f, const pack_cache& cache, std::int64_t n)
      : format(f),
        blocks(n),
        key(f, pk::side::key, n),
        value(f, pk::side::value, n),
        order(static_cast<std::size_t>(n) * 64) {
    state =
        pk::reference::compress(f, cache.keys.in(), cache.values.in(), n, key.out(), value.out(), order.data(), report);
  }
  packs(const packs&) = delete;
  packs& operator=(const packs&) = delete;
  pk::packs_view view() { return {key.in(), value.in(), blocks}; }
  pack_memory& memory(pk::side which) { return which == pk::side::key ? key : value; }
};

}  // namespace host_test
