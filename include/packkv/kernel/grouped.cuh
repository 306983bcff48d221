// SPDX-License-Identifier: Apache-2.0
// Encodes one side of a sequence to a `grouped` format: channel means, groups along tokens (a warp for each head and
// group of tokens), groups along channels (a warp per token), the 16-bit tail. Bytes of reference::encode_grouped.
// One idea: an element is loaded and transformed again wherever it is needed, so there is no scratch memory.
#pragma once

#include <packkv/detail/report.cuh>
#include <packkv/warp/group_statistics.cuh>
#include <packkv/warp/grouped_tokens.cuh>

namespace packkv::kernel {

inline constexpr int grouped_warps = 8;

/// fp16 means of every channel over the first `tokens` tokens of x; a thread per channel.
template <int Threads>
__global__ void __launch_bounds__(Threads)
    channel_means(const __grid_constant__ input_view<3> x, std::int64_t tokens, std::uint8_t* bytes) {
  const std::int64_t channels = x.extent[0] * x.extent[2];
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * Threads + threadIdx.x; i < channels;
       i += static_cast<std::int64_t>(gridDim.x) * Threads)
    reinterpret_cast<std::uint16_t*>(bytes)[i] = detail::channel_mean_bits(x, i / x.extent[2], i % x.extent[2], tokens);
}

/// The tokens from `first` on as they are, to tail [heads, tokens - first, head_dim].
template <int Threads>
__global__ void __launch_bounds__(Threads)
    copy_tail(const __grid_constant__ input_view<3> x, std::int64_t first, std::uint8_t* tail) {
  const std::int64_t tokens = x.extent[1] - first, dim = x.extent[2], elements = x.extent[0] * tokens * dim;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * Threads + threadIdx.x; i < elements;
       i += static_cast<std::int64_t>(gridDim.x) * Threads)
    reinterpret_cast<std::uint16_t*>(tail)[i] =
        *static_cast<const std::uint16_t*>(detail::address(x, i / dim / tokens, first + i / dim % tokens, i % dim));
}

struct grouped_args {
  grouped_spec spec;
  grouped_layout layout;
  input_view<3> x;      ///< [heads, tokens, head_dim], 16-bit
  std::uint8_t* bytes;  ///< means are there, blocks are zero
  device_report* report;
};

/// What the two encoders share: rows of y, and where a block's numbers and codes go. Held by each warp.
template <int HeadDim>
class group_writer {
 public:
  static constexpr int registers = HeadDim / 32;

  __device__ group_writer(const grouped_args& a, std::int64_t block)
      : a_(a),
        first_(block * a.spec.block_tokens()),
        block_(a.bytes + a.layout.blocks_offset + block * a.spec.block_bytes(a.layout.heads)) {}

  /// Token `token` of the block in the coded basis; whether its elements are finite.
  __device__ bool load(std::int64_t head, int token, float (&y)[registers]) const {
    return warp::to_coded_basis<HeadDim>(a_.spec, a_.bytes, a_.x, head, first_ + token, y);
  }
  /// Numbers of the group of an element; of every calling lane.
  __device__ void store(detail::group_numbers g, std::int64_t head, int token, int channel) const {
    const group_place at = locate_group(a_.spec, a_.layout.heads, head, token, channel);
    *reinterpret_cast<std::uint16_t*>(block_ + at.first) = g.first;
    if (a_.spec.has_minima()) *reinterpret_cast<std::uint16_t*>(block_ + at.minimum) = g.minimum;
  }
  /// Code of y in a group. Tokens share words, so bits are or-ed.
  __device__ void put(detail::group_values v, float y, std::int64_t head, int token, int channel) const {
    auto* words = reinterpret_cast<std::uint32_t*>(block_ + grouped_tile_offset(a_.spec, head, token / tile_tokens));
    const code_writes writes =
        split_code(locate(a_.spec.strips, token % tile_tokens, channel), detail::encode_in(a_.spec, v, y));
    for (int i = 0; i < writes.count; ++i)
      if (writes.write[i].bits != 0) atomicOr(words + writes.write[i].word, writes.write[i].bits);
  }

 private:
  const grouped_args& a_;
  std::int64_t first_;
  std::uint8_t* block_;
};

/// Groups along tokens. Item: (block, head, group of the block).
template <int HeadDim>
__global__ void __launch_bounds__(grouped_warps * 32) encode_token_groups(const __grid_constant__ grouped_args a) {
  using namespace packkv::detail;
  constexpr int registers = HeadDim / 32;
  const int size = a.spec.group, groups = a.spec.block_tokens() / size;
  const std::int64_t items = a.layout.blocks * a.layout.heads * groups;
  std::uint32_t flags = 0;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * grouped_warps + warp_id(); item < items;
       item += static_cast<std::int64_t>(gridDim.x) * grouped_warps) {
    const int first = static_cast<int>(item % groups) * size;
    const std::int64_t head = item / groups % a.layout.heads;
    const group_writer<HeadDim> writer(a, item / groups / a.layout.heads);
    float y[registers];
    warp::extremes range[registers];
    bool finite = true;
    for (int t = first; t < first + size; ++t) {
      finite = writer.load(head, t, y) && finite;
      for (int i = 0; i < registers; ++i) range[i].add(y[i]);
    }
    group_numbers g[registers];
    for (int i = 0; i < registers; ++i) {
      const int c = lane_id() + 32 * i;
      g[i] = warp::group_numbers_of(a.spec, range[i], size, [&](auto&& term) {
        return warp::sum_of_own(
            [&](auto&& f) {
              for (int t = first; t < first + size; ++t) {
                writer.load(head, t, y);
                f(y[i]);
              }
            },
            term);
      });
      if (finite && !g[i].valid()) flags |= report_scale_overflow;
      writer.store(g[i], head, first, c);
    }
    if (!finite) flags |= report_nonfinite_input;
    for (int t = first; t < first + size; ++t) {
      writer.load(head, t, y);
      for (int i = 0; i < registers; ++i) writer.put(values_of(a.spec, g[i]), y[i], head, t, lane_id() + 32 * i);
    }
  }
  detail::add_report(a.report, flags, 0);
}

/// Groups along channels, of one head (vector) or all (token). Item: (block, token of the block, head unless all).
template <int HeadDim>
__global__ void __launch_bounds__(grouped_warps * 32) encode_channel_groups(const __grid_constant__ grouped_args a) {
  using namespace packkv::detail;
  constexpr int registers = HeadDim / 32;
  const bool all_heads = a.spec.axis == group_axis::token;
  const std::int64_t units = all_heads ? 1 : a.layout.heads, heads = all_heads ? a.layout.heads : 1;
  const int size = all_heads ? HeadDim : a.spec.group, tokens = a.spec.block_tokens();
  const std::int64_t items = a.layout.coded_tokens * units;
  std::uint32_t flags = 0;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * grouped_warps + warp_id(); item < items;
       item += static_cast<std::int64_t>(gridDim.x) * grouped_warps) {
    const std::int64_t first_head = item % units, token = item / units;
    const int t = static_cast<int>(token % tokens);
    const group_writer<HeadDim> writer(a, token / tokens);
    float y[registers];
    for (int first = 0; first < HeadDim; first += size) {
      // f(channel, element) for the elements of this lane.
      bool finite = true;
      const auto for_each = [&](auto&& f) {
        for (std::int64_t h = first_head; h < first_head + heads; ++h) {
          finite = writer.load(h, t, y) && finite;
          for (int i = 0; i < registers; ++i) {
            const int c = lane_id() + 32 * i;
            if (c >= first && c < first + size) f(h, c, y[i]);
          }
        }
      };
      warp::extremes range;
      for_each([&](std::int64_t, int, float x) { range.add(x); });
      const group_numbers g =
          warp::group_numbers_of(a.spec, range.joined(), static_cast<int>(heads) * size, [&](auto&& term) {
            return warp::sum_of_lanes([&](auto&& f) { for_each([&](std::int64_t, int, float x) { f(x); }); }, term);
          });
      if (lane_id() == 0) {
        flags |= !finite ? report_nonfinite_input : !g.valid() ? report_scale_overflow : 0u;
        writer.store(g, first_head, t, first);
      }
      for_each([&](std::int64_t h, int c, float x) { writer.put(values_of(a.spec, g), x, h, t, c); });
    }
  }
  detail::add_report(a.report, flags, 0);
}

}  // namespace packkv::kernel
