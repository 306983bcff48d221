// SPDX-License-Identifier: Apache-2.0
#include <string>

#include <packkv/core/config.hpp>

#include "support/catch.hpp"

TEST_CASE("the version macros are the version of the CMake package", "[version]") {
  const std::string version = std::to_string(PACKKV_VERSION_MAJOR) + "." + std::to_string(PACKKV_VERSION_MINOR) + "." +
                              std::to_string(PACKKV_VERSION_PATCH);
  CHECK(version == PACKKV_TEST_PROJECT_VERSION);
}
