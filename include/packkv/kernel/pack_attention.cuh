// SPDX-License-Identifier: Apache-2.0
// Attention on packs of 16 tokens whose steps are a token's or a vector's, with the 16-bit tokens behind them: the
// pieces of the GEMVs (kernel/pack_gemv.cuh), a warp taking K and V of a tile one after the other. One idea: weights
// are relative to a maximum that may be exceeded by far before it is raised, because sums of values follow the largest
// weight themselves.
#pragma once

#include <packkv/kernel/pack_gemv.cuh>

namespace packkv::kernel {

/// Shared memory of a warp, and from that the shape of a block.
template <int KeyDim, int ValueDim, int Rows, warp::copy_engine Engine>
struct pack_attention_warp {
  using keys = warp::pack_key_scores<KeyDim, Rows>;
  using values = warp::pack_value_sum<ValueDim, Rows, 8>;  // rows as block::part_merge has them
  using key_codes = warp::pack_codes<KeyDim>;
  using value_codes = warp::pack_codes<ValueDim>;
  using stream = warp::pack_stream<max_of(key_codes::max_tile_bytes, value_codes::max_tile_bytes),
                                   key_codes::slack_bytes, Engine, 2>;
  std::uint8_t tiles[stream::buffer_bytes];
  union {
    typename key_codes::group_codes key;
    typename value_codes::group_codes value;
  } codes;
  typename keys::tile_sums scores;
  typename values::temp_storage sums;
  PACKKV_HOST_DEVICE static constexpr policy::pack_shape shape() {
    return policy::make_pack_shape(
        sizeof(pack_attention_warp),
        sizeof(typename keys::temp_storage) + sizeof(typename warp::token_scores<KeyDim, Rows>::temp_storage) + 512,
        Rows * ValueDim > 256   ? 8
        : Rows * ValueDim > 128 ? 12
                                : 16);
  }
};

/// Softmax of a warp's rows over its tiles, base 2.
template <int Rows>
struct loose_softmax {
  /// Weights may be up to 2^16: sums of 2^63 tokens are floats.
  static constexpr float looseness = 16.0f;
  float maximum[Rows];  ///< of which weights are multiples; finite, and the same in all lanes
  float sum[Rows];      ///< of the weights of the lane's slots

  __device__ loose_softmax() {
    for (int r = 0; r < Rows; ++r) {
      maximum[r] = warp::attention_row<32>::lowest;
      sum[r] = 0.0f;
    }
  }
  /// Makes weights of the scores of slots lane and lane + 32; -inf is not visible, NaN makes the row NaN. True if
  /// sums of before have to be multiplied by `factor` first. All lanes take part.
  __device__ bool weigh(float (&scores)[2][Rows], float (&factor)[Rows]) {
    using namespace packkv::detail;
    bool raised = false;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const float top = warp_max(fmaxf(scores[0][r], scores[1][r]));
      factor[r] = 1.0f;
      if (top > maximum[r] + looseness) {
        factor[r] = exp2_fast(maximum[r] - top);
        sum[r] *= factor[r];
        maximum[r] = top;
        raised = true;
      }
      for (int j = 0; j < 2; ++j) {
        scores[j][r] = scores[j][r] == -infinity() ? 0.0f : exp2_fast(scores[j][r] - maximum[r]);
        sum[r] += scores[j][r];
      }
    }
    return raised;
  }
};

/// A few of the tokens behind the packs, of any element type.
template <int KeyDim, int ValueDim, int Rows>
struct pack_tail {
  static constexpr int tokens = 8;
  using queries_type = typename warp::token_scores<KeyDim, Rows>::temp_storage;

  /// Scores and weighs the tail's tokens first, .. and adds them to channels lane, lane + 32, .. of each row. True if
  /// sums of before have to be multiplied by `factor` first. All lanes take part.
  __device__ static bool add(const input_view<4>& keys, const input_view<4>& values, const sequence_rows<Rows>& unit,
                             int rows, std::int64_t first, const queries_type& queries, float scale,
                             loose_softmax<Rows>& softmax, float (&factor)[Rows],
                             float (&channels)[Rows][ValueDim / 32]) {
    using namespace packkv::detail;
    const std::int64_t tail = keys.extent[2], queries_of_head = unit.a.in.extent[2];
    const int count = static_cast<int>(min_of<std::int64_t>(tokens, tail - first));
    float weights[2][Rows];
    {
      float x[tokens][KeyDim / warp_threads], score[warp_threads] = {};
      load(keys, unit, first, count, x);
      for_constants<tokens>([&](auto token) {
        for_constants<Rows>([&](auto row) {
          constexpr int t = decltype(token)::value, r = decltype(row)::value;
          float sum = 0.0f;
#pragma unroll
          for (int i = 0; i < KeyDim / warp_threads; ++i)
            sum = fmaf(queries.query[r][lane_id() + warp_threads * i], x[t][i], sum);
          score[t * Rows + r] = sum;
        });
      });
      const float own = warp::sums_of_lanes(score);  // of token lane / Rows, row lane % Rows
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const float s = shuffle(own, (lane_id() * Rows + r) % warp_threads);
        const std::int64_t last = tail - queries_of_head + (r < rows ? unit.query(r) : 0);  // that the row sees
        weights[0][r] = r < rows && lane_id() < count && first + lane_id() <= last ? s * scale : -infinity();
        weights[1][r] = -infinity();
      }
    }
    const bool raised = softmax.weigh(weights, factor);
    float x[tokens][ValueDim / warp_threads];
    load(values, unit, first, count, x);
#pragma unroll
    for (int t = 0; t < tokens; ++t)
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const float w = shuffle(weights[0][r], t);
        if (w == 0.0f) continue;  // what is not seen may be NaN
#pragma unroll
        for (int i = 0; i < ValueDim / warp_threads; ++i) channels[r][i] = fmaf(w, x[t][i], channels[r][i]);
      }
    return raised;
  }

 private:
  /// The lane's channels of `count` tokens; all loads come first.
  template <int Channels>
  __device__ static void load(const input_view<4>& from, const sequence_rows<Rows>& unit, std::int64_t first, int count,
                              float (&x)[tokens][Channels]) {
    using namespace packkv::detail;
    std::uint32_t bits[tokens][Channels];
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      const auto* const token =
          static_cast<const char*>(address(from, unit.b, unit.head, first + min_of(t, count - 1), lane_id()));
#pragma unroll
      for (int i = 0; i < Channels; ++i)
        bits[t][i] = warp::load_bits(token + i * warp_threads * from.stride[3], from.type);
    }
#pragma unroll
    for (int t = 0; t < tokens; ++t)
#pragma unroll
      for (int i = 0; i < Channels; ++i) x[t][i] = warp::element_of_bits(bits[t][i], from.type);
  }
};

/// out = softmax(scale * in . k^) v^; query i of n stands at token tokens - n + i and sees no later one. Grid: units of
/// Rows rows, times splits.
template <int KeyDim, int ValueDim, int Rows, warp::copy_engine Engine>
__global__ void __launch_bounds__(
    pack_attention_warp<KeyDim, ValueDim, Rows, Engine>::shape().warps* detail::warp_threads,
    pack_attention_warp<KeyDim, ValueDim, Rows, Engine>::shape().blocks_per_sm)
    pack_attention(const __grid_constant__ warp::pack_source key_source,
                   const __grid_constant__ warp::pack_source value_source, const __grid_constant__ sequence_args a,
                   const __grid_constant__ output_view<3> lse) {
  using namespace packkv::detail;
  using own_type = pack_attention_warp<KeyDim, ValueDim, Rows, Engine>;
  using keys_type = typename own_type::keys;
  using stream_type = typename own_type::stream;
  using raw_scores = warp::token_scores<KeyDim, Rows>;
  constexpr int warps = own_type::shape().warps, groups = own_type::key_codes::groups;
  using merge = block::part_merge<ValueDim, Rows, warps>;
  __shared__ typename keys_type::temp_storage queries;
  __shared__ typename raw_scores::temp_storage raw_queries;
  __shared__ typename stream_type::temp_storage streams[warps];
  __shared__ bool last;
  static_assert(own_type::shape().shared_bytes + sizeof(queries) + sizeof(raw_queries) + sizeof(streams) + 16 <=
                    policy::most_block_bytes,
                "a block fits every SM");
  auto* const all = reinterpret_cast<own_type*>(dynamic_shared());
  own_type& own = all[warp_id()];
  wait_for_kernel_before();
  const sequence_rows<Rows> unit(a);
  const std::int64_t coded = key_source.blocks;
  const std::int64_t begin = coded * unit.split / a.splits + warp_id(), end = coded * (unit.split + 1) / a.splits;
  const pack_format& f = key_source.format;
  stream_type stream(streams[warp_id()], own.tiles, {{&key_source.packs, &value_source.packs}},
                     pack_tile_number(f, unit.b, unit.head, begin), warps * pack_tile_step(f),
                     begin < end ? static_cast<int>(ceil_div<std::int64_t>(end - begin, warps)) : 0);
  stream.start();
  pack_ranges key_ranges(key_source, unit.b, unit.head, begin, warps, begin < end);
  pack_ranges value_ranges(value_source, unit.b, unit.head, begin, warps, begin < end);
  constexpr float log2_e = 1.4426950408889634f;
  keys_type::prepare(
      queries, [&](int r, int c) { return unit.load(r, c); }, a.scale * log2_e, warp_id(), warps);
  for (int i = static_cast<int>(threadIdx.x); i < Rows * KeyDim; i += warps * warp_threads)
    raw_queries.query[i / KeyDim][i % KeyDim] = unit.load(i / KeyDim, i % KeyDim);
  __syncthreads();
  const keys_type keys(queries);
  const int rows = static_cast<int>(min_of<std::int64_t>(Rows, unit.group * a.in.extent[2] - unit.first_row));
  loose_softmax<Rows> softmax;
  typename own_type::values sum(own.sums);
  std::uint32_t flags = 0;

  // While the first tiles are on their way. Pieces go to the splits in turn, because they take long.
  using tail_type = pack_tail<KeyDim, ValueDim, Rows>;
  const std::int64_t tail = key_source.tail.extent[2];
  for (std::int64_t first = tail_type::tokens * (unit.split + std::int64_t{a.splits} * warp_id()); first < tail;
       first += tail_type::tokens * std::int64_t{a.splits} * warps) {
    float channels[Rows][ValueDim / warp_threads] = {}, factor[Rows];
    const bool raised = tail_type::add(key_source.tail, value_source.tail, unit, rows, first, raw_queries,
                                       a.scale * log2_e, softmax, factor, channels);
    if (raised) sum.rescale(factor);
    sum.add_channels(channels);
  }
  for (std::int64_t tile = begin; tile < end; tile += warps) {
    const bool more = tile + warps < end;
    const std::uint8_t* bytes = nullptr;
    int size = 0;
    pack_step steps[2];
    float weights[2][Rows], factor[Rows];
    {  // Scores.
      typename own_type::key_codes codes;
      (void)stream.next(bytes, size);
      const bool good = bytes != nullptr && codes.open(bytes, size);
      if (!good) flags |= report_tile_damaged;
#pragma unroll 2
      for (int g = 0; g < (good ? groups : 0); ++g) {
        std::int32_t sums[keys_type::passes][4];
        codes.unpack(own.codes.key);
        __syncwarp();
        keys.compute(own.codes.key, sums);
        keys_type::keep(own.scores, g, sums);
        __syncwarp();  // before the codes of the next group
      }
      stream.release();
      key_ranges.next(steps, more);
      for (int j = 0; j < 2; ++j) {
        const pack_affine step = make_pack_affine(f.key, steps[j]);
#pragma unroll
        for (int r = 0; r < Rows; ++r)
          weights[j][r] = r >= rows ? -infinity()
                          : good    ? keys_type::score(queries, own.scores, r, lane_id() + warp_threads * j, step)
                                    : nan_float();
      }
    }
    if (softmax.weigh(weights, factor)) sum.rescale(factor);
    {  // Values.
      typename own_type::value_codes codes;
      (void)stream.next(bytes, size);
      const bool good = bytes != nullptr && codes.open(bytes, size);
      if (!good) flags |= report_tile_damaged;
      value_ranges.next(steps, more);
      if (good)
        sum.weigh(weights, steps, f.value.zero == pack_zero::integer, rows);
      else
        sum.add_nan(weights);
#pragma unroll 2
      for (int g = 0; g < (good ? groups : 0); ++g) {
        codes.unpack(own.codes.value);
        __syncwarp();  // the weights, too
        sum.add(g, own.codes.value);
        __syncwarp();  // before the codes of the next group, and the scores and weights of the next tile
      }
      stream.release();
    }
  }
  sum.finish();
  detail::add_report(a.report, lane_id() == 0 ? flags : 0u, 0);
  for (int r = 0; r < Rows; ++r) {
    const float total = warp_sum(softmax.sum[r]);
    if (lane_id() != 0) continue;
    own.sums.sum[r][merge::maximum_at] = softmax.maximum[r];
    own.sums.sum[r][merge::sum_at] = total;
  }
  __syncthreads();

  constexpr int stride = static_cast<int>(sizeof(own_type) / sizeof(float));
  // Where the tiles of the first warp were.
  float* const joined = reinterpret_cast<float*>(all[0].tiles);
  static_assert(sizeof(all[0].tiles) >= merge::part_floats * sizeof(float), "the first warp's tiles have room");
  if (a.splits == 1) {
    merge::join_warps(all[0].sums.sum[0], stride, warps, joined);
  } else {
    float* const parts = a.storage.rows + unit.unit * a.splits * merge::part_floats;
    merge::join_warps(all[0].sums.sum[0], stride, warps, parts + unit.split * merge::part_floats);
    if (!block::last_to_arrive(a.storage.counters + unit.unit, static_cast<unsigned>(a.splits - 1), last)) return;
    merge::join_blocks(a.splits, parts, parts, merge::part_floats, joined);
  }
  __syncthreads();
  for (int r = warp_id(); r < rows; r += warps) {
    const warp::attention_row<ValueDim> row = merge::read_row(joined, r);
    for (int i = 0; i < ValueDim / 32; ++i) unit.store(r, lane_id() + warp_threads * i, row.channel[i] / row.sum);
    if (lse.data != nullptr && lane_id() == 0)
      store_element(address(lse, unit.b, unit.query_head(r), unit.query(r)), lse.type,
                    (row.maximum + log2f(row.sum)) * 0.6931471805599453f);
  }
}

}  // namespace packkv::kernel
