// SPDX-License-Identifier: Apache-2.0
// What packkv/detail/async.cuh and ldmatrix are made of on the executor: mbarriers with a count of bytes, bulk copies and
// cp.async groups. One idea: a copy lands when the schedule says so (at once, as late as a wait allows, or any time in
// between), and until then its destination holds garbage; nobody may touch it before a wait.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.hpp"

namespace packkv_simt::detail {

/// Addresses are checked: whole, aligned, and within one shared variable or the dynamic shared memory.
void read_shared(const void* p, std::size_t bytes, std::size_t alignment, const char* what, site where);

/// `state` is the object in shared memory; what it stands for is kept by the executor.
void barrier_init(std::uint64_t* state, unsigned arrivals, site where);
void barrier_arrive(std::uint64_t* state, unsigned expected_bytes, site where);
void barrier_wait(std::uint64_t* state, unsigned parity, site where);
void fence_barrier_init(site where);
void bulk_copy(void* to, const void* from, unsigned bytes, std::uint64_t* state, site where);

/// `source_bytes` are copied, the rest of `bytes` becomes zero.
void copy_async(void* to, const void* from, unsigned bytes, unsigned source_bytes, site where);
void commit_copies(site where);
void wait_copies(unsigned pending, site where);

}  // namespace packkv_simt::detail

/// For the engine.
namespace packkv_simt::detail::async {

void begin_block();
/// Lets one copy land; false if none is under way.
bool land_one();
/// order::random: perhaps lets one land.
void perhaps_land();
/// The running thread ends: an error if a copy of its own was not waited for.
void end_thread();
/// All threads have ended: why that was wrong, or "".
std::string end_block();
/// Why a thread that waits for a phase waits for ever.
std::string describe(int thread);

}  // namespace packkv_simt::detail::async
