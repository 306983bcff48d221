// SPDX-License-Identifier: Apache-2.0
// What the gates compile: calls with arguments that do not exist, so that all kernels of a call are instantiated.
// Nothing here is ever linked or run.
#pragma once

#include <packkv/codec/grouped.hpp>

namespace pk = packkv;

namespace gate {

/// Any argument.
struct any_argument {
  template <class T>
  operator T&() const;
};
inline constexpr any_argument any;

template <int Dim, class KeyPlan, class ValuePlan, class KeyTransform = pk::hadamard>
using plans = pk::cache_format<pk::key_codec<Dim, KeyTransform, pk::rms_scale, KeyPlan>,
                               pk::value_codec<Dim, pk::hadamard, pk::rms_scale, ValuePlan>>;
using two_bit = plans<128, pk::plan<2, 2, 2, 2>, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>;
using four_bit = plans<128, pk::plan<4, 4, 4, 4>, pk::plan<4, 4, 4, 4, 4, 4, 4, 4>>;
using low = plans<128, pk::plan<4, 2, 1, 0>, pk::plan<2, 2, 2, 2, 1, 1, 1, 1>, pk::basis>;
using kivi = pk::cache_format<pk::grouped_key_codec<128, 2>, pk::grouped_value_codec<128, 2>>;
using two_bit_256 =
    plans<256, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>, pk::plan<2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2>>;

}  // namespace gate
