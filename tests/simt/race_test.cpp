// SPDX-License-Identifier: Apache-2.0
// The race detector finds what it must and names it, and accepts each way to order memory. Only in the program that is
// instrumented (packkv_simt_race_tests).
#if defined(PACKKV_SIMT_RACE)
#include <cstdint>
#include <string>
#include <vector>

#include "../device/device_array.hpp"
#include "support/catch.hpp"

namespace packkv_test {
namespace {

using packkv_simt::order;
using packkv_simt::schedule;

constexpr unsigned full = 0xffffffffu;

std::vector<schedule> all_schedules() {
  return {{order::in_order},  {order::reverse},   {order::random, 1},
          {order::random, 2}, {order::random, 3}, {order::ahead, 0, 1}};
}

/// The error that a launch of `kernel` on `words` zeroed words of global memory ends with; "" if it ends well.
std::string race_of(void (*kernel)(unsigned*), int blocks, int threads) {
  device_array<unsigned> data(std::vector<unsigned>(4096));
  try {
    packkv_simt::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), data.data());
  } catch (const packkv_simt::error& e) {
    return e.what();
  }
  return "";
}

void check_clean(void (*kernel)(unsigned*), int blocks, int threads) {
  for (const schedule& s : all_schedules()) {
    INFO(packkv_simt::to_string(s));
    const packkv_simt::with_schedule guard(s);
    CHECK(race_of(kernel, blocks, threads) == "");
  }
}

/// Both places of the race are in this file at the given lines, in either order.
void check_race(void (*kernel)(unsigned*), int blocks, int threads, const std::string& memory, int line,
                int other_line) {
  for (const schedule& s : all_schedules()) {
    INFO(packkv_simt::to_string(s));
    const packkv_simt::with_schedule guard(s);
    const std::string message = race_of(kernel, blocks, threads);
    INFO(message);
    const auto contains = [&](const std::string& part) { return message.find(part) != std::string::npos; };
    CHECK(contains("race on a byte of " + memory + " memory"));
    CHECK(contains("thread ("));
    CHECK(contains("block ("));
    CHECK(contains(packkv_simt::to_string(s)));
    CHECK(contains("race_test.cpp:" + std::to_string(line)));
    CHECK(contains("race_test.cpp:" + std::to_string(other_line)));
  }
}

/// Who orders a rotation through shared memory.
enum class by { nothing, warp_barrier, block_barrier, shuffle, vote, half_warp_barrier };

template <by How, int Distance>
__global__ void rotate(unsigned* out) {
  __shared__ unsigned value[64];
  const unsigned i = threadIdx.x;
  value[i] = 0;  // or reading it too early would be another error
  __syncthreads();
  value[i] = i;  // line 1
  if (How == by::warp_barrier) __syncwarp();
  if (How == by::block_barrier) __syncthreads();
  if (How == by::shuffle) out[i] = __shfl_xor_sync(full, i, 1);
  if (How == by::vote) out[i] = __ballot_sync(full, 1);
  if (How == by::half_warp_barrier) __syncwarp(i % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  out[i] = value[(i + Distance) % blockDim.x];  // line 2
}
constexpr int rotate_line = __LINE__ - 8;

/// Read, then written again for the next round.
template <bool Synchronise>
__global__ void reuse(unsigned* out) {
  __shared__ unsigned value;
  for (unsigned round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) value = round;
    __syncthreads();
    out[64 * round + threadIdx.x] = value;
    if (Synchronise) __syncthreads();
  }
}
constexpr int reuse_line = __LINE__ - 6;

/// Single bytes of one word, and bits of one word by atomics, are not shared; a plain read beside them is.
__global__ void bytes_of_a_word(unsigned* out) { reinterpret_cast<std::uint8_t*>(out)[threadIdx.x] = 1; }
__global__ void bits_of_a_word(unsigned* out) { atomicOr(out, 1u << threadIdx.x % 32); }
__global__ void read_beside_atomics(unsigned* out) {
  atomicOr(out, 1u << threadIdx.x % 32);
  out[1 + threadIdx.x] = out[0];
}
constexpr int read_beside_line = __LINE__ - 2;

__global__ void same_word_of_all_blocks(unsigned* out) {
  if (threadIdx.x == 5) out[3] = blockIdx.x;
}
constexpr int same_word_line = __LINE__ - 2;
__global__ void read_other_block(unsigned* out) {
  out[blockIdx.x] = 1;
  out[100 + blockIdx.x] = out[gridDim.x - 1 - blockIdx.x];
}
constexpr int read_other_line = __LINE__ - 3;
__global__ void only_reads(unsigned* out) { out[100 + 64 * blockIdx.x + threadIdx.x] = out[0] + out[threadIdx.x]; }

/// The last block adds what all have written: word 0 counts, words 100 on are the parts, 1000 on is the result.
enum : unsigned { first_fence = 1, first_barrier = 2, second_barrier = 4, second_fence = 8, everything = 15 };
template <unsigned With>
__global__ void last_block(unsigned* data) {
  __shared__ bool last;
  const unsigned n = blockDim.x;
  if (threadIdx.x == 0) last = false;
  __syncthreads();
  data[100 + n * blockIdx.x + threadIdx.x] = 1;
  if ((With & first_fence) != 0) __threadfence();
  if ((With & first_barrier) != 0) __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(data, gridDim.x - 1) == gridDim.x - 1;
  if ((With & second_barrier) != 0) __syncthreads();
  if (!last) return;
  if ((With & second_fence) != 0) __threadfence();
  unsigned sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += data[100 + n * b + threadIdx.x];
  data[1000 + threadIdx.x] = sum;
}
constexpr int last_block_line = __LINE__ - 11;

/// One thread does everything for its block, as grid barriers do.
__global__ void last_block_by_leader(unsigned* data) {
  __shared__ bool last;
  data[100 + blockDim.x * blockIdx.x + threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(data, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  for (unsigned b = 0; b < gridDim.x; ++b) data[1000 + threadIdx.x] += data[100 + blockDim.x * b + threadIdx.x];
}

/// Block-scope fences order the warps of a block, not blocks.
template <bool Across>
__global__ void block_fences(unsigned* data) {
  const unsigned unit = Across ? 0 : 1 + blockIdx.x, parts = Across ? gridDim.x : blockDim.x / 32;
  const unsigned part = Across ? blockIdx.x : threadIdx.x / 32;
  if (threadIdx.x % 32 != 0) return;
  data[100 + 64 * unit + part] = part;
  __threadfence_block();
  if (atomicAdd(data + unit, 1) != parts - 1) return;
  __threadfence_block();
  for (unsigned p = 0; p < parts; ++p) data[1000 + unit] += data[100 + 64 * unit + p];
}
constexpr int block_fences_line = __LINE__ - 6;

}  // namespace

TEST_CASE("race: shared memory without a barrier, and with each", "[executor][race]") {
  check_race(rotate<by::nothing, 1>, 1, 64, "shared", rotate_line, rotate_line + 6);
  check_race(rotate<by::shuffle, 1>, 1, 32, "shared", rotate_line, rotate_line + 6);
  check_race(rotate<by::vote, 1>, 1, 64, "shared", rotate_line, rotate_line + 6);
  check_race(rotate<by::warp_barrier, 1>, 1, 64, "shared", rotate_line, rotate_line + 6);
  check_race(rotate<by::half_warp_barrier, 1>, 1, 32, "shared", rotate_line, rotate_line + 6);
  check_clean(rotate<by::nothing, 0>, 1, 64);
  check_clean(rotate<by::block_barrier, 1>, 1, 64);
  check_race(reuse<false>, 1, 64, "shared", reuse_line, reuse_line + 2);
  check_clean(reuse<true>, 1, 64);
}

TEST_CASE("race: a kernel is named with both blocks", "[executor][race]") {
  const packkv_simt::with_schedule guard({order::in_order});
  const std::string message = race_of(same_word_of_all_blocks, 4, 64);
  INFO(message);
  for (const char* part : {"same_word_of_all_blocks", "write by block (0,0,0), thread (5,0,0)",
                           "write by block (1,0,0), thread (5,0,0)"})
    CHECK(message.find(part) != std::string::npos);
}

TEST_CASE("race: bytes, atomics and blocks in global memory", "[executor][race]") {
  check_clean(bytes_of_a_word, 1, 64);
  check_clean(bits_of_a_word, 3, 64);
  check_race(read_beside_atomics, 1, 64, "global", read_beside_line, read_beside_line - 1);
  check_race(same_word_of_all_blocks, 3, 64, "global", same_word_line, same_word_line);
  check_clean(same_word_of_all_blocks, 1, 64);
  check_race(read_other_block, 4, 1, "global", read_other_line, read_other_line + 1);
  check_clean(only_reads, 4, 64);
}

TEST_CASE("race: the last block may read what all wrote, with both fences and both barriers", "[executor][race]") {
  constexpr int write = last_block_line, read = last_block_line + 8;
  check_clean(last_block<everything>, 4, 64);
  check_clean(last_block_by_leader, 4, 64);
  check_race(last_block<everything & ~first_fence>, 4, 64, "global", write, read);
  check_race(last_block<everything & ~second_fence>, 4, 64, "global", write, read);
  check_race(last_block<everything & ~second_barrier>, 1, 64, "shared", write + 3, write + 5);
  for (const schedule& s : all_schedules()) {  // the atomic may be early or late then
    const packkv_simt::with_schedule guard(s);
    CHECK(race_of(last_block<everything & ~first_barrier>, 4, 64).find("race on") != std::string::npos);
  }
}

TEST_CASE("race: a fence of block scope orders a block", "[executor][race]") {
  check_clean(block_fences<false>, 1, 128);
  check_race(block_fences<true>, 4, 32, "global", block_fences_line, block_fences_line + 4);
}

}  // namespace packkv_test
#endif
