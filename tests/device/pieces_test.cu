// SPDX-License-Identifier: Apache-2.0
// The pieces that matrix-instruction kernels are made of: operands unpacked from code words, and the ring of tiles.
#include <packkv/thread/unpack.cuh>
#include <packkv/warp/tile_ring.cuh>

#include <packkv/detail/matrix.cuh>

#include "../support/catch.hpp"
#include "../support/random.hpp"
#include "device_array.hpp"

using namespace packkv_test;
namespace pk = packkv;

namespace {

/// Codes of a strip of 64 tokens as the matrix instructions see them: products with a unit matrix give them back, eight
/// columns of it at a time. codes[token * channels + channel].
template <int Width, int StripChannels>
__global__ void read_keys(const std::uint32_t* words, std::int32_t* codes) {
  static_assert(StripChannels == 16 || StripChannels == 32, "");
  const int lane = pk::detail::lane_id();
  using unpacker = std::conditional_t<StripChannels == 32, pk::thread::unpacker<Width, pk::thread::key_plane_32>,
                                      pk::thread::unpacker<Width, pk::thread::key_plane_16>>;
  typename unpacker::words w;
  unpacker::load(w, words, words + unpacker::low::plane_words, lane);
  const auto tile = [&](auto which) {
    constexpr int t = decltype(which)::value;
    std::uint32_t a[unpacker::registers];
    unpacker::template operand<t>(w, a);
    for (int first = 0; first < StripChannels; first += 8) {
      std::uint32_t b[unpacker::registers / 2];
      for (int r = 0; r < unpacker::registers / 2; ++r) {
        b[r] = 0;
        for (int part = 0; part < 4; ++part) {
          const auto p = pk::detail::fragment::b<1>(lane, r, part);
          if (p.row == first + p.column) b[r] |= 1u << 8 * part;
        }
      }
      std::int32_t d[4] = {};
      pk::detail::mma_u8s8(d, a, b);
      for (int r = 0; r < 4; ++r) {
        const auto p = pk::detail::fragment::c(lane, r);
        codes[(16 * t + p.row) * StripChannels + first + p.column] = d[r];
      }
    }
  };
  tile(std::integral_constant<int, 0>{});
  tile(std::integral_constant<int, 1>{});
  tile(std::integral_constant<int, 2>{});
  tile(std::integral_constant<int, 3>{});
}

/// The same of a V strip, through float16 subnormals: codes[channel * 64 + token].
template <int Width>
__global__ void read_values(const std::uint32_t* words, float* codes) {
  const int lane = pk::detail::lane_id();
  using unpacker = pk::thread::unpacker<Width, pk::thread::value_plane>;
  typename unpacker::words w;
  unpacker::load(w, words, words + unpacker::low::plane_words, lane);
  const auto tile = [&](auto which) {
    constexpr int t = decltype(which)::value;
    std::uint32_t a[4];
    unpacker::template operand<t>(w, a);
    for (int first = 0; first < 16; first += 8) {
      std::uint32_t b[2];
      for (int r = 0; r < 2; ++r) {
        b[r] = 0;
        for (int part = 0; part < 2; ++part) {
          const auto p = pk::detail::fragment::b<2>(lane, r, part);
          if (p.row == first + p.column) b[r] |= 0x6c00u << 16 * part;  // 2^12
        }
      }
      float d[4] = {};
      pk::detail::mma_f16(d, a, b);
      for (int r = 0; r < 4; ++r) {
        const auto p = pk::detail::fragment::c(lane, r);
        codes[p.row * 64 + 16 * t + first + p.column] = d[r] * 4096.0f;
      }
    }
  };
  tile(std::integral_constant<int, 0>{});
  tile(std::integral_constant<int, 1>{});
  tile(std::integral_constant<int, 2>{});
  tile(std::integral_constant<int, 3>{});
}

/// A strip with random codes, written through codec/layout.hpp.
struct coded_strip {
  std::vector<std::uint32_t> words, codes;  // codes[token * channels + channel]

  coded_strip(random_source& random, pk::side which, int width, int channels) {
    pk::strip_layout strips{};
    strips.which = which;
    strips.channels = channels;
    strips.count = 1;
    strips.width[0] = static_cast<std::uint8_t>(width);
    const int low_bits = width == 3 ? 2 : width;
    strips.low[0] = 0;
    strips.high[0] = low_bits * 2 * channels;
    words.assign(static_cast<std::size_t>(width * 2 * channels), 0);
    for (int t = 0; t < 64; ++t)
      for (int c = 0; c < channels; ++c) {
        codes.push_back(static_cast<std::uint32_t>(random.bits()) & ((1u << width) - 1));
        const pk::code_writes writes = pk::split_code(pk::locate(strips, t, c), codes.back());
        for (int i = 0; i < writes.count; ++i) words[static_cast<std::size_t>(writes.write[i].word)] |= writes.write[i].bits;
      }
  }
};

template <int Width, int StripChannels>
void test_keys(random_source& random) {
  const coded_strip strip(random, pk::side::key, Width, StripChannels);
  device_array<std::uint32_t> words(strip.words);
  device_array<std::int32_t> codes(strip.codes.size());
  codes.poison();
  REQUIRE(pk::detail::launch(read_keys<Width, StripChannels>, dim3(1), 32, cudaStream_t{},
                             static_cast<const std::uint32_t*>(words.data()), codes.data()));
  const auto got = codes.host();
  INFO("width " << Width << ", strip of " << StripChannels);
  CHECK(std::equal(got.begin(), got.end(), strip.codes.begin(),
                   [](std::int32_t a, std::uint32_t b) { return a == static_cast<std::int32_t>(b); }));
}

template <int Width>
void test_values(random_source& random) {
  const coded_strip strip(random, pk::side::value, Width, 16);
  device_array<std::uint32_t> words(strip.words);
  device_array<float> codes(strip.codes.size());
  codes.poison();
  REQUIRE(pk::detail::launch(read_values<Width>, dim3(1), 32, cudaStream_t{},
                             static_cast<const std::uint32_t*>(words.data()), codes.data()));
  const auto got = codes.host();
  int wrong = 0;
  for (std::size_t t = 0; t < 64; ++t)
    for (std::size_t c = 0; c < 16; ++c) wrong += got[c * 64 + t] != static_cast<float>(strip.codes[t * 16 + c]);
  INFO("width " << Width);
  CHECK(wrong == 0);
}

/// Every warp walks its tiles (two pieces each, from two arrays) through a ring and writes sums that depend on the order
/// of words.
template <int Stages, pk::warp::copy_engine Engine>
__global__ void sum_tiles(const std::uint32_t* first, int first_bytes, const std::uint32_t* second, int second_bytes,
                          int tiles, std::uint32_t* sums) {
  using ring_type = pk::warp::tile_ring<Stages, Engine>;
  constexpr int warps = 2;
  __shared__ typename ring_type::temp_storage storage[warps];
  const int warp = pk::detail::warp_id(), lane = pk::detail::lane_id(), bytes = first_bytes + second_bytes;
  ring_type ring(storage[warp], pk::detail::dynamic_shared() + warp * Stages * bytes, bytes);
  const auto request = [&](int tile) {
    ring.request({first + tile * (first_bytes / 4), first_bytes}, {second + tile * (second_bytes / 4), second_bytes});
  };
  int next = warp;
  for (int s = 0; s < Stages && next < tiles; ++s, next += warps) request(next);
  for (int tile = warp; tile < tiles; tile += warps) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(ring.wait());
    std::uint32_t sum = 0;
    for (int i = 0; i < bytes / 4; ++i) sum = sum * 31 + words[(i + lane) % (bytes / 4)];
    ring.release();
    if (next < tiles) request(next);
    next += warps;
    sums[tile * 32 + lane] = sum;
  }
}

template <int Stages, pk::warp::copy_engine Engine>
void test_ring(random_source& random) {
  for (const int tiles : {1, 2, 5, 13}) {
    const int first_bytes = 16 * random.between(1, 40), second_bytes = random.one_in(4) ? 0 : 16 * random.between(1, 40);
    std::vector<std::uint32_t> first(static_cast<std::size_t>(tiles * first_bytes / 4)),
        second(static_cast<std::size_t>(tiles * second_bytes / 4));
    for (auto* words : {&first, &second})
      for (auto& x : *words) x = static_cast<std::uint32_t>(random.bits());
    device_array<std::uint32_t> device_first(first), device_second(second), sums(static_cast<std::size_t>(tiles * 32));
    sums.poison();
    REQUIRE(pk::detail::launch(sum_tiles<Stages, Engine>, dim3(1),
                               pk::detail::block_size(64, 2 * Stages * (first_bytes + second_bytes)), cudaStream_t{},
                               static_cast<const std::uint32_t*>(device_first.data()), first_bytes,
                               static_cast<const std::uint32_t*>(device_second.data()), second_bytes, tiles,
                               sums.data()));
    const auto got = sums.host();
    int wrong = 0;
    for (int tile = 0; tile < tiles; ++tile)
      for (int lane = 0; lane < 32; ++lane) {
        const int f = first_bytes / 4, all = f + second_bytes / 4;
        std::uint32_t sum = 0;
        for (int i = 0; i < all; ++i) {
          const int at = (i + lane) % all;
          sum = sum * 31 + (at < f ? first[static_cast<std::size_t>(tile * f + at)]
                                   : second[static_cast<std::size_t>(tile * (all - f) + at - f)]);
        }
        wrong += got[static_cast<std::size_t>(tile * 32 + lane)] != sum;
      }
    INFO("stages " << Stages << ", tiles " << tiles << ", bytes " << first_bytes << " + " << second_bytes);
    CHECK(wrong == 0);
  }
}

}  // namespace

TEST_CASE("operands unpacked from a key strip are its codes, for every width") {
  random_source random(51);
  test_keys<1, 32>(random);
  test_keys<2, 32>(random);
  test_keys<3, 32>(random);
  test_keys<4, 32>(random);
  test_keys<8, 32>(random);
  test_keys<1, 16>(random);
  test_keys<2, 16>(random);
  test_keys<3, 16>(random);
  test_keys<4, 16>(random);
  test_keys<8, 16>(random);
}

TEST_CASE("operands unpacked from a value strip are its codes, for every width") {
  random_source random(52);
  test_values<1>(random);
  test_values<2>(random);
  test_values<3>(random);
  test_values<4>(random);
  test_values<8>(random);
}

TEST_CASE("a ring of tiles hands every tile over whole and in order") {
  random_source random(53);
  test_ring<1, pk::warp::copy_engine::bulk>(random);
  test_ring<2, pk::warp::copy_engine::bulk>(random);
  test_ring<3, pk::warp::copy_engine::bulk>(random);
  test_ring<1, pk::warp::copy_engine::per_thread>(random);
  test_ring<2, pk::warp::copy_engine::per_thread>(random);
  test_ring<4, pk::warp::copy_engine::per_thread>(random);
}
