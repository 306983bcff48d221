// SPDX-License-Identifier: Apache-2.0
// Attention over a cache on the CPU, in double: exact, and on what a codec really stores.
// One idea: tiles stream through once per block of queries; every tile is encoded to its bytes and decoded again.
//   stream_attention(cache, &codec, rules, threads, line, [&](const attention_block& b) { ... });
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cache.hpp"
#include "coding.hpp"
#include "progress.hpp"

namespace evaluate {

/// What queries see, and which tokens stay in 16 bits.
struct attention_rules {
  float scale = 0.0f;
  std::int32_t window = 0;  ///< 0: no window; else a query sees the last `window` positions up to its own
  std::int32_t sinks = 0;   ///< the first tokens
  std::int32_t recent = 0;  ///< the last keys up to a query's own position
};

/// The four outputs of a query: nothing coded, only K, only V, both.
enum output_kind { exact_output = 0, key_output = 1, value_output = 2, both_output = 3, output_kinds = 4 };

/// Outputs of some queries of one KV head. Row r is query position (first_row + r) / group of query head
/// kv_head * group + (first_row + r) % group.
struct attention_block {
  int kv_head = 0;
  std::int64_t first_row = 0;
  int rows = 0;
  int value_dim = 0;
  std::vector<double> outputs;  ///< [output_kinds][rows][value_dim]; without a codec only the first kind is filled

  const double* output(output_kind kind, int row) const {
    return outputs.data() + (static_cast<std::int64_t>(kind) * rows + row) * value_dim;
  }
};

using block_sink = std::function<void(const attention_block&)>;

/// Calls `sink` for every query once, in order of KV heads and rows, from the calling thread. `codec` may be null.
/// The outputs do not depend on `threads`.
void stream_attention(const kv_cache& cache, const coding* codec, const attention_rules& rules, int threads,
                      progress& line, const block_sink& sink);

/// What encoding every token of the cache once reports: leading components that were clamped, values out of range.
struct coding_report {
  std::uint64_t leading_clamps = 0;
  std::uint32_t flags = 0;  ///< packkv::report_flag
};
coding_report encode_all(const kv_cache& cache, const coding& codec, int threads);

}  // namespace evaluate
