// SPDX-License-Identifier: Apache-2.0
// PackKV's packs on the CPU: compress, check and decompress. Host memory; scratch memory comes from std::vector.
// One idea: K and V of all heads and batch rows of a block are quantised first, then one order serves all their tiles.
//   status s = reference::compress(format, keys, values, coded_blocks(tokens), key_packs, value_packs, order, report);
//   s = reference::decompress(format, packs, key_slots, value_slots);   // in the order of the slots
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <packkv/codec/pack_checks.hpp>
#include <packkv/reference/pack_block.hpp>
#include <packkv/reference/pack_tile.hpp>
#include <packkv/reference/token_order.hpp>
#include <vector>

namespace packkv {

/// What compressing packs says about both sides.
struct pack_report {
  pack_statistics key, value;
};

namespace reference {

namespace detail {

/// Everything of one side that compress writes at its end.
struct side_packs {
  std::vector<pack_range> ranges;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::uint8_t> data;
  bool seen[256] = {};  ///< codes that occur
  pack_statistics statistics;
};

/// Ranges of one batch row of a block, moved to the slots of their tokens where a range belongs to a token.
inline void append_ranges(const pack_codec& codec, const std::vector<pack_range>& ranges, const std::uint8_t* order,
                          std::vector<pack_range>& out) {
  const bool of_tokens = codec.granularity == pack_granularity::token || codec.granularity == pack_granularity::vector;
  for (std::size_t i = 0; i < ranges.size(); ++i)
    out.push_back(of_tokens ? ranges[i / tile_tokens * tile_tokens + order[i % tile_tokens]] : ranges[i]);
}

/// Quantises, orders and packs block after block.
class pack_encoder {
 public:
  explicit pack_encoder(const pack_format& f) : format_(f), quantizer_{{f, side::key}, {f, side::value}} {
    for (const side which : {side::key, side::value}) {
      const int s = static_cast<int>(which);
      row_bytes_[s] = std::int64_t{f.kv_heads} * f.codec(which).head_dim;
      ranges_[s].assign(static_cast<std::size_t>(f.batch),
                        std::vector<pack_range>(static_cast<std::size_t>(range_count(f, which))));
    }
    first_value_ = f.batch * row_bytes_[0];
    channels_ = first_value_ + f.batch * row_bytes_[1];
    stride_ = (channels_ + 63) / 64 * 64;
    codes_.assign(static_cast<std::size_t>(stride_) * tile_tokens, 0);
  }

  /// Quantises a block and gives its order.
  status order_block(const input_view<4>& keys, const input_view<4>& values, std::int64_t block, std::uint8_t* order) {
    for (const side which : {side::key, side::value})
      for (int b = 0; b < format_.batch; ++b) {
        const int s = static_cast<int>(which);
        const status result =
            quantizer_[s].run(which == side::key ? keys : values, b, block * tile_tokens,
                              ranges_[s][static_cast<std::size_t>(b)].data(), codes_.data() + first(which, b), stride_);
        if (!result) return result;
      }
    order_tokens(format_.order, format_.pack_size, {codes_.data(), stride_, channels_, first_value_}, order);
    return {};
  }

  /// Appends the tiles of a block to `out`.
  status add_block(const input_view<4>& keys, const input_view<4>& values, std::int64_t block, std::uint8_t* order) {
    if (const status s = order_block(keys, values, block, order); !s) return s;
    for (const side which : {side::key, side::value}) add_tiles(which, order);
    return {};
  }

  side_packs out[2];

 private:
  /// Column of the codes at which a side of a batch row begins.
  std::int64_t first(side which, int b) const {
    return (which == side::key ? 0 : first_value_) + b * row_bytes_[static_cast<int>(which)];
  }

  void add_tiles(side which, const std::uint8_t* order) {
    const int s = static_cast<int>(which), dim = format_.codec(which).head_dim;
    side_packs& packs = out[s];
    for (int b = 0; b < format_.batch; ++b) {
      append_ranges(format_.codec(which), ranges_[s][static_cast<std::size_t>(b)], order, packs.ranges);
      for (int t = 0; t < tile_tokens; ++t) {
        const std::uint8_t* const x = codes_.data() + t * stride_ + first(which, b);
        for (std::int64_t c = 0; c < row_bytes_[s]; ++c) packs.seen[x[c]] = true;
      }
      for (int h = 0; h < format_.kv_heads; ++h) {
        encode_pack_tile(format_.pack_size, dim, codes_.data() + first(which, b) + std::int64_t{h} * dim, stride_,
                         order, packs.data, packs.statistics);
        packs.offsets.push_back(static_cast<std::int64_t>(packs.data.size()));
      }
    }
  }

  const pack_format& format_;
  block_quantizer quantizer_[2];
  std::int64_t row_bytes_[2] = {}, first_value_ = 0, channels_ = 0, stride_ = 0;
  std::vector<std::vector<pack_range>> ranges_[2];  ///< [batch][range_count], in order of tokens
  std::vector<std::uint8_t> codes_;                 ///< [64][stride]
};

template <class T>
inline void copy_out(const std::vector<T>& from, T* to) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(T));
}

}  // namespace detail

/// Codes the first `blocks` * 64 tokens (PackKV's own choice is coded_blocks(tokens)).
/// keys [batch, kv_heads, tokens, D_k], values [.., D_v], of the format's element type. key, value: where the packs go;
/// max_pack_bytes() bytes of data always suffice. order: uint8 [blocks][64], the token of each slot, or null.
/// Nothing is written, and the status says why, if an element is not finite, a code has more than 8 bits (both with the
/// block as `detail`), or the tiles exceed a capacity (`detail`: the bytes needed).
inline status compress(const pack_format& f, const input_view<4>& keys, const input_view<4>& values,
                       std::int64_t blocks, const pack_side& key, const pack_side& value, std::uint8_t* order,
                       pack_report& report) {
  using namespace packkv::detail;
  if (const status s = check_pack_tensors(f, keys, values, blocks); !s) return s;
  if (keys.type != f.element || values.type != f.element)
    return refuse(status_code::invalid_argument, "keys and values must have the format's element type");
  if (const status s = check_pack_output(key, blocks); !s) return s;
  if (const status s = check_pack_output(value, blocks); !s) return s;
  detail::pack_encoder encoder(f);
  std::vector<std::uint8_t> orders(static_cast<std::size_t>(blocks) * tile_tokens);
  for (std::int64_t block = 0; block < blocks; ++block)
    if (const status s = encoder.add_block(keys, values, block, orders.data() + block * tile_tokens); !s)
      return refuse(s.code, s.message, block);
  for (const side which : {side::key, side::value}) {
    const std::int64_t bytes = static_cast<std::int64_t>(encoder.out[static_cast<int>(which)].data.size());
    if (bytes > (which == side::key ? key : value).capacity)
      return refuse(status_code::overflow, "the tiles need more bytes than the capacity", bytes);
  }
  for (const side which : {side::key, side::value}) {
    detail::side_packs& packs = encoder.out[static_cast<int>(which)];
    const pack_side& to = which == side::key ? key : value;
    detail::copy_out(packs.ranges, to.ranges);
    detail::copy_out(packs.offsets, to.offsets);
    detail::copy_out(packs.data, to.data);
    for (const bool seen : packs.seen) packs.statistics.distinct_codes += seen ? 1 : 0;
    (which == side::key ? report.key : report.value) = packs.statistics;
  }
  if (order != nullptr) detail::copy_out(orders, order);
  return {};
}

/// The order of compress alone: uint8 [blocks][64], the token of each slot. The greedy order of a compress on a GPU
/// comes from here. keys, values, blocks and the reasons to refuse are those of compress.
inline status token_orders(const pack_format& f, const input_view<4>& keys, const input_view<4>& values,
                           std::int64_t blocks, std::uint8_t* order) {
  using namespace packkv::detail;
  if (const status s = check_pack_tensors(f, keys, values, blocks); !s) return s;
  if (keys.type != f.element || values.type != f.element)
    return refuse(status_code::invalid_argument, "keys and values must have the format's element type");
  if (order == nullptr && blocks > 0) return refuse(status_code::invalid_argument, "the order of tokens is null");
  detail::pack_encoder encoder(f);
  for (std::int64_t block = 0; block < blocks; ++block)
    if (const status s = encoder.order_block(keys, values, block, order + block * tile_tokens); !s)
      return refuse(s.code, s.message, block);
  return {};
}

/// Checks packs from an untrusted source completely: whatever passes can be decoded without reading beyond `size`.
inline status check_packs(const pack_format& f, const packs_view& packs) {
  if (const status s = check_format(f); !s) return s;
  if (packs.blocks < 0) return refuse(status_code::invalid_argument, "a number of blocks is negative");
  for (const side which : {side::key, side::value}) {
    if (max_pack_bytes(f, which, packs.blocks) == 0 && packs.blocks > 0)
      return refuse(status_code::overflow, "the packs may not fit 63 bits");
    const const_pack_side& s = which == side::key ? packs.key : packs.value;
    if (const status r = packkv::detail::check_pack_index(f, which, s, packs.blocks); !r) return r;
    const std::int64_t tiles = tile_count(f, packs.blocks);
    for (std::int64_t i = 0; i < tiles; ++i)
      if (const status r = check_pack_tile(f.pack_size, f.codec(which).head_dim, s.data + s.offsets[i],
                                           s.offsets[i + 1] - s.offsets[i]);
          !r)
        return refuse(r.code, r.message, i);
  }
  return {};
}

/// Reconstructs all blocks in the order of their slots. keys [batch, kv_heads, tokens, D_k], values [.., D_v], of any
/// element type, tokens >= blocks * 64; later tokens are left as they were. Checks the packs first.
inline status decompress(const pack_format& f, const packs_view& packs, const output_view<4>& keys,
                         const output_view<4>& values) {
  using namespace packkv::detail;
  if (const status s = check_pack_tensors(f, keys, values, packs.blocks); !s) return s;
  if (const status s = check_packs(f, packs); !s) return s;
  for (const side which : {side::key, side::value}) {
    const pack_codec& codec = f.codec(which);
    const const_pack_side& from = which == side::key ? packs.key : packs.value;
    const output_view<4>& to = which == side::key ? keys : values;
    const std::int64_t ranges = range_count(f, which);
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(tile_tokens) * static_cast<std::size_t>(codec.head_dim));
    std::vector<pack_step> steps(static_cast<std::size_t>(ranges));
    std::int64_t tile = 0;
    for (std::int64_t block = 0; block < packs.blocks; ++block)
      for (int b = 0; b < f.batch; ++b) {
        const pack_range* const range = from.ranges + (block * f.batch + b) * ranges;
        for (std::int64_t i = 0; i < ranges; ++i)
          steps[static_cast<std::size_t>(i)] =
              make_pack_step(codec, range_value(f.element, range[i].low), range_value(f.element, range[i].high));
        for (int h = 0; h < f.kv_heads; ++h, ++tile) {
          decode_pack_tile(f.pack_size, codec.head_dim, from.data + from.offsets[tile], codes.data());
          for (int t = 0; t < tile_tokens; ++t)
            for (int c = 0; c < codec.head_dim; ++c)
              store_element(address(to, b, h, block * tile_tokens + t, c), to.type,
                            decode_code(codec, steps[static_cast<std::size_t>(range_index(codec, h, t, c))],
                                        codes[static_cast<std::size_t>(t * codec.head_dim + c)]));
        }
      }
  }
  return {};
}

}  // namespace reference
}  // namespace packkv
