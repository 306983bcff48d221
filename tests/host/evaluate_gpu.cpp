// SPDX-License-Identifier: Apache-2.0
// evaluate on the GPU, where there is one: formats of whole caches are encoded and attended to there, and the errors
// are those of the CPU.
#include <cmath>
#include <cstdio>
#include <evaluate/gpu.hpp>

#include "../support/catch.hpp"
#include "evaluate_files.hpp"
#include "evaluate_naive.hpp"

using packkv_test::cache_paths;
using packkv_test::field;
using packkv_test::run;

namespace {

/// Errors of a codec on both devices; outputs are floats on the GPU, doubles on the CPU.
void check_both(const cache_paths& paths, std::vector<std::string> arguments) {
  std::string cpu, gpu;
  arguments.insert(arguments.end(), {"--device", "cpu"});
  const evaluate::outcome c = run(paths, arguments, cpu);
  arguments.back() = "gpu";
  const evaluate::outcome g = run(paths, arguments, gpu);
  INFO(arguments[1] << ": " << c.error() << g.error());
  REQUIRE(c);
  REQUIRE(g);
  CHECK(gpu.find("\"device\": \"cpu\"") == std::string::npos);
  for (const char* name : {"error_k", "error_v", "error_attention", "error_attention_max"}) {
    INFO(name << ": " << field(cpu, name) << " on the CPU, " << field(gpu, name) << " on the GPU");
    CHECK(field(cpu, name) > 0.0);
    CHECK(std::fabs(field(cpu, name) - field(gpu, name)) <= 1e-5 + 1e-3 * field(cpu, name));
  }
  for (const char* name : {"bits_per_value_k", "bits_per_value_v", "total_bits_per_value"})
    CHECK(field(cpu, name) == field(gpu, name));
}

bool skipped() {
  std::string reason;
  if (evaluate::gpu_present(reason)) return false;
  std::printf("SKIPPED: %s\n", reason.c_str());
  return true;
}

}  // namespace

TEST_CASE("evaluate: formats of whole caches have the CPU's errors on the GPU", "[gpu]") {
  if (skipped()) return;
  const std::string folder = PACKKV_SAMPLE_DATA;
  const cache_paths sample{folder + "/k.npy", folder + "/v.npy", folder + "/q.npy"};
  for (const char* spec :
       {"kivi:bits=2", "kivi:bits=4", "channel:bits=3,tokens=64", "channel:bits=2,tokens=128,center_k=1",
        "token:bits=4,hadamard=1", "vector:bits=3,steps=gaussian,hadamard=1", "vector:bits=8",
        "strip:quant=token,r=0.1", "strip:quant=channel,r=0.05", "strip:quant=vector,r=0.2,hadamard=1",
        "strip:quant=block,zero=int"}) {
    check_both(sample, {"--codec", spec});
    check_both(sample, {"--codec", spec, "--sinks", "16", "--recent", "150", "--window", "700"});
  }
  for (const char* spec : {"packkv", "packkv:order=none,pack=8,quant=channel", "packkv:order=median,zero=float,pack=32",
                           "packkv:quant=vector,r=0.2,pack=2", "packkv:quant=block,r=0.02,order=none"})
    check_both(sample, {"--codec", spec, "--recent", "64"});
  // Another head dim, a cache without a block, and one with queries of which each sees another tail.
  const packkv_test::temporary_folder temporary;
  for (const int tokens : {100, 777}) {
    const packkv_test::cache_files f(temporary, std::to_string(tokens), 5, 3, 2, tokens, 5, 64, 64);
    const cache_paths paths{f.k_path, f.v_path, f.q_path};
    for (const char* spec : {"packkv", "kivi", "strip", "token:bits=3"})
      if (tokens == 777 || std::string(spec) == "strip" || std::string(spec) == "token:bits=3")
        check_both(paths, {"--codec", spec});
  }
}

TEST_CASE("evaluate: what the GPU has not is refused with --device gpu and done by the CPU with auto", "[gpu]") {
  if (skipped()) return;
  const packkv_test::temporary_folder folder;
  const packkv_test::cache_files f(folder, "", 6, 1, 1, 400, 2, 96, 96);
  const cache_paths paths{f.k_path, f.v_path, f.q_path};
  const std::string sample = PACKKV_SAMPLE_DATA;
  std::string json;
  CHECK(run(paths, {"--codec", "kivi", "--device", "gpu"}, json).error().find("64, 128 and 256") != std::string::npos);
  CHECK(run(paths, {"--codec", "kivi", "--device", "auto"}, json));
  CHECK(json.find("\"device\": \"cpu\"") != std::string::npos);
  const cache_paths caches{sample + "/k.npy", sample + "/v.npy", sample + "/q.npy"};
  CHECK(run(caches, {"--codec", "packkv", "--sinks", "4", "--device", "gpu"}, json).error().find("sinks") !=
        std::string::npos);
  CHECK(run(caches, {"--codec", "packkv", "--sinks", "4", "--device", "auto"}, json));
  CHECK(json.find("\"device\": \"cpu\"") != std::string::npos);
}
