// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies, mbarriers, matrix instructions and shared memory on the executor: misuse is an error that names
// the place, and a missing wait shows.
#include <cstdint>
#include <string>
#include <vector>

#include <packkv/detail/async.cuh>
#include <packkv/detail/matrix.cuh>

#include "device/device_array.hpp"
#include "support/catch.hpp"

namespace packkv_test {
namespace {

namespace d = packkv::detail;
using packkv_simt::order;
using packkv_simt::schedule;

std::vector<schedule> all_schedules() {
  return {{order::in_order},  {order::reverse},     {order::random, 1},  {order::random, 2},
          {order::random, 3}, {order::ahead, 0, 0}, {order::ahead, 0, 1}};
}

/// The error that a launch of `kernel` on 4096 words (word i = i) ends with; "" if it ends well.
std::string error_of(void (*kernel)(std::uint32_t*), int threads, std::size_t shared_bytes = 0,
                     std::vector<std::uint32_t>* result = nullptr) {
  std::vector<std::uint32_t> words(4096);
  for (std::size_t i = 0; i < words.size(); ++i) words[i] = static_cast<std::uint32_t>(i);
  device_array<std::uint32_t> data(words);
  try {
    packkv_simt::launch(kernel, dim3(1), packkv_simt::shared_block(dim3(static_cast<unsigned>(threads)), shared_bytes),
                        data.data());
  } catch (const packkv_simt::error& e) {
    return e.what();
  }
  if (result != nullptr) *result = data.host();
  return "";
}

/// Under every schedule the launch fails and the message has all parts.
void check_error(void (*kernel)(std::uint32_t*), int threads, const std::vector<std::string>& parts,
                 std::size_t shared_bytes = 0) {
  for (const schedule& s : all_schedules()) {
    const packkv_simt::with_schedule guard(s);
    const std::string message = error_of(kernel, threads, shared_bytes);
    INFO(packkv_simt::to_string(s) << "\n" << message);
    for (const std::string& part : parts) CHECK(message.find(part) != std::string::npos);
  }
}
std::string at_line(int line) { return "async_test.cpp:" + std::to_string(line); }

/// Which part of a correct bulk copy is left out.
enum class without { nothing, init, fence, initial_barrier, expect, wait, wrong_stage, final_barrier };

/// One warp copies 256 bytes twice through one stage and writes them in reverse.
template <without Part>
__global__ void bulk(std::uint32_t* data) {
  __shared__ __align__(16) std::uint32_t stage[64];
  __shared__ d::mbarrier full, other;
  const int lane = d::lane_id();
  if (lane == 0) {
    if (Part != without::init) full.init(1);
    other.init(1);
    if (Part != without::fence) d::fence_barrier_init();
  }
  if (Part != without::initial_barrier) __syncwarp();
  for (unsigned round = 0; round < 2; ++round) {
    if (lane == 0) {
      if (Part != without::expect) full.arrive_expect(256);
      d::bulk_copy(stage, data + 64 * round, 256, full);
      if (Part == without::wrong_stage) other.arrive();
    }
    if (Part == without::wrong_stage) other.wait(round);
    else if (Part != without::wait) full.wait(round);
    for (int i = lane; i < 64; i += 32) data[1024 + 64 * round + static_cast<unsigned>(i)] = stage[63 - i];
    if (Part != without::final_barrier) __syncwarp();
  }
}
constexpr int bulk_copy_line = __LINE__ - 9;

enum class group_without { nothing, commit, wait, barrier, final_barrier };
template <group_without Part>
__global__ void groups(std::uint32_t* data) {
  __shared__ std::uint32_t stage[32];
  const int lane = d::lane_id();
  for (int round = 0; round < 2; ++round) {
    d::copy_async<4>(&stage[lane], data + 32 * round + lane);
    if (Part != group_without::commit) d::commit_copies();
    if (Part != group_without::wait) d::wait_copies<0>();
    if (Part != group_without::barrier) __syncwarp();
    data[1024 + 32 * round + lane] = stage[31 - lane];
    if (Part != group_without::final_barrier) __syncwarp();
  }
}

/// 64 bytes to word Offset of 64 words.
template <int Offset>
__global__ void bulk_to_word(std::uint32_t* data) {
  __shared__ __align__(16) std::uint32_t stage[64];
  __shared__ d::mbarrier full;
  if (threadIdx.x != 0) return;
  full.init(1);
  d::fence_barrier_init();
  full.arrive_expect(64);
  d::bulk_copy(stage + Offset, data, 64, full);
}
__global__ void bulk_to_global(std::uint32_t* data) {
  __shared__ d::mbarrier full;
  if (threadIdx.x != 0) return;
  full.init(1);
  d::fence_barrier_init();
  d::bulk_copy(data + 64, data, 64, full);
}
__global__ void too_many_arrivals(std::uint32_t*) {
  __shared__ d::mbarrier full;
  if (threadIdx.x == 0) {
    full.init(1);
    full.arrive_expect(16);  // the phase cannot end
    full.arrive();
  }
}
__global__ void overwritten_barrier(std::uint32_t*) {
  __shared__ d::mbarrier full;
  full.init(1);
  full.state = 0;
  full.arrive();
}
__global__ void nobody_arrives(std::uint32_t*) {
  __shared__ d::mbarrier full;
  if (threadIdx.x == 0) full.init(2);
  __syncwarp();
  if (threadIdx.x == 0) full.arrive();
  full.wait(0);
}
__global__ void two_phases_behind(std::uint32_t*) {
  __shared__ d::mbarrier full;
  if (threadIdx.x == 0) full.init(1);
  __syncwarp();
  if (threadIdx.x == 0) {
    full.arrive();
    full.arrive();
  }
  __syncwarp();
  full.wait(0);
}

constexpr int divergent_mma_line = __LINE__ + 5;
__global__ void divergent_mma(std::uint32_t* data) {
  float x[4] = {};
  const std::uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 16)
    d::mma_f16(x, a, b);
  else
    data[0] = d::movmatrix(data[0]);
}
__global__ void partial_mma(std::uint32_t* data) {
  std::int32_t x[4] = {};
  const std::uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 31) d::mma_u8s8(x, a, b);
  data[threadIdx.x] = 1;
}
constexpr int partial_mma_line = __LINE__ - 3;
__global__ void divergent_shuffle(std::uint32_t* data) {
  if (threadIdx.x < 16)
    data[0] = d::shuffle_xor(data[0], 1);
  else
    data[1] = d::shuffle_xor(data[1], 1);
}
constexpr int divergent_shuffle_line = __LINE__ - 4;
__global__ void misaligned_ldmatrix(std::uint32_t* data) {
  __shared__ __align__(16) std::uint32_t tile[64];
  for (int i = static_cast<int>(threadIdx.x); i < 64; i += 32) tile[i] = 0;
  __syncwarp();
  std::uint32_t r[1];
  d::ldmatrix(r, tile + 1);
  data[threadIdx.x] = r[0];
}
__global__ void misaligned_load(std::uint32_t* data) { data[64 + threadIdx.x] = d::load16(data + 1).word[0]; }

/// The whole dynamic shared memory, in reverse.
__global__ void dynamic(std::uint32_t* data) {
  auto* words = reinterpret_cast<std::uint32_t*>(d::dynamic_shared());
  words[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = words[blockDim.x - 1 - threadIdx.x];
}

}  // namespace

TEST_CASE("async: a bulk copy arrives whole under every schedule", "[executor]") {
  for (const schedule& s : all_schedules()) {
    INFO(packkv_simt::to_string(s));
    const packkv_simt::with_schedule guard(s);
    std::vector<std::uint32_t> result;
    REQUIRE(error_of(bulk<without::nothing>, 32, 0, &result) == "");
    int wrong = 0;
    for (unsigned i = 0; i < 128; ++i) wrong += result[1024 + i] != i / 64 * 64 + 63 - i % 64;
    CHECK(wrong == 0);
    REQUIRE(error_of(groups<group_without::nothing>, 32, 0, &result) == "");
    for (unsigned i = 0; i < 64; ++i) wrong += result[1024 + i] != i / 32 * 32 + 31 - i % 32;
    CHECK(wrong == 0);
  }
}

TEST_CASE("async: misuse of an mbarrier or a bulk copy is an error that names the place", "[executor]") {
  check_error(bulk<without::init>, 32, {"has not been initialised", "bulk", "block (0,0,0)", "async_test.cpp:"});
  check_error(bulk<without::fence>, 32, {"no fence_barrier_init()", at_line(bulk_copy_line)});
  check_error(bulk<without::expect>, 32, {"deadlock", "1 arrivals and"});
  check_error(bulk_to_word<1>, 32, {"cp.async.bulk", "not a multiple of 16"});
  check_error(bulk_to_word<52>, 32, {"64 bytes that do not lie within one variable of shared memory"});
  check_error(bulk_to_global, 32, {"do not lie within one variable of shared memory"});
  check_error(too_many_arrivals, 32, {"more threads than the phase expects"});
  check_error(overwritten_barrier, 1, {"has been overwritten"});
  check_error(nobody_arrives, 32, {"deadlock", "phase of parity 0", "1 arrivals and 0 bytes are missing"});
  check_error(two_phases_behind, 32, {"deadlock", "which is in phase 2"});
  check_error(groups<group_without::wait>, 32, {"async_test.cpp:"});
}

TEST_CASE("async: copies that nobody has waited for are an error", "[executor]") {
  // The second arrival comes in the first phase if the copy is late.
  check_error(bulk<without::wait>, 32, {"async_test.cpp:"});
  check_error(bulk<without::wrong_stage>, 32, {"async_test.cpp:"});
  const packkv_simt::with_schedule guard({order::in_order});
#if defined(PACKKV_SIMT_RACE)
  const char *bulk_error = "race on a byte of shared memory", *group_error = bulk_error;
#else
  const char *bulk_error = "nobody has waited for the bulk copy", *group_error = "without having waited for its cp.async";
#endif
  for (const std::string& message : {error_of(bulk<without::wait>, 32), error_of(bulk<without::wrong_stage>, 32)}) {
    INFO(message);
    CHECK(message.find(bulk_error) != std::string::npos);
    CHECK(message.find(at_line(bulk_copy_line)) != std::string::npos);
  }
  check_error(groups<group_without::commit>, 32, {group_error});
}

#if defined(PACKKV_SIMT_RACE)
TEST_CASE("async: copies race with accesses that nothing orders", "[executor][race]") {
  check_error(bulk<without::initial_barrier>, 32, {"async_test.cpp:"});
  check_error(bulk<without::final_barrier>, 32, {"async_test.cpp:"});  // or a wait that is two phases behind
  {
    const packkv_simt::with_schedule guard({order::reverse});
    const std::string message = error_of(bulk<without::final_barrier>, 32);
    INFO(message);
    CHECK(message.find("race on a byte of shared memory") != std::string::npos);
    CHECK(message.find(at_line(bulk_copy_line)) != std::string::npos);
  }
  check_error(groups<group_without::barrier>, 32, {"shared memory", "async_test.cpp:"});  // or read before it was written
  check_error(groups<group_without::final_barrier>, 32, {"race on a byte of shared memory", "write by cp.async"});
}

namespace {

__global__ void read_unwritten(std::uint32_t* data) {
  __shared__ std::uint32_t words[64];
  words[threadIdx.x] = 1;
  __syncwarp();
  data[threadIdx.x] = words[threadIdx.x + 1];
}
template <int Index>
__global__ void beside_two(std::uint32_t* data) {
  __shared__ std::uint32_t first[16];
  __shared__ std::uint32_t second[16];
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 16; ++i) first[i] = second[i] = 1;
  int index = Index;
  __asm__("" : "+r"(index));
  first[index] = 2;
  second[index] = 2;
  data[0] = first[0] + second[0];
}
template <int Index>
__global__ void beside_dynamic(std::uint32_t* data) {
  auto* words = reinterpret_cast<std::uint32_t*>(d::dynamic_shared());
  words[0] = data[0];
  int index = Index;
  __asm__("" : "+r"(index));
  words[index] = 2;
}
__global__ void misaligned(std::uint32_t* data) {
  auto* bytes = reinterpret_cast<char*>(data) + 2;
  __asm__("" : "+r"(bytes));
  *reinterpret_cast<std::uint32_t*>(bytes) = 1;
}

}  // namespace

TEST_CASE("async: shared memory that nobody has written must not be read", "[executor][race]") {
  check_error(read_unwritten, 32, {"shared memory is read before it was written", "async_test.cpp:"});
}

TEST_CASE("async: an access beside a shared variable is an error", "[executor][race]") {
  check_error(beside_two<16>, 32, {"beside the variables of shared memory", "async_test.cpp:"});
  check_error(beside_two<-1>, 32, {"beside the variables of shared memory", "async_test.cpp:"});
  check_error(beside_dynamic<25>, 1, {"beside the variables of shared memory"}, 100);
  check_error(beside_dynamic<-1>, 1, {"beside the variables of shared memory"}, 100);
  CHECK(error_of(beside_dynamic<24>, 1, 100) == "");
}

TEST_CASE("async: an access that is not aligned to its size is an error", "[executor][race]") {
  check_error(misaligned, 1, {"not a multiple of its size", "async_test.cpp:"});
}
#endif

TEST_CASE("async: matrix instructions and shuffles take the whole warp, from one place", "[executor]") {
  check_error(divergent_mma, 32, {"different collectives", "mma.m16n8k16.f16", "movmatrix", at_line(divergent_mma_line)});
  check_error(partial_mma, 32, {"mma.m16n8k32.u8.s8", at_line(partial_mma_line)});
  check_error(divergent_shuffle, 32, {"different collectives", at_line(divergent_shuffle_line), at_line(divergent_shuffle_line + 2)});
}

TEST_CASE("async: addresses that are not aligned are errors", "[executor]") {
  check_error(misaligned_ldmatrix, 32, {"ldmatrix", "not a multiple of 16"});
  check_error(misaligned_load, 32, {"16 bytes to an address that is not a multiple of it", "async_test.cpp:"});
}

TEST_CASE("async: dynamic shared memory has the size of the launch", "[executor]") {
  std::vector<std::uint32_t> result;
  for (const unsigned threads : {1u, 25u, 96u, 1024u}) {
    REQUIRE(error_of(dynamic, static_cast<int>(threads), 4 * threads, &result) == "");
    int wrong = 0;
    for (unsigned i = 0; i < threads; ++i) wrong += result[i] != threads - 1 - i;
    CHECK(wrong == 0);
  }
  CHECK(packkv_simt::launch(dynamic, dim3(1), packkv_simt::shared_block(dim3(1), 228 * 1024), nullptr) == cudaErrorInvalidValue);
}

}  // namespace packkv_test
