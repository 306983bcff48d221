// SPDX-License-Identifier: Apache-2.0
// What packs, tensors and formats must satisfy before anything is read or written.
//   if (const status s = packkv::detail::check_packs_input(format, keys, values, blocks); !s) return s;
#pragma once

#include <cstdint>
#include <initializer_list>
#include <packkv/codec/pack_format.hpp>
#include <packkv/codec/pack_quantize.hpp>
#include <packkv/core/views.hpp>

namespace packkv::detail {

/// Keys and values of at least blocks * 64 tokens, [batch, kv_heads, tokens, D], for compress and decompress.
template <class Pointer>
inline status check_pack_tensors(const pack_format& f, const tensor_view<Pointer, 4>& keys,
                                 const tensor_view<Pointer, 4>& values, std::int64_t blocks) {
  if (const status s = check_format(f); !s) return s;
  if (blocks < 0) return refuse(status_code::invalid_argument, "a number of blocks is negative");
  if (max_pack_bytes(f, side::key, blocks) == 0 && blocks > 0)
    return refuse(status_code::overflow, "the packs may not fit 63 bits");
  if (max_pack_bytes(f, side::value, blocks) == 0 && blocks > 0)
    return refuse(status_code::overflow, "the packs may not fit 63 bits");
  for (const side which : {side::key, side::value}) {
    const tensor_view<Pointer, 4>& x = which == side::key ? keys : values;
    if (const status s = check_view(x); !s) return s;
    if (x.extent[0] != f.batch) return refuse(status_code::shape_mismatch, "a tensor's batch is not the format's");
    if (x.extent[1] != f.kv_heads) return refuse(status_code::shape_mismatch, "a tensor's heads are not the format's");
    if (x.extent[3] != f.codec(which).head_dim)
      return refuse(status_code::shape_mismatch, "a tensor's head_dim is not the format's");
    if (x.extent[2] / tile_tokens < blocks)
      return refuse(status_code::shape_mismatch, "a tensor has fewer tokens than 64 for each block");
  }
  return {};
}

inline bool is_aligned(const void* p, std::uintptr_t unit) { return reinterpret_cast<std::uintptr_t>(p) % unit == 0; }

/// Where one side is to be written.
inline status check_pack_output(const pack_side& s, std::int64_t blocks) {
  if (s.offsets == nullptr) return refuse(status_code::invalid_argument, "the offsets of packs are null");
  if (s.capacity < 0) return refuse(status_code::invalid_argument, "the capacity of packs is negative");
  if (blocks > 0 && (s.ranges == nullptr || s.data == nullptr))
    return refuse(status_code::invalid_argument, "the ranges or the data of packs are null");
  if (!is_aligned(s.offsets, 8) || !is_aligned(s.ranges, 4) || !is_aligned(s.data, 16))
    return refuse(status_code::misaligned, "packs need offsets at 8, ranges at 4 and data at 16 bytes");
  return {};
}

/// Pointers of one side that is to be read: all that a host can see of packs in device memory.
inline status check_pack_pointers(const const_pack_side& s, std::int64_t blocks) {
  if (s.offsets == nullptr) return refuse(status_code::invalid_argument, "the offsets of packs are null");
  if (blocks > 0 && (s.ranges == nullptr || s.data == nullptr))
    return refuse(status_code::invalid_argument, "the ranges or the data of packs are null");
  if (!is_aligned(s.offsets, 8) || !is_aligned(s.ranges, 4) || !is_aligned(s.data, 16))
    return refuse(status_code::misaligned, "packs need offsets at 8, ranges at 4 and data at 16 bytes");
  return {};
}

/// Offsets and ranges of one side; what lies inside tiles is checked with them (reference::check_packs).
inline status check_pack_index(const pack_format& f, side which, const const_pack_side& s, std::int64_t blocks) {
  if (const status r = check_pack_pointers(s, blocks); !r) return r;
  const std::int64_t tiles = tile_count(f, blocks);
  if (s.offsets[0] != 0) return refuse(status_code::corrupt, "the first tile does not begin at 0");
  for (std::int64_t i = 0; i < tiles; ++i)
    if (s.offsets[i + 1] < s.offsets[i] || s.offsets[i + 1] > s.size || s.offsets[i + 1] % 16 != 0)
      return refuse(status_code::corrupt, "the offsets of tiles are damaged", i);
  const std::int64_t ranges = (checked(blocks) * f.batch * range_count(f, which)).value();
  for (std::int64_t i = 0; i < ranges; ++i) {
    const float low = range_value(f.element, s.ranges[i].low), high = range_value(f.element, s.ranges[i].high);
    if (!is_finite(low) || !is_finite(high) || !(low <= high))
      return refuse(status_code::corrupt, "a range is not two finite elements in order", i);
    if (!is_finite(sub_rn(high, low))) return refuse(status_code::corrupt, "a range spans more than a float holds", i);
  }
  return {};
}

}  // namespace packkv::detail
