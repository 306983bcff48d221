// SPDX-License-Identifier: Apache-2.0
// The median of the codes of a token without making them: granularity token, codes up to 31, by a warp.
// One idea: codes grow with elements, so a code is below m where its element is below the first element of code m;
// comparing 16-bit floats takes one instruction for two.
//   const warp::code_boundaries<BFloat> boundaries(codec, range, step);
//   if (boundaries.known()) median = boundaries.median(x, channels);
#pragma once

#include <packkv/warp/pack_row.cuh>

namespace packkv::warp {

/// The smallest element of each code of a group: lane m has that of code m. Calls are of the whole warp.
template <bool BFloat>
class code_boundaries {
 public:
  static constexpr int most_code = packkv::detail::warp_threads - 1;

  /// Of the range whose step this is.
  __device__ code_boundaries(const pack_codec& codec, const pack_range& range, const thread::code_step& step) {
    using namespace packkv::detail;
    const two_floats ends = unpack_16bit<BFloat>(range.low | std::uint32_t{range.high} << 16);
    const float width = sub_rn(ends.high, ends.low), most = mul_rn(width, step.inverse) + 1.5f;
    if (step.inverse == 0.0f || !(most < static_cast<float>(most_code + 1))) return;
    const float scale = mul_rn(width, codec.relative_step);
    // What encode_code() gives: a floating zero point leaves 0 of the integer one, which leaves `before` 0.
    const float zero = 128.5f + thread::code_margin - step.offset, own = static_cast<float>(lane_id());
    const auto reaches = [&](float x) { return rintf(div_rn(sub_rn(x, step.before), scale)) - zero >= own; };
    // The element nearest to where the code should change, and the one beside it where it does not change there.
    const float change = fma_rn(own - 0.5f + zero, scale, step.before);
    const std::uint32_t nearest = packkv::detail::pack_16bit<BFloat>(change, 0.0f) & 0xffffu;
    const float first = unpack_16bit<BFloat>(nearest).low;
    const bool above = reaches(first);
    const std::uint32_t beside = from_ordered(ordered(nearest) + (above ? -1 : 1));
    const float second = unpack_16bit<BFloat>(beside).low;
    const bool changes = reaches(second) != above;
    const std::uint32_t lanes = (2u << static_cast<int>(most)) - 2u;  // codes that there may be, but for 0
    known_ = (__ballot_sync(all_lanes, changes) & lanes) == lanes;
    const std::uint32_t reached = __ballot_sync(all_lanes, (above ? first : second) <= ends.high) & lanes;
    bits_ = bit_length(static_cast<std::uint32_t>(31 - __clz(static_cast<int>(reached | 1u))));
    const std::uint32_t boundary = above ? nearest : beside;
    twice_ = select_bytes(boundary, boundary, 0x1010);
  }

  /// False if there may be too many codes, or a boundary was not found; the same in all lanes.
  __device__ bool known() const { return known_; }

  /// The lower median of the codes of `total` elements; what lanes have beside them is NaN.
  __device__ int median(const typename pack_chunk<BFloat>::elements& x, unsigned total) const {
    using namespace packkv::detail;
    // The greatest m that at most (total - 1) / 2 codes are smaller than, bit by bit.
    const int most = static_cast<int>((total - 1) / 2);
    unsigned median = 0;
    for (unsigned bit = 1u << bits_ >> 1; bit > 0; bit /= 2) {
      const std::uint32_t m = shuffle(twice_, static_cast<int>(median | bit));
      std::uint32_t sum = 0;
#pragma unroll
      for (int k = 0; k < pack_row_shape::loads; ++k)
#pragma unroll
        for (const std::uint32_t word : x[k].word) sum += masks_of_less<BFloat>(word, m);
      if (masks_in(warp_sum_unsigned(sum)) <= most) median |= bit;
    }
    return static_cast<int>(median);
  }

 private:
  /// Bits of an element as an integer that orders as the numbers do, both zeros as 0, and back.
  __device__ static int ordered(std::uint32_t bits) {
    const int magnitude = static_cast<int>(bits & 0x7fffu);
    return (bits & 0x8000u) != 0 ? -magnitude : magnitude;
  }
  __device__ static std::uint32_t from_ordered(int x) {
    return x < 0 ? 0x8000u | static_cast<std::uint32_t>(-x) : static_cast<std::uint32_t>(x);
  }

  bool known_ = false;
  int bits_ = 0;             ///< of the greatest code
  std::uint32_t twice_ = 0;  ///< the lane's boundary, in both halves
};

}  // namespace packkv::warp
