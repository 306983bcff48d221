// SPDX-License-Identifier: Apache-2.0
// evaluate: the researcher's tool. `evaluate --help` says how to use it.
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "program.hpp"

namespace {

constexpr int input_error = 2;

/// One line on stderr, whatever the message holds (file names may hold anything).
int fail(std::string message) {
  for (char& c : message)
    if (static_cast<unsigned char>(c) < ' ' || c == 127) c = '?';
  std::fprintf(stderr, "evaluate: %s\n", message.c_str());
  return input_error;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    evaluate::program_output output;
    const evaluate::outcome o =
        evaluate::run_program(std::vector<std::string>(argv + (argc > 0 ? 1 : 0), argv + argc), output);
    if (!o) return fail(o.error());
    std::fputs(output.diagnostics.c_str(), stderr);
    std::fputs(output.standard.c_str(), stdout);
    return std::fflush(stdout) == 0 ? 0 : fail("cannot write to stdout");
  } catch (const std::exception& e) {  // out of memory
    return fail(e.what());
  }
}
