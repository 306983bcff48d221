// SPDX-License-Identifier: Apache-2.0
// How many cycles a scheduler of a Hopper SM needs for the step that the fused kernels are made of: four masks, which
// are an operand, and the products with it. Of mma.sync and of wgmma with the operand in registers, whose other operand
// lies in shared memory and is 0. Cycles are counted, not time: the clock, which falls with the power that operands
// draw, does not matter.
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a bench/studies/products.cu -o products && ./products
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int rounds = 2000, strips = 4, steps = 4, most_warps = 16;

void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "products: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Volatile, so that every one is done.
template <std::uint32_t Mask>
__device__ std::uint32_t masked(std::uint32_t x) {
  std::uint32_t y;
  asm volatile("lop3.b32 %0,%1,%2,0,0xc0;" : "=r"(y) : "r"(x), "n"(Mask));
  return y;
}

/// One product of a kind: A is the masked operand, B two registers or a descriptor of shared memory.
struct f16_to_f32 {
  static constexpr const char* name = "mma m16n8k16, halves";
  static constexpr int sums = 4;
  static constexpr bool async = false;
  using sum_type = float;
  __device__ static void multiply(float* d, const std::uint32_t* a, const std::uint32_t* b, std::uint64_t) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};
struct f16_to_f16 {
  static constexpr const char* name = "mma m16n8k16, halves, sums too";
  static constexpr int sums = 2;
  static constexpr bool async = false;
  using sum_type = std::uint32_t;
  __device__ static void multiply(std::uint32_t* d, const std::uint32_t* a, const std::uint32_t* b, std::uint64_t) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1},{%2,%3,%4,%5},{%6,%7},{%0,%1};"
                 : "+r"(d[0]), "+r"(d[1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};
struct u8_s8 {
  static constexpr const char* name = "mma m16n8k32, u8 x s8";
  static constexpr int sums = 4;
  static constexpr bool async = false;
  using sum_type = int;
  __device__ static void multiply(int* d, const std::uint32_t* a, const std::uint32_t* b, std::uint64_t) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};
struct wgmma_f16_n8 {
  static constexpr const char* name = "wgmma m64n8k16, halves";
  static constexpr int sums = 4;
  static constexpr bool async = true;
  using sum_type = float;
  __device__ static void multiply(float* d, const std::uint32_t* a, const std::uint32_t*, std::uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3},{%4,%5,%6,%7},%8,1,1,1,0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};
struct wgmma_f16_n16 {
  static constexpr const char* name = "wgmma m64n16k16, halves";
  static constexpr int sums = 8;
  static constexpr bool async = true;
  using sum_type = float;
  __device__ static void multiply(float* d, const std::uint32_t* a, const std::uint32_t*, std::uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7},{%8,%9,%10,%11},%12,1,1,1,0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};
struct wgmma_u8_n8 {
  static constexpr const char* name = "wgmma m64n8k32, u8 x s8";
  static constexpr int sums = 4;
  static constexpr bool async = true;
  using sum_type = int;
  __device__ static void multiply(int* d, const std::uint32_t* a, const std::uint32_t*, std::uint64_t b) {
    asm volatile(
        "{.reg .pred p;\nsetp.ne.b32 p,1,0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k32.s32.u8.s8 {%0,%1,%2,%3},{%4,%5,%6,%7},%8,p;\n}"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};
struct wgmma_u8_n32 {
  static constexpr const char* name = "wgmma m64n32k32, u8 x s8";
  static constexpr int sums = 16;
  static constexpr bool async = true;
  using sum_type = int;
  __device__ static void multiply(int* d, const std::uint32_t* a, const std::uint32_t*, std::uint64_t b) {
    asm volatile(
        "{.reg .pred p;\nsetp.ne.b32 p,1,0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},{%16,%17,%18,%19},%20,p;\n}"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]),
          "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

/// Four steps of a strip, each of four masks (or none: the words as they are) and Products products.
template <class Kind, bool Masks, int Products>
__global__ void __launch_bounds__(most_warps * 32, 1) run(long long* cycles, std::uint32_t* sink) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ alignas(1024) std::uint32_t shared[2048];
  for (int i = static_cast<int>(threadIdx.x); i < 2048; i += static_cast<int>(blockDim.x)) shared[i] = 0;
  __syncthreads();
  std::uint32_t word[2 * strips], b[Products][2];
  for (int i = 0; i < 2 * strips; ++i) word[i] = shared[threadIdx.x + i];
  for (int p = 0; p < Products; ++p)
    for (int r = 0; r < 2; ++r) b[p][r] = shared[threadIdx.x + 9 * p + r];
  // Eight rows of 16 bytes lie together, without a swizzle.
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  const std::uint64_t descriptor = (address >> 4 & 0x3fff) | std::uint64_t{8} << 16 | std::uint64_t{16} << 32;
  constexpr int apart = Kind::sums > 8 ? 2 : strips;  // registers for more would be missing
  typename Kind::sum_type sum[apart][Products][Kind::sums] = {};
  __syncthreads();
  const long long begin = clock64();
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int s = 0; s < strips; ++s) {
      std::uint32_t a[steps][4];
#pragma unroll
      for (int t = 0; t < steps; ++t)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const std::uint32_t x = word[2 * s + r / 2];
          a[t][r] = x;
          if (Masks)
            a[t][r] = t == 0   ? masked<0x00030003>(x)
                      : t == 1 ? masked<0x000c000c>(x)
                      : t == 2 ? masked<0x00300030>(x)
                               : masked<0x00c000c0>(x);
        }
      if (Kind::async) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int t = 0; t < steps; ++t)
#pragma unroll
        for (int p = 0; p < Products; ++p) Kind::multiply(sum[s % apart][p], a[t], b[p], descriptor);
      if (Kind::async) asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
      for (int r = 0; r < 2; ++r) word[2 * s + r] = word[2 * s + r] * 5u + static_cast<std::uint32_t>(round);
    }
  }
  if (Kind::async) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  const long long end = clock64();
  std::uint32_t all = 0;
  for (const auto& of_strip : sum)
    for (const auto& of_product : of_strip)
      for (const auto x : of_product) all += static_cast<std::uint32_t>(x);
  sink[blockIdx.x * blockDim.x + threadIdx.x] = all + word[0];
  if (threadIdx.x == 0) cycles[blockIdx.x] = end - begin;
#endif
}

template <class Kind, bool Masks, int Products>
void measure(int sms, long long* cycles, std::uint32_t* sink) {
  std::printf("%-32s x %d, %s", Kind::name, Products, Masks ? "4 masks" : "no mask");
  for (const int warps : {4, 8, most_warps}) {
    for (int i = 0; i < 2; ++i)
      run<Kind, Masks, Products><<<static_cast<unsigned>(sms), static_cast<unsigned>(32 * warps)>>>(cycles, sink);
    require(cudaGetLastError());
    require(cudaDeviceSynchronize());
    double all = 0.0;
    for (int i = 0; i < sms; ++i) all += static_cast<double>(cycles[i]);
    std::printf("  %6.2f", all / sms / rounds / (strips * steps) / (warps / 4));
  }
  std::printf("\n");
}

}  // namespace

int main() {
  int major = 0, sms = 0;
  require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  if (major != 9) {
    std::fprintf(stderr, "products: these instructions are of sm_90a\n");
    return 1;
  }
  require(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  long long* cycles = nullptr;
  std::uint32_t* sink = nullptr;
  require(cudaMallocManaged(&cycles, static_cast<std::size_t>(sms) * sizeof(long long)));
  require(cudaMalloc(&sink, static_cast<std::size_t>(sms) * most_warps * 32 * 4));
  std::printf("cycles of a scheduler for four masks and their products, with 1, 2 and 4 warps on it\n");
  measure<f16_to_f32, false, 1>(sms, cycles, sink);
  measure<f16_to_f32, true, 1>(sms, cycles, sink);
  measure<f16_to_f32, true, 2>(sms, cycles, sink);
  measure<f16_to_f16, false, 1>(sms, cycles, sink);
  measure<f16_to_f16, true, 1>(sms, cycles, sink);
  measure<u8_s8, false, 1>(sms, cycles, sink);
  measure<u8_s8, true, 1>(sms, cycles, sink);
  measure<u8_s8, true, 2>(sms, cycles, sink);
  measure<u8_s8, true, 4>(sms, cycles, sink);
  measure<wgmma_f16_n8, true, 1>(sms, cycles, sink);
  measure<wgmma_f16_n16, true, 1>(sms, cycles, sink);
  measure<wgmma_u8_n8, true, 1>(sms, cycles, sink);
  measure<wgmma_u8_n32, true, 1>(sms, cycles, sink);
  require(cudaFree(cycles));
  require(cudaFree(sink));
}
