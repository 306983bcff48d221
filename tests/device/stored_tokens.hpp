// SPDX-License-Identifier: Apache-2.0
// store_tokens beside the reference, for any cache.
#pragma once

#include <algorithm>

#include "../support/catch.hpp"
#include "test_cache.hpp"

namespace packkv_test {

/// Stores the tokens of a cache of one sequence one by one into pages of garbage, beside the reference: some are left
/// out, one lies beyond the pages, one at their beginning, and every fifth is first stored with another token's data,
/// then overwritten.
template <class Format>
void check_stored_tokens(random_source& random, test_cache<Format>& cache) {
  const std::int64_t page_tokens = 64 * cache.shape.tiles_per_page;
  std::vector<std::int64_t> slots;
  for (int t = 0; t < cache.shape.max_tokens; ++t)
    slots.push_back(
        random.one_in(7) ? -1 : cache.table[static_cast<std::size_t>(t / page_tokens)] * page_tokens + t % page_tokens);
  slots[0] = static_cast<std::int64_t>(cache.host_pages().num_pages) * page_tokens;
  if (slots.size() > 1 && std::find(slots.begin(), slots.end(), 0) == slots.end()) slots[1] = 0;
  std::vector<std::int64_t> wrong_first(slots);
  for (std::size_t t = 1; t + 1 < slots.size(); t += 5) std::swap(wrong_first[t], wrong_first[t + 1]);
  for (const auto& order : {wrong_first, slots}) {
    const device_array<std::int64_t> device_slots(order);
    REQUIRE(pk::reference::store_tokens(one_by_one(cache.keys.host()), one_by_one(cache.values.host()), order.data(),
                                        cache.host_parameters(), cache.host_pages(), cache.report));
    pk::exec e = cache.exec();
    e.beside_previous = random.one_in(2);
    REQUIRE(cache.after_failures([&] {
      return pk::store_tokens(one_by_one(cache.keys.device()), one_by_one(cache.values.device()), device_slots.data(),
                              cache.gpu_parameters(), cache.gpu_pages(), e);
    }));
    CHECK((cache.device_pages.host() == cache.pages));
  }
  const pk::device_report report = cache.gpu_report();
  CHECK(report.flags == cache.report.flags);
  CHECK(report.leading_clamps == cache.report.leading_clamps);
  CHECK((report.flags & pk::report_page_out_of_range) != 0);
}

}  // namespace packkv_test
