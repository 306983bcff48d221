// SPDX-License-Identifier: Apache-2.0
// evaluate with packkv, against the naive PackKV of pack_naive.hpp: payload, published ratio, entropies, honest bits,
// errors; on random caches, on the sample and, where they are, on caches of other models.
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>

#include "../support/catch.hpp"
#include "evaluate_files.hpp"
#include "evaluate_naive.hpp"
#include "pack_naive.hpp"

using packkv_test::cache_paths;
using packkv_test::field;
using packkv_test::load;
using packkv_test::naive_errors;
using packkv_test::run;
using packkv_test::tensor;

namespace {

struct setting {
  naive::group granularity;
  naive::zero zero;
  naive::order order;
  int pack;
  float r;
  std::int64_t sinks = 0, recent = 0;

  std::string spec() const {
    const char *g[] = {"token", "vector", "channel", "block"}, *z[] = {"int", "float"},
               *o[] = {"none", "median", "greedy"};
    char text[128];
    std::snprintf(text, sizeof text, "packkv:quant=%s,r=%.9g,zero=%s,order=%s,pack=%d",
                  g[static_cast<int>(granularity)], static_cast<double>(r), z[static_cast<int>(zero)],
                  o[static_cast<int>(order)], pack);
    return text;
  }
};

/// How often each symbol occurs in each class; both are small tuples of integers.
class histogram {
 public:
  void add(const naive::integers& of_class, int symbol) { ++counts_[of_class][symbol]; }
  /// Mean of log2(1 / probability of the symbol in its class).
  double entropy() const {
    double bits = 0.0, all = 0.0;
    for (const auto& [of_class, symbols] : counts_) {
      double sum = 0.0;
      for (const auto& [symbol, count] : symbols) sum += count;
      for (const auto& [symbol, count] : symbols) bits += count * std::log2(sum / count);
      all += sum;
    }
    return bits / all;
  }

 private:
  std::map<naive::integers, std::map<int, int>> counts_;
};

/// Everything that evaluate reports, from loops.
std::map<std::string, double> expected(const tensor& k, const tensor& v, const tensor& q, const setting& s) {
  const std::int64_t heads = k.extent[0], tokens = k.extent[1];
  const std::int64_t blocks = tokens < 192 ? 0 : (tokens + 64 - tokens % 64 - 192) / 64;
  naive::sizes sizes[2];
  histogram codes_of_channel[2], fields_of_place[2];
  std::vector<double> coded[2];
  for (int side = 0; side < 2; ++side)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t c = 0; c < (side == 0 ? k : v).extent[2]; ++c)
          coded[side].push_back((side == 0 ? k : v).at(h, t, c));
  for (std::int64_t block = 0; block < blocks; ++block) {
    naive::quantised codes[2];
    naive::block x[2];
    std::vector<naive::integers> vectors(64);
    std::size_t first_value = 0;
    for (int side = 0; side < 2; ++side) {
      const tensor& from = side == 0 ? k : v;
      first_value = vectors[0].size();
      x[side].heads = static_cast<int>(heads);
      x[side].dim = static_cast<int>(from.extent[2]);
      for (int h = 0; h < x[side].heads; ++h)
        for (int t = 0; t < 64; ++t)
          for (int c = 0; c < x[side].dim; ++c) x[side].x.push_back(static_cast<float>(from.at(h, block * 64 + t, c)));
      codes[side] = naive::quantise(x[side], s.granularity, s.zero, s.r);
      for (int t = 0; t < 64; ++t)
        for (int h = 0; h < x[side].heads; ++h)
          for (int c = 0; c < x[side].dim; ++c) {
            const std::size_t at = x[side].at(h, t, c);
            vectors[static_cast<std::size_t>(t)].push_back(codes[side].code[at]);
            coded[side][from.index(h, block * 64 + t, c)] = static_cast<double>(codes[side].value[at]);
          }
    }
    const naive::integers order = naive::find_order(s.order, s.pack, vectors, first_value);
    for (int side = 0; side < 2; ++side)
      for (int h = 0; h < x[side].heads; ++h)
        for (int c = 0; c < x[side].dim; ++c) {
          naive::integers slots;
          for (const int t : order) slots.push_back(codes[side].code[x[side].at(h, t, c)]);
          sizes[side].add(slots, s.pack);
          for (std::size_t i = 0; i < slots.size(); ++i) {
            codes_of_channel[side].add({h, c}, slots[i]);
            const auto first = slots.begin() + static_cast<std::ptrdiff_t>(i) / s.pack * s.pack;
            const auto range = std::minmax_element(first, first + s.pack);
            fields_of_place[side].add(
                {naive::ceil_log2(*range.second - *range.first + 1), static_cast<int>(i) % s.pack},
                slots[i] - *range.first);
          }
        }
  }
  std::map<std::string, double> e;
  for (int side = 0; side < 2; ++side) {
    const std::string name = side == 0 ? "_k" : "_v";
    e["packkv_payload_bits" + name] =
        static_cast<double>(sizes[side].payload) / static_cast<double>(sizes[side].values);
    e["packkv_published_ratio" + name] = sizes[side].ratio();
    e["packkv_entropy_bits" + name] = codes_of_channel[side].entropy();
    e["packkv_field_entropy_bits" + name] = fields_of_place[side].entropy();
  }
  naive_errors(k, v, q, coded, s.sinks, s.recent, e);
  return e;
}

void check_cache(const cache_paths& paths, const setting& s) {
  std::string json;
  const evaluate::outcome o = run(paths,
                                  {"--codec", s.spec(), "--device", "cpu", "--sinks", std::to_string(s.sinks),
                                   "--recent", std::to_string(s.recent)},
                                  json);
  INFO(s.spec() << " on " << paths.k << ": " << o.error());
  REQUIRE(o);
  for (const auto& [name, value] : expected(load(paths.k), load(paths.v), load(paths.q), s)) {
    INFO(name << ": " << field(json, name) << " and naively " << value);
    CHECK(std::fabs(field(json, name) - value) <= 1e-6 * std::fabs(value));
  }
}

constexpr setting settings[] = {
    {naive::group::token, naive::zero::integer, naive::order::greedy, 16, 0.1f},
    {naive::group::vector, naive::zero::floating, naive::order::median, 8, 0.2f, 4, 200},
    {naive::group::channel, naive::zero::integer, naive::order::none, 32, 0.1f, 16, 8},
};

}  // namespace

TEST_CASE("evaluate packkv: the sample's payload, ratios and errors are the naive ones", "[packs]") {
  const std::string folder = PACKKV_SAMPLE_DATA;
  for (const setting& s : settings) check_cache({folder + "/k.npy", folder + "/v.npy", folder + "/q.npy"}, s);
}

TEST_CASE("evaluate packkv: real caches of other models give the naive payload, ratios and errors", "[packs]") {
  const std::string root = PACKKV_SHARED_DATA;
  int found = 0;
  for (const char* layer : {"qwen2.5-coder-0.5b/textB/L00", "qwen2.5-coder-1.5b/textB/L18", "gemma3-270m/textB/L05"}) {
    const std::string stem = root + "/" + layer;
    if (!std::filesystem::exists(stem + ".k.npy")) continue;
    check_cache({stem + ".k.npy", stem + ".v.npy", stem + ".q.npy"}, settings[found % 3]);
    ++found;
  }
  if (found == 0) std::printf("SKIPPED: no real caches in %s\n", root.c_str());
}

TEST_CASE("evaluate packkv: bits count every byte, the 16-bit tail, sinks and recent tokens", "[packs]") {
  const packkv_test::temporary_folder folder;
  const packkv_test::cache_files f(folder, "", 71, 2, 2, 64 * 5 + 7, 3, 64, 128);
  const cache_paths paths{f.k_path, f.v_path, f.q_path};
  const double coded = 128.0 + 64.0, tokens = 327.0;  // (327 + 64 - 7 - 192) / 64 = 3 blocks
  const auto total = [&](const std::string& json, double raw, double order_bytes) {
    const double k = field(json, "bits_per_value_k"), v = field(json, "bits_per_value_v");
    CHECK(field(json, "coded_tokens") == coded);
    CHECK(field(json, "tokens") == tokens);
    // Ranges (4 bytes a token) and offsets (8 a tile and 8) are stored beside the payload.
    CHECK(8.0 * (coded * 4 + 7 * 8) / (coded * 2 * 64) + field(json, "packkv_payload_bits_k") < k);
    const double bits = (coded * 2 * (64 * k + 128 * v) + raw * 16 * 2 * 192 + 8 * order_bytes) / (tokens * 2 * 192);
    CHECK(std::fabs(field(json, "total_bits_per_value") - bits) < 1e-9);
  };
  std::string json;
  REQUIRE(run(paths, {"--codec", "packkv"}, json));
  total(json, tokens - coded, 0);  // positions do not matter
  CHECK(json.find("\"device\": \"cpu\"") != std::string::npos);
  REQUIRE(run(paths, {"--codec", "packkv", "--sinks", "16", "--recent", "133"}, json));
  total(json, tokens - coded + 16, coded);  // 133 + 3 - 1 recent tokens are in the tail of 135
  REQUIRE(run(paths, {"--codec", "packkv:order=none", "--sinks", "16", "--recent", "133"}, json));
  total(json, tokens - coded + 16, 0);
  REQUIRE(run(paths, {"--codec", "packkv", "--sinks", "300", "--recent", "140"}, json));
  total(json, tokens - coded + coded + 7, coded);  // sinks among the coded tokens, and 142 - 135 more recent ones
}

TEST_CASE("evaluate packkv: a cache too short for a block stays 16-bit", "[packs]") {
  const packkv_test::temporary_folder folder;
  const packkv_test::cache_files f(folder, "", 72, 1, 1, 191, 1, 64, 64);
  std::string json;
  REQUIRE(run({f.k_path, f.v_path, f.q_path}, {"--codec", "packkv"}, json));
  CHECK(field(json, "coded_tokens") == 0.0);
  CHECK(field(json, "error_attention") == 0.0);
  for (const char* name : {"bits_per_value_k", "bits_per_value_v", "total_bits_per_value", "packkv_payload_bits_k",
                           "packkv_entropy_bits_k", "packkv_field_entropy_bits_v"})
    CHECK(field(json, name) == 16.0);
  CHECK(field(json, "packkv_published_ratio_v") == 1.0);
}

TEST_CASE("evaluate packkv: too small a step is refused by name", "[packs]") {
  const packkv_test::temporary_folder folder;
  const packkv_test::cache_files f(folder, "", 73, 1, 1, 256, 1, 64, 64);
  const cache_paths paths{f.k_path, f.v_path, f.q_path};
  std::string json;
  const evaluate::outcome o = run(paths, {"--codec", "packkv:r=0.001"}, json);
  CHECK(o.error().find("8 bits") != std::string::npos);
  CHECK(o.error().find("packkv:r=0.001") != std::string::npos);
}
