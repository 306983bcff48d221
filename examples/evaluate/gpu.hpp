// SPDX-License-Identifier: Apache-2.0
// Attention on the GPU, behind functions that need no CUDA header. gpu.cu and gpu_sequences.cu, or gpu_none.cpp, define
// them.
#pragma once

#include <cstdint>
#include <packkv/codec/pack_format.hpp>
#include <packkv/codec/pages.hpp>
#include <packkv/codec/parameters.hpp>
#include <packkv/codec/strip_adaptive.hpp>
#include <string>
#include <vector>

namespace evaluate {

/// One side of the cache format: a codec (perhaps float16) and its arrays in host memory, [kv_heads, ...].
struct gpu_side {
  packkv::codec_spec spec;
  packkv::side_parameters parameters;
};

/// One attention over one cache. All views are contiguous float16 in host memory (mapped files).
struct gpu_job {
  packkv::input_view<3> keys;     ///< [kv_heads, tokens, D_k]
  packkv::input_view<3> values;   ///< [kv_heads, tokens, D_v]
  packkv::input_view<3> queries;  ///< [query_heads, n, D_k], the queries of the last n positions
  gpu_side key, value;
  float scale = 0.0f;
  std::int32_t window = 0;  ///< 0: none
  std::int32_t sinks = 0;   ///< first tokens in 16 bits, at most `tokens`
  std::int32_t recent = 0;  ///< last keys of each query in 16 bits, at most `tokens`; ring capacity recent + n - 1
};

/// One attention over a cache that is coded as a whole. Views as above.
struct gpu_sequence_job {
  packkv::input_view<3> keys, values, queries;
  float scale = 0.0f;
  std::int32_t window = 0, sinks = 0, recent = 0;  ///< as above
  bool code_keys = true, code_values = true;       ///< a side that is not coded is read in 16 bits
};

/// True if there is a GPU that this program can use; the string is its name, or why there is none.
bool gpu_present(std::string& name_or_reason);

/// Compresses the cache and attends to it. out: [query_heads, n, D_v], resized by the call.
packkv::status gpu_attention(const gpu_job& job, std::vector<float>& out, packkv::device_report& report);

/// The same for formats of whole caches. Of the grouped and strip-adaptive formats at least the newest `tail` tokens
/// stay 16-bit; PackKV's first blocks are coded. `unsupported` where the GPU has no such call: the CPU has.
packkv::status gpu_attention(const gpu_sequence_job& job, const packkv::grouped_spec& key,
                             const packkv::grouped_spec& value, std::int64_t tail, std::vector<float>& out,
                             packkv::device_report& report);
packkv::status gpu_attention(const gpu_sequence_job& job, const packkv::adaptive_spec& key,
                             const packkv::adaptive_spec& value, std::int64_t tail, std::vector<float>& out,
                             packkv::device_report& report);
packkv::status gpu_attention(const gpu_sequence_job& job, const packkv::pack_format& format, std::vector<float>& out,
                             packkv::device_report& report);

}  // namespace evaluate
