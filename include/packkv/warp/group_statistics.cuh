// SPDX-License-Identifier: Apache-2.0
// What groups store, found by warps, with the sums of docs/format-grouped.md, section 5: 32 partial sums by element
// index modulo 32, then a tree. One idea: a group along channels has a partial sum in each lane; a group along tokens
// belongs to one lane, which keeps all 32.
#pragma once

#include <packkv/codec/grouped_quantize.hpp>
#include <packkv/detail/cuda.cuh>

namespace packkv::warp {

/// Least and greatest element, and whether all are finite.
struct extremes {
  float lowest = detail::infinity(), highest = -detail::infinity();
  bool finite = true;

  __device__ void add(float x) {
    finite = finite && detail::is_finite(x);
    lowest = fminf(lowest, x);
    highest = fmaxf(highest, x);
  }
  /// Over all lanes, in all lanes.
  __device__ extremes joined() const {
    extremes all;
    all.lowest = -detail::warp_max(-lowest);
    all.highest = detail::warp_max(highest);
    all.finite = __all_sync(detail::all_lanes, finite) != 0;
    return all;
  }
};

/// What a min-max group with these extremes stores.
__device__ inline detail::group_numbers bounds_of(const extremes& range) {
  return range.finite ? detail::min_max_numbers(range.lowest, range.highest) : detail::group_numbers{};
}

/// Sum in double of term(element) over a group along channels. for_each(f) calls f(element) for the elements of this
/// lane, in ascending order of index.
template <class ForEach, class Term>
__device__ inline double sum_of_lanes(ForEach&& for_each, Term&& term) {
  double partial = 0.0;
  for_each([&](float x) { partial = term(partial, x); });
  return detail::warp_sum(partial);
}

/// The same over a group of this lane's own: for_each(f) calls f(element) for all of them. Every lane has a group.
template <class ForEach, class Term>
__device__ inline double sum_of_own(ForEach&& for_each, Term&& term) {
  double partial[32] = {};
  int i = 0;
  for_each([&](float x) {
    partial[i % 32] = term(partial[i % 32], x);
    ++i;
  });
  for (int stride = 16; stride > 0; stride /= 2)
    for (int k = 0; k < stride; ++k) partial[k] += partial[k + stride];
  return partial[0];
}

/// What a group of `count` elements stores. sum(term) is one of the sums above.
template <class Sum>
__device__ inline detail::group_numbers group_numbers_of(const grouped_spec& spec, const extremes& range, int count,
                                                         Sum&& sum) {
  using namespace packkv::detail;
  if (spec.step == step_rule::min_max) return bounds_of(range);
  if (spec.step == step_rule::gaussian) {
    const double squares = sum(add_square);
    return range.finite ? rms_numbers(squares, count) : group_numbers{};
  }
  const double total = sum([](double a, float x) { return a + static_cast<double>(x); });
  const float mean = static_cast<float>(div_rn(total, static_cast<double>(count)));
  const double squares = sum([&](double a, float x) { return add_square(a, sub_rn(x, mean)); });
  return range.finite ? mean_numbers(mean, squares, count, spec.width) : group_numbers{};
}

}  // namespace packkv::warp
