// SPDX-License-Identifier: Apache-2.0
// Codes of packs, eight elements of one group at a time, without a division for each; equal to encode_code().
// One idea: a product with the reciprocal says how far an element is from where its code changes, and only an element
// that is closer than the product's error is divided.
//   const auto step = thread::make_code_step(codec, BFloat, range, flags);   bytes8 codes =
//   thread::codes_of<BFloat>(...);
#pragma once

#include <packkv/codec/pack_quantize.hpp>
#include <packkv/codec/pages.hpp>
#include <packkv/detail/packed_bytes.cuh>

namespace packkv::thread {

/// How the elements of a group become codes: byte 2 of (x - before) * inverse + offset as a float in [128, 256).
///
/// Why that is encode_code(). Let q = d / scale exactly, d = x - before as rounded there, v = q rounded to a float, and
/// z = zero (0 if floating). The code is floor(v + 1/2) - z unless v + 1/2 is an integer. The sum has offset = 128.5 -
/// z + 2^-14, exact in a float, and one rounding. The reciprocal is within 2^-23 of itself, v within 2^-24, so with |q|
/// <= |z| + 128 <= 191 the sum is within 191 * 1.5 * 2^-23 + 2^-17 < 3 * 2^-16 of v + offset. As a float from 128 to
/// 256 it has 16 bits of fraction, and byte 2 above them: so byte 2 is the code unless an integer (the code's
/// boundary, or v's tie) lies within 3 * 2^-16 of v + offset - 2^-14. Then the 16 bits, which 2^-14 moves up by 4, are
/// below 8, and the element is divided. At 256 and above two steps are one bit, so they are below 8, too; below 128
/// no sum falls, because v + 128.5 - z is at least 128.
struct code_step {
  float before, inverse;
  float offset;  ///< 0: every element is to be divided
};

inline constexpr float code_margin = 0x1p-14f;  ///< of a code, for the approximate arithmetic
inline constexpr std::uint32_t code_near = 8;   ///< 16 bits of fraction below it: too close to a boundary

/// make_code_step where a shortcut does not decide: by make_pack_step and encode_code.
template <bool BFloat>
__device__ inline code_step divided_code_step(const pack_codec& codec, pack_range& range, std::uint32_t& flags) {
  using namespace packkv::detail;
  const two_floats ends = unpack_16bit<BFloat>(range.low | std::uint32_t{range.high} << 16);
  const pack_step step = make_pack_step(codec, ends.low, ends.high);
  const bool finite = is_finite(ends.low) && is_finite(ends.high);
  if (!finite || !is_finite(step.scale)) {
    flags |= finite ? report_scale_overflow : report_nonfinite_input;
    range.low = range.high = 0x7fff;
    return {0.0f, 0.0f, 0.0f};
  }
  if (!(step.scale > 0.0f)) return {0.0f, 0.0f, 128.5f + code_margin};
  if (!(encode_code(codec, step, ends.high) <= static_cast<float>(max_pack_code))) flags |= report_code_overflow;
  return {0.0f, 0.0f, 0.0f};
}

/// The step of a group of elements from low to high, whose range becomes two NaNs if it cannot be coded. Adds what is
/// to be reported to `flags`.
template <bool BFloat>
__device__ inline code_step make_code_step(const pack_codec& codec, pack_range& range, std::uint32_t& flags) {
  using namespace packkv::detail;
  const two_floats ends = unpack_16bit<BFloat>(range.low | std::uint32_t{range.high} << 16);
  const bool floating = codec.zero == pack_zero::floating;
  const float before = floating ? ends.low : 0.0f, width = sub_rn(ends.high, ends.low);
  const float scale = mul_rn(width, codec.relative_step);
  float inverse = reciprocal_fast(scale);
  inverse = fma_rn(inverse, fma_rn(-scale, inverse, 1.0f), inverse);
  // The quotient of the smallest element, within 2^-15: far from a half its rounded value is the zero point.
  const float first = floating ? 0.0f : mul_rn(ends.low, inverse), zero = rintf(first);
  // Every float here is far from the ends of its range, no quotient is above 63 + 126, and no code above 126.
  const bool sure = scale >= 0x1p-100f && scale <= 0x1p100f && fabsf(first) < 63.0f &&
                    mul_rn(width, inverse) < 125.0f && fabsf(fabsf(first - zero) - 0.5f) > 0x1p-10f;
  if (!sure) return divided_code_step<BFloat>(codec, range, flags);
  return {before, inverse, 128.5f + code_margin - zero};
}

/// Codes of eight elements by division, as encode_code() defines them, within 0..255. Small rather than fast.
template <bool BFloat>
__device__ inline packkv::detail::bytes8 divided_codes(const pack_codec& codec, const pack_range& range,
                                                       packkv::detail::bytes16 elements) {
  using namespace packkv::detail;
  const two_floats ends = unpack_16bit<BFloat>(range.low | std::uint32_t{range.high} << 16);
  const pack_step step = make_pack_step(codec, ends.low, ends.high);
  bytes8 codes{};
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {  // the next element moves to the lowest place, its code to the highest
    const float code = encode_code(codec, step, unpack_16bit<BFloat>(elements.word[0]).low);
    const float within = code > 0.0f ? min_of(code, static_cast<float>(max_pack_code)) : 0.0f;
    codes.word[0] = codes.word[0] >> 8 | codes.word[1] << 24;
    codes.word[1] = codes.word[1] >> 8 | static_cast<std::uint32_t>(within) << 24;
#pragma unroll
    for (int k = 0; k < 4; ++k) elements.word[k] = elements.word[k] >> 16 | (k < 3 ? elements.word[k + 1] << 16 : 0u);
  }
  return codes;
}

/// Codes of eight elements of a group, in order, unless they are `close` a boundary and to be divided.
template <bool BFloat>
__device__ inline packkv::detail::bytes8 codes_of(const code_step& step, const packkv::detail::bytes16& elements,
                                                  bool& close) {
  using namespace packkv::detail;
  float x[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const two_floats pair = unpack_16bit<BFloat>(elements.word[i]);
    x[2 * i] = pair.low;
    x[2 * i + 1] = pair.high;
  }
  if (step.before != 0.0f)
#pragma unroll
    for (float& f : x) f = sub_rn(f, step.before);
  bytes8 codes;
  std::uint32_t fraction = ~0u;  // smallest of the even and of the odd elements
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    std::uint32_t sum[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] = bit_cast<std::uint32_t>(fma_rn(x[4 * i + k], step.inverse, step.offset));
    codes.word[i] = select_bytes(select_bytes(sum[0], sum[1], 0x0062), select_bytes(sum[2], sum[3], 0x0062), 0x5410);
    fraction = min_pairs(fraction, select_bytes(sum[0], sum[1], 0x5410), select_bytes(sum[2], sum[3], 0x5410));
  }
  close = min_of(fraction & 0xffffu, fraction >> 16) < code_near || step.offset == 0.0f;
  return codes;
}

}  // namespace packkv::thread
