// SPDX-License-Identifier: Apache-2.0
// Trivially copyable views of tensors that the caller owns: pointer, element type, extents, strides in bytes.
// One idea: strides are given, never derived, so interleaved and padded layouts need no copy.
//   auto keys = packkv::make_input(ptr, dtype::float16, {batch, kv_heads, tokens, head_dim});   // contiguous
//   keys.stride[2] = my_token_stride_bytes;                                                     // or any other
#pragma once

#include <cstdint>
#include <limits>
#include <packkv/core/checked.hpp>
#include <packkv/core/config.hpp>
#include <packkv/core/float_formats.hpp>
#include <packkv/core/status.hpp>
#include <type_traits>

namespace packkv {

/// Element type of a tensor that crosses the API.
enum class dtype : std::uint8_t { float16, bfloat16, float32 };

/// Size of an element.
PACKKV_HOST_DEVICE constexpr int bytes_of(dtype type) { return type == dtype::float32 ? 4 : 2; }

/// A tensor of `Rank` dimensions. `Pointer` is `const void*` for inputs and `void*` for outputs.
/// Strides are in bytes and may be zero (broadcast, inputs only), negative or interleaved; each stride and
/// the pointer are multiples of the element size.
template <class Pointer, int Rank>
struct tensor_view {
  static constexpr int rank = Rank;
  Pointer data = nullptr;
  dtype type = dtype::float16;
  std::int64_t extent[Rank] = {};
  std::int64_t stride[Rank] = {};
};

/// A tensor that a call reads.
template <int Rank>
using input_view = tensor_view<const void*, Rank>;
/// A tensor that a call writes.
template <int Rank>
using output_view = tensor_view<void*, Rank>;

namespace detail {

/// Stride of a contiguous view whose size does not fit 63 bits; check_view refuses it. No multiple of an element size,
/// and small, so that compilers see no overflow in code that would use it.
inline constexpr std::int64_t unreachable_stride = -1;

template <class Pointer, int Rank>
PACKKV_HOST_DEVICE constexpr tensor_view<Pointer, Rank> contiguous(Pointer data, dtype type,
                                                                   const std::int64_t (&extent)[Rank]) {
  tensor_view<Pointer, Rank> view;
  view.data = data;
  view.type = type;
  checked stride = bytes_of(type);
  for (int i = Rank - 1; i >= 0; --i) {
    view.extent[i] = extent[i];
    view.stride[i] = stride.valid() ? stride.value() : unreachable_stride;
    stride = stride * extent[i];
  }
  return view;
}

/// Address of an element; Pointer arithmetic is 64-bit.
template <class Pointer, int Rank, class... Index>
PACKKV_HOST_DEVICE inline Pointer address(const tensor_view<Pointer, Rank>& view, Index... index) {
  static_assert(sizeof...(Index) == Rank, "one index for each dimension");
  const std::int64_t indices[] = {static_cast<std::int64_t>(index)...};
  std::int64_t offset = 0;
  for (int i = 0; i < Rank; ++i) offset += indices[i] * view.stride[i];
  if constexpr (std::is_same_v<Pointer, const void*>) {
    return static_cast<const char*>(view.data) + offset;
  } else {
    return static_cast<char*>(view.data) + offset;
  }
}

PACKKV_HOST_DEVICE inline float load_element(const void* p, dtype type) {
  switch (type) {
    case dtype::float16:
      return half_to_float(*static_cast<const std::uint16_t*>(p));
    case dtype::bfloat16:
      return bfloat16_to_float(*static_cast<const std::uint16_t*>(p));
    default:
      return *static_cast<const float*>(p);
  }
}
PACKKV_HOST_DEVICE inline void store_element(void* p, dtype type, float x) {
  switch (type) {
    case dtype::float16:
      *static_cast<std::uint16_t*>(p) = float_to_half(x);
      break;
    case dtype::bfloat16:
      *static_cast<std::uint16_t*>(p) = float_to_bfloat16(x);
      break;
    default:
      *static_cast<float*>(p) = x;
      break;
  }
}

/// Refuses a view that cannot be walked: null, negative extents, misaligned pointer or strides.
template <class Pointer, int Rank>
inline status check_view(const tensor_view<Pointer, Rank>& view) {
  bool empty = false;
  for (int i = 0; i < Rank; ++i) {
    if (view.extent[i] < 0) return refuse(status_code::invalid_argument, "a tensor extent is negative", i);
    empty = empty || view.extent[i] == 0;
  }
  if (static_cast<unsigned>(view.type) > 2) return refuse(status_code::invalid_argument, "unknown element type");
  if (empty) return {};
  if (view.data == nullptr) return refuse(status_code::invalid_argument, "a tensor pointer is null");
  const std::int64_t unit = bytes_of(view.type);
  if (reinterpret_cast<std::uintptr_t>(view.data) % static_cast<std::uintptr_t>(unit) != 0)
    return refuse(status_code::misaligned, "a tensor pointer is not a multiple of its element size");
  checked reach = 0;
  for (int i = 0; i < Rank; ++i) {
    if (view.stride[i] == unreachable_stride || view.stride[i] == (std::numeric_limits<std::int64_t>::min)())
      return refuse(status_code::overflow, "a tensor reaches beyond 63 bits of address");
    if (view.stride[i] % unit != 0)
      return refuse(status_code::misaligned, "a tensor stride is not a multiple of its element size", i);
    reach = reach + checked(view.extent[i] - 1) * checked(view.stride[i] < 0 ? -view.stride[i] : view.stride[i]);
  }
  if (!reach.valid()) return refuse(status_code::overflow, "a tensor reaches beyond 63 bits of address");
  return {};
}

/// The factor of scores before the softmax.
inline status check_softmax_scale(float scale) {
  if (is_finite(scale) && scale > 0.0f) return {};
  return refuse(status_code::invalid_argument, "the softmax scale must be finite and > 0");
}

}  // namespace detail

/// Row-major contiguous view of memory that is only read.
template <int Rank>
PACKKV_HOST_DEVICE constexpr input_view<Rank> make_input(const void* data, dtype type,
                                                         const std::int64_t (&extent)[Rank]) {
  return detail::contiguous<const void*>(data, type, extent);
}
/// Row-major contiguous view of memory that is written.
template <int Rank>
PACKKV_HOST_DEVICE constexpr output_view<Rank> make_output(void* data, dtype type, const std::int64_t (&extent)[Rank]) {
  return detail::contiguous<void*>(data, type, extent);
}

}  // namespace packkv
