// SPDX-License-Identifier: Apache-2.0
// The grouped and strip-adaptive formats in evaluate: the keys of `kivi`, `channel`, `token`, `vector` and `strip`, and
// the coder behind them.
//   group_choice g = default_groups("kivi");   parse_group_value("bits", "2", g);   finish_groups(given, g);
//   whole_cache_codec coder;   make_group_coder(g, cache, coder);
#pragma once

#include <packkv/codec/strip_adaptive.hpp>
#include <set>
#include <string>

#include "whole_cache.hpp"

namespace evaluate {

/// How one side is grouped and coded, without its shape.
struct group_side {
  packkv::group_axis axis = packkv::group_axis::vector;
  int group = 0;               ///< tokens or channels of a group; vector: 0 means the whole vector
  int width = 0;               ///< bits of a code; strip: unused
  float relative_step = 0.0f;  ///< strip
  packkv::pack_zero zero = packkv::pack_zero::floating;  ///< strip
  bool hadamard = false;
  bool centred = false;
};

/// A complete choice without shapes; the sides are complete after finish_groups.
struct group_choice {
  bool adaptive = false;  ///< strip
  group_side key, value;
  packkv::step_rule steps = packkv::step_rule::min_max;
  std::int32_t recent = 0;                                ///< the newest tokens that stay 16-bit, at least
  std::int32_t bits = 4, value_bits = 0;                  ///< V's where > 0, else `bits`
  float step = 0.1f, key_step = 0.0f, value_step = 0.0f;  ///< a side's step where > 0, else `step`
  packkv::group_axis axis = packkv::group_axis::token;    ///< strip's quant
  packkv::pack_zero zero = packkv::pack_zero::floating;   ///< strip's, of both sides
  bool key_given = false, value_given = false;            ///< quant_k, quant_v
  bool hadamard = false;
};

/// What holds when a SPEC of this name has no keys.
group_choice default_groups(const std::string& name);
/// Takes one key=value of a SPEC; false if the value is bad.
bool parse_group_value(const std::string& key, const std::string& value, group_choice& choice);
/// Keys that contradict each other, or an empty string; fills in both sides.
std::string finish_groups(const std::set<std::string>& given, group_choice& choice);
/// Meets a choice with the shapes of a cache.
outcome make_group_coder(const group_choice& choice, const kv_cache& cache, whole_cache_codec& coder);

}  // namespace evaluate
