// SPDX-License-Identifier: Apache-2.0
// Calls that code tokens of 4-bit plans, whose tiles are gathered in shared memory.
#include <packkv/device/compress.cuh>

#include "gate.hpp"

void gates() {
  using gate::any;
  (void)pk::compress<gate::four_bit>(any, any, any, any, any, any, any);
  (void)pk::store_tokens<gate::four_bit>(any, any, any, any, any, any);
  (void)pk::store_tiles<gate::four_bit>(any, any, any, any, any, any, any);
}
