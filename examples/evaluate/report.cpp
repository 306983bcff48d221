// SPDX-License-Identifier: Apache-2.0
// The two forms of a result.
#include "report.hpp"

#include <algorithm>
#include <cstdio>

#include "json.hpp"

namespace evaluate {
namespace {

template <class... Values>
std::string format(const char* pattern, Values... values) {
  char line[256];
  std::snprintf(line, sizeof line, pattern, values...);
  return line;
}

std::string padded(const std::string& text, std::size_t width) {
  return text + std::string(width > text.size() ? width - text.size() : 0, ' ');
}

/// An error as percent with three digits.
std::string percent(double error) {
  const double p = 100.0 * error;
  if (p == 0.0) return "0 %";
  if (p < 0.001) return format("%.0e %%", p);
  return format(p < 1.0 ? "%.3f %%" : p < 10.0 ? "%.2f %%" : "%.1f %%", p);
}

/// The devices of all results, each once, in order of their first result.
std::string devices(const std::vector<result>& results) {
  std::vector<std::string> names;
  for (const result& r : results)
    if (std::find(names.begin(), names.end(), r.device) == names.end()) names.push_back(r.device);
  std::string text = names.front();
  for (std::size_t i = 1; i < names.size(); ++i) text += " or " + names[i];
  return text;
}

}  // namespace

std::string to_json(const std::vector<result>& results) {
  std::string text = "[";
  for (const result& r : results) {
    json_object o;
    o.add("codec", r.codec);
    o.add("tokens", r.tokens);
    o.add("coded_tokens", r.coded_tokens);
    o.add("bits_per_value_k", r.bits_per_value_k);
    o.add("bits_per_value_v", r.bits_per_value_v);
    o.add("total_bits_per_value", r.total_bits_per_value);
    o.add("model_bytes", r.model_bytes);
    o.add("error_k", r.error_k);
    o.add("error_v", r.error_v);
    o.add("error_attention", r.error_attention);
    o.add("error_attention_max", r.error_attention_max);
    o.add("leading_clamps", static_cast<std::int64_t>(r.leading_clamps));
    for (const auto& [name, value] : r.figures) o.add(name, value);
    o.add("device", r.device);
    text += (text.size() > 1 ? ",\n " : "\n ") + o.str();
  }
  return text + "\n]\n";
}

std::string to_table(const kv_cache& cache, const attention_rules& rules, const std::vector<result>& results) {
  std::string text = format("%lld tokens, %d KV heads x %d (K) and %d (V) channels, %d query heads x %lld queries",
                            static_cast<long long>(cache.tokens()), cache.kv_heads(), cache.key_dim(),
                            cache.value_dim(), cache.query_heads(), static_cast<long long>(cache.queries()));
  if (rules.window > 0) text += format(", window %d", static_cast<int>(rules.window));
  text += format("; %d sinks and %d recent tokens in 16 bits", static_cast<int>(rules.sinks),
                 static_cast<int>(rules.recent));
  text += results.empty()
              ? "\n\n"
              : "\nattention on coded tiles: " + devices(results) + "; reference: cpu, double precision\n\n";

  std::size_t width = 5;
  for (const result& r : results) width = std::max(width, r.codec.size());
  text += padded("codec", width) + format(" %7s %7s %7s %7s %10s %10s %10s %10s\n", "bits K", "bits V", "total",
                                          "ratio", "error K", "error V", "error", "maximum");
  for (const result& r : results)
    text += padded(r.codec, width) + format(" %7.3f %7.3f %7.3f %6.2fx %10s %10s %10s %10s\n", r.bits_per_value_k,
                                            r.bits_per_value_v, r.total_bits_per_value, 16.0 / r.total_bits_per_value,
                                            percent(r.error_k).c_str(), percent(r.error_v).c_str(),
                                            percent(r.error_attention).c_str(), percent(r.error_attention_max).c_str());
  text +=
      "\nbits: stored bits per value (total with sinks and recent tokens); ratio: against 16 bits; error: mean over "
      "heads and\n"
      "queries of |o - o_ref| / |o_ref|, only K coded, only V coded, both (mean and maximum)\n";
  for (const result& r : results)
    if (r.leading_clamps > 0)
      text += r.codec + ": " + std::to_string(r.leading_clamps) + " leading components beyond 4 sigma were clamped\n";
  return text;
}

}  // namespace evaluate
