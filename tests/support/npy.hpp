// SPDX-License-Identifier: Apache-2.0
// Reads the float16 arrays of three dimensions that tests use, from files that we trust. evaluate has a hardened
// reader.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace packkv_test {

struct half_array {
  std::size_t extent[3] = {};
  std::vector<std::uint16_t> bits;  ///< in C order
  std::uint16_t at(std::size_t i, std::size_t j, std::size_t k) const {
    return bits[(i * extent[1] + j) * extent[2] + k];
  }
};

inline half_array read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const std::string head = bytes.substr(0, 256);
  const std::size_t shape = head.find("'shape': (");
  half_array a;
  if (head.find("'<f2'") == std::string::npos || shape == std::string::npos ||
      std::sscanf(head.c_str() + shape, "'shape': (%zu, %zu, %zu)", &a.extent[0], &a.extent[1], &a.extent[2]) != 3)
    throw std::runtime_error("no float16 array of three dimensions: " + path);
  const std::size_t count = a.extent[0] * a.extent[1] * a.extent[2];
  if (bytes.size() < 2 * count + 10) throw std::runtime_error("too short: " + path);
  a.bits.resize(count);
  std::memcpy(a.bits.data(), bytes.data() + bytes.size() - 2 * count, 2 * count);
  return a;
}

}  // namespace packkv_test
