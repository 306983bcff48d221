// SPDX-License-Identifier: Apache-2.0
// Tokens of the `grouped` formats, by warps: reading coded ones, and bringing elements into the basis that is coded.
//   grouped_source source{spec, layout, bytes, tail};   // a token source, see token_source.cuh
#pragma once

#include <packkv/codec/grouped_checks.hpp>
#include <packkv/warp/element.cuh>
#include <packkv/warp/token_source.cuh>
#include <packkv/warp/transform.cuh>

namespace packkv::warp {

/// x = T^-1 y + mean of head `head`, in place: the last step of decoding a token.
template <int HeadDim>
__device__ inline void to_original_basis(const grouped_spec& spec, const std::uint8_t* bytes, int head,
                                         float (&x)[HeadDim / 32]) {
  if (spec.transform == transform_kind::hadamard) hadamard<HeadDim>(x);
  if (!spec.centred) return;
  for (int i = 0; i < HeadDim / 32; ++i)
    x[i] = detail::add_rn(
        x[i], half_to_float(stored_half(bytes, 2 * (std::int64_t{head} * HeadDim + detail::lane_id() + 32 * i))));
}

/// y = T (x - mean) of a token of x [heads, tokens, HeadDim]; whether all elements are finite, in every lane.
template <int HeadDim>
__device__ inline bool to_coded_basis(const grouped_spec& spec, const std::uint8_t* bytes, const input_view<3>& x,
                                      std::int64_t head, std::int64_t token, float (&y)[HeadDim / 32]) {
  using namespace packkv::detail;
  bool finite = true;
  load_transformed<HeadDim>(
      spec.transform, {},
      [&](int c) {
        const float e = load_element(address(x, head, token, c), x.type);
        finite = finite && is_finite(e);
        return spec.centred ? sub_rn(e, half_to_float(stored_half(bytes, 2 * (head * HeadDim + c)))) : e;
      },
      y);
  return __all_sync(all_lanes, finite) != 0;
}

/// One side of one sequence.
struct grouped_source {
  grouped_spec spec;
  grouped_layout layout;
  const std::uint8_t* bytes;
  input_view<4> tail;

  PACKKV_HOST_DEVICE std::int64_t coded_tokens() const { return layout.coded_tokens; }

  /// Loads the tokens of a tile, see token_source.cuh.
  template <int HeadDim>
  class reader {
   public:
    __device__ reader(const grouped_source& source, std::int64_t, int head, std::int64_t tile, std::uint32_t&)
        : source_(source),
          head_(head),
          first_(static_cast<int>(tile % source.spec.tiles_per_block()) * tile_tokens),
          block_(source.bytes + source.layout.blocks_offset +
                 tile / source.spec.tiles_per_block() * source.spec.block_bytes(source.layout.heads)),
          words_(reinterpret_cast<const std::uint32_t*>(
              block_ + grouped_tile_offset(source.spec, head, first_ / tile_tokens))) {}

    __device__ void load(int slot, float (&x)[HeadDim / 32]) const {
      using namespace packkv::detail;
      const grouped_spec& format = source_.spec;
      for (int i = 0; i < HeadDim / 32; ++i) {
        const int c = lane_id() + 32 * i;
        const group_place at = locate_group(format, source_.layout.heads, head_, first_ + slot, c);
        const group_values g = values_of(
            format,
            {stored_half(block_, at.first), format.has_minima() ? stored_half(block_, at.minimum) : std::uint16_t{0}});
        x[i] = decode_in(format, g, read_code(words_, locate(format.strips, slot, c)));
      }
      to_original_basis<HeadDim>(format, source_.bytes, head_, x);
    }

   private:
    const grouped_source& source_;
    int head_, first_;
    const std::uint8_t* block_;
    const std::uint32_t* words_;
  };
};

/// Checks a view and makes the source that kernels of this head dim read.
inline status make_source(const grouped_view& view, int head_dim, grouped_source& source) {
  grouped_layout layout;
  if (const status s = detail::check_grouped_view(view, layout); !s) return s;
  if (const status s = detail::check_head_dim(view.spec, head_dim); !s) return s;
  source = {view.spec, layout, view.bytes,
            make_input<4>(view.bytes + layout.tail_offset, view.tail_type,
                          {1, view.heads, view.tokens - layout.coded_tokens, head_dim})};
  return {};
}

}  // namespace packkv::warp
