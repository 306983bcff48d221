// SPDX-License-Identifier: Apache-2.0
// Architectures: 80 90a 100a 120
#include <packkv/device/decode_attention.cuh>

#include "gate.hpp"

void gates() {
  using gate::any;
  (void)pk::decode_attention<gate::two_bit>(any, any, any, any, any, any, any, any);
}
