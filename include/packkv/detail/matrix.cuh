// SPDX-License-Identifier: Apache-2.0
// Matrix instructions of a warp. Each struct is one of them: what a lane hands in and gets back, the PTX, and the
// definition on all 32 lanes, which is what the CPU executor runs and what tests/device/instruction_test.cu compares.
//   float d[4] = {};   mma_f16(d, a, b);   x = movmatrix(x);   ldmatrix_x4(r, row);   // by all 32 lanes
#pragma once

#include <packkv/core/float_formats.hpp>
#include <packkv/detail/cuda.cuh>
#include <packkv/detail/fragments.hpp>

namespace packkv::detail {

namespace instruction {

inline constexpr int lanes = 32;

/// Part of a register: 16 bits or 8.
inline std::uint32_t half_of(std::uint32_t x, int part) { return x >> (16 * part) & 0xffffu; }
inline std::uint32_t byte_of(std::uint32_t x, int part) { return x >> (8 * part) & 0xffu; }

/// D = A x B + D, 16 x 8 x 16, float16 or bfloat16 operands, float32 sums. The definition adds the 16 exact products
/// and D in double and rounds once; the hardware aligns the terms to the largest and truncates, so results are equal
/// where every partial sum is a float, and otherwise differ by at most `bound` of the largest term (largest of 524,288
/// results on an H100, 2026-11-25: 2^-21.2).
template <bool BFloat>
struct mma_16bit {
  static constexpr const char* name = BFloat ? "mma.m16n8k16.bf16" : "mma.m16n8k16.f16";
  static constexpr float bound = 0x1p-20f;
  struct lane {
    float d[4];
    std::uint32_t a[4], b[2];
  };
  static void define(lane* const* all) {
    double a[16][16], b[16][8];
    const auto value = [](std::uint32_t bits) {
      const auto x = static_cast<std::uint16_t>(bits);
      return static_cast<double>(BFloat ? bfloat16_to_float(x) : half_to_float(x));
    };
    for (int l = 0; l < lanes; ++l)
      for (int part = 0; part < 2; ++part) {
        for (int r = 0; r < 4; ++r) {
          const position p = fragment::a<2>(l, r, part);
          a[p.row][p.column] = value(half_of(all[l]->a[r], part));
        }
        for (int r = 0; r < 2; ++r) {
          const position p = fragment::b<2>(l, r, part);
          b[p.row][p.column] = value(half_of(all[l]->b[r], part));
        }
      }
    for (int l = 0; l < lanes; ++l)
      for (int r = 0; r < 4; ++r) {
        const position p = fragment::c(l, r);
        double sum = 0.0;
        for (int k = 0; k < 16; ++k) sum += a[p.row][k] * b[k][p.column];
        all[l]->d[r] = static_cast<float>(sum + static_cast<double>(all[l]->d[r]));
      }
  }
#if !defined(PACKKV_SIMT_EXECUTOR)
  __device__ static void run(lane& x) {
    if constexpr (BFloat)
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
          : "+f"(x.d[0]), "+f"(x.d[1]), "+f"(x.d[2]), "+f"(x.d[3])
          : "r"(x.a[0]), "r"(x.a[1]), "r"(x.a[2]), "r"(x.a[3]), "r"(x.b[0]), "r"(x.b[1]));
    else
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
          : "+f"(x.d[0]), "+f"(x.d[1]), "+f"(x.d[2]), "+f"(x.d[3])
          : "r"(x.a[0]), "r"(x.a[1]), "r"(x.a[2]), "r"(x.a[3]), "r"(x.b[0]), "r"(x.b[1]));
  }
#endif
};

/// D = A x B + D, 16 x 8 x Depth (32, or 16 for strips of 16 channels), A unsigned and B signed bytes, int32 sums that
/// wrap.
template <int Depth>
struct mma_u8s8_of {
  static_assert(Depth == 16 || Depth == 32, "PTX has u8 x s8 products of depth 16 and 32");
  static constexpr const char* name = Depth == 32 ? "mma.m16n8k32.u8.s8" : "mma.m16n8k16.u8.s8";
  static constexpr int a_registers = Depth / 8, b_registers = Depth / 16;
  struct lane {
    std::int32_t d[4];
    std::uint32_t a[a_registers], b[b_registers];
  };
  static void define(lane* const* all) {
    std::int32_t a[16][Depth], b[Depth][8];
    for (int l = 0; l < lanes; ++l)
      for (int part = 0; part < 4; ++part) {
        for (int r = 0; r < a_registers; ++r) {
          const position p = fragment::a<1>(l, r, part);
          a[p.row][p.column] = static_cast<std::int32_t>(byte_of(all[l]->a[r], part));
        }
        for (int r = 0; r < b_registers; ++r) {
          const position p = fragment::b<1>(l, r, part);
          b[p.row][p.column] = static_cast<std::int8_t>(byte_of(all[l]->b[r], part));
        }
      }
    for (int l = 0; l < lanes; ++l)
      for (int r = 0; r < 4; ++r) {
        const position p = fragment::c(l, r);
        auto sum = static_cast<std::uint32_t>(all[l]->d[r]);
        for (int k = 0; k < Depth; ++k) sum += static_cast<std::uint32_t>(a[p.row][k] * b[k][p.column]);
        all[l]->d[r] = static_cast<std::int32_t>(sum);
      }
  }
#if !defined(PACKKV_SIMT_EXECUTOR)
  __device__ static void run(lane& x) {
    if constexpr (Depth == 32)
      asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                   : "+r"(x.d[0]), "+r"(x.d[1]), "+r"(x.d[2]), "+r"(x.d[3])
                   : "r"(x.a[0]), "r"(x.a[1]), "r"(x.a[2]), "r"(x.a[3]), "r"(x.b[0]), "r"(x.b[1]));
    else
      asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
                   : "+r"(x.d[0]), "+r"(x.d[1]), "+r"(x.d[2]), "+r"(x.d[3])
                   : "r"(x.a[0]), "r"(x.a[1]), "r"(x.b[0]));
  }
#endif
};

/// Transposes an 8 x 8 matrix of 2-byte elements, one register a lane.
struct movmatrix {
  static constexpr const char* name = "movmatrix";
  struct lane {
    std::uint32_t x;
  };
  static void define(lane* const* all) {
    std::uint32_t m[8][8];
    for (int l = 0; l < lanes; ++l)
      for (int part = 0; part < 2; ++part) {
        const position p = fragment::m8(l, part);
        m[p.row][p.column] = half_of(all[l]->x, part);
      }
    for (int l = 0; l < lanes; ++l) {
      const position low = fragment::m8(l, 0), high = fragment::m8(l, 1);
      all[l]->x = m[low.column][low.row] | m[high.column][high.row] << 16;
    }
  }
#if !defined(PACKKV_SIMT_EXECUTOR)
  __device__ static void run(lane& x) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%0;" : "+r"(x.x));
  }
#endif
};

/// Loads Count (1, 2, 4) 8 x 8 matrices of 2-byte elements from shared memory: lane 8 * i + j has the address of row j
/// of matrix i, 16 bytes, 16-byte aligned. Lanes beyond that hand in an address that is not read. Matrix i arrives in
/// register i.
template <int Count, bool Transposed>
struct ldmatrix {
  static_assert(Count == 1 || Count == 2 || Count == 4, "ldmatrix loads 1, 2 or 4 matrices");
  static constexpr const char* name = "ldmatrix";
  struct lane {
    const void* row;
    std::uint32_t r[Count];
  };
  static void define(lane* const* all) {
    for (int i = 0; i < Count; ++i) {
      std::uint16_t m[8][8];
      for (int j = 0; j < 8; ++j) memcpy(m[j], all[8 * i + j]->row, 16);
      for (int l = 0; l < lanes; ++l) {
        const position low = fragment::m8(l, 0), high = fragment::m8(l, 1);
        all[l]->r[i] = Transposed ? m[low.column][low.row] | std::uint32_t{m[high.column][high.row]} << 16
                                  : m[low.row][low.column] | std::uint32_t{m[high.row][high.column]} << 16;
      }
    }
  }
#if !defined(PACKKV_SIMT_EXECUTOR)
  __device__ static void run(lane& x) {
    const auto row = static_cast<unsigned>(__cvta_generic_to_shared(x.row));
    if constexpr (Count == 1 && !Transposed)
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0},[%1];" : "=r"(x.r[0]) : "r"(row) : "memory");
    if constexpr (Count == 1 && Transposed)
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0},[%1];" : "=r"(x.r[0]) : "r"(row) : "memory");
    if constexpr (Count == 2 && !Transposed)
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];"
                   : "=r"(x.r[0]), "=r"(x.r[1])
                   : "r"(row)
                   : "memory");
    if constexpr (Count == 2 && Transposed)
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1},[%2];"
                   : "=r"(x.r[0]), "=r"(x.r[1])
                   : "r"(row)
                   : "memory");
    if constexpr (Count == 4 && !Transposed)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                   : "=r"(x.r[0]), "=r"(x.r[1]), "=r"(x.r[2]), "=r"(x.r[3])
                   : "r"(row)
                   : "memory");
    if constexpr (Count == 4 && Transposed)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                   : "=r"(x.r[0]), "=r"(x.r[1]), "=r"(x.r[2]), "=r"(x.r[3])
                   : "r"(row)
                   : "memory");
  }
#endif
};

/// All 32 lanes take part.
template <class Instruction>
__device__ inline void issue(typename Instruction::lane& x, [[maybe_unused]] call_site where) {
#if defined(PACKKV_SIMT_EXECUTOR)
  packkv_simt::detail::meet_all(
      &x, [](void* const* all) { Instruction::define(reinterpret_cast<typename Instruction::lane* const*>(all)); },
      Instruction::name, where);
#else
  Instruction::run(x);
#endif
}

template <class Instruction, class T, class D, std::size_t A, std::size_t B>
__device__ inline void multiply(D (&d)[4], const T (&a)[A], const T (&b)[B], call_site where) {
  typename Instruction::lane x;
  for (int i = 0; i < 4; ++i) x.d[i] = d[i];
  for (std::size_t i = 0; i < A; ++i) x.a[i] = a[i];
  for (std::size_t i = 0; i < B; ++i) x.b[i] = b[i];
  issue<Instruction>(x, where);
  for (int i = 0; i < 4; ++i) d[i] = x.d[i];
}

template <int Count, bool Transposed>
__device__ inline void load(std::uint32_t (&r)[Count], const void* row, call_site where) {
#if defined(PACKKV_SIMT_EXECUTOR)
  if (lane_id() < 8 * Count) packkv_simt::detail::read_shared(row, 16, 16, "ldmatrix", where);
#endif
  typename ldmatrix<Count, Transposed>::lane x{row, {}};
  issue<ldmatrix<Count, Transposed>>(x, where);
  for (int i = 0; i < Count; ++i) r[i] = x.r[i];
}

}  // namespace instruction

// d += A x B on the fragments of fragments.hpp; all 32 lanes take part.
__device__ inline void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                               call_site where = call_site::here()) {
  instruction::multiply<instruction::mma_16bit<false>>(d, a, b, where);
}
__device__ inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                call_site where = call_site::here()) {
  instruction::multiply<instruction::mma_16bit<true>>(d, a, b, where);
}
__device__ inline void mma_u8s8(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                call_site where = call_site::here()) {
  instruction::multiply<instruction::mma_u8s8_of<32>>(d, a, b, where);
}
__device__ inline void mma_u8s8(std::int32_t (&d)[4], const std::uint32_t (&a)[2], const std::uint32_t (&b)[1],
                                call_site where = call_site::here()) {
  instruction::multiply<instruction::mma_u8s8_of<16>>(d, a, b, where);
}

/// The transpose of an 8 x 8 matrix of 2-byte elements.
__device__ inline std::uint32_t movmatrix(std::uint32_t x, call_site where = call_site::here()) {
  instruction::movmatrix::lane all{x};
  instruction::issue<instruction::movmatrix>(all, where);
  return all.x;
}

/// Count matrices from shared memory, as they lie or transposed; see instruction::ldmatrix.
template <int Count>
__device__ inline void ldmatrix(std::uint32_t (&r)[Count], const void* row, call_site where = call_site::here()) {
  instruction::load<Count, false>(r, row, where);
}
template <int Count>
__device__ inline void ldmatrix_transposed(std::uint32_t (&r)[Count], const void* row,
                                           call_site where = call_site::here()) {
  instruction::load<Count, true>(r, row, where);
}

}  // namespace packkv::detail
