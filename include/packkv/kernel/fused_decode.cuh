// SPDX-License-Identifier: Apache-2.0
// Decode attention on codes with matrix instructions: one pass over the compressed K and V of a batch.
// One idea: the items of work (a tile of a sequence, KV head and up to 16 query rows; and the 16-bit tokens of it) are
// shared evenly among blocks whatever the lengths; what a block has of a unit meets the rest in global memory.
#pragma once

#include <packkv/block/decode_unit.cuh>
#include <packkv/block/part_merge.cuh>
#include <packkv/block/work_split.cuh>
#include <packkv/policy/fused_decode.hpp>
#include <packkv/warp/lazy_softmax.cuh>
#include <packkv/warp/mma_key_scores.cuh>
#include <packkv/warp/raw_attention.cuh>
#include <packkv/warp/tile_stream.cuh>

namespace packkv::kernel {

struct fused_args {
  block::decode_call call;
  side_parameters key, value;
  std::int32_t first_sequence, sequences;  ///< of this launch
  std::int32_t raw_items;                  ///< what the 16-bit tokens of a unit cost, in tiles
  float* parts;                            ///< [blocks][3][part_floats]
  std::uint32_t* counters;                 ///< [blocks], zero between launches
  device_report* report;
};

/// What a block needs in shared memory whatever its shape.
template <class Format, int Rows>
struct fused_storage {
  /// The blocks that share a unit: those with its first and its last tile, and that with its 16-bit tokens.
  struct owners {
    int first, last, tail;
  };
  typename warp::mma_key_scores<typename Format::key_codec_type, Rows>::temp_storage queries;
  block::sequence_items items;
  block::decode_unit<Rows> unit;
  std::int32_t unit_begin, unit_end;  ///< items
  owners owner;
  int tiles;               ///< of the unit
  int lo, hi;              ///< tiles of the unit that are this block's
  bool coded, tail, last;  ///< the block has a part of the coded tokens; has the 16-bit tokens
};

/// How a block is built for SMs that have so much shared memory, and 1 or 2 blocks an SM if there is a choice.
template <class Format, int Rows>
PACKKV_HOST_DEVICE constexpr policy::fused_block_shape fused_shape(int shared_kib, int blocks_per_sm) {
  return policy::make_fused_shape(Format::key_tile_bytes + Format::value_tile_bytes, Rows, Format::value_head_dim,
                                  static_cast<int>(sizeof(fused_storage<Format, Rows>)) + 1024, shared_kib,
                                  blocks_per_sm);
}
/// Most blocks of a launch: their factors fit where the tiles were.
template <int Rows>
constexpr int max_fused_blocks(const policy::fused_block_shape& shape) {
  return block::max_parts(shape.warps * shape.warp_bytes / 4, shape.warps * detail::warp_threads, Rows);
}

template <class Format, int Rows, warp::copy_engine Engine, class Variant, int SharedKib, int BlocksPerSm>
class fused_block {
 public:
  static constexpr int key_dim = Format::key_head_dim, value_dim = Format::value_head_dim;
  using scores = warp::mma_key_scores<typename Format::key_codec_type, Rows>;
  using values = warp::mma_value_sum<typename Format::value_codec_type, Rows>;
  using owners = typename fused_storage<Format, Rows>::owners;
  static constexpr auto shape = fused_shape<Format, Rows>(SharedKib, BlocksPerSm);
  static constexpr int warps = shape.warps, threads = warps * detail::warp_threads;
  using softmax = warp::lazy_softmax<values, Rows>;
  using stream = warp::tile_stream<Format, shape.stages, Engine>;
  using merge = block::part_merge<value_dim, Rows, warps>;
  static constexpr int lane_rows = scores::lane_rows;
  static constexpr int warp_bytes = shape.warp_bytes;
  static_assert(warp_bytes >= stream::buffer_bytes && warp_bytes >= merge::part_floats * 4 &&
                    shape.shared_bytes == warps * warp_bytes + 2 * merge::part_floats * 4,
                "the policy knows what the kernel needs");
  static_assert(max_fused_blocks<Rows>(shape) >= policy::fused_blocks(shape), "all blocks' parts can be joined");

  struct temp_storage : fused_storage<Format, Rows> {
    typename stream::temp_storage stream_of[warps];
  };
  static_assert(sizeof(temp_storage) <= sizeof(fused_storage<Format, Rows>) + 1024,
                "the policy knows what the kernel needs");

  __device__ fused_block(const fused_args& args, const Variant& variant, temp_storage& storage, std::uint8_t* dynamic)
      : a_(args),
        variant_(variant),
        storage_(storage),
        unit_(storage.unit),
        parts_(reinterpret_cast<float*>(dynamic)),
        coded_(reinterpret_cast<float*>(dynamic + warps * warp_bytes)),
        raw_(coded_ + merge::part_floats),
        stream_(storage.stream_of[detail::warp_id()], dynamic + detail::warp_id() * warp_bytes) {}

  __device__ void run() {
    detail::wait_for_kernel_before();
    std::int32_t next = 0;
    bool taken = a_.sequences == 1;
    if (taken ? !take_of_one() : !split(next)) return;
    for (; taken || take(next); taken = false) {
      if (storage_.coded) {
        attend();
      } else {
        find_owners();
        __syncthreads();
      }
      if (storage_.coded || storage_.tail) {
        finish();
        detail::fence_async_copies();  // the ring takes tiles again
      }
      next = storage_.unit_end;
      __syncthreads();
    }
  }

 private:
  __device__ static int here() { return static_cast<int>(blockIdx.x); }

  /// Finds the block's first unit and its part of it in a launch of one sequence; false if there is none. No thread
  /// waits for another to work out the split.
  __device__ bool take_of_one() {
    std::uint32_t flags = 0;
    const block::decode_sequence s(a_.call, a_.first_sequence, Rows, flags);
    if (threadIdx.x == 0) detail::add_report(a_.report, flags, 0);
    const block::sequence_cost cost = s.cost(a_.call, a_.raw_items);
    const block::sequence_items::split split =
        storage_.items.build_one(cost, static_cast<std::int32_t>(gridDim.x), threadIdx.x == 0);
    if (here() >= split.shares.blocks()) return false;
    set(s, 0, split.units.items_of(cost), split.shares.begin(here()), split.shares.begin(here() + 1));
    return true;
  }
  /// Works out the split of any launch; `first` is the block's first item. False if it has none.
  __device__ bool split(std::int32_t& first) {
    storage_.items.template build<threads>(a_.sequences, static_cast<std::int32_t>(gridDim.x), [&](int index) {
      std::uint32_t flags = 0;
      const block::decode_sequence s(a_.call, a_.first_sequence + index, Rows, flags);
      detail::add_report(a_.report, flags, 0);
      return s.cost(a_.call, a_.raw_items);
    });
    __syncthreads();
    const block::even_shares shares = storage_.items.shares;
    first = shares.begin(here());
    return here() < shares.blocks();
  }
  /// Finds the unit that has this item, and the block's part of it; false if the item is not the block's.
  __device__ bool take(std::int32_t item) {
    const std::int32_t end = storage_.items.shares.begin(here() + 1);
    if (item >= end) return false;
    const int index = storage_.items.owner(a_.sequences, item);
    std::uint32_t known = 0;  // and reported
    const block::decode_sequence s(a_.call, a_.first_sequence + index, Rows, known);
    set(s, storage_.items.begin[index], storage_.items.units.items_of(storage_.items.cost[index]), item, end);
    return true;
  }
  /// Sets the unit to that with `item` of a sequence whose units have `items` each, the first from `begin` on. The
  /// block's items end at `end`.
  __device__ void set(const block::decode_sequence& s, std::int32_t begin, std::int32_t items, std::int32_t item,
                      std::int32_t end) {
    const std::int32_t number = block::quotient(item - begin, items).whole;
    unit_.set(a_.call, s, number);
    if (threadIdx.x == (threads > 64 ? 64 : 0)) {  // the first warps set the unit
      const std::int32_t unit_begin = begin + number * items, unit_end = unit_begin + items;
      const int lo = min_of(item - unit_begin, s.tiles), hi = min_of(min_of(end, unit_end) - unit_begin, s.tiles);
      const bool tail = unit_end <= end;
      storage_.unit_begin = unit_begin;
      storage_.unit_end = unit_end;
      storage_.tiles = s.tiles;
      storage_.lo = s.first_tile + lo;
      storage_.hi = s.first_tile + hi;
      storage_.coded = lo < hi || (tail && s.tiles == 0);  // somebody stores what is empty
      storage_.tail = tail;
    }
    __syncthreads();
  }
  /// Needed at the end only, and divisions are slow: one thread does it while others wait. A barrier must follow.
  __device__ void find_owners() {
    if (threadIdx.x != threads - 1) return;
    const block::even_shares shares = storage_.items.shares;
    const std::int32_t begin = storage_.unit_begin;
    const int tiles = storage_.tiles;
    owners o;
    o.tail = storage_.tail ? here() : shares.owner(storage_.unit_end - 1);
    o.first = tiles == 0 ? o.tail : shares.owner(begin);
    o.last = tiles == 0 ? o.tail : shares.owner(begin + tiles - 1);
    storage_.owner = o;
  }

  /// Attends to the unit's coded tiles; every warp leaves its part in parts_.
  __device__ void attend() {
    using namespace packkv::detail;
    const bool shaped = a_.call.options.soft_cap > 0.0f || Variant::active;
    // The queries first: behind all blocks' first tiles they would wait for microseconds.
    std::uint16_t query[key_dim / 32] = {};  // of the warp's first row
    typename scores::head_values own = {};
    if (warp_id() < Rows || scores::has_basis)
      own = scores::head_values::load(of_head(Format::key(), a_.key, unit_.head));
    if (warp_id() < Rows) unit_.load_query(a_.call, warp_id(), own.channel, query);
    const block::row_ranges ranges = unit_.ranges();
    const int first_tile = max_of(storage_.lo, ranges.any.begin / tile_tokens);
    const int end_tile = min_of(storage_.hi, ceil_div(ranges.any.end, tile_tokens));
    if (storage_.tail && unit_.has_raw())
      unit_.raw.template prefetch<key_dim, value_dim>(static_cast<int>(threadIdx.x), threads);
    stream_.open(a_.call.cache, a_.report, unit_.b, unit_.head, first_tile + warp_id(), end_tile, warps);
    find_owners();
    scores::prepare(
        storage_.queries, own,
        [&](int r, const auto& index, auto& x) {
          if (r == warp_id())
            unit_.convert_query(a_.call, r, query, x);
          else
            unit_.load_query(a_.call, r, index, x);
        },
        a_.call.options.softmax_scale * (shaped ? 1.0f : log2e), warp_id(), warps);
    __syncthreads();

    const scores keys(storage_.queries);
    softmax weights;
    values sum;
    int tile;
    const std::uint8_t *key_data, *value_data;
    while (stream_.next(tile, key_data, value_data)) {
      float s[warp::tokens_per_lane][lane_rows];
      keys.compute(key_data, s);
      const int first = tile * tile_tokens;
      if (shaped)
        for_constants<warp::tokens_per_lane>([&](auto index) {
          constexpr int k = decltype(index)::value;
          for (int i = 0; i < lane_rows; ++i)
            s[k][i] = unit_.shape(a_.call, variant_, s[k][i], scores::columns::row(i), first + 8 * k + lane_id() / 4);
        });
      const auto rows = warp::load_rows(value_data + values::code_bytes);
      warp::value_operand<Rows> p;
      std::uint32_t hidden = 0;
      if (first < ranges.all.begin || first + tile_tokens > ranges.all.end)
        for (int k = 0; k < warp::tokens_per_lane; ++k)
          for (int i = 0; i < lane_rows; ++i)
            if (!unit_.sees(scores::columns::row(i), first + 8 * k + lane_id() / 4))
              hidden |= 1u << (lane_rows * k + i);
      weights.weigh(s, rows, hidden, sum, p);
      sum.add(value_data, p);
      stream_.release();
    }
    store_part(weights, sum);
    __syncthreads();
  }

  static constexpr int part_stride = warp_bytes / 4;
  __device__ float* my_part() const { return parts_ + detail::warp_id() * part_stride; }

  /// Attends to sinks and ring, into `to`, a part. The ring of tiles is empty.
  __device__ void attend_raw(float* to) {
    using raw_attention = warp::raw_attention<key_dim, value_dim, Rows>;
    const block::raw_tokens& tokens = unit_.raw;
    const int chunks = tokens.chunks(raw_attention::tokens);
    const int busy = min_of(max_of(chunks, 1), warps);  // an empty part, if there are none
    __syncthreads();
    if (detail::warp_id() < busy) {
      raw_attention part(my_part(), merge::row_floats);
#pragma unroll 1
      for (int c = detail::warp_id(); c < chunks; c += warps) {
        int first;
        const warp::raw_chunk chunk = tokens.chunk(c, raw_attention::tokens, first);
        part.add(
            chunk, a_.call.queries.type, [&](int row) { return unit_.where(a_.call, min_of(row, Rows - 1)); },
            [&](int row) {
              return row < unit_.rows ? tokens.seen(unit_.view, first, unit_.position[row]) : warp::raw_range{0, 0};
            },
            [&](int i, int row, float dot) {
              return unit_.shape(a_.call, variant_, dot * a_.call.options.softmax_scale, row, first + i);
            });
      }
      part.finish(merge::maximum_at, merge::sum_at);
    }
    __syncthreads();
    merge::join_warps(parts_, part_stride, busy, to);
  }

  __device__ void store_part(const softmax& weights, const values& sum) {
    float maximum[lane_rows], total[lane_rows], zero[lane_rows];
    weights.finish(maximum, total, zero);
    float* const to = my_part();
    const float unit = weights.row_unit();
    sum.each(zero, [&](int row, int channel, float x) { to[row * merge::row_floats + channel] = x * unit; });
    if (detail::lane_id() < 4)
      for (int i = 0; i < lane_rows; ++i) {
        float* const row = to + scores::columns::row(i) * merge::row_floats;
        row[merge::maximum_at] = maximum[i];
        row[merge::sum_at] = total[i];
      }
  }

  enum part_kind { begun_before, begun_here, raw_part };
  __device__ float* part_of(int block, part_kind kind) const {
    return a_.parts + (static_cast<std::int64_t>(block) * 3 + kind) * merge::part_floats;
  }

  /// Joins the warps' parts and writes the unit's rows, or leaves them to the last of its blocks.
  __device__ void finish() {
    // Needed last; they arrive meanwhile.
    const auto own = values::head_values::load(of_head(Format::value(), a_.value, unit_.head));
    const owners o = storage_.owner;
    bool raw = storage_.tail && unit_.has_raw();
    const bool alone = o.first == o.tail, coded = here() >= o.first && here() <= o.last;
    if (coded)
      merge::join_warps(parts_, part_stride, warps,
                        alone ? coded_ : part_of(here(), here() == o.first ? begun_here : begun_before));
    if (raw) attend_raw(alone ? raw_ : part_of(here(), raw_part));
    __syncthreads();
    if (!alone) {
      const auto others = static_cast<unsigned>(o.last - o.first + (o.tail > o.last ? 1 : 0));
      if (!block::last_to_arrive(a_.counters + o.first, others, storage_.last)) return;
      raw = unit_.has_raw();
      merge::join_blocks(
          o.last - o.first + 1, [&](int p) { return part_of(o.first + p, p == 0 ? begun_here : begun_before); },
          [&](int thread, int count) {
            if (raw) merge::copy_fresh(part_of(o.tail, raw_part), raw_, thread, count);
          },
          parts_, coded_);
      __syncthreads();
    }
    write(raw, own);
  }
  /// Moves coded rows into the original basis, adds the 16-bit tokens, and stores output and log-sum-exp.
  __device__ void write(bool raw, const typename values::head_values& own) {
    using namespace packkv::detail;
    for (int r = warp_id(); r < unit_.rows; r += warps) {
      auto row = merge::read_row(coded_, r);
      float* const scratch = coded_ + r * merge::row_floats;
      __syncwarp();
      values::finish(own, row.channel, row.sum, [&](int c, float x) { scratch[c] = x; });
      __syncwarp();
      for (int i = 0; i < value_dim / 32; ++i) row.channel[i] = scratch[lane_id() + 32 * i];
      if (raw) row.join(merge::read_row(raw_, r));
      unit_.write(a_.call, r, row);
    }
  }

  static constexpr float log2e = block::decode_unit<Rows>::log2e;

  const fused_args& a_;
  const Variant& variant_;
  temp_storage& storage_;
  block::decode_unit<Rows>& unit_;
  float *parts_, *coded_, *raw_;  ///< of the warps, where their tiles were; joined
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
