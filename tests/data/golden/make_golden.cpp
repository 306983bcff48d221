// SPDX-License-Identifier: Apache-2.0
// Writes the files beside it: pages coded by packkv::reference, and the manifest that describes them. Run it only for a
// new version of the format; the files it wrote are what tests/host/format_test.cpp holds every later encoder to.
//
//     g++ -std=c++17 -O2 -Iinclude tests/data/golden/make_golden.cpp -o make_golden && ./make_golden tests/data/golden
#include <cstdio>
#include <fstream>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "../../format/bridge.hpp"

namespace {

using clean::kind;
using clean::transform;

/// A generator of its own for parameters: integers only, so that every machine makes the same ones.
class integers {
 public:
  explicit integers(std::uint32_t seed) : state_(seed) {}
  int below(int limit) {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<int>((state_ >> 8) % static_cast<std::uint32_t>(limit));
  }

 private:
  std::uint32_t state_;
};

golden::page make_page(const char* name, int key_dim, int value_dim) {
  static std::uint32_t seed = 0;
  golden::page p;
  p.name = name;
  p.seed = ++seed;
  p.side[0].format.head_dim = key_dim;
  p.side[1].format.head_dim = value_dim;
  p.side[1].format.of = clean::side::value;
  return p;
}

void set_plan(golden::one_side& side, transform turn, std::vector<int> widths) {
  side.format.coding = kind::plan;
  side.format.turn = turn;
  side.format.widths = std::move(widths);
}

void set_elements(golden::one_side& side, kind coding, float tensor_scale = 1.0f) {
  side.format.coding = coding;
  side.format.tensor_scale = tensor_scale;
}

/// Random permutations, where the transform takes them.
void set_permutations(golden::page& p) {
  integers random(p.seed);
  for (golden::one_side& side : p.side) {
    if (side.format.turn != transform::permutation) continue;
    for (int h = 0; h < p.heads; ++h) {
      std::vector<int> row(static_cast<std::size_t>(side.format.head_dim));
      std::iota(row.begin(), row.end(), 0);
      for (int i = side.format.head_dim - 1; i > 0; --i)
        std::swap(row[static_cast<std::size_t>(i)], row[static_cast<std::size_t>(random.below(i + 1))]);
      side.format.permutation.insert(side.format.permutation.end(), row.begin(), row.end());
    }
  }
}

/// Column scales 1/64 .. 4, as calibration gives them: different for every head and channel.
void set_columns(golden::page& p, golden::one_side& side) {
  integers random(p.seed + 1000);
  for (int i = 0; i < p.heads * side.format.head_dim; ++i)
    side.format.column_scale.push_back(static_cast<float>(1 + random.below(256)) / 64.0f);
}

void set_leading(golden::page& p, int count) {
  p.side[0].format.leading = count;
  // Small enough for some components to be clamped.
  for (int i = 0; i < p.heads * count; ++i)
    p.side[0].format.leading_scale.push_back(static_cast<float>(3 + i) / 4096.0f);
}

/// A bf16 token of 128 channels, zero elsewhere, whose row scale is 0x3c53 only if the squares are added in double and
/// in the order of docs/format.md. Sums in float, channel by channel, lane by lane, from the last 32 channels to the
/// first, or with the tree's strides reversed give 0x3c52. Found by a search; no other input tells orders apart.
struct channel_bits {
  int channel;
  std::uint16_t bits;
};
constexpr channel_bits order_witness[] = {
    {1, 0x3358}, {3, 0x3395}, {4, 0x337a}, {6, 0x3d8d}, {7, 0x3396}, {10, 0x339a},
    {11, 0x33fc}, {15, 0x33ac}, {16, 0x331a}, {17, 0x33d3}, {22, 0x376d}, {27, 0x335d},
    {28, 0x3363}, {29, 0x33f5}, {31, 0x3383}, {32, 0x3f75}, {35, 0x3373}, {36, 0x3319},
    {37, 0x3389}, {39, 0x3398}, {47, 0x33ed}, {49, 0x336b}, {50, 0x3574}, {52, 0x3329},
    {56, 0x3396}, {57, 0x3359}, {59, 0x33fd}, {61, 0x33e5}, {63, 0x3328}, {65, 0x3330},
    {69, 0x33b8}, {74, 0x33cb}, {75, 0x3391}, {76, 0x332c}, {83, 0x332b}, {85, 0x338e},
    {86, 0x335f}, {87, 0x3bed}, {89, 0x335a}, {101, 0x336a}, {103, 0x39dd}, {104, 0x3395},
    {107, 0x4143}, {108, 0x33e4}, {113, 0x3363}, {118, 0x3334}, {120, 0x3300}, {125, 0x3398},
};

std::vector<golden::page> cases() {
  std::vector<golden::page> pages;

  pages.push_back(make_page("d128_hadamard", 128, 128));
  set_plan(pages.back().side[0], transform::hadamard, {4, 2, 1, 1});
  set_plan(pages.back().side[1], transform::hadamard, {2, 2, 2, 2, 2, 2, 2, 2});

  pages.push_back(make_page("d64_permutation", 64, 64));
  set_plan(pages.back().side[0], transform::permutation, {8, 3, 2, 1});
  set_plan(pages.back().side[1], transform::identity, {4, 3, 1, 0});
  set_columns(pages.back(), pages.back().side[0]);

  pages.push_back(make_page("d96_hadamard", 96, 96));
  set_plan(pages.back().side[0], transform::hadamard, {4, 3, 2});
  set_plan(pages.back().side[1], transform::hadamard, {8, 4, 3, 2, 1, 0});

  pages.push_back(make_page("d192_d128", 192, 128));
  set_plan(pages.back().side[0], transform::hadamard, {3, 3, 2, 2, 1, 0});
  set_plan(pages.back().side[1], transform::permutation, {4, 3, 3, 2, 2, 1, 1, 0});

  pages.push_back(make_page("d128_leading2", 128, 128));
  set_plan(pages.back().side[0], transform::permutation, {4, 2, 2, 1});
  set_plan(pages.back().side[1], transform::identity, {3, 3, 3, 3, 2, 2, 1, 1});
  set_leading(pages.back(), 2);
  set_columns(pages.back(), pages.back().side[1]);

  pages.push_back(make_page("d256_leading4", 256, 256));
  set_plan(pages.back().side[0], transform::hadamard, {8, 1, 1, 1, 0, 0, 0, 0});
  set_plan(pages.back().side[1], transform::hadamard, {2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0});
  set_leading(pages.back(), 4);

  pages.push_back(make_page("d512_hadamard", 512, 512));
  set_plan(pages.back().side[0], transform::hadamard, {1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
  set_plan(pages.back().side[1], transform::hadamard, std::vector<int>(32, 0));
  for (std::size_t i = 0; i < 9; ++i) pages.back().side[1].format.widths[i] = i == 0 ? 2 : 1;

  pages.push_back(make_page("d64_fp16_fp8", 64, 64));
  set_elements(pages.back().side[0], kind::fp16);
  set_elements(pages.back().side[1], kind::fp8, 0.0078125f);
  // fp16 NaN of either sign, infinities, the smallest subnormal, the largest finite, -0.
  pages.back().edits = {{0, 0, 3, 5, 0x7e01}, {0, 0, 3, 6, 0xfc01}, {0, 0, 3, 7, 0x7c00}, {0, 0, 3, 8, 0xfc00},
                        {0, 1, 4, 0, 0x0001}, {0, 1, 4, 1, 0x7bff}, {0, 1, 4, 2, 0x8000}, {1, 0, 5, 0, 0x7e00},
                        {1, 0, 5, 1, 0x7c00}, {1, 1, 6, 2, 0x8000}, {1, 1, 6, 3, 0x7bff}, {1, 1, 6, 4, 0xfbff},
                        {1, 1, 6, 5, 0x0001}, {1, 1, 6, 6, 0x0010}, {1, 1, 6, 7, 0x0018}, {1, 1, 6, 8, 0x0028}};

  pages.push_back(make_page("d64_fp8_bf16", 64, 64));
  pages.back().bf16_input = true;
  pages.back().tokens = 50;
  set_elements(pages.back().side[0], kind::fp8, 0.3f);
  set_elements(pages.back().side[1], kind::bf16);
  pages.back().edits = {{0, 0, 1, 0, 0x7fc0}, {0, 0, 1, 1, 0xff80}, {0, 0, 1, 2, 0x7f7f}, {0, 0, 1, 3, 0x0001},
                        {1, 0, 2, 0, 0x7f81}, {1, 0, 2, 1, 0x7f80}, {1, 1, 2, 2, 0x8001}, {1, 1, 2, 3, 0xff7f}};

  pages.push_back(make_page("d128_odd_tokens", 128, 128));
  pages.back().bf16_input = true;
  pages.back().tokens = 37;
  set_plan(pages.back().side[0], transform::hadamard, {2, 2, 1, 0});
  set_plan(pages.back().side[1], transform::identity, {3, 2, 1, 1, 1, 0, 0, 0});
  set_leading(pages.back(), 1);
  // A NaN, an infinity, all zero, all -0, a row scale beyond fp16, finite x with infinite y, subnormal row scales.
  pages.back().edits = {{0, 0, 2, 77, 0x7fc0}, {1, 0, 2, 3, 0xff80},  {0, 0, 9, -1, 0x0000}, {1, 0, 9, -1, 0x8000},
                        {0, 1, 8, 11, 0x7f00}, {1, 1, 8, 127, 0x4b00}, {0, 1, 17, -1, 0x7f7f}, {0, 0, 33, -1, 0x3380},
                        {1, 0, 33, -1, 0xb3a0}, {1, 1, 36, -1, 0x3300}, {1, 0, 36, -1, 0x3301}};
  for (const channel_bits w : order_witness) pages.back().edits.push_back({1, 0, 20, w.channel, w.bits});
  pages.back().edits.push_back({1, 0, 20, -1, 0});

  pages.push_back(make_page("d64_two_tiles", 64, 64));
  pages.back().tokens = 70;
  pages.back().tiles = 2;
  set_plan(pages.back().side[0], transform::identity, {2, 1, 0, 0});
  set_plan(pages.back().side[1], transform::hadamard, {3, 1, 1, 0});

  for (golden::page& p : pages) set_permutations(p);
  return pages;
}

/// Fills in what packkv::reference says of the page: hashes, and a few channels spelled out.
void add_results(golden::page& p, const std::uint8_t* file) {
  golden::fnv all;
  all.add(file, p.bytes());
  p.file_fnv = all.value();
  for (int side = 0; side < 2; ++side) {
    golden::fnv codes, channels;
    for (int h = 0; h < p.heads; ++h) {
      for (int t = 0; t < p.tokens; ++t) {
        const std::uint8_t* tile = file + p.tile_of(side, h, t);
        const clean::token token = bridge::decode(tile, p.side[side], h, t % clean::tile_tokens);
        for (const std::uint16_t code : token.codes) codes.add_value(code, 2);
        for (const float y : token.channels) channels.add_value(golden::comparable_bits(y), 4);
        const int dim = p.side[side].format.head_dim;
        const bool spell = t == 0 || t == 9 || t == 36 || t == p.tokens - 1;
        const int c = (t * 7 + h * 31 + 1) % dim;
        const float x = token.channels[static_cast<std::size_t>(c)];
        if (spell) p.probes.push_back({side, h, t, c, golden::comparable_bits(x)});
      }
    }
    p.side[side].codes_fnv = codes.value();
    p.side[side].channels_fnv = channels.value();
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: make_golden DIRECTORY\n");
    return 2;
  }
  const std::string directory = std::string(argv[1]) + '/';
  std::vector<golden::page> pages = cases();
  for (golden::page& p : pages) {
    const bridge::page_memory memory = bridge::encode(p);
    add_results(p, memory.data());
    std::ofstream file(directory + p.name + ".bin", std::ios::binary);
    file.write(reinterpret_cast<const char*>(memory.data()), static_cast<std::streamsize>(p.bytes()));
    if (!file.flush()) return 1;
  }
  std::ofstream manifest(directory + "manifest.txt");
  golden::write_manifest(manifest, pages);
  return manifest.flush() ? 0 : 1;
}
