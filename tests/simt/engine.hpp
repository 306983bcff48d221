// SPDX-License-Identifier: Apache-2.0
// The executor: CUDA's execution-space keywords, thread coordinates, schedules, launches and the primitives that all
// collectives are made of: a meeting of lanes of a warp and a barrier of a block. Copies beside the threads: async.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

// __shared__ variables are function statics: blocks run one after another, and the executor overwrites them before each
// block, with 0xff bytes, 0x00 bytes (order::reverse) or
// either (order::random). "used" keeps them as they are declared. Each declaration comes with a guard, so that two
// variables are never neighbours: the race detector and AddressSanitizer see an access to it. `extern __shared__` is
// not supported; detail::dynamic_shared() is.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define PACKKV_SIMT_JOINED(a, b) a##b
#define PACKKV_SIMT_GUARD(n) PACKKV_SIMT_JOINED(packkv_simt_guard_, n)
#define __shared__ \
  static __attribute__((used)) char PACKKV_SIMT_GUARD(__COUNTER__)[64]; \
  static __attribute__((used))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the running thread.
inline uint3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace packkv_simt {

/// What a launch throws when a kernel breaks a rule: kernel, block, thread, source line, schedule.
struct error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Which of the threads that can run does so next. A thread runs until it reaches a collective.
enum class order {
  in_order,  ///< lowest warp, lowest lane: warp 0 runs until it waits for others; blocks ascending
  reverse,   ///< highest warp, highest lane; blocks descending
  random,    ///< any thread, also at atomics and fences; blocks shuffled
  ahead      ///< one warp whenever it can, the others in turns, one step each; the last block first
};
struct schedule {
  order kind = order::in_order;
  std::uint64_t seed = 1;  ///< of order::random
  int warp = 0;            ///< of order::ahead, modulo the warps of the block
};

/// The schedule of the next launches. At first that of the environment variable PACKKV_SIMT_SCHEDULE: "in_order",
/// "reverse", "random:SEED" or "ahead:WARP"; without it, in_order.
schedule get_schedule();
void set_schedule(const schedule& s);
schedule parse_schedule(const std::string& text);
std::string to_string(const schedule& s);

/// Sets a schedule for a scope.
class with_schedule {
 public:
  explicit with_schedule(const schedule& s) : before_(get_schedule()) { set_schedule(s); }
  ~with_schedule() { set_schedule(before_); }
  with_schedule(const with_schedule&) = delete;
  with_schedule& operator=(const with_schedule&) = delete;

 private:
  schedule before_;
};

/// Work done since the program started.
struct counters {
  std::uint64_t launches = 0, blocks = 0, switches = 0;
};
counters get_counters();

/// A place in the source text; as a default argument, that of the caller.
struct site {
  const char* file;
  int line;
  static constexpr site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

namespace detail {

enum class kind : std::uint8_t {
  none, syncwarp, shfl, shfl_up, shfl_down, shfl_xor, vote, match,
  reduce_add, reduce_min, reduce_max, reduce_or, reduce_and, reduce_xor, together, syncthreads, phase
};

/// Lane of the running thread.
unsigned lane();

/// Waits for all lanes of `mask`, then returns: shuffles the value that lane `source` brought; votes the ballot of the
/// lanes with a value other than 0; match the lanes with the same value; reductions the result in 32-bit unsigned.
std::uint64_t meet(kind k, unsigned mask, std::uint64_t value, site where, int source = 0);

/// All 32 lanes hand in an operand; the last to come calls combine on all of them, in order of lanes. `name` is that of
/// the instruction.
void meet_all(void* operand, void (*combine)(void* const* operands), const char* name, site where);

/// Waits for all threads of the block that have not exited; the number of them that brought true.
unsigned barrier(bool predicate, site where);

/// A point where order::random may let another thread run.
void preempt();

/// A fence of device or block scope, and such a point.
void fence(bool device);

/// Around an atomic, and for what cudaMalloc gives and cudaFree takes: for the race detector.
void begin_atomic(const void* p, std::size_t bytes);
void end_atomic();
void add_global(void* p, std::size_t bytes);
void remove_global(void* p);

/// Ends the launch from within an access; the race detector has the reason.
[[noreturn]] void abandon();

/// Ends the launch with an error of the running thread.
[[noreturn]] void fail(const std::string& what, site where);

/// An error unless `p` is a multiple of `bytes`.
void check_aligned(const void* p, std::size_t bytes, site where);

/// The running block's dynamic shared memory.
void* dynamic_shared();

/// 0, or the cudaError_t of a launch that the device would refuse.
int run_grid(const void* kernel, void (*thread)(void*), void* argument, dim3 grid, dim3 block, std::size_t shared_bytes);

}  // namespace detail

/// What a launch and the runtime's calls in stream order return, doing nothing, unless it is 0. For tests of failures.
inline int (*instead_of_call)() = nullptr;

/// Threads and bytes of dynamic shared memory of a block.
struct shared_block {
  dim3 threads;
  std::size_t shared_bytes;
  shared_block(dim3 t, std::size_t bytes = 0) : threads(t), shared_bytes(bytes) {}
};

/// Runs a kernel to its end. Returns 0 or the cudaError_t of an impossible configuration; throws packkv_simt::error.
template <class... Parameter, class... Argument>
int launch(void (*kernel)(Parameter...), dim3 grid, shared_block block, Argument... argument) {
  if (instead_of_call)
    if (const int error = instead_of_call()) return error;
  struct call {
    void (*kernel)(Parameter...);
    std::tuple<Parameter...> parameters;
  } c{kernel, std::tuple<Parameter...>(static_cast<Parameter>(argument)...)};
  return detail::run_grid(reinterpret_cast<const void*>(kernel),
                          [](void* p) { std::apply(static_cast<call*>(p)->kernel, static_cast<call*>(p)->parameters); }, &c, grid, block.threads,
                          block.shared_bytes);
}

}  // namespace packkv_simt
