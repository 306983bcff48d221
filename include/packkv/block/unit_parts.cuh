// SPDX-License-Identifier: Apache-2.0
// What the blocks of a unit of decode attention have of it: parts of their warps in shared memory, of blocks in global
// memory, and the 16-bit tokens beside them.
//   unit_parts<KeyDim, ValueDim, Rows, Warps, Stride> parts(global, counters, of_warps, coded, raw);
//   ... each warp fills parts.of_warp() ...   const auto raw = [&](float* to) { parts.attend_raw(unit, call, f, to); };
//   if (parts.join(work, last, raw, has_raw)) parts.write(unit, call, has_raw, finish);
#pragma once

#include <packkv/block/part_merge.cuh>
#include <packkv/block/unit_work.cuh>
#include <packkv/warp/raw_attention.cuh>

namespace packkv::block {

/// Stride: floats between the parts of two warps.
template <int KeyDim, int ValueDim, int Rows, int Warps, int Stride>
class unit_parts {
 public:
  using merge = part_merge<ValueDim, Rows, Warps>;

  /// `global`: [blocks][3][part_floats]; `counters`: [blocks], zero between launches; `of_warps`, `coded` and `raw`:
  /// shared memory of Warps parts, and of one part each.
  __device__ unit_parts(float* global, std::uint32_t* counters, float* of_warps, float* coded, float* raw)
      : global_(global), counters_(counters), of_warps_(of_warps), coded_(coded), raw_(raw) {}

  __device__ float* of_warp() const { return of_warps_ + detail::warp_id() * Stride; }

  /// Joins the warps' parts, and lets attend_raw(to) leave the part of the 16-bit tokens if they are this block's. True
  /// in the block that has all of the unit then, which is the last of its blocks: `coded` holds it, and `raw` the 16-bit
  /// tokens if `has_raw`. `last` lies in shared memory. By the whole block.
  template <class AttendRaw>
  __device__ bool join(const work_storage<Rows>& work, bool& last, AttendRaw&& attend_raw, bool& has_raw) const {
    const unit_owners o = work.owner;
    const int here = static_cast<int>(blockIdx.x);
    has_raw = work.tail && work.unit.has_raw();
    const bool alone = o.first == o.tail, coded = here >= o.first && here <= o.last;
    if (coded)
      merge::join_warps(of_warps_, Stride, Warps,
                        alone ? coded_ : part_of(here, here == o.first ? begun_here : begun_before));
    if (has_raw) attend_raw(alone ? raw_ : part_of(here, raw_part));
    __syncthreads();
    if (alone) return true;
    const auto others = static_cast<unsigned>(o.last - o.first + (o.tail > o.last ? 1 : 0));
    if (!last_to_arrive(counters_ + o.first, others, last)) return false;
    has_raw = work.unit.has_raw();
    merge::join_blocks(
        o.last - o.first + 1, [&](int p) { return part_of(o.first + p, p == 0 ? begun_here : begun_before); },
        [&](int thread, int count) {
          if (has_raw) merge::copy_fresh(part_of(o.tail, raw_part), raw_, thread, count);
        },
        of_warps_, coded_);
    __syncthreads();
    return true;
  }

  /// Attends to sinks and ring, into `to`, a part. By the whole block, whose rings of tiles are empty.
  template <class Variant>
  __device__ void attend_raw(const decode_unit<Rows>& unit, const decode_call& call, const Variant& variant,
                             float* to) const {
    using raw_attention = warp::raw_attention<KeyDim, ValueDim, Rows>;
    const raw_tokens& tokens = unit.raw;
    const int chunks = tokens.chunks(raw_attention::tokens);
    const int busy = min_of(max_of(chunks, 1), Warps);  // an empty part, if there are none
    __syncthreads();
    if (detail::warp_id() < busy) {
      raw_attention part(of_warp(), merge::row_floats);
#pragma unroll 1
      for (int c = detail::warp_id(); c < chunks; c += Warps) {
        int first;
        const warp::raw_chunk chunk = tokens.chunk(c, raw_attention::tokens, first);
        part.add(
            chunk, call.queries.type, [&](int row) { return unit.where(call, min_of(row, Rows - 1)); },
            [&](int row) {
              return row < unit.rows ? tokens.seen(unit.view, first, unit.position[row]) : warp::raw_range{0, 0};
            },
            [&](int i, int row, float dot) {
              return unit.shape(call, variant, dot * call.options.softmax_scale, row, first + i);
            });
      }
      part.finish(merge::maximum_at, merge::sum_at);
    }
    __syncthreads();
    merge::join_warps(of_warps_, Stride, busy, to);
  }

  /// Stores output and log-sum-exp of a unit that this block has: finish(y, weight, sink) moves a coded row into the
  /// original basis, the 16-bit tokens are there already.
  template <class Finish>
  __device__ void write(const decode_unit<Rows>& unit, const decode_call& call, bool has_raw, Finish&& finish) const {
    using namespace packkv::detail;
    for (int r = warp_id(); r < unit.rows; r += Warps) {
      auto row = merge::read_row(coded_, r);
      float* const scratch = coded_ + r * merge::row_floats;
      __syncwarp();
      finish(row.channel, row.sum, [&](int c, float x) { scratch[c] = x; });
      __syncwarp();
      for (int i = 0; i < ValueDim / 32; ++i) row.channel[i] = scratch[lane_id() + 32 * i];
      if (has_raw) row.join(merge::read_row(raw_, r));
      unit.write(call, r, row);
    }
  }

 private:
  enum part_kind { begun_before, begun_here, raw_part };
  __device__ float* part_of(int block, part_kind kind) const {
    return global_ + (static_cast<std::int64_t>(block) * 3 + kind) * merge::part_floats;
  }

  float* global_;
  std::uint32_t* counters_;
  float *of_warps_, *coded_, *raw_;
};

}  // namespace packkv::block
