// SPDX-License-Identifier: Apache-2.0
// GEMVs on packs of 16 tokens whose steps are a token's or a vector's: each tile is unpacked once for all query rows of
// its KV head, and multiplied by matrix instructions on bytes. Other packs take kernel/sequences.cuh.
// One idea: a warp takes whole tiles from a stream of its own, so that warps meet only when a block is done.
#pragma once

#include <packkv/block/part_merge.cuh>
#include <packkv/block/work_split.cuh>
#include <packkv/detail/approx.cuh>
#include <packkv/kernel/sequences.cuh>
#include <packkv/policy/pack_gemv.hpp>
#include <packkv/warp/pack_key_scores.cuh>
#include <packkv/warp/pack_stream.cuh>
#include <packkv/warp/pack_tokens.cuh>
#include <packkv/warp/pack_value_sum.cuh>

namespace packkv::kernel {

/// Number of the tile of block `tile` of a head among those of the packs, and what lies between a head's tiles.
__device__ inline std::int64_t pack_tile_number(const pack_format& f, std::int64_t b, int head, std::int64_t tile) {
  return (tile * f.batch + b) * f.kv_heads + head;
}
__device__ inline std::int64_t pack_tile_step(const pack_format& f) { return std::int64_t{f.batch} * f.kv_heads; }

/// The ranges of the slots lane and lane + 32 of a warp's tiles, one tile ahead.
class pack_ranges {
 public:
  /// Of the tiles first, first + step, .. of a head; `first` exists if `load`.
  __device__ pack_ranges(const warp::pack_source& source, std::int64_t b, int head, std::int64_t first, int step,
                         bool load)
      : source_(source) {
    const pack_format& f = source.format;
    const std::int64_t ranges = range_count(f, source.which);
    next_range_ = reinterpret_cast<const std::uint32_t*>(source.packs.ranges) + (first * f.batch + b) * ranges +
                  range_index(f.codec(source.which), head, packkv::detail::lane_id(), 0);
    step_ = step * std::int64_t{f.batch} * ranges;
    if (load) fetch();
  }
  /// The steps of the tile that was fetched; with `more`, the next one's ranges are on their way from then on.
  __device__ void next(pack_step (&steps)[2], bool more) {
    using namespace packkv::detail;
    for (int j = 0; j < 2; ++j) {
      const two_floats range =
          source_.format.element == dtype::float16 ? unpack_16bit<false>(bits_[j]) : unpack_16bit<true>(bits_[j]);
      steps[j] = make_pack_step(source_.format.codec(source_.which), range.low, range.high);
    }
    next_range_ += step_;
    if (more) fetch();
  }

 private:
  __device__ void fetch() {
    for (int j = 0; j < 2; ++j) bits_[j] = next_range_[packkv::detail::warp_threads * j];
  }

  const warp::pack_source& source_;
  const std::uint32_t* next_range_;  ///< low and high in a word
  std::int64_t step_;
  std::uint32_t bits_[2];
};

/// The tiles of a warp: its share of those of the block's unit, with the steps of their slots.
template <int HeadDim, warp::copy_engine Engine>
class pack_tiles {
 public:
  using codes_type = warp::pack_codes<HeadDim>;
  using stream_type = warp::pack_stream<codes_type::max_tile_bytes, codes_type::slack_bytes, Engine>;
  /// Of a warp, in dynamic shared memory; 16-byte aligned.
  struct buffer {
    std::uint8_t tiles[stream_type::buffer_bytes];
    typename codes_type::group_codes codes;
  };

  /// Every `step`-th of the tiles first, .. below `end`. All lanes take part, here and below.
  __device__ pack_tiles(typename stream_type::temp_storage& storage, buffer& to, const warp::pack_source& source,
                        std::int64_t b, int head, std::int64_t first, std::int64_t end, int step)
      : stream_(storage, to.tiles, {{&source.packs}}, pack_tile_number(source.format, b, head, first),
                step * pack_tile_step(source.format),
                first < end ? static_cast<int>(ceil_div<std::int64_t>(end - first, step)) : 0),
        ranges_(source, b, head, first, step, first < end),
        tile_(first - step),
        end_(end),
        step_(step) {
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
    ranges_.next(steps_, tile_ + step_ < end_);
    return true;
  }
  __device__ bool good() const { return good_; }
  __device__ std::int64_t tile() const { return tile_; }
  __device__ codes_type& codes() { return codes_; }
  /// Of slots lane and lane + 32.
  __device__ const pack_step (&steps() const)[2] { return steps_; }
  /// All lanes are done with the tile.
  __device__ void release() { stream_.release(); }
  __device__ std::uint32_t flags() const { return flags_; }

 private:
  stream_type stream_;
  codes_type codes_;
  pack_ranges ranges_;
  std::int64_t tile_, end_;
  int step_;
  pack_step steps_[2];
  std::uint32_t flags_ = 0;
  bool good_ = false;
};

/// Shared memory of a warp, and from that the shape of a block.
template <int HeadDim, int Rows, warp::copy_engine Engine>
struct pack_key_warp {
  typename pack_tiles<HeadDim, Engine>::buffer tiles;
  typename warp::pack_key_scores<HeadDim, Rows>::tile_sums sums;
  PACKKV_HOST_DEVICE static constexpr policy::pack_shape shape() {
    return policy::make_pack_shape(sizeof(pack_key_warp),
                                   sizeof(typename warp::pack_key_scores<HeadDim, Rows>::temp_storage) + 512, 16);
  }
};
template <int HeadDim, int Rows, warp::copy_engine Engine>
struct pack_value_warp {
  typename pack_tiles<HeadDim, Engine>::buffer tiles;
  typename warp::pack_value_sum<HeadDim, Rows>::temp_storage sums;
  PACKKV_HOST_DEVICE static constexpr policy::pack_shape shape() {
    return policy::make_pack_shape(sizeof(pack_value_warp), 512, Rows * HeadDim > 256 ? 12 : 16);
  }
};

/// Coordinates of a block: grid = units * splits, a unit being a batch row, a KV head and Rows of its query heads.
template <int Rows>
struct pack_unit {
  std::int32_t number, split, b, head, first_head, rows;
  std::int32_t begin, end;  ///< tiles of the split

  __device__ explicit pack_unit(const sequence_args& a) {
    const block::quotient of_grid(static_cast<std::int32_t>(blockIdx.x), a.splits);
    const block::quotient of_head(of_grid.whole, static_cast<std::int32_t>(a.chunks));
    const block::quotient of_batch(of_head.whole, a.kv_heads);
    const block::quotient share(static_cast<std::int32_t>(a.tokens / tile_tokens), a.splits);
    const auto group = block::quotient(static_cast<std::int32_t>(a.in.extent[1]), a.kv_heads).whole;
    number = of_grid.whole;
    split = of_grid.rest;
    b = of_batch.whole;
    head = of_batch.rest;
    first_head = head * group + of_head.rest * Rows;
    rows = min_of(Rows, group - of_head.rest * Rows);
    begin = share.whole * split + min_of(split, share.rest);
    end = begin + share.whole + (split < share.rest ? 1 : 0);
  }
  /// Address of element `i` of row r, in one of the tensors [batch, query_heads, 1, ..].
  template <class Pointer>
  __device__ auto address(const tensor_view<Pointer, 4>& x, int r, std::int64_t i) const {
    return detail::address(x, b, first_head + min_of(r, rows - 1), 0, i);
  }
};

/// out[.., t] = scale * in . k^[t]. Grid: units of Rows rows, times splits.
template <int HeadDim, int Rows, warp::copy_engine Engine>
__global__ void __launch_bounds__(pack_key_warp<HeadDim, Rows, Engine>::shape().warps* detail::warp_threads,
                                  pack_key_warp<HeadDim, Rows, Engine>::shape().blocks_per_sm)
    pack_key_gemv(const __grid_constant__ warp::pack_source source, const __grid_constant__ sequence_args a) {
  using namespace packkv::detail;
  using tiles_type = pack_tiles<HeadDim, Engine>;
  using keys_type = warp::pack_key_scores<HeadDim, Rows>;
  using own_type = pack_key_warp<HeadDim, Rows, Engine>;
  constexpr int warps = own_type::shape().warps;
  __shared__ typename keys_type::temp_storage queries;
  __shared__ typename tiles_type::stream_type::temp_storage streams[warps];
  static_assert(own_type::shape().shared_bytes + sizeof(queries) + sizeof(streams) <= policy::most_block_bytes,
                "a block fits every SM");
  own_type& own = reinterpret_cast<own_type*>(dynamic_shared())[warp_id()];
  wait_for_kernel_before();
  const pack_unit<Rows> unit(a);
  tiles_type tiles(streams[warp_id()], own.tiles, source, unit.b, unit.head, unit.begin + warp_id(), unit.end, warps);
  keys_type::prepare(
      queries, [&](int r, int c) { return r < unit.rows ? load_element(unit.address(a.in, r, c), a.in.type) : 0.0f; },
      a.scale, warp_id(), warps);
  __syncthreads();
  const keys_type keys(queries);
  const std::int64_t lanes = warp_threads * a.out.stride[3], step_of_tile = 2 * warps * lanes;
  char* to[Rows];  // the first slot of the lane in a tile
#pragma unroll
  for (int r = 0; r < Rows; ++r)
    to[r] =
        static_cast<char*>(unit.address(a.out, r, (unit.begin + warp_id()) * std::int64_t{tile_tokens} + lane_id()));
  while (tiles.next()) {
    if (tiles.good()) {
#pragma unroll 2  // K 0.0436 -> 0.0426 ms, V 0.0411 -> 0.0406 (hidden 1024, 128k tokens, H200, 2026-11-29)
      for (int g = 0; g < tiles_type::codes_type::groups; ++g) {
        std::int32_t sums[keys_type::passes][4];
        tiles.codes().unpack(own.tiles.codes);
        __syncwarp();
        keys.compute(own.tiles.codes, sums);
        keys_type::keep(own.sums, g, sums);
        __syncwarp();  // before the codes of the next group
      }
    }
    for (int j = 0; j < 2; ++j) {
      const int slot = lane_id() + warp_threads * j;
      const pack_affine step = make_pack_affine(source.format.codec(source.which), tiles.steps()[j]);
#pragma unroll
      for (int r = 0; r < Rows; ++r)
        if (r < unit.rows)
          store_element(to[r] + j * lanes, a.out.type,
                        tiles.good() ? keys_type::score(queries, own.sums, r, slot, step) : nan_float());
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) to[r] += step_of_tile;
    tiles.release();
  }
  detail::add_report(a.report, lane_id() == 0 ? tiles.flags() : 0u, 0);
}

/// write(i, sum) for i < count of the sums over `number` parts in global memory that other blocks have written, always
/// in the same order. Scratch: max(Threads, count) floats of shared memory that nobody reads any more.
template <int Threads, class Write>
__device__ inline void sum_parts(const float* parts, int part_floats, int number, int count, float* scratch,
                                 Write&& write) {
  const int slices = max_of(1, Threads / count);  // of the parts, as many as there are threads for
  for (int i = static_cast<int>(threadIdx.x); i < count * slices; i += Threads) {
    float sum = 0.0f;
#pragma unroll 8
    for (int p = i / count; p < number; p += slices) sum += detail::load_fresh(parts + p * part_floats + i % count);
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
  __shared__ bool last;
  static_assert(own_type::shape().shared_bytes + sizeof(streams) + 16 <= policy::most_block_bytes,
                "a block fits every SM");
  auto* const all = reinterpret_cast<own_type*>(dynamic_shared());
  own_type& own = all[warp_id()];
  wait_for_kernel_before();
  const pack_unit<Rows> unit(a);
  const bool integer_zero = source.format.codec(source.which).zero == pack_zero::integer;
  const std::int64_t lanes = warp_threads * a.in.stride[3], step_of_tile = 2 * warps * lanes;
  const char* from[Rows];  // the first slot of the lane in the tile that comes next
#pragma unroll
  for (int r = 0; r < Rows; ++r)
    from[r] = static_cast<const char*>(
        unit.address(a.in, r, (unit.begin + warp_id()) * std::int64_t{tile_tokens} + lane_id()));
  std::uint32_t next[2][Rows] = {};
  const auto load = [&] {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      if (r < unit.rows)
        for (int j = 0; j < 2; ++j) next[j][r] = warp::load_bits(from[r] + j * lanes, a.in.type);
      from[r] += step_of_tile;
    }
  };
  if (unit.begin + warp_id() < unit.end) load();
  tiles_type tiles(streams[warp_id()], own.tiles, source, unit.b, unit.head, unit.begin + warp_id(), unit.end, warps);
  warp::pack_value_sum<HeadDim, Rows> sum(own.sums);
  while (tiles.next()) {
    float weights[2][Rows];
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int r = 0; r < Rows; ++r) weights[j][r] = warp::element_of_bits(next[j][r], a.in.type);
    if (tiles.tile() + warps < unit.end) load();
    if (tiles.good())
      sum.weigh(weights, tiles.steps(), integer_zero, unit.rows);
    else
      sum.add_nan(weights);
    if (tiles.good()) {
#pragma unroll 2
      for (int g = 0; g < tiles_type::codes_type::groups; ++g) {
        tiles.codes().unpack(own.tiles.codes);
        __syncwarp();  // the weights, too
        sum.add(g, own.tiles.codes);
        __syncwarp();  // before the codes of the next group, and the weights of the next tile
      }
    }
    tiles.release();
  }
  sum.finish();
  detail::add_report(a.report, lane_id() == 0 ? tiles.flags() : 0u, 0);
  __syncthreads();
  constexpr int threads = warps * warp_threads, part = Rows * HeadDim;
  const int count = unit.rows * HeadDim;
  const auto store = [&](int i, float x) {
    store_element(unit.address(a.out, i / HeadDim, i % HeadDim), a.out.type, x);
  };
  float* const parts = a.splits > 1 ? a.storage.rows + std::int64_t{unit.number} * a.splits * part : nullptr;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) {
    float total = 0.0f;
    for (int w = 0; w < warps; ++w) total += all[w].sums.sum[i / HeadDim][i % HeadDim];
    if (a.splits > 1)
      parts[unit.split * part + i] = total;
    else
      store(i, total);
  }
  if (a.splits > 1 &&
      block::last_to_arrive(a.storage.counters + unit.number, static_cast<unsigned>(a.splits - 1), last))
    sum_parts<threads>(parts, part, a.splits, count, reinterpret_cast<float*>(dynamic_shared()), store);
}

}  // namespace packkv::kernel
