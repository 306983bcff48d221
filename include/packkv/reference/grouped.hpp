// SPDX-License-Identifier: Apache-2.0
// CPU definition of the `grouped` formats: one side of a sequence to bytes and back.
// One idea: a group is a box of heads x tokens x channels of a block, so one encoder serves every axis.
//   grouped_layout l;   make_grouped_layout(spec, heads, tokens, recent, l);   buffer of l.total_bytes, 16-byte aligned
//   encode_grouped(spec, x, recent, bytes, l.total_bytes, report);   decode_grouped(spec, bytes, l.total_bytes, recent,
//   x);
#pragma once

#include <cstdint>
#include <cstring>
#include <packkv/codec/grouped_quantize.hpp>
#include <packkv/codec/pages.hpp>
#include <packkv/reference/compress.hpp>
#include <vector>

namespace packkv::reference {

namespace detail {

/// A group of one block: [head, head + heads) x [token, token + tokens) x [channel, channel + channels).
struct group_box {
  std::int64_t head, heads;
  int token, tokens, channel, channels;
};

/// Calls f(box) for every group of a block of `heads` heads.
template <class Function>
void for_each_group(const grouped_spec& spec, std::int64_t heads, const Function& f) {
  const int dim = spec.head_dim, tokens = spec.block_tokens();
  if (spec.axis == group_axis::token) {
    for (int t = 0; t < tokens; ++t) f(group_box{0, heads, t, 1, 0, dim});
    return;
  }
  for (std::int64_t h = 0; h < heads; ++h)
    if (spec.axis == group_axis::channel) {
      for (int t = 0; t < tokens; t += spec.group)
        for (int c = 0; c < dim; ++c) f(group_box{h, 1, t, spec.group, c, 1});
    } else {
      for (int t = 0; t < tokens; ++t)
        for (int c = 0; c < dim; c += spec.group) f(group_box{h, 1, t, 1, c, spec.group});
    }
}

/// Sum in double of f(element) over a box: 32 partial sums by element index modulo 32, then a tree.
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
  float lowest = infinity(), highest = -infinity();
  bool finite = true;
  box_sum(spec, y, box, [&](double, float x) {
    finite = finite && is_finite(x);
    lowest = min_of(lowest, x);
    highest = max_of(highest, x);
    return 0.0;
  });
  if (!finite) return {};
  const int count = static_cast<int>(box.heads) * box.tokens * box.channels;
  if (spec.step == step_rule::min_max) return min_max_numbers(lowest, highest);
  if (spec.step == step_rule::gaussian) return rms_numbers(box_sum(spec, y, box, add_square), count);
  const double sum = box_sum(spec, y, box, [](double a, float x) { return a + static_cast<double>(x); });
  const float mean = static_cast<float>(div_rn(sum, static_cast<double>(count)));
  return mean_numbers(mean, box_sum(spec, y, box, [&](double a, float x) { return add_square(a, sub_rn(x, mean)); }),
                      count, spec.width);
}

/// Codes one block. y is [heads, block_tokens, head_dim] after centring and transform; `block` is zeroed memory.
inline void encode_block(const grouped_spec& spec, std::int64_t heads, const float* y, std::uint8_t* block,
                         device_report& report, bool finite_input) {
  using namespace packkv::detail;
  for_each_group(spec, heads, [&](const group_box& box) {
    const group_numbers n = numbers_of(spec, y, box);
    const group_values v = values_of(spec, n);
    if (!n.valid() && finite_input) report.flags |= report_scale_overflow;
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

/// Step and minimum of the group of an element.
inline packkv::detail::group_values group_at(const grouped_spec& spec, std::int64_t heads, const std::uint8_t* block,
                                             std::int64_t head, int token, int channel) {
  const group_place at = locate_group(spec, heads, head, token, channel);
  return packkv::detail::values_of(
      spec, {load_bits(block, at.first), spec.has_minima() ? load_bits(block, at.minimum) : std::uint16_t{0}});
}

/// Reconstructs one token of a block into y[head_dim], before the inverse transform.
inline void decode_block_token(const grouped_spec& spec, std::int64_t heads, const std::uint8_t* block,
                               std::int64_t head, int token, float* y) {
  const std::uint32_t* words =
      reinterpret_cast<const std::uint32_t*>(block + grouped_tile_offset(spec, head, token / tile_tokens));
  packkv::detail::group_values g{};
  const int run = spec.axis == group_axis::channel ? 1 : spec.axis == group_axis::vector ? spec.group : spec.head_dim;
  for (int c = 0; c < spec.head_dim; ++c) {
    if (c % run == 0) g = group_at(spec, heads, block, head, token, c);
    y[c] = packkv::detail::decode_in(spec, g, read_code(words, locate(spec.strips, token % tile_tokens, c)));
  }
}

inline status check_grouped_bytes(const void* bytes, std::int64_t size, const grouped_layout& layout) {
  if (size != layout.total_bytes)
    return refuse(status_code::shape_mismatch, "the buffer's size is not grouped_layout::total_bytes",
                  layout.total_bytes);
  if (bytes == nullptr && size > 0) return refuse(status_code::invalid_argument, "the buffer is null");
  if (reinterpret_cast<std::uintptr_t>(bytes) % 16 != 0)
    return refuse(status_code::misaligned, "the buffer must be 16-byte aligned");
  return {};
}

/// Mean of every channel over the coded tokens as fp16 bits; 0 where it is not finite.
inline std::uint16_t channel_mean_bits(const input_view<3>& x, std::int64_t head, int channel, std::int64_t tokens) {
  double sum = 0.0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const double e = packkv::detail::load_element(packkv::detail::address(x, head, t, channel), x.type);
    sum += e;
  }
  const std::uint16_t bits =
      tokens > 0 ? float_to_half(static_cast<float>(sum / static_cast<double>(tokens))) : std::uint16_t{0};
  return packkv::detail::is_finite_half(bits) ? bits : std::uint16_t{0};
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
  if (const status s = detail::check_grouped_bytes(bytes, size, layout); !s) return s;

  const int dim = spec.head_dim, block_tokens = spec.block_tokens();
  const std::int64_t heads = layout.heads, block_bytes = spec.block_bytes(heads);
  std::memset(bytes, 0, static_cast<std::size_t>(layout.tail_offset));
  if (spec.centred)
    for (std::int64_t h = 0; h < heads; ++h)
      for (int c = 0; c < dim; ++c)
        detail::store_bits(bytes, 2 * (h * dim + c), detail::channel_mean_bits(x, h, c, layout.coded_tokens));

  std::vector<float> y(static_cast<std::size_t>(heads) * static_cast<std::size_t>(block_tokens * dim));
  float row[max_head_dim];
  for (std::int64_t b = 0; b < layout.blocks; ++b) {
    bool finite = true;
    for (std::int64_t h = 0; h < heads; ++h)
      for (int t = 0; t < block_tokens; ++t) {
        detail::load_token(address(x, h, b * block_tokens + t, 0), x.stride[2], x.type, dim, row);
        for (int c = 0; c < dim; ++c) {
          finite = finite && is_finite(row[c]);
          if (spec.centred) row[c] = sub_rn(row[c], half_to_float(detail::load_bits(bytes, 2 * (h * dim + c))));
        }
        transform_forward(spec.transform, nullptr, dim, row, y.data() + (h * block_tokens + t) * dim);
      }
    if (!finite) report.flags |= report_nonfinite_input;
    detail::encode_block(spec, heads, y.data(), bytes + layout.blocks_offset + b * block_bytes, report, finite);
  }

  std::uint8_t* tail = bytes + layout.tail_offset;
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t t = layout.coded_tokens; t < layout.tokens; ++t)
      for (int c = 0; c < dim; ++c, tail += 2) std::memcpy(tail, address(x, h, t, c), 2);
  return {};
}

/// Reconstructs one side into x [heads, tokens, head_dim] of any element type. heads, tokens and recent must be those
/// of the encode call, `tail_type` the type of its tensor. Groups whose numbers are NaN give NaN.
inline status decode_grouped(const grouped_spec& spec, const std::uint8_t* bytes, std::int64_t size,
                             std::int64_t recent, const output_view<3>& x, dtype tail_type = dtype::float16) {
  using namespace packkv::detail;
  if (const status s = check_grouped(spec); !s) return s;
  if (const status s = check_view(x); !s) return s;
  if (tail_type == dtype::float32) return refuse(status_code::invalid_argument, "the tail holds 16-bit elements");
  if (x.extent[2] != spec.head_dim)
    return refuse(status_code::shape_mismatch, "the tensor's last extent is not the spec's head_dim", x.extent[2]);
  grouped_layout layout;
  if (const status s = make_grouped_layout(spec, x.extent[0], x.extent[1], recent, layout); !s) return s;
  if (const status s = detail::check_grouped_bytes(bytes, size, layout); !s) return s;

  const int dim = spec.head_dim, block_tokens = spec.block_tokens();
  float y[max_head_dim], row[max_head_dim];
  for (std::int64_t h = 0; h < layout.heads; ++h)
    for (std::int64_t t = 0; t < layout.tokens; ++t) {
      if (t < layout.coded_tokens) {
        const std::uint8_t* block = bytes + layout.blocks_offset + t / block_tokens * spec.block_bytes(layout.heads);
        detail::decode_block_token(spec, layout.heads, block, h, static_cast<int>(t % block_tokens), y);
        transform_inverse(spec.transform, nullptr, dim, y, row);
        for (int c = 0; c < dim && spec.centred; ++c)
          row[c] = add_rn(row[c], half_to_float(detail::load_bits(bytes, 2 * (h * dim + c))));
      } else {
        const std::int64_t at = h * (layout.tokens - layout.coded_tokens) + t - layout.coded_tokens;
        detail::load_token(bytes + layout.tail_offset + at * dim * 2, 2, tail_type, dim, row);
      }
      detail::store_token(address(x, h, t, 0), x.stride[2], x.type, dim, row);
    }
  return {};
}

}  // namespace packkv::reference
