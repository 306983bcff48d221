// SPDX-License-Identifier: Apache-2.0
// Attention of a few query rows of one KV head over coded tiles, sinks and ring; a warp takes a tile at a time.
// One idea: a block is (sequence, KV head, four query rows, part of the tokens); parts meet in block::split_merge.
#pragma once

#include <packkv/block/split_merge.cuh>
#include <packkv/detail/report.cuh>
#include <packkv/policy/decode.hpp>
#include <packkv/warp/key_scores.cuh>

namespace packkv::kernel {

struct decode_args {
  codec_spec key_spec, value_spec;
  side_parameters key, value;
  cache_view cache;
  input_view<3> queries;
  const std::int32_t* query_start_loc;
  output_view<3> out;
  output_view<2> lse;
  attention_options options;
  block::split_storage storage;
  device_report* report;
  std::int32_t group;  ///< query heads per KV head
  std::int32_t splits;
  std::int64_t chunks;
};

/// One block's share of a decode call.
template <int KeyDim, int ValueDim>
class decode_block {
 public:
  static constexpr int rows = policy::decode_rows;
  static constexpr int warps = policy::decode_warps;
  static_assert(rows == warps, "a warp finishes one row");
  using scores_type = warp::key_scores<KeyDim, rows>;
  using merge_type = block::row_merge<ValueDim, rows>;
  struct temp_storage {
    typename scores_type::temp_storage queries;
    typename merge_type::temp_storage merge;
  };

  __device__ decode_block(const decode_args& args, temp_storage& storage) : a_(args), storage_(storage) {
    std::int64_t item = blockIdx.x;
    split_ = static_cast<int>(item % a_.splits);
    unit_ = item / a_.splits;
    first_row_ = unit_ % a_.chunks * rows;
    head_ = static_cast<int>(unit_ / a_.chunks % a_.cache.pages.kv_heads);
    b_ = unit_ / a_.chunks / a_.cache.pages.kv_heads;
  }

  __device__ void run() {
    if (!locate_queries()) return;
    block::attention_row<ValueDim> row = attend_tiles();
    // The last split also takes the 16-bit tokens, which live in the original basis.
    if (split_ == a_.splits - 1 && (view_.sinks > 0 || view_.ring_begin < view_.length)) row.join(attend_raw());
    if (block::split_merge<ValueDim, rows>::is_last(a_.storage, unit_, split_, a_.splits, row)) write(row);
    detail::add_report(a_.report, threadIdx.x == 0 ? flags_ : 0u, 0);
  }

 private:
  /// Finds this block's sequence and query rows; false if there is nothing to do.
  __device__ bool locate_queries() {
    using namespace packkv::detail;
    const std::int32_t length = clamp_length(a_.cache.seq_lens, b_, a_.cache.max_seq_len, flags_);
    query_begin_ = a_.query_start_loc[b_];
    query_count_ = a_.query_start_loc[b_ + 1] - query_begin_;
    const bool valid = query_begin_ >= 0 && query_count_ >= 0 && query_begin_ + query_count_ <= a_.queries.extent[0] &&
                       query_count_ <= a_.options.max_query_len;
    if (!valid) flags_ |= report_length_out_of_range;
    if (!valid || first_row_ >= query_count_ * a_.group) {
      detail::add_report(a_.report, threadIdx.x == 0 ? flags_ : 0u, 0);
      return false;
    }
    view_ = make_visibility(a_.cache, a_.options, b_, length, flags_);
    const std::int64_t context = a_.options.context_lens != nullptr ? a_.options.context_lens[b_] : length;
    for (int r = 0; r < rows; ++r)
      position_[r] = context - query_count_ + min_of((first_row_ + r) / a_.group, query_count_ - 1);
    return true;
  }

  __device__ bool row_exists(int r) const { return first_row_ + r < query_count_ * a_.group; }
  __device__ std::int64_t query_token(int r) const { return query_begin_ + (first_row_ + r) / a_.group; }
  __device__ std::int64_t query_head(int r) const {
    return static_cast<std::int64_t>(head_) * a_.group + (first_row_ + r) % a_.group;
  }

  /// The caller's warps have met since they last read the queries (merge does).
  __device__ void prepare_queries(const codec_spec& spec, const head_parameters& head) {
    scores_type::prepare(
        storage_.queries, spec, head,
        [&](int r, int c) {
          return row_exists(r) ? detail::load_element(detail::address(a_.queries, query_token(r), query_head(r), c),
                                                      a_.queries.type)
                               : 0.0f;
        },
        detail::warp_id(), warps);
    __syncthreads();
  }

  /// Score of one (token, row) in base 2, or -inf if the row does not see the token here.
  __device__ float shape(float score, bool visible) const {
    if (!visible) return -detail::infinity();
    float s = score * a_.options.softmax_scale;
    if (a_.options.soft_cap > 0.0f) s = a_.options.soft_cap * tanhf(s / a_.options.soft_cap);
    return s * 1.4426950408889634f;
  }

  /// First local token whose position is at least p.
  __device__ std::int64_t token_at(std::int64_t p) const {
    const std::int64_t d = p - view_.position_offset;
    return d <= 0 ? 0 : min_of<std::int64_t>((d + view_.position_stride - 1) / view_.position_stride, view_.length);
  }

  __device__ block::attention_row<ValueDim> attend_tiles() {
    using namespace packkv::detail;
    const head_parameters key_head = of_head(a_.key_spec, a_.key, head_),
                          value_head = of_head(a_.value_spec, a_.value, head_);
    prepare_queries(a_.key_spec, key_head);
    std::int64_t first_position = view_.kv_begin;
    if (view_.window > 0) first_position = max_of(first_position, position_[0] - view_.window + 1);
    const std::int64_t first = token_at(first_position) / tile_tokens;
    const std::int64_t end_token = view_.causal ? token_at(position_[rows - 1] + 1) : view_.length;
    const std::int64_t count = max_of<std::int64_t>(ceil_div<std::int64_t>(end_token, tile_tokens) - first, 0);
    const std::int64_t lo = first + count * split_ / a_.splits, hi = first + count * (split_ + 1) / a_.splits;

    warp::online_softmax<rows> softmax;
    warp::value_sum<ValueDim, rows> sum;
    for (std::int64_t tile = lo + warp_id(); tile < hi; tile += warps) {
      const pages_view& pages = a_.cache.pages;
      const std::int32_t page = find_page(a_.cache.table, pages.num_pages, b_, tile / pages.tiles_per_page, flags_);
      if (page < 0) continue;
      const int slot = static_cast<int>(tile % pages.tiles_per_page);
      float weights[2][rows], rescale[rows];
      scores_type::compute(storage_.queries, a_.key_spec, key_tile(pages, a_.key_spec, page, head_, slot), weights);
      for (int j = 0; j < 2; ++j) {
        const std::int64_t t = tile * tile_tokens + lane_id() + 32 * j;
        for (int r = 0; r < rows; ++r)
          weights[j][r] = shape(weights[j][r], view_.visible(t, position_[r]) && !view_.raw(t, position_[r]));
      }
      softmax.weigh(weights, rescale);
      sum.rescale(rescale);
      sum.add(a_.value_spec, value_tile(pages, a_.value_spec, page, head_, slot), weights);
    }
    block::attention_row<ValueDim> row = merge_type::merge(storage_.merge, softmax, sum);
    merge_type::finish(storage_.merge, a_.value_spec, value_head, row);
    return row;
  }

  /// Sinks and ring, 64 tokens at a time.
  __device__ block::attention_row<ValueDim> attend_raw() {
    using namespace packkv::detail;
    prepare_queries(make_element_codec(codec_kind::float16, KeyDim), {});
    const std::int64_t ring_first =
        max_of<std::int64_t>(max_of(view_.ring_begin, view_.sinks), token_at(position_[0] - view_.ring_window + 1));
    const std::int64_t sink_tiles = ceil_div<std::int64_t>(view_.sinks, tile_tokens);
    const std::int64_t ring_tiles =
        ring_first < view_.length ? ceil_div<std::int64_t>(view_.length - ring_first, tile_tokens) : 0;
    warp::online_softmax<rows> softmax;
    warp::value_sum<ValueDim, rows> sum;
    for (std::int64_t tile = warp_id(); tile < sink_tiles + ring_tiles; tile += warps) {
      const bool sink = tile < sink_tiles;
      const std::int64_t first = sink ? tile * tile_tokens : ring_first + (tile - sink_tiles) * tile_tokens;
      const std::int64_t end = sink ? view_.sinks : view_.length;
      const input_view<4>& keys = sink ? a_.cache.sinks.keys : a_.cache.ring.keys;
      const input_view<4>& values = sink ? a_.cache.sinks.values : a_.cache.ring.values;
      const std::int64_t row_of_b = sink || a_.cache.ring.row == nullptr ? b_ : a_.cache.ring.row[b_];
      const auto at = [&](const input_view<4>& data, int token) -> const void* {
        const std::int64_t t = first + token;
        return t < end ? address(data, row_of_b, head_, sink ? t : t % data.extent[2], 0) : nullptr;
      };
      float weights[2][rows], rescale[rows];
      warp::raw_key_scores<KeyDim, rows>::compute(
          storage_.queries, [&](int token) { return at(keys, token); }, keys.stride[3], keys.type, weights);
      for (int j = 0; j < 2; ++j) {
        const std::int64_t t = first + lane_id() + 32 * j;
        for (int r = 0; r < rows; ++r)
          weights[j][r] = shape(weights[j][r],
                                t < end && view_.visible(t, position_[r]) && (sink || view_.in_ring(t, position_[r])));
      }
      softmax.weigh(weights, rescale);
      sum.rescale(rescale);
      sum.add_raw([&](int token) { return at(values, token); }, values.stride[3], values.type, weights);
    }
    return merge_type::merge(storage_.merge, softmax, sum);
  }

  __device__ void write(const block::attention_row<ValueDim>& row) const {
    using namespace packkv::detail;
    const int r = warp_id();
    if (!row_exists(r)) return;
    const bool empty = row.sum == 0.0f;
    for (int i = 0; i < ValueDim / 32; ++i)
      store_element(address(a_.out, query_token(r), query_head(r), lane_id() + 32 * i), a_.out.type,
                    empty ? 0.0f : row.channel[i] / row.sum);
    if (a_.lse.data != nullptr && lane_id() == 0) {
      const float base2 = row.maximum + log2f(row.sum);
      const float unit = a_.options.base == lse_base::two ? 1.0f : 0.6931471805599453f;
      store_element(address(a_.lse, query_token(r), query_head(r)), a_.lse.type, empty ? -infinity() : base2 * unit);
    }
  }

  const decode_args& a_;
  temp_storage& storage_;
  detail::visibility view_;
  std::int64_t unit_, b_, first_row_, query_begin_ = 0, query_count_ = 0;
  std::int64_t position_[rows];
  int split_, head_;
  std::uint32_t flags_ = 0;
};

/// Grid: units * splits blocks, in that order; see policy::decode_grid.
template <int KeyDim, int ValueDim>
__global__ void __launch_bounds__(policy::decode_warps * 32, 1)
    decode_attention(const __grid_constant__ decode_args args) {
  using block_type = decode_block<KeyDim, ValueDim>;
  __shared__ typename block_type::temp_storage storage;
  block_type(args, storage).run();
}

}  // namespace packkv::kernel
