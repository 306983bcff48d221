// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU: included by packkv/detail/cuda.cuh in place of <cuda_runtime.h>.
// One idea: a CUDA thread is a fiber that runs until it reaches a collective; who runs next is a schedule's choice.
//   g++ -std=c++17 -x c++ -DPACKKV_SIMT_EXECUTOR -Itests/simt my_kernels.cu tests/simt/{engine,async,symbols,race}.cpp
//   packkv_simt::with_schedule guard({packkv_simt::order::random, 7});   packkv_simt::launch(kernel, grid, threads, a, b);
#pragma once

#include "async.hpp"
#include "engine.hpp"
#include "intrinsics.hpp"
#include "runtime.hpp"

#if defined(PACKKV_SIMT_RACE) && defined(__clang__) && __clang_major__ < 15
// Copies of whole structs: this clang calls plain memcpy, as if a sanitizer's runtime stood behind it.
__asm__(".set memcpy, __tsan_memcpy\n.set memmove, __tsan_memmove\n.set memset, __tsan_memset");
#endif
