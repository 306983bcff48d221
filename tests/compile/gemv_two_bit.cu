// SPDX-License-Identifier: Apache-2.0
// Architectures: 80 90a 120
#include <packkv/device/gemv.cuh>

#include "gate.hpp"

void gates() {
  using gate::any;
  (void)pk::key_gemv<gate::two_bit>(any, any, any, any, any, any);
  (void)pk::value_gemv<gate::two_bit>(any, any, any, any, any, any);
}
