// SPDX-License-Identifier: Apache-2.0
// Calls that code and reconstruct tokens of plans that are known at compile time.
// Architectures: 80 90a
#include <packkv/device/compress.cuh>

#include "gate.hpp"

void gates() {
  using gate::any;
  (void)pk::compress<gate::two_bit>(any, any, any, any, any, any, any);
  (void)pk::decompress<gate::two_bit>(any, any, any, any, any, any, any);
  (void)pk::store_tokens<gate::two_bit>(any, any, any, any, any, any);
  (void)pk::store_tiles<gate::two_bit>(any, any, any, any, any, any, any);
}
