// SPDX-License-Identifier: Apache-2.0
// The two halves of attention on their own: scores = scale * q.K^T and out = w.V over coded tiles, and the merge
// of attention states. For formats that are known at run time, a code at a time; kernel/fused_gemv.cuh has the others.
#pragma once

#include <packkv/block/split_merge.cuh>
#include <packkv/detail/report.cuh>
#include <packkv/policy/decode.hpp>
#include <packkv/warp/key_scores.cuh>

namespace packkv::kernel {

struct gemv_args {
  codec_spec spec;
  side_parameters parameters;
  cache_view cache;
  input_view<3> in;    ///< queries [batch, query_heads, D_k] or weights [batch, query_heads, max_seq_len]
  output_view<3> out;  ///< scores [batch, query_heads, max_seq_len] or outputs [batch, query_heads, D_v]
  float scale;
  block::split_storage storage;
  device_report* report;
  std::int32_t group;
  std::int32_t splits;
  std::int64_t chunks;
};

/// Block coordinates shared by both GEMVs: grid = units * splits.
struct gemv_block {
  std::int64_t unit, b, first_row;
  int split, head;
  std::int32_t length;
  std::int64_t lo, hi;  ///< tiles of this block

  __device__ gemv_block(const gemv_args& a, std::uint32_t& flags) {
    split = static_cast<int>(blockIdx.x % a.splits);
    unit = blockIdx.x / a.splits;
    first_row = unit % a.chunks * policy::decode_rows;
    head = static_cast<int>(unit / a.chunks % a.cache.pages.kv_heads);
    b = unit / a.chunks / a.cache.pages.kv_heads;
    length = detail::clamp_length(a.cache.seq_lens, b, a.cache.max_seq_len, flags);
    const std::int64_t tiles = ceil_div<std::int64_t>(length, tile_tokens);
    lo = tiles * split / a.splits;
    hi = tiles * (split + 1) / a.splits;
  }
  __device__ bool row_exists(const gemv_args& a, int r) const { return first_row + r < a.group; }
  __device__ std::int64_t query_head(const gemv_args& a, int r) const {
    return static_cast<std::int64_t>(head) * a.group + first_row + r;
  }
};

/// scores[b, h, t] for every t < length; tokens without a page give -inf.
template <int HeadDim>
__global__ void __launch_bounds__(policy::decode_warps * 32) key_gemv(const __grid_constant__ gemv_args a) {
  using namespace packkv::detail;
  constexpr int rows = policy::decode_rows, warps = policy::decode_warps;
  using scores_type = warp::key_scores<HeadDim, rows>;
  __shared__ typename scores_type::temp_storage queries;
  std::uint32_t flags = 0;
  const gemv_block block(a, flags);
  scores_type::prepare(
      queries, a.spec, of_head(a.spec, a.parameters, block.head),
      [&](int r, int c) {
        return block.row_exists(a, r) ? load_element(address(a.in, block.b, block.query_head(a, r), c), a.in.type)
                                      : 0.0f;
      },
      warp_id(), warps);
  __syncthreads();
  const pages_view& pages = a.cache.pages;
  for (std::int64_t tile = block.lo + warp_id(); tile < block.hi; tile += warps) {
    const std::int32_t page = find_page(a.cache.table, pages.num_pages, block.b, tile / pages.tiles_per_page, flags);
    float scores[2][rows];
    if (page >= 0)
      scores_type::compute(queries, a.spec,
                           key_tile(pages, a.spec, page, block.head, static_cast<int>(tile % pages.tiles_per_page)),
                           scores);
    for (int j = 0; j < 2; ++j) {
      const std::int64_t t = tile * tile_tokens + lane_id() + 32 * j;
      for (int r = 0; r < rows; ++r)
        if (t < block.length && block.row_exists(a, r))
          store_element(address(a.out, block.b, block.query_head(a, r), t), a.out.type,
                        page >= 0 ? scores[j][r] * a.scale : -infinity());
    }
  }
  detail::add_report(a.report, lane_id() == 0 ? flags : 0u, 0);
}

/// out[b, h, :] = sum over t < length of weights[b, h, t] * v^[b, t, :].
template <int HeadDim>
__global__ void __launch_bounds__(policy::decode_warps * 32) value_gemv(const __grid_constant__ gemv_args a) {
  using namespace packkv::detail;
  constexpr int rows = policy::decode_rows, warps = policy::decode_warps;
  using merge_type = block::row_merge<HeadDim, rows>;
  __shared__ typename merge_type::temp_storage storage;
  std::uint32_t flags = 0;
  const gemv_block block(a, flags);
  warp::online_softmax<rows> plain;  // a sum without a maximum: every weight counts as it is
  for (int r = 0; r < rows; ++r) plain.maximum[r] = 0.0f;
  warp::value_sum<HeadDim, rows> sum;
  const pages_view& pages = a.cache.pages;
  for (std::int64_t tile = block.lo + warp_id(); tile < block.hi; tile += warps) {
    const std::int32_t page = find_page(a.cache.table, pages.num_pages, block.b, tile / pages.tiles_per_page, flags);
    if (page < 0) continue;
    float weights[2][rows];
    for (int j = 0; j < 2; ++j) {
      const std::int64_t t = tile * tile_tokens + lane_id() + 32 * j;
      for (int r = 0; r < rows; ++r)
        weights[j][r] = t < block.length && block.row_exists(a, r)
                            ? load_element(address(a.in, block.b, block.query_head(a, r), t), a.in.type)
                            : 0.0f;
    }
    for (int r = 0; r < rows; ++r) plain.sum[r] += warp_sum(weights[0][r] + weights[1][r]);
    sum.add(a.spec, value_tile(pages, a.spec, page, block.head, static_cast<int>(tile % pages.tiles_per_page)),
            weights);
  }
  block::attention_row<HeadDim> row = merge_type::merge(storage, plain, sum);
  merge_type::finish(storage, a.spec, of_head(a.spec, a.parameters, block.head), row);
  if (block::split_merge<HeadDim, rows>::is_last(a.storage, block.unit, block.split, a.splits, row) &&
      block.row_exists(a, warp_id()))
    for (int i = 0; i < HeadDim / 32; ++i)
      store_element(address(a.out, block.b, block.query_head(a, warp_id()), lane_id() + 32 * i), a.out.type,
                    row.channel[i]);
  detail::add_report(a.report, lane_id() == 0 ? flags : 0u, 0);
}

struct merge_args {
  input_view<4> outs;
  input_view<3> lses;
  output_view<3> out;
  output_view<2> lse;
  lse_base base;
};

inline constexpr int merge_threads = 128;

/// One block per (token, head), striding over the rest. A template so that it may stand in a header.
template <int Threads>
__global__ void __launch_bounds__(Threads) merge_states(const __grid_constant__ merge_args a) {
  using namespace packkv::detail;
  const std::int64_t heads = a.out.extent[1], items = a.out.extent[0] * heads;
  const float unit = a.base == lse_base::two ? 1.0f : 1.4426950408889634f;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const std::int64_t t = item / heads, h = item % heads;
    float m = -infinity();
    for (std::int64_t i = 0; i < a.outs.extent[0]; ++i)
      m = fmaxf(m, unit * load_element(address(a.lses, i, t, h), dtype::float32));
    float total = 0.0f;
    for (std::int64_t i = 0; i < a.outs.extent[0]; ++i) {
      const float l = unit * load_element(address(a.lses, i, t, h), dtype::float32);
      if (l != -infinity()) total += exp2_approx(l - m);
    }
    for (std::int64_t c = threadIdx.x; c < a.out.extent[2]; c += Threads) {
      float sum = 0.0f;
      for (std::int64_t i = 0; i < a.outs.extent[0]; ++i) {
        const float l = unit * load_element(address(a.lses, i, t, h), dtype::float32);
        if (l != -infinity())
          sum = fmaf(exp2_approx(l - m), load_element(address(a.outs, i, t, h, c), a.outs.type), sum);
      }
      store_element(address(a.out, t, h, c), a.out.type, total == 0.0f ? 0.0f : sum / total);
    }
    if (a.lse.data != nullptr && threadIdx.x == 0)
      store_element(address(a.lse, t, h), dtype::float32, total == 0.0f ? -infinity() : (m + log2f(total)) / unit);
  }
}

}  // namespace packkv::kernel
