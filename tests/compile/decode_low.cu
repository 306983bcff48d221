// SPDX-License-Identifier: Apache-2.0
#include <packkv/device/decode_attention.cuh>

#include "gate.hpp"

void gates() {
  using gate::any;
  (void)pk::decode_attention<gate::low>(any, any, any, any, any, any, any, any);
}
