// SPDX-License-Identifier: Apache-2.0
// The numbers of examples/evaluate against loops written here: no streaming, no online softmax, no blocks.
#include <cmath>
#include <cstdlib>

#include <evaluate/evaluation.hpp>
#include <evaluate/program.hpp>
#include <packkv/reference/tile.hpp>

#include "../support/catch.hpp"
#include "evaluate_files.hpp"

using packkv_test::cache_files;
using packkv_test::tensor;

namespace {

/// The number behind `"field": ` in the nth object of a JSON text of evaluate.
double json_field(const std::string& text, const std::string& field, int object = 0) {
  std::size_t at = 0;
  for (int i = 0; i <= object; ++i) at = text.find('{', at) + 1;
  at = text.find("\"" + field + "\": ", at);
  REQUIRE(at != std::string::npos);
  return std::strtod(text.c_str() + at + field.size() + 4, nullptr);
}

std::string run_json(std::vector<std::string> arguments, const std::vector<std::string>& extra) {
  arguments.insert(arguments.end(), extra.begin(), extra.end());
  arguments.insert(arguments.end(), {"--device", "cpu", "--json", "-"});
  evaluate::program_output output;
  const evaluate::outcome o = evaluate::run_program(arguments, output);
  INFO(o.error());
  REQUIRE(o);
  CHECK(output.diagnostics.find("bits K") != std::string::npos);
  return output.standard;
}

struct attention_case {
  double scale;
  std::int64_t window = 1 << 30, sinks = 0, recent = 0;
};

using doubles = std::vector<double>;

doubles as_doubles(const tensor& x) {
  doubles y;
  for (const std::uint16_t bits : x.bits) y.push_back(static_cast<double>(packkv::half_to_float(bits)));
  return y;
}

/// Every token through a tile of its own and back.
doubles coded(const packkv::codec_spec& spec, const tensor& x) {
  const packkv::detail::head_parameters defaults{nullptr, nullptr, nullptr, 1.0f};
  doubles y;
  for (std::int64_t h = 0; h < x.extent[0]; ++h)
    for (std::int64_t t = 0; t < x.extent[1]; ++t) {
      std::vector<float> token(static_cast<std::size_t>(x.extent[2]));
      for (std::int64_t c = 0; c < x.extent[2]; ++c)
        token[static_cast<std::size_t>(c)] = static_cast<float>(x.at(h, t, c));
      std::vector<std::uint32_t> tile(static_cast<std::size_t>(spec.tile_bytes()) / 4);
      auto* bytes = reinterpret_cast<std::uint8_t*>(tile.data());
      packkv::device_report report;
      packkv::reference::encode_token(spec, defaults, token.data(), static_cast<int>(t % 64), bytes, report);
      packkv::reference::decode_token(spec, defaults, bytes, static_cast<int>(t % 64), token.data());
      y.insert(y.end(), token.begin(), token.end());
    }
  return y;
}

/// Attention of query i of head h, tokens within reach of `sinks` and `recent` taken from the exact arrays.
doubles attend(const cache_files& f, const doubles& keys, const doubles& values, std::int64_t h, std::int64_t i,
               const attention_case& a) {
  const std::int64_t tokens = f.k.extent[1], position = tokens - f.q.extent[1] + i,
                     kv = h / (f.q.extent[0] / f.k.extent[0]);
  doubles scores, out(static_cast<std::size_t>(f.v.extent[2]), 0.0);
  double largest = -1e300, total = 0.0;
  const auto visible = [&](std::int64_t t) { return t <= position && t > position - a.window; };
  const auto raw = [&](std::int64_t t) { return t < a.sinks || t > position - a.recent; };
  for (std::int64_t t = 0; t < tokens; ++t) {
    double s = 0.0;
    for (std::int64_t c = 0; c < f.k.extent[2]; ++c)
      s += f.q.at(h, i, c) * (raw(t) ? f.k.at(kv, t, c) : keys[f.k.index(kv, t, c)]);
    scores.push_back(a.scale * s);
    if (visible(t)) largest = std::max(largest, scores.back());
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    const double p = visible(t) ? std::exp(scores[static_cast<std::size_t>(t)] - largest) : 0.0;
    total += p;
    for (std::int64_t c = 0; c < f.v.extent[2]; ++c)
      out[static_cast<std::size_t>(c)] += p * (raw(t) ? f.v.at(kv, t, c) : values[f.v.index(kv, t, c)]);
  }
  for (double& x : out) x /= total;
  return out;
}

struct errors {
  double mean = 0.0, maximum = 0.0;
};

errors naive_errors(const cache_files& f, const doubles& keys, const doubles& values, const attention_case& a) {
  const doubles exact_keys = as_doubles(f.k), exact_values = as_doubles(f.v);
  errors e;
  for (std::int64_t h = 0; h < f.q.extent[0]; ++h)
    for (std::int64_t i = 0; i < f.q.extent[1]; ++i) {
      const doubles reference = attend(f, exact_keys, exact_values, h, i, a), o = attend(f, keys, values, h, i, a);
      double difference = 0.0, norm = 0.0;
      for (std::size_t c = 0; c < o.size(); ++c) {
        difference += (o[c] - reference[c]) * (o[c] - reference[c]);
        norm += reference[c] * reference[c];
      }
      const double error = std::sqrt(difference / norm);
      e.mean += error / static_cast<double>(f.q.extent[0] * f.q.extent[1]);
      e.maximum = std::max(e.maximum, error);
    }
  return e;
}

bool close(double a, double b) { return std::fabs(a - b) <= 1e-9 * std::fabs(b); }

packkv::codec_spec plan_of(packkv::side which, int head_dim, packkv::transform_kind transform, int width) {
  packkv::strip_widths widths;
  widths.count = head_dim / packkv::strip_channels(which, head_dim);
  for (int i = 0; i < widths.count; ++i) widths.width[i] = static_cast<std::uint8_t>(width);
  return packkv::make_plan_codec(which, head_dim, transform, widths);
}

void check_errors(const std::string& json, const cache_files& f, const packkv::codec_spec& key,
                  const packkv::codec_spec& value, const attention_case& a, int object = 0) {
  const doubles k = coded(key, f.k), v = coded(value, f.v), exact_k = as_doubles(f.k), exact_v = as_doubles(f.v);
  CHECK(close(json_field(json, "error_k", object), naive_errors(f, k, exact_v, a).mean));
  CHECK(close(json_field(json, "error_v", object), naive_errors(f, exact_k, v, a).mean));
  const errors both = naive_errors(f, k, v, a);
  CHECK(close(json_field(json, "error_attention", object), both.mean));
  CHECK(close(json_field(json, "error_attention_max", object), both.maximum));
}

}  // namespace

TEST_CASE("evaluate result: errors of a plan and of bfloat16 match a naive loop") {
  const packkv_test::temporary_folder folder;
  const cache_files f(folder, "", 11, 2, 3, 150, 5, 64, 96);
  const packkv::codec_spec key = plan_of(packkv::side::key, 64, packkv::transform_kind::identity, 3);
  const packkv::codec_spec value = plan_of(packkv::side::value, 96, packkv::transform_kind::hadamard, 2);
  const packkv::codec_spec bf16_key = packkv::make_element_codec(packkv::codec_kind::bfloat16, 64);
  const packkv::codec_spec bf16_value = packkv::make_element_codec(packkv::codec_kind::bfloat16, 96);
  const double scale = static_cast<double>(static_cast<float>(0.125));
  const std::string plain = run_json(f.arguments(), {"--codec", "plan:k=3,v=2", "--codec", "bf16"});
  check_errors(plain, f, key, value, {scale}, 0);
  check_errors(plain, f, bf16_key, bf16_value, {scale}, 1);

  const std::string overlaid =
      run_json(f.arguments(), {"--codec", "plan:k=3,v=2", "--sinks", "3", "--recent", "20", "--scale", "0.25"});
  check_errors(overlaid, f, key, value, {0.25, 1 << 30, 3, 20});
  const std::string windowed =
      run_json(f.arguments(), {"--codec", "plan:k=3,v=2", "--sinks", "70", "--recent", "1", "--window", "90"});
  check_errors(windowed, f, key, value, {scale, 90, 70, 1});
  CHECK(json_field(run_json(f.arguments(), {"--codec", "plan:k=1,v=1", "--window", "1", "--recent", "1"}),
                   "error_attention_max") == 0.0);
}

TEST_CASE("evaluate result: as many queries as tokens, in more than one block of rows") {
  const packkv_test::temporary_folder folder;
  const cache_files f(folder, "", 12, 1, 3, 70, 70, 96, 64);
  const std::string json =
      run_json(f.arguments(), {"--codec", "plan:k=2,v=4,transform_k=hadamard,transform_v=identity", "--recent", "4"});
  check_errors(json, f, plan_of(packkv::side::key, 96, packkv::transform_kind::hadamard, 2),
               plan_of(packkv::side::value, 64, packkv::transform_kind::identity, 4),
               {static_cast<double>(static_cast<float>(1.0 / std::sqrt(96.0))), 1 << 30, 0, 4});
}

TEST_CASE("evaluate result: fp16 has no error at all") {
  const packkv_test::temporary_folder folder;
  for (const std::int64_t tokens : {1, 63, 64, 65, 700}) {
    const cache_files f(folder, "", 13, 1, 2, tokens, 1, 64, 64);
    const std::string json =
        run_json(f.arguments(), {"--codec", "fp16", "--codec", "plan:k=fp16,v=fp16", "--sinks", "2"});
    for (int object = 0; object < 2; ++object)
      for (const char* field : {"error_k", "error_v", "error_attention", "error_attention_max"})
        CHECK(json_field(json, field, object) == 0.0);
  }
}

TEST_CASE("evaluate result: an all-zero cache has no error and valid numbers") {
  const packkv_test::temporary_folder folder;
  cache_files f(folder, "", 14, 1, 1, 65, 2, 64, 64);
  for (tensor* x : {&f.k, &f.v, &f.q}) x->bits.assign(x->bits.size(), 0);
  folder.write("k.npy", f.k.npy()), folder.write("v.npy", f.v.npy()), folder.write("q.npy", f.q.npy());
  std::vector<std::string> all = {"--codec", "fp8", "--codec", "plan:k=2,v=2,leading=2,transform_k=permutation"};
  const std::vector<std::string> calibration = f.arguments("--calibrate-");
  all.insert(all.end(), calibration.begin(), calibration.end());
  const std::string json = run_json(f.arguments(), all);
  CHECK(json_field(json, "error_attention_max", 0) == 0.0);
  CHECK(json_field(json, "error_attention_max", 1) == 0.0);
}

TEST_CASE("evaluate result: bytes are counted as documented") {
  const packkv_test::temporary_folder folder;
  const cache_files f(folder, "", 15, 2, 2, 150, 5, 128, 64);  // 3 tiles
  std::vector<std::string> extra = {
      "--codec", "plan:k=4.2.1.1,v=2,leading=1,transform_k=permutation", "--codec", "fp8", "--sinks", "16", "--recent",
      "30"};
  const std::vector<std::string> calibration = f.arguments("--calibrate-");
  extra.insert(extra.end(), calibration.begin(), calibration.end());
  const std::string json = run_json(f.arguments(), extra);
  const double key_tile = 64 * (4 + 2 + 1 + 1) * 32 / 8 + 64 * 2 + 64, value_tile = 64 * 64 * 2 / 8 + 64 * 2;
  const double raw = (16 + 30 + 5 - 1) * 2.0 * (128 + 64);
  CHECK(json_field(json, "tokens") == 150);
  CHECK(json_field(json, "coded_tokens") == 150);
  CHECK(close(json_field(json, "bits_per_value_k"), 8 * 3 * key_tile / (150 * 128)));
  CHECK(close(json_field(json, "bits_per_value_v"), 8 * 3 * value_tile / (150 * 64)));
  CHECK(close(json_field(json, "total_bits_per_value"), 8 * (3 * (key_tile + value_tile) + raw) / (150 * 192)));
  CHECK(json_field(json, "model_bytes") == 2 * (128 * 4 + 128 * 2 + 1 * 4 + 64 * 4));
  CHECK(close(json_field(json, "total_bits_per_value", 1), 8 * (192.0 * 192 + raw) / (150 * 192)));
  CHECK(json_field(json, "model_bytes", 1) == 0);
  CHECK(json.find("\"device\": \"cpu\"") != std::string::npos);
}

TEST_CASE("evaluate result: the number of threads changes no bit") {
  const packkv_test::temporary_folder folder;
  const cache_files f(folder, "", 16, 2, 2, 1700, 3, 64, 64);
  evaluate::kv_cache cache;
  REQUIRE(evaluate::load_cache(f.k_path, f.v_path, f.q_path, cache));
  evaluate::codec_choice choice;
  REQUIRE(evaluate::parse_spec("plan:k=2,v=2,leading=2", choice));
  const evaluate::attention_rules rules{0.125f, 1600, 4, 50};
  evaluate::result first;
  for (const int threads : {1, 2, 3, 8}) {
    evaluate::coding codec;
    REQUIRE(evaluate::make_coding(choice, cache, &cache, threads, codec));
    evaluate::evaluator e(cache, rules, threads);
    evaluate::result r;
    REQUIRE(e.run(codec, r));
    if (threads == 1) first = r;
    CHECK(r.error_k == first.error_k);
    CHECK(r.error_v == first.error_v);
    CHECK(r.error_attention == first.error_attention);
    CHECK(r.error_attention_max == first.error_attention_max);
    CHECK(r.leading_clamps == first.leading_clamps);
  }
}

TEST_CASE("evaluate result: extreme FP8 scales lose everything, but the numbers stay finite") {
  const packkv_test::temporary_folder folder;
  const cache_files f(folder, "", 17, 1, 1, 64, 1, 64, 64);
  const std::string json = run_json(f.arguments(), {"--codec", "fp8:v_scale=3e38", "--codec", "fp8:v_scale=1e-38"});
  CHECK(json_field(json, "error_v", 0) == 1.0);
  CHECK(close(json_field(json, "error_v", 1), 1.0));
}

TEST_CASE("evaluate result: a row scale out of range is an error, not a NaN in the JSON") {
  const packkv_test::temporary_folder folder;
  cache_files f(folder, "", 18, 1, 1, 64, 1, 64, 64);
  // Rotated, all energy of such a token lies behind the leading component: its RMS is 65504 * sqrt(64 / 63).
  for (std::size_t i = 0; i < f.k.bits.size(); ++i) f.k.bits[i] = i % 2 == 0 ? 0x7bff : 0xfbff;
  folder.write("k.npy", f.k.npy());
  std::vector<std::string> arguments = f.arguments();
  for (const std::string& a : f.arguments("--calibrate-")) arguments.push_back(a);
  for (const char* a : {"--device", "cpu", "--codec", "plan:k=2,v=2,transform_k=hadamard,leading=1"})
    arguments.push_back(a);
  evaluate::program_output output;
  CHECK_FALSE(evaluate::run_program(arguments, output));
  CHECK(output.standard.empty());
}
