// SPDX-License-Identifier: Apache-2.0
// Attention over a cache on the CPU, in double: exact, and on what a codec really stores.
// One idea: tiles stream through once per block of queries; every tile is encoded to its bytes and decoded again.
//   stream_attention(cache, &source, rules, threads, line, [&](const attention_block& b) { ... });
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
  std::vector<double> outputs;  ///< [output_kinds][rows][value_dim]; without a source only the first kind is filled

  const double* output(output_kind kind, int row) const {
    return outputs.data() + (static_cast<std::int64_t>(kind) * rows + row) * value_dim;
  }
};

/// Where the coded elements of a tile come from. Calls from several threads are fine.
class tile_source {
 public:
  virtual ~tile_source() = default;
  /// x [count][D]: the exact elements of tokens first .. first + count - 1 (first is a multiple of 64), replaced by what
  /// attention on the coded cache sees. `scratch` is the calling thread's, of any size.
  virtual void code(packkv::side which, int head, std::int64_t first, int count, std::vector<std::uint32_t>& scratch,
                    float* x) const = 0;
};

/// Encodes every tile to its bytes and decodes it again, each time it is asked for.
class tile_codec final : public tile_source {
 public:
  explicit tile_codec(const coding& codec) : codec_(codec) {}
  void code(packkv::side which, int head, std::int64_t first, int count, std::vector<std::uint32_t>& scratch,
            float* x) const override;

 private:
  const coding& codec_;
};

/// A cache that has been coded as a whole; tokens that it left in 16 bits are exact.
class decoded_tiles final : public tile_source {
 public:
  decoded_tiles(const kv_cache& cache, const coded_cache& coded) : cache_(cache), coded_(coded) {}
  void code(packkv::side which, int head, std::int64_t first, int count, std::vector<std::uint32_t>& scratch,
            float* x) const override;

 private:
  const kv_cache& cache_;
  const coded_cache& coded_;
};

using block_sink = std::function<void(const attention_block&)>;

/// Calls `sink` for every query once, in order of KV heads and rows, from the calling thread. `coded` may be null.
/// The outputs do not depend on `threads`.
void stream_attention(const kv_cache& cache, const tile_source* coded, const attention_rules& rules, int threads,
                      progress& line, const block_sink& sink);

/// What encoding every token of the cache once reports: leading components that were clamped, values out of range.
struct coding_report {
  std::uint64_t leading_clamps = 0;
  std::uint32_t flags = 0;  ///< packkv::report_flag
};
coding_report encode_all(const kv_cache& cache, const coding& codec, int threads);

}  // namespace evaluate
