// SPDX-License-Identifier: Apache-2.0
// The program without its main(): from arguments to results.
#pragma once

#include <string>
#include <vector>

#include "outcome.hpp"

namespace evaluate {

/// What the program wants to print.
struct program_output {
  std::string standard;     ///< for stdout
  std::string diagnostics;  ///< for stderr: the table, where stdout carries JSON
};

/// Runs the program. On failure nothing has been written to any file.
outcome run_program(const std::vector<std::string>& arguments, program_output& output);

}  // namespace evaluate
