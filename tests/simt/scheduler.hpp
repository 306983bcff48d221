// SPDX-License-Identifier: Apache-2.0
// What engine.cpp shows to async.cpp: who runs, how to wait and to wake, and the schedule's dice. PACKKV_SIMT_ASAN.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.hpp"
#include "symbols.hpp"

#if defined(__SANITIZE_ADDRESS__)
#define PACKKV_SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PACKKV_SIMT_ASAN 1
#endif
#endif
#if defined(PACKKV_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace packkv_simt::detail {

/// Number of the running thread in its block; -1 outside of a kernel.
int running();
/// Waits until another thread, or a copy, wakes this one.
void sleep(site where);
void wake(int thread);
/// Next number of order::random.
std::uint64_t draw();
/// What the executor fills memory with under this schedule that no one may read.
unsigned char garbage();
memory_range dynamic_range();

}  // namespace packkv_simt::detail
