// SPDX-License-Identifier: Apache-2.0
// Files of any bytes for the .npy reader of evaluate. Properties: a header is accepted only if its shape fills the
// file; a file is opened exactly if its header is accepted and its elements are finite; a cache of such files has a
// head dim.
#include <sys/mman.h>
#include <unistd.h>

#include <evaluate/cache.hpp>
#include <packkv/codec/strips.hpp>
#include <packkv/core/float_formats.hpp>
#include <packkv/detail/arith.hpp>
#include <string>

#include "input.hpp"

namespace {

/// A file of these bytes, without a disk.
std::string path_of(const fuzz::memory& bytes) {
  static const int file = memfd_create("fuzz_npy", 0);
  fuzz::check(file >= 0 && ftruncate(file, 0) == 0 &&
                  pwrite(file, bytes.data(), static_cast<std::size_t>(bytes.size()), 0) == bytes.size(),
              "the file is written");
  return "/proc/self/fd/" + std::to_string(file);
}

/// The input as it is, or behind a prefix that says how long its first line is.
fuzz::memory any_file(fuzz::input& in) {
  const int how = in.byte();
  fuzz::memory rest = in.rest();
  if (how % 2 == 0) return rest;
  std::int64_t header = 0;
  while (header < rest.size() && rest[header++] != '\n') {
  }
  const int version = how % 4 == 1 ? 1 : 2, prefix = version == 1 ? 10 : 12;
  fuzz::memory file(prefix + rest.size());
  std::memcpy(file.data(), "\x93NUMPY", 6);
  file[6] = static_cast<std::uint8_t>(version), file[8] = static_cast<std::uint8_t>(header);
  file[9] = static_cast<std::uint8_t>(header >> 8);
  if (rest.size() > 0) std::memcpy(file.data() + prefix, rest.data(), static_cast<std::size_t>(rest.size()));
  return file;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::input in(data, size);
  const fuzz::memory file = any_file(in);
  evaluate::npy_header header;
  const evaluate::outcome parsed =
      evaluate::parse_npy_header(file.data(), static_cast<std::uint64_t>(file.size()), header);
  if (!parsed) {
    fuzz::check(parsed.error().find('\n') == std::string::npos, "an error is one line");
    return 0;
  }
  const std::int64_t elements = header.extent[0] * header.extent[1] * header.extent[2];
  fuzz::check(header.extent[0] > 0 && header.extent[1] > 0 && header.extent[2] > 0 && header.data_offset % 2 == 0 &&
                  header.data_offset + 2 * elements == file.size(),
              "an accepted shape fills the file");
  bool finite = true;
  for (std::int64_t i = 0; i < elements; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, file.data() + header.data_offset + 2 * i, 2);
    finite = finite && packkv::detail::is_finite(packkv::half_to_float(bits));
  }
  const std::string path = path_of(file);
  evaluate::npy_array array;
  fuzz::check(static_cast<bool>(evaluate::npy_array::open(path, array)) == finite, "finite arrays are opened");
  if (!finite) return 0;
  fuzz::check(array.elements() == elements && std::memcmp(array.data(), file.data() + header.data_offset,
                                                          static_cast<std::size_t>(2 * elements)) == 0,
              "an array has the file's elements");
  evaluate::kv_cache cache;
  if (evaluate::load_cache(path, path, path, cache))
    fuzz::check(packkv::is_head_dim(cache.key_dim()) && cache.kv_heads() == cache.query_heads(),
                "a cache has a head dim");
  return 0;
}
