// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that run beside the threads, and what waits for them: bulk copies that report to
// an mbarrier (sm_90 and later), and cp.async groups of a thread (sm_80 and later).
//   full.init(1);  fence_barrier_init();  __syncwarp();            // one thread, then all may use it
//   full.arrive_expect(bytes);  bulk_copy(to, from, bytes, full);  // one thread
//   full.wait(parity);                                             // whoever reads; parity = phase % 2
#pragma once

#include <packkv/detail/cuda.cuh>

namespace packkv::detail {

/// Where async forms take an address of shared memory.
__device__ inline unsigned shared_address(const void* p) {
#if defined(PACKKV_SIMT_EXECUTOR)
  (void)p;
  return 0;
#else
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
#endif
}

/// An mbarrier object in shared memory. A phase ends when `arrivals` threads have arrived and all bytes that arrivals
/// announced have been copied; then the next begins. What a thread did before it arrived is seen by whoever waits.
struct mbarrier {
  std::uint64_t state;

  /// By one thread, before all else. fence_barrier_init() and a barrier of threads come before anyone's use.
  __device__ void init(unsigned arrivals, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
    packkv_simt::detail::barrier_init(&state, arrivals, where);
#else
    asm volatile("mbarrier.init.shared.b64 [%0],%1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
#endif
  }
  __device__ void arrive([[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
    packkv_simt::detail::barrier_arrive(&state, 0, where);
#else
    asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.shared.b64 t,[%0];\n}" ::"r"(shared_address(this)) : "memory");
#endif
  }
  /// Arrives, and the phase also waits for `bytes` of bulk copies.
  __device__ void arrive_expect(unsigned bytes, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
    packkv_simt::detail::barrier_arrive(&state, bytes, where);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(shared_address(this)), "r"(bytes) : "memory");
#endif
  }
  /// Returns when a phase of this parity is over: 0 for the first, third, ... phase. Never two phases behind.
  __device__ void wait(unsigned parity, [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
    packkv_simt::detail::barrier_wait(&state, parity, where);
#else
    asm volatile(
        "{\n.reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared.b64 p,[%0],%1;\n"
        "@!p bra again;\n}" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
#endif
  }
};

/// Shows initialised mbarriers to the copy engine. By the thread that called init.
__device__ inline void fence_barrier_init([[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  packkv_simt::detail::fence_barrier_init(where);
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/// Orders this thread's ordinary accesses to shared memory before later bulk copies into it. A barrier of threads comes
/// before the thread that copies. Nothing where there are no bulk copies.
__device__ inline void fence_async_copies() {
#if !defined(PACKKV_SIMT_EXECUTOR) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Shared memory of a warp, 16-byte aligned, that may be read where nothing has been written, because what is read
/// there does not matter. The executor, which forbids that, gets zeros; nothing on a GPU. All lanes take part.
__device__ inline void allow_unwritten_reads([[maybe_unused]] std::uint8_t* p, [[maybe_unused]] int bytes) {
#if defined(PACKKV_SIMT_EXECUTOR)
  for (int i = 16 * lane_id(); i < bytes; i += 16 * warp_threads) store16(p + i, {});
  __syncwarp();
#endif
}

/// True in one lane of the warp, always the same one. All lanes take part. What it guards is compiled for one thread:
/// operands of bulk_copy lie in uniform registers, and without this the compiler takes lanes one by one.
__device__ inline bool elected() {
#if !defined(PACKKV_SIMT_EXECUTOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned is;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p,0xffffffff;\nselp.u32 %0,1,0,p;\n}" : "=r"(is));
  return is != 0;
#else
  return lane_id() == 0;
#endif
}

/// Copies `bytes` (a multiple of 16, both addresses too) to this block's shared memory and reports them to a phase of
/// `done` that is not over. By one thread; what others did with the destination must be ordered before this call.
/// For what is read once: in the L2 these bytes give way to others first.
__device__ inline void bulk_copy(void* to, const void* from, unsigned bytes, mbarrier& done,
                                 [[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  packkv_simt::detail::bulk_copy(to, from, bytes, &done.state, where);
#else
  asm volatile(
      "{\n.reg .b64 once;\ncreatepolicy.fractional.L2::evict_first.b64 once,1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],once;\n}" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&done))
      : "memory");
#endif
}

/// Copies Bytes (4, 8, 16; both addresses are multiples of it), or zeros if not `valid` (then `from` is not read).
template <int Bytes>
__device__ inline void copy_async(void* to, const void* from, bool valid = true,
                                  [[maybe_unused]] call_site where = call_site::here()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if defined(PACKKV_SIMT_EXECUTOR)
  packkv_simt::detail::copy_async(to, from, Bytes, valid ? Bytes : 0, where);
#else
  const int read = valid ? Bytes : 0;
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(shared_address(to)), "l"(from), "r"(read)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0],[%1],%2,%3;" ::"r"(shared_address(to)), "l"(from), "n"(Bytes),
                 "r"(read)
                 : "memory");
#endif
}

/// Ends a group of this thread's copy_async.
__device__ inline void commit_copies([[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  packkv_simt::detail::commit_copies(where);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits for this thread's groups but the latest `Pending`. Other threads see the bytes after a barrier with this one.
template <int Pending>
__device__ inline void wait_copies([[maybe_unused]] call_site where = call_site::here()) {
#if defined(PACKKV_SIMT_EXECUTOR)
  packkv_simt::detail::wait_copies(Pending, where);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace packkv::detail
