// SPDX-License-Identifier: Apache-2.0
// Attention over 16-bit tokens by matrix products, a warp at a time, beside the same in double: types that differ,
// channels that lie apart, rings that wrap, rows that see different tokens, and NaN in those that a row does not see.
#include <algorithm>
#include <packkv/warp/raw_attention.cuh>

#include "../support/catch.hpp"
#include "../support/random.hpp"
#include "device_array.hpp"

using namespace packkv_test;
namespace pk = packkv;

namespace {

constexpr int most_rows = 16;

struct raw_call {
  const std::uint16_t *queries, *keys, *values;  ///< of slot 0
  pk::dtype query_type, key_type, value_type;
  int query_apart, key_apart, value_apart;  ///< 16-bit elements between channels
  int key_token, value_token;               ///< between tokens
  int first_slot, capacity, count;
  int begin[most_rows], end[most_rows];  ///< tokens that a row sees
  float scale;
};

template <int KeyDim, int ValueDim, int Rows>
__global__ void attend(const raw_call c, float* out) {
  constexpr int row_floats = ValueDim + 8;
  __shared__ float part[Rows * row_floats];
  pk::warp::raw_attention<KeyDim, ValueDim, Rows> rows(part, row_floats);
  for (int first = 0; first < c.count; first += 16) {
    pk::warp::raw_chunk chunk;
    chunk.key = reinterpret_cast<const char*>(c.keys);
    chunk.value = reinterpret_cast<const char*>(c.values);
    chunk.key_token = 2 * c.key_token;
    chunk.value_token = 2 * c.value_token;
    chunk.key_stride = 2 * c.key_apart;
    chunk.value_stride = 2 * c.value_apart;
    chunk.key_type = c.key_type;
    chunk.value_type = c.value_type;
    chunk.slot = (c.first_slot + first) % c.capacity;
    chunk.capacity = c.capacity;
    chunk.count = pk::min_of(16, c.count - first);
    rows.add(
        chunk, c.query_type,
        [&](int row) {
          const int r = pk::min_of(row, Rows - 1);
          return pk::warp::raw_vector{reinterpret_cast<const char*>(c.queries + r * KeyDim * c.query_apart),
                                      2 * c.query_apart};
        },
        [&](int row) {
          return pk::warp::raw_range{c.begin[row] - first, c.end[row] - first};
        },
        [&](int, int, float dot) { return dot * c.scale; });
  }
  rows.finish(ValueDim, ValueDim + 1);
  __syncwarp();
  for (int i = pk::detail::lane_id(); i < Rows * row_floats; i += 32)
    if (i % row_floats < ValueDim + 2) out[i] = part[i];
}

std::uint16_t bits_of(float x, pk::dtype type) {
  return type == pk::dtype::float16 ? pk::float_to_half(x) : pk::float_to_bfloat16(x);
}
double value_of(std::uint16_t bits, pk::dtype type) {
  return static_cast<double>(type == pk::dtype::float16 ? pk::half_to_float(bits) : pk::bfloat16_to_float(bits));
}

/// `poisoned`: a token whose K and V are not finite, or -1.
template <int KeyDim, int ValueDim, int Rows>
void check_call(random_source& random, int count, int poisoned, bool infinite) {
  const auto type = [&] { return random.one_in(2) ? pk::dtype::float16 : pk::dtype::bfloat16; };
  const auto apart = [&] { return random.one_in(3) ? 2 : 1; };
  raw_call c{};
  c.query_type = type(), c.key_type = type(), c.value_type = type();
  c.query_apart = apart(), c.key_apart = apart(), c.value_apart = apart();
  c.capacity = count + random.between(1, 5);
  c.first_slot = random.between(0, c.capacity - 1);
  c.count = count;
  c.key_token = KeyDim * c.key_apart + 8 * random.between(0, 1);
  c.value_token = ValueDim * c.value_apart + 8 * random.between(0, 1);
  c.scale = 1.4427f / std::sqrt(static_cast<float>(KeyDim));
  for (int r = 0; r < Rows; ++r) {
    c.begin[r] = random.one_in(3) ? random.between(0, count) : 0;
    c.end[r] = random.one_in(3) ? random.between(c.begin[r], count) : count;
  }
  const auto slot = [&](int token) { return (c.first_slot + token) % c.capacity; };
  // Queries of sizes that a half and a bfloat16 do not both have.
  const float size = c.query_type == pk::dtype::bfloat16 && random.one_in(2) ? 100000.0f : 1.0f;
  if (size > 1.0f) c.scale /= size;
  std::vector<std::uint16_t> q(static_cast<std::size_t>(Rows * KeyDim * c.query_apart), 0x7fff),
      k(static_cast<std::size_t>(c.capacity * c.key_token), 0x7fff),
      v(static_cast<std::size_t>(c.capacity * c.value_token), 0x7fff);
  for (int i = 0; i < Rows * KeyDim; ++i)
    q[static_cast<std::size_t>(i * c.query_apart)] = bits_of(size * random.normal(), c.query_type);
  const float bad = pk::detail::bit_cast<float>(infinite ? 0x7f800000u : 0x7fc00000u);
  for (int t = 0; t < count; ++t) {
    for (int i = 0; i < KeyDim; ++i)
      k[static_cast<std::size_t>(slot(t) * c.key_token + i * c.key_apart)] =
          bits_of(t == poisoned ? bad : 2.0f * random.normal(), c.key_type);
    for (int i = 0; i < ValueDim; ++i)
      v[static_cast<std::size_t>(slot(t) * c.value_token + i * c.value_apart)] =
          bits_of(t == poisoned ? bad : random.normal(), c.value_type);
  }
  const device_array<std::uint16_t> device_q(q), device_k(k), device_v(v);
  c.queries = device_q.data(), c.keys = device_k.data(), c.values = device_v.data();
  constexpr int row_floats = ValueDim + 8;
  device_array<float> out(Rows * row_floats);
  out.poison();
  REQUIRE(pk::detail::launch(attend<KeyDim, ValueDim, Rows>, dim3(1), 32, cudaStream_t{}, c, out.data()));
  const std::vector<float> got = out.host();

  int wrong_empty = 0, wrong_poison = 0;
  double worst_value = 0.0, worst_sum = 0.0;
  for (int r = 0; r < Rows; ++r) {
    const float* row = &got[static_cast<std::size_t>(r * row_floats)];
    std::vector<double> score, sum(ValueDim);
    double top = -1e300, all = 0.0;
    for (int t = c.begin[r]; t < c.end[r]; ++t) {
      double dot = 0.0;
      for (int i = 0; i < KeyDim; ++i)
        dot += value_of(q[static_cast<std::size_t>((r * KeyDim + i) * c.query_apart)], c.query_type) *
               value_of(k[static_cast<std::size_t>(slot(t) * c.key_token + i * c.key_apart)], c.key_type);
      score.push_back(dot * static_cast<double>(c.scale));
      top = std::max(top, score.back());
    }
    if (score.empty()) {
      wrong_empty += row[ValueDim + 1] != 0.0f || row[ValueDim] != pk::warp::attention_row<ValueDim>::lowest;
      for (int i = 0; i < ValueDim; ++i) wrong_empty += row[i] != 0.0f;
      continue;
    }
    if (poisoned >= c.begin[r] && poisoned < c.end[r]) {
      wrong_poison += std::isfinite(row[0]) && std::isfinite(row[ValueDim + 1]) ? 1 : 0;
      continue;
    }
    for (int t = c.begin[r]; t < c.end[r]; ++t) {
      const double weight = std::exp2(score[static_cast<std::size_t>(t - c.begin[r])] - top);
      all += weight;
      for (int i = 0; i < ValueDim; ++i)
        sum[static_cast<std::size_t>(i)] +=
            weight * value_of(v[static_cast<std::size_t>(slot(t) * c.value_token + i * c.value_apart)], c.value_type);
    }
    const double weight = static_cast<double>(row[ValueDim + 1]);
    worst_sum =
        std::max(worst_sum, std::fabs(static_cast<double>(row[ValueDim]) + std::log2(weight) - top - std::log2(all)));
    double error = 0.0, norm = 0.0;
    for (int i = 0; i < ValueDim; ++i) {
      const double expected = sum[static_cast<std::size_t>(i)] / all, x = static_cast<double>(row[i]) / weight;
      error += (x - expected) * (x - expected);
      norm += expected * expected;
    }
    worst_value = std::max(worst_value, std::sqrt(error / norm));
  }
  INFO("head dims " << KeyDim << " and " << ValueDim << ", " << Rows << " rows, " << count << " tokens, poisoned "
                    << poisoned << ", types " << static_cast<int>(c.query_type) << static_cast<int>(c.key_type)
                    << static_cast<int>(c.value_type) << ", apart " << c.query_apart << c.key_apart << c.value_apart);
  CHECK(wrong_empty == 0);
  CHECK(wrong_poison == 0);
  CHECK(worst_value < 1e-4);
  CHECK(worst_sum < 1e-4);
}

template <int KeyDim, int ValueDim, int Rows>
void check_dims(random_source& random) {
  for (const int count : {1, 15, 16, 17, 100}) {
    check_call<KeyDim, ValueDim, Rows>(random, count, -1, false);
    check_call<KeyDim, ValueDim, Rows>(random, count, random.between(0, count - 1), random.one_in(2));
  }
}

}  // namespace

TEST_CASE("attention over 16-bit tokens by matrix products is that in double") {
  for (int round = 0; round < 4; ++round) {
    random_source random(9700 + static_cast<std::uint64_t>(round));
    INFO("round " << round);
    check_dims<128, 128, 4>(random);
    check_dims<128, 128, 16>(random);
    check_dims<64, 64, 8>(random);
    check_dims<96, 64, 4>(random);
    check_dims<192, 128, 16>(random);
    check_dims<256, 512, 8>(random);
  }
}

TEST_CASE("a call without 16-bit tokens gives empty rows") {
  random_source random(9750);
  check_call<64, 64, 4>(random, 0, -1, false);
}
