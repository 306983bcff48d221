// SPDX-License-Identifier: Apache-2.0
#include <packkv/device/gemv.cuh>

#include "gate.hpp"

void gates() {
  using gate::any;
  (void)pk::key_gemv<gate::kivi>(any, any, any, any, any, any);
  (void)pk::value_gemv<gate::kivi>(any, any, any, any, any, any);
}
