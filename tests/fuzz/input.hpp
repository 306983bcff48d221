// SPDX-License-Identifier: Apache-2.0
// What the fuzz targets share: an input as small numbers and bytes, memory of exactly the bytes that a call may touch,
// and what happens when a property does not hold.
//   fuzz::input in(data, size);   const int heads = 1 + in.below(2);   fuzz::memory page(bytes);   in.fill(page);
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <packkv/core/views.hpp>

namespace fuzz {

namespace pk = packkv;

/// Ends the run, whose input libFuzzer then keeps, unless the property holds.
inline void check(bool holds, const char* property) {
  if (holds) return;
  std::fprintf(stderr, "broken property: %s\n", property);
  std::abort();
}

/// Memory of exactly `size` bytes, 16-byte aligned: AddressSanitizer sees every access beside it. An empty one has a
/// pointer, too.
class memory {
 public:
  explicit memory(std::int64_t size, int byte = 0)
      : size_(static_cast<std::size_t>(size)), bytes_(new std::uint8_t[size_]) {
    if (size_ > 0) std::memset(bytes_.get(), byte, size_);
  }
  memory(const memory& other) : memory(other.size()) {
    if (size_ > 0) std::memcpy(bytes_.get(), other.bytes_.get(), size_);
  }
  memory(memory&&) = default;
  memory& operator=(memory&&) = default;
  std::uint8_t* data() { return bytes_.get(); }
  const std::uint8_t* data() const { return bytes_.get(); }
  std::int64_t size() const { return static_cast<std::int64_t>(size_); }
  std::uint8_t& operator[](std::int64_t i) { return bytes_[static_cast<std::size_t>(i)]; }
  /// The same memory as elements.
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(bytes_.get());
  }
  friend bool operator==(const memory& a, const memory& b) {
    return a.size_ == b.size_ && (a.size_ == 0 || std::memcmp(a.bytes_.get(), b.bytes_.get(), a.size_) == 0);
  }

 private:
  std::size_t size_;
  std::unique_ptr<std::uint8_t[]> bytes_;
};

/// The bytes of an input, from its start; zeros behind its end.
class input {
 public:
  input(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size) {}

  int byte() { return at_ == end_ ? 0 : *at_++; }
  bool flag() { return (byte() & 1) != 0; }
  /// 0 .. n-1, n <= 256
  int below(int n) { return byte() % n; }
  int between(int first, int last) { return first + below(last - first + 1); }
  /// 1 .. n, mostly 1.
  int few(int n) {
    const int x = byte();
    return x < 192 ? 1 : 1 + x % n;
  }
  std::uint64_t bits(int bytes) {
    std::uint64_t x = 0;
    for (int i = 0; i < bytes; ++i) x |= static_cast<std::uint64_t>(byte()) << (8 * i);
    return x;
  }
  /// A number in 0 .. n-1 mostly; else a small negative one, one just beyond, or any of the type.
  template <class Integer>
  Integer near(Integer n) {
    const int how = byte();
    if (how < 224) return static_cast<Integer>(n > 0 ? how % n : 0);
    if (how < 236) return static_cast<Integer>(n + (how - 224));
    if (how < 244) return static_cast<Integer>(-1 - (how - 236));
    if (how < 247) return (std::numeric_limits<Integer>::max)();
    if (how < 250) return (std::numeric_limits<Integer>::min)();
    return static_cast<Integer>(bits(sizeof(Integer)));
  }
  template <class T, std::size_t N>
  T pick(const T (&items)[N]) {
    return items[below(static_cast<int>(N))];
  }
  std::ptrdiff_t left() const { return end_ - at_; }
  /// Takes the bytes that are left.
  memory rest() {
    memory out(left());
    if (left() > 0) std::memcpy(out.data(), at_, static_cast<std::size_t>(left()));
    at_ = end_;
    return out;
  }
  /// Fills memory with what is left, again and again, after a byte that says how it changes from one time to the next:
  /// not at all, in what are the mantissas of IEEE halves, or in all bits. Only that byte is taken. Not instrumented:
  /// its comparisons would only distract libFuzzer.
  __attribute__((no_sanitize("coverage", "address", "undefined"))) void fill(void* to, std::int64_t size) {
    constexpr std::uint64_t masks[] = {0, 0x03ff03ff03ff03ffu, 0, ~std::uint64_t{0}};
    const std::uint64_t mask = pick(masks);
    const std::uint8_t* from = at_;
    std::uint64_t noise = 0;
    for (std::int64_t i = 0; i < size; i += 8) {
      std::uint64_t word = 0;
      if (end_ - from >= 8) {
        __builtin_memcpy_inline(&word, from, 8);  // memcpy itself is instrumented everywhere
        from += 8;
      } else {
        for (int k = 0; k < 8 && at_ != end_; ++k) {
          if (from == end_) from = at_, noise += 0x9e3779b97f4a7c15u;
          word = word << 8 | *from++;
        }
      }
      word ^= (noise ^ noise >> 29) * 0xbf58476d1ce4e5b9u & mask;
      noise += noise != 0 ? 0x9e3779b97f4a7c15u : 0;
      std::uint8_t* const out = static_cast<std::uint8_t*>(to) + i;
      if (size - i >= 8)
        __builtin_memcpy_inline(out, &word, 8);
      else
        for (std::int64_t k = 0; k < size - i; ++k) out[k] = static_cast<std::uint8_t>(word >> (8 * k));
    }
  }
  void fill(memory& to) { fill(to.data(), to.size()); }

 private:
  const std::uint8_t* at_;
  const std::uint8_t* end_;
};

/// 16-bit or float elements [extents], contiguous, in memory of their own.
template <int Rank>
struct tensor {
  memory bytes;
  pk::output_view<Rank> view;

  tensor(pk::dtype type, const std::int64_t (&extent)[Rank], int byte = 0)
      : bytes(size_of(type, extent), byte), view(pk::make_output<Rank>(bytes.data(), type, extent)) {}
  tensor(const tensor&) = delete;
  tensor& operator=(const tensor&) = delete;
  pk::input_view<Rank> in() const {
    pk::input_view<Rank> v;
    v.data = view.data, v.type = view.type;
    for (int i = 0; i < Rank; ++i) v.extent[i] = view.extent[i], v.stride[i] = view.stride[i];
    return v;
  }
  const float* floats() { return bytes.as<float>(); }
  std::int64_t elements() const { return bytes.size() / pk::bytes_of(view.type); }

 private:
  static std::int64_t size_of(pk::dtype type, const std::int64_t (&extent)[Rank]) {
    std::int64_t size = pk::bytes_of(type);
    for (const std::int64_t n : extent) size *= n;
    return size;
  }
};

}  // namespace fuzz
