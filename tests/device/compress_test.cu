// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "stored_tokens.hpp"

using namespace packkv_test;

namespace {

std::uint64_t next_seed() {
  static std::uint64_t seed = 1;
  return seed++;
}

bool same_report(const pk::device_report& a, const pk::device_report& b) {
  return a.flags == b.flags && a.leading_clamps == b.leading_clamps;
}

}  // namespace

TEST_CASE("compress on the device gives the reference's bytes, and touches nothing else") {
  for (int round = 0; round < repeats; ++round) {
    const std::uint64_t seed = next_seed();
    INFO("seed " << seed);
    random_source random(seed);
    for_each_format(random, [&](const auto& format) {
      test_cache cache(random, random_shape(random, most_tokens), format);
      REQUIRE(cache.compress_reference());
      REQUIRE(cache.after_failures([&] {
        return pk::compress(cache.keys.device(), cache.values.device(), cache.device_lengths.data(),
                            cache.gpu_parameters(), cache.gpu_pages(), cache.gpu_table(), cache.exec());
      }));
      CHECK((cache.device_pages.host() == cache.pages));
      CHECK(same_report(cache.gpu_report(), cache.report));
    });
  }
}

TEST_CASE("tokens stored one by one in random order give the reference's bytes") {
  for (int round = 0; round < repeats; ++round) {
    const std::uint64_t seed = 1000 + next_seed();
    INFO("seed " << seed);
    random_source random(seed);
    for_each_format(random, [&](const auto& format) {
      cache_shape shape = random_shape(random, 130);
      shape.batch = 1;
      test_cache cache(random, shape, format);
      check_stored_tokens(random, cache);
    });
  }
}

TEST_CASE("decompress on the device gives the reference's bits, and leaves the rest alone") {
  for (int round = 0; round < repeats; ++round) {
    const std::uint64_t seed = 2000 + next_seed();
    INFO("seed " << seed);
    random_source random(seed);
    for_each_format(random, [&](const auto& format) {
      test_cache cache(random, random_shape(random, most_tokens), format);
      cache.fill();
      if (random.one_in(3)) {  // a missing page: NaN and a flag
        cache.table[0] = -1;
        cache.device_table.assign(cache.table);
      }
      tensor_data k(random, pk::dtype::float16, cache.shape.batch, cache.shape.kv_heads, cache.shape.max_tokens,
                    cache.format.key_head_dim);
      tensor_data v(random, pk::dtype::bfloat16, cache.shape.batch, cache.shape.kv_heads, cache.shape.max_tokens,
                    cache.format.value_head_dim);
      REQUIRE(cache.after_failures([&] {
        return pk::decompress(cache.gpu_pages(), cache.gpu_table(), cache.device_lengths.data(), cache.gpu_parameters(),
                              as_output(k.device()), as_output(v.device()), cache.exec());
      }));
      REQUIRE(pk::reference::decompress(cache.host_pages(), cache.host_table(), cache.lengths.data(),
                                        cache.host_parameters(), as_output(k.host()), as_output(v.host()),
                                        cache.report));
      CHECK((k.device_bits.host() == k.host_bits));
      CHECK((v.device_bits.host() == v.host_bits));
      CHECK(cache.gpu_report().flags == cache.report.flags);
    });
  }
}

TEST_CASE("NaN, infinity, zeros and overflow are coded and reported as the reference does") {
  random_source random(77);
  for_each_format(random, [&](const auto& format) {
    cache_shape shape;
    shape.max_tokens = 70;
    shape.type = pk::dtype::bfloat16;
    test_cache cache(random, shape, format);
    cache.lengths[0] = 70;
    cache.device_lengths.assign(cache.lengths);
    for (tensor_data* x : {&cache.keys, &cache.values}) {
      const auto put = [&](int token, std::int64_t from, std::int64_t to, float value) {
        for (std::int64_t c = from; c < to; ++c)
          x->host_bits[static_cast<std::size_t>(token * (x->dim + x->pad) + c)] = pk::float_to_bfloat16(value);
      };
      put(1, 3, 4, NAN);
      put(2, 0, 1, -INFINITY);
      put(3, 0, x->dim, 0.0f);
      put(4, 0, x->dim, 1e-9f);
      put(5, 0, x->dim, 3e38f);
      put(6, 0, x->dim, 1e6f);
      put(7, 0, x->dim, -2.5f);
      x->device_bits.assign(x->host_bits);
    }
    REQUIRE(cache.compress_reference());
    REQUIRE(cache.after_failures([&] {
      return pk::compress(cache.keys.device(), cache.values.device(), cache.device_lengths.data(),
                          cache.gpu_parameters(), cache.gpu_pages(), cache.gpu_table(), cache.exec());
    }));
    CHECK((cache.device_pages.host() == cache.pages));
    CHECK(same_report(cache.gpu_report(), cache.report));
    CHECK((cache.report.flags & pk::report_nonfinite_input) != 0);
  });
}

TEST_CASE("a refused compress launches nothing") {
  random_source random(5);
  using format = pk::cache_format<pk::key_codec<128, pk::identity, pk::rms_scale, pk::plan<4, 2, 1, 1>>,
                                  pk::value_codec<128, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>>;
  test_cache cache(random, cache_shape{}, format{});
  const auto before = cache.device_pages.host();
  auto keys = cache.keys.device();
  keys.extent[3] = 96;
  CHECK(pk::compress(keys, cache.values.device(), nullptr, cache.gpu_parameters(), cache.gpu_pages(), cache.gpu_table(),
                     cache.exec())
            .code == pk::status_code::shape_mismatch);
  auto pages = cache.gpu_pages();
  pages.key_data = static_cast<std::uint8_t*>(pages.key_data) + 8;
  CHECK(pk::compress(cache.keys.device(), cache.values.device(), nullptr, cache.gpu_parameters(), pages,
                     cache.gpu_table(), cache.exec())
            .code == pk::status_code::misaligned);
  // As many tokens as 31 bits cannot count, which lie on top of one another.
  const device_array<std::int64_t> slots(std::vector<std::int64_t>(1));
  pk::input_view<3> k = one_by_one(cache.keys.device()), v = one_by_one(cache.values.device());
  k.extent[0] = v.extent[0] = (std::int64_t{1} << 31) / cache.shape.kv_heads + 1;
  k.stride[0] = v.stride[0] = 0;
  CHECK(pk::store_tokens(k, v, slots.data(), cache.gpu_parameters(), cache.gpu_pages(), cache.exec()).code ==
        pk::status_code::overflow);
  CHECK((cache.device_pages.host() == before));
}

TEST_CASE("a block of compress that takes several tiles gives the reference's bytes") {
  random_source random(91);
  for_each_format(random, [&](const auto& format) {
    using type = std::decay_t<decltype(format)>;
    for (const unsigned blocks : {1u, 2u}) {
      cache_shape shape;
      shape.batch = shape.kv_heads = 2;
      shape.max_tokens = 130;
      test_cache cache(random, shape, format);
      REQUIRE(cache.compress_reference());
      const auto keys = cache.keys.device(), values = cache.values.device();
      const auto params = cache.gpu_parameters();
      const auto args = pk::detail::make_compress_args<type>(keys.extent, cache.device_lengths.data(),
                                                             cache.gpu_pages(), cache.gpu_table(), cache.exec());
      constexpr int threads = pk::kernel::compress_warps * 32;
      REQUIRE(pk::detail::launch(pk::kernel::compress<type::key_head_dim>, dim3(blocks), threads, cudaStream_t{},
                                 pk::detail::key_side(params), args, keys));
      REQUIRE(pk::detail::launch(pk::kernel::compress<type::value_head_dim>, dim3(blocks), threads, cudaStream_t{},
                                 pk::detail::value_side(params), args, values));
      CHECK((cache.device_pages.host() == cache.pages));
      CHECK(same_report(cache.gpu_report(), cache.report));
    }
  });
}
