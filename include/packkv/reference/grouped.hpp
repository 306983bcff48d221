// SPDX-License-Identifier: Apache-2.0
// CPU definition of the `grouped` formats: one side of a sequence to bytes and back.
// One idea: a group is a box of heads x tokens x channels of a block, so one encoder serves every axis.
//   grouped_layout l;   make_grouped_layout(spec, heads, tokens, recent, l);   buffer of l.total_bytes, 16-byte aligned
//   encode_grouped(spec, x, recent, bytes, l.total_bytes, report);   decode_grouped(spec, bytes, l.total_bytes, recent,
//   x);
#pragma once

#include <cstdint>
#include <cstring>
#include <packkv/reference/grouped_side.hpp>
#include <vector>

namespace packkv::reference {

namespace detail {

/// Sum in double of f(sum, element) over a box: 32 partial sums by element index modulo 32, then a tree.
template <class Function>
double box_sum(const grouped_spec& spec, const float* y, const group_box& box, const Function& f) {
  double partial[32] = {};
  int i = 0;
  for (std::int64_t h = box.head; h < box.head + box.heads; ++h)
    for (int t = box.token; t < box.token + box.tokens; ++t)
      for (int c = box.channel; c < box.channel + box.channels; ++c, ++i)
        partial[i % 32] = f(partial[i % 32], y[(h * spec.block_tokens() + t) * spec.head_dim + c]);
  for (int stride = 16; stride > 0; stride /= 2)
    for (int k = 0; k < stride; ++k) partial[k] += partial[k + stride];
  return partial[0];
}

/// What a box of finite or non-finite elements stores.
inline packkv::detail::group_numbers numbers_of(const grouped_spec& spec, const float* y, const group_box& box) {
  using namespace packkv::detail;
  const box_range range = range_of(spec, y, box);
  if (!range.finite) return {};
  const int count = static_cast<int>(box.heads) * box.tokens * box.channels;
  if (spec.step == step_rule::min_max) return min_max_numbers(range.lowest, range.highest);
  if (spec.step == step_rule::gaussian) return rms_numbers(box_sum(spec, y, box, add_square), count);
  const double sum = box_sum(spec, y, box, [](double a, float x) { return a + static_cast<double>(x); });
  const float mean = static_cast<float>(div_rn(sum, static_cast<double>(count)));
  const auto add_distance = [&](double a, float x) { return add_square(a, sub_rn(x, mean)); };
  return mean_numbers(mean, box_sum(spec, y, box, add_distance), count, spec.width);
}

/// Codes one block. y is [heads, block_tokens, head_dim] after centring and transform; `block` is zeroed memory.
inline void encode_block(const grouped_spec& spec, std::int64_t heads, const float* y, std::uint8_t* block,
                         device_report& report, const finite_rows& finite) {
  using namespace packkv::detail;
  for_each_group(spec, heads, [&](const group_box& box) {
    const group_numbers n = numbers_of(spec, y, box);
    const group_values v = values_of(spec, n);
    if (!n.valid() && finite.all(box)) report.flags |= report_scale_overflow;
    const group_place at = locate_group(spec, heads, box.head, box.token, box.channel);
    store_bits(block, at.first, n.first);
    if (spec.has_minima()) store_bits(block, at.minimum, n.minimum);
    for (std::int64_t h = box.head; h < box.head + box.heads; ++h)
      for (int t = box.token; t < box.token + box.tokens; ++t) {
        std::uint32_t* words = reinterpret_cast<std::uint32_t*>(block + grouped_tile_offset(spec, h, t / tile_tokens));
        for (int c = box.channel; c < box.channel + box.channels; ++c) {
          const std::uint32_t code = encode_in(spec, v, y[(h * spec.block_tokens() + t) * spec.head_dim + c]);
          const code_writes writes = split_code(locate(spec.strips, t % tile_tokens, c), code);
          for (int i = 0; i < writes.count; ++i) words[writes.write[i].word] |= writes.write[i].bits;
        }
      }
  });
}

/// Reads one head of a coded side.
class grouped_reader : public head_reader {
 public:
  grouped_reader(const grouped_view& view, const grouped_layout& layout, std::int64_t head)
      : head_reader(view.spec, view.bytes, layout.tail_offset, layout.tokens, layout.coded_tokens, view.tail_type,
                    head),
        blocks_(view.bytes + layout.blocks_offset),
        block_bytes_(view.spec.block_bytes(layout.heads)),
        heads_(layout.heads),
        head_(head) {}

  std::uint32_t code(std::int64_t token, int channel) const {
    const int in_block = static_cast<int>(token % spec().block_tokens());
    const std::uint32_t* words = reinterpret_cast<const std::uint32_t*>(
        block(token) + grouped_tile_offset(spec(), head_, in_block / tile_tokens));
    return read_code(words, locate(spec().strips, in_block % tile_tokens, channel));
  }
  packkv::detail::group_values group(std::int64_t token, int channel) const {
    const int in_block = static_cast<int>(token % spec().block_tokens());
    const group_place at = locate_group(spec(), heads_, head_, in_block, channel);
    packkv::detail::group_numbers n;
    n.first = load_bits(block(token), at.first);
    if (spec().has_minima()) n.minimum = load_bits(block(token), at.minimum);
    return packkv::detail::values_of(spec(), n);
  }

 private:
  const std::uint8_t* block(std::int64_t token) const { return blocks_ + token / spec().block_tokens() * block_bytes_; }

  const std::uint8_t* blocks_;
  std::int64_t block_bytes_, heads_, head_;
};

/// A checked side, which readers refer to.
struct grouped_side {
  grouped_view view;
  grouped_layout layout;

  const grouped_spec& groups() const { return view.spec; }
  grouped_reader read(std::int64_t head) const { return {view, layout, head}; }
};

/// Checks everything about a coded side that can be checked.
inline status open_side(const grouped_view& view, grouped_side& side) {
  side.view = view;
  return packkv::detail::check_grouped_view(view, side.layout);
}

}  // namespace detail

/// Codes one side of a sequence. x [heads, tokens, head_dim], float16 or bfloat16. The newest `recent` tokens, and
/// those that fill no block, are kept as they are. `bytes`: 16-byte aligned, `size` = grouped_layout::total_bytes. A
/// group with a non-finite element, or whose numbers leave fp16's range, becomes NaN and is reported.
inline status encode_grouped(const grouped_spec& spec, const input_view<3>& x, std::int64_t recent, std::uint8_t* bytes,
                             std::int64_t size, device_report& report) {
  using namespace packkv::detail;
  if (const status s = check_grouped(spec); !s) return s;
  if (const status s = check_view(x); !s) return s;
  if (x.type == dtype::float32) return refuse(status_code::unsupported, "grouped formats code 16-bit tensors");
  if (x.extent[2] != spec.head_dim)
    return refuse(status_code::shape_mismatch, "the tensor's last extent is not the spec's head_dim", x.extent[2]);
  grouped_layout layout;
  if (const status s = make_grouped_layout(spec, x.extent[0], x.extent[1], recent, layout); !s) return s;
  if (const status s = check_grouped_bytes(bytes, size, layout); !s) return s;

  const std::int64_t heads = layout.heads, block_bytes = spec.block_bytes(heads);
  std::memset(bytes, 0, static_cast<std::size_t>(layout.tail_offset));
  detail::store_means_and_tail(spec, x, layout.coded_tokens, bytes, layout.tail_offset);
  std::vector<float> y(static_cast<std::size_t>(heads) * static_cast<std::size_t>(spec.block_tokens() * spec.head_dim));
  detail::finite_rows finite(spec, heads);
  for (std::int64_t b = 0; b < layout.blocks; ++b) {
    detail::load_block(spec, x, bytes, b, y.data(), finite, report);
    detail::encode_block(spec, heads, y.data(), bytes + layout.blocks_offset + b * block_bytes, report, finite);
  }
  return {};
}

/// Reconstructs one side into x [heads, tokens, head_dim] of any element type. heads, tokens and recent must be those
/// of the encode call, `tail_type` the type of its tensor. Groups whose numbers are NaN give NaN.
inline status decode_grouped(const grouped_spec& spec, const std::uint8_t* bytes, std::int64_t size,
                             std::int64_t recent, const output_view<3>& x, dtype tail_type = dtype::float16) {
  using namespace packkv::detail;
  if (const status s = check_grouped(spec); !s) return s;
  if (const status s = check_view(x); !s) return s;
  if (x.extent[2] != spec.head_dim)
    return refuse(status_code::shape_mismatch, "the tensor's last extent is not the spec's head_dim", x.extent[2]);
  detail::grouped_side side;
  if (const status s = detail::open_side({spec, bytes, size, x.extent[0], x.extent[1], recent, tail_type}, side); !s)
    return s;
  for (std::int64_t h = 0; h < x.extent[0]; ++h) detail::decode_head(side.read(h), h, x);
  return {};
}

}  // namespace packkv::reference
