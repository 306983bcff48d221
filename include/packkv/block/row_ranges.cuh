// SPDX-License-Identifier: Apache-2.0
// Which coded tokens the query rows of a block see: a range for each row, and what that means for whole tiles.
// One idea: masks, windows, padding, sinks and ring all cut ranges, so a tile in the middle needs no test per token.
#pragma once

#include <packkv/codec/pages.hpp>
#include <packkv/detail/cuda.cuh>

namespace packkv::block {

/// Half-open range of tokens of one sequence. In shared memory, too: no initialisers.
struct token_range {
  std::int32_t begin, end;
};

/// Out of line, since hardly any call comes here: 64-bit divisions are long.
PACKKV_HOST_DEVICE __noinline__ inline std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

/// First local token whose position is at least p.
PACKKV_HOST_DEVICE inline std::int32_t token_at(const detail::visibility& view, std::int64_t p) {
  std::int64_t d = p - view.position_offset;
  if (view.position_stride != 1) d = divide_up(d, view.position_stride);
  return static_cast<std::int32_t>(min_of<std::int64_t>(max_of<std::int64_t>(d, 0), view.length));
}

/// Those of some tokens that padding, window and causal mask leave a query at position p; end may lie before begin.
/// What a call does not use costs it no arithmetic.
PACKKV_HOST_DEVICE inline token_range visible_range(const detail::visibility& view, std::int64_t p, token_range of) {
  if (view.kv_begin > 0) of.begin = max_of(of.begin, token_at(view, view.kv_begin));
  if (view.window > 0) of.begin = max_of(of.begin, token_at(view, p - view.window + 1));
  if (view.causal) of.end = min_of(of.end, token_at(view, p + 1));
  return of;
}

/// Coded tokens that a query at position p sees; those in the sinks and in the ring are not among them.
PACKKV_HOST_DEVICE inline token_range coded_range(const detail::visibility& view, std::int64_t p) {
  token_range x = visible_range(view, p, {view.sinks, view.length});
  if (view.ring_begin < view.length)
    x.end = min_of(x.end, max_of(view.ring_begin, token_at(view, p - view.ring_window + 1)));
  return {x.begin, max_of(x.begin, x.end)};
}

/// Whether every query sees all tokens of its sequence: at most one a sequence, at its end, without padding, window or
/// positions that are not token numbers.
PACKKV_HOST_DEVICE inline bool queries_see_all(const cache_view& cache, const attention_options& options) {
  return options.max_query_len == 1 && options.context_lens == nullptr && options.window <= 0 &&
         options.position_stride == 1 && options.position_offset == 0 && cache.kv_begin == nullptr;
}
/// The same as coded_range for such a query, in a tenth of the instructions.
PACKKV_HOST_DEVICE inline token_range all_coded(const detail::visibility& view) {
  std::int32_t end = view.length;
  if (view.ring_begin < end)
    end = max_of(view.ring_begin, end - static_cast<std::int32_t>(min_of<std::int64_t>(view.ring_window, end)));
  return {view.sinks, max_of(view.sinks, end)};
}

/// What the rows see together.
struct row_ranges {
  token_range any;  ///< from the first token that a row sees to the last; empty if there is none
  token_range all;  ///< tokens within are seen by every row that exists

  __device__ void add(const token_range& r) {
    if (r.begin < r.end) {
      any = any.begin < any.end ? token_range{min_of(any.begin, r.begin), max_of(any.end, r.end)} : r;
    }
    all = {max_of(all.begin, r.begin), min_of(all.end, r.end)};
  }
  __device__ static row_ranges none() { return {{0, 0}, {0, 2147483647}}; }
  /// Of rows that all see the same.
  __device__ static row_ranges same(const token_range& r) { return {r.begin < r.end ? r : token_range{0, 0}, r}; }
};

}  // namespace packkv::block
