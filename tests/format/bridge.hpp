// SPDX-License-Identifier: Apache-2.0
// From the words of the independent decoder to packkv: codec specs, parameters, and pages coded by packkv::reference.
//
//     bridge::coded c = bridge::encode(page_description, input);   // input(side, head, token, channel) -> 16 bits
#pragma once

#include <cstdint>
#include <packkv/reference/compress.hpp>
#include <packkv/reference/tile.hpp>
#include <stdexcept>
#include <utility>
#include <vector>

#include "golden.hpp"

namespace bridge {

inline packkv::codec_spec spec_of(const clean::description& f) {
  const packkv::side which = f.of == clean::side::key ? packkv::side::key : packkv::side::value;
  switch (f.coding) {
    case clean::kind::fp16:
      return packkv::make_element_codec(packkv::codec_kind::float16, f.head_dim);
    case clean::kind::bf16:
      return packkv::make_element_codec(packkv::codec_kind::bfloat16, f.head_dim);
    case clean::kind::fp8:
      return packkv::make_element_codec(packkv::codec_kind::fp8, f.head_dim);
    case clean::kind::plan:
      break;
  }
  packkv::strip_widths widths;
  for (const int width : f.widths) widths.width[widths.count++] = static_cast<std::uint8_t>(width);
  const packkv::transform_kind turn = f.turn == clean::transform::identity      ? packkv::transform_kind::identity
                                      : f.turn == clean::transform::permutation ? packkv::transform_kind::permutation
                                      : f.turn == clean::transform::basis       ? packkv::transform_kind::basis
                                                                                : packkv::transform_kind::hadamard;
  return packkv::make_plan_codec(which, f.head_dim, turn, widths, f.leading);
}

/// Memory that is as aligned as pages must be.
class page_memory {
 public:
  explicit page_memory(std::size_t bytes = 0) : blocks_((bytes + sizeof(block) - 1) / sizeof(block)) {}
  std::uint8_t* data() { return reinterpret_cast<std::uint8_t*>(blocks_.data()); }
  const std::uint8_t* data() const { return reinterpret_cast<const std::uint8_t*>(blocks_.data()); }

 private:
  struct alignas(16) block {
    std::uint8_t bytes[16];
  };
  std::vector<block> blocks_;
};

/// side_parameters of a side, with the permutation in the type that packkv takes.
struct side_arrays {
  explicit side_arrays(const clean::description& f) : permutation(f.permutation.begin(), f.permutation.end()) {
    if (!f.column_scale.empty()) view.column_scale = f.column_scale.data();
    if (!permutation.empty()) view.permutation = permutation.data();
    if (!f.basis.empty()) {  // orthogonal here: the inverse of each head's matrix is its transpose
      const auto n = static_cast<std::size_t>(f.head_dim);
      for (std::size_t i = 0; i < f.basis.size(); ++i) {
        inverse.push_back(f.basis[i / (n * n) * n * n + i % n * n + i / n % n]);
      }
      view.basis = f.basis.data();
      view.basis_inverse = inverse.data();
    }
    if (!f.leading_scale.empty()) view.leading_scale = f.leading_scale.data();
    if (!f.channel_offset.empty()) view.channel_offset = f.channel_offset.data();
    view.tensor_scale = f.tensor_scale;
  }
  side_arrays(const side_arrays&) = delete;
  side_arrays& operator=(const side_arrays&) = delete;

  std::vector<std::int16_t> permutation;
  std::vector<float> inverse;
  packkv::side_parameters view;
};

namespace detail {

template <int KeyDim, int ValueDim, class Input>
page_memory encode_as(const golden::page& p, Input&& input) {
  const side_arrays arrays[2] = {side_arrays(p.side[0].format), side_arrays(p.side[1].format)};
  packkv::parameters<packkv::runtime_format<KeyDim, ValueDim>> params;
  params.format.key_spec = spec_of(p.side[0].format);
  params.format.value_spec = spec_of(p.side[1].format);
  params.key = arrays[0].view;
  params.value = arrays[1].view;

  std::vector<std::uint16_t> elements[2];
  packkv::input_view<4> views[2];
  for (int side = 0; side < 2; ++side) {
    const int dim = p.side[side].format.head_dim;
    for (int h = 0; h < p.heads; ++h)
      for (int t = 0; t < p.tokens; ++t)
        for (int c = 0; c < dim; ++c) elements[side].push_back(input(side, h, t, c));
    views[side] =
        packkv::make_input(elements[side].data(), p.bf16_input ? packkv::dtype::bfloat16 : packkv::dtype::float16,
                           {1, p.heads, p.tokens, dim});
  }

  page_memory memory(p.bytes());
  packkv::pages_view pages;
  pages.key_data = memory.data();
  pages.value_data = memory.data() + p.tile_of(1, 0, 0);
  pages.key_page_stride = static_cast<std::int64_t>(p.place(0).page_stride);
  pages.key_head_stride = static_cast<std::int64_t>(p.place(0).head_stride);
  pages.value_page_stride = static_cast<std::int64_t>(p.place(1).page_stride);
  pages.value_head_stride = static_cast<std::int64_t>(p.place(1).head_stride);
  pages.num_pages = 1;
  pages.kv_heads = p.heads;
  pages.tiles_per_page = p.tiles;
  packkv::page_table table;
  table.row_stride = 1;

  packkv::device_report report;
  const packkv::status s = packkv::reference::compress(views[0], views[1], nullptr, params, pages, table, report);
  if (!s) throw std::runtime_error(s.message);
  return memory;
}

}  // namespace detail

/// The page that packkv::reference::compress makes of `input(side, head, token, channel)`.
template <class Input>
page_memory encode(const golden::page& p, Input&& input) {
  switch (p.side[0].format.head_dim * 1000 + p.side[1].format.head_dim) {
    case 64064:
      return detail::encode_as<64, 64>(p, input);
    case 96096:
      return detail::encode_as<96, 96>(p, input);
    case 128128:
      return detail::encode_as<128, 128>(p, input);
    case 192128:
      return detail::encode_as<192, 128>(p, input);
    case 192192:
      return detail::encode_as<192, 192>(p, input);
    case 256256:
      return detail::encode_as<256, 256>(p, input);
    case 512512:
      return detail::encode_as<512, 512>(p, input);
    default:
      throw std::logic_error("bridge::encode: head dims without a case");
  }
}

/// The page of the golden inputs.
inline page_memory encode(const golden::page& p) {
  return encode(p, [&](int side, int h, int t, int c) { return golden::input_bits(p, side, h, t, c); });
}

/// One token by packkv::reference, in the words of the independent decoder. `head` indexes the arrays of `side`.
inline clean::token decode(const std::uint8_t* tile, const golden::one_side& side, int head, int token) {
  const clean::description& f = side.format;
  const packkv::codec_spec spec = spec_of(f);
  const side_arrays arrays(f);
  const auto parameters = packkv::detail::of_head(spec, arrays.view, head);

  clean::token out;
  out.channels.resize(static_cast<std::size_t>(f.head_dim));
  packkv::reference::decode_token(spec, parameters, tile, token, out.channels.data());
  const auto bits_at = [&](std::int64_t byte) { return static_cast<std::uint16_t>(tile[byte] | tile[byte + 1] << 8); };
  for (int c = 0; c < f.head_dim; ++c) {
    const std::int64_t index = static_cast<std::int64_t>(token) * f.head_dim + c;
    if (f.coding == clean::kind::plan) {
      const auto* words = reinterpret_cast<const std::uint32_t*>(tile);
      const packkv::code_place place = packkv::locate(spec.strips, token, c);
      out.codes.push_back(static_cast<std::uint16_t>(packkv::read_code(words, place)));
    } else {
      out.codes.push_back(f.coding == clean::kind::fp8 ? tile[index] : bits_at(2 * index));
    }
  }
  if (f.coding != clean::kind::plan) return out;
  out.row_scale_bits = bits_at(spec.code_bytes() + 2 * packkv::row_slot(token));
  for (int i = 0; i < f.leading; ++i) {
    const std::int64_t at = spec.leading_offset() + i * packkv::tile_tokens + packkv::row_slot(token);
    out.leading.push_back(static_cast<std::int8_t>(tile[at]));
  }
  return out;
}

}  // namespace bridge
