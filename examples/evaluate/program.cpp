// SPDX-License-Identifier: Apache-2.0
// The steps of the program: options, files, codecs, results, reports.
#include "program.hpp"

#include <algorithm>
#include <cmath>

#include "cache.hpp"
#include "coding.hpp"
#include "evaluation.hpp"
#include "gpu.hpp"
#include "json.hpp"
#include "options.hpp"
#include "parallel.hpp"
#include "report.hpp"

namespace evaluate {
namespace {

attention_rules rules_of(const options& o, const kv_cache& cache) {
  // More sinks or recent tokens than tokens mean all of them; clamped, they are counted once.
  const auto at_most_tokens = [&](std::int32_t n) {
    return static_cast<std::int32_t>(std::min<std::int64_t>(n, cache.tokens()));
  };
  attention_rules rules;
  rules.scale = o.scale > 0.0f ? o.scale : static_cast<float>(1.0 / std::sqrt(static_cast<double>(cache.key_dim())));
  rules.window = o.window;
  rules.sinks = at_most_tokens(o.sinks);
  rules.recent = at_most_tokens(o.recent);
  return rules;
}

outcome choose_device(device_choice choice, evaluator& e) {
  if (choice == device_choice::cpu) return {};
  std::string name_or_reason;
  if (gpu_present(name_or_reason))
    e.use_gpu(name_or_reason, choice == device_choice::gpu);
  else if (choice == device_choice::gpu)
    return failure("--device gpu: " + name_or_reason);
  return {};
}

outcome evaluate_all(const options& o, const kv_cache& cache, const kv_cache* calibration, program_output& output) {
  const int threads = hardware_threads();
  const attention_rules rules = rules_of(o, cache);
  evaluator e(cache, rules, threads);
  if (outcome s = choose_device(o.device, e); !s) return s;
  std::vector<coding> codecs(o.codecs.size());
  for (std::size_t i = 0; i < codecs.size(); ++i)  // all of them first: a mistake in the last SPEC is found at once
    if (outcome s = make_coding(o.codecs[i], cache, calibration, threads, codecs[i]); !s) return s;
  std::vector<result> results(codecs.size());
  for (std::size_t i = 0; i < codecs.size(); ++i)
    if (outcome s = e.run(codecs[i], results[i]); !s) return s;

  const std::string table = to_table(cache, rules, results);
  (o.json == "-" ? output.diagnostics : output.standard) = table;
  if (o.json == "-")
    output.standard = to_json(results);
  else if (!o.json.empty())
    return write_file(o.json, to_json(results));
  return {};
}

}  // namespace

outcome run_program(const std::vector<std::string>& arguments, program_output& output) {
  options o;
  if (outcome s = parse_options(arguments, o); !s) return s;
  if (o.help || o.list) {
    output.standard = o.help ? help_text() : list_codecs();
    return {};
  }
  if (!o.json.empty() && o.json != "-")
    if (outcome s = check_writable(o.json); !s) return s;
  kv_cache cache, calibration;
  if (outcome s = load_cache(o.cache.k, o.cache.v, o.cache.q, cache); !s) return s;
  if (o.calibration.all()) {
    if (outcome s = load_cache(o.calibration.k, o.calibration.v, o.calibration.q, calibration); !s) return s;
    if (outcome s = check_calibration(cache, calibration); !s) return s;
  }
  return evaluate_all(o, cache, o.calibration.all() ? &calibration : nullptr, output);
}

}  // namespace evaluate
