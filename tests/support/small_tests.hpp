// SPDX-License-Identifier: Apache-2.0
// Fewer rounds and smaller shapes where PACKKV_TEST_SMALL is set: under sanitizers.
#pragma once

#include <cstdlib>

namespace packkv_test {

inline const bool small_tests = std::getenv("PACKKV_TEST_SMALL") != nullptr;

}  // namespace packkv_test
