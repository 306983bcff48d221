// SPDX-License-Identifier: Apache-2.0
// compress, store_tiles and decompress for codecs that warp::tile_encoder serves: a warp per tile.
#pragma once

#include <packkv/kernel/compress.cuh>
#include <packkv/policy/fused_compress.hpp>
#include <packkv/warp/tile_decoder.cuh>
#include <packkv/warp/tile_encoder.cuh>
#include <packkv/warp/tile_ring.cuh>

namespace packkv::kernel {

/// Whether a codec is that of keys, whose kernel of a call comes first.
template <class Codec>
inline constexpr bool is_key = Codec::spec().strips.which == side::key;

/// Codes every tile of one side, whose channels lie side by side, 8-byte aligned. Grid: any number of blocks.
template <class Codec, bool BFloat>
__global__ void __launch_bounds__(policy::encoder_warps * 32, policy::encoder_blocks)
    fused_compress(const __grid_constant__ compress_args a, const __grid_constant__ input_view<4> in) {
  using namespace packkv::detail;
  using encoder_type = warp::tile_encoder<Codec, BFloat>;
  constexpr codec_spec spec = Codec::spec();
  begin_one_of_two<is_key<Codec>>();
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
  end_one_of_two<is_key<Codec>>();
}

/// Codes n tiles of one side from where their moves say that the tokens are; otherwise as above.
template <class Codec, bool BFloat>
__global__ void __launch_bounds__(policy::encoder_warps * 32, policy::encoder_blocks)
    fused_store_tiles(const __grid_constant__ pages_view pages, const __grid_constant__ input_view<4> in,
                      const tile_move* moves, std::int64_t n, device_report* report) {
  using namespace packkv::detail;
  using encoder_type = warp::tile_encoder<Codec, BFloat>;
  constexpr codec_spec spec = Codec::spec();
  begin_one_of_two<is_key<Codec>>();
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
  end_one_of_two<is_key<Codec>>();
}

/// What a warp of fused_decompress has in shared memory: the tile that it reconstructs, and the next one.
template <class Codec, bool BFloat>
struct decompress_storage {
  static constexpr int tile_bytes = Codec::spec().tile_bytes();
  using decoder = warp::tile_decoder<Codec, BFloat>;
  using ring_type = warp::tile_ring<2, warp::resolved(warp::copy_engine::best)>;
  typename decoder::temp_storage rows;
  alignas(16) std::uint8_t tiles[2 * tile_bytes];
  typename ring_type::temp_storage ring;
};
/// Warps of a block of fused_decompress.
template <class Codec>
inline constexpr int decompress_warps =
    policy::decoder_warps(static_cast<int>(sizeof(decompress_storage<Codec, false>)));
/// Its dynamic shared memory.
template <class Codec>
inline constexpr int decompress_bytes =
    decompress_warps<Codec>* static_cast<int>(sizeof(decompress_storage<Codec, false>));
/// Blocks of it that an SM holds.
template <class Codec>
inline constexpr int decompress_blocks = policy::decoder_blocks(warp::tile_decoder<Codec, false>::together,
                                                                decompress_bytes<Codec>);

/// A tile to reconstruct, null without a page; where its first token goes; its tokens.
struct decompress_place {
  const std::uint8_t* tile = nullptr;
  char* row = nullptr;
  int count = 0;

  /// What this is in lane `lane`. All lanes take part.
  __device__ decompress_place of_lane(int lane) const {
    using detail::shuffle;
    return {reinterpret_cast<const std::uint8_t*>(shuffle(reinterpret_cast<std::uintptr_t>(tile), lane)),
            reinterpret_cast<char*>(shuffle(reinterpret_cast<std::uintptr_t>(row), lane)), shuffle(count, lane)};
  }
};

/// Reconstructs every tile of one side into channels side by side, 8-byte aligned; tokens without a page become NaN.
/// Grid: any number of blocks, of which the first have a tile more for each warp where tiles do not go round. Dynamic
/// shared memory: a decompress_storage for each warp.
template <class Codec, bool BFloat>
__global__ void __launch_bounds__(decompress_warps<Codec> * 32, decompress_blocks<Codec>)
    fused_decompress(const __grid_constant__ compress_args a, const __grid_constant__ output_view<4> out) {
  using namespace packkv::detail;
  using storage_type = decompress_storage<Codec, BFloat>;
  constexpr codec_spec spec = Codec::spec();
  begin_one_of_two<is_key<Codec>>();
  storage_type& storage = reinterpret_cast<storage_type*>(dynamic_shared())[warp_id()];
  typename storage_type::ring_type ring(storage.ring, storage.tiles, storage_type::tile_bytes);
  const std::int64_t stride = out.stride[2];
  const bool wide = ((reinterpret_cast<std::uintptr_t>(out.data) | out.stride[0] | out.stride[1] | stride) & 8) == 0;
  const std::int64_t items = compress_items(a);
  const quotient share(ceil_div<std::int64_t>(items, decompress_warps<Codec>), static_cast<std::int32_t>(gridDim.x));
  const std::int64_t first_round = share.whole * blockIdx.x + min_of<std::int64_t>(blockIdx.x, share.rest),
                     rounds = share.whole + (static_cast<int>(blockIdx.x) < share.rest ? 1 : 0);
  std::uint32_t flags = 0;
  decompress_place ahead, now;  // of a round to come, each lane its own; of the round before, requested there
#pragma unroll 1
  for (std::int64_t round = 0; round <= rounds; ++round) {
    const int lane = static_cast<int>(static_cast<std::uint32_t>(round) % warp_threads);
    if (lane == 0) {
      const std::int64_t item = (first_round + round + lane_id()) * decompress_warps<Codec> + warp_id();
      compress_place at;
      if (round + lane_id() < rounds && item < items) at = compress_place_of(spec.strips.which, spec, a, item, flags);
      ahead = {at.tile, static_cast<char*>(address(out, at.b, at.head, at.first, 0)), at.count};
    }
    decompress_place next = ahead.of_lane(lane);
    if (next.tile != nullptr) {
      ring.request({next.tile, storage_type::tile_bytes});
    } else {
      for (int t = 0; t < next.count; ++t)
        for (int c = lane_id(); c < Codec::head_dim; c += warp_threads)
          store_element(next.row + t * stride + 2 * c, out.type, nan_float());
      next.count = 0;
    }
    const std::uint8_t* const tile = now.count > 0 ? ring.wait() : nullptr;
#pragma unroll 1
    for (int first = 0; first < now.count; first += warp_threads) {
      storage_type::decoder::decode(storage.rows, tile, first + lane_id());
      __syncwarp();
      storage_type::decoder::store(storage.rows, now.count - first, now.row + first * stride, stride, wide);
      __syncwarp();
    }
    if (now.count > 0) ring.release();
    now = next;
  }
  detail::add_report(a.report, flags, 0);
  end_one_of_two<is_key<Codec>>();
}

}  // namespace packkv::kernel
