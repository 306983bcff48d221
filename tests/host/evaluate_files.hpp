// SPDX-License-Identifier: Apache-2.0
// Files for the tests of examples/evaluate: a folder that cleans up, .npy bytes good and bad, small random caches.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <packkv/core/float_formats.hpp>

#include "../support/random.hpp"

namespace packkv_test {

/// A fresh folder under the system's temporary folder, removed at the end.
class temporary_folder {
 public:
  temporary_folder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "packkv_evaluate_XXXXXX").string();
    path_ = mkdtemp(pattern.data()) != nullptr ? pattern : "";
  }
  ~temporary_folder() {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
  }
  temporary_folder(const temporary_folder&) = delete;
  temporary_folder& operator=(const temporary_folder&) = delete;

  std::string file(const std::string& name) const { return path_ + "/" + name; }
  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream(file(name), std::ios::binary) << bytes;
    return file(name);
  }

 private:
  std::string path_;
};

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
}

/// A .npy prefix of any version around any header text, padded as numpy pads.
inline std::string npy_prefix(std::string header, int version = 1) {
  const std::size_t prefix = version == 1 ? 10 : 12;
  while ((prefix + header.size() + 1) % 64 != 0) header += ' ';
  header += '\n';
  std::string bytes = std::string("\x93NUMPY", 6) + static_cast<char>(version) + '\0';
  for (std::size_t i = 0; i < prefix - 8; ++i) bytes += static_cast<char>(header.size() >> (8 * i) & 255);
  return bytes + header;
}

inline std::string npy_header_text(const std::string& shape, const std::string& descr = "'<f2'",
                                   const std::string& fortran = "False") {
  return "{'descr': " + descr + ", 'fortran_order': " + fortran + ", 'shape': " + shape + ", }";
}

/// A float16 tensor of three dimensions.
struct tensor {
  std::int64_t extent[3] = {};
  std::vector<std::uint16_t> bits;

  std::size_t index(std::int64_t i, std::int64_t j, std::int64_t k) const {
    return static_cast<std::size_t>((i * extent[1] + j) * extent[2] + k);
  }
  double at(std::int64_t i, std::int64_t j, std::int64_t k) const {
    return static_cast<double>(packkv::half_to_float(bits[index(i, j, k)]));
  }
  std::string npy() const {
    const std::string shape =
        "(" + std::to_string(extent[0]) + ", " + std::to_string(extent[1]) + ", " + std::to_string(extent[2]) + ")";
    return npy_prefix(npy_header_text(shape)) +
           std::string(reinterpret_cast<const char*>(bits.data()), bits.size() * 2);
  }
};

inline tensor random_tensor(random_source& random, std::int64_t a, std::int64_t b, std::int64_t c) {
  tensor x{{a, b, c}, std::vector<std::uint16_t>(static_cast<std::size_t>(a * b * c))};
  for (std::uint16_t& bits : x.bits) bits = packkv::float_to_half(random.normal());
  return x;
}

/// The three files of a random cache.
struct cache_files {
  tensor k, v, q;
  std::string k_path, v_path, q_path;

  cache_files(const temporary_folder& folder, const std::string& name, std::uint64_t seed, std::int64_t kv_heads,
              std::int64_t group, std::int64_t tokens, std::int64_t queries, std::int64_t key_dim,
              std::int64_t value_dim) {
    random_source random(seed);
    k = random_tensor(random, kv_heads, tokens, key_dim);
    v = random_tensor(random, kv_heads, tokens, value_dim);
    q = random_tensor(random, kv_heads * group, queries, key_dim);
    k_path = folder.write(name + "k.npy", k.npy());
    v_path = folder.write(name + "v.npy", v.npy());
    q_path = folder.write(name + "q.npy", q.npy());
  }
  std::vector<std::string> arguments(const std::string& prefix = "--") const {
    return {prefix + "k", k_path, prefix + "v", v_path, prefix + "q", q_path};
  }
};

}  // namespace packkv_test
