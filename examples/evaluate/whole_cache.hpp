// SPDX-License-Identifier: Apache-2.0
// Formats that code a whole cache at once, not tile by tile: they encode it to its bytes, decode it again, and report
// both. One idea: whatever a format does inside, attention and byte accounting need only this struct.
//   whole_cache_coder coder = ...;   coded_cache coded;   if (outcome o = coder(cache, coded); !o) return o;
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cache.hpp"
#include "gpu.hpp"

namespace evaluate {

/// A cache that has been encoded to bytes and decoded from them.
struct coded_cache {
  std::int64_t tokens = 0;       ///< tokens 0 .. tokens-1 are coded, the newer ones stay in 16 bits
  std::vector<float> k, v;       ///< decoded: [kv_heads, tokens, D_k] and [kv_heads, tokens, D_v], in order of tokens
  std::int64_t key_bytes = 0;    ///< everything stored for the coded keys
  std::int64_t value_bytes = 0;  ///< everything stored for the coded values
  std::int64_t order_bytes = 0;  ///< of a changed order of tokens; stored only where positions of tokens matter
  std::int64_t model_bytes = 0;  ///< static arrays, once per model
  std::vector<std::pair<std::string, double>> figures;  ///< further fields of the JSON result, finite
};

/// A format made ready for one cache.
struct whole_cache_codec {
  std::function<outcome(const kv_cache&, coded_cache&)> code;
  /// Encodes and attends on the GPU; `unsupported` where it cannot.
  std::function<packkv::status(const gpu_sequence_job&, std::vector<float>& out, packkv::device_report&)> attend_on_gpu;

  explicit operator bool() const { return static_cast<bool>(code); }
};

}  // namespace evaluate
