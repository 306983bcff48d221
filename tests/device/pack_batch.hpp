// SPDX-License-Identifier: Apache-2.0
// What the device tests of calls on packs share: packs in device memory, and poisoned outputs with gaps.
#pragma once

#include "pack_data.hpp"

namespace packkv_test {

/// Packs of the reference in device memory that ends with them.
struct device_packs {
  device_side key, value;
  std::int64_t blocks;

  explicit device_packs(pack_case& c) : key(c.key), value(c.value), blocks(c.blocks) {}
  pk::packs_view view() const {
    pk::packs_view v;
    v.key = key.in();
    v.value = value.in();
    v.blocks = blocks;
    return v;
  }
};

inline pk::packs_view host_view(pack_case& c) {
  pk::packs_view v;
  v.key = c.key.in();
  v.value = c.value.in();
  v.blocks = c.blocks;
  return v;
}

/// The tokens behind the packed ones.
inline pk::input_view<4> tail_of(const pack_case& c, pk::input_view<4> x) {
  x.data = pk::detail::address(x, 0, 0, c.blocks * 64, 0);
  x.extent[2] -= c.blocks * 64;
  return x;
}

/// Poisoned output [.., rows, length] on host and device, with a gap behind each row; or token after token, backwards,
/// every other element.
struct batch_output {
  pk::dtype type;
  walk how;
  std::int64_t extent[4];
  std::vector<std::uint8_t> host_bytes;
  device_array<std::uint8_t> device_bytes;

  batch_output(pk::dtype t, std::int64_t b, std::int64_t h, std::int64_t rows, std::int64_t length,
               walk w = walk::contiguous)
      : type(t),
        how(w),
        extent{b, h, rows, length},
        host_bytes(static_cast<std::size_t>(2 * b * h * rows * (length + 2) * pk::bytes_of(t)), 0xff),
        device_bytes(host_bytes) {}
  pk::output_view<4> view(std::uint8_t* data) const {
    auto v = pk::make_output<4>(data, type, {extent[0], extent[1], extent[2], extent[3]});
    const std::int64_t unit = pk::bytes_of(type);
    if (how == walk::contiguous) {
      v.stride[2] = (extent[3] + 2) * unit;
      v.stride[1] = extent[2] * v.stride[2];
      v.stride[0] = extent[1] * v.stride[1];
      return v;
    }
    v.stride[3] = 2 * unit;
    v.stride[1] = extent[3] * v.stride[3];
    v.stride[0] = extent[1] * v.stride[1];
    v.stride[2] = -extent[0] * v.stride[0];
    if (extent[2] > 0) v.data = data - (extent[2] - 1) * v.stride[2];
    return v;
  }
  pk::output_view<4> host() { return view(host_bytes.data()); }
  pk::output_view<4> device() { return view(device_bytes.data()); }
  void fetch() { host_bytes = device_bytes.host(); }
  bool untouched() const { return device_bytes.host() == std::vector<std::uint8_t>(device_bytes.size(), 0xff); }
  float at(std::int64_t b, std::int64_t h, std::int64_t r, std::int64_t i) {
    return pk::detail::load_element(pk::detail::address(host(), b, h, r, i), type);
  }
};

/// [batch, heads, 1, length] without its third dimension.
template <class Pointer>
pk::tensor_view<Pointer, 3> one_row(const pk::tensor_view<Pointer, 4>& x) {
  pk::tensor_view<Pointer, 3> out;
  out.data = x.data;
  out.type = x.type;
  constexpr int from[] = {0, 1, 3};
  for (int i = 0; i < 3; ++i) {
    out.extent[i] = x.extent[from[i]];
    out.stride[i] = x.stride[from[i]];
  }
  return out;
}
/// [batch, heads, n, 1] without its last dimension.
inline pk::output_view<3> one_column(const pk::output_view<4>& x) {
  pk::output_view<3> out;
  out.data = x.data;
  out.type = x.type;
  for (int i = 0; i < 3; ++i) {
    out.extent[i] = x.extent[i];
    out.stride[i] = x.stride[i];
  }
  return out;
}

}  // namespace packkv_test
