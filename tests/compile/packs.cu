// SPDX-License-Identifier: Apache-2.0
#include <packkv/device/pack_attention.cuh>
#include <packkv/device/packs.cuh>

#include "gate.hpp"

void gates() {
  using gate::any;
  (void)pk::compress(any, any, any, any, any, any, any, any);
  (void)pk::decompress<128, 128>(any, any, any, any, any);
  (void)pk::key_gemv<128>(any, any, any, any, any, any);
  (void)pk::value_gemv<128>(any, any, any, any, any);
  (void)pk::attention<128, 128>(any, any, any, any, any, any, any, any, any);
}
