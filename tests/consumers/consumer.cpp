// SPDX-License-Identifier: Apache-2.0
// A user's first program, with nothing but the target packkv::packkv.
#include <cstdio>

#include <packkv/packkv.hpp>

int main() { std::printf("packkv %d.%d.%d\n", PACKKV_VERSION_MAJOR, PACKKV_VERSION_MINOR, PACKKV_VERSION_PATCH); }
