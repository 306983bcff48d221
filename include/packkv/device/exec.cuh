// SPDX-License-Identifier: Apache-2.0
// How a device-wide call runs: stream, workspace, report. Calls never allocate and never synchronise.
//   exec e{stream, workspace, bytes};   initialize_workspace(e);   // once
#pragma once

#include <cstddef>
#include <packkv/codec/pages.hpp>
#include <packkv/detail/cuda.cuh>

namespace packkv {

/// Execution of a device call. The workspace is device memory, 256-byte aligned, and may serve any number of
/// layers and calls in one stream order; calls that run at the same time need workspaces of their own.
struct exec {
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  device_report* report = nullptr;  ///< device memory, zeroed by the caller; null: nothing is reported
  /// Allows a call to run beside the kernel before it in the stream, which then must neither write what the call reads
  /// nor touch what it writes. What comes behind the call waits for both. Used by store_tokens alone.
  /// \remark If that kernel lets others begin early (programmatic dependent launch), it waits for those before it
  /// first,
  ///         as all kernels of this library do.
  bool beside_previous = false;
  /// Says that the kernel before the call in the stream makes at most the queries, weights and 16-bit tokens (sinks,
  /// ring) that it reads, and changes nothing else of what it reads: tables, parameters, codes, and arrays of
  /// lengths, positions, rows and query ranges. Nor does it zero the report. Then the work is shared out and the first
  /// tiles are fetched while that kernel ends. Used by decode_attention, key_gemv and value_gemv where they are fused,
  /// on sm_90 and later; other calls, and other GPUs, wait for it first. The results are the same.
  /// \remark If that kernel lets others begin early, it waits for those before it first, as for beside_previous; what
  ///         is read may be older otherwise.
  bool settled_cache = false;
};

namespace detail {

/// The workspace begins with counters that are zero between launches; partial results follow.
inline constexpr std::int64_t workspace_counters = 65536;
inline constexpr std::int64_t workspace_counter_bytes = workspace_counters * 4;

inline status check_workspace(const exec& e, checked needed) {
  if (!needed.valid()) return refuse(status_code::overflow, "the workspace size does not fit 63 bits");
  if (needed.value() == 0) return {};
  if (e.workspace == nullptr) return refuse(status_code::invalid_argument, "exec::workspace is null");
  if (reinterpret_cast<std::uintptr_t>(e.workspace) % 256 != 0)
    return refuse(status_code::misaligned, "exec::workspace must be 256-byte aligned");
  if (static_cast<std::uint64_t>(needed.value()) > e.workspace_bytes)
    return refuse(status_code::workspace_too_small, "exec::workspace_bytes is too small", needed.value());
  return {};
}

/// Blocks for `items` units of work, one each, capped at the grid limit; kernels stride over the rest.
inline dim3 grid_for(std::int64_t items) {
  return dim3(static_cast<unsigned>(min_of<std::int64_t>(max_of<std::int64_t>(items, 1), 2147483647)));
}

}  // namespace detail

/// Zeroes the counters of a workspace. Once per allocation, before the first call that uses it.
inline status initialize_workspace(const exec& e) {
  if (const status s = detail::check_workspace(e, detail::workspace_counter_bytes); !s) return s;
  return detail::clear(e.workspace, static_cast<std::size_t>(detail::workspace_counter_bytes), e.stream);
}

}  // namespace packkv
