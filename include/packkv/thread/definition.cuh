// SPDX-License-Identifier: Apache-2.0
// The definition's codes of a token (encode_element, row_scale_bits) without its square root and divisions: by
// multiply-adds whose result is the same, proven for the numbers that nearly all tokens have.
//   const thread::row_scale_number row(mean);   // 0: the definition itself has to be asked
//   const thread::repeated_division by(mul_rn(row.value, step));   code = thread::code_of(by.quotient(y), width);
#pragma once

#include <packkv/detail/approx.cuh>

namespace packkv::thread {

/// Divides by one number: the bits of div_rn where both numbers and the quotient lie far from the ends of float's
/// range. Newton's iteration as compilers do it, with the reciprocal kept.
class repeated_division {
 public:
  __device__ explicit repeated_division(float by) : minus_by_(-by) {
    const float first = packkv::detail::reciprocal_fast(by);
    reciprocal_ = packkv::detail::fma_rn(first, packkv::detail::fma_rn(minus_by_, first, 1.0f), first);
  }
  __device__ float quotient(float x) const {
    using packkv::detail::fma_rn;
    float q = packkv::detail::mul_rn(x, reciprocal_);
    q = fma_rn(reciprocal_, fma_rn(minus_by_, q, x), q);
    return fma_rn(reciprocal_, fma_rn(minus_by_, q, x), q);
  }

 private:
  float minus_by_, reciprocal_;
};

/// A row scale: the half nearest to a root mean square.
struct row_scale_number {
  float value = 0.0f;  ///< 0: left to row_scale_bits

  /// Of the mean of squares, whatever the order in which it was summed. 12 bits hold the border between two halves, and
  /// 24 its square, so that a difference says on which side the root lies; the definition's root is rounded to float
  /// first, which makes those within half a float of the border lie on it.
  __device__ explicit row_scale_number(double mean) {
    using namespace packkv::detail;
    const auto rough = static_cast<float>(mean);
    const float root = rough * reciprocal_sqrt_fast(rough);
    if (!(root >= 0x1p-13f && root < 65000.0f)) return;
    const std::uint32_t below = bit_cast<std::uint32_t>(root) & 0xffffe000u;
    const auto border = bit_cast<float>(below | 0x1000u);
    const auto above = static_cast<float>(mean - double{border} * double{border});
    const float on_it = border * bit_cast<float>((below & 0x7f800000u) - (23u << 23));
    if (fabsf(fabsf(above) - on_it) <= on_it * 0x1p-16f) return;
    const bool up = above > on_it || (above > -on_it && (below & 0x2000u) != 0);  // the even one from the border
    value = bit_cast<float>(below + (up ? 0x2000u : 0u));
  }
  __device__ std::uint16_t half_bits() const {
    return static_cast<std::uint16_t>((packkv::detail::bit_cast<std::uint32_t>(value) >> 13) - (112u << 10));
  }
};

/// Whether an element is so small that a division may lose it; of halves none is.
template <bool BFloat>
__device__ inline bool is_tiny(float x) {
  return BFloat && x != 0.0f && fabsf(x) < 0x1p-80f;
}
/// The code of a quotient of width `width`, as encode_element has it.
__device__ inline std::uint32_t code_of(float quotient, int width) {
  const auto half = static_cast<float>(1 << width >> 1);
  const float u = fminf(fmaxf(quotient, -half), half - 0.5f);
  return static_cast<std::uint32_t>(static_cast<int>(floorf(u)) + (1 << width >> 1));
}

}  // namespace packkv::thread
