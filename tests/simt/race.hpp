// SPDX-License-Identifier: Apache-2.0
// Race detector: two threads of a launch that access a byte of shared or cudaMalloc'ed memory, one of them with a plain
// write, and nothing orders them. It sees the accesses of code that was compiled with -fsanitize=thread and is linked
// without that sanitizer's runtime: race.cpp defines the functions that the compiler calls.
// What orders memory: __syncthreads the block; __syncwarp the lanes of its mask; a fence, then an atomic, then an
// atomic on the same address by another thread, then a fence; an arrival at an mbarrier and a wait for that phase. A
// copy is ordered after what its issuer knows and before those who waited for it. Shuffles and votes order nothing.
// Blocks run one after another, and are unordered all the same.
// Beside races: shared memory that is read before it was written, or accessed beside its variables, and accesses that
// are not aligned to their size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "engine.hpp"
#include "symbols.hpp"

namespace packkv_simt::detail::race {

/// Does this program have instrumented code? Without any, nothing is found.
bool enabled();

// What the executor tells.
void begin_launch(std::uint64_t blocks);
void begin_block(std::uint64_t block, int threads);
void switch_to(int thread, const void* stack, std::size_t stack_bytes);
void leave_kernel();
void order_lanes(int warp, std::uint32_t mask);
void order_block();

void pause(bool on);  ///< while an instruction reads operands that its lanes handed in

/// The dynamic shared memory of the next blocks, within an arena of which nothing else may be accessed.
void dynamic_shared(void* arena, std::size_t arena_bytes, const memory_range& used);

// What async.cpp tells, of the running thread. An mbarrier is known by its address.
void read_by_instruction(const void* p, std::size_t bytes, site where);
void phase_object(void* barrier, bool initialise, site where);
void phase_arrive(void* barrier);
void phase_ends(void* barrier);
void phase_wait(void* barrier);
/// `barrier` null: cp.async. `group` is the number of the phase or of the thread's group.
void begin_copy(void* to, std::size_t bytes, const void* from, std::size_t source_bytes, void* barrier,
                std::uint64_t group, site where, const char* name);
void copies_waited(std::uint64_t groups);

/// What the detector found that ended the launch, if it did; forgets it.
bool take_report(std::string& text);

}  // namespace packkv_simt::detail::race
