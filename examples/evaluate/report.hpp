// SPDX-License-Identifier: Apache-2.0
// Results as JSON for programs and as a table for people.
#pragma once

#include <string>
#include <vector>

#include "evaluation.hpp"

namespace evaluate {

/// A JSON array of one object per result, fields as in struct result.
std::string to_json(const std::vector<result>& results);
/// A table with a heading that says what was measured, and on which device.
std::string to_table(const kv_cache& cache, const attention_rules& rules, const std::vector<result>& results);

}  // namespace evaluate
