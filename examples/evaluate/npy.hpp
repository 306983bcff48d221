// SPDX-License-Identifier: Apache-2.0
// Reads float16 arrays of three dimensions from .npy files, which may be hostile.
// One idea: the file is mapped, never copied, and nothing of it is used before its header agrees with its size.
//   npy_array keys;   if (outcome o = npy_array::open("k.npy", keys); !o) return o;
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "outcome.hpp"

namespace evaluate {

/// What a .npy header says, after all checks.
struct npy_header {
  std::int64_t extent[3] = {};
  std::int64_t data_offset = 0;  ///< bytes from the start of the file
};

/// Parses and checks the first bytes of a file of `file_bytes` bytes; `bytes` holds all of them (a mapping) and is
/// read no further than the header. Accepted: format 1 to 3, '<f2', C order, three dimensions > 0, exact size.
outcome parse_npy_header(const unsigned char* bytes, std::uint64_t file_bytes, npy_header& header);

/// A float16 array [extent(0), extent(1), extent(2)] in mapped, read-only memory. Every element is finite.
class npy_array {
 public:
  npy_array() = default;
  npy_array(npy_array&& other) noexcept;
  npy_array& operator=(npy_array&& other) noexcept;
  ~npy_array();

  static outcome open(const std::string& path, npy_array& array);

  std::int64_t extent(int i) const { return header_.extent[i]; }
  /// The row of extent(2) elements at [i, j].
  const std::uint16_t* row(std::int64_t i, std::int64_t j) const {
    return data() + (i * header_.extent[1] + j) * header_.extent[2];
  }
  const std::uint16_t* data() const {
    return reinterpret_cast<const std::uint16_t*>(static_cast<const unsigned char*>(mapping_) + header_.data_offset);
  }
  std::int64_t elements() const { return header_.extent[0] * header_.extent[1] * header_.extent[2]; }

 private:
  outcome check_finite() const;

  const void* mapping_ = nullptr;
  std::size_t mapped_bytes_ = 0;
  npy_header header_;
};

}  // namespace evaluate
