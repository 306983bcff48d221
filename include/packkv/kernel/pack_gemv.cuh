// SPDX-License-Identifier: Apache-2.0
// GEMVs on packs of 16 tokens whose steps are a token's or a vector's: each tile is unpacked once for all query rows of
// its KV head, and multiplied by matrix instructions on bytes. Other packs take kernel/sequences.cuh.
// One idea: a warp takes whole tiles from a stream of its own, so that warps meet only when a block is done.
#pragma once

#include <packkv/block/part_merge.cuh>
#include <packkv/kernel/sequences.cuh>
#include <packkv/policy/pack_gemv.hpp>
#include <packkv/warp/pack_key_scores.cuh>
#include <packkv/warp/pack_stream.cuh>
#include <packkv/warp/pack_tokens.cuh>
#include <packkv/warp/pack_value_sum.cuh>

namespace packkv::kernel {

/// The tiles of a warp: its share of those of the block's unit, with the ranges of their slots.
template <int HeadDim, warp::copy_engine Engine>
class pack_tiles {
 public:
  using codes_type = warp::pack_codes<HeadDim>;
  using stream_type = warp::pack_stream<codes_type::max_tile_bytes, Engine>;
  /// Of a warp, in dynamic shared memory; 16-byte aligned.
  struct buffer {
    std::uint8_t tiles[codes_type::max_tile_bytes];
    typename codes_type::group_codes codes;
  };

  /// Every `step`-th of the tiles first, .. below `end`. All lanes take part, here and below.
  __device__ pack_tiles(typename stream_type::temp_storage& storage, buffer& to, const warp::pack_source& source,
                        std::int64_t b, int head, std::int64_t first, std::int64_t end, int step)
      : source_(source),
        stream_(storage, to.tiles, source.packs, (first * source.format.batch + b) * source.format.kv_heads + head,
                step * std::int64_t{source.format.batch} * source.format.kv_heads,
                first < end ? static_cast<int>(ceil_div<std::int64_t>(end - first, step)) : 0),
        tile_(first - step),
        end_(end),
        step_(step) {
    const pack_format& f = source.format;
    const std::int64_t ranges = range_count(f, source.which);
    ranges_ = source.packs.ranges + (first * f.batch + b) * ranges +
              range_index(f.codec(source.which), head, packkv::detail::lane_id(), 0);
    range_step_ = step * std::int64_t{f.batch} * ranges;
    if (first < end) load_ranges();
    stream_.start();
  }

  /// Waits for the next tile; false if there is none. good(): whether its codes can be read.
  __device__ bool next() {
    const std::uint8_t* tile;
    int bytes;
    if (!stream_.next(tile, bytes)) return false;
    tile_ += step_;
    good_ = tile != nullptr && codes_.open(tile, bytes);
    if (!good_) flags_ |= report_tile_damaged;
    for (int j = 0; j < 2; ++j) {
      const dtype element = source_.format.element;
      step_of_[j] = make_pack_step(source_.format.codec(source_.which), range_value(element, next_[j].low),
                                   range_value(element, next_[j].high));
    }
    // The next tile's ranges are on their way while this one is read.
    ranges_ += range_step_;
    if (tile_ + step_ < end_) load_ranges();
    return true;
  }
  __device__ bool good() const { return good_; }
  __device__ std::int64_t tile() const { return tile_; }
  __device__ codes_type& codes() { return codes_; }
  /// Of slots lane and lane + 32.
  __device__ const pack_step (&steps() const)[2] { return step_of_; }
  /// All lanes are done with the tile.
  __device__ void release() { stream_.release(); }
  __device__ std::uint32_t flags() const { return flags_; }

 private:
  __device__ void load_ranges() {
    next_[0] = ranges_[0];
    next_[1] = ranges_[packkv::detail::warp_threads];
  }

  const warp::pack_source& source_;
  stream_type stream_;
  codes_type codes_;
  const pack_range* ranges_;  ///< of the slots lane and lane + 32 of the tile that comes next
  std::int64_t range_step_, tile_, end_;
  int step_;
  pack_range next_[2];
  pack_step step_of_[2];
  std::uint32_t flags_ = 0;
  bool good_ = false;
};

/// Shared memory of a warp, and from that the shape of a block.
template <int HeadDim, warp::copy_engine Engine>
struct pack_key_warp {
  typename pack_tiles<HeadDim, Engine>::buffer tiles;
  pack_affine steps[tile_tokens];
  PACKKV_HOST_DEVICE static constexpr policy::pack_shape shape() {
    return policy::make_pack_shape(sizeof(pack_key_warp));
  }
};
template <int HeadDim, int Rows, warp::copy_engine Engine>
struct pack_value_warp {
  typename pack_tiles<HeadDim, Engine>::buffer tiles;
  typename warp::pack_value_sum<HeadDim, Rows>::temp_storage weights;
  PACKKV_HOST_DEVICE static constexpr policy::pack_shape shape() {
    return policy::make_pack_shape(sizeof(pack_value_warp));
  }
};

/// out[.., t] = scale * in . k^[t]. Grid: units of Rows rows, times splits.
template <int HeadDim, int Rows, warp::copy_engine Engine>
__global__ void __launch_bounds__(pack_key_warp<HeadDim, Engine>::shape().warps* detail::warp_threads,
                                  pack_key_warp<HeadDim, Engine>::shape().blocks_per_sm)
    pack_key_gemv(const __grid_constant__ warp::pack_source source, const __grid_constant__ sequence_args a) {
  using namespace packkv::detail;
  using tiles_type = pack_tiles<HeadDim, Engine>;
  using keys_type = warp::pack_key_scores<HeadDim, Rows>;
  using own_type = pack_key_warp<HeadDim, Engine>;
  constexpr int warps = own_type::shape().warps;
  __shared__ typename keys_type::temp_storage queries;
  __shared__ typename tiles_type::stream_type::temp_storage streams[warps];
  own_type& own = reinterpret_cast<own_type*>(dynamic_shared())[warp_id()];
  wait_for_kernel_before();
  const sequence_rows<Rows> unit(a);
  const std::int64_t count = a.tokens / tile_tokens, end = count * (unit.split + 1) / a.splits;
  tiles_type tiles(streams[warp_id()], own.tiles, source, unit.b, unit.head, count * unit.split / a.splits + warp_id(),
                   end, warps);
  keys_type::prepare(
      queries, [&](int r, int c) { return unit.load(r, c); }, a.scale, warp_id(), warps);
  __syncthreads();
  const keys_type keys(queries);
  char* to[keys_type::passes];
#pragma unroll
  for (int p = 0; p < keys_type::passes; ++p) {
    const int r = keys_type::row(p);
    to[p] = unit.row_exists(r)
                ? static_cast<char*>(address(a.out, unit.b, unit.query_head(r), unit.query(r), keys_type::slot()))
                : nullptr;
  }
  constexpr int group_slots = tiles_type::codes_type::pack_size;
  const std::int64_t group_stride = group_slots * a.out.stride[3];
  while (tiles.next()) {
    std::int64_t at = tiles.tile() * tile_tokens * a.out.stride[3];
    if (tiles.good())
      for (int j = 0; j < 2; ++j)
        own.steps[lane_id() + warp_threads * j] = make_pack_affine(source.format.codec(source.which), tiles.steps()[j]);
#pragma unroll 1
    for (int g = 0; g < tiles_type::codes_type::groups; ++g, at += group_stride) {
      float score[keys_type::passes];
      if (tiles.good()) {
        std::int32_t sums[keys_type::passes][4];
        tiles.codes().unpack(own.tiles.codes);
        __syncwarp();
        keys.compute(own.tiles.codes, sums);
        __syncwarp();  // before the codes of the next group
        const pack_affine step = own.steps[group_slots * g + keys_type::slot()];
#pragma unroll
        for (int p = 0; p < keys_type::passes; ++p) score[p] = keys_type::score(queries, p, sums[p], step);
      } else {
#pragma unroll
        for (int p = 0; p < keys_type::passes; ++p) score[p] = nan_float();
      }
#pragma unroll
      for (int p = 0; p < keys_type::passes; ++p)
        if (to[p] != nullptr) store_element(to[p] + at, a.out.type, score[p]);
    }
    tiles.release();
  }
  detail::add_report(a.report, lane_id() == 0 ? tiles.flags() : 0u, 0);
}

/// Adds up what the warps of a block have in `parts`, stride floats apart, and what the splits of a unit have; then
/// write(i, sum) for i < count, in the last block of the unit. Ends with the order of summation fixed.
template <int Threads, class Write>
__device__ inline void finish_sums(const float* parts, int stride, int warps, int count, const sequence_args& a,
                                   std::int64_t unit, int split, int part_floats, float* scratch, Write&& write) {
  using namespace packkv::detail;
  __shared__ bool last;
  float* const rows = a.splits > 1 ? a.storage.rows + unit * a.splits * part_floats : nullptr;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += Threads) {
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += parts[w * stride + i];
    if (a.splits > 1)
      rows[static_cast<std::int64_t>(split) * part_floats + i] = sum;
    else
      write(i, sum);
  }
  if (a.splits == 1 || !block::last_to_arrive(a.storage.counters + unit, static_cast<unsigned>(a.splits - 1), last))
    return;
  // As many slices of the splits as there are threads for.
  const int slices = max_of(1, Threads / count);
  for (int i = static_cast<int>(threadIdx.x); i < count * slices; i += Threads) {
    float sum = 0.0f;
#pragma unroll 8
    for (int s = i / count; s < a.splits; s += slices)
      sum += load_fresh(rows + static_cast<std::int64_t>(s) * part_floats + i % count);
    scratch[i] = sum;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += Threads) {
    float sum = 0.0f;
    for (int s = 0; s < slices; ++s) sum += scratch[s * count + i];
    write(i, sum);
  }
}

/// out = sum over t of in[.., t] * v^[t]. Grid: units of Rows rows, times splits.
template <int HeadDim, int Rows, warp::copy_engine Engine>
__global__ void __launch_bounds__(pack_value_warp<HeadDim, Rows, Engine>::shape().warps* detail::warp_threads,
                                  pack_value_warp<HeadDim, Rows, Engine>::shape().blocks_per_sm)
    pack_value_gemv(const __grid_constant__ warp::pack_source source, const __grid_constant__ sequence_args a) {
  using namespace packkv::detail;
  using tiles_type = pack_tiles<HeadDim, Engine>;
  using own_type = pack_value_warp<HeadDim, Rows, Engine>;
  constexpr int warps = own_type::shape().warps;
  __shared__ typename tiles_type::stream_type::temp_storage streams[warps];
  auto* const all = reinterpret_cast<own_type*>(dynamic_shared());
  own_type& own = all[warp_id()];
  wait_for_kernel_before();
  const sequence_rows<Rows> unit(a);
  const int rows = static_cast<int>(min_of<std::int64_t>(Rows, unit.group * a.in.extent[2] - unit.first_row));
  const std::int64_t count = a.tokens / tile_tokens, end = count * (unit.split + 1) / a.splits;
  const std::int64_t begin = count * unit.split / a.splits + warp_id();
  const bool integer_zero = source.format.codec(source.which).zero == pack_zero::integer;
  const char* from[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r)
    from[r] = static_cast<const char*>(
        address(a.in, unit.b, unit.query_head(min_of(r, rows - 1)), unit.query(min_of(r, rows - 1)), lane_id()));
  float next[2][Rows];
  const auto load = [&](std::int64_t tile) {
    const std::int64_t at = tile * tile_tokens * a.in.stride[3];
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int r = 0; r < Rows; ++r)
        next[j][r] = r < rows ? load_element(from[r] + at + warp_threads * j * a.in.stride[3], a.in.type) : 0.0f;
  };
  if (begin < end) load(begin);
  tiles_type tiles(streams[warp_id()], own.tiles, source, unit.b, unit.head, begin, end, warps);
  warp::pack_value_sum<HeadDim, Rows> sum;
  while (tiles.next()) {
    if (tiles.good())
      sum.weigh(own.weights, next, tiles.steps(), integer_zero, rows);
    else
      sum.add_nan(next);
    if (tiles.tile() + warps < end) load(tiles.tile() + warps);
    if (tiles.good()) {
#pragma unroll 1
      for (int g = 0; g < tiles_type::codes_type::groups; ++g) {
        tiles.codes().unpack(own.tiles.codes);
        __syncwarp();  // the weights, too
        sum.add(own.weights, g, own.tiles.codes);
        __syncwarp();  // before the codes of the next group, and the weights of the next tile
      }
    }
    tiles.release();
  }
  sum.finish();
  float* const part = reinterpret_cast<float*>(&own);
  static_assert(sizeof(own_type) >= Rows * HeadDim * sizeof(float), "a part lies where the tiles were");
  sum.write([&](int r, int c, float x) { part[r * HeadDim + c] = x; });
  __syncthreads();
  constexpr int stride = static_cast<int>(sizeof(own_type) / sizeof(float));
  // Behind the first warp's part there is room: the parts of a block are joined before.
  finish_sums<warps * warp_threads>(reinterpret_cast<const float*>(all), stride, warps, rows * HeadDim, a, unit.unit,
                                    unit.split, Rows * HeadDim, reinterpret_cast<float*>(all),
                                    [&](int i, float x) { unit.store(i / HeadDim, i % HeadDim, x); });
  detail::add_report(a.report, lane_id() == 0 ? tiles.flags() : 0u, 0);
}

}  // namespace packkv::kernel
