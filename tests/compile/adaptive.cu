// SPDX-License-Identifier: Apache-2.0
#include <packkv/device/adaptive.cuh>

#include "gate.hpp"

void gates() {
  using gate::any;
  (void)pk::encode_adaptive<128>(any, any, any, any, any, any, any);
  (void)pk::decode_adaptive<128>(any, any, any);
  (void)pk::adaptive_key_gemv<128>(any, any, any, any, any);
  (void)pk::adaptive_value_gemv<128>(any, any, any, any);
  (void)pk::adaptive_attention<128, 128>(any, any, any, any, any, any, any);
}
