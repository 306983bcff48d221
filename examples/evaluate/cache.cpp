// SPDX-License-Identifier: Apache-2.0
// Shape checks of a cache.
#include "cache.hpp"

#include <packkv/codec/strips.hpp>

namespace evaluate {
namespace {

constexpr std::int64_t max_heads = 65536;
constexpr std::int64_t max_tokens = 2147483647 - 2 * packkv::tile_tokens;

std::string shape(const npy_array& a) {
  return "[" + std::to_string(a.extent(0)) + ", " + std::to_string(a.extent(1)) + ", " + std::to_string(a.extent(2)) +
         "]";
}

bool is_head_dim(std::int64_t d) { return d <= packkv::max_head_dim && packkv::is_head_dim(static_cast<int>(d)); }

outcome check_shapes(const kv_cache& c) {
  const auto wrong = [&](const std::string& what) {
    return failure(what + ": k " + shape(c.k) + ", v " + shape(c.v) + ", q " + shape(c.q));
  };
  if (c.k.extent(0) != c.v.extent(0)) return wrong("k and v differ in heads");
  if (c.k.extent(1) != c.v.extent(1)) return wrong("k and v differ in tokens");
  if (c.k.extent(2) != c.q.extent(2)) return wrong("k and q differ in head dim");
  if (!is_head_dim(c.k.extent(2)) || !is_head_dim(c.v.extent(2)))
    return wrong("head dims must be 64, 96, 128, 192, 256 or 512");
  if (c.q.extent(0) % c.k.extent(0) != 0) return wrong("query heads must be a multiple of KV heads");
  if (c.q.extent(1) > c.k.extent(1)) return wrong("there are more queries than tokens");
  if (c.q.extent(0) > max_heads) return wrong("more than 65536 heads");
  if (c.k.extent(1) > max_tokens) return wrong("more than 2^31 - 129 tokens");
  return {};
}

}  // namespace

outcome load_cache(const std::string& k, const std::string& v, const std::string& q, kv_cache& cache) {
  if (outcome o = npy_array::open(k, cache.k); !o) return o;
  if (outcome o = npy_array::open(v, cache.v); !o) return o;
  if (outcome o = npy_array::open(q, cache.q); !o) return o;
  return check_shapes(cache);
}

outcome check_calibration(const kv_cache& cache, const kv_cache& calibration) {
  if (calibration.kv_heads() != cache.kv_heads() || calibration.query_heads() != cache.query_heads() ||
      calibration.key_dim() != cache.key_dim() || calibration.value_dim() != cache.value_dim())
    return failure("the calibration arrays differ in heads or head dims: k " + shape(calibration.k) + ", v " +
                   shape(calibration.v) + ", q " + shape(calibration.q));
  return {};
}

}  // namespace evaluate
