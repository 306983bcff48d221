// SPDX-License-Identifier: Apache-2.0
// Runs the device tests, or says why there is nothing to run them on: exit code 4 = skipped.
#include <cstdio>
#include <cstring>

#if __has_include(<catch2/catch_session.hpp>)
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

/// Defined in device_present.cu, so that this file needs no CUDA headers. Null: a device is there.
const char* why_no_device();

int main(int argc, char** argv) {
  bool lists = false;
  for (int i = 1; i < argc; ++i) lists = lists || std::strncmp(argv[i], "--list", 6) == 0;
  if (const char* reason = lists ? nullptr : why_no_device()) {
    std::printf("SKIPPED: no CUDA device (%s)\n", reason);
    return 4;
  }
  return Catch::Session().run(argc, argv);
}
