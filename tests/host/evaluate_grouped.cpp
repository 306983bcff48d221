// SPDX-License-Identifier: Apache-2.0
// evaluate with the grouped and strip-adaptive formats, against the naive quantisers of grouped_fixture.hpp: bits and
// errors on the sample; what the total counts; the language of the SPECs and its refusals.
#include <evaluate/spec.hpp>

#include "../support/catch.hpp"
#include "evaluate_files.hpp"
#include "evaluate_naive.hpp"
#include "grouped_fixture.hpp"

namespace pk = packkv;
using evaluate::codec_choice;
using packkv_test::cache_paths;
using packkv_test::field;
using packkv_test::run;
using packkv_test::tensor;
using pk::group_axis;
using pk::side;
using pk::step_rule;
using pk::transform_kind;

namespace {

constexpr transform_kind plain = transform_kind::identity, hadamard = transform_kind::hadamard;

/// The sample with its last two queries only, which keeps the naive loops short.
struct short_sample {
  packkv_test::temporary_folder folder;
  std::string stem = PACKKV_SAMPLE_DATA;
  tensor k = packkv_test::load(stem + "/k.npy"), v = packkv_test::load(stem + "/v.npy");
  tensor q = last_queries(packkv_test::load(stem + "/q.npy"), 2);
  cache_paths paths{stem + "/k.npy", stem + "/v.npy", folder.write("q.npy", q.npy())};

  static tensor last_queries(const tensor& all, std::int64_t n) {
    tensor q{{all.extent[0], n, all.extent[2]}, {}};
    for (std::int64_t h = 0; h < all.extent[0]; ++h) {
      const auto first = all.bits.begin() + static_cast<std::ptrdiff_t>(all.index(h, all.extent[1] - n, 0));
      q.bits.insert(q.bits.end(), first, first + n * all.extent[2]);
    }
    return q;
  }
};

grouped_test::tensor16 short_tensor(const tensor& x) {
  grouped_test::tensor16 y(static_cast<int>(x.extent[0]), static_cast<int>(x.extent[1]), static_cast<int>(x.extent[2]));
  y.bits = x.bits;
  return y;
}

/// What a side decodes to, [heads, tokens, D], from naive values before the inverse transform.
std::vector<double> rebuild(const pk::grouped_spec& spec, const tensor& x, std::int64_t coded,
                            const std::vector<float>& y) {
  std::vector<double> out;
  const std::int64_t dim = x.extent[2];
  for (std::int64_t h = 0; h < x.extent[0]; ++h) {
    std::vector<float> mean(static_cast<std::size_t>(dim), 0.0f);
    for (std::int64_t c = 0; c < dim && spec.centred; ++c) {
      double sum = 0.0;
      for (std::int64_t t = 0; t < coded; ++t) sum += x.at(h, t, c);
      mean[static_cast<std::size_t>(c)] =
          grouped_test::naive_half(static_cast<float>(sum / static_cast<double>(coded)));
    }
    for (std::int64_t t = 0; t < x.extent[1]; ++t) {
      const auto first = y.begin() + static_cast<std::ptrdiff_t>(x.index(h, t, 0));
      std::vector<float> token(first, first + dim);
      if (spec.transform == hadamard) clean::hadamard(token);
      for (std::int64_t c = 0; c < dim; ++c)
        out.push_back(t < coded ? static_cast<double>(token[static_cast<std::size_t>(c)]) +
                                      static_cast<double>(mean[static_cast<std::size_t>(c)])
                                : x.at(h, t, c));
    }
  }
  return out;
}

/// Bits per coded value of a fixed width: code, scale, minimum, mean.
double grouped_bits(const pk::grouped_spec& s, std::int64_t heads, std::int64_t coded) {
  const double members = s.axis == group_axis::token ? static_cast<double>(heads * s.head_dim) : s.group;
  return s.width + (s.step == step_rule::gaussian ? 16.0 : 32.0) / members +
         (s.centred ? 16.0 / static_cast<double>(coded) : 0.0);
}

/// The same of strip-adaptive codes: strips, headers, offsets, scales, minima, means.
double adaptive_bits(const pk::adaptive_spec& s, const tensor& x, std::int64_t coded, const std::vector<int>& codes) {
  const std::int64_t heads = x.extent[0], dim = x.extent[2];
  const std::int64_t strip = s.groups.which == side::key && dim != 64 ? 32 : 16, strips = dim / strip;
  std::int64_t bytes = 8 + (s.groups.centred ? 2 * heads * dim : 0);
  for (std::int64_t first = 0; first < coded; first += 64) {
    bytes += s.groups.axis == group_axis::token ? 4 * 64 : s.groups.axis == group_axis::block ? 16 : 0;
    for (std::int64_t h = 0; h < heads; ++h) {
      bytes += 8 + (2 * strips + 15) / 16 * 16;
      bytes += s.groups.axis == group_axis::channel ? 4 * dim : s.groups.axis == group_axis::vector ? 4 * 64 : 0;
      for (std::int64_t i = 0; i < strips; ++i) {
        int low = 255, high = 0;
        for (std::int64_t t = first; t < first + 64; ++t)
          for (std::int64_t c = i * strip; c < (i + 1) * strip; ++c) {
            low = std::min(low, codes[x.index(h, t, c)]);
            high = std::max(high, codes[x.index(h, t, c)]);
          }
        bytes += 8 * strip * grouped_test::naive_width(high - low);
      }
    }
  }
  return 8.0 * static_cast<double>(bytes) / static_cast<double>(heads * coded * dim);
}

/// One run on the sample: its bits are `bits`, its errors those of what the sides decode to.
void check_run(const short_sample& sample, const std::string& spec, std::int64_t coded, const double (&bits)[2],
               const std::vector<double> (&decoded)[2]) {
  constexpr std::int64_t sinks = 16, recent = 64;
  std::string json;
  const evaluate::outcome o =
      run(sample.paths, {"--codec", spec, "--device", "cpu", "--sinks", "16", "--recent", "64"}, json);
  INFO(spec << ": " << o.error());
  REQUIRE(o);
  std::map<std::string, double> e;
  packkv_test::naive_errors(sample.k, sample.v, sample.q, decoded, sinks, recent, e);
  const double tokens = static_cast<double>(sample.k.extent[1]), tail = tokens - static_cast<double>(coded);
  const double ring = std::max(0.0, recent + 2 - 1 - tail);
  e["coded_tokens"] = static_cast<double>(coded);
  e["bits_per_value_k"] = bits[0];
  e["bits_per_value_v"] = bits[1];
  e["total_bits_per_value"] =
      ((bits[0] + bits[1]) / 2 * static_cast<double>(coded) + 16.0 * (tail + sinks + ring)) / tokens;  // D_k = D_v
  e["model_bytes"] = 0.0;
  for (const auto& [name, value] : e) {
    INFO(name << ": " << field(json, name) << " and naively " << value);
    CHECK(std::fabs(field(json, name) - value) <= 1e-6 * std::fabs(value));
  }
}

struct grouped_case {
  const char* spec;
  std::int64_t coded;
  pk::grouped_spec key, value;
};

struct adaptive_case {
  const char* spec;
  std::int64_t coded;
  pk::adaptive_spec key, value;
};

codec_choice parsed(const std::string& text) {
  codec_choice c;
  const evaluate::outcome o = evaluate::parse_spec(text, c);
  INFO(text << ": " << o.error());
  REQUIRE(o);
  REQUIRE(c.groups);
  return c;
}

}  // namespace

TEST_CASE("evaluate grouped: the sample's bits and errors are the naive ones", "[grouped]") {
  const short_sample sample;
  const auto spec = [](side which, group_axis axis, int group, int width, step_rule steps = step_rule::min_max,
                       transform_kind transform = plain, bool centred = false) {
    return pk::make_grouped(which, 128, axis, group, width, steps, transform, centred);
  };
  const grouped_case cases[] = {
      {"kivi:bits=2,group=32", 1920, pk::kivi_keys(128, 2), pk::kivi_values(128, 2)},
      {"kivi:bits=4,group=64,recent=0", 2048, pk::kivi_keys(128, 4, 64), pk::kivi_values(128, 4, 64)},
      {"channel:bits=3,tokens=64", 2048, spec(side::key, group_axis::channel, 64, 3),
       spec(side::value, group_axis::vector, 128, 3, step_rule::min_max, hadamard)},
      {"channel:bits=2,bits_v=4,tokens=128,hadamard=0,steps=gaussian_mean,recent=10", 1920,
       spec(side::key, group_axis::channel, 128, 2, step_rule::gaussian_mean),
       spec(side::value, group_axis::vector, 128, 4, step_rule::gaussian_mean)},
      {"token:bits=4,hadamard=1", 2048, spec(side::key, group_axis::token, 0, 4, step_rule::min_max, hadamard),
       spec(side::value, group_axis::token, 0, 4, step_rule::min_max, hadamard)},
      {"vector:bits=4,bits_v=1,hadamard=1,center_k=1,steps=gaussian", 2048,
       spec(side::key, group_axis::vector, 128, 4, step_rule::gaussian, hadamard, true),
       spec(side::value, group_axis::vector, 128, 1, step_rule::gaussian, hadamard)},
      {"vector:bits=8", 2048, spec(side::key, group_axis::vector, 128, 8),
       spec(side::value, group_axis::vector, 128, 8)},
  };
  const grouped_test::tensor16 k = short_tensor(sample.k), v = short_tensor(sample.v);
  for (const grouped_case& c : cases) {
    const int coded = static_cast<int>(c.coded);
    check_run(sample, c.spec, c.coded, {grouped_bits(c.key, 2, c.coded), grouped_bits(c.value, 2, c.coded)},
              {rebuild(c.key, sample.k, c.coded, grouped_test::naive_quantise(c.key, k, coded).y),
               rebuild(c.value, sample.v, c.coded, grouped_test::naive_quantise(c.value, v, coded).y)});
  }
}

TEST_CASE("evaluate strip: the sample's bits and errors are the naive ones", "[adaptive]") {
  const short_sample sample;
  const auto spec = [](side which, group_axis axis, float step, transform_kind transform = plain, bool centred = false,
                       pk::pack_zero zero = pk::pack_zero::floating) {
    return pk::make_adaptive(which, 128, axis, step, transform, centred, zero);
  };
  const adaptive_case cases[] = {
      {"strip:quant=token,r=0.1", 2048, spec(side::key, group_axis::token, 0.1f),
       spec(side::value, group_axis::token, 0.1f)},
      {"strip:quant=channel,r=0.05,recent=64", 1984, spec(side::key, group_axis::channel, 0.05f),
       spec(side::value, group_axis::channel, 0.05f)},
      {"strip:quant_k=channel,quant=vector,r=0.2,r_v=0.1,hadamard=1", 2048, spec(side::key, group_axis::channel, 0.2f),
       spec(side::value, group_axis::vector, 0.1f, hadamard)},
      {"strip:quant=vector,center_k=1,hadamard=1", 2048, spec(side::key, group_axis::vector, 0.1f, hadamard, true),
       spec(side::value, group_axis::vector, 0.1f, hadamard)},
      {"strip:quant=block,r=0.03", 2048, spec(side::key, group_axis::block, 0.03f),
       spec(side::value, group_axis::block, 0.03f)},
      {"strip:quant_k=channel,quant_v=block,zero=int,hadamard=1", 2048,
       spec(side::key, group_axis::channel, 0.1f, plain, false, pk::pack_zero::integer),
       spec(side::value, group_axis::block, 0.1f, hadamard, false, pk::pack_zero::integer)},
      {"strip:zero=int,r=0.05,center_k=1", 2048,
       spec(side::key, group_axis::token, 0.05f, plain, true, pk::pack_zero::integer),
       spec(side::value, group_axis::token, 0.05f, plain, false, pk::pack_zero::integer)},
  };
  const grouped_test::tensor16 k = short_tensor(sample.k), v = short_tensor(sample.v);
  for (const adaptive_case& c : cases) {
    const grouped_test::naive_result key = grouped_test::naive_adaptive(c.key, k, static_cast<int>(c.coded));
    const grouped_test::naive_result value = grouped_test::naive_adaptive(c.value, v, static_cast<int>(c.coded));
    check_run(
        sample, c.spec, c.coded,
        {adaptive_bits(c.key, sample.k, c.coded, key.codes), adaptive_bits(c.value, sample.v, c.coded, value.codes)},
        {rebuild(c.key.groups, sample.k, c.coded, key.y), rebuild(c.value.groups, sample.v, c.coded, value.y)});
  }
}

TEST_CASE("evaluate grouped: the total counts the 16-bit tail, sinks and recent tokens once", "[grouped]") {
  const packkv_test::temporary_folder folder;
  const packkv_test::cache_files f(folder, "", 81, 2, 2, 327, 3, 64, 128);
  const cache_paths paths{f.k_path, f.v_path, f.q_path};
  struct expectation {
    const char* spec;
    double coded;
  };
  for (const expectation& x : {expectation{"kivi", 192}, expectation{"kivi:recent=0", 320},
                               expectation{"channel:tokens=128", 256}, expectation{"channel:tokens=128,recent=72", 128},
                               expectation{"token:center_k=1", 320}, expectation{"strip:recent=8", 256}}) {
    const double tail = 327 - x.coded;
    const auto check = [&](const std::vector<std::string>& rules, double raw) {
      std::vector<std::string> arguments = {"--codec", x.spec};
      arguments.insert(arguments.end(), rules.begin(), rules.end());
      std::string json;
      REQUIRE(run(paths, arguments, json));
      INFO(json);
      const double k = field(json, "bits_per_value_k"), v = field(json, "bits_per_value_v");
      CHECK(field(json, "coded_tokens") == x.coded);
      CHECK(field(json, "tokens") == 327.0);
      const double bits = (x.coded * (64 * k + 128 * v) + raw * 16 * 192) / (327.0 * 192);
      CHECK(std::fabs(field(json, "total_bits_per_value") - bits) < 1e-9);
      CHECK(json.find("\"device\": \"cpu\"") != std::string::npos);
    };
    check({}, tail);
    check({"--sinks", "16", "--recent", "5"}, tail + 16 + std::max(0.0, 7 - tail));  // 5 + 3 - 1 in the ring
    check({"--recent", "150"}, tail + std::max(0.0, 152 - tail));
  }
}

TEST_CASE("evaluate grouped: a cache too short for a block stays 16-bit", "[grouped]") {
  const packkv_test::temporary_folder folder;
  const packkv_test::cache_files f(folder, "", 82, 1, 1, 191, 1, 64, 64);
  for (const char* spec :
       {"kivi", "channel:tokens=128,recent=64", "token:center_k=1,recent=1000", "strip:recent=128"}) {
    std::string json;
    REQUIRE(run({f.k_path, f.v_path, f.q_path}, {"--codec", spec}, json));
    INFO(json);
    CHECK(field(json, "coded_tokens") == 0.0);
    CHECK(field(json, "error_attention") == 0.0);
    for (const char* name : {"bits_per_value_k", "bits_per_value_v", "total_bits_per_value"})
      CHECK(field(json, name) == 16.0);
  }
}

TEST_CASE("evaluate grouped: what the library does not store and the GPU are refused by name", "[grouped]") {
  const packkv_test::temporary_folder folder;
  const packkv_test::cache_files f(folder, "", 83, 1, 1, 256, 1, 128, 96);
  const cache_paths paths{f.k_path, f.v_path, f.q_path};
  std::string json;
  const std::string group = run(paths, {"--codec", "kivi:group=64"}, json).error();  // 64 does not divide 96
  CHECK(group.find("kivi:group=64") != std::string::npos);
  CHECK(group.find("v: ") != std::string::npos);
  CHECK(group.find("divides head_dim") != std::string::npos);
  const std::string step = run(paths, {"--codec", "strip:r_k=0.003"}, json).error();
  CHECK(step.find("strip:r_k=0.003") != std::string::npos);
  CHECK(step.find("8 bits") != std::string::npos);
  for (const char* spec : {"kivi", "channel", "token", "vector", "strip"}) CHECK(run(paths, {"--codec", spec}, json));
}

TEST_CASE("evaluate spec: the grouped formats have documented defaults and take every key", "[grouped]") {
  const evaluate::group_choice kivi = *parsed("kivi").groups;
  CHECK_FALSE(kivi.adaptive);
  CHECK(kivi.recent == 128);
  CHECK(kivi.key.axis == group_axis::channel);
  CHECK(kivi.value.axis == group_axis::vector);
  CHECK(kivi.key.group == 32);
  CHECK(kivi.value.group == 32);
  CHECK(kivi.key.width == 2);
  CHECK(kivi.value.width == 2);
  CHECK_FALSE(kivi.value.hadamard);
  const evaluate::group_choice channel = *parsed("channel:tokens=128,bits_v=2,bits=3,center_k=1").groups;
  CHECK(channel.recent == 0);
  CHECK(channel.key.group == 128);
  CHECK(channel.key.width == 3);
  CHECK(channel.key.centred);
  CHECK_FALSE(channel.key.hadamard);
  CHECK(channel.value.width == 2);
  CHECK(channel.value.hadamard);
  CHECK_FALSE(channel.value.centred);
  CHECK(channel.steps == step_rule::min_max);
  const evaluate::group_choice token = *parsed("token:hadamard=1,steps=gaussian,recent=7").groups;
  CHECK(token.key.axis == group_axis::token);
  CHECK(token.value.axis == group_axis::token);
  CHECK(token.key.width == 4);
  CHECK(token.value.width == 4);
  CHECK(token.key.hadamard);
  CHECK(token.steps == step_rule::gaussian);
  CHECK(token.recent == 7);
  CHECK_FALSE(parsed("vector").groups->value.hadamard);
  const evaluate::group_choice strip = *parsed("strip:r=0.2,quant_v=vector,r_k=0.05").groups;
  CHECK(strip.adaptive);
  CHECK(strip.key.axis == group_axis::token);
  CHECK(strip.value.axis == group_axis::vector);
  CHECK(strip.key.zero == pk::pack_zero::floating);
  CHECK(strip.value.zero == pk::pack_zero::floating);
  const evaluate::group_choice block = *parsed("strip:quant=block,zero=int").groups;
  CHECK(block.key.axis == group_axis::block);
  CHECK(block.value.axis == group_axis::block);
  CHECK(block.key.zero == pk::pack_zero::integer);
  CHECK(block.value.zero == pk::pack_zero::integer);
  CHECK(parsed("strip:zero=float").groups->key.zero == pk::pack_zero::floating);
  CHECK(strip.key.relative_step == 0.05f);
  CHECK(strip.value.relative_step == 0.2f);
}

TEST_CASE("evaluate spec: every mistake in a grouped format is refused", "[grouped]") {
  for (const char* text : {"kivi:",
                           "KIVI",
                           "kivi:bits=0",
                           "kivi:bits=5",
                           "kivi:bits=16",
                           "kivi:bits=02",
                           "kivi:bits=",
                           "kivi:bits=2,bits=2",
                           "kivi:group=16",
                           "kivi:group=0",
                           "kivi:group=032",
                           "kivi:recent=-1",
                           "kivi:recent=1.5",
                           "kivi:tokens=32",
                           "kivi:r=0.1",
                           "channel:tokens=16",
                           "channel:tokens=256",
                           "channel:group=32",
                           "channel:hadamard=2",
                           "channel:hadamard=",
                           "channel:center_k=yes",
                           "channel:steps=best",
                           "channel:bits_v=9",
                           "token:tokens=64",
                           "token:bits=-4",
                           "token:steps",
                           "vector:group=32",
                           "vector:bits=4,",
                           "strip:bits=2",
                           "strip:quant=head",
                           "strip:quant=",
                           "strip:zero=",
                           "strip:zero=none",
                           "strip:zero=int,zero=int",
                           "channel:zero=int",
                           "strip:r=0",
                           "strip:r=1.01",
                           "strip:r=nan",
                           "strip:steps=minmax",
                           "strip:r=0.1,r_k=0.1,r_v=0.2",
                           "strip:quant=token,quant_k=token,quant_v=token",
                           "fp16:bits=2",
                           "packkv:recent=128"}) {
    INFO(text);
    codec_choice c;
    const std::string error = evaluate::parse_spec(text, c).error();
    CHECK(error.find(text) != std::string::npos);
  }
  const std::string list = evaluate::list_codecs();
  for (const char* word :
       {"\nkivi  ", "\nchannel  ", "\ntoken  ", "\nvector  ", "\nstrip  ", "kivi:bits=2,group=32",
        "channel:bits=3,tokens=64", "token:bits=4,hadamard=1", "strip:quant=token,r=0.1", "group=32|64|128",
        "tokens=32|64|128", "bits_v=1|2|3|4|8", "steps=minmax|gaussian|gaussian_mean", "recent=COUNT"})
    CHECK(list.find(word) != std::string::npos);
}
