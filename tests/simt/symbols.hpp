// SPDX-License-Identifier: Apache-2.0
// What the executor reads from this program's own symbol table: names of kernels, and where __shared__ variables lie.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace packkv_simt::detail {

struct memory_range {
  unsigned char* begin;
  std::size_t bytes;
};

/// Readable name of a function without its parameters, or its address if the program is stripped.
std::string function_name(const void* function);

/// The __shared__ variables: zero-initialised statics of functions that have guards. Empty if the program is stripped.
const std::vector<memory_range>& shared_variables();

/// What lies beside them (engine.hpp), which no thread may access.
const std::vector<memory_range>& shared_guards();

}  // namespace packkv_simt::detail
