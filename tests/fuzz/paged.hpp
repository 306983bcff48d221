// SPDX-License-Identifier: Apache-2.0
// A cache of hostile tables, lengths and tile bytes in pages, for the fuzz targets that read one.
//   fuzz::paged_cache c(in);   status s = reference::key_gemv(queries, c.view, c.parameters, scale, scores, report);
#pragma once

#include <packkv/reference/attention.hpp>

#include "formats.hpp"

namespace fuzz {

/// `count` numbers of an array that a call reads.
template <class Make>
memory int32s(int count, Make&& make) {
  memory out(4 * count);
  for (int i = 0; i < count; ++i) out.as<std::int32_t>()[i] = make(i);
  return out;
}

/// A batch of up to two sequences. Ids, lengths and first positions are any numbers; arrays have the sizes that the
/// documentation asks for, and no byte more.
struct paged_cache {
  format f;
  pk::parameters<format> parameters;
  int kv_heads, num_pages, batch, entries, max_seq_len;
  page_pool pool;
  memory pages, indptr, lengths, begin;
  pk::cache_view view;

  explicit paged_cache(input& in)
      : f(any_format(in)),
        parameters(any_parameters(in, f)),
        kv_heads(in.few(max_heads)),
        num_pages(in.below(4)),
        batch(in.below(3)),
        entries(in.below(4)),
        max_seq_len(pick_length(in)),
        pool(f, num_pages, kv_heads, in.few(2), 16 * in.below(2)),
        pages(0),
        indptr(0),
        lengths(int32s(batch, [&](int) { return in.near(max_seq_len + 1); })),
        begin(int32s(batch, [&](int) { return in.near(max_seq_len); })) {
    view.pages = pool.pages;
    view.batch = batch, view.max_seq_len = max_seq_len;
    view.seq_lens = lengths.as<std::int32_t>();
    if (in.flag()) view.kv_begin = begin.as<std::int32_t>();
    const auto id = [&](int) { return in.near(num_pages); };
    switch (in.below(3)) {
      case 0:  // dense
        pages = int32s(batch * entries, id);
        view.table = {pages.as<std::int32_t>(), nullptr, entries};
        break;
      case 1: {  // CSR; what it says of the indices must be in their array, or before it
        pages = int32s(entries, id);
        indptr = int32s(batch + 1, [&](int) { return in.between(-2, entries); });
        view.table = {pages.as<std::int32_t>(), indptr.as<std::int32_t>(), in.near<std::int64_t>(entries)};
        break;
      }
      default:
        view.table = {nullptr, nullptr, entries};
    }
  }
  /// After all that takes numbers from the input.
  void fill_pages(input& in) { in.fill(pool.keys), in.fill(pool.values); }

  /// Length of a sequence as calls see it.
  int length(int b) const {
    std::uint32_t flags = 0;
    return pk::detail::clamp_length(view.seq_lens, b, max_seq_len, flags);
  }
  /// One coded token; false if it has no page.
  bool decode(pk::side which, int b, int head, int t, float* x) const {
    std::uint32_t flags = 0;
    return pk::reference::detail::decode_cached(view, parameters, which, b, head, t, x, flags);
  }

 private:
  static int pick_length(input& in) {
    constexpr int lengths[] = {1, 2, 3, 5, 8, 0, 65, 129};
    return lengths[in.few(8) - 1];
  }
};

inline bool all_finite(const float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i)
    if (!pk::detail::is_finite(x[i])) return false;
  return true;
}

inline constexpr std::uint32_t known_flags = 2 * pk::report_tile_damaged - 1;

}  // namespace fuzz
