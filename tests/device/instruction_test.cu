// SPDX-License-Identifier: Apache-2.0
// Each instruction of detail/ that has a form for the GPU and one for the CPU executor: both give the same on random
// operands. Run on a GPU, this proves the executor's forms; run on the executor, it proves how lanes are brought together.
// Matrices are laid out here a second time, from the PTX ISA's tables, so that fragments.hpp is not its own proof.
#include <cstring>
#include <packkv/detail/async.cuh>
#include <packkv/detail/matrix.cuh>

#include "../support/catch.hpp"
#include "../support/random.hpp"
#include "device_array.hpp"
#include "warp_kernels.cuh"

using namespace packkv_test;
namespace pk = packkv;
namespace ins = packkv::detail::instruction;

namespace {

#if defined(PACKKV_SIMT_EXECUTOR)
constexpr int warps_tried = 16;
#else
constexpr int warps_tried = 4096;
#endif

/// One warp per block: lane l does operand 32 * block + l.
template <class Instruction>
__global__ void run_instruction(typename Instruction::lane* lanes) {
  auto x = lanes[32 * blockIdx.x + threadIdx.x];
  ins::issue<Instruction>(x, pk::detail::call_site::here());
  lanes[32 * blockIdx.x + threadIdx.x] = x;
}

template <class Instruction>
std::vector<typename Instruction::lane> on_device(const std::vector<typename Instruction::lane>& operands) {
  device_array<typename Instruction::lane> data(operands);
  REQUIRE(pk::detail::launch(run_instruction<Instruction>, dim3(static_cast<unsigned>(operands.size() / 32)), 32,
                             cudaStream_t{}, data.data()));
  return data.host();
}

template <class Instruction>
std::vector<typename Instruction::lane> by_definition(std::vector<typename Instruction::lane> lanes) {
  for (std::size_t first = 0; first < lanes.size(); first += 32) {
    typename Instruction::lane* all[32];
    for (std::size_t l = 0; l < 32; ++l) all[l] = &lanes[first + l];
    Instruction::define(all);
  }
  return lanes;
}

// ------------------------------------------------------------------------------------------- the PTX ISA's tables again
// "groupID = %laneid >> 2; threadID_in_group = %laneid % 4".
struct row_column {
  int row, column;
};
/// m16n8k16, .f16: a0..a7 are the halves of the four registers in order.
row_column a_f16(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  const int row = (i < 2) || (i >= 4 && i < 6) ? group : group + 8;
  return {row, thread * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
row_column b_f16(int lane, int i) { return {(lane % 4) * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane >> 2}; }
/// m16n8k32, .u8: a0..a15 are the bytes of the four registers in order; m16n8k16 has the first eight.
row_column a_u8(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  const int row = (i < 4) || (i >= 8 && i < 12) ? group : group + 8;
  return {row, thread * 4 + (i & 3) + (i >= 8 ? 16 : 0)};
}
row_column b_u8(int lane, int i) { return {(lane % 4) * 4 + (i & 3) + (i >= 4 ? 16 : 0), lane >> 2}; }
row_column c_f32(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {i < 2 ? group : group + 8, thread * 2 + (i & 1)};
}

// --------------------------------------------------------------------------------------------------- 16-bit operands
template <bool BFloat>
double value_of(std::uint32_t x) {
  const auto bits = static_cast<std::uint16_t>(x);
  return static_cast<double>(BFloat ? pk::bfloat16_to_float(bits) : pk::half_to_float(bits));
}
template <bool BFloat>
std::uint16_t bits_of(float x) {
  return BFloat ? pk::float_to_bfloat16(x) : pk::float_to_half(x);
}

template <bool BFloat, class A, class B, class C>
std::vector<typename ins::mma_16bit<BFloat>::lane> mma_16bit_operands(A&& a, B&& b, C&& c) {
  std::vector<typename ins::mma_16bit<BFloat>::lane> lanes(32 * warps_tried);
  for (auto& x : lanes) {
    for (auto& r : x.a) r = a() | static_cast<std::uint32_t>(a()) << 16;
    for (auto& r : x.b) r = b() | static_cast<std::uint32_t>(b()) << 16;
    for (auto& r : x.d) r = c();
  }
  return lanes;
}

/// Largest difference from the exact result, relative to the largest term; and how many results are not its rounding.
template <bool BFloat>
std::pair<double, int> compare_mma_16bit(const std::vector<typename ins::mma_16bit<BFloat>::lane>& operands) {
  using instruction = ins::mma_16bit<BFloat>;
  const auto got = on_device<instruction>(operands), expected = by_definition<instruction>(operands);
  double worst = 0.0;
  int different = 0;
  for (std::size_t w = 0; w < got.size() / 32; ++w) {
    double a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
      const auto& x = operands[32 * w + static_cast<std::size_t>(l)];
      for (int i = 0; i < 8; ++i) a[a_f16(l, i).row][a_f16(l, i).column] = value_of<BFloat>(x.a[i / 2] >> 16 * (i % 2));
      for (int i = 0; i < 4; ++i) b[b_f16(l, i).row][b_f16(l, i).column] = value_of<BFloat>(x.b[i / 2] >> 16 * (i % 2));
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const std::size_t at = 32 * w + static_cast<std::size_t>(l);
        const auto [row, column] = c_f32(l, i);
        double sum = static_cast<double>(operands[at].d[i]), largest = std::abs(sum);
        for (int k = 0; k < 16; ++k) {
          sum += a[row][k] * b[k][column];
          largest = std::max(largest, std::abs(a[row][k] * b[k][column]));
        }
        if (expected[at].d[i] != static_cast<float>(sum)) return {INFINITY, -1};  // the definition itself is wrong
        if (got[at].d[i] != expected[at].d[i]) ++different;
        if (largest > 0.0) worst = std::max(worst, std::abs(static_cast<double>(got[at].d[i]) - sum) / largest);
      }
  }
  return {worst, different};
}

template <bool BFloat>
void test_mma_16bit(std::uint64_t seed) {
  random_source random(seed);
  const auto integer = [&] { return bits_of<BFloat>(static_cast<float>(random.between(-128, 128))); };
  const auto integer_sum = [&] { return static_cast<float>(random.between(-1000000, 1000000)); };
  INFO("integers: every partial sum is a float");
  const auto exact = compare_mma_16bit<BFloat>(mma_16bit_operands<BFloat>(integer, integer, integer_sum));
  CHECK(exact.first == 0.0);
  CHECK(exact.second == 0);

  INFO("random numbers of many sizes");
  const auto number = [&] {
    return bits_of<BFloat>(random.normal() * std::exp2(static_cast<float>(random.between(-6, 6))));
  };
  const auto sum = [&] { return random.normal() * std::exp2(static_cast<float>(random.between(-6, 12))); };
  const auto rounded = compare_mma_16bit<BFloat>(mma_16bit_operands<BFloat>(number, number, sum));
  std::printf("%s: largest error 2^%.2f of the largest term, %d of %d results not the exact sum rounded\n",
              ins::mma_16bit<BFloat>::name, std::log2(rounded.first), rounded.second, 128 * warps_tried);
  CHECK(rounded.first <= static_cast<double>(ins::mma_16bit<BFloat>::bound));
}

// --------------------------------------------------------------------------------------------------- 8-bit operands
template <int Depth>
void test_mma_u8s8(std::uint64_t seed) {
  using instruction = ins::mma_u8s8_of<Depth>;
  random_source random(seed);
  std::vector<typename instruction::lane> operands(32 * warps_tried);
  for (auto& x : operands) {
    for (auto& r : x.a) r = static_cast<std::uint32_t>(random.bits());
    for (auto& r : x.b) r = static_cast<std::uint32_t>(random.bits());
    for (auto& r : x.d) r = static_cast<std::int32_t>(random.bits());  // sums wrap
  }
  const auto got = on_device<instruction>(operands), expected = by_definition<instruction>(operands);
  int wrong = 0, wrong_definition = 0;
  for (std::size_t w = 0; w < got.size() / 32; ++w) {
    int a[16][Depth], b[Depth][8];
    for (int l = 0; l < 32; ++l) {
      const auto& x = operands[32 * w + static_cast<std::size_t>(l)];
      for (int i = 0; i < Depth / 2; ++i)
        a[a_u8(l, i).row][a_u8(l, i).column] = static_cast<std::uint8_t>(x.a[i / 4] >> 8 * (i % 4));
      for (int i = 0; i < Depth / 4; ++i)
        b[b_u8(l, i).row][b_u8(l, i).column] = static_cast<std::int8_t>(x.b[i / 4] >> 8 * (i % 4));
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const std::size_t at = 32 * w + static_cast<std::size_t>(l);
        const auto [row, column] = c_f32(l, i);
        std::int64_t sum = operands[at].d[i];
        for (int k = 0; k < Depth; ++k) sum += a[row][k] * b[k][column];
        wrong += got[at].d[i] != static_cast<std::int32_t>(sum);
        wrong_definition += expected[at].d[i] != static_cast<std::int32_t>(sum);
      }
  }
  CHECK(wrong == 0);
  CHECK(wrong_definition == 0);
}

// ---------------------------------------------------------------------------------------------------------- ldmatrix
/// Lane l hands in row order[l] of 64 rows of 16 bytes, and all matrices come back, as they lie and transposed.
template <int Count>
__global__ void run_ldmatrix(const std::uint32_t* rows, const int* order, std::uint32_t* out) {
  __shared__ __align__(16) std::uint32_t tile[64 * 4];
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 4; i += 32) tile[i] = rows[i];
  __syncwarp();
  const void* row = tile + 4 * order[threadIdx.x];
  std::uint32_t r[Count], transposed[Count];
  pk::detail::ldmatrix(r, row);
  pk::detail::ldmatrix_transposed(transposed, row);
  for (int i = 0; i < Count; ++i) {
    out[2 * (Count * threadIdx.x + static_cast<unsigned>(i))] = r[i];
    out[2 * (Count * threadIdx.x + static_cast<unsigned>(i)) + 1] = transposed[i];
  }
}

template <int Count>
void test_ldmatrix(random_source& random) {
  std::vector<std::uint32_t> rows(64 * 4);
  for (auto& x : rows) x = static_cast<std::uint32_t>(random.bits());
  std::vector<int> order(32);
  for (auto& i : order) i = random.between(0, 63);
  device_array<std::uint32_t> device_rows(rows), out(64 * Count);
  device_array<int> device_order(order);
  REQUIRE(pk::detail::launch(run_ldmatrix<Count>, dim3(1), 32, cudaStream_t{},
                             static_cast<const std::uint32_t*>(device_rows.data()),
                             static_cast<const int*>(device_order.data()), out.data()));
  const auto got = out.host();
  const auto element = [&](int matrix, int row, int column) {
    const int which = order[static_cast<std::size_t>(8 * matrix + row)];
    return rows[static_cast<std::size_t>(4 * which + column / 2)] >> 16 * (column % 2) & 0xffffu;
  };
  int wrong = 0;
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < Count; ++i) {
      const int g = l >> 2, t = l % 4;
      const auto at = static_cast<std::size_t>(2 * (Count * l + i));
      wrong += got[at] != (element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16);
      wrong += got[at + 1] != (element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16);
    }
  INFO("matrices " << Count);
  CHECK(wrong == 0);
}

// -------------------------------------------------------------------------------------------------- asynchronous copies
/// Each of `warps` warps copies rounds * 32 words through its own buffer, one bulk copy or cp.async group at a time, and
/// writes the words in reverse. cp.async copies the lower half of the lanes and zeros for the others.
template <int Bytes>
__global__ void copy_per_thread(const std::uint32_t* in, std::uint32_t* out, int rounds) {
  constexpr int words = Bytes / 4;
  __shared__ __align__(16) std::uint32_t buffer[2][4][32 * words];
  const int warp = pk::detail::warp_id(), lane = pk::detail::lane_id();
  const auto first = [&](int round) { return (static_cast<int>(blockIdx.x) * 4 + warp) * rounds * 32 * words + round * 32 * words; };
  const auto start = [&](int round) {
    if (round < rounds)
      pk::detail::copy_async<Bytes>(&buffer[round % 2][warp][lane * words], in + first(round) + lane * words, lane < 20);
    pk::detail::commit_copies();
  };
  start(0);
  for (int round = 0; round < rounds; ++round) {
    start(round + 1);
    pk::detail::wait_copies<1>();
    __syncwarp();
    for (int i = 0; i < words; ++i) out[first(round) + lane * words + i] = buffer[round % 2][warp][(31 - lane) * words + i];
    __syncwarp();
  }
  pk::detail::wait_copies<0>();
}

template <int Bytes>
void test_copy_per_thread(random_source& random) {
  constexpr int words = Bytes / 4, rounds = 5, blocks = 3;
  std::vector<std::uint32_t> in(static_cast<std::size_t>(blocks * 4 * rounds * 32 * words));
  for (auto& x : in) x = static_cast<std::uint32_t>(random.bits());
  device_array<std::uint32_t> device_in(in), out(in.size());
  out.poison();
  REQUIRE(pk::detail::launch(copy_per_thread<Bytes>, dim3(blocks), 128, cudaStream_t{},
                             static_cast<const std::uint32_t*>(device_in.data()), out.data(), rounds));
  const auto got = out.host();
  int wrong = 0;
  for (std::size_t i = 0; i < in.size(); ++i) {
    const std::size_t lane = i / words % 32, base = i / words / 32 * 32, from = 31 - lane;
    wrong += got[i] != (from < 20 ? in[(base + from) * words + i % words] : 0u);
  }
  INFO("bytes " << Bytes);
  CHECK(wrong == 0);
}

/// A warp copies, the others consume: `full` says that a stage has arrived, `empty` that all its readers are done.
template <int Stages>
__global__ void produce_and_consume(const std::uint32_t* in, std::uint32_t* sums, int tiles) {
  constexpr int words = 128;
  struct stage {
    std::uint32_t data[words];
  };
  auto* stages = reinterpret_cast<stage*>(pk::detail::dynamic_shared());
  __shared__ pk::detail::mbarrier full[Stages], empty[Stages];
  const int warp = pk::detail::warp_id(), lane = pk::detail::lane_id(), consumers = static_cast<int>(blockDim.x) / 32 - 1;
  if (threadIdx.x == 0) {
    for (int s = 0; s < Stages; ++s) {
      full[s].init(1);
      empty[s].init(static_cast<unsigned>(32 * consumers));
    }
    pk::detail::fence_barrier_init();
  }
  __syncthreads();
  if (warp == 0) {
    if (lane == 0)
      for (int t = 0; t < tiles; ++t) {
        const int s = t % Stages;
        empty[s].wait(static_cast<unsigned>(t / Stages % 2) ^ 1u);  // at first there is nothing to wait for
        full[s].arrive_expect(sizeof(stage));
        pk::detail::bulk_copy(stages[s].data, in + t * words, 256, full[s]);
        pk::detail::bulk_copy(stages[s].data + 64, in + t * words + 64, 256, full[s]);
      }
  } else {
    std::uint32_t sum = 0;
    for (int t = 0; t < tiles; ++t) {
      const int s = t % Stages;
      full[s].wait(static_cast<unsigned>(t / Stages % 2));
      for (int i = 0; i < words; i += 32) sum = 31 * sum + stages[s].data[(i + lane + warp) % words];
      empty[s].arrive();
    }
    sums[static_cast<int>(threadIdx.x) - 32] = sum;
  }
}

/// 2^x of the device for `count` floats.
template <int Threads>
__global__ void powers(const float* x, float* y, int count) {
  const int i = static_cast<int>(blockIdx.x) * Threads + static_cast<int>(threadIdx.x);
  if (i < count) y[i] = pk::detail::exp2_approx(x[i]);
}

/// The shuffles and reductions of detail/, and wide loads.
template <int Threads>
__global__ void warp_shims(const std::uint32_t* in, std::uint32_t* out) {
  const int lane = pk::detail::lane_id();
  const std::uint32_t x = in[threadIdx.x];
  std::uint32_t* mine = out + 16 * threadIdx.x;
  mine[0] = pk::detail::shuffle_xor(x, 5);
  mine[1] = pk::detail::shuffle(x, (lane * 7 + 3) % 32);
  mine[2] = pk::detail::warp_sum(x);
  mine[3] = __float_as_uint(pk::detail::warp_max(__uint_as_float(x & 0xbfffffffu)));
  const auto wide = pk::detail::load16(in + 4 * (lane / 4));
  const auto narrow = pk::detail::load8(in + 2 * (lane / 2));
  mine[4] = wide.word[lane % 4];
  mine[5] = narrow.word[lane % 2];
  mine[6] = static_cast<std::uint32_t>(pk::detail::warp_id());
  mine[7] = static_cast<std::uint32_t>(lane);
  pk::detail::store16(mine + 8, wide);
  mine[12] = __float_as_uint(pk::detail::load_fresh(reinterpret_cast<const float*>(in) + threadIdx.x));
}

}  // namespace

TEST_CASE("instruction: mma of float16 and bfloat16 is exact where sums are floats, else within its bound", "[instruction]") {
  test_mma_16bit<false>(1);
  test_mma_16bit<true>(2);
}

TEST_CASE("instruction: mma of float16 keeps every subnormal", "[instruction]") {
  random_source random(3);
  std::uint32_t next = 0;
  const auto code = [&] { return static_cast<std::uint16_t>(next++ % 1024); };  // code * 2^-24, all of them
  const auto weight = [&] { return pk::float_to_half(static_cast<float>(random.between(0, 2047)) * 16.0f); };
  const auto zero = [] { return 0.0f; };
  const auto result = compare_mma_16bit<false>(mma_16bit_operands<false>(code, weight, zero));
  CHECK(result.first <= static_cast<double>(ins::mma_16bit<false>::bound));
  // Products are multiples of 2^-24 below 2^-10, their sums have at most 22 bits.
  const auto one = [&] { return pk::float_to_half(std::exp2(static_cast<float>(random.between(0, 4)))); };
  const auto exact = compare_mma_16bit<false>(mma_16bit_operands<false>(code, one, zero));
  CHECK(exact.first == 0.0);
  CHECK(exact.second == 0);
}

TEST_CASE("instruction: mma of u8 x s8 has the same bits, sums wrap", "[instruction]") {
  test_mma_u8s8<32>(4);
  test_mma_u8s8<16>(5);
}

TEST_CASE("instruction: movmatrix transposes", "[instruction]") {
  random_source random(6);
  std::vector<ins::movmatrix::lane> operands(32 * warps_tried);
  for (auto& x : operands) x.x = static_cast<std::uint32_t>(random.bits());
  const auto got = on_device<ins::movmatrix>(operands), expected = by_definition<ins::movmatrix>(operands);
  int wrong = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const std::size_t first = i / 32 * 32, g = i % 32 / 4, t = i % 4;
    const auto element = [&](std::size_t row, std::size_t column) {
      return operands[first + 4 * row + column / 2].x >> 16 * (column % 2) & 0xffffu;
    };
    wrong += got[i].x != (element(2 * t, g) | element(2 * t + 1, g) << 16) || expected[i].x != got[i].x;
  }
  CHECK(wrong == 0);
}

TEST_CASE("instruction: ldmatrix loads rows of any address, as they lie and transposed", "[instruction]") {
  random_source random(7);
  for (int round = 0; round < 4; ++round) {
    test_ldmatrix<1>(random);
    test_ldmatrix<2>(random);
    test_ldmatrix<4>(random);
  }
}

TEST_CASE("instruction: cp.async copies 4, 8 and 16 bytes, or zeros", "[instruction]") {
  random_source random(8);
  test_copy_per_thread<4>(random);
  test_copy_per_thread<8>(random);
  test_copy_per_thread<16>(random);
}

TEST_CASE("instruction: bulk copies and arrivals end the phases of mbarriers", "[instruction]") {
  random_source random(9);
  constexpr int words = 128;
  for (const int tiles : {1, 2, 3, 11, 40}) {
    INFO("tiles " << tiles);
    std::vector<std::uint32_t> in(static_cast<std::size_t>(tiles * words));
    for (auto& x : in) x = static_cast<std::uint32_t>(random.bits());
    device_array<std::uint32_t> device_in(in), sums(96);
    sums.poison();
    const auto run = [&](auto kernel, int stages) {
      REQUIRE(pk::detail::launch(kernel, dim3(1), pk::detail::block_size(128, stages * words * 4), cudaStream_t{},
                                 static_cast<const std::uint32_t*>(device_in.data()), sums.data(), tiles));
    };
    if (tiles % 2 == 0) run(produce_and_consume<2>, 2);
    else run(produce_and_consume<3>, 3);
    const auto got = sums.host();
    int wrong = 0;
    for (int thread = 32; thread < 128; ++thread) {
      std::uint32_t sum = 0;
      for (int t = 0; t < tiles; ++t)
        for (int i = 0; i < words; i += 32)
          sum = 31 * sum + in[static_cast<std::size_t>(t * words + (i + thread % 32 + thread / 32) % words)];
      wrong += got[static_cast<std::size_t>(thread - 32)] != sum;
    }
    CHECK(wrong == 0);
  }
}

// The PTX ISA on ex2.approx: 2 units in the last place from the correctly rounded result.
TEST_CASE("instruction: 2^x is within two units of the rounded result, 0 for -inf", "[instruction]") {
  random_source random(10);
  std::vector<float> x{-INFINITY, 0.0f, -0.0f, -126.0f, -127.5f, -149.0f, -150.0f, -200.0f, 127.0f, 1.0f, -1.0f};
  while (x.size() < 32 * static_cast<std::size_t>(warps_tried)) x.push_back(static_cast<float>(random.uniform() * 160.0 - 140.0));
  device_array<float> device_x(x), y(x.size());
  y.poison();
  REQUIRE(pk::detail::launch(powers<128>, dim3(static_cast<unsigned>((x.size() + 127) / 128)), 128, cudaStream_t{},
                             static_cast<const float*>(device_x.data()), y.data(), static_cast<int>(x.size())));
  const auto got = y.host();
  std::int64_t worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto rounded = static_cast<float>(std::exp2(static_cast<double>(x[i])));
    std::int32_t bits[2];  // consecutive for consecutive floats that are not negative
    std::memcpy(&bits[0], &got[i], 4);
    std::memcpy(&bits[1], &rounded, 4);
    worst = std::max(worst, std::abs(std::int64_t{bits[0]} - bits[1]));
  }
  std::printf("exp2_approx: at most %d units from the rounded result\n", static_cast<int>(worst));
  CHECK(got[0] == 0.0f);
  CHECK(worst <= 2);
}

TEST_CASE("instruction: shuffles give what the CUDA programming guide says", "[instruction]") {
  device_array<int> out(64 * 12);
  REQUIRE(pk::detail::launch(shuffle_all<12>, dim3(1), 64, cudaStream_t{}, out.data()));
  const auto got = out.host();
  for (int t = 0; t < 64; ++t)
    for (int k = 0; k < 12; ++k) {
      INFO("thread " << t << " shuffle " << k);
      CHECK(got[static_cast<std::size_t>(12 * t + k)] == expected_shuffle(k, t % 32));
    }
}

TEST_CASE("instruction: votes, matches and reductions see all lanes of their mask and no other", "[instruction]") {
  device_array<unsigned> out(32 * 12);
  REQUIRE(pk::detail::launch(vote_all<12>, dim3(1), 32, cudaStream_t{}, out.data()));
  const auto got = out.host();
  for (unsigned lane = 0; lane < 32; ++lane)
    for (int k = 0; k < 12; ++k) {
      INFO("lane " << lane << " result " << k);
      CHECK(got[12 * lane + static_cast<unsigned>(k)] == expected_vote(k, lane));
    }
}

TEST_CASE("instruction: the shuffles, sums and wide accesses of detail/", "[instruction]") {
  random_source random(11);
  std::vector<std::uint32_t> in(64);
  for (auto& x : in) x = static_cast<std::uint32_t>(random.bits()) & 0x7fffffffu;
  device_array<std::uint32_t> device_in(in), out(64 * 16);
  out.poison();
  REQUIRE(pk::detail::launch(warp_shims<64>, dim3(1), 64, cudaStream_t{},
                             static_cast<const std::uint32_t*>(device_in.data()), out.data()));
  const auto got = out.host();
  for (unsigned t = 0; t < 64; ++t) {
    const unsigned lane = t % 32, first = t - lane;
    const std::uint32_t* mine = got.data() + 16 * t;
    std::uint32_t sum = 0;
    float largest = 0.0f;
    for (unsigned l = 0; l < 32; ++l) {
      sum += in[first + l];
      float f;
      const std::uint32_t bits = in[first + l] & 0xbfffffffu;
      std::memcpy(&f, &bits, 4);
      largest = std::max(largest, f);
    }
    std::uint32_t largest_bits;
    std::memcpy(&largest_bits, &largest, 4);
    CHECK(mine[0] == in[first + (lane ^ 5)]);
    CHECK(mine[1] == in[first + (lane * 7 + 3) % 32]);
    CHECK(mine[2] == sum);
    CHECK(mine[3] == largest_bits);
    CHECK(mine[4] == in[lane]);
    CHECK(mine[5] == in[lane]);
    CHECK(mine[6] == t / 32);
    CHECK(mine[7] == lane);
    CHECK(std::memcmp(mine + 8, in.data() + 4 * (lane / 4), 16) == 0);
    CHECK(mine[12] == in[t]);
  }
}
