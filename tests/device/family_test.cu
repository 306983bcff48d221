// SPDX-License-Identifier: Apache-2.0
// Formats chosen at run time among compiled ones, and scores changed by a caller's functor.
#include "../support/catch.hpp"
#include "decode_problem.hpp"

using namespace packkv_test;

namespace {

using two_bit = pk::cache_format<pk::key_codec<64, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2>>,
                                 pk::value_codec<64, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2>>>;
using mixed = pk::cache_format<pk::key_codec<64, pk::permutation, pk::rms_scale, pk::plan<4, 2, 1, 0>, pk::leading<1>>,
                               pk::value_codec<64, pk::hadamard, pk::rms_scale, pk::plan<3, 2, 1, 1>>>;
using family = pk::format_family<two_bit, mixed>;
using any_format = family::runtime_type;

any_format as_runtime(const pk::codec_spec& key, const pk::codec_spec& value) { return {key, value}; }

/// A decode call with every option off.
template <class Format>
void make_plain(decode_problem<Format>& p) {
  p.options = {};
  p.options.softmax_scale = 0.125f;
  p.options.base = pk::lse_base::two;
  p.with_kv_begin = p.with_context = p.with_rows = false;
  p.sinks = p.ring_capacity = 0;
}

/// ALiBi that also hides every third key.
struct bias_and_mask {
  static constexpr bool active = true;
  float slope;
  PACKKV_HOST_DEVICE float operator()(float score, int head, std::int64_t query, std::int64_t key) const {
    if (key % 3 == 1) return -pk::detail::infinity();
    return score - slope * static_cast<float>(head + 1) * static_cast<float>(query - key);
  }
};

/// out = softmax(bias(scale * q.k)) v of the coded tokens, in double.
std::vector<float> naive(decode_problem<two_bit>& p, const bias_and_mask& bias) {
  const auto cache = p.view(false);
  const auto params = p.cache.host_parameters();
  const auto queries = p.query_view(false);
  std::vector<float> out(static_cast<std::size_t>(p.tokens * p.heads() * 64), 7.0f);
  std::uint32_t flags = 0;
  for (std::int64_t b = 0; b < cache.batch; ++b) {
    const std::int64_t begin = p.query_start[static_cast<std::size_t>(b)],
                       count = p.query_start[static_cast<std::size_t>(b) + 1] - begin;
    const std::int64_t length = cache.seq_lens[b];
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t h = 0; h < p.heads(); ++h) {
        float q[64], k[64], v[64];
        pk::reference::detail::load_token(pk::detail::address(queries, begin + i, h, 0), queries.stride[2],
                                          queries.type, 64, q);
        pk::reference::detail::attention_sum sum(64);
        const std::int64_t position = length - count + i;
        for (std::int64_t t = 0; t <= position; ++t) {
          const int head = static_cast<int>(h / p.group);
          pk::reference::detail::decode_cached(cache, params, pk::side::key, b, head, t, k, flags);
          pk::reference::detail::decode_cached(cache, params, pk::side::value, b, head, t, v, flags);
          const float s =
              bias(static_cast<float>(0.125 * pk::reference::detail::dot(q, k, 64)), static_cast<int>(h), position, t);
          if (s != -pk::detail::infinity()) sum.add(static_cast<double>(s), v);
        }
        for (std::size_t c = 0; c < 64; ++c)
          out[static_cast<std::size_t>((begin + i) * p.heads() + h) * 64 + c] = static_cast<float>(sum.output(c));
      }
  }
  return out;
}

struct call_result {
  pk::status status;
  std::vector<float> out, lse;
};

/// Runs attend(out, lse, exec) on fresh outputs and a workspace of `bytes`.
template <class Format, class Attend>
call_result run(decode_problem<Format>& p, std::int64_t bytes, Attend&& attend) {
  device_array<float> out(std::vector<float>(static_cast<std::size_t>(p.tokens * p.heads() * 64), 7.0f));
  device_array<float> lse(std::vector<float>(static_cast<std::size_t>(p.tokens * p.heads()), 7.0f));
  device_array<std::uint8_t> workspace(static_cast<std::size_t>(bytes));
  workspace.poison();
  pk::exec e = p.cache.exec();
  e.workspace = workspace.data();
  e.workspace_bytes = workspace.size();
  call_result r;
  r.status = pk::initialize_workspace(e);
  if (r.status) r.status = attend(p.out_view(out.data()), p.lse_view(lse.data()), e);
  r.out = out.host();
  r.lse = lse.host();
  return r;
}

template <class Format>
void family_agrees(random_source& random) {
  test_cache<Format> cache(random, random_shape(random, most_tokens), Format{});
  cache.fill();
  decode_problem<Format> p(random, cache, 4);
  const auto direct = p.device();
  pk::parameters<any_format> params{as_runtime(Format::key(), Format::value()), cache.gpu_parameters().key,
                                    cache.gpu_parameters().value};
  pk::decode_maxima maxima;
  maxima.batch = cache.shape.batch;
  maxima.kv_heads = cache.shape.kv_heads;
  maxima.query_heads = p.heads();
  maxima.max_query_len = p.options.max_query_len;
  maxima.max_seq_len = cache.shape.max_tokens;
  maxima.splits = p.options.splits;
  const std::int64_t bytes = family::decode_workspace_bytes(maxima);
  const auto chosen = run(p, bytes, [&](const auto& out, const auto& lse, const pk::exec& e) {
    return family::decode_attention(p.query_view(true), p.device_query_start.data(), p.view(true), params, out, lse,
                                    p.with_arrays(true), e);
  });
  REQUIRE(chosen.status);
  CHECK(std::memcmp(chosen.out.data(), direct.out.data(), direct.out.size() * 4) == 0);
  CHECK(std::memcmp(chosen.lse.data(), direct.lse.data(), direct.lse.size() * 4) == 0);

  params.format.key_spec =
      pk::make_plan_codec(pk::side::key, 64, pk::transform_kind::hadamard, pk::plan<3, 2, 2, 2>::widths());
  const auto refused = run(p, bytes, [&](const auto& out, const auto& lse, const pk::exec& e) {
    return family::decode_attention(p.query_view(true), p.device_query_start.data(), p.view(true), params, out, lse,
                                    p.with_arrays(true), e);
  });
  CHECK(refused.status.code == pk::status_code::unsupported);
  CHECK(std::count(refused.out.begin(), refused.out.end(), 7.0f) == static_cast<std::ptrdiff_t>(refused.out.size()));
}

}  // namespace

TEST_CASE("a family attends with the kernel of the format that it is given, and refuses others") {
  CHECK(family::find(as_runtime(two_bit::key(), two_bit::value())) == 0);
  CHECK(family::find(as_runtime(mixed::key(), mixed::value())) == 1);
  CHECK(family::find(as_runtime(mixed::key(), two_bit::value())) == -1);
  random_source random(77);
  family_agrees<two_bit>(random);
  family_agrees<mixed>(random);
}

TEST_CASE("a family tells groups of 32 tokens from groups of 64") {
  using with_32 = pk::cache_format<pk::grouped_key_codec<64, 2, 32>, pk::grouped_value_codec<64, 2, 32>>;
  using with_64 = pk::cache_format<pk::grouped_key_codec<64, 2, 64>, pk::grouped_value_codec<64, 2, 32>>;
  CHECK(pk::format_family<with_32>::find(as_runtime(with_64::key(), with_64::value())) == -1);
  CHECK(pk::format_family<with_32, with_64>::find(as_runtime(with_64::key(), with_64::value())) == 1);
}

TEST_CASE("a functor changes and hides scores before the softmax") {
  random_source random(78);
  test_cache<two_bit> cache(random, cache_shape{2, 2, most_tokens, 1, pk::dtype::float16}, two_bit{});
  cache.fill();
  for (auto& length : cache.lengths) length = std::max(length, 6);
  cache.device_lengths = device_array<std::int32_t>(cache.lengths);
  decode_problem<two_bit> p(random, cache, 3);
  const int most = p.options.max_query_len;
  make_plain(p);
  p.options.max_query_len = most;
  const bias_and_mask bias{0.02f};
  const auto expected = naive(p, bias);
  const auto got = run(p, p.workspace_bytes(), [&](const auto& out, const auto& lse, const pk::exec& e) {
    return pk::decode_attention(p.query_view(true), p.device_query_start.data(), p.view(true), cache.gpu_parameters(),
                                out, lse, p.options, bias, e);
  });
  REQUIRE(got.status);
  CHECK(worst_row_error(got.out, expected, 64) < 2e-3);
}
