// SPDX-License-Identifier: Apache-2.0
// PackKV's orders of the 64 tokens of a block: none, median and greedy, from the codes of K and V.
// One idea: everything is integer, so the order does not depend on compiler, flags or device: cosines are compared by
// cross-multiplication, and the cost of a pack is a sum of bit lengths over bytes that compilers vectorise.
//   packkv::reference::order_tokens(token_order::greedy, 16, {codes, stride, channels, first_value}, order);
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <packkv/codec/pack_format.hpp>
#include <packkv/codec/pack_order.hpp>
#include <vector>

namespace packkv::reference {

/// Codes of a block: row t holds all channels of token t, K of all batch rows and heads first, then V.
struct block_codes {
  const std::uint8_t* codes = nullptr;  ///< [64][stride]; bytes from `channels` to `stride` are 0
  std::int64_t stride = 0;              ///< bytes of a row, a multiple of 64
  std::int64_t channels = 0;            ///< of K and V together, at most 2^26
  std::int64_t first_value = 0;         ///< channels of K: where the V half begins

  const std::uint8_t* row(int token) const { return codes + token * stride; }
};

namespace detail {

inline constexpr int order_lanes = 64;  ///< bytes that one step of the loops below handles

/// Sum over bytes of bit_length(largest - smallest) of a pack that spans low..high after token `x` joins it; codes are
/// below 2^Bits. Stops early, with any value >= limit, once the sum is known to reach `limit`.
template <int Bits>
std::int64_t joined_width(const std::uint8_t* low, const std::uint8_t* high, const std::uint8_t* x, std::int64_t bytes,
                          std::int64_t limit) {
  constexpr std::int64_t chunk = order_lanes * 16;  // 16 * 8 bits fit a byte
  std::int64_t sum = 0;
  for (std::int64_t first = 0; first < bytes && sum < limit; first += chunk) {
    std::uint8_t lane[order_lanes] = {};
    const std::int64_t end = min_of(first + chunk, bytes);
    for (std::int64_t i = first; i < end; i += order_lanes) {
      std::uint8_t range[order_lanes];
      for (int k = 0; k < order_lanes; ++k) {
        const std::uint8_t top = max_of(high[i + k], x[i + k]), bottom = min_of(low[i + k], x[i + k]);
        range[k] = static_cast<std::uint8_t>(top - bottom);
      }
      for (int bit = 0; bit < Bits; ++bit) {
        const std::uint8_t power = static_cast<std::uint8_t>(1 << bit);
        for (int k = 0; k < order_lanes; ++k)
          lane[k] = static_cast<std::uint8_t>(lane[k] + (range[k] >= power ? 1 : 0));
      }
    }
    std::int32_t part = 0;
    for (int k = 0; k < order_lanes; ++k) part += lane[k];
    sum += part;
  }
  return sum;
}

using joined_width_function = std::int64_t (*)(const std::uint8_t*, const std::uint8_t*, const std::uint8_t*,
                                               std::int64_t, std::int64_t);

inline joined_width_function joined_width_for(int bits) {
  constexpr joined_width_function table[] = {joined_width<0>, joined_width<1>, joined_width<2>,
                                             joined_width<3>, joined_width<4>, joined_width<5>,
                                             joined_width<6>, joined_width<7>, joined_width<8>};
  return table[bits];
}

/// Dot product of two rows; below 2^42 for rows of at most 2^26 bytes.
inline std::uint64_t dot_bytes(const std::uint8_t* a, const std::uint8_t* b, std::int64_t bytes) {
  constexpr std::int64_t chunk = 16384;  // 255 * 255 * 16384 < 2^31
  std::uint64_t sum = 0;
  for (std::int64_t first = 0; first < bytes; first += chunk) {
    const std::int64_t end = min_of(first + chunk, bytes);
    std::int32_t part = 0;
    for (std::int64_t i = first; i < end; ++i)
      part += static_cast<std::int32_t>(a[i]) * static_cast<std::int32_t>(b[i]);
    sum += static_cast<std::uint64_t>(part);
  }
  return sum;
}

/// Lower median of n > 0 codes.
inline int lower_median(const std::uint8_t* x, std::int64_t n) {
  std::int64_t count[256] = {};
  for (std::int64_t i = 0; i < n; ++i) ++count[x[i]];
  int value = 0;
  for (std::int64_t below = count[0]; below <= (n - 1) / 2; below += count[value]) ++value;
  return value;
}

/// Tokens by the lower median of their V half, descending; equal ones keep their order.
inline void order_by_median(const block_codes& block, std::uint8_t* order) {
  int median[tile_tokens];
  for (int t = 0; t < tile_tokens; ++t)
    median[t] = lower_median(block.row(t) + block.first_value, block.channels - block.first_value);
  for (int t = 0; t < tile_tokens; ++t) {  // insertion, stable
    int slot = t;
    for (; slot > 0 && median[order[slot - 1]] < median[t]; --slot) order[slot] = order[slot - 1];
    order[slot] = static_cast<std::uint8_t>(t);
  }
}

/// Packs one after the other: a seed close to the mean of what is left, then whatever widens the pack least.
class greedy_packs {
 public:
  explicit greedy_packs(const block_codes& block) : block_(block) {
    const std::size_t bytes = static_cast<std::size_t>(block.stride);
    low_.resize(bytes);
    high_.resize(bytes);
    mean_.resize(bytes);
    sum_.assign(bytes, 0);
    std::uint8_t largest = 0;
    for (int t = 0; t < tile_tokens; ++t) {
      remaining_[t] = static_cast<std::uint8_t>(t);
      const std::uint8_t* const x = block.row(t);
      norm_[t] = dot_bytes(x, x, block.stride);
      for (std::size_t i = 0; i < bytes; ++i) {
        sum_[i] += x[i];
        largest = max_of(largest, x[i]);
      }
    }
    joined_width_ = joined_width_for(bit_length(largest));
  }

  void run(int pack_size, std::uint8_t* order) {
    for (int slot = 0; slot < tile_tokens; ++slot) order[slot] = slot % pack_size == 0 ? take_seed() : take_next();
  }

 private:
  std::uint8_t take_seed() {
    for (std::size_t i = 0; i < sum_.size(); ++i)
      mean_[i] = static_cast<std::uint8_t>(rounded_mean(sum_[i], static_cast<std::uint32_t>(left_)));
    int best = 0;
    std::uint64_t best_dot = 0;
    for (int i = 0; i < left_; ++i) {
      const std::uint64_t dot = dot_bytes(block_.row(remaining_[i]), mean_.data(), block_.stride);
      if (i > 0 && !greater_cosine(dot, norm_[remaining_[i]], best_dot, norm_[remaining_[best]])) continue;
      best = i;
      best_dot = dot;
    }
    const std::uint8_t token = take(best);
    const std::uint8_t* const x = block_.row(token);
    low_.assign(x, x + block_.stride);
    high_ = low_;
    return token;
  }

  std::uint8_t take_next() {
    int best = 0;
    std::int64_t best_width = (std::numeric_limits<std::int64_t>::max)();
    for (int i = 0; i < left_; ++i) {
      const std::int64_t width =
          joined_width_(low_.data(), high_.data(), block_.row(remaining_[i]), block_.stride, best_width);
      if (width >= best_width) continue;
      best = i;
      best_width = width;
    }
    const std::uint8_t token = take(best);
    const std::uint8_t* const x = block_.row(token);
    for (std::size_t i = 0; i < low_.size(); ++i) {
      low_[i] = min_of(low_[i], x[i]);
      high_[i] = max_of(high_[i], x[i]);
    }
    return token;
  }

  /// Removes the i-th remaining token; the others keep their order.
  std::uint8_t take(int i) {
    const std::uint8_t token = remaining_[i];
    const std::uint8_t* const x = block_.row(token);
    for (std::size_t k = 0; k < sum_.size(); ++k) sum_[k] -= x[k];
    for (--left_; i < left_; ++i) remaining_[i] = remaining_[i + 1];
    return token;
  }

  const block_codes& block_;
  std::vector<std::uint8_t> low_, high_, mean_;
  std::vector<std::uint32_t> sum_;  ///< of the remaining tokens
  std::uint64_t norm_[tile_tokens] = {};
  std::uint8_t remaining_[tile_tokens] = {};
  int left_ = tile_tokens;
  joined_width_function joined_width_ = nullptr;
};

}  // namespace detail

/// order[slot] = token of the block that comes to `slot` (docs/format-packkv.md, section 6).
/// pack_size is 2, 4, 8, 16 or 32; only the greedy order uses it. order: uint8 [64].
inline void order_tokens(token_order which, int pack_size, const block_codes& block, std::uint8_t* order) {
  for (int t = 0; t < tile_tokens; ++t) order[t] = static_cast<std::uint8_t>(t);
  if (which == token_order::median) detail::order_by_median(block, order);
  if (which == token_order::greedy) detail::greedy_packs(block).run(pack_size, order);
}

}  // namespace packkv::reference
