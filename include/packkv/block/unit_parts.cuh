// SPDX-License-Identifier: Apache-2.0
// What the blocks of a unit of decode attention have of it: parts of their warps in shared memory, of blocks in global
// memory, and the 16-bit tokens beside them.
//   unit_parts<KeyDim, ValueDim, Rows, Warps, Stride, RawWarps> parts(global, counters, of_warps, joined);
//   if (work.tail && unit.has_raw()) parts.attend_raw(work, call, variant);   ... each warp: parts.store(its sum) ...
//   __syncthreads();   if (parts.hand_in(work, last)) parts.write(work, call, finish);
#pragma once

#include <packkv/block/part_merge.cuh>
#include <packkv/block/unit_work.cuh>
#include <packkv/warp/raw_attention.cuh>

namespace packkv::block {

/// Stride: floats between the parts of two warps. RawWarps: those that attend to 16-bit tokens while others have tiles.
template <int KeyDim, int ValueDim, int Rows, int Warps, int Stride, int RawWarps>
class unit_parts {
 public:
  using merge = part_merge<ValueDim, Rows, Warps>;
  using raw_attention = warp::raw_attention<KeyDim, ValueDim, Rows>;
  /// Floats of `joined` shared memory.
  static constexpr int joined_floats = (2 + (RawWarps > 1 ? RawWarps : 0)) * merge::part_floats;

  /// `global`: [blocks][3][part_floats]; `counters`: [blocks], zero between launches; `of_warps` and `joined`: shared
  /// memory of Warps parts, and of joined_floats.
  __device__ unit_parts(float* global, std::uint32_t* counters, float* of_warps, float* joined)
      : global_(global),
        counters_(counters),
        of_warps_(of_warps),
        coded_(joined),
        raw_(joined + merge::part_floats),
        raw_of_warps_(RawWarps > 1 ? joined + 2 * merge::part_floats : raw_) {}

  /// Stores the part that a warp has of the unit's coded tokens; sum: a warp::value_output.
  template <class Output>
  __device__ void store(const Output& sum) const {
    using columns = typename decode_unit<Rows>::columns;
    float maximum[columns::lane_rows], total[columns::lane_rows];
    float* const to = of_warps_ + detail::warp_id() * Stride;
    sum.finish(maximum, total, [&](int row, int channel, float x) { to[row * merge::row_floats + channel] = x; });
    if (detail::lane_id() < columns::lanes_apart)
      for (int i = 0; i < columns::lane_rows; ++i) {
        float* const row = to + columns::row(i) * merge::row_floats;
        row[merge::maximum_at] = maximum[i];
        row[merge::sum_at] = total[i];
      }
  }

  /// The first row that a warp prepares and stores, if there is such a row; the next ones are Warps further. The last
  /// warps have rows, since the first have the tiles where those are few, and ask for the unit's last block.
  __device__ static int first_row() { return Warps - 1 - detail::warp_id(); }

  /// Warps that attend to the 16-bit tokens of a unit which has some.
  __device__ static int raw_warps(const work_storage<Rows>& work) {
    const int chunks = work.unit.raw.chunks(raw_attention::tokens);
    return min_of(max_of(chunks, 1), work.coded ? RawWarps : Warps);  // an empty part, if none is seen
  }
  /// Attends to sinks and ring. By the first raw_warps() warps, each on its own; the others return at once.
  template <class Variant>
  __device__ void attend_raw(const work_storage<Rows>& work, const decode_call& call, const Variant& variant) const {
    const int step = raw_warps(work);
    if (detail::warp_id() >= step) return;
    const decode_unit<Rows>& unit = work.unit;
    const raw_tokens& tokens = unit.raw;
    const int chunks = tokens.chunks(raw_attention::tokens);
    raw_attention part(raw_of_warps(work) + detail::warp_id() * raw_stride(work), merge::row_floats);
#pragma unroll 1
    for (int c = detail::warp_id(); c < chunks; c += step) {
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

  /// Joins the warps' parts, of codes and of 16-bit tokens, and leaves them to the last of the unit's blocks, in which
  /// this is true. `last` lies in shared memory. Warps but the first call meanwhile() while that is asked for. By the
  /// whole block, here and below, after a barrier.
  template <class Meanwhile>
  __device__ bool hand_in(const work_storage<Rows>& work, bool& last, Meanwhile&& meanwhile) const {
    const unit_owners o = work.owner;
    const int here = work.block;
    if (here >= o.first && here <= o.last)
      merge::join_warps(of_warps_, Stride, Warps,
                        o.alone() ? coded_ : part_of(here, here == o.first ? begun_here : begun_before));
    if (work.tail && work.unit.has_raw() && !(o.alone() && raw_of_warps(work) == raw_))
      merge::join_warps(raw_of_warps(work), raw_stride(work), raw_warps(work),
                        o.alone() ? raw_ : part_of(here, raw_part));
    if (!o.alone())
      ask_for_last(counters_ + o.first, static_cast<unsigned>(o.last - o.first + (o.tail > o.last ? 1 : 0)), last);
    meanwhile();
    __syncthreads();
    return o.alone() || last;
  }
  /// Joins the parts of the unit's blocks and stores its output and log-sum-exp, in the block where hand_in() was true:
  /// finish(y, weight, sink) moves a coded row into the original basis, in which the 16-bit tokens are already. `to`:
  /// where the warp's first row goes.
  template <class Finish>
  __device__ void write(const work_storage<Rows>& work, const decode_call& call, char* to, Finish&& finish) const {
    using namespace packkv::detail;
    const unit_owners o = work.owner;
    const bool has_raw = work.unit.has_raw();
    const auto raw_row = [&](int r) {
      return o.alone() ? merge::read_row(raw_, r) : merge::read_fresh_row(part_of(o.tail, raw_part), r);
    };
    warp::attention_row<ValueDim> of_raw;  // of the next row; on its way while parts are joined
    if (has_raw && first_row() < Rows) of_raw = raw_row(first_row());
    if (!o.alone()) {
      merge::join_blocks(o.last - o.first + 1, part_of(o.first, begun_here), part_of(o.first, begun_before),
                         kinds * merge::part_floats, coded_);
      __syncthreads();
    }
    for (int r = first_row(); r < work.unit.rows; r += Warps) {
      auto row = merge::read_row(coded_, r);
      float* const scratch = coded_ + r * merge::row_floats;
      __syncwarp();
      finish(row.channel, row.sum, [&](int c, float x) { scratch[c] = x; });
      __syncwarp();
      for (int i = 0; i < ValueDim / 32; ++i) row.channel[i] = scratch[lane_id() + 32 * i];
      if (has_raw) {
        row.join(of_raw);
        if constexpr (Rows > Warps) of_raw = raw_row(min_of(r + Warps, Rows - 1));
      }
      work.unit.write(call, r, row, to);
      if constexpr (Rows > Warps) to = work.unit.out_of(call, min_of(r + Warps, Rows - 1));
    }
  }

 private:
  enum part_kind { begun_before, begun_here, raw_part, kinds };
  static_assert(std::int64_t{max_parts} * kinds * merge::part_floats < 0x7fffffff, "parts are addressed in 32 bits");
  __device__ float* part_of(int block, part_kind kind) const {
    return global_ + (block * kinds + kind) * merge::part_floats;
  }

  /// Where warps leave their parts of the 16-bit tokens: where a block has no tiles, there.
  __device__ float* raw_of_warps(const work_storage<Rows>& work) const {
    return work.coded ? raw_of_warps_ : of_warps_;
  }
  __device__ static int raw_stride(const work_storage<Rows>& work) { return work.coded ? merge::part_floats : Stride; }

  float* global_;
  std::uint32_t* counters_;
  float *of_warps_, *coded_, *raw_, *raw_of_warps_;
};

}  // namespace packkv::block
