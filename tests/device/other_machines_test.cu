// SPDX-License-Identifier: Apache-2.0
// The fused decode kernel as it is compiled for GPUs with less shared memory, and without bulk copies: sm_80 and the
// like copy with cp.async, sm_86, 89 and 120 have 100 KiB an SM. The code differs by template arguments alone, so it
// runs here as well.
#include "fused_problem.hpp"

using namespace packkv_test;

namespace {

using pk::warp::copy_engine;
using dim_192 = fused_format<192, 128, pk::plan<4, 2, 2, 1, 1, 0>, pk::plan<1, 1, 1, 1, 1, 1, 1, 1>, pk::identity>;
/// Tiles of 37 KiB.
using dim_512 = fused_format<
    512, 512, pk::plan<8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 4, 4, 3, 2>,
    pk::plan<2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2>>;
/// Tiles of 64 KiB: one of them and the results of 4 rows are all that 100 KiB take.
using bytes_512 = fused_format<
    512, 512, pk::plan<8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8>,
    pk::plan<8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8>,
    pk::identity, pk::identity>;

/// What the kernel gives that is compiled so.
template <copy_engine Engine, int SharedKib, class Format>
auto decoded_with(decode_problem<Format>& problem) {
  return problem.device([](const auto& queries, const std::int32_t* starts, const auto& view, const auto& parameters,
                           const auto& out, const auto& lse, const auto& options, const pk::exec& e) {
    return pk::detail::decode_fused<Format, Engine, SharedKib>(queries, starts, view, parameters, out, lse, options,
                                                               pk::block::plain_scores{}, e);
  });
}

template <copy_engine Engine, int SharedKib, class Format>
void check_call(random_source& random, int group) {
  test_cache<Format> cache(random, random_shape(random, most_tokens), Format{});
  cache.fill();
  decode_problem<Format> problem(random, cache, group, 4);
  INFO("head dim " << Format::key_head_dim << ", group " << group << ", " << SharedKib << " KiB");
  const auto expected = problem.reference();
  check_rows<Format>(decoded_with<Engine, SharedKib>(problem), expected);
  CHECK(cache.gpu_report().flags == cache.report.flags);
}

template <class Format>
int rows_of_pass(int shared_kib) {
  return pk::detail::fitting_decode_rows<Format>(16, shared_kib);
}

}  // namespace

TEST_CASE("fused decode with cp.async and the shared memory of other architectures agrees with the reference") {
  for (int round = 0; round < repeats; ++round) {
    random_source random(9400 + static_cast<std::uint64_t>(round));
    INFO("round " << round);
    check_call<copy_engine::per_thread, 164, dim_64>(random, random.between(1, 4));
    check_call<copy_engine::per_thread, 164, dim_64>(random, random.between(5, 16));
    check_call<copy_engine::per_thread, 100, dim_192>(random, random.between(1, 16));
    check_call<copy_engine::bulk, 100, dim_512>(random, random.between(5, 16));
  }
}

TEST_CASE("a warp of fused decode that has more tiles than it looks up at once") {
  random_source random(9450);
  // A block of one warp, and no more blocks than units.
  CHECK(pk::kernel::fused_shape<dim_512, 8>(100, 1).warps == 1);
  test_cache<dim_512> cache(random, cache_shape{1, 1, 64 * 34 + 5, 3, pk::dtype::float16}, dim_512{});
  auto problem = plain_problem(random, cache, 5, 1);
  problem.options.splits = 1;
  const auto expected = problem.reference();
  check_rows<dim_512>(decoded_with<copy_engine::bulk, 100>(problem), expected);
}

TEST_CASE("a pass takes as many query rows as fit into the shared memory, and every architecture takes some") {
  CHECK(pk::policy::shared_kib_of(800) == 164);
  CHECK(pk::policy::shared_kib_of(860) == 100);
  CHECK(pk::policy::shared_kib_of(890) == 100);
  CHECK(pk::policy::shared_kib_of(900) == 228);
  CHECK(pk::policy::shared_kib_of(1000) == 228);
  CHECK(pk::policy::shared_kib_of(1200) == 100);
  CHECK(pk::policy::shared_kib_of(750) == 100);
  for (const int kib : {228, 164, 100}) {
    CHECK(rows_of_pass<two_bit>(kib) == 16);
    CHECK(rows_of_pass<dim_64>(kib) == 16);
  }
  // Where registers allow it an SM has 16 warps, in one block for few units, else in two.
  CHECK(pk::policy::fused_blocks_per_sm(132) == 1);
  CHECK(pk::policy::fused_blocks_per_sm(133) == 2);
  CHECK(pk::policy::fused_blocks_per_sm(pk::checked(std::int64_t{1} << 62) * 8) == 2);
  CHECK(pk::kernel::fused_shape<two_bit, 4>(228, 1).warps == 16);
  CHECK(pk::kernel::fused_shape<two_bit, 4>(228, 2).warps == 8);
  CHECK(pk::kernel::fused_shape<two_bit, 4>(228, 2).blocks_per_sm == 2);
  CHECK(pk::kernel::fused_shape<two_bit, 4>(100, 1).warps == 8);
  CHECK(pk::kernel::fused_shape<two_bit, 8>(228, 2).blocks_per_sm == 2);
  CHECK(pk::kernel::fused_shape<two_bit, 16>(228, 2).blocks_per_sm == 1);
  CHECK(rows_of_pass<bytes_512>(228) == 16);
  CHECK(rows_of_pass<bytes_512>(164) == 16);
  CHECK(rows_of_pass<bytes_512>(100) == 4);
  CHECK(rows_of_pass<dim_512>(100) == 8);
  CHECK(rows_of_pass<bytes_512>(64) == 0);
  // One workspace serves them all.
  const pk::decode_maxima maxima{3, 2, 32, 1, 1 << 20, 0};
  for (const int kib : {228, 164, 100})
    CHECK(pk::decode_workspace_bytes<two_bit>(maxima) >=
          pk::detail::fused_blocks(pk::kernel::fused_shape<two_bit, 16>(kib, 1), 6, 0) *
              pk::detail::fused_part_bytes<two_bit, 16>);
}
