// SPDX-License-Identifier: Apache-2.0
// Calls whose kernels take any format at run time. And all that a user may include, without a warning.
// Architectures: 80 90a 100a 120
#include <packkv/packkv.cuh>

#include "gate.hpp"

void gates() {
  using gate::any;
  using format = pk::runtime_format<128, 128>;
  (void)pk::compress<format>(any, any, any, any, any, any, any);
  (void)pk::decompress<format>(any, any, any, any, any, any, any);
  (void)pk::store_tokens<format>(any, any, any, any, any, any);
  (void)pk::store_tiles<format>(any, any, any, any, any, any, any);
  (void)pk::decode_attention<format>(any, any, any, any, any, any, any, any);
  (void)pk::key_gemv<format>(any, any, any, any, any, any);
  (void)pk::value_gemv<format>(any, any, any, any, any, any);
  (void)pk::merge_states(any, any, any, any, any, any);
}
