// SPDX-License-Identifier: Apache-2.0
// The keys, values and queries of one layer, as read from three files whose shapes agree.
#pragma once

#include <cstdint>
#include <string>

#include <packkv/core/views.hpp>

#include "npy.hpp"

namespace evaluate {

/// k [kv_heads, tokens, key_dim], v [kv_heads, tokens, value_dim], q [query_heads, queries, key_dim]: the queries of
/// the last positions. Query heads h*group .. h*group + group - 1 read KV head h.
struct kv_cache {
  npy_array k, v, q;

  int kv_heads() const { return static_cast<int>(k.extent(0)); }
  int query_heads() const { return static_cast<int>(q.extent(0)); }
  int group() const { return query_heads() / kv_heads(); }
  std::int64_t tokens() const { return k.extent(1); }
  std::int64_t queries() const { return q.extent(1); }
  int key_dim() const { return static_cast<int>(k.extent(2)); }
  int value_dim() const { return static_cast<int>(v.extent(2)); }
};

/// Reads and checks the three files of a cache.
outcome load_cache(const std::string& k, const std::string& v, const std::string& q, kv_cache& cache);

/// Whether a calibration cache has the heads and head dims of the cache it calibrates.
outcome check_calibration(const kv_cache& cache, const kv_cache& calibration);

/// The whole array as a float16 view, in place.
inline packkv::input_view<3> view_of(const npy_array& a) {
  return packkv::make_input<3>(a.data(), packkv::dtype::float16, {a.extent(0), a.extent(1), a.extent(2)});
}

}  // namespace evaluate
