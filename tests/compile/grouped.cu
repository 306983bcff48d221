// SPDX-License-Identifier: Apache-2.0
#include <packkv/device/grouped.cuh>

#include "gate.hpp"

void gates() {
  using gate::any;
  (void)pk::encode_grouped<128>(any, any, any, any, any, any);
  (void)pk::decode_grouped<128>(any, any, any);
  (void)pk::grouped_key_gemv<128>(any, any, any, any, any);
  (void)pk::grouped_value_gemv<128>(any, any, any, any);
  (void)pk::grouped_attention<128, 128>(any, any, any, any, any, any, any);
}
