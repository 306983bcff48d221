// SPDX-License-Identifier: Apache-2.0
// The command line of `evaluate`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "outcome.hpp"
#include "spec.hpp"

namespace evaluate {

/// A set of three files.
struct cache_paths {
  std::string k, v, q;
  bool any() const { return !k.empty() || !v.empty() || !q.empty(); }
  bool all() const { return !k.empty() && !v.empty() && !q.empty(); }
};

enum class device_choice { automatic, cpu, gpu };

struct options {
  bool help = false, list = false;
  cache_paths cache, calibration;
  std::vector<codec_choice> codecs;
  float scale = 0.0f;       ///< 0: 1/sqrt(D_k)
  std::int32_t window = 0;  ///< 0: none
  std::int32_t sinks = 0, recent = 0;
  device_choice device = device_choice::automatic;
  std::string json;  ///< empty: none, "-": stdout
};

/// Parses the arguments behind the program's name. With --help or --list nothing else is required.
outcome parse_options(const std::vector<std::string>& arguments, options& o);

/// The text of --help.
std::string help_text();

}  // namespace evaluate
