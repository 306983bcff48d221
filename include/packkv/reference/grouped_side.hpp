// SPDX-License-Identifier: Apache-2.0
// What the `grouped` and `strip-adaptive` formats do alike on the CPU: groups of a block, channel means, the 16-bit
// tail. One idea: an encoder sees blocks of centred, transformed floats; a decoder and the sums see a reader of one
// head with spec(), tokens(), coded_tokens(), code(token, channel), group(token, channel), mean(channel) and
// tail(token, x).
//   load_block(spec, x, bytes, block, y, rows, report);   for_each_group(spec, heads, f);   decode_head(reader, head,
//   x);
#pragma once

#include <cstdint>
#include <cstring>
#include <packkv/codec/grouped_checks.hpp>
#include <packkv/codec/grouped_quantize.hpp>
#include <packkv/codec/pages.hpp>
#include <packkv/reference/compress.hpp>
#include <vector>

namespace packkv::reference::detail {

/// A group of one block: [head, head + heads) x [token, token + tokens) x [channel, channel + channels).
struct group_box {
  std::int64_t head, heads;
  int token, tokens, channel, channels;
};

/// Calls f(box) for every group of a block of `heads` heads.
template <class Function>
void for_each_group(const grouped_spec& spec, std::int64_t heads, const Function& f) {
  const int dim = spec.head_dim, tokens = spec.block_tokens();
  if (spec.spans_heads()) {
    const int run = spec.axis == group_axis::token ? 1 : tokens;
    for (int t = 0; t < tokens; t += run) f(group_box{0, heads, t, run, 0, dim});
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

/// Channels of a run that has one group at a given token.
inline int group_run(const grouped_spec& spec) {
  return spec.axis == group_axis::channel ? 1 : spec.axis == group_axis::vector ? spec.group : spec.head_dim;
}

/// Least and greatest element of a box.
struct box_range {
  float lowest = packkv::detail::infinity(), highest = -packkv::detail::infinity();
  bool finite = true;
};
inline box_range range_of(const grouped_spec& spec, const float* y, const group_box& box) {
  box_range r;
  for (std::int64_t h = box.head; h < box.head + box.heads; ++h)
    for (int t = box.token; t < box.token + box.tokens; ++t)
      for (int c = box.channel; c < box.channel + box.channels; ++c) {
        const float x = y[(h * spec.block_tokens() + t) * spec.head_dim + c];
        r.finite = r.finite && packkv::detail::is_finite(x);
        r.lowest = min_of(r.lowest, x);
        r.highest = max_of(r.highest, x);
      }
  return r;
}

/// Writes the means (if centred) to the start and the tokens from `coded_tokens` on to `tail_offset`.
inline void store_means_and_tail(const grouped_spec& spec, const input_view<3>& x, std::int64_t coded_tokens,
                                 std::uint8_t* bytes, std::int64_t tail_offset) {
  const int dim = spec.head_dim;
  std::uint8_t* tail = bytes + tail_offset;
  for (std::int64_t h = 0; h < x.extent[0]; ++h) {
    for (int c = 0; c < dim && spec.centred; ++c)
      store_bits(bytes, 2 * (h * dim + c), packkv::detail::channel_mean_bits(x, h, c, coded_tokens));
    for (std::int64_t t = coded_tokens; t < x.extent[1]; ++t)
      for (int c = 0; c < dim; ++c, tail += 2) std::memcpy(tail, packkv::detail::address(x, h, t, c), 2);
  }
}

/// Which rows (tokens of a head) of a block have finite elements only.
struct finite_rows {
  std::int64_t tokens;               ///< of the block
  std::vector<std::uint8_t> finite;  ///< [heads, tokens]

  finite_rows(const grouped_spec& spec, std::int64_t heads)
      : tokens(spec.block_tokens()), finite(static_cast<std::size_t>(heads * tokens)) {}
  std::uint8_t& at(std::int64_t head, std::int64_t token) {
    return finite[static_cast<std::size_t>(head * tokens + token)];
  }
  /// All rows that a box reaches, in all their channels.
  bool all(const group_box& box) const {
    for (std::int64_t h = box.head; h < box.head + box.heads; ++h)
      for (std::int64_t t = box.token; t < box.token + box.tokens; ++t)
        if (finite[static_cast<std::size_t>(h * tokens + t)] == 0) return false;
    return true;
  }
};

/// One block, centred with the means at `bytes` and transformed, into y [heads, block_tokens, head_dim]; reports
/// elements that are not finite.
inline void load_block(const grouped_spec& spec, const input_view<3>& x, const std::uint8_t* bytes, std::int64_t block,
                       float* y, finite_rows& rows, device_report& report) {
  const int dim = spec.head_dim, tokens = spec.block_tokens();
  float row[max_head_dim];
  for (std::int64_t h = 0; h < x.extent[0]; ++h)
    for (int t = 0; t < tokens; ++t) {
      load_token(packkv::detail::address(x, h, block * tokens + t, 0), x.stride[2], x.type, dim, row);
      bool finite = true;
      for (int c = 0; c < dim; ++c) {
        finite = finite && packkv::detail::is_finite(row[c]);
        if (spec.centred) row[c] = packkv::detail::sub_rn(row[c], half_to_float(load_bits(bytes, 2 * (h * dim + c))));
      }
      packkv::detail::transform_forward(spec.transform, {}, dim, row, y + (h * tokens + t) * dim);
      rows.at(h, t) = finite ? 1 : 0;
      if (!finite) report.flags |= report_nonfinite_input;
    }
}

/// The half of a reader that both formats share: means and tail of one head.
class head_reader {
 public:
  head_reader(const grouped_spec& spec, const std::uint8_t* bytes, std::int64_t tail_offset, std::int64_t tokens,
              std::int64_t coded_tokens, dtype tail_type, std::int64_t head)
      : spec_(spec),
        means_(spec.centred ? bytes + 2 * head * spec.head_dim : bytes),
        tail_(bytes + tail_offset + 2 * head * (tokens - coded_tokens) * spec.head_dim),
        tokens_(tokens),
        coded_tokens_(coded_tokens),
        tail_type_(tail_type) {}

  const grouped_spec& spec() const { return spec_; }
  std::int64_t tokens() const { return tokens_; }
  std::int64_t coded_tokens() const { return coded_tokens_; }
  float mean(int channel) const { return spec_.centred ? half_to_float(load_bits(means_, 2 * channel)) : 0.0f; }
  void tail(std::int64_t token, float* x) const {
    load_token(tail_ + 2 * (token - coded_tokens_) * spec_.head_dim, 2, tail_type_, spec_.head_dim, x);
  }

 private:
  const grouped_spec& spec_;
  const std::uint8_t *means_, *tail_;
  std::int64_t tokens_, coded_tokens_;
  dtype tail_type_;
};

/// Reconstructs the head that `read` reads into x [heads, tokens, head_dim].
template <class Reader>
void decode_head(const Reader& read, std::int64_t head, const output_view<3>& x) {
  const grouped_spec& spec = read.spec();
  const int dim = spec.head_dim, run = group_run(spec);
  float y[max_head_dim], row[max_head_dim];
  for (std::int64_t t = 0; t < read.tokens(); ++t) {
    if (t < read.coded_tokens()) {
      packkv::detail::group_values g{};
      for (int c = 0; c < dim; ++c) {
        if (c % run == 0) g = read.group(t, c);
        y[c] = packkv::detail::decode_in(spec, g, read.code(t, c));
      }
      packkv::detail::transform_inverse(spec.transform, {}, dim, y, row);
      for (int c = 0; c < dim && spec.centred; ++c) row[c] = packkv::detail::add_rn(row[c], read.mean(c));
    } else {
      read.tail(t, row);
    }
    store_token(packkv::detail::address(x, head, t, 0), x.stride[2], x.type, dim, row);
  }
}

}  // namespace packkv::reference::detail
