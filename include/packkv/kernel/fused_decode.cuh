// SPDX-License-Identifier: Apache-2.0
// Decode attention on codes with matrix instructions: one pass over the compressed K and V of a batch.
// One idea: the items of work (a tile of a sequence, KV head and up to 16 query rows; and the 16-bit tokens of it) are
// shared evenly among blocks whatever the lengths; what a block has of a unit meets the rest in global memory.
#pragma once

#include <packkv/block/unit_parts.cuh>
#include <packkv/policy/fused_decode.hpp>
#include <packkv/warp/grouped_key_scores.cuh>
#include <packkv/warp/tile_stream.cuh>
#include <packkv/warp/value_output.cuh>

namespace packkv::kernel {

struct fused_args : block::decode_launch {
  side_parameters key, value;
  float* parts;             ///< [blocks][3][part_floats]
  std::uint32_t* counters;  ///< [blocks], zero between launches
  bool settled_cache;       ///< exec::settled_cache
};

/// What a block needs in shared memory whatever its shape.
template <class Format, int Rows>
struct fused_storage {
  typename warp::key_scores_of<typename Format::key_codec_type, Rows>::temp_storage queries;
  block::work_storage<Rows> work;
  bool last;  ///< the block is the last of a unit
};

/// How a block is built for SMs that have so much shared memory, and 1 or 2 blocks an SM if there is a choice.
template <class Format, int Rows>
PACKKV_HOST_DEVICE constexpr policy::fused_block_shape fused_shape(int shared_kib, int blocks_per_sm) {
  return policy::make_fused_shape(Format::key_tile_bytes + Format::value_tile_bytes, Rows, Format::value_head_dim,
                                  static_cast<int>(sizeof(fused_storage<Format, Rows>)) + 1024, shared_kib,
                                  blocks_per_sm);
}

template <class Format, int Rows, warp::copy_engine Engine, class Variant, int SharedKib, int BlocksPerSm>
class fused_block {
 public:
  static constexpr int key_dim = Format::key_head_dim, value_dim = Format::value_head_dim;
  using scores = warp::key_scores_of<typename Format::key_codec_type, Rows>;
  using output = warp::value_output_of<typename Format::value_codec_type, Rows>;
  using values = typename output::values;
  static constexpr auto shape = fused_shape<Format, Rows>(SharedKib, BlocksPerSm);
  static constexpr int warps = shape.warps, threads = warps * detail::warp_threads;
  using stream = warp::tile_stream<Format, shape.stages, Engine>;
  using parts = block::unit_parts<key_dim, value_dim, Rows, warps, shape.warp_bytes / 4, shape.raw_warps>;
  using merge = typename parts::merge;
  static constexpr int warp_bytes = shape.warp_bytes;
  static_assert(warp_bytes >= stream::buffer_bytes && warp_bytes >= merge::part_floats * 4 &&
                    shape.shared_bytes == warps * warp_bytes + parts::joined_floats * 4,
                "the policy knows what the kernel needs");

  struct temp_storage : fused_storage<Format, Rows> {
    typename stream::temp_storage stream_of[warps];
  };
  static_assert(sizeof(temp_storage) <= sizeof(fused_storage<Format, Rows>) + 1024,
                "the policy knows what the kernel needs");

  __device__ fused_block(const fused_args& args, const Variant& variant, temp_storage& storage, std::uint8_t* dynamic)
      : a_(args),
        variant_(variant),
        storage_(storage),
        unit_(storage.work.unit),
        work_(args, storage.work),
        parts_(args.parts, args.counters, reinterpret_cast<float*>(dynamic),
               reinterpret_cast<float*>(dynamic + warps * warp_bytes)),
        stream_(storage.stream_of[detail::warp_id()], dynamic + detail::warp_id() * warp_bytes, args.call.cache,
                args.report) {}

  __device__ void run() {
    if (!a_.settled_cache) detail::wait_for_kernel_before();
    std::int32_t item;
    if (!work_.begin(item)) {
      detail::wait_for_kernel_before();  // what comes behind waits for that one, too
      return;
    }
    while (true) {
      work_.take(item);
      const block::work_storage<Rows>& work = storage_.work;
      if (work.coded) {
        begin();
      } else {
        work_.find_owners();
        detail::wait_for_kernel_before();
      }
      // While the first tiles are on their way; the other warps do not wait.
      if (work.tail && unit_.has_raw()) parts_.attend_raw(work, a_.call, variant_);
      if (work.coded) add_tiles();
      __syncthreads();
      if (work.coded || work.tail) finish();
      if (!work_.more()) return;
      detail::fence_async_copies();  // the ring takes tiles again
      item = work_.release();
    }
  }

 private:
  __device__ bool shaped() const { return a_.call.options.soft_cap > 0.0f || Variant::active; }

  /// Requests the first of the unit's coded tiles and rounds its queries.
  __device__ void begin() {
    using namespace packkv::detail;
    // The queries first: behind all blocks' first tiles they would wait for microseconds. Where they are still being
    // made, behind one tile of each warp.
    const bool early = a_.settled_cache && work_.is_first();
    const int first_row = parts::first_row();
    std::uint16_t query[key_dim / 32] = {};  // of the warp's first row
    typename scores::head_values own = {};
    if (first_row < Rows || scores::has_basis)
      own = scores::head_values::load(of_head(Format::key(), a_.key, unit_.head));
    if (first_row < Rows && !early) unit_.load_query(a_.call, first_row, own.channel, query);
    const block::row_ranges ranges = unit_.ranges(a_.call);
    warp::tile_walk walk = {max_of(storage_.work.lo, ranges.any.begin / tile_tokens), warps, 0, 0};
    const int end_tile = min_of(storage_.work.hi, ceil_div(ranges.any.end, tile_tokens));
    if (storage_.work.tail && unit_.has_raw()) {
      unit_.raw.template prefetch<key_dim, value_dim>(static_cast<int>(threadIdx.x), threads);
      walk.late = parts::raw_warps(storage_.work);
      walk.rounds = policy::raw_chunk_tiles * ceil_div(unit_.raw.chunks(parts::raw_attention::tokens), walk.late);
    }
    stream_.open(unit_.b, unit_.head, walk, warp_id(), end_tile);
    stream_.start(early ? 1 : shape.stages);
    work_.find_owners();
    if (early) {
      wait_for_kernel_before();
      if (first_row < Rows) unit_.load_query(a_.call, first_row, own.channel, query);
      stream_.start();
    }
    scores::prepare(
        storage_.queries, own,
        [&](int r, const auto& index, auto& x) {
          if (r == first_row)
            unit_.convert_query(a_.call, r, query, x);
          else
            unit_.load_query(a_.call, r, index, x);
        },
        a_.call.options.softmax_scale * (shaped() ? 1.0f : log2e), first_row, warps);
    __syncthreads();
  }

  /// Attends to the unit's coded tiles; every warp leaves its part.
  __device__ void add_tiles() {
    using namespace packkv::detail;
    const block::row_ranges ranges = unit_.ranges(a_.call);
    const bool changed = shaped();
    const scores keys(storage_.queries);
    output sum;
    int tile;
    const std::uint8_t *key_data, *value_data;
    while (stream_.next(tile, key_data, value_data)) {
      const int first = tile * tile_tokens;
      const bool masked = first < ranges.all.begin || first + tile_tokens > ranges.all.end;
      float s[warp::tokens_per_lane][scores::lane_rows];
      keys.compute(key_data, sum.reference(), s);
      if (__builtin_expect(changed, 0)) unit_.shape_tile(a_.call, variant_, first, sum.reference(), s);
      sum.add(value_data, s, __builtin_expect(masked, 0) ? unit_.hidden(first) : 0u);
      stream_.release();
    }
    parts_.store(sum);
  }

  /// Joins the warps' parts and writes the unit's rows, or leaves them to the last of its blocks.
  __device__ void finish() {
    typename values::head_values own = {};
    char* to = nullptr;
    const auto prepare = [&] {
      if (parts::first_row() >= Rows) return;
      own = values::head_values::load(of_head(Format::value(), a_.value, unit_.head));
      to = unit_.out_of(a_.call, parts::first_row());
    };
    if (!parts_.hand_in(storage_.work, storage_.last, prepare)) return;
    parts_.write(storage_.work, a_.call, to, [&](auto& y, float weight, auto&& sink) {
      values::finish(own, y, weight);
      for (int i = 0; i < Format::value_head_dim / detail::warp_threads; ++i) sink(own.channel[i], y[i]);
    });
  }

  static constexpr float log2e = block::decode_unit<Rows>::log2e;

  const fused_args& a_;
  const Variant& variant_;
  temp_storage& storage_;
  block::decode_unit<Rows>& unit_;
  block::unit_work<Rows, threads> work_;
  parts parts_;  ///< of the warps, where their tiles were
  stream stream_;
};

/// Grid: any number of blocks, which share the work; see policy::fused_blocks. BlocksPerSm is 1, or 2 where registers
/// allow it (policy::fused_blocks_are_paired): how a block is shaped. Where no block fits into the shared
/// memory the kernel is empty: the host knows that, too.
template <class Format, int Rows, warp::copy_engine Engine, class Variant, int SharedKib, int BlocksPerSm>
__global__ void __launch_bounds__(
    fused_shape<Format, Rows>(policy::resolved_shared_kib(SharedKib), BlocksPerSm).warps* detail::warp_threads,
    fused_shape<Format, Rows>(policy::resolved_shared_kib(SharedKib), BlocksPerSm).blocks_per_sm)
    fused_decode(const __grid_constant__ fused_args args, const __grid_constant__ Variant variant) {
  constexpr int shared_kib = policy::resolved_shared_kib(SharedKib);
  if constexpr (fused_shape<Format, Rows>(shared_kib, BlocksPerSm).fits()) {
    using block_type = fused_block<Format, Rows, Engine, Variant, shared_kib, BlocksPerSm>;
    detail::touch_parameters(args);
    __shared__ typename block_type::temp_storage storage;
    block_type(args, variant, storage, detail::dynamic_shared()).run();
  }
}

}  // namespace packkv::kernel
