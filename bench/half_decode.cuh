// SPDX-License-Identifier: Apache-2.0
// The 16-bit peer of decode_attention: split-KV decode over contiguous float16 K and V, head dim 128, up to 8 query
// heads per KV head. One idea: all steps of 128 tokens of all (sequence, KV head) pairs stand in one row, every block
// takes an equal stretch of it, and the last block to finish a pair adds what the others left.
// A warp copies its 16 tokens of a step by cp.async into its own shared memory, so no barrier stands in the loop.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <packkv/detail/async.cuh>
#include <packkv/detail/matrix.cuh>

namespace half_decode {

inline constexpr int dim = 128, warps = 8, warp_tokens = 16, step_tokens = warps * warp_tokens;
inline constexpr int stages = 3;  ///< 128 KiB of an SM's loads under way while a stage is computed
inline constexpr int heads = 8;   ///< columns of a matrix instruction: query heads of a KV head, or zeros
inline constexpr int row_bytes =
    2 * dim + 16;  ///< a token in shared memory; 16 more, so that ldmatrix has no conflicts
inline constexpr int side_bytes = warp_tokens * row_bytes, stage_bytes = 2 * side_bytes;
inline constexpr int shared_bytes = warps * stages * stage_bytes;  ///< 204 KiB: sm_90, sm_100
inline constexpr int merge_row = dim + 4;                          ///< floats of a partial row: output, maximum, sum
static_assert(warps * heads * merge_row * 4 <= shared_bytes, "the warps' rows reuse the stages");

/// Where a sequence begins: tokens and steps of one KV head in the sequences before it. One more entry ends the list.
struct sequence {
  std::int64_t first_token, first_step;
  std::int32_t length;  ///< > 0
};

struct arguments {
  const std::uint16_t *keys, *values;  ///< by sequence: [kv_heads, length, 128]
  const std::uint16_t* queries;        ///< [batch, kv_heads * group, 128]
  std::uint16_t* out;                  ///< as the queries
  const sequence* sequences;           ///< [batch + 1]
  float* partial;                      ///< [blocks, 2, 8, merge_row]
  std::uint32_t* counters;             ///< [batch * kv_heads], zero between launches
  std::int32_t batch, kv_heads, group;
  float scale;
};

/// One (sequence, KV head) pair and its stretch of the row of steps.
struct pair {
  int sequence, kv_head;
  std::int64_t begin, end;
};

__device__ inline pair find_pair(const arguments& a, std::int64_t step) {
  int low = 0, high = a.batch;  // sequence `low` begins at or before the step, `high` after it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (a.sequences[middle].first_step * a.kv_heads <= step ? low : high) = middle;
  }
  const std::int64_t first = a.sequences[low].first_step * a.kv_heads;
  const std::int64_t steps = a.sequences[low + 1].first_step - a.sequences[low].first_step;
  const int head = static_cast<int>((step - first) / steps);
  return {low, head, first + head * steps, first + (head + 1) * steps};
}

__device__ inline std::uint32_t two_halves(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return static_cast<std::uint32_t>(__half_as_ushort(__low2half(h))) |
         static_cast<std::uint32_t>(__half_as_ushort(__high2half(h))) << 16;
}

/// Softmax state of a warp on the fragments of mma.m16n8k16: this lane's heads are 2 * (lane % 4) + {0, 1}, its
/// channels 16 * tile + lane / 4 + {0, 8}. Sums are of this lane's tokens only until finish().
struct warp_state {
  static constexpr float nothing = -1e30f;  ///< finite, so that differences are, too
  float maximum[2] = {nothing, nothing}, sum[2] = {0.0f, 0.0f};
  float out[dim / 16][4] = {};

  /// Adds 16 tokens at `keys`, `values` (shared memory); `valid` of them exist.
  __device__ void add(const std::uint8_t* keys, const std::uint8_t* values, int valid,
                      const std::uint32_t (&query)[dim / 16][2], float scale_log2) {
    using namespace packkv::detail;
    const int lane = lane_id();
    float score[4] = {}, odd[4] = {};
    const std::uint8_t* row = keys + lane % 16 * row_bytes + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      std::uint32_t a[4];
      ldmatrix<4>(a, row + 32 * k);
      mma_f16(k % 2 == 0 ? score : odd, a, query[k]);
    }
    float keep[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      score[j] = lane / 4 < valid ? (score[j] + odd[j]) * scale_log2 : nothing;
      score[j + 2] = lane / 4 + 8 < valid ? (score[j + 2] + odd[j + 2]) * scale_log2 : nothing;
      float m = fmaxf(maximum[j], fmaxf(score[j], score[j + 2]));
      for (int mask = 4; mask < 32; mask *= 2) m = fmaxf(m, shuffle_xor(m, mask));
      keep[j] = exp2_approx(maximum[j] - m);
      maximum[j] = m;
      score[j] = exp2_approx(score[j] - m);
      score[j + 2] = exp2_approx(score[j + 2] - m);
      sum[j] = sum[j] * keep[j] + score[j] + score[j + 2];
    }
    const std::uint32_t weights[2] = {movmatrix(two_halves(score[0], score[1])),
                                      movmatrix(two_halves(score[2], score[3]))};
    row = values + (lane % 8 + lane / 16 * 8) * row_bytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int c = 0; c < dim / 16; ++c) {
      for (int i = 0; i < 4; ++i) out[c][i] *= keep[i % 2];
      std::uint32_t a[4];
      ldmatrix_transposed<4>(a, row + 32 * c);
      mma_f16(out[c], a, weights);
    }
  }

  /// Writes the warp's rows [8][merge_row].
  __device__ void finish(float* rows) {
    const int lane = packkv::detail::lane_id();
    for (int j = 0; j < 2; ++j) {
      for (int mask = 4; mask < 32; mask *= 2) sum[j] += packkv::detail::shuffle_xor(sum[j], mask);
      float* to = rows + (lane % 4 * 2 + j) * merge_row;
      for (int c = 0; c < dim / 16; ++c) {
        to[16 * c + lane / 4] = out[c][j];
        to[16 * c + lane / 4 + 8] = out[c][j + 2];
      }
      if (lane / 4 == 0) to[dim] = maximum[j], to[dim + 1] = sum[j];
    }
  }
};

/// This warp's share of the steps begin .. end - 1 of a pair.
__device__ inline void attend(const arguments& a, const pair& p, std::int64_t begin, std::int64_t end,
                              std::uint8_t* shared, warp_state& state) {
  using namespace packkv::detail;
  const int lane = lane_id(), warp = warp_id();
  const sequence s = a.sequences[p.sequence];
  const std::int64_t row = s.first_token * a.kv_heads + static_cast<std::int64_t>(p.kv_head) * s.length;
  const std::uint16_t *keys = a.keys + row * dim, *values = a.values + row * dim;
  std::uint8_t* mine = shared + warp * stages * stage_bytes;

  std::uint32_t query[dim / 16][2];
  const std::int64_t head = (static_cast<std::int64_t>(p.sequence) * a.kv_heads + p.kv_head) * a.group + lane / 4;
  for (int k = 0; k < dim / 16; ++k)
    for (int i = 0; i < 2; ++i)
      query[k][i] =
          lane / 4 < a.group
              ? *reinterpret_cast<const std::uint32_t*>(a.queries + head * dim + 16 * k + 8 * i + lane % 4 * 2)
              : 0u;

  const int steps = static_cast<int>(end - begin);
  const std::int32_t first_token = static_cast<std::int32_t>((begin - p.begin) * step_tokens) + warp * warp_tokens;
  const auto copy = [&](int step) {
    if (step < steps) {
      std::uint8_t* to = mine + step % stages * stage_bytes + lane / 16 * row_bytes + lane % 16 * 16;
      const std::int32_t token = first_token + step * step_tokens + lane / 16;
      const std::int64_t from = static_cast<std::int64_t>(token) * dim + lane % 16 * 8;
#pragma unroll
      for (int i = 0; i < warp_tokens; i += 2) {
        copy_async<16>(to + i * row_bytes, keys + from + i * dim, token + i < s.length);
        copy_async<16>(to + i * row_bytes + side_bytes, values + from + i * dim, token + i < s.length);
      }
    }
    commit_copies();
  };
  for (int i = 0; i < stages - 1; ++i) copy(i);
  for (int step = 0; step < steps; ++step) {
    wait_copies<stages - 2>();
    __syncwarp();  // every lane's copies have landed, and the stage that is filled next has been read
    copy(step + stages - 1);
    const std::uint8_t* stage = mine + step % stages * stage_bytes;
    state.add(stage, stage + side_bytes, s.length - first_token - step * step_tokens, query,
              a.scale * 1.4426950408889634f);
  }
  wait_copies<0>();
}

/// Joins `count` rows of one head, row i at from(i): channel c of the output, the maximum and the sum.
struct joined {
  float value = 0.0f, maximum = warp_state::nothing, sum = 0.0f;

  template <bool Fresh, class From>  // Fresh: other blocks of this launch wrote the rows
  __device__ void add(int count, int c, From&& from) {
    const auto load = [](const float* p) { return Fresh ? packkv::detail::load_fresh(p) : *p; };
    for (int i = 0; i < count; ++i) {
      const float* row = from(i);
      const float theirs = load(row + dim), m = fmaxf(maximum, theirs);
      const float keep = exp2f(maximum - m), scale = exp2f(theirs - m);
      value = value * keep + load(row + c) * scale;
      sum = sum * keep + load(row + dim + 1) * scale;
      maximum = m;
    }
  }
  __device__ std::uint16_t output() const { return __half_as_ushort(__float2half_rn(value / sum)); }
};

template <int Threads>
__global__ void __launch_bounds__(Threads, 1) kernel(arguments a) {
  static_assert(Threads == 32 * warps, "one size of block");
  std::uint8_t* shared = packkv::detail::dynamic_shared();
  float* rows = reinterpret_cast<float*>(shared);  // [warps][heads][merge_row], when the stages are empty
  __shared__ bool last;
  const std::int64_t total = a.sequences[a.batch].first_step * a.kv_heads;
  const auto begin_of = [&](std::int64_t block) { return total * block / gridDim.x; };
  const std::int64_t begin = begin_of(blockIdx.x), end = begin_of(blockIdx.x + 1);
  const int outputs = a.group * dim;

  for (std::int64_t at = begin; at < end;) {
    const pair p = find_pair(a, at);
    const std::int64_t stop = p.end < end ? p.end : end;
    warp_state state;
    attend(a, p, at, stop, shared, state);
    __syncthreads();
    state.finish(rows + packkv::detail::warp_id() * heads * merge_row);
    __syncthreads();

    const std::int64_t unit = static_cast<std::int64_t>(p.sequence) * a.kv_heads + p.kv_head;
    std::uint16_t* out = a.out + unit * outputs;
    const bool whole = at == p.begin && stop == p.end;
    // A block leaves at most two parts: one of a pair that was begun before it, one of a pair that goes on behind it.
    const auto part_of = [&](std::int64_t block) {
      return a.partial + (block * 2 + (p.begin > begin_of(block) ? 1 : 0)) * heads * merge_row;
    };
    for (int i = static_cast<int>(threadIdx.x); i < outputs; i += Threads) {
      const int head = i / dim, c = i % dim;
      joined of_warps;
      of_warps.add<false>(warps, c, [&](int w) { return rows + (w * heads + head) * merge_row; });
      if (whole) {
        out[i] = of_warps.output();
      } else {
        float* part = part_of(blockIdx.x) + head * merge_row;
        part[c] = of_warps.value;
        if (c == 0) part[dim] = of_warps.maximum, part[dim + 1] = of_warps.sum;
      }
    }
    if (!whole) {
      // Block i has steps total * i / blocks and on: the last i that begins at or before a step.
      const auto block_of = [&](std::int64_t step) { return ((step + 1) * gridDim.x - 1) / total; };
      const std::int64_t first_block = block_of(p.begin);
      const int parts = static_cast<int>(block_of(p.end - 1) - first_block) + 1;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) last = atomicInc(a.counters + unit, parts - 1u) == parts - 1u;
      __syncthreads();
      if (last) {
        __threadfence();
        for (int i = static_cast<int>(threadIdx.x); i < outputs; i += Threads) {
          joined of_blocks;
          of_blocks.add<true>(parts, i % dim,
                              [&](int part) { return part_of(first_block + part) + i / dim * merge_row; });
          out[i] = of_blocks.output();
        }
      }
    }
    __syncthreads();  // the rows are read before the next pair's copies land on them
    at = stop;
  }
}

/// Blocks of a launch: one for each SM, none without work.
inline std::int64_t blocks_for(std::int64_t steps, int sms) { return steps < sms ? steps : sms; }
inline std::int64_t partial_floats(std::int64_t blocks) { return blocks * 2 * heads * merge_row; }

inline packkv::status launch(const arguments& a, std::int64_t blocks, cudaStream_t stream) {
  return packkv::detail::launch(kernel<32 * warps>, dim3(static_cast<unsigned>(blocks)), {32 * warps, shared_bytes},
                                stream, a);
}

}  // namespace half_decode
