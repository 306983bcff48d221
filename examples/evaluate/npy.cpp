// SPDX-License-Identifier: Apache-2.0
// The .npy reader: format description at numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
#include "npy.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include <packkv/core/checked.hpp>

namespace evaluate {
namespace {

constexpr std::uint64_t max_header_bytes = 65536;  // numpy itself writes 118 for such arrays
constexpr int max_dimensions = 32;

/// Walks the header, a Python dict literal of the three known keys.
class dict_reader {
 public:
  dict_reader(const char* begin, const char* end) : at_(begin), end_(end) {}

  /// Skips spaces, then takes `c` if it is next.
  bool take(char c) {
    skip_space();
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }
  bool take_word(const char* word) {
    skip_space();
    const std::size_t n = std::strlen(word);
    if (static_cast<std::size_t>(end_ - at_) < n || std::memcmp(at_, word, n) != 0) return false;
    at_ += n;
    return true;
  }
  bool take_string(std::string& text) {
    skip_space();
    if (at_ == end_ || (*at_ != '\'' && *at_ != '"')) return false;
    const char quote = *at_++;
    const char* begin = at_;
    while (at_ != end_ && *at_ != quote && *at_ >= ' ' && *at_ <= '~' && *at_ != '\\') ++at_;
    if (at_ == end_ || *at_ != quote) return false;
    text.assign(begin, at_++);
    return true;
  }
  /// A decimal number without sign that fits 63 bits.
  bool take_number(std::int64_t& value) {
    skip_space();
    packkv::checked sum = 0;
    const char* begin = at_;
    for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_) sum = sum * 10 + (*at_ - '0');
    value = sum.value();
    return at_ != begin && sum.valid();
  }
  bool done() {
    skip_space();
    return at_ == end_;
  }

 private:
  void skip_space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }
  const char* at_;
  const char* end_;
};

outcome parse_shape(dict_reader& in, npy_header& header) {
  if (!in.take('(')) return failure("malformed .npy header: the shape is not a tuple");
  int count = 0;
  while (!in.take(')')) {
    if (in.take('-')) return failure("the shape has a negative dimension");
    std::int64_t extent = 0;
    if (!in.take_number(extent)) return failure("the shape has a dimension that is no number of 63 bits");
    if (extent == 0) return failure("the shape has a dimension of zero");
    if (count < 3) header.extent[count] = extent;
    if (++count > max_dimensions) return failure("the shape has too many dimensions");
    if (in.take(')')) break;
    if (!in.take(',')) return failure("malformed .npy header: the shape is not a tuple of numbers");
  }
  if (count != 3) return failure("the array has " + std::to_string(count) + " dimensions, not 3");
  return {};
}

outcome parse_dict(dict_reader& in, npy_header& header) {
  bool have_descr = false, have_order = false, have_shape = false;
  if (!in.take('{')) return failure("malformed .npy header: no dictionary");
  while (!in.take('}')) {
    std::string key;
    if (!in.take_string(key) || !in.take(':')) return failure("malformed .npy header");
    bool* const have = key == "descr"           ? &have_descr
                       : key == "fortran_order" ? &have_order
                       : key == "shape"         ? &have_shape
                                                : nullptr;
    if (have == nullptr) return failure("malformed .npy header: unknown key");
    if (std::exchange(*have, true)) return failure("malformed .npy header: a key appears twice");
    if (have == &have_descr) {
      std::string descr;
      if (!in.take_string(descr)) return failure("structured dtypes are not read; only float16 ('<f2')");
      if (descr != "<f2")
        return failure("the dtype is '" + descr.substr(0, 16) + "'; only little-endian float16 ('<f2') is read");
    } else if (have == &have_order) {
      if (in.take_word("True")) return failure("the array is in Fortran order; only C order is read");
      if (!in.take_word("False")) return failure("malformed .npy header: fortran_order");
    } else if (outcome o = parse_shape(in, header); !o) {
      return o;
    }
    if (in.take('}')) break;
    if (!in.take(',')) return failure("malformed .npy header");
  }
  if (!in.done()) return failure("malformed .npy header: text behind the dictionary");
  if (!have_descr || !have_order || !have_shape)
    return failure("malformed .npy header: descr, fortran_order or shape is missing");
  return {};
}

}  // namespace

outcome parse_npy_header(const unsigned char* bytes, std::uint64_t file_bytes, npy_header& header) {
  if (file_bytes < 10 || std::memcmp(bytes, "\x93NUMPY", 6) != 0) return failure("not a .npy file");
  const int version = bytes[6];
  if (version < 1 || version > 3 || bytes[7] != 0) return failure("unknown version of the .npy format");
  const std::uint64_t prefix = version == 1 ? 10 : 12;
  if (file_bytes < prefix) return failure("the file ends inside the .npy header");
  std::uint64_t length = bytes[8] | static_cast<std::uint64_t>(bytes[9]) << 8;
  if (version > 1) length |= static_cast<std::uint64_t>(bytes[10]) << 16 | static_cast<std::uint64_t>(bytes[11]) << 24;
  if (length > max_header_bytes) return failure("the .npy header is larger than 64 KiB");
  if (length > file_bytes - prefix) return failure("the file ends inside the .npy header");

  const char* text = reinterpret_cast<const char*>(bytes) + prefix;
  dict_reader in(text, text + length);
  if (outcome o = parse_dict(in, header); !o) return o;
  header.data_offset = static_cast<std::int64_t>(prefix + length);
  if (header.data_offset % 2 != 0) return failure("the data starts at an odd offset");
  const packkv::checked size = packkv::checked(header.extent[0]) * header.extent[1] * header.extent[2] * 2;
  if (!size.valid()) return failure("the shape overflows 63 bits of bytes");
  const std::uint64_t expected = static_cast<std::uint64_t>(size.value()), present = file_bytes - prefix - length;
  if (present < expected)
    return failure("truncated: the shape needs " + std::to_string(expected) + " bytes of data, the file has " +
                   std::to_string(present));
  if (present > expected)
    return failure("the shape needs " + std::to_string(expected) + " bytes of data, but the file has " +
                   std::to_string(present));
  return {};
}

npy_array::npy_array(npy_array&& other) noexcept { *this = std::move(other); }

npy_array& npy_array::operator=(npy_array&& other) noexcept {
  std::swap(mapping_, other.mapping_);
  std::swap(mapped_bytes_, other.mapped_bytes_);
  std::swap(header_, other.header_);
  return *this;
}

npy_array::~npy_array() {
  if (mapping_ != nullptr) munmap(const_cast<void*>(mapping_), mapped_bytes_);
}

outcome npy_array::open(const std::string& path, npy_array& array) {
  const auto wrong = [&](const std::string& what) { return failure(path + ": " + what); };
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return wrong(std::strerror(errno));
  struct stat info = {};
  const bool known = fstat(file, &info) == 0;
  const bool regular = known && S_ISREG(info.st_mode);
  npy_array mapped;
  if (regular && info.st_size >= 10) {
    mapped.mapped_bytes_ = static_cast<std::size_t>(info.st_size);
    void* p = mmap(nullptr, mapped.mapped_bytes_, PROT_READ, MAP_PRIVATE, file, 0);
    if (p != MAP_FAILED) mapped.mapping_ = p;
  }
  const int map_error = errno;
  close(file);
  if (!regular) return wrong("not a regular file");
  if (info.st_size < 10) return wrong("not a .npy file");
  if (mapped.mapping_ == nullptr) return wrong(std::strerror(map_error));
  if (outcome o =
          parse_npy_header(static_cast<const unsigned char*>(mapped.mapping_), mapped.mapped_bytes_, mapped.header_);
      !o)
    return wrong(o.error());
  if (outcome o = mapped.check_finite(); !o) return wrong(o.error());
  array = std::move(mapped);
  return {};
}

outcome npy_array::check_finite() const {
  const std::uint16_t* x = data();
  constexpr std::int64_t block = 4096;
  for (std::int64_t first = 0; first < elements(); first += block) {
    const std::int64_t end = packkv::min_of(first + block, elements());
    unsigned bad = 0;
    for (std::int64_t i = first; i < end; ++i) bad |= (x[i] & 0x7c00u) == 0x7c00u ? 1u : 0u;
    for (std::int64_t i = first; bad != 0 && i < end; ++i) {
      if ((x[i] & 0x7c00u) != 0x7c00u) continue;
      const std::int64_t d = header_.extent[2], t = header_.extent[1];
      return failure("the element at [" + std::to_string(i / d / t) + ", " + std::to_string(i / d % t) + ", " +
                     std::to_string(i % d) + "] is NaN or infinite");
    }
  }
  return {};
}

}  // namespace evaluate
