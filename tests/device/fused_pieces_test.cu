// SPDX-License-Identifier: Apache-2.0
// How the fused decode kernel shares its work: quotients, even shares, and the items of a ragged batch.
#include <algorithm>
#include <packkv/block/work_split.cuh>
#include <packkv/warp/tile_stream.cuh>

#include "../support/catch.hpp"
#include "../support/random.hpp"
#include "device_array.hpp"

using namespace packkv_test;
namespace pk = packkv;

namespace {

__global__ void divide(const std::int32_t* a, const std::int32_t* b, int count, std::int32_t* whole,
                       std::int32_t* rest) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const pk::block::quotient q(a[i], b[i]);
    whole[i] = q.whole;
    rest[i] = q.rest;
  }
}

constexpr int threads = 64, samples = 512;

/// What a block of a launch of `blocks` knows of the work.
struct known_work {
  std::int32_t shares, aligned;
  std::int32_t begin[pk::block::max_split_sequences + 1];  ///< of the sequences
  std::int32_t items[pk::block::max_split_sequences];      ///< of a unit of each
  std::int32_t share_begin[samples + 1];                   ///< of the first shares
  std::int32_t item[samples];                              ///< from the first to the last, all if they are few
  std::int32_t share[samples], sequence[samples];          ///< that have it
};

template <int Threads>
__global__ void share_work(const pk::block::sequence_cost* costs, int batch, std::int32_t blocks, known_work* out) {
  __shared__ pk::block::sequence_items items;
  items.build<Threads>(batch, blocks, [&](int b) { return costs[b]; });
  __syncthreads();
  const pk::block::even_shares shares = items.shares;
  const std::int32_t total = items.begin[batch];
  for (int b = static_cast<int>(threadIdx.x); b <= batch; b += Threads) {
    out->begin[b] = items.begin[b];
    if (b < batch) out->items[b] = items.units.items_of(costs[b]);
  }
  for (int i = static_cast<int>(threadIdx.x); i < samples; i += Threads) {
    if (i <= shares.blocks()) out->share_begin[i] = shares.begin(i);
    const std::int32_t item = total <= samples   ? (i < total ? i : total - 1)
                              : i == samples - 1 ? total - 1
                                                 : total / samples * i + i % 3;
    if (total == 0) continue;
    out->item[i] = item;
    out->share[i] = shares.owner(item);
    out->sequence[i] = items.owner(batch, item);
  }
  if (threadIdx.x == 0) {
    out->shares = shares.blocks();
    out->aligned = items.units.aligned;
    out->share_begin[samples] = shares.begin(shares.blocks());
  }
}

/// How often warps come by each of `count` tiles, and whether a warp ever goes back.
__global__ void walk_tiles(const pk::warp::tile_walk walk, int count, int* visits, int* backwards) {
  const int warp = static_cast<int>(threadIdx.x);
  if (warp >= walk.warps) return;
  int before = -1;
  for (int i = walk.begin(warp);; ++i) {
    const int tile = walk.tile(warp, i) - walk.first;
    if (tile >= count) return;
    if (tile <= before) atomicAdd(backwards, 1);
    before = tile;
    if (tile >= 0) atomicAdd(visits + tile, 1);
  }
}

/// What a block of a launch of one sequence works out without asking others.
struct single_known {
  pk::block::single_split::part part;
  pk::block::unit_owners owners;
};
__global__ void share_single(const pk::block::single_split split, std::int32_t blocks, std::int32_t units,
                             std::int32_t tiles, single_known* out) {
  for (int b = static_cast<int>(threadIdx.x); b < blocks; b += threads) {
    const pk::block::single_split::part p = split.part_of(b, units, tiles);
    const pk::block::unit_owners o = split.owners(p.unit, p.blocks, p.share, tiles);
    out[b].part = p;
    out[b].owners = o;
  }
}
/// Every tile of each unit has one block, in order, as many of them as align_units says; one block has the tail, and
/// all know who has the first and the last tile and the tail. `most`: units that there may be.
void check_single(const pk::block::sequence_cost& cost, std::int32_t most, std::int32_t blocks) {
  INFO(cost.units << " of " << most << " units, " << cost.tiles << " tiles, raw " << cost.raw << ", blocks " << blocks);
  const pk::block::single_split split(most, blocks, cost.raw);
  REQUIRE(split.exists() == (most > 0 && most <= blocks));
  if (!split.exists() || cost.units == 0) return;
  device_array<single_known> device_known(static_cast<std::size_t>(blocks));
  device_known.poison();
  REQUIRE(pk::detail::launch(share_single, dim3(1), threads, cudaStream_t{}, split, blocks, cost.units, cost.tiles,
                             device_known.data()));
  std::vector<single_known> known = device_known.host();
  pk::block::unit_totals all = pk::block::unit_totals::none();
  all.add(cost);
  const pk::block::unit_alignment aligned = pk::block::align_units(all, blocks);
  std::vector<int> tiles(static_cast<std::size_t>(cost.units), 0), tails(static_cast<std::size_t>(cost.units), 0);
  // Those that have a number, in its order: no two have the same.
  int wrong = 0, with_work = 0, last = -1;
  std::sort(known.begin(), known.end(),
            [](const single_known& a, const single_known& b) { return a.part.block < b.part.block; });
  for (const single_known& k : known) {
    const pk::block::single_split::part& p = k.part;
    const pk::block::unit_owners& o = k.owners;
    wrong += p.unit < 0 || p.unit >= cost.units || p.has_tiles(cost.tiles) != (cost.tiles == 0 ? p.tail : p.lo < p.hi);
    if (p.lo >= p.hi && !p.tail) continue;
    ++with_work;
    wrong += p.block <= last || p.block >= blocks || p.share != aligned.aligned || p.blocks != blocks / cost.units;
    last = p.block;
    int& next = tiles[static_cast<std::size_t>(p.unit)];
    if (p.lo < p.hi) {
      wrong += p.lo != next || p.hi > next + aligned.aligned;
      wrong += (p.lo == 0) != (o.first == p.block) || (p.hi == cost.tiles) != (o.last == p.block);
      next = p.hi;
    }
    wrong += p.tail != (o.tail == p.block) || o.first > p.block || o.tail < p.block;
    wrong += cost.tiles == 0 && (o.first != o.tail || o.last != o.tail);
    wrong += aligned.own_tail && cost.tiles > 0 && p.tail && p.lo < p.hi;
    tails[static_cast<std::size_t>(p.unit)] += p.tail ? 1 : 0;
  }
  CHECK(wrong == 0);
  CHECK(tiles == std::vector<int>(tiles.size(), cost.tiles));
  CHECK(tails == std::vector<int>(tails.size(), 1));
  const std::int32_t items = std::max(cost.tiles + (aligned.own_tail ? 0 : cost.raw), 1);
  CHECK(with_work <= cost.units * (pk::ceil_div(items, aligned.aligned) + (aligned.own_tail ? 1 : 0)));
}

/// The first item of a share by its definition.
std::int64_t expected_begin(std::int64_t total, std::int64_t shares, std::int64_t i) {
  return total / shares * i + std::min(i, total % shares);
}

void check_shares(const std::vector<pk::block::sequence_cost>& costs, std::int32_t blocks) {
  const int batch = static_cast<int>(costs.size());
  const device_array<pk::block::sequence_cost> device_costs(costs);
  device_array<known_work> device_work(1);
  device_work.poison();
  REQUIRE(pk::detail::launch(share_work<threads>, dim3(1), threads, cudaStream_t{}, device_costs.data(), batch, blocks,
                             device_work.data()));
  const known_work w = device_work.host()[0];
  std::int64_t largest = 0;
  for (const auto& c : costs) largest = std::max<std::int64_t>(largest, std::int64_t{c.tiles} + c.raw);
  int wrong_begin = w.begin[0] != 0, short_units = 0, large_units = 0, unaligned = 0;
  for (std::size_t b = 0; b < costs.size(); ++b) {
    const std::int64_t items = costs[b].units > 0 ? w.items[b] : 0;
    wrong_begin += w.begin[b + 1] - w.begin[b] != costs[b].units * items;
    large_units += items > 2 * (largest + pk::block::unit_cost);
    if (costs[b].units == 0) continue;
    short_units += w.items[b] < std::max(costs[b].tiles, 1);
    unaligned += w.aligned > 0 && w.items[b] % w.aligned != 0;
  }
  CHECK(wrong_begin == 0);
  CHECK(short_units == 0);
  CHECK(large_units == 0);
  CHECK(unaligned == 0);
  const std::int64_t total = w.begin[costs.size()];
  CHECK(w.shares <= std::min<std::int64_t>(blocks, total));
  if (total == 0) return;
  REQUIRE(w.shares > 0);
  CHECK(w.share_begin[samples] == total);
  int wrong_share = 0, wrong_owner = 0, wrong_sequence = 0;
  for (std::int64_t i = 0; i < std::min<std::int64_t>(samples, w.shares + 1); ++i) {
    wrong_share += w.share_begin[i] != expected_begin(total, w.shares, i);
    wrong_share += w.aligned > 0 && w.share_begin[i] != i * w.aligned;  // so that units begin where shares do
  }
  for (int i = 0; i < samples; ++i) {
    const std::int64_t share = w.share[i], item = w.item[i];
    wrong_owner += share < 0 || share >= w.shares || expected_begin(total, w.shares, share) > item ||
                   expected_begin(total, w.shares, share + 1) <= item;
    const auto b = static_cast<std::size_t>(w.sequence[i]);
    wrong_sequence += b >= costs.size() || w.begin[b] > item || w.begin[b + 1] <= item;
  }
  CHECK(wrong_share == 0);
  CHECK(wrong_owner == 0);
  CHECK(wrong_sequence == 0);
}

}  // namespace

TEST_CASE("quotients are exact") {
  random_source random(8001);
  std::vector<std::int32_t> a, b;
  const std::int32_t most = 0x7fffffff;
  for (const std::int32_t x : {0, 1, 2, most - 1, most})
    for (const std::int32_t y : {1, 2, 3, most - 1, most}) a.push_back(x), b.push_back(y);
  while (a.size() < 128) {
    a.push_back(static_cast<std::int32_t>(random.bits() >> random.between(33, 60)));
    b.push_back(1 + static_cast<std::int32_t>(random.bits() >> random.between(34, 62)));
  }
  while (a.size() < 4096) {  // on both sides of a multiple, below and above 2^21, where the arithmetic changes
    const std::int32_t y = 1 + static_cast<std::int32_t>(random.bits() >> random.between(42, 62));
    const std::int32_t multiple = random.between(1, (1 << 22) / y + 1) * y;
    for (const std::int32_t x : {multiple - 1, multiple}) a.push_back(x), b.push_back(y);
  }
  const int count = static_cast<int>(a.size());
  const device_array<std::int32_t> device_a(a), device_b(b);
  device_array<std::int32_t> whole(a.size()), rest(a.size());
  REQUIRE(pk::detail::launch(divide, dim3(1), 128, cudaStream_t{}, device_a.data(), device_b.data(), count,
                             whole.data(), rest.data()));
  const auto w = whole.host(), r = rest.host();
  int wrong = 0;
  for (std::size_t i = 0; i < a.size(); ++i) wrong += w[i] != a[i] / b[i] || r[i] != a[i] % b[i];
  CHECK(wrong == 0);
}

TEST_CASE("ragged work is shared evenly, every item by one block that all blocks know") {
  random_source random(8002);
  for (int round = 0; round < 200; ++round) {
    const int batch = random.one_in(4) ? pk::block::max_split_sequences : random.between(1, 40);
    const int most_tiles = random.one_in(2) ? 4 : 2000;
    std::vector<pk::block::sequence_cost> costs(static_cast<std::size_t>(batch));
    for (auto& c : costs) {
      c.units = random.one_in(4) ? 0 : random.between(1, 9);
      c.tiles = random.between(0, most_tiles);
      c.raw = random.one_in(2) ? 0 : random.between(4, 40);
    }
    INFO("round " << round << ", batch " << batch);
    for (const int blocks : {1, 7, 132, 3000}) check_shares(costs, blocks);
  }
}

TEST_CASE("few units begin with a block of their own, alike or ragged, with 16-bit tokens or without") {
  random_source random(8003);
  for (int round = 0; round < 200; ++round) {
    const int batch = random.between(1, 4), raw = random.one_in(2) ? 0 : random.between(4, 40);
    const int tiles = random.between(0, 3000);
    const bool ragged = random.one_in(2);
    std::vector<pk::block::sequence_cost> costs(static_cast<std::size_t>(batch));
    for (auto& c : costs) c = {random.between(1, 4), ragged ? random.between(0, 3000) : tiles, raw};
    INFO("round " << round << ", batch " << batch);
    for (const int blocks : {1, 16, 132, 264}) check_shares(costs, blocks);
  }
}

TEST_CASE("as much work as a launch may have is shared as evenly, and more is refused") {
  const std::int32_t tiles = 1 << 25;  // of 2^31 tokens
  const std::int64_t each = 2 * (std::int64_t{tiles} + 30 + pk::block::unit_cost), most = 0x7fffffff;
  const auto units = static_cast<std::int32_t>(most / each);
  REQUIRE(pk::block::max_launch_sequences(units, tiles, 30) == 1);
  CHECK(pk::block::max_launch_sequences(units + 1, tiles, 30) == 0);
  CHECK(pk::block::max_launch_sequences(1, tiles, 30) == units);
  CHECK(pk::block::max_launch_sequences(std::int64_t{1} << 62, tiles, 30) == 0);
  CHECK(pk::block::max_launch_sequences(0, tiles, 30) == pk::block::max_split_sequences);
  CHECK(pk::block::max_launch_sequences(8, 1 << 14, 30) == pk::block::max_split_sequences);
  for (const int blocks : {1, 132, 264, 100000}) {
    check_shares({{units, tiles, 30}}, blocks);
    check_shares({{3, tiles, 0}, {0, 5, 0}, {units - 5, tiles - 1, 7}, {1, 0, 20}}, blocks);
    check_shares({{1, tiles, 30}, {2, tiles / 3, 30}}, blocks);
  }
}

TEST_CASE("a launch of one sequence is shared like a batch of one, by every block on its own") {
  random_source random(8004);
  for (int round = 0; round < 100; ++round) {
    const pk::block::sequence_cost cost = {random.one_in(8) ? 0 : random.between(1, 40), random.between(0, 3000),
                                           random.one_in(2) ? 0 : random.between(4, 60)};
    const int most = random.one_in(2) ? cost.units : cost.units * random.between(1, 3) + random.between(0, 2);
    for (const int blocks : {1, 16, 132, 264}) check_single(cost, most, blocks);
  }
}

TEST_CASE("a launch without work has no shares") {
  check_shares({{0, 0, 0}}, 132);
  check_shares({{0, 7, 4}, {0, 0, 0}}, 5);
}

TEST_CASE("every tile has one warp, whichever warps come late, and no warp goes back") {
  random_source random(8005);
  for (int round = 0; round < 60; ++round) {
    pk::warp::tile_walk walk{random.between(0, 1000), 1 << random.between(0, 4), 0, 0};
    if (round > 0) walk.late = random.between(0, walk.warps), walk.rounds = walk.late > 0 ? random.between(0, 8) : 0;
    const int count = random.between(0, 200);
    INFO("warps " << walk.warps << ", late " << walk.late << ", rounds " << walk.rounds << ", tiles " << count);
    device_array<int> visits(std::vector<int>(static_cast<std::size_t>(count) + 1, 0)), backwards(std::vector<int>{0});
    REQUIRE(pk::detail::launch(walk_tiles, dim3(1), 32, cudaStream_t{}, walk, count, visits.data(), backwards.data()));
    CHECK(backwards.host()[0] == 0);
    std::vector<int> once(static_cast<std::size_t>(count) + 1, 1);
    once.back() = 0;
    CHECK(visits.host() == once);
  }
}
