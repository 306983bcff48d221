// SPDX-License-Identifier: Apache-2.0
// compress, store_tiles and decompress for codecs that warp::tile_encoder serves: a warp per tile.
#pragma once

#include <packkv/kernel/compress.cuh>
#include <packkv/policy/fused_compress.hpp>
#include <packkv/warp/tile_decoder.cuh>
#include <packkv/warp/tile_encoder.cuh>

namespace packkv::kernel {

/// Codes every tile of one side, whose channels lie side by side, 8-byte aligned. Grid: any number of blocks.
template <class Codec, bool BFloat>
__global__ void __launch_bounds__(policy::encoder_warps * 32, policy::encoder_blocks)
    fused_compress(const __grid_constant__ compress_args a, const __grid_constant__ input_view<4> in) {
  using namespace packkv::detail;
  using encoder_type = warp::tile_encoder<Codec, BFloat>;
  constexpr codec_spec spec = Codec::spec();
  __shared__ typename encoder_type::temp_storage storage[policy::encoder_warps];
  encoder_type encoder(storage[warp_id()]);
  std::uint32_t flags = 0;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * policy::encoder_warps + warp_id();
       item < compress_items(a); item += static_cast<std::int64_t>(gridDim.x) * policy::encoder_warps) {
    std::uint32_t table_flags = 0;
    const compress_place at = compress_place_of(spec.strips.which, spec, a, item, table_flags);
    if (lane_id() == 0) flags |= table_flags;
    if (at.tile == nullptr) continue;  // the same for all lanes
    const auto data = static_cast<const char*>(address(in, at.b, at.head, at.first, 0));
    encoder.encode(encoder_type::make_tokens(at.count, [&](int t) { return data + t * in.stride[2]; }), at.tile, flags);
  }
  encoder.finish(flags);
  detail::add_report(a.report, flags, 0);
}

/// Codes n tiles of one side from where their moves say that the tokens are; otherwise as above.
template <class Codec, bool BFloat>
__global__ void __launch_bounds__(policy::encoder_warps * 32, policy::encoder_blocks)
    fused_store_tiles(const __grid_constant__ pages_view pages, const __grid_constant__ input_view<4> in,
                      const tile_move* moves, std::int64_t n, device_report* report) {
  using namespace packkv::detail;
  using encoder_type = warp::tile_encoder<Codec, BFloat>;
  constexpr codec_spec spec = Codec::spec();
  __shared__ typename encoder_type::temp_storage storage[policy::encoder_warps];
  encoder_type encoder(storage[warp_id()]);
  std::uint32_t flags = 0;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * policy::encoder_warps + warp_id();
       item < n * pages.kv_heads; item += static_cast<std::int64_t>(gridDim.x) * policy::encoder_warps) {
    const quotient number(item, pages.kv_heads);
    const tile_move move = moves[number.whole];
    const int head = number.rest;
    std::uint32_t move_flags = 0;
    const tile_place to = place_of(move, in, pages, move_flags);
    if (lane_id() == 0) flags |= move_flags;
    if (!to.valid) continue;  // the same for all lanes
    const auto row = static_cast<const char*>(address(in, move.row, head, 0, 0));
    const auto at = [&](int t) {
      const std::int64_t slot = std::int64_t{move.first} + t;  // at least a tile fits
      return row + (slot < in.extent[2] ? slot : slot - in.extent[2]) * in.stride[2];
    };
    encoder.encode(encoder_type::make_tokens(tile_tokens, at),
                   tile_address(spec.strips.which, spec, pages, to.page, head, to.slot), flags);
  }
  encoder.finish(flags);
  detail::add_report(report, flags, 0);
}

/// Reconstructs every tile of one side into channels side by side, 8-byte aligned; tokens without a page become NaN.
/// Grid: any number of blocks.
template <class Codec, bool BFloat>
__global__ void __launch_bounds__(policy::decoder_warps * 32)
    fused_decompress(const __grid_constant__ compress_args a, const __grid_constant__ output_view<4> out) {
  using namespace packkv::detail;
  constexpr codec_spec spec = Codec::spec();
  std::uint32_t flags = 0;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * policy::decoder_warps + warp_id();
       item < compress_items(a); item += static_cast<std::int64_t>(gridDim.x) * policy::decoder_warps) {
    std::uint32_t table_flags = 0;
    const compress_place at = compress_place_of(spec.strips.which, spec, a, item, table_flags);
    if (lane_id() == 0) flags |= table_flags;
    const auto row = static_cast<char*>(address(out, at.b, at.head, at.first, 0));
    if (at.tile != nullptr)
      warp::tile_decoder<Codec, BFloat>::decode(at.tile, at.count, [&](int t) { return row + t * out.stride[2]; });
    else
      for (int t = 0; t < at.count; ++t)
        for (int c = lane_id(); c < Codec::head_dim; c += warp_threads)
          store_element(row + t * out.stride[2] + 2 * c, out.type, nan_float());
  }
  detail::add_report(a.report, flags, 0);
}

}  // namespace packkv::kernel
