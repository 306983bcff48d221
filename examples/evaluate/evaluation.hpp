// SPDX-License-Identifier: Apache-2.0
// What a codec costs and how far it moves the attention output: one result per codec.
//   evaluator e(cache, rules, threads);   result r;   if (outcome o = e.run(codec, r); !o) return o;
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "coding.hpp"

namespace evaluate {

/// Errors are means over heads and queries of |o - o_ref| / |o_ref| (0 to 1 where o_ref is zero).
struct result {
  std::string codec;
  std::int64_t tokens = 0, coded_tokens = 0;
  double bits_per_value_k = 0.0, bits_per_value_v = 0.0;  ///< every byte of the coded tiles
  double total_bits_per_value = 0.0;                      ///< with sinks and the ring of recent tokens
  std::int64_t model_bytes = 0;                           ///< static columns, bases, leading scales of all heads
  double error_k = 0.0, error_v = 0.0, error_attention = 0.0, error_attention_max = 0.0;
  std::uint64_t leading_clamps = 0;
  std::vector<std::pair<std::string, double>> figures;  ///< further fields of a format
  std::string device = "cpu";
};

/// Fills the sizes of a result from shapes alone.
void count_bytes(const kv_cache& cache, const coding& codec, const attention_rules& rules, result& r);
/// The same for a cache that has been coded as a whole. Its own 16-bit tokens, and sinks and ring as far as they are
/// not among these, are in the total. Where nothing is coded, values have 16 bits.
void count_bytes(const kv_cache& cache, const coded_cache& coded, const attention_rules& rules, result& r);

/// Evaluates codecs on one cache. The reference is computed on the CPU in double, whatever the device.
class evaluator {
 public:
  /// `cache` must outlive the evaluator.
  evaluator(const kv_cache& cache, const attention_rules& rules, int threads)
      : cache_(cache), rules_(rules), threads_(threads) {}
  /// From now on attention on coded tiles runs on this GPU. What it does not support is an error if `required`, else
  /// the CPU's.
  void use_gpu(const std::string& name, bool required) {
    gpu_name_ = name;
    gpu_required_ = required;
  }

  outcome run(const coding& codec, result& r);

 private:
  void attend(const tile_source& source, const std::string& label, result& r) const;
  void run_cpu(const coding& codec, result& r) const;
  outcome run_whole(const coding& codec, result& r);
  outcome run_gpu(const coding& codec, result& r);
  packkv::status run_whole_on_gpu(const coding& codec, result& r);
  /// attention(kind, out) gives the GPU's outputs [query_heads, n, D_v] of a kind.
  template <class Attention>
  packkv::status compare_gpu(result& r, const Attention& attention);

  const kv_cache& cache_;
  attention_rules rules_;
  int threads_;
  std::string gpu_name_;  ///< empty: CPU
  bool gpu_required_ = false;
  std::vector<float> reference_;  ///< exact outputs [query_heads, n, D_v], kept for the GPU's codecs
};

}  // namespace evaluate
