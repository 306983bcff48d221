// SPDX-License-Identifier: Apache-2.0
// A second decoder of the strip-adaptive format, written from docs/format-grouped.md (sections 2, 4 and 8) alone, as
// tests/format/decoder.hpp is from docs/format.md. It includes nothing of packkv.
//
//     clean::adaptive_format f;   f.of = clean::side::key, f.head_dim = 128, f.relative_step = 0.1f, ...;
//     std::vector<float> x = clean::decode_adaptive(f, bytes, offsets);   // [heads][tokens][head_dim]
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "decoder.hpp"

namespace clean {

enum class shares_step { tokens_of_channel, channels_of_token, heads_of_token, all_of_block };  // channel, vector, ...

/// All that is not in the bytes.
struct adaptive_format {
  side of = side::key;
  shares_step axis = shares_step::heads_of_token;
  int head_dim = 128;
  float relative_step = 0.1f;
  bool integer_zero = false, hadamard = false, centred = false, bf16_tail = false;
  int heads = 1, tokens = 0, recent = 0;
};

inline std::vector<float> decode_adaptive(const adaptive_format& f, const std::uint8_t* bytes,
                                          const std::int64_t* offsets) {
  const std::int64_t H = f.heads, T = f.tokens, D = f.head_dim;
  const std::int64_t blocks = T > f.recent ? (T - f.recent) / 64 : 0, tail_tokens = T - 64 * blocks;
  const std::uint8_t* const means = bytes;
  const std::uint8_t* const tail = means + (f.centred ? 2 * H * D : 0);
  const std::uint8_t* const shared = tail + 2 * H * tail_tokens * D;
  description words;
  words.of = f.of;
  words.head_dim = f.head_dim;
  const std::int64_t m = D / strip_channels(words);

  std::vector<float> all;
  for (std::int64_t h = 0; h < H; ++h)
    for (std::int64_t token = 0; token < T; ++token) {
      if (token >= 64 * blocks) {
        for (std::int64_t c = 0; c < D; ++c) {
          const std::uint16_t bits = read_16(tail + 2 * ((h * tail_tokens + token - 64 * blocks) * D + c));
          all.push_back(f.bf16_tail ? from_bf16(bits) : from_fp16(bits));
        }
        continue;
      }
      const std::int64_t block = token / 64;
      const int t = static_cast<int>(token % 64), r = t % 8 * 8 + t / 8;
      const std::uint8_t* const tile = bytes + offsets[block * H + h];
      words.widths.assign(tile, tile + m);
      const std::uint8_t* const codes = tile + (2 * m + 15) / 16 * 16;
      const std::uint8_t* maxima = codes + 4 * code_words(words);
      std::int64_t groups = f.axis == shares_step::tokens_of_channel ? D : f.axis == shares_step::all_of_block ? 1 : 64;
      if (f.axis == shares_step::heads_of_token) maxima = shared + block * 2 * 2 * 64;
      if (f.axis == shares_step::all_of_block) maxima = shared + block * 16;
      const std::uint8_t* const minima = maxima + 2 * groups;

      std::vector<float> x;
      for (std::int64_t c = 0; c < D; ++c) {
        const std::int64_t index = f.axis == shares_step::tokens_of_channel ? c : groups == 1 ? 0 : r;
        const float maximum = from_fp16(read_16(maxima + 2 * index)), minimum = from_fp16(read_16(minima + 2 * index));
        const int base = tile[m + c / strip_channels(words)];
        const float code = static_cast<float>(base + read_code(codes, words, t, static_cast<int>(c)));
        const float step = (maximum - minimum) * f.relative_step;
        if (f.integer_zero && step > 0.0f) {
          x.push_back(step * (code + std::nearbyint(minimum / step)));
          continue;
        }
        const volatile float product = step * code;  // rounded before the sum
        x.push_back(product + minimum);
      }
      if (f.hadamard) hadamard(x);
      for (std::int64_t c = 0; c < D; ++c) {
        const float mean = f.centred ? from_fp16(read_16(means + 2 * (h * D + c))) : 0.0f;
        all.push_back(f.centred ? x[static_cast<std::size_t>(c)] + mean : x[static_cast<std::size_t>(c)]);
      }
    }
  return all;
}

}  // namespace clean
