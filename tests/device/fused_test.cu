// SPDX-License-Identifier: Apache-2.0
// The fused decode kernel: formats whose plans are known at compile time.
#include "../support/catch.hpp"
#include "decode_problem.hpp"

using namespace packkv_test;

namespace {

template <int KeyDim, int ValueDim, class KeyPlan, class ValuePlan, class KeyTransform = pk::hadamard,
          class ValueTransform = pk::hadamard, int Leading = 0>
using fused_format =
    pk::cache_format<pk::key_codec<KeyDim, KeyTransform, pk::rms_scale, KeyPlan, pk::leading<Leading>>,
                     pk::value_codec<ValueDim, ValueTransform, pk::rms_scale, ValuePlan>>;

using two_bit = fused_format<128, 128, pk::plan<2, 2, 2, 2>, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>;
using mixed = fused_format<128, 128, pk::plan<4, 3, 1, 0>, pk::plan<8, 4, 3, 2, 2, 1, 1, 0>, pk::permutation,
                           pk::identity, 2>;
using dim_64 = fused_format<64, 64, pk::plan<8, 4, 3, 1>, pk::plan<3, 2, 1, 1>, pk::hadamard, pk::permutation, 1>;
using dim_96 = fused_format<96, 96, pk::plan<4, 2, 2>, pk::plan<4, 4, 2, 2, 1, 1>>;
using dim_192 = fused_format<192, 128, pk::plan<4, 2, 2, 1, 1, 0>, pk::plan<1, 1, 1, 1, 1, 1, 1, 1>, pk::identity>;

// q in 16 bits, weights in halves.
constexpr double tolerance = 2e-3;

template <class Format>
void agrees(random_source& random, int group, int query_len) {
  test_cache<Format> cache(random, random_shape(random, most_tokens), Format{});
  cache.fill();
  decode_problem<Format> problem(random, cache, group);
  (void)query_len;
  const auto expected = problem.reference();
  const auto got = problem.device();
  INFO("head dims " << Format::key_head_dim << " " << Format::value_head_dim << ", group " << group << ", query tokens "
                    << problem.options.max_query_len);
  std::printf("%d/%d g%d q%d: %.2e lse %.2e flags %x %x\n", Format::key_head_dim, Format::value_head_dim, group, problem.options.max_query_len, worst_row_error(got.out, expected.out, Format::value_head_dim), worst_lse_error(got.lse, expected.lse), cache.gpu_report().flags, cache.report.flags);
  CHECK(worst_row_error(got.out, expected.out, Format::value_head_dim) < tolerance);
  CHECK(worst_lse_error(got.lse, expected.lse) < tolerance);
  CHECK(cache.gpu_report().flags == cache.report.flags);
}

}  // namespace

TEST_CASE("fused decode agrees with the reference for random shapes, masks and overlays") {
  for (int round = 0; round < 2 * repeats; ++round) {
    const std::uint64_t seed = 8100 + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    constexpr int groups[] = {1, 2, 3, 4, 5, 6, 7, 8, 16};
    const auto group = [&] { return groups[random.between(0, 8)]; };
    agrees<two_bit>(random, 4, 1);
    agrees<two_bit>(random, group(), 1);
    agrees<mixed>(random, group(), 1);
    agrees<dim_64>(random, group(), 1);
    agrees<dim_96>(random, group(), 1);
    agrees<dim_192>(random, group(), 1);
  }
}
