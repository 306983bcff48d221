// SPDX-License-Identifier: Apache-2.0
// Loops whose index is a compile-time constant in the body, for arrays that must stay in registers.
//   for_constants<4>([&](auto index) { constexpr int i = decltype(index)::value; ... });
#pragma once

#include <packkv/core/config.hpp>
#include <utility>

namespace packkv::detail {

template <class Body, int... Index>
PACKKV_HOST_DEVICE inline void for_each_constant(Body&& body, std::integer_sequence<int, Index...>) {
  (body(std::integral_constant<int, Index>{}), ...);
}
template <int Count, class Body>
PACKKV_HOST_DEVICE inline void for_constants(Body&& body) {
  for_each_constant(body, std::make_integer_sequence<int, Count>{});
}

}  // namespace packkv::detail
