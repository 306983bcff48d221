// SPDX-License-Identifier: Apache-2.0
// Reads the float16 arrays of three dimensions that tests use, from files that we trust. evaluate has a hardened
// reader.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <regex>
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
  std::smatch shape;
  const std::string head = bytes.substr(0, 256);
  if (!std::regex_search(head, shape, std::regex("'<f2'.*\\((\\d+), (\\d+), (\\d+)\\)")))
    throw std::runtime_error("no float16 array of three dimensions: " + path);
  half_array a;
  std::size_t count = 1;
  for (std::size_t i = 0; i < 3; ++i) count *= a.extent[i] = std::stoul(shape[static_cast<int>(i) + 1]);
  if (bytes.size() < 2 * count + 10) throw std::runtime_error("too short: " + path);
  a.bits.resize(count);
  std::memcpy(a.bits.data(), bytes.data() + bytes.size() - 2 * count, 2 * count);
  return a;
}

}  // namespace packkv_test
