// SPDX-License-Identifier: Apache-2.0
#include <packkv/device/gemv.cuh>

#include "gate.hpp"

void gates() {
  using gate::any;
  (void)pk::key_gemv<gate::low>(any, any, any, any, any, any);
  (void)pk::value_gemv<gate::low>(any, any, any, any, any, any);
}
