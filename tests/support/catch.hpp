// SPDX-License-Identifier: Apache-2.0
// Catch2 under one name: version 3 where it is installed, else 2.13.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
