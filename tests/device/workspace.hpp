// SPDX-License-Identifier: Apache-2.0
// Workspaces of just the size that a call uses.
#pragma once

#include <algorithm>
#include <packkv/device/decode_attention.cuh>
#include <stdexcept>

#include "device_array.hpp"

namespace packkv_test {

namespace pk = packkv;

/// Poisoned memory of just the bytes that a call of this grid uses, so that AddressSanitizer sees the next one; `bound`
/// is what the library says that every call within the maxima needs.
template <int ValueDim>
device_array<std::uint8_t> exact_workspace(const pk::policy::decode_grid& grid, std::int64_t bound) {
  const std::int64_t used =
      std::max(pk::detail::split_bytes<ValueDim>(grid).value(), pk::detail::workspace_counter_bytes);
  if (used > bound) throw std::runtime_error("the bound of the workspace is less than what a call uses");
  device_array<std::uint8_t> workspace(static_cast<std::size_t>(used));
  workspace.poison();
  return workspace;
}

}  // namespace packkv_test
