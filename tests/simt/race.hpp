// SPDX-License-Identifier: Apache-2.0
// Race detector: two threads of a launch that access a byte of shared or cudaMalloc'ed memory, one of them with a plain
// write, and nothing orders them. It sees the accesses of code that was compiled with -fsanitize=thread and is linked
// without that sanitizer's runtime: race.cpp defines the functions that the compiler calls.
// What orders memory: __syncthreads the block; __syncwarp the lanes of its mask; a fence, then an atomic, then an
// atomic on the same address by another thread, then a fence. Shuffles and votes do not. Blocks run one after another,
// and are unordered all the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

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

/// The race that ended the launch, if one did; forgets it.
bool take_report(std::string& text);

}  // namespace packkv_simt::detail::race
