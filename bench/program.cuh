// SPDX-License-Identifier: Apache-2.0
// What a benchmark program of measured cases is but for its cases: registration, and main().
//   int main(int argc, char** argv) { return run_program(argc, argv, [] { add("name", [] { return measured{...}; });
//   }); }
#pragma once

#include "report.cuh"

struct program_state {
  timing::stopwatch* watch = nullptr;
  int sms = 0;
  std::vector<measured> results;
};
inline program_state program;

/// Registers what returns a `measured`.
template <class F>
void add(const std::string& name, F&& f) {
  benchmark::RegisterBenchmark(name.c_str(),
                               [=](benchmark::State& state) {
                                 measured m;
                                 for (auto _ : state) {
                                   m = f();
                                   state.SetIterationTime(m.graph.median * 1e-3);
                                 }
                                 m.name = name;
                                 to_counters(m, state);
                                 program.results.push_back(m);
                               })
      ->Iterations(1)
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

/// Runs the cases that add_cases registers, and prints a table at the end.
template <class AddCases>
int run_program(int argc, char** argv, AddCases&& add_cases) {
  bool lists = false;
  for (int i = 1; i < argc; ++i) lists = lists || std::string(argv[i]).rfind("--benchmark_list_tests", 0) == 0;
  add_cases();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  std::unique_ptr<timing::stopwatch> watch;
  if (!lists) {
    cudaDeviceProp device{};
    int driver = 0, runtime = 0;
    require(cudaGetDeviceProperties(&device, 0));
    require(cudaDriverGetVersion(&driver));
    require(cudaRuntimeGetVersion(&runtime));
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    benchmark::AddCustomContext("device", device.name);
    benchmark::AddCustomContext("cuda", "driver " + version(driver) + ", runtime " + version(runtime));
    watch = std::make_unique<timing::stopwatch>();
    program.watch = watch.get();
    program.sms = device.multiProcessorCount;
  }
  benchmark::RunSpecifiedBenchmarks();
  print_table(program.results);
  return 0;
}
