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

/// The zero-initialised function statics of the namespaces packkv and packkv_test: __shared__ variables.
/// (The library has no other state.) Empty if the program is stripped.
const std::vector<memory_range>& shared_variables();

}  // namespace packkv_simt::detail
