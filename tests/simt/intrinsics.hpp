// SPDX-License-Identifier: Apache-2.0
// CUDA's device functions on top of the executor's two primitives; semantics of the CUDA C++ Programming Guide, with
// one rule more: every lane that a mask names must exist, must not have exited, and must come from the same source line.
#pragma once

#include <math.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "engine.hpp"

namespace packkv_simt::detail {

template <class T>
std::uint64_t to_bits(T x) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves 1 to 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

/// The value that lane `source` brought to a shuffle.
template <class T>
T shuffled(kind k, unsigned mask, T x, int source, int width, site where) {
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0) fail("the width of a shuffle must be 1, 2, 4, 8, 16 or 32", where);
  if ((mask >> source & 1u) == 0) fail("a shuffle reads lane " + std::to_string(source) + ", which its mask does not name", where);
  return from_bits<T>(meet(k, mask, to_bits(x), where, source));
}

inline unsigned reduced(kind k, unsigned mask, unsigned x, site where) { return static_cast<unsigned>(meet(k, mask, x, where)); }

/// old = *p; *p = next(old); the old value. Blocks and threads run one at a time, so this needs no lock. Inlined, like the
/// atomics and loads below, or the race detector would give this place instead of the caller's.
template <class T, class Next>
[[gnu::always_inline]] inline T atomically(T* p, Next next) {
  preempt();
  begin_atomic(p, sizeof(T));
  const T old = *p;
  *p = next(old);
  end_atomic();
  preempt();
  return old;
}

/// Keeps a second parameter of an atomic from deducing its type.
template <class T>
using same = std::common_type_t<T>;

}  // namespace packkv_simt::detail

// ------------------------------------------------------------------------------------------------------------ barriers
inline void __syncthreads(packkv_simt::site where = packkv_simt::site::here()) { packkv_simt::detail::barrier(false, where); }
inline int __syncthreads_count(int p, packkv_simt::site where = packkv_simt::site::here()) {
  return static_cast<int>(packkv_simt::detail::barrier(p != 0, where));
}
inline int __syncthreads_or(int p, packkv_simt::site where = packkv_simt::site::here()) {
  return packkv_simt::detail::barrier(p != 0, where) != 0;
}
inline int __syncthreads_and(int p, packkv_simt::site where = packkv_simt::site::here()) {
  return packkv_simt::detail::barrier(p == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, packkv_simt::site where = packkv_simt::site::here()) {
  packkv_simt::detail::meet(packkv_simt::detail::kind::syncwarp, mask, 0, where);
}
inline void __threadfence() { packkv_simt::detail::fence(true); }
inline void __threadfence_block() { packkv_simt::detail::fence(false); }
inline void __threadfence_system() { packkv_simt::detail::fence(true); }

// ------------------------------------------------------------------------------------------------------------ shuffles
template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32, packkv_simt::site where = packkv_simt::site::here()) {
  using namespace packkv_simt::detail;
  const int self = static_cast<int>(lane());
  return shuffled(kind::shfl, mask, x, (self & -width) | (source & (width - 1)), width, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32, packkv_simt::site where = packkv_simt::site::here()) {
  using namespace packkv_simt::detail;
  const int self = static_cast<int>(lane()), within = self & (width - 1);
  return shuffled(kind::shfl_up, mask, x, delta <= static_cast<unsigned>(within) ? self - static_cast<int>(delta) : self, width, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32, packkv_simt::site where = packkv_simt::site::here()) {
  using namespace packkv_simt::detail;
  const int self = static_cast<int>(lane()), room = width - 1 - (self & (width - 1));
  return shuffled(kind::shfl_down, mask, x, delta <= static_cast<unsigned>(room) ? self + static_cast<int>(delta) : self, width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lane_mask, int width = 32, packkv_simt::site where = packkv_simt::site::here()) {
  using namespace packkv_simt::detail;
  const int self = static_cast<int>(lane()), source = (self ^ lane_mask) & 31;
  return shuffled(kind::shfl_xor, mask, x, source <= (self | (width - 1)) ? source : self, width, where);
}

// --------------------------------------------------------------------------------------------------- votes, reductions
inline unsigned __ballot_sync(unsigned mask, int p, packkv_simt::site where = packkv_simt::site::here()) {
  return static_cast<unsigned>(packkv_simt::detail::meet(packkv_simt::detail::kind::vote, mask, p != 0, where));
}
inline int __any_sync(unsigned mask, int p, packkv_simt::site where = packkv_simt::site::here()) { return __ballot_sync(mask, p, where) != 0; }
inline int __all_sync(unsigned mask, int p, packkv_simt::site where = packkv_simt::site::here()) {
  return __ballot_sync(mask, p, where) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T x, packkv_simt::site where = packkv_simt::site::here()) {
  using namespace packkv_simt::detail;
  return static_cast<unsigned>(meet(kind::match, mask, to_bits(x), where));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned x, packkv_simt::site where = packkv_simt::site::here()) {
  return packkv_simt::detail::reduced(packkv_simt::detail::kind::reduce_add, mask, x, where);
}
inline int __reduce_add_sync(unsigned mask, int x, packkv_simt::site where = packkv_simt::site::here()) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(x), where));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x, packkv_simt::site where = packkv_simt::site::here()) {
  return packkv_simt::detail::reduced(packkv_simt::detail::kind::reduce_max, mask, x, where);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned x, packkv_simt::site where = packkv_simt::site::here()) {
  return packkv_simt::detail::reduced(packkv_simt::detail::kind::reduce_min, mask, x, where);
}
inline int __reduce_max_sync(unsigned mask, int x, packkv_simt::site where = packkv_simt::site::here()) {
  return static_cast<int>(__reduce_max_sync(mask, static_cast<unsigned>(x) ^ 0x80000000u, where) ^ 0x80000000u);
}
inline int __reduce_min_sync(unsigned mask, int x, packkv_simt::site where = packkv_simt::site::here()) {
  return static_cast<int>(__reduce_min_sync(mask, static_cast<unsigned>(x) ^ 0x80000000u, where) ^ 0x80000000u);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned x, packkv_simt::site where = packkv_simt::site::here()) {
  return packkv_simt::detail::reduced(packkv_simt::detail::kind::reduce_or, mask, x, where);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned x, packkv_simt::site where = packkv_simt::site::here()) {
  return packkv_simt::detail::reduced(packkv_simt::detail::kind::reduce_and, mask, x, where);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned x, packkv_simt::site where = packkv_simt::site::here()) {
  return packkv_simt::detail::reduced(packkv_simt::detail::kind::reduce_xor, mask, x, where);
}

// ------------------------------------------------------------------------------------------------------------- atomics
// For the types of CUDA's overloads and every other arithmetic type; a misuse of types is nvcc's to find.
template <class T>
[[gnu::always_inline]] inline T atomicAdd(T* p, packkv_simt::detail::same<T> x) {
  return packkv_simt::detail::atomically(p, [&](T old) { return static_cast<T>(old + x); });
}
template <class T>
[[gnu::always_inline]] inline T atomicSub(T* p, packkv_simt::detail::same<T> x) {
  return packkv_simt::detail::atomically(p, [&](T old) { return static_cast<T>(old - x); });
}
template <class T>
[[gnu::always_inline]] inline T atomicMax(T* p, packkv_simt::detail::same<T> x) {
  return packkv_simt::detail::atomically(p, [&](T old) { return old < x ? x : old; });
}
template <class T>
[[gnu::always_inline]] inline T atomicMin(T* p, packkv_simt::detail::same<T> x) {
  return packkv_simt::detail::atomically(p, [&](T old) { return x < old ? x : old; });
}
template <class T>
[[gnu::always_inline]] inline T atomicOr(T* p, packkv_simt::detail::same<T> x) {
  return packkv_simt::detail::atomically(p, [&](T old) { return static_cast<T>(old | x); });
}
template <class T>
[[gnu::always_inline]] inline T atomicAnd(T* p, packkv_simt::detail::same<T> x) {
  return packkv_simt::detail::atomically(p, [&](T old) { return static_cast<T>(old & x); });
}
template <class T>
[[gnu::always_inline]] inline T atomicXor(T* p, packkv_simt::detail::same<T> x) {
  return packkv_simt::detail::atomically(p, [&](T old) { return static_cast<T>(old ^ x); });
}
template <class T>
[[gnu::always_inline]] inline T atomicExch(T* p, packkv_simt::detail::same<T> x) {
  return packkv_simt::detail::atomically(p, [&](T) { return x; });
}
template <class T>
[[gnu::always_inline]] inline T atomicCAS(T* p, packkv_simt::detail::same<T> compare, packkv_simt::detail::same<T> x) {
  return packkv_simt::detail::atomically(p, [&](T old) { return old == compare ? x : old; });
}
[[gnu::always_inline]] inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return packkv_simt::detail::atomically(p, [&](unsigned old) { return old >= limit ? 0u : old + 1; });
}
[[gnu::always_inline]] inline unsigned atomicDec(unsigned* p, unsigned limit) {
  return packkv_simt::detail::atomically(p, [&](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

// ------------------------------------------------------------------------------------------------------ loads and bits
template <class T>
[[gnu::always_inline]] inline T __ldg(const T* p) { return *p; }
template <class T>
[[gnu::always_inline]] inline T __ldcg(const T* p) {
  packkv_simt::detail::preempt();
  return *p;
}
template <class T>
[[gnu::always_inline]] inline T __ldcs(const T* p) { return *p; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline float __uint_as_float(unsigned x) { return packkv_simt::detail::from_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(packkv_simt::detail::to_bits(x)); }
[[noreturn]] inline void __trap(packkv_simt::site where = packkv_simt::site::here()) { packkv_simt::detail::fail("__trap()", where); }
