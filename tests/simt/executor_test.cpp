// SPDX-License-Identifier: Apache-2.0
// The executor itself: collectives give what CUDA gives, broken rules are errors that name the place, schedules do not
// change a correct kernel and do change a wrong one.
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include <packkv/detail/cuda.cuh>

#include "device/warp_kernels.cuh"
#include "support/catch.hpp"

namespace packkv_test {
namespace {

using packkv_simt::order;
using packkv_simt::schedule;

constexpr unsigned full = 0xffffffffu;

std::vector<schedule> all_schedules() {
  return {{order::in_order}, {order::reverse}, {order::random, 1}, {order::random, 2}, {order::random, 3}, {order::ahead, 0, 0}, {order::ahead, 0, 1}};
}

/// The message of the error that a launch of `kernel` ends with; "" if it ends well.
template <class... Parameter, class... Argument>
std::string error_of(void (*kernel)(Parameter...), int threads, Argument... argument) {
  try {
    packkv_simt::launch(kernel, dim3(1), dim3(static_cast<unsigned>(threads)), argument...);
  } catch (const packkv_simt::error& e) {
    return e.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  INFO(text);
  CHECK(text.find(part) != std::string::npos);
  return text.find(part) != std::string::npos;
}
std::string at_line(int line) { return "executor_test.cpp:" + std::to_string(line); }

// ----------------------------------------------------------------------------------------------------------- coordinates
__global__ void write_coordinates(int* out) {
  const int block = static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  const int thread = static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  out[block * threads + thread] = block * threads + thread;
}

// --------------------------------------------------------------------------------------------------------------- barriers
__global__ void reverse_through_shared(int* data) {
  __shared__ int tile[256];
  const int n = static_cast<int>(blockDim.x), i = static_cast<int>(threadIdx.x);
  int* mine = data + n * static_cast<int>(blockIdx.x);
  tile[i] = mine[i];
  __syncthreads();
  mine[i] = tile[n - 1 - i];
}

__global__ void count_in_shared(int* out, unsigned* total) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, static_cast<int>(threadIdx.x));
  if (threadIdx.x >= 70) return;  // barriers count the threads that have not exited
  const int even = __syncthreads_count(threadIdx.x % 2 == 0);
  if (threadIdx.x == 0) out[blockIdx.x] = sum + 1000000 * even;
  atomicOr(total, 1u << blockIdx.x);
}

// ------------------------------------------------------------------------------------------------------------ wrong kernels
constexpr int divergent_line = __LINE__ + 3;
__global__ void divergent_barrier() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

constexpr int exited_line = __LINE__ + 3;
__global__ void exited_lane(int* out) {
  if (threadIdx.x % 32 == 9) return;
  out[threadIdx.x] = __shfl_sync(full, 1, 0);
}

constexpr int skipped_line = __LINE__ + 3;
__global__ void skipped_by_a_lane(int* out) {
  if (threadIdx.x != 12)
    out[0] = __shfl_xor_sync(full, 1, 1);
  __syncthreads();
}

constexpr int mixed_line = __LINE__ + 3;
__global__ void different_collectives(unsigned* out) {
  if (threadIdx.x < 16)
    out[0] = __ballot_sync(full, 1);
  else
    out[1] = static_cast<unsigned>(__any_sync(full, 1));
}

__global__ void not_in_own_mask() { __syncwarp(0x0000ffffu); }
__global__ void source_not_in_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}
__global__ void trap() {
  if (threadIdx.x == 3) __trap();
}
__global__ void throws() {
  if (threadIdx.x == 5) throw std::runtime_error("no such thing");
}

/// Rotates the values of a warp through shared memory. Without the barriers it needs, some schedule shows it.
template <bool Synchronise>
__global__ void rotate(int* out) {
  __shared__ int value[64];
  const int i = static_cast<int>(threadIdx.x);
  for (int round = 0; round < 3; ++round) {
    value[i] = 100 * round + i;
    if (Synchronise) __syncwarp();
    out[64 * round + i] = value[i / 32 * 32 + (i + 1) % 32];
    if (Synchronise) __syncwarp();
  }
}

#if !defined(PACKKV_SIMT_RACE)
__global__ void read_shared_unwritten(std::uint32_t* out) {
  __shared__ std::uint32_t word;
  out[blockIdx.x] = word;
  word = 7;
}
#endif

}  // namespace

TEST_CASE("every thread of every block runs once and knows its place", "[executor]") {
  for (const schedule& s : all_schedules()) {
    INFO(packkv_simt::to_string(s));
    const packkv_simt::with_schedule guard(s);
    std::vector<int> out(2 * 3 * 4 * 5 * 3 * 7, -1), expected(out.size());
    std::iota(expected.begin(), expected.end(), 0);
    REQUIRE(packkv_simt::launch(write_coordinates, dim3(2, 3, 4), dim3(5, 3, 7), out.data()) == 0);
    CHECK(out == expected);
  }
}

TEST_CASE("block barriers order shared memory, and blocks do not see each other's", "[executor]") {
  for (const schedule& s : all_schedules()) {
    INFO(packkv_simt::to_string(s));
    const packkv_simt::with_schedule guard(s);
    std::vector<int> data(5 * 224), expected(data.size());
    std::iota(data.begin(), data.end(), 0);
    for (int b = 0; b < 5; ++b)
      for (int i = 0; i < 224; ++i) expected[static_cast<std::size_t>(224 * b + i)] = 224 * b + 223 - i;
    packkv_simt::launch(reverse_through_shared, dim3(5), dim3(224), data.data());
    CHECK(data == expected);
    std::vector<int> out(6, 0);
    unsigned total = 0;
    packkv_simt::launch(count_in_shared, dim3(6), dim3(100), out.data(), &total);
    CHECK(out == std::vector<int>(6, 99 * 100 / 2 + 1000000 * 35));
    CHECK(total == 63);
  }
}

#if !defined(PACKKV_SIMT_RACE)  // there it is an error
TEST_CASE("a block finds nothing of another in shared memory", "[executor]") {
  for (const schedule& s : all_schedules()) {
    INFO(packkv_simt::to_string(s));
    const packkv_simt::with_schedule guard(s);
    std::vector<std::uint32_t> out(4);
    packkv_simt::launch(read_shared_unwritten, dim3(4), dim3(1), out.data());
    for (const std::uint32_t word : out)
      CHECK(word == (s.kind == order::reverse || (s.kind == order::random && word == 0) ? 0u : 0xffffffffu));
  }
}
#endif

TEST_CASE("atomics return the old value and wrap as CUDA's do", "[executor]") {
  unsigned u = 0;
  CHECK(atomicInc(&u, 2) == 0);
  CHECK(atomicInc(&u, 2) == 1);
  CHECK(atomicInc(&u, 2) == 2);
  CHECK(u == 0);
  CHECK(atomicDec(&u, 5) == 0);
  CHECK(u == 5);
  CHECK(atomicExch(&u, 9) == 5);
  CHECK(atomicCAS(&u, 8, 1) == 9);
  CHECK(atomicCAS(&u, 9, 1) == 9);
  CHECK(u == 1);
  CHECK(atomicOr(&u, 6) == 1);
  CHECK(atomicAnd(&u, 3) == 7);
  CHECK(atomicMax(&u, 2) == 3);
  CHECK(atomicXor(&u, 1) == 3);
  CHECK(u == 2);
  unsigned long long wide = 1ull << 40;
  CHECK(atomicAdd(&wide, 1) == 1ull << 40);
  CHECK(wide == (1ull << 40) + 1);
  float f = 1.5f;
  CHECK(atomicAdd(&f, 2) == 1.5f);
  CHECK(f == 3.5f);
}

TEST_CASE("a divergent __syncthreads is an error that names both lines", "[executor]") {
  for (const schedule& s : all_schedules()) {
    const packkv_simt::with_schedule guard(s);
    const std::string message = error_of(divergent_barrier, 64);
    contains(message, "divergent __syncthreads");
    contains(message, "divergent_barrier");
    contains(message, "block (0,0,0)");
    contains(message, at_line(divergent_line));
    contains(message, at_line(divergent_line + 2));
    contains(message, packkv_simt::to_string(s));
  }
}

TEST_CASE("a mask that names an exited lane is an error", "[executor]") {
  for (const schedule& s : all_schedules()) {
    const packkv_simt::with_schedule guard(s);
    std::vector<int> out(64);
    const std::string message = error_of(exited_lane, 64, out.data());
    contains(message, "lane 9 has exited");
    contains(message, "__shfl_sync (mask 0xffffffff)");
    contains(message, at_line(exited_line));
  }
}

TEST_CASE("a lane that does not exist cannot be named", "[executor]") {
  std::vector<int> out(64 * 12);
  contains(error_of(shuffle_all<12>, 48, out.data()), "lane 16 does not exist");
}

TEST_CASE("a lane that waits at a block barrier while others name it is an error", "[executor]") {
  for (const schedule& s : all_schedules()) {
    const packkv_simt::with_schedule guard(s);
    int out = 0;
    const std::string message = error_of(skipped_by_a_lane, 32, &out);
    contains(message, "lane 12 waits at __syncthreads at");
    contains(message, at_line(skipped_line));
  }
}

TEST_CASE("lanes of one mask at different collectives are an error", "[executor]") {
  for (const schedule& s : all_schedules()) {
    const packkv_simt::with_schedule guard(s);
    unsigned out[2];
    const std::string message = error_of(different_collectives, 32, &out[0]);
    contains(message, "different collectives");
    contains(message, at_line(mixed_line));
    contains(message, at_line(mixed_line + 2));
  }
}

TEST_CASE("other misuse ends a launch with its place, and the next launch is unharmed", "[executor]") {
  std::vector<int> out(64 * 12);
  contains(error_of(not_in_own_mask, 32), "does not name the calling lane");
  contains(error_of(source_not_in_mask, 32, out.data()), "lane 20, which its mask does not name");
  contains(error_of(trap, 32), "thread (3,0,0) (warp 0, lane 3)");
  contains(error_of(throws, 32), "no such thing");
  CHECK(error_of(shuffle_all<12>, 64, out.data()).empty());
  CHECK_THROWS_AS(__syncwarp(), packkv_simt::error);
}

TEST_CASE("an impossible configuration is refused as by the CUDA runtime", "[executor]") {
  CHECK(packkv_simt::launch(trap, dim3(1), dim3(1025)) == cudaErrorInvalidConfiguration);
  CHECK(packkv_simt::launch(trap, dim3(0), dim3(32)) == cudaErrorInvalidConfiguration);
  CHECK(packkv::detail::launch(trap, dim3(1), 0, nullptr).code == packkv::status_code::cuda_error);
}

TEST_CASE("a missing __syncwarp shows under some schedule, and a present one under none", "[executor]") {
  std::vector<int> expected(192);
  for (int i = 0; i < 192; ++i) expected[static_cast<std::size_t>(i)] = i / 64 * 100 + i % 64 / 32 * 32 + (i + 1) % 32;
  int wrong = 0;
  for (const schedule& s : all_schedules()) {
    INFO(packkv_simt::to_string(s));
    const packkv_simt::with_schedule guard(s);
    std::vector<int> out(192);
    packkv_simt::launch(rotate<true>, dim3(1), dim3(64), out.data());
    CHECK(out == expected);
    try {
      packkv_simt::launch(rotate<false>, dim3(1), dim3(64), out.data());
      wrong += out != expected ? 1 : 0;
    } catch (const packkv_simt::error&) {  // the race detector, in the program that has it
      ++wrong;
    }
  }
  CHECK(wrong > 0);
}

TEST_CASE("schedules are named in text", "[executor]") {
  for (const schedule& s : all_schedules()) CHECK(packkv_simt::to_string(packkv_simt::parse_schedule(packkv_simt::to_string(s))) == packkv_simt::to_string(s));
  CHECK_THROWS_AS(packkv_simt::parse_schedule("sideways"), std::invalid_argument);
}

}  // namespace packkv_test
