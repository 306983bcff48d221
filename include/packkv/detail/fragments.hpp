// SPDX-License-Identifier: Apache-2.0
// Which element of a matrix a lane of a warp holds, for the matrix instructions that we use (PTX ISA, "Matrix
// Fragments"). One idea: lane = 4 * group + place; rows (of A, C, D) and columns (of B) go by group, the rest by place.
//   position p = fragment::a<2>(lane, reg, part);   // element p.row, p.column of A lies in that part of that register
#pragma once

#include <packkv/core/config.hpp>

namespace packkv::detail {

struct position {
  int row, column;
};

/// `part` counts the elements of a 32-bit register from its low bits: 0..1 for 2-byte elements, 0..3 for bytes.
namespace fragment {

/// A, 16 x (64 / Bytes / 2 or half of that): registers 0 and 1 are rows g and g + 8, 2 and 3 the same, 16 bytes on.
template <int Bytes>
PACKKV_HOST_DEVICE constexpr position a(int lane, int reg, int part) {
  constexpr int parts = 4 / Bytes;
  return {lane / 4 + 8 * (reg % 2), (lane % 4) * parts + part + 4 * parts * (reg / 2)};
}

/// B, k x 8: register r holds k from 16 bytes * r on; column = group.
template <int Bytes>
PACKKV_HOST_DEVICE constexpr position b(int lane, int reg, int part) {
  constexpr int parts = 4 / Bytes;
  return {(lane % 4) * parts + part + 4 * parts * reg, lane / 4};
}

/// C and D, 16 x 8, 32-bit elements: registers 0 and 1 are two columns of row g, 2 and 3 of row g + 8.
PACKKV_HOST_DEVICE constexpr position c(int lane, int reg) {
  return {lane / 4 + 8 * (reg / 2), 2 * (lane % 4) + reg % 2};
}

/// An 8 x 8 matrix of 2-byte elements in one register, as ldmatrix and movmatrix have it.
PACKKV_HOST_DEVICE constexpr position m8(int lane, int part) { return {lane / 4, 2 * (lane % 4) + part}; }

}  // namespace fragment
}  // namespace packkv::detail
