// SPDX-License-Identifier: Apache-2.0
// Compiler configuration: the only macros that the rest of the library needs.
// One idea: every arithmetic step that decides a stored bit is written with correctly rounded
// single operations, so the bytes do not depend on the compiler, on contraction or on the device.
#pragma once

#if defined(__FAST_MATH__)
#error "packkv: -ffast-math changes the stored bytes; compile the files that include packkv without it"
#endif

#if defined(__CUDACC__)
#define PACKKV_HOST_DEVICE __host__ __device__
#else
#define PACKKV_HOST_DEVICE
#endif

#define PACKKV_VERSION_MAJOR 0
#define PACKKV_VERSION_MINOR 1
#define PACKKV_VERSION_PATCH 0
