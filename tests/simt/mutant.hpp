// SPDX-License-Identifier: Apache-2.0
// What the instrumented copy of include/ that mutants.py writes calls at each place that a mutant changes (-include).
// Mutant k is there if the environment variable PACKKV_SIMT_MUTANT is k; if it is -1, none is, and the numbers of the
// places that ran are written to the file that PACKKV_SIMT_MUTANT_LOG names.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#define PACKKV_SIMT_INLINE inline __attribute__((always_inline))

namespace packkv_simt {

extern const int chosen_mutant;  // const, or the race detector would be told of each look at it
void reached_mutant(int k);

/// Is mutant k there? Mutants are counted from 1; 0 is none.
PACKKV_SIMT_INLINE bool mutant(int k) {
  if (__builtin_expect(chosen_mutant < 0, 0)) reached_mutant(k);
  return chosen_mutant == k;
}

/// Comparisons that a mutant changes: `a < less{k} < b` has the precedence of `a < b`, and is `a <= b` in mutant k.
struct less {
  int changed;
};
struct less_equal {
  int changed;
};
struct greater {
  int changed;
};
struct greater_equal {
  int changed;
};
template <class T, class Operator>
struct half_compared {
  T left;
  Operator op;
};
template <class T>
PACKKV_SIMT_INLINE half_compared<T, less> operator<(T a, less op) {
  return {a, op};
}
template <class T>
PACKKV_SIMT_INLINE half_compared<T, less_equal> operator<=(T a, less_equal op) {
  return {a, op};
}
template <class T>
PACKKV_SIMT_INLINE half_compared<T, greater> operator>(T a, greater op) {
  return {a, op};
}
template <class T>
PACKKV_SIMT_INLINE half_compared<T, greater_equal> operator>=(T a, greater_equal op) {
  return {a, op};
}
template <class T, class U>
PACKKV_SIMT_INLINE bool operator<(half_compared<T, less> a, U b) {
  return mutant(a.op.changed) ? a.left <= b : a.left < b;
}
template <class T, class U>
PACKKV_SIMT_INLINE bool operator<=(half_compared<T, less_equal> a, U b) {
  return mutant(a.op.changed) ? a.left < b : a.left <= b;
}
template <class T, class U>
PACKKV_SIMT_INLINE bool operator>(half_compared<T, greater> a, U b) {
  return mutant(a.op.changed) ? a.left >= b : a.left > b;
}
template <class T, class U>
PACKKV_SIMT_INLINE bool operator>=(half_compared<T, greater_equal> a, U b) {
  return mutant(a.op.changed) ? a.left > b : a.left >= b;
}

/// x, or another value in mutant k.
template <class T>
PACKKV_SIMT_INLINE T exclusive_or(int k, int bits, T x) {
  return mutant(k) ? static_cast<T>(x ^ bits) : x;
}
template <class T>
PACKKV_SIMT_INLINE T halved(int k, T x) {
  return mutant(k) ? static_cast<T>(x / 2) : x;
}
template <class T>
PACKKV_SIMT_INLINE T plus_one(int k, T x) {
  return mutant(k) ? static_cast<T>(x + 1) : x;
}
template <class T>
PACKKV_SIMT_INLINE T zero(int k, T x) {
  return mutant(k) ? T{} : x;
}
PACKKV_SIMT_INLINE int one(int k) { return mutant(k) ? 1 : 0; }
PACKKV_SIMT_INLINE unsigned without_last_lane(int k, unsigned mask) { return mutant(k) ? mask & 0x7fffffffu : mask; }

/// What one lane brings to a vote or reduction, or in mutant k what changes nothing there.
enum class neutral { zero, ones, lowest, highest };
template <class T>
PACKKV_SIMT_INLINE T brought(int k, neutral n, bool last_lane, T x) {
  if (!(mutant(k) && last_lane)) return x;
  if (n == neutral::lowest) return std::numeric_limits<T>::lowest();
  if (n == neutral::highest) return std::numeric_limits<T>::max();
  if constexpr (std::is_integral_v<T>) return n == neutral::zero ? T{} : static_cast<T>(~0ull);
  return T{};
}

/// Swaps two 32-bit registers of a matrix operand in mutant k; the halves of the register where there is only one.
template <class T>
PACKKV_SIMT_INLINE void swap_registers(int k, const T& operand, int i, int j) {
  static_assert(sizeof(T) % 4 == 0 && !std::is_pointer_v<T>, "a matrix operand is an array of registers");
  if (!mutant(k)) return;
  const bool both = static_cast<int>(sizeof(T)) > 4 * (i > j ? i : j);
  char* p = reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(&operand)) + 4 * i;
  char* q = both ? p + 4 * (j - i) : p + 2;
  char first[4];
  const std::size_t bytes = both ? 4 : 2;
  std::memcpy(first, p, bytes);
  std::memcpy(p, q, bytes);
  std::memcpy(q, first, bytes);
}
/// For a scope, so that the caller's operand is whole again after an instruction that reads it.
template <class T>
struct with_swapped {
  int k;
  const T& operand;
  int i, j;
  PACKKV_SIMT_INLINE with_swapped(int k_, const T& operand_, int i_, int j_) : k(k_), operand(operand_), i(i_), j(j_) {
    swap_registers(k, operand, i, j);
  }
  PACKKV_SIMT_INLINE ~with_swapped() { swap_registers(k, operand, i, j); }
};
/// What a load of fragments has written to its first argument, or returned, with two registers swapped.
template <class Load, class T>
PACKKV_SIMT_INLINE decltype(auto) load_swapped(int k, int i, int j, Load load, T& first) {
  if constexpr (std::is_void_v<decltype(load())>) {
    load();
    swap_registers(k, first, i, j);
  } else {
    auto result = load();
    swap_registers(k, result, i, j);
    return result;
  }
}

}  // namespace packkv_simt

#if defined(PACKKV_SIMT_MUTANT_DEFINITIONS)
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace packkv_simt {
namespace {
int from_environment() {
  const char* text = std::getenv("PACKKV_SIMT_MUTANT");
  return text != nullptr ? std::atoi(text) : 0;
}
struct log {
  std::vector<bool> reached;
  ~log() {
    const char* name = std::getenv("PACKKV_SIMT_MUTANT_LOG");
    std::FILE* file = name != nullptr ? std::fopen(name, "w") : nullptr;
    if (file == nullptr) return;
    for (std::size_t k = 0; k < reached.size(); ++k)
      if (reached[k]) std::fprintf(file, "%zu\n", k);
    std::fclose(file);
  }
} log_;
}  // namespace
extern const int chosen_mutant = from_environment();
void reached_mutant(int k) {
  if (log_.reached.size() <= static_cast<std::size_t>(k)) log_.reached.resize(static_cast<std::size_t>(k) + 1);
  log_.reached[static_cast<std::size_t>(k)] = true;
}
}  // namespace packkv_simt
#endif
