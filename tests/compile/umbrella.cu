// SPDX-License-Identifier: Apache-2.0
// Compiled, never run: what a user includes has no warning for any architecture.
#include <packkv/packkv.hpp>
#if __has_include(<packkv/packkv.cuh>)
#include <packkv/packkv.cuh>
#endif
