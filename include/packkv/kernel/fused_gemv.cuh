// SPDX-License-Identifier: Apache-2.0
// The two halves of attention on their own, with matrix instructions on codes: scores = scale * q.K^T and out = w.V.
// One idea: the pieces of the fused decode kernel, on one side of the cache: a warp takes tiles from a ring of its own;
// parts of value sums are plain floats, which the last block of a unit adds up in order.
#pragma once

#include <packkv/block/gemv_units.cuh>
#include <packkv/block/sum_merge.cuh>
#include <packkv/policy/fused_gemv.hpp>
#include <packkv/warp/grouped_key_scores.cuh>
#include <packkv/warp/grouped_weights.cuh>
#include <packkv/warp/raw_attention.cuh>
#include <packkv/warp/score_store.cuh>
#include <packkv/warp/side_stream.cuh>

namespace packkv::kernel {

struct fused_gemv_args {
  block::gemv_call call;
  side_parameters parameters;
  float scale;              ///< of scores
  float* parts;             ///< of value sums: [blocks][2][part_floats]
  std::uint32_t* counters;  ///< of value sums: [blocks], zero between launches
  bool settled_cache;       ///< exec::settled_cache
};

/// x[i] = channel index[i] of a query of any type.
template <int Count>
__device__ inline void load_query(const input_view<3>& queries, std::int64_t b, std::int64_t head,
                                  const int (&index)[Count], float (&x)[Count]) {
  const auto* const row = static_cast<const char*>(detail::address(queries, b, head, 0));
  const std::int64_t stride = queries.stride[2];
  if (queries.type == dtype::float32)
    for (int i = 0; i < Count; ++i) x[i] = *reinterpret_cast<const float*>(row + index[i] * stride);
  else
    warp::load_16bit(row, stride, queries.type, index, x);
}

/// Channel index[i] of an output of any type = x[i].
template <int Count>
__device__ inline void store_row(const output_view<3>& out, std::int64_t b, std::int64_t head,
                                 const int (&index)[Count], const float (&x)[Count]) {
  auto* const row = static_cast<char*>(detail::address(out, b, head, 0));
  const std::int64_t stride = out.stride[2];
  if (out.type == dtype::float32) {
    for (int i = 0; i < Count; ++i) *reinterpret_cast<float*>(row + index[i] * stride) = x[i];
  } else {
    for (int i = 0; i < Count; ++i)
      *reinterpret_cast<std::uint16_t*>(row + index[i] * stride) =
          out.type == dtype::float16 ? static_cast<std::uint16_t>(detail::pack_halves(x[i], 0.0f))
                                     : float_to_bfloat16(x[i]);
  }
}

/// What a block needs in shared memory whatever its shape, with room for the unit list and for the rings' barriers.
template <class Codec, int Rows>
inline constexpr int key_gemv_fixed_bytes =
    static_cast<int>(sizeof(typename warp::key_scores_of<Codec, Rows>::temp_storage) + sizeof(block::sequence_items)) +
    3072;
inline constexpr int value_gemv_fixed_bytes = static_cast<int>(sizeof(block::sequence_items)) + 3072;

/// How a block is built for SMs that have so much shared memory, and 1 or 2 blocks an SM, where there is a choice.
template <class Codec, int Rows>
PACKKV_HOST_DEVICE constexpr policy::gemv_block_shape key_gemv_shape(int shared_kib) {
  return policy::make_gemv_shape(Codec::spec().tile_bytes(), 0, key_gemv_fixed_bytes<Codec, Rows>,
                                 policy::key_gemv_registers(Rows), shared_kib, 2);
}
template <class Codec, int Rows>
PACKKV_HOST_DEVICE constexpr policy::gemv_block_shape value_gemv_shape(int shared_kib, int blocks_per_sm) {
  constexpr int dim = Codec::spec().head_dim;
  return policy::make_gemv_shape(Codec::spec().tile_bytes(), block::sum_merge<dim, Rows, 1>::part_floats * 4,
                                 value_gemv_fixed_bytes, policy::value_gemv_registers(Rows, dim), shared_kib,
                                 blocks_per_sm);
}

/// Codec is a static key_codec or grouped_key_codec.
template <class Codec, int Rows, warp::copy_engine Engine, int SharedKib>
class key_gemv_block {
 public:
  static constexpr codec_spec spec = Codec::spec();
  static constexpr int tile_bytes = spec.tile_bytes();
  using scores = warp::key_scores_of<Codec, Rows>;
  static constexpr auto shape = key_gemv_shape<Codec, Rows>(SharedKib);
  static constexpr int warps = shape.warps, threads = warps * detail::warp_threads;
  using units_type = block::gemv_units<Rows, threads, policy::key_gemv_registers(Rows) == policy::gemv_registers::few>;
  using stream_type = warp::side_stream<tile_bytes, shape.stages, Engine>;

  struct temp_storage {
    typename scores::temp_storage queries;
    typename units_type::temp_storage units;
    typename stream_type::temp_storage stream_of[warps];
  };
  static_assert(sizeof(temp_storage) <= static_cast<std::size_t>(key_gemv_fixed_bytes<Codec, Rows>),
                "the policy knows what the kernel needs");

  __device__ static void run(const fused_gemv_args& a, temp_storage& storage, std::uint8_t* dynamic) {
    using namespace packkv::detail;
    stream_type stream(storage.stream_of[warp_id()], dynamic + warp_id() * shape.warp_bytes);
    bool early = a.settled_cache;
    if (!early) wait_for_kernel_before();
    units_type units(a.call, storage.units, false);
    block::gemv_piece piece;
    while (units.next(piece)) {
      stream.open(warp::key_pages(a.call.cache, a.call.tiles_per_page, piece.head), piece.b, piece.lo + warp_id(),
                  piece.hi, warps);
      // The queries before the tiles: behind all blocks' first tiles they would wait for microseconds. Unless they are
      // still being made.
      if (early) {
        stream.start(1);
        wait_for_kernel_before();
        early = false;
      }
      scores::prepare(
          storage.queries, scores::head_values::load(of_head(Codec::spec(), a.parameters, piece.head)),
          [&](int r, const auto& index, auto& x) {
            load_query(a.call.in, piece.b, piece.first_head + min_of(r, piece.rows - 1), index, x);
            for (auto& y : x) y = r < piece.rows ? y : 0.0f;
          },
          a.scale, warp_id(), warps);
      stream.start();
      __syncthreads();
      const scores keys(storage.queries);
      const warp::score_store<Rows> to(a.call.out, piece.b, piece.first_head, piece.rows);
      warp::side_tile tile;
      while (stream.next(tile)) {
        float s[warp::tokens_per_lane][scores::lane_rows];
        if (tile.has_page) {
          constexpr float nothing[scores::lane_rows] = {};
          keys.compute(tile.data, nothing, s);
        } else {
          for (auto& token : s)
            for (float& x : token) x = -infinity();
        }
        stream.release();
        to.store(s, tile.number * tile_tokens, piece.length);
      }
      stream.report(a.call.report);
    }
    if (early) wait_for_kernel_before();  // what comes behind waits for that one, too
  }
};

/// Codec is a static value_codec or grouped_value_codec.
template <class Codec, int Rows, warp::copy_engine Engine, int SharedKib, int BlocksPerSm>
class value_gemv_block {
 public:
  static constexpr codec_spec spec = Codec::spec();
  static constexpr int dim = spec.head_dim, tile_bytes = spec.tile_bytes();
  using values = warp::mma_value_sum<Codec, Rows>;
  static constexpr auto shape = value_gemv_shape<Codec, Rows>(SharedKib, BlocksPerSm);
  static constexpr int warps = shape.warps, threads = warps * detail::warp_threads;
  using units_type =
      block::gemv_units<Rows, threads, policy::value_gemv_registers(Rows, dim) == policy::gemv_registers::few>;
  using stream_type = warp::side_stream<tile_bytes, shape.stages, Engine>;
  using merge = block::sum_merge<dim, Rows, threads>;
  static constexpr int part_stride = shape.warp_bytes / 4;

  struct temp_storage {
    typename units_type::temp_storage units;
    typename stream_type::temp_storage stream_of[warps];
    bool last;
  };
  static_assert(sizeof(temp_storage) <= static_cast<std::size_t>(value_gemv_fixed_bytes),
                "the policy knows what the kernel needs");

  __device__ value_gemv_block(const fused_gemv_args& a, temp_storage& storage, std::uint8_t* dynamic)
      : a_(a),
        storage_(storage),
        parts_(reinterpret_cast<float*>(dynamic)),
        joined_(reinterpret_cast<float*>(dynamic + warps * shape.warp_bytes)) {}

  __device__ void run() {
    using namespace packkv::detail;
    stream_type stream(storage_.stream_of[warp_id()],
                       reinterpret_cast<std::uint8_t*>(parts_ + warp_id() * part_stride));
    if (!a_.settled_cache) wait_for_kernel_before();
    units_type units(a_.call, storage_.units, true);
    block::gemv_piece piece;
    while (units.next(piece)) {
      add_tiles(piece, units, stream);
      __syncthreads();
      finish(units.piece());
      fence_async_copies();  // the ring takes tiles again
    }
    wait_for_kernel_before();  // if there was nothing: what comes behind waits for that one, too
  }

 private:
  using columns = typename values::columns;

  /// Leaves each warp's part where its tiles were.
  __device__ void add_tiles(const block::gemv_piece& piece, units_type& units, stream_type& stream) {
    using namespace packkv::detail;
    stream.open(warp::value_pages(a_.call.cache, a_.call.tiles_per_page, piece.head), piece.b, piece.lo + warp_id(),
                piece.hi, warps);
    stream.start(1);  // no more: behind all blocks' first tiles the weights would wait for microseconds
    if (a_.settled_cache) wait_for_kernel_before();
    warp::weight_source<Rows> source(a_.call.in, piece.b, piece.first_head, piece.rows,
                                     std::int64_t{tile_tokens} * (piece.lo + warp_id()), warps * tile_tokens,
                                     piece.length);
    if (piece.lo + warp_id() < piece.hi) source.load();
    stream.start();
    units.settle(piece);
    warp::weighted_sum_of<Codec, Rows> sum;
    warp::side_tile tile;
    while (stream.next(tile)) {
      float w[columns::lane_tokens][values::lane_rows];
      source.get(w);
      if (tile.has_page) sum.weigh(tile.data, w);
      // The next weights are on their way while this tile is added, and need no registers before. Behind the last tile
      // they are another block's, or none.
      source.load();
      if (tile.has_page) sum.add(tile.data);
      stream.release();
    }
    stream.report(a_.call.report);
    float* const part = parts_ + warp_id() * part_stride;
    float total[values::lane_rows];
    sum.finish(total, [&](int row, int channel, float x) { part[row * merge::row_floats + channel] = x; });
    if (lane_id() < columns::lanes_apart)
      for (int i = 0; i < values::lane_rows; ++i)
        part[columns::row(i) * merge::row_floats + merge::weight_at] = total[i];
  }

  /// The part of a block's unit that began there, or before it.
  __device__ float* part_of(int block, bool began) const {
    return a_.parts + (static_cast<std::int64_t>(block) * 2 + (began ? 1 : 0)) * merge::part_floats;
  }

  /// Joins the warps' parts and writes the unit's rows, or leaves them to the last of its blocks.
  __device__ void finish(block::gemv_piece piece) {
    const int here = static_cast<int>(blockIdx.x), others = piece.last_block - piece.first_block;
    merge::join_warps(parts_, part_stride, warps, others == 0 ? joined_ : part_of(here, here == piece.first_block));
    if (others > 0 &&
        !block::last_to_arrive(a_.counters + piece.first_block, static_cast<unsigned>(others), storage_.last))
      return;
    const head_parameters head = of_head(Codec::spec(), a_.parameters, piece.head);
    const auto own = values::head_values::load(head);  // on their way while parts are joined
    if (others > 0)
      merge::join_blocks(others + 1, part_of(piece.first_block, true), part_of(piece.first_block, false),
                         2 * merge::part_floats, joined_);
    __syncthreads();
    write(piece, head.channel_offset != nullptr, own);
  }
  /// Moves the rows into the original basis and stores them.
  __device__ void write(const block::gemv_piece& piece, bool has_offset, const typename values::head_values& own) {
    using namespace packkv::detail;
    for (int r = warp_id(); r < piece.rows; r += warps) {
      const float* const row = joined_ + r * merge::row_floats;
      float y[dim / warp_threads];
      for (int i = 0; i < dim / warp_threads; ++i) y[i] = row[lane_id() + warp_threads * i];
      // Without an offset the sum of the weights does not count, even where it is not finite.
      values::finish(own, y, has_offset ? row[merge::weight_at] : 0.0f);
      store_row(a_.call.out, piece.b, piece.first_head + r, own.channel, y);
    }
  }

  const fused_gemv_args& a_;
  temp_storage& storage_;
  float *parts_, *joined_;  ///< of the warps, where their tiles were; of the block
};

/// Grid: any number of blocks, which share the work; see policy::gemv_blocks. Where no block fits into the shared
/// memory the kernels are empty: the host knows that, too.
template <class Codec, int Rows, warp::copy_engine Engine, int SharedKib>
__global__ void __launch_bounds__(
    key_gemv_shape<Codec, Rows>(policy::resolved_shared_kib(SharedKib)).warps* detail::warp_threads,
    key_gemv_shape<Codec, Rows>(policy::resolved_shared_kib(SharedKib)).blocks_per_sm)
    fused_key_gemv(const __grid_constant__ fused_gemv_args args) {
  constexpr int shared_kib = policy::resolved_shared_kib(SharedKib);
  if constexpr (key_gemv_shape<Codec, Rows>(shared_kib).fits()) {
    using block_type = key_gemv_block<Codec, Rows, Engine, shared_kib>;
    detail::touch_parameters(args);
    __shared__ typename block_type::temp_storage storage;
    block_type::run(args, storage, detail::dynamic_shared());
  }
}
template <class Codec, int Rows, warp::copy_engine Engine, int SharedKib, int BlocksPerSm>
__global__ void __launch_bounds__(
    value_gemv_shape<Codec, Rows>(policy::resolved_shared_kib(SharedKib), BlocksPerSm).warps* detail::warp_threads,
    value_gemv_shape<Codec, Rows>(policy::resolved_shared_kib(SharedKib), BlocksPerSm).blocks_per_sm)
    fused_value_gemv(const __grid_constant__ fused_gemv_args args) {
  constexpr int shared_kib = policy::resolved_shared_kib(SharedKib);
  if constexpr (value_gemv_shape<Codec, Rows>(shared_kib, BlocksPerSm).fits()) {
    using block_type = value_gemv_block<Codec, Rows, Engine, shared_kib, BlocksPerSm>;
    detail::touch_parameters(args);
    __shared__ typename block_type::temp_storage storage;
    block_type(args, storage, detail::dynamic_shared()).run();
  }
}

}  // namespace packkv::kernel
