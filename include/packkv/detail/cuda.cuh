// SPDX-License-Identifier: Apache-2.0
// The one door to the CUDA runtime and to what kernels need of the machine: launches, shuffles, wide copies.
// The CPU executor of the tests replaces <cuda_runtime.h> by its own header and these functions keep their meaning.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(PACKKV_SIMT_EXECUTOR)
#include <packkv_simt.hpp>
#else
#include <cuda_runtime.h>
#endif

#include <packkv/core/status.hpp>

namespace packkv::detail {

inline constexpr int warp_threads = 32;
inline constexpr unsigned all_lanes = 0xffffffffu;

/// The source line of a caller, for the messages of the executor; nothing on a GPU.
#if defined(PACKKV_SIMT_EXECUTOR)
using call_site = packkv_simt::site;
#else
struct call_site {
  __host__ __device__ static constexpr call_site here() { return {}; }
};
#endif

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % warp_threads; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / warp_threads; }

/// All 32 lanes take part. Results are the same in every lane where the operation is commutative.
template <class T>
__device__ inline T shuffle_xor(T x, int mask, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return __shfl_xor_sync(all_lanes, x, mask, warp_threads, where);
#else
  return __shfl_xor_sync(all_lanes, x, mask);
#endif
}
template <class T>
__device__ inline T shuffle(T x, int lane, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return __shfl_sync(all_lanes, x, lane, warp_threads, where);
#else
  return __shfl_sync(all_lanes, x, lane);
#endif
}
__device__ inline float warp_max(float x, call_site where = call_site::here()) {
  for (int m = 16; m > 0; m /= 2) x = fmaxf(x, shuffle_xor(x, m, where));
  return x;
}
template <class T>
__device__ inline T warp_sum(T x, call_site where = call_site::here()) {
  for (int m = 16; m > 0; m /= 2) x += shuffle_xor(x, m, where);
  return x;
}
__device__ inline unsigned warp_sum_unsigned(unsigned x, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return __reduce_add_sync(all_lanes, x, where);
#else
  return __reduce_add_sync(all_lanes, x);
#endif
}
__device__ inline unsigned warp_max_unsigned(unsigned x, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return __reduce_max_sync(all_lanes, x, where);
#else
  return __reduce_max_sync(all_lanes, x);
#endif
}
/// Sum of the values of this lane and of those below it.
template <class T>
__device__ inline T warp_prefix_sum(T x, call_site where = call_site::here()) {
  for (int d = 1; d < warp_threads; d *= 2) {
    const T below = shuffle(x, lane_id() - d, where);
    if (lane_id() >= d) x += below;
  }
  return x;
}
/// The same of 32-bit integers, two instructions a step.
__device__ inline std::uint32_t warp_prefix_sum(std::uint32_t x, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return warp_prefix_sum<std::uint32_t>(x, where);
#else
  for (int d = 1; d < warp_threads; d *= 2)
    asm volatile(
        "{\n.reg .u32 below;\n.reg .pred there;\n"
        "shfl.sync.up.b32 below|there,%0,%1,0,-1;\n"
        "@there add.u32 %0,%0,below;\n}"
        : "+r"(x)
        : "r"(d));
  return x;
#endif
}

/// 2^x as the hardware computes it (two units in the last place; 2^-inf = 0).
__device__ inline float exp2_approx(float x) { return exp2f(x); }

struct alignas(16) bytes16 {
  std::uint32_t word[4];
};

struct alignas(8) bytes8 {
  std::uint32_t word[2];
};

/// Loads and stores of 16 or 8 bytes; the address is a multiple of that.
__device__ inline bytes8 load8(const void* p, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  packkv_simt::detail::check_aligned(p, 8, where);
#endif
  return *static_cast<const bytes8*>(p);
}
__device__ inline bytes16 load16(const void* p, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  packkv_simt::detail::check_aligned(p, 16, where);
#endif
  return *static_cast<const bytes16*>(p);
}
__device__ inline void store16(void* p, const bytes16& x, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  packkv_simt::detail::check_aligned(p, 16, where);
#endif
  *static_cast<bytes16*>(p) = x;
}
/// The same, of what is not read again soon: the L2 keeps other lines rather than these.
__device__ inline void store16_streaming(void* p, const bytes16& x,
                                         [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  store16(p, x, where);
#else
  __stcs(static_cast<uint4*>(p), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
#endif
}
__device__ inline void store8(void* p, const bytes8& x, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  packkv_simt::detail::check_aligned(p, 8, where);
#endif
  *static_cast<bytes8*>(p) = x;
}

/// Byte Number of each of four words, that of `a` lowest.
template <int Number>
__device__ inline std::uint32_t gather_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  static_assert(Number >= 0 && Number < 4, "a word has four bytes");
#if defined(PACKKV_SIMT_EXECUTOR)
  const auto byte = [](std::uint32_t x) { return x >> (8 * Number) & 0xffu; };
  return byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
#else
  constexpr unsigned two = Number | (Number + 4) << 4;
  return __byte_perm(__byte_perm(a, b, two), __byte_perm(c, d, two), 0x5410);
#endif
}

/// Adds 1 to a counter, or sets it back to 0 if it is `last`; what it was before. Releases what the threads of this
/// block wrote before a barrier, and acquires, for a barrier behind it, what blocks released that came before.
__device__ inline std::uint32_t arrive(std::uint32_t* counter, std::uint32_t last) {
#if defined(PACKKV_SIMT_EXECUTOR)
  __threadfence();
  const std::uint32_t before = atomicInc(counter, last);
  __threadfence();
  return before;
#else
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(last)
               : "memory");
  return before;
#endif
}

/// A load of a word of which others change bits meanwhile.
__device__ inline std::uint32_t load_changing(std::uint32_t* p) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return atomicOr(p, 0u);
#else
  std::uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(p)) : "memory");
  return x;
#endif
}

/// p + bytes; of a null pointer, too, from which nothing is read then. (To compilers for the CPU that is undefined.)
__device__ inline const char* away(const char* p, std::int64_t bytes) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(bytes));
#else
  return p + bytes;
#endif
}

/// A load of global memory that begins before whatever comes behind it: others may be moved to where they are needed.
PACKKV_HOST_DEVICE inline std::int32_t load_now(const std::int32_t* p) {
#if defined(__CUDA_ARCH__) && !defined(PACKKV_SIMT_EXECUTOR)
  std::int32_t x;
  asm volatile("ld.global.s32 %0,[%1];" : "=r"(x) : "l"(p));
  return x;
#else
  return *p;
#endif
}
/// A load that sees what other blocks wrote in this launch.
__device__ inline float load_fresh(const float* p) { return __ldcg(p); }

/// The block's dynamic shared memory, of the size that the launch gave it; 128-byte aligned.
__device__ inline std::uint8_t* dynamic_shared() {
#if defined(PACKKV_SIMT_EXECUTOR)
  return static_cast<std::uint8_t*>(packkv_simt::detail::dynamic_shared());
#else
  extern __shared__ __align__(128) std::uint8_t packkv_dynamic_shared[];
  return packkv_dynamic_shared;
#endif
}

/// Threads and bytes of dynamic shared memory of a block.
struct block_size {
  int threads, shared_bytes;
  bool early;  ///< the kernel may begin while the one before in the stream ends: see wait_for_kernel_before
  block_size(int threads_, int shared_bytes_ = 0, bool early_ = false)
      : threads(threads_), shared_bytes(shared_bytes_), early(early_) {}
};

/// Lets the next kernel in the stream begin once all blocks of this one have, if it is launched early (programmatic
/// dependent launch, sm_90 and later).
__device__ inline void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(PACKKV_SIMT_EXECUTOR)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Waits until the kernel before in the stream has ended and all can see what it has written, then lets the next kernel
/// begin: whoever does not wait for this kernel sees what those before it wrote. A kernel that is launched early
/// touches nothing but its parameters and shared memory before.
__device__ inline void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(PACKKV_SIMT_EXECUTOR)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  let_next_kernel_begin();
}
/// The first line of each of two kernels of a call, neither of which needs what the other writes. The second, launched
/// early, begins beside the last blocks of the first. The first is not launched early: what the second needs has been
/// written before the first began.
template <bool First>
__device__ void begin_one_of_two() {
  if constexpr (First) let_next_kernel_begin();
}
/// Their last line: the second does not end before the first, so that whatever comes next waits for both.
template <bool First>
__device__ void end_one_of_two() {
  if constexpr (!First) wait_for_kernel_before();
}

#if !defined(__CUDACC_RTC__)  // NVRTC has no CUDA runtime
/// Launches a kernel; a refusal of the runtime becomes a status. Never synchronises.
template <class... Parameter>
inline status launch(void (*kernel)(Parameter...), dim3 grid, block_size block, cudaStream_t stream,
                     Parameter... parameter) {
  const dim3 threads(static_cast<unsigned>(block.threads));
  const auto shared_bytes = static_cast<std::size_t>(block.shared_bytes);
#if defined(PACKKV_SIMT_EXECUTOR)
  (void)stream;
  const auto error = static_cast<cudaError_t>(
      packkv_simt::launch(kernel, grid, packkv_simt::shared_block{threads, shared_bytes}, parameter...));
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  void* pointers[] = {static_cast<void*>(&parameter)...};
  cudaError_t error = cudaSuccess;
  if (block.shared_bytes > 0)  // with the kernel's own, perhaps more than every kernel may have unasked
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, block.shared_bytes);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = block.early ? 1 : 0;
  if (error == cudaSuccess) error = cudaLaunchKernelExC(&config, function, pointers);
#endif
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  return refuse(status_code::cuda_error, cudaGetErrorString(error), error);
}

/// The value of __CUDA_ARCH__ for which the code of a kernel was compiled that runs on the current device.
template <class... Parameter>
status compiled_architecture([[maybe_unused]] void (*kernel)(Parameter...), int& architecture) {
#if defined(PACKKV_SIMT_EXECUTOR)
  architecture = 900;
  return {};
#else
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) {
    architecture = attributes.ptxVersion * 10;
    return {};
  }
  (void)cudaGetLastError();
  return refuse(status_code::cuda_error, cudaGetErrorString(error), error);
#endif
}

/// As launch, for a kernel that begins with wait_for_kernel_before, or is the second of two: early where code of sm_90
/// or later runs.
template <class... Parameter>
status launch_early(void (*kernel)(Parameter...), dim3 grid, block_size block, cudaStream_t stream,
                    Parameter... parameter) {
  int architecture = 0;
  if (const status s = compiled_architecture(kernel, architecture); !s) return s;
  block.early = architecture >= 900;
  return launch(kernel, grid, block, stream, parameter...);
}

/// Zeroes memory in stream order.
inline status clear(void* p, std::size_t bytes, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(p, 0, bytes, stream);
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  return refuse(status_code::cuda_error, cudaGetErrorString(error), error);
}
#endif

/// Brings the 128 bytes around an address of global memory nearer, without waiting.
__device__ inline void prefetch([[maybe_unused]] const void* p) {
#if !defined(PACKKV_SIMT_EXECUTOR)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

/// The same, of which the compiler knows nothing: it cannot work it out again instead of keeping it.
template <class T>
__device__ inline const T* opaque(const T* p) {
#if !defined(PACKKV_SIMT_EXECUTOR)
  asm volatile("" : "+l"(p));
#endif
  return p;
}
__device__ inline std::uint32_t opaque(std::uint32_t x) {
#if !defined(PACKKV_SIMT_EXECUTOR)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

/// Fetches a kernel's parameters into the constant cache all at once: each 64 bytes that are first met one by one cost
/// a wait of their own.
template <class Parameters>
__device__ inline void touch_parameters([[maybe_unused]] const Parameters& parameters) {
#if !defined(PACKKV_SIMT_EXECUTOR)
  constexpr int lines = static_cast<int>(sizeof(Parameters) / 64);
  static_assert(lines <= warp_threads, "a lane fetches one line");
  const int x = lane_id() < lines ? reinterpret_cast<const int*>(&parameters)[16 * lane_id()] : 0;
  asm volatile("" ::"r"(x));
#endif
}

}  // namespace packkv::detail
