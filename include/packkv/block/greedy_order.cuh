// SPDX-License-Identifier: Apache-2.0
// PackKV's greedy order of 64 tokens by a block of threads, from their codes; reference/token_order.hpp defines it.
// One idea: a warp keeps the same 512 channels of the pack and of the sum in registers all the time and reads
// candidates only, so that a step is one pass over them and one barrier.
//   block::greedy_order<Warps, true>(storage, codes, shape, pack_size, nullptr).run(order);
#pragma once

#include <packkv/codec/pack_format.hpp>
#include <packkv/codec/pack_order.hpp>
#include <packkv/thread/pack_growth.cuh>
#include <type_traits>

namespace packkv::block {

inline constexpr int slab_channels = 512;  ///< of a warp, 16 a lane

/// Channels of a block of tokens as rows of bytes: K of all batch rows and heads, then V, then zeros.
struct code_rows {
  std::int64_t channels, first_value, stride;  ///< stride: of a row, whole slabs
  PACKKV_HOST_DEVICE constexpr explicit code_rows(const pack_format& f)
      : channels((std::int64_t{f.key.head_dim} + f.value.head_dim) * f.kv_heads * f.batch),
        first_value(std::int64_t{f.key.head_dim} * f.kv_heads * f.batch),
        stride((channels + slab_channels - 1) / slab_channels * slab_channels) {}
  PACKKV_HOST_DEVICE constexpr int slabs() const { return static_cast<int>(stride / slab_channels); }
  PACKKV_HOST_DEVICE constexpr std::int64_t bytes() const { return tile_tokens * stride; }
};

/// Of greedy_order, in shared memory. Few: see there; then 32 bits hold 2^16 * 255^2.
template <bool Few>
struct greedy_storage {
  using product = std::conditional_t<Few, unsigned, unsigned long long>;
  std::uint32_t width[3][tile_tokens];  ///< of the candidates, in turns: read, added to, cleared
  product dot[tile_tokens], norm[tile_tokens];
  int seed;
};

/// What a lane knows of its 16 channels of a slab.
struct slab_state {
  std::uint32_t low[4], high[4];  ///< of the pack, bytes
  std::uint32_t even[4], odd[4];  ///< sums over the remaining tokens, 16 bits each
};

/// Few: no more slabs than warps, so that a warp has one at most and keeps its state in registers; otherwise the state
/// of all lies in global memory, slab_state [slabs][32].
template <int Warps, bool Few>
class greedy_order {
  static_assert(Warps * slab_channels <= 65536, "32 bits hold the products of few slabs");

 public:
  /// codes [64][stride], 16-byte aligned, written before a barrier. All threads of the block take part in everything.
  __device__ greedy_order(greedy_storage<Few>& storage, const std::uint8_t* codes, const code_rows& rows, int pack_size,
                          slab_state* states)
      : storage_(storage),
        codes_(codes),
        stride_(rows.stride),
        slabs_(rows.slabs()),
        pack_size_(pack_size),
        states_(states) {
    using namespace packkv::detail;
    // Warps that share a slab take turns with the candidates.
    shares_ = Few ? Warps / slabs_ : 1;
    share_ = Few ? warp_id() / slabs_ : 0;
    first_slab_ = !Few ? warp_id() : share_ < shares_ ? warp_id() % slabs_ : slabs_;
  }

  /// order [64], of thread 0.
  __device__ void run(std::uint8_t* order) {
    using namespace packkv::detail;
    const int bits = prepare();
    int growth = 0;
    for (int slot = 0; slot < tile_tokens; ++slot) {
      const bool first = slot % pack_size_ == 0;
      int best;
      if (first)
        best = find_seed();
      else if (bits <= 4)
        best = find_next<4>(growth++);
      else if (bits <= 7)
        best = find_next<7>(growth++);
      else
        best = find_next<8>(growth++);
      const int token = candidate(best);
      remove(best);
      for_each_slab([&](std::int64_t at, slab_state& s) {
        const bytes16 x = load16(codes_ + token * stride_ + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s.even[i] -= x.word[i] & 0x00ff00ffu;
          s.odd[i] -= x.word[i] >> 8 & 0x00ff00ffu;
          if (first)
            s.low[i] = s.high[i] = x.word[i];
          else
            thread::join_bytes(s.low[i], s.high[i], x.word[i]);
        }
      });
      if (threadIdx.x == 0) order[slot] = static_cast<std::uint8_t>(token);
    }
  }

 private:
  /// f(byte of the lane's channels in a row, state) for the warp's slabs.
  template <class F>
  __device__ void for_each_slab(F&& f) {
    using namespace packkv::detail;
    if constexpr (Few) {
      if (first_slab_ < slabs_) f(std::int64_t{first_slab_} * slab_channels + 16 * lane_id(), own_);
    } else {
      for (int slab = first_slab_; slab < slabs_; slab += Warps) {
        slab_state& kept = states_[std::int64_t{slab} * warp_threads + lane_id()];
        slab_state s = kept;
        f(std::int64_t{slab} * slab_channels + 16 * lane_id(), s);
        kept = s;
      }
    }
  }
  /// Which token is the i-th of those that remain; the same in all lanes.
  __device__ int candidate(int i) const {
    return packkv::detail::shuffle(i < 32 ? lower_ : upper_, i % packkv::detail::warp_threads);
  }
  /// Takes the i-th out; the others keep their order.
  __device__ void remove(int i) {
    using namespace packkv::detail;
    const int next = (lane_id() + 1) % warp_threads, middle = shuffle(upper_, 0);
    const int lower = shuffle(lower_, next), upper = shuffle(upper_, next);
    if (lane_id() >= i) lower_ = lane_id() == warp_threads - 1 ? middle : lower;
    if (lane_id() + warp_threads >= i) upper_ = upper;
    --left_;
  }

  /// Norms and sums of all tokens; bits of the largest code.
  __device__ int prepare() {
    using namespace packkv::detail;
    if (threadIdx.x < tile_tokens) {
      storage_.dot[threadIdx.x] = storage_.norm[threadIdx.x] = 0;
      for (auto& width : storage_.width) width[threadIdx.x] = 0;
    }
    __syncthreads();
    std::uint32_t all = 0;
    for_each_slab([&](std::int64_t at, slab_state& s) {
      s = slab_state{};
      for (int t = 0; t < tile_tokens; ++t) {
        const bytes16 x = load16(codes_ + t * stride_ + at);
        std::uint32_t norm = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s.even[i] += x.word[i] & 0x00ff00ffu;
          s.odd[i] += x.word[i] >> 8 & 0x00ff00ffu;
          norm = dot_bytes(x.word[i], x.word[i], norm);
          all |= x.word[i];
        }
        if (t % shares_ != share_) continue;
        norm = warp_sum_unsigned(norm);
        if (lane_id() == 0) atomicAdd(&storage_.norm[t], static_cast<typename greedy_storage<Few>::product>(norm));
      }
    });
    all |= all >> 16;
    all |= all >> 8;
    const int above16 = __syncthreads_or((all & 0xf0u) != 0), above128 = __syncthreads_or((all & 0x80u) != 0);
    return above128 ? 8 : above16 ? 7 : 4;
  }

  /// The candidate with the largest cosine to the mean.
  __device__ int find_seed() {
    using namespace packkv::detail;
    const std::uint32_t n = static_cast<std::uint32_t>(left_), reciprocal = mean_reciprocal(n);
    for_each_slab([&](std::int64_t at, slab_state& s) {
      std::uint32_t mean[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto means = [&](std::uint32_t sums) {
          return rounded_mean(sums & 0xffffu, n, reciprocal) | rounded_mean(sums >> 16, n, reciprocal) << 16;
        };
        mean[i] = means(s.even[i]) | means(s.odd[i]) << 8;
      }
      for (int c = share_; c < left_; c += shares_) {
        const bytes16 x = load16(codes_ + candidate(c) * stride_ + at);
        std::uint32_t dot = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) dot = dot_bytes(x.word[i], mean[i], dot);
        dot = warp_sum_unsigned(dot);
        if (lane_id() == 0) atomicAdd(&storage_.dot[c], static_cast<typename greedy_storage<Few>::product>(dot));
      }
    });
    __syncthreads();
    if (warp_id() == 0) {
      int best = 0;
      std::uint64_t dot = 0, norm = 0;
      const auto consider = [&](int other, std::uint64_t other_dot, std::uint64_t other_norm) {
        const bool greater = greater_cosine(other_dot, other_norm, dot, norm);
        if (!greater && (other > best || greater_cosine(dot, norm, other_dot, other_norm))) return;
        best = other;
        dot = other_dot;
        norm = other_norm;
      };
      // A lane begins with a candidate that exists: the others join with the last one.
      best = min_of(lane_id(), left_ - 1);
      dot = storage_.dot[best];
      norm = storage_.norm[own_candidate(best)];
      const int second = min_of(lane_id() + warp_threads, left_ - 1);
      consider(second, storage_.dot[second], storage_.norm[own_candidate(second)]);
      for (int m = warp_threads / 2; m > 0; m /= 2)
        consider(shuffle_xor(best, m), shuffle_xor(dot, m), shuffle_xor(norm, m));
      if (lane_id() == 0) storage_.seed = best;
      __syncwarp();
      for (int i = lane_id(); i < tile_tokens; i += warp_threads) storage_.dot[i] = 0;
    }
    __syncthreads();
    return storage_.seed;
  }
  /// candidate(i) for an i of the lane's own.
  __device__ int own_candidate(int i) const {
    using namespace packkv::detail;
    const int lower = shuffle(lower_, i % warp_threads), upper = shuffle(upper_, i % warp_threads);
    return i < warp_threads ? lower : upper;
  }

  /// The candidate that widens the pack least.
  template <int Bits>
  __device__ int find_next(int growth) {
    using namespace packkv::detail;
    std::uint32_t* const width = storage_.width[growth % 3];
    if (threadIdx.x < tile_tokens) storage_.width[(growth + 1) % 3][threadIdx.x] = 0;
    for_each_slab([&](std::int64_t at, slab_state& s) {
      const auto ones = [&](int c) {
        const bytes16 x = load16(codes_ + candidate(c) * stride_ + at);
        std::uint32_t sum = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sum += static_cast<std::uint32_t>(__popc(thread::joined_ones<Bits>(s.low[i], s.high[i], x.word[i])));
        return sum;
      };
      // Two at once: a slab's widths sum to at most 8 * 512.
      for (int c = share_; c < left_; c += 2 * shares_) {
        const int second = c + shares_ < left_ ? c + shares_ : c;
        const std::uint32_t both = warp_sum_unsigned(ones(c) | ones(second) << 16);
        if (lane_id() == 0) atomicAdd(&width[c], both & 0xffffu);
        if (lane_id() == 1 && second != c) atomicAdd(&width[second], both >> 16);
      }
    });
    __syncthreads();
    // The smallest, and the first of those.
    const std::uint32_t lower = lane_id() < left_ ? width[lane_id()] : ~0u;
    const std::uint32_t upper = lane_id() + warp_threads < left_ ? width[lane_id() + warp_threads] : ~0u;
    const std::uint32_t least = ~warp_max_unsigned(~min_of(lower, upper));
    const unsigned first = __ballot_sync(all_lanes, lower == least), second = __ballot_sync(all_lanes, upper == least);
    return first != 0 ? __ffs(static_cast<int>(first)) - 1 : __ffs(static_cast<int>(second)) - 1 + warp_threads;
  }

  greedy_storage<Few>& storage_;
  const std::uint8_t* codes_;
  std::int64_t stride_;
  int slabs_, pack_size_, shares_, share_, first_slab_;
  slab_state* states_;
  slab_state own_;
  int lower_ = packkv::detail::lane_id(), upper_ = packkv::detail::lane_id() + 32;  ///< tokens that remain, ascending
  int left_ = tile_tokens;
};

}  // namespace packkv::block
