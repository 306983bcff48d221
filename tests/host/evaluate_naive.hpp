// SPDX-License-Identifier: Apache-2.0
// What the tests of evaluate's formats of whole caches share: runs of the program, and its errors by plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <evaluate/npy.hpp>
#include <evaluate/program.hpp>
#include <map>
#include <string>
#include <vector>

#include "../support/catch.hpp"
#include "evaluate_files.hpp"

namespace packkv_test {

struct cache_paths {
  std::string k, v, q;
  std::vector<std::string> arguments() const { return {"--k", k, "--v", v, "--q", q}; }
};

inline tensor load(const std::string& path) {
  evaluate::npy_array a;
  REQUIRE(evaluate::npy_array::open(path, a));
  return {{a.extent(0), a.extent(1), a.extent(2)}, std::vector<std::uint16_t>(a.data(), a.data() + a.elements())};
}

inline evaluate::outcome run(const cache_paths& paths, const std::vector<std::string>& extra, std::string& json) {
  std::vector<std::string> arguments = paths.arguments();
  arguments.insert(arguments.end(), extra.begin(), extra.end());
  if (std::find(extra.begin(), extra.end(), "--device") == extra.end())
    arguments.insert(arguments.end(), {"--device", "cpu"});  // whose figures are the same on every machine
  arguments.insert(arguments.end(), {"--json", "-"});
  evaluate::program_output output;
  evaluate::outcome o = evaluate::run_program(arguments, output);
  json = output.standard;
  return o;
}

inline double field(const std::string& json, const std::string& name) {
  const std::size_t at = json.find("\"" + name + "\": ");
  INFO(name << " in " << json);
  REQUIRE(at != std::string::npos);
  return std::strtod(json.c_str() + at + name.size() + 4, nullptr);
}

/// Adds error_k, error_v and error_attention of a cache that decodes to coded[0] and coded[1], [heads, tokens, D].
inline void naive_errors(const tensor& k, const tensor& v, const tensor& q, const std::vector<double> (&coded)[2],
                         std::int64_t sinks, std::int64_t recent, std::map<std::string, double>& e) {
  const std::int64_t heads = k.extent[0], tokens = k.extent[1], n = q.extent[1], group = q.extent[0] / heads;
  const double scale = static_cast<double>(static_cast<float>(1.0 / std::sqrt(static_cast<double>(k.extent[2]))));
  const char* names[] = {"", "error_k", "error_v", "error_attention"};
  for (std::int64_t h = 0; h < q.extent[0]; ++h)
    for (std::int64_t i = 0; i < n; ++i) {
      std::vector<double> out[4];
      for (int kind = 0; kind < 4; ++kind) {
        const std::int64_t position = tokens - n + i;
        std::vector<double> scores;
        double largest = -1e300, total = 0.0;
        const auto raw = [&](std::int64_t t) { return t < sinks || (recent > 0 && t > position - recent); };
        for (std::int64_t t = 0; t <= position; ++t) {
          double sum = 0.0;
          for (std::int64_t c = 0; c < k.extent[2]; ++c)
            sum += q.at(h, i, c) *
                   ((kind & 1) != 0 && !raw(t) ? coded[0][k.index(h / group, t, c)] : k.at(h / group, t, c));
          scores.push_back(scale * sum);
          largest = std::max(largest, scores.back());
        }
        out[kind].assign(static_cast<std::size_t>(v.extent[2]), 0.0);
        for (std::int64_t t = 0; t <= position; ++t) {
          const double w = std::exp(scores[static_cast<std::size_t>(t)] - largest);
          total += w;
          for (std::int64_t c = 0; c < v.extent[2]; ++c)
            out[kind][static_cast<std::size_t>(c)] +=
                w * ((kind & 2) != 0 && !raw(t) ? coded[1][v.index(h / group, t, c)] : v.at(h / group, t, c));
        }
        for (double& y : out[kind]) y /= total;
      }
      for (int kind = 1; kind < 4; ++kind) {
        double difference = 0.0, norm = 0.0;
        for (std::size_t c = 0; c < out[0].size(); ++c) {
          difference += (out[kind][c] - out[0][c]) * (out[kind][c] - out[0][c]);
          norm += out[0][c] * out[0][c];
        }
        e[names[kind]] += std::sqrt(difference / norm) / static_cast<double>(q.extent[0] * n);
      }
    }
}

}  // namespace packkv_test
