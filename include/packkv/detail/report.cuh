// SPDX-License-Identifier: Apache-2.0
// How kernels say what they found in the data.
#pragma once

#include <packkv/codec/pages.hpp>
#include <packkv/detail/cuda.cuh>

namespace packkv::detail {

/// Adds flags and clamps to the caller's report, if there is one.
__device__ inline void add_report(device_report* report, std::uint32_t flags, std::uint32_t clamps) {
  if (report == nullptr) return;
  if (flags != 0) atomicOr(&report->flags, flags);
  if (clamps != 0) atomicAdd(&report->leading_clamps, clamps);
}

}  // namespace packkv::detail
