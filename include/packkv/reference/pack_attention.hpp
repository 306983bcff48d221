// SPDX-License-Identifier: Apache-2.0
// Scores, weighted sums and attention on packs, on the CPU, in double precision, without reconstructing an element.
// One idea: x^ = code * scale + offset, so a step common to a token multiplies its score or weight, and a step common
// to a channel multiplies its query or output channel; the inner loops see codes alone.
//   status s = reference::key_gemv(format, packs, queries, scale, scores);   // scores in order of slots
//   s = reference::attention(format, packs, key_tail, value_tail, queries, scale, out, lse);
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <packkv/reference/packs.hpp>
#include <vector>

namespace packkv::reference {

namespace detail {

inline pack_affine affine_of(const pack_format& f, const pack_codec& codec, const pack_range& range) {
  return make_pack_affine(
      codec, make_pack_step(codec, range_value(f.element, range.low), range_value(f.element, range.high)));
}

/// The codes and steps of one tile of checked packs.
class unpacked_tile {
 public:
  unpacked_tile(const pack_format& f, side which)
      : format_(f),
        which_(which),
        codec_(f.codec(which)),
        codes_(static_cast<std::size_t>(tile_tokens) * static_cast<std::size_t>(codec_.head_dim)),
        steps_(static_cast<std::size_t>(by_channel() ? codec_.head_dim : tile_tokens)) {}

  bool by_channel() const { return codec_.granularity == pack_granularity::channel; }
  const std::uint8_t* codes(int slot) const { return codes_.data() + slot * codec_.head_dim; }
  /// Step of a slot or, by_channel(), of a channel.
  const pack_affine& step(int i) const { return steps_[static_cast<std::size_t>(i)]; }
  int head_dim() const { return codec_.head_dim; }

  void load(const packs_view& packs, std::int64_t block, int b, int head) {
    const const_pack_side& from = which_ == side::key ? packs.key : packs.value;
    const std::int64_t row = block * format_.batch + b;
    decode_pack_tile(format_.pack_size, codec_.head_dim, from.data + from.offsets[row * format_.kv_heads + head],
                     codes_.data());
    const pack_range* const ranges = from.ranges + row * range_count(format_, which_);
    for (int i = 0; i < static_cast<int>(steps_.size()); ++i)
      steps_[static_cast<std::size_t>(i)] = affine_of(
          format_, codec_, ranges[by_channel() ? range_index(codec_, head, 0, i) : range_index(codec_, head, i, 0)]);
  }

 private:
  const pack_format& format_;
  side which_;
  const pack_codec& codec_;
  std::vector<std::uint8_t> codes_;  ///< [64][D]
  std::vector<pack_affine> steps_;
};

/// scores[slot] = q . k^[slot] for the 64 slots of a tile; q [D].
inline void tile_scores(const unpacked_tile& tile, const double* q, double* scores) {
  const int dim = tile.head_dim();
  double folded[max_head_dim], constant = 0.0;  // constant: the offsets' part, of a unit step unless by channel
  for (int c = 0; c < dim; ++c) {
    folded[c] = tile.by_channel() ? q[c] * tile.step(c).scale : q[c];
    constant += tile.by_channel() ? q[c] * tile.step(c).offset : q[c];
  }
  for (int slot = 0; slot < tile_tokens; ++slot) {
    const std::uint8_t* const codes = tile.codes(slot);
    double sum = 0.0;
    for (int c = 0; c < dim; ++c) sum += folded[c] * codes[c];
    scores[slot] = tile.by_channel() ? sum + constant : tile.step(slot).scale * sum + tile.step(slot).offset * constant;
  }
}

/// out[c] += sum over the 64 slots of weights[slot] * v^[slot][c]; out [D].
inline void add_tile_values(const unpacked_tile& tile, const double* weights, double* out) {
  const int dim = tile.head_dim();
  double sum[max_head_dim] = {}, constant = 0.0;
  for (int slot = 0; slot < tile_tokens; ++slot) {
    const std::uint8_t* const codes = tile.codes(slot);
    const double w = tile.by_channel() ? weights[slot] : weights[slot] * tile.step(slot).scale;
    constant += tile.by_channel() ? weights[slot] : weights[slot] * tile.step(slot).offset;
    for (int c = 0; c < dim; ++c) sum[c] += w * codes[c];
  }
  for (int c = 0; c < dim; ++c)
    out[c] += tile.by_channel() ? tile.step(c).scale * sum[c] + tile.step(c).offset * constant : sum[c] + constant;
}

inline void load_row(const input_view<3>& x, std::int64_t b, std::int64_t h, double* row) {
  for (std::int64_t c = 0; c < x.extent[2]; ++c)
    row[c] = static_cast<double>(packkv::detail::load_element(packkv::detail::address(x, b, h, c), x.type));
}

/// Of keys: in [batch, query_heads, D_k], out [batch, query_heads, blocks * 64]; of values: in [batch, query_heads,
/// blocks * 64], out [batch, query_heads, D_v].
inline status check_pack_gemv(const pack_format& f, const packs_view& packs, side which, const input_view<3>& in,
                              const output_view<3>& out) {
  if (const status s = check_packs(f, packs); !s) return s;
  if (const status s = packkv::detail::check_view(in); !s) return s;
  if (const status s = packkv::detail::check_view(out); !s) return s;
  if (in.extent[0] != f.batch || out.extent[0] != f.batch)
    return refuse(status_code::shape_mismatch, "a tensor's batch is not the format's");
  if (in.extent[1] != out.extent[1] || in.extent[1] % f.kv_heads != 0)
    return refuse(status_code::shape_mismatch, "query heads must be the same multiple of the KV heads everywhere");
  const std::int64_t slots = packs.blocks * tile_tokens;  // fits, because the packs do
  const std::int64_t of_elements = which == side::key ? in.extent[2] : out.extent[2];
  const std::int64_t of_slots = which == side::key ? out.extent[2] : in.extent[2];
  if (of_elements != f.codec(which).head_dim || of_slots != slots)
    return refuse(status_code::shape_mismatch, "a tensor's last extent is not the packs' head_dim or tokens");
  return {};
}

}  // namespace detail

/// scores[b, h, s] = scale * q[b, h, :] . k^[b, s, :] for every slot s of the packs, in their order. Query heads
/// h * group .. belong to KV head h. queries [batch, query_heads, D_k], scores [batch, query_heads, blocks * 64].
inline status key_gemv(const pack_format& f, const packs_view& packs, const input_view<3>& queries, float scale,
                       const output_view<3>& scores) {
  if (const status s = detail::check_pack_gemv(f, packs, side::key, queries, scores); !s) return s;
  const std::int64_t group = queries.extent[1] / f.kv_heads;
  detail::unpacked_tile tile(f, side::key);
  double q[max_head_dim], s[tile_tokens];
  for (int b = 0; b < f.batch; ++b)
    for (int head = 0; head < f.kv_heads; ++head)
      for (std::int64_t block = 0; block < packs.blocks; ++block) {
        tile.load(packs, block, b, head);
        for (std::int64_t h = head * group; h < (head + 1) * group; ++h) {
          detail::load_row(queries, b, h, q);
          detail::tile_scores(tile, q, s);
          for (int slot = 0; slot < tile_tokens; ++slot)
            packkv::detail::store_element(packkv::detail::address(scores, b, h, block * tile_tokens + slot),
                                          scores.type, static_cast<float>(static_cast<double>(scale) * s[slot]));
        }
      }
  return {};
}

/// out[b, h, :] = sum over slots s of weights[b, h, s] * v^[b, s, :]. weights [batch, query_heads, blocks * 64] in the
/// order of the slots, out [batch, query_heads, D_v].
inline status value_gemv(const pack_format& f, const packs_view& packs, const input_view<3>& weights,
                         const output_view<3>& out) {
  if (const status s = detail::check_pack_gemv(f, packs, side::value, weights, out); !s) return s;
  const std::int64_t group = weights.extent[1] / f.kv_heads;
  const std::size_t dim = static_cast<std::size_t>(f.value.head_dim);
  detail::unpacked_tile tile(f, side::value);
  std::vector<double> sums(static_cast<std::size_t>(group) * dim);
  double w[tile_tokens];
  for (int b = 0; b < f.batch; ++b)
    for (int head = 0; head < f.kv_heads; ++head) {
      sums.assign(sums.size(), 0.0);
      for (std::int64_t block = 0; block < packs.blocks; ++block) {
        tile.load(packs, block, b, head);
        for (std::int64_t g = 0; g < group; ++g) {
          for (int slot = 0; slot < tile_tokens; ++slot)
            w[slot] = static_cast<double>(packkv::detail::load_element(
                packkv::detail::address(weights, b, head * group + g, block * tile_tokens + slot), weights.type));
          detail::add_tile_values(tile, w, sums.data() + static_cast<std::size_t>(g) * dim);
        }
      }
      for (std::int64_t g = 0; g < group; ++g)
        for (std::size_t c = 0; c < dim; ++c)
          packkv::detail::store_element(packkv::detail::address(out, b, head * group + g, static_cast<std::int64_t>(c)),
                                        out.type, static_cast<float>(sums[static_cast<std::size_t>(g) * dim + c]));
    }
  return {};
}

/// softmax(scale * q . K^T) V over all packed tokens and the 16-bit tokens that follow them. Query i of n sees all
/// packed tokens and the first tail - n + 1 + i tokens of the tail (n <= tail; one query sees them all). key_tail
/// [batch, kv_heads, tail, D_k], value_tail [.., D_v]; queries [batch, query_heads, n, D_k]; out [batch, query_heads,
/// n, D_v]; lse [batch, query_heads, n], natural logarithm, may be a null view.
inline status attention(const pack_format& f, const packs_view& packs, const input_view<4>& key_tail,
                        const input_view<4>& value_tail, const input_view<4>& queries, float scale,
                        const output_view<4>& out, const output_view<3>& lse) {
  using namespace packkv::detail;
  if (const status s = check_packs(f, packs); !s) return s;
  if (const status s = check_pack_tensors(f, key_tail, value_tail, 0); !s) return s;
  if (const status s = check_softmax_scale(scale); !s) return s;
  if (const status s = check_view(queries); !s) return s;
  if (const status s = check_view(out); !s) return s;
  const std::int64_t tail = key_tail.extent[2], heads = queries.extent[1], n = queries.extent[2];
  if (value_tail.extent[2] != tail) return refuse(status_code::shape_mismatch, "the tails of K and V differ in tokens");
  if (n > tail && !(n == 1 && packs.blocks > 0))
    return refuse(status_code::shape_mismatch, "there are more queries than tokens in the tail");
  if (queries.extent[0] != f.batch || queries.extent[3] != f.key.head_dim || heads % f.kv_heads != 0)
    return refuse(status_code::shape_mismatch, "queries do not fit the format's batch, heads or head_dim");
  if (out.extent[0] != f.batch || out.extent[1] != heads || out.extent[2] != n || out.extent[3] != f.value.head_dim)
    return refuse(status_code::shape_mismatch, "the output does not fit the queries or the format's head_dim");
  if (lse.data != nullptr) {
    if (const status s = check_view(lse); !s) return s;
    if (lse.extent[0] != f.batch || lse.extent[1] != heads || lse.extent[2] != n)
      return refuse(status_code::shape_mismatch, "lse does not fit the queries");
  }
  const std::int64_t group = heads / f.kv_heads, packed = packs.blocks * tile_tokens;
  const int key_dim = f.key.head_dim, value_dim = f.value.head_dim;
  detail::unpacked_tile keys(f, side::key), values(f, side::value);
  if (!(checked(group) * n * (checked(packed) + tail) * 8).valid())
    return refuse(status_code::overflow, "the scores of one KV head do not fit 63 bits");
  const std::int64_t rows = group * n;  // of one KV head
  std::vector<double> q(static_cast<std::size_t>(rows * key_dim)), s(static_cast<std::size_t>(rows * (packed + tail))),
      o(static_cast<std::size_t>(rows * value_dim)), largest(static_cast<std::size_t>(rows)), total(largest.size());
  for (int b = 0; b < f.batch; ++b)
    for (int head = 0; head < f.kv_heads; ++head) {
      const auto element = [&](const input_view<4>& x, std::int64_t h, std::int64_t t, std::int64_t c) {
        return static_cast<double>(load_element(address(x, b, h, t, c), x.type));
      };
      const auto row_scores = [&](std::int64_t r) { return s.data() + r * (packed + tail); };
      for (std::int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < key_dim; ++c)
          q[static_cast<std::size_t>(r * key_dim + c)] = element(queries, head * group + r / n, r % n, c);
      // Scores of the packs, then of the tail.
      for (std::int64_t block = 0; block < packs.blocks; ++block) {
        keys.load(packs, block, b, head);
        for (std::int64_t r = 0; r < rows; ++r)
          detail::tile_scores(keys, q.data() + r * key_dim, row_scores(r) + block * tile_tokens);
      }
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t t = 0; t < tail; ++t) {
          double sum = 0.0;
          for (int c = 0; c < key_dim; ++c)
            sum += q[static_cast<std::size_t>(r * key_dim + c)] * element(key_tail, head, t, c);
          row_scores(r)[packed + t] = sum;
        }
      // Weights.
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t visible = packed + (tail == 0 ? 0 : tail - n + 1 + r % n);
        double m = -INFINITY, sum = 0.0;
        double* const w = row_scores(r);
        for (std::int64_t t = 0; t < visible; ++t) m = std::fmax(m, w[t] *= static_cast<double>(scale));
        for (std::int64_t t = 0; t < visible; ++t) sum += w[t] = std::exp(w[t] - m);
        for (std::int64_t t = visible; t < packed + tail; ++t) w[t] = 0.0;
        largest[static_cast<std::size_t>(r)] = m;
        total[static_cast<std::size_t>(r)] = sum;
      }
      // Values of the packs, then of the tail.
      o.assign(o.size(), 0.0);
      for (std::int64_t block = 0; block < packs.blocks; ++block) {
        values.load(packs, block, b, head);
        for (std::int64_t r = 0; r < rows; ++r)
          detail::add_tile_values(values, row_scores(r) + block * tile_tokens, o.data() + r * value_dim);
      }
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t t = 0; t < tail; ++t)
          for (int c = 0; c < value_dim && row_scores(r)[packed + t] != 0.0; ++c)
            o[static_cast<std::size_t>(r * value_dim + c)] +=
                row_scores(r)[packed + t] * element(value_tail, head, t, c);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t h = head * group + r / n, i = r % n;
        const std::size_t k = static_cast<std::size_t>(r);
        for (int c = 0; c < value_dim; ++c)
          store_element(address(out, b, h, i, c), out.type,
                        static_cast<float>(o[static_cast<std::size_t>(r * value_dim + c)] / total[k]));
        if (lse.data != nullptr)
          store_element(address(lse, b, h, i), lse.type, static_cast<float>(largest[k] + std::log(total[k])));
      }
    }
  return {};
}

}  // namespace packkv::reference
