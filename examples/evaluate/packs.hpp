// SPDX-License-Identifier: Apache-2.0
// PackKV in evaluate: the keys of `packkv:...` and the coder behind them.
//   pack_choice p;   parse_pack_value("quant", "token", p);   whole_cache_codec coder;   make_pack_coder(p, cache,
//   coder);
#pragma once

#include <packkv/codec/pack_format.hpp>
#include <set>
#include <string>

#include "whole_cache.hpp"

namespace evaluate {

/// A complete choice without shapes. `format` has the shapes' defaults; the sides' are set where they differ.
struct pack_choice {
  packkv::pack_format format;
  float step = 0.1f, key_step = 0.0f, value_step = 0.0f;  ///< a side's step where > 0, else `step`
  packkv::pack_granularity granularity = packkv::pack_granularity::token;
  bool key_given = false, value_given = false;  ///< quant_k, quant_v
};

/// The value of the key `zero`: int or float.
bool parse_zero(const std::string& text, packkv::pack_zero& zero);
/// Takes one key=value of a SPEC; false if the value is bad.
bool parse_pack_value(const std::string& key, const std::string& value, pack_choice& choice);
/// Keys that contradict each other, or an empty string; fills in both sides.
std::string finish_packs(const std::set<std::string>& given, pack_choice& choice);
/// Meets a choice with the shapes of a cache.
outcome make_pack_coder(const pack_choice& choice, const kv_cache& cache, whole_cache_codec& coder);

}  // namespace evaluate
