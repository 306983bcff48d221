// SPDX-License-Identifier: Apache-2.0
// The language of --codec and of the command line of examples/evaluate.
#include <evaluate/options.hpp>
#include <evaluate/spec.hpp>

#include "../support/catch.hpp"

using evaluate::codec_choice;
using packkv::codec_kind;
using packkv::transform_kind;

namespace {

codec_choice parsed(const std::string& text) {
  codec_choice c;
  const evaluate::outcome o = evaluate::parse_spec(text, c);
  INFO(text << ": " << o.error());
  REQUIRE(o);
  return c;
}

std::string spec_error(const std::string& text) {
  codec_choice c;
  return evaluate::parse_spec(text, c).error();
}

std::string option_error(std::vector<std::string> extra) {
  std::vector<std::string> arguments = {"--k", "k", "--v", "v", "--q", "q", "--codec", "fp16"};
  arguments.insert(arguments.end(), extra.begin(), extra.end());
  evaluate::options o;
  return evaluate::parse_options(arguments, o).error();
}

}  // namespace

TEST_CASE("evaluate spec: baselines choose both sides") {
  CHECK(parsed("fp16").key.kind == codec_kind::float16);
  CHECK(parsed("bf16").value.kind == codec_kind::bfloat16);
  const codec_choice c = parsed("fp8:v_scale=0.25");
  CHECK(c.key.kind == codec_kind::fp8);
  CHECK(c.key.tensor_scale == 0.0f);
  CHECK(c.value.tensor_scale == 0.25f);
}

TEST_CASE("evaluate spec: a plan has documented defaults and takes every key") {
  const codec_choice d = parsed("plan:k=4.2.1.1,v=2");
  CHECK(d.key.transform == transform_kind::identity);
  CHECK(d.value.transform == transform_kind::hadamard);
  CHECK(d.key.leading == 0);
  CHECK(d.steps == evaluate::step_choice::automatic);
  CHECK(d.key.widths.count == 4);
  CHECK(d.key.widths.width[1] == 2);
  CHECK(d.value.widths.count == 1);
  const codec_choice c =
      parsed("plan:transform_k=permutation,k=8.3,v=2.0,transform_v=identity,leading=4,steps=calibrated");
  CHECK(c.key.transform == transform_kind::permutation);
  CHECK(c.value.transform == transform_kind::identity);
  CHECK(c.key.leading == 4);
  CHECK(c.steps == evaluate::step_choice::calibrated);
  const codec_choice mixed = parsed("plan:k=fp8,v=bf16,k_scale=1e-2");
  CHECK(mixed.key.kind == codec_kind::fp8);
  CHECK(mixed.key.tensor_scale == 1e-2f);
  CHECK(mixed.value.kind == codec_kind::bfloat16);
  CHECK(mixed.value.transform == transform_kind::identity);
}

TEST_CASE("evaluate spec: every mistake is refused") {
  for (const char* text : {"",
                           ":",
                           "fp32",
                           "FP16",
                           " fp16",
                           "fp16 ",
                           "fp16:",
                           "fp16:k=2",
                           "bf16:k_scale=1",
                           "fp8:k_scale=0",
                           "fp8:k_scale=-1",
                           "fp8:k_scale=nan",
                           "fp8:k_scale=inf",
                           "fp8:k_scale=1e99",
                           "fp8:k_scale=",
                           "fp8:k_scale=1x",
                           "fp8:k_scale=0x1",
                           "fp8:k_scale=1,k_scale=1",
                           "plan",
                           "plan:",
                           "plan:k=2",
                           "plan:v=2",
                           "plan:k=2,v=2,",
                           "plan:,k=2,v=2",
                           "plan:k=2,v=2,k=2",
                           "plan:k=5,v=2",
                           "plan:k=9,v=2",
                           "plan:k=-1,v=2",
                           "plan:k=,v=2",
                           "plan:k=2.,v=2",
                           "plan:k=.2,v=2",
                           "plan:k=02,v=2",
                           "plan:k=1.2.1.1,v=2",
                           "plan:k=2,v=2,transform_k=klt",
                           "plan:k=2,v=2,transform=hadamard",
                           "plan:k=2,v=2,leading=5",
                           "plan:k=2,v=2,leading=-1",
                           "plan:k=2,v=2,steps=best",
                           "plan:k=2,v=2,steps",
                           "plan:k=fp16,v=2,leading=1",
                           "plan:k=fp16,v=2,transform_k=hadamard",
                           "plan:k=2,v=fp16,transform_v=hadamard",
                           "plan:k=2,v=2,k_scale=1",
                           "plan:k=2,v=fp32",
                           "plan:k=2,v=2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2.2"}) {
    INFO(text);
    CHECK_FALSE(spec_error(text).empty());
  }
}

TEST_CASE("evaluate spec: the list names every codec and key") {
  const std::string list = evaluate::list_codecs();
  for (const char* word : {"fp16", "bf16", "fp8", "plan", "k_scale", "v_scale", "transform_k", "transform_v", "leading",
                           "center_k", "steps"})
    CHECK(list.find(word) != std::string::npos);
}

TEST_CASE("evaluate options: good values are taken, mistakes are refused") {
  evaluate::options o;
  REQUIRE(evaluate::parse_options(
      {"--k", "a",        "--v", "b",        "--q", "c",       "--codec", "fp16",     "--codec", "fp8",    "--sinks",
       "4",   "--recent", "64",  "--window", "512", "--scale", "0.125",   "--device", "cpu",     "--json", "-"},
      o));
  CHECK(o.cache.q == "c");
  CHECK(o.codecs.size() == 2);
  CHECK(o.sinks == 4);
  CHECK(o.recent == 64);
  CHECK(o.window == 512);
  CHECK(o.scale == 0.125f);
  CHECK(o.json == "-");
  CHECK(option_error({}).empty());
  const std::vector<std::vector<std::string>> mistakes = {{"--bits", "2"},
                                                          {"extra"},
                                                          {"--sinks"},
                                                          {"--sinks", "-1"},
                                                          {"--sinks", "1.5"},
                                                          {"--sinks", "2147483648"},
                                                          {"--recent", ""},
                                                          {"--window", "0"},
                                                          {"--scale", "0"},
                                                          {"--scale", "nan"},
                                                          {"--scale", "-1"},
                                                          {"--scale", "1e-60"},
                                                          {"--k", "again"},
                                                          {"--k", ""},
                                                          {"--device", "tpu"},
                                                          {"--device"},
                                                          {"--json", ""},
                                                          {"--codec", "fp17"},
                                                          {"--codec"},
                                                          {"--k=x"},
                                                          {"--sinks", "1", "--sinks", "1"},
                                                          {"--calibrate-k", "x"},
                                                          {"--calibrate-k", "x", "--calibrate-v", "y"}};
  for (const std::vector<std::string>& extra : mistakes) {
    INFO(extra.front() << " " << extra.back());
    CHECK_FALSE(option_error(extra).empty());
  }
  evaluate::options none;
  CHECK_FALSE(evaluate::parse_options({}, none));
  CHECK_FALSE(evaluate::parse_options({"--k", "a", "--v", "b", "--q", "c"}, none));
  CHECK(evaluate::parse_options({"--help"}, none));
  CHECK(evaluate::parse_options({"--list"}, none));
}

TEST_CASE("evaluate spec: packkv has documented defaults and takes every key") {
  const codec_choice d = parsed("packkv");
  REQUIRE(d.packs);
  for (const packkv::pack_codec& side : {d.packs->format.key, d.packs->format.value}) {
    CHECK(side.granularity == packkv::pack_granularity::token);
    CHECK(side.zero == packkv::pack_zero::integer);
    CHECK(side.relative_step == 0.1f);
  }
  CHECK(d.packs->format.order == packkv::token_order::greedy);
  CHECK(d.packs->format.pack_size == 16);
  const codec_choice c = parsed("packkv:pack=4,order=median,zero=float,r_v=0.05,r=0.2,quant=vector,quant_k=channel");
  CHECK(c.packs->format.pack_size == 4);
  CHECK(c.packs->format.order == packkv::token_order::median);
  CHECK(c.packs->format.key.zero == packkv::pack_zero::floating);
  CHECK(c.packs->format.value.zero == packkv::pack_zero::floating);
  CHECK(c.packs->format.key.relative_step == 0.2f);
  CHECK(c.packs->format.value.relative_step == 0.05f);
  CHECK(c.packs->format.key.granularity == packkv::pack_granularity::channel);
  CHECK(c.packs->format.value.granularity == packkv::pack_granularity::vector);
  CHECK_FALSE(parsed("plan:k=2,v=2").packs);
  for (const char* text : {"packkv:",
                           "packkv:quant=head",
                           "packkv:quant=",
                           "packkv:r=0",
                           "packkv:r=-0.1",
                           "packkv:r=1.01",
                           "packkv:r=nan",
                           "packkv:r_k=",
                           "packkv:zero=integer",
                           "packkv:order=random",
                           "packkv:pack=1",
                           "packkv:pack=64",
                           "packkv:pack=12",
                           "packkv:pack=016x",
                           "packkv:bits=2",
                           "packkv:k=2",
                           "packkv:r=0.1,r=0.1",
                           "packkv:r=0.1,r_k=0.1,r_v=0.2",
                           "packkv:quant=token,quant_k=token,quant_v=token",
                           "fp16:r=0.1",
                           "plan:k=2,v=2,r=0.1"}) {
    INFO(text);
    CHECK_FALSE(spec_error(text).empty());
  }
  const std::string list = evaluate::list_codecs();
  for (const char* word : {"packkv", "quant=token|vector|channel|block", "r_k", "zero=int|float",
                           "order=none|median|greedy", "pack=2|4|8|16|32"})
    CHECK(list.find(word) != std::string::npos);
}
