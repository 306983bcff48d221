// SPDX-License-Identifier: Apache-2.0
// PackKV written down a second time, as plainly as possible and without the library's code: quantiser, orders, sizes,
// and a decoder of the bytes that follows docs/format-packkv.md alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <set>
#include <vector>

namespace naive {

using numbers = std::vector<float>;
using integers = std::vector<int>;

enum class group { token, vector, channel, block };
enum class zero { integer, floating };
enum class order { none, median, greedy };

/// One side of one batch row of one block: [heads][64][dim], flattened.
struct block {
  int heads = 1, dim = 64;
  numbers x;
  std::size_t at(int h, int t, int c) const {
    return (static_cast<std::size_t>(h) * 64 + static_cast<std::size_t>(t)) * static_cast<std::size_t>(dim) +
           static_cast<std::size_t>(c);
  }
};

struct quantised {
  integers code;
  numbers value;
};

/// Which elements share a step: a key that is equal for them.
inline int group_key(group g, int h, int t, int c) {
  if (g == group::token) return t;
  if (g == group::vector) return h * 64 + t;
  if (g == group::channel) return h * 100000 + c;
  return 0;
}

inline float rint_even(float x) {
  const float down = std::floor(x), rest = x - down;
  if (rest != 0.5f) return rest < 0.5f ? down : down + 1.0f;
  return std::fmod(down, 2.0f) == 0.0f ? down : down + 1.0f;
}

inline quantised quantise(const block& b, group g, zero z, float r) {
  quantised q{integers(b.x.size()), numbers(b.x.size())};
  for (int h = 0; h < b.heads; ++h)
    for (int t = 0; t < 64; ++t)
      for (int c = 0; c < b.dim; ++c) {
        float low = INFINITY, high = -INFINITY;  // of the element's group, found anew where it is cheap to find
        const bool row = g == group::token || g == group::vector;
        static thread_local float kept_low, kept_high;
        if (row && c > 0 && g == group::vector) {
          low = kept_low;
          high = kept_high;
        } else {
          for (int i = (g == group::vector || g == group::channel) ? h : 0;
               i < ((g == group::vector || g == group::channel) ? h + 1 : b.heads); ++i)
            for (int j = row ? t : 0; j < (row ? t + 1 : 64); ++j)
              for (int k = g == group::channel ? c : 0; k < (g == group::channel ? c + 1 : b.dim); ++k) {
                low = std::min(low, b.x[b.at(i, j, k)]);
                high = std::max(high, b.x[b.at(i, j, k)]);
              }
          kept_low = low;
          kept_high = high;
        }
        const std::size_t at = b.at(h, t, c);
        const float x = b.x[at];
        volatile float scale = high - low;
        scale = scale * r;
        if (scale == 0.0f) {
          q.code[at] = 0;
          q.value[at] = low;
        } else if (z == zero::integer) {
          const float offset = rint_even(low / scale);
          q.code[at] = static_cast<int>(rint_even(x / scale) - offset);
          q.value[at] = (static_cast<float>(q.code[at]) + offset) * scale;
        } else {
          volatile float shifted = x - low;
          q.code[at] = static_cast<int>(rint_even(shifted / scale));
          volatile float product = static_cast<float>(q.code[at]) * scale;
          q.value[at] = product + low;
        }
      }
  return q;
}

/// ceil(log2(n)) for n >= 1, by counting.
inline int ceil_log2(int n) {
  int bits = 0;
  while ((1 << bits) < n) ++bits;
  return bits;
}

/// tokens: 64 vectors; first_value: where their V halves begin. Returns the token of every slot.
inline integers find_order(order how, int pack, const std::vector<integers>& tokens, std::size_t first_value) {
  integers left(64), result;
  std::iota(left.begin(), left.end(), 0);
  if (how == order::none) return left;
  if (how == order::median) {
    integers median;
    for (const integers& t : tokens) {
      integers v(t.begin() + static_cast<std::ptrdiff_t>(first_value), t.end());
      std::sort(v.begin(), v.end());
      median.push_back(v[(v.size() - 1) / 2]);
    }
    std::stable_sort(left.begin(), left.end(), [&](int a, int b) {
      return median[static_cast<std::size_t>(a)] > median[static_cast<std::size_t>(b)];
    });
    return left;
  }
  const auto take = [&](std::size_t i) {
    result.push_back(left[i]);
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(i));
  };
  while (!left.empty()) {
    const std::size_t n = tokens[0].size();
    std::vector<double> mean(n);
    for (std::size_t c = 0; c < n; ++c) {
      double sum = 0.0;
      for (const int t : left) sum += tokens[static_cast<std::size_t>(t)][c];
      mean[c] = std::nearbyint(sum / static_cast<double>(left.size()));
    }
    std::size_t best = 0;
    long double best_cosine = -1.0L;
    for (std::size_t i = 0; i < left.size(); ++i) {
      long double dot = 0.0L, norm = 0.0L;
      for (std::size_t c = 0; c < n; ++c) {
        const long double x = tokens[static_cast<std::size_t>(left[i])][c];
        dot += x * static_cast<long double>(mean[c]);
        norm += x * x;
      }
      const long double cosine = norm == 0.0L ? 0.0L : dot * dot / norm;  // monotone: codes are not negative
      if (cosine > best_cosine * (1.0L + 1e-17L)) {
        best = i;
        best_cosine = cosine;
      }
    }
    std::vector<std::size_t> members;
    members.push_back(static_cast<std::size_t>(left[best]));
    take(best);
    for (int k = 1; k < pack; ++k) {
      integers low = tokens[members[0]], high = low;
      for (const std::size_t m : members)
        for (std::size_t c = 0; c < n; ++c) {
          low[c] = std::min(low[c], tokens[m][c]);
          high[c] = std::max(high[c], tokens[m][c]);
        }
      long cheapest = -1;
      for (std::size_t i = 0; i < left.size(); ++i) {
        const integers& x = tokens[static_cast<std::size_t>(left[i])];
        long cost = 0;
        for (std::size_t c = 0; c < n; ++c) cost += ceil_log2(std::max(high[c], x[c]) - std::min(low[c], x[c]) + 1);
        if (cheapest < 0 || cost < cheapest) {
          cheapest = cost;
          best = i;
        }
      }
      members.push_back(static_cast<std::size_t>(left[best]));
      take(best);
    }
  }
  return result;
}

/// Sizes of one tensor by the published formula.
struct sizes {
  std::int64_t values = 0, packs = 0, payload = 0;
  std::set<int> codes;

  /// One channel of one head of one block, its 64 codes in the order of slots.
  void add(const integers& slots, int pack) {
    for (int first = 0; first < 64; first += pack) {
      const auto from = slots.begin() + first;
      const auto range = std::minmax_element(from, from + pack);
      payload += std::int64_t{pack} * ceil_log2(*range.second - *range.first + 1);
      ++packs;
    }
    values += 64;
    codes.insert(slots.begin(), slots.end());
  }
  double ratio() const {
    const int raw = ceil_log2(static_cast<int>(codes.size())), width = ceil_log2(raw + 1);
    return 16.0 * static_cast<double>(values) / static_cast<double>(payload + packs * (raw + width));
  }
};

/// Codes of a tile, [64 slots][dim], from its bytes; every bit is looked up on its own.
inline integers decode_tile(const std::uint8_t* tile, int pack, int dim) {
  const auto field = [&](std::int64_t byte, std::int64_t bit, int bits) {
    int value = 0;
    for (int i = 0; i < bits; ++i) value |= (tile[byte + (bit + i) / 8] >> ((bit + i) % 8) & 1) << i;
    return value;
  };
  const auto words = [](std::int64_t bits) { return (bits + 31) / 32 * 4; };
  const int groups = 64 / pack, minimum_bits = tile[0], width_bits = tile[1];
  const std::int64_t widths = 4 + words(16 * groups), minima = widths + words(std::int64_t{width_bits} * groups * dim),
                     payload = minima + words(std::int64_t{minimum_bits} * groups * dim);
  integers codes(static_cast<std::size_t>(64 * dim));
  for (int g = 0; g < groups; ++g) {
    std::int64_t bit = 32 * std::int64_t{field(4, 16 * g, 16)};
    for (int c = 0; c < dim; ++c) {
      const int width = field(widths, std::int64_t{g * dim + c} * width_bits, width_bits);
      const int minimum = field(minima, std::int64_t{g * dim + c} * minimum_bits, minimum_bits);
      for (int i = 0; i < pack; ++i, bit += width)
        codes[static_cast<std::size_t>((g * pack + i) * dim + c)] = minimum + field(payload, bit, width);
    }
  }
  return codes;
}

}  // namespace naive
