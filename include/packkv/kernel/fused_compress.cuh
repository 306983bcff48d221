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

/// A tile that a warp codes or reconstructs, null for none, the row of its tokens, and a number of the kernel's.
template <class Tile, class Row>
struct coder_place {
  Tile* tile = nullptr;
  Row* row = nullptr;
  int number = 0;

  /// What this is in lane `lane`. All lanes take part.
  __device__ coder_place of_lane(int lane) const {
    using detail::shuffle;
    return {reinterpret_cast<Tile*>(shuffle(reinterpret_cast<std::uintptr_t>(tile), lane)),
            reinterpret_cast<Row*>(shuffle(reinterpret_cast<std::uintptr_t>(row), lane)), shuffle(number, lane)};
  }
};

/// What a warp that codes tiles has in shared memory.
template <class Codec, bool BFloat>
struct encode_storage {
  typename warp::tile_encoder<Codec, BFloat>::temp_storage encoder;
  coder_place<std::uint8_t, const char> place[detail::warp_threads + 1];  ///< of the round before, and of 32 rounds
  std::int64_t item;                                                      ///< behind these
};

/// Codes `items` tiles: place_of(item, flags) says where one goes and where its tokens are, tokens_of(place) which they
/// are. A lane each works out places of 32 rounds. Dynamic shared memory: an encode_storage for each warp.
template <class Codec, bool BFloat, class PlaceOf, class TokensOf>
__device__ void encode_tiles(std::int64_t items, device_report* report, PlaceOf&& place_of, TokensOf&& tokens_of) {
  using namespace packkv::detail;
  using place_type = coder_place<std::uint8_t, const char>;
  using storage_type = encode_storage<Codec, BFloat>;
  storage_type& storage = reinterpret_cast<storage_type*>(dynamic_shared())[warp_id()];
  place_type* const place = storage.place;
  if (lane_id() == 0) {
    place[warp_threads] = {};
    storage.item = static_cast<std::int64_t>(blockIdx.x) * policy::encoder_warps + warp_id();
  }
  std::uint32_t flags = 0;
  int i = warp_threads - 1, rounds = 0;  // of these 32; what a warp knows of all rounds it need not have in registers
  warp::tile_encoder<Codec, BFloat> encoder(storage.encoder);
#pragma unroll 1
  do {
#pragma unroll 1
    do {
      i = (i + 1) % warp_threads;
      __syncwarp();
      if (i == 0) {
        const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * policy::encoder_warps;
        const std::int64_t own = storage.item + lane_id() * step;
        const place_type &last = place[warp_threads], before = {last.tile, last.row, last.number};
        __syncwarp();
        rounds = __popc(__ballot_sync(all_lanes, own < items));
        place[1 + lane_id()] = own < items ? place_of(own, flags) : place_type{};
        if (lane_id() == 0) {
          place[0] = before;
          storage.item = own + warp_threads * step;
        }
        __syncwarp();
      }
      const auto tokens = [&](int n) { return tokens_of(place[i + n]); };
      if (place[i].tile != nullptr)
        encoder.encode(tokens, place[i].tile);
      else
        encoder.begin(tokens);
    } while (i < rounds && !encoder.full());
    encoder.finish(flags);
  } while (i < rounds);
  detail::add_report(report, flags, 0);
}

/// Codes every tile of one side, whose channels lie side by side, 8-byte aligned. Grid: any number of blocks.
template <class Codec, bool BFloat>
__global__ void __launch_bounds__(policy::encoder_warps * 32, policy::encoder_blocks)
    fused_compress(const __grid_constant__ compress_args a, const __grid_constant__ input_view<4> in) {
  using encoder_type = warp::tile_encoder<Codec, BFloat>;
  using place_type = coder_place<std::uint8_t, const char>;
  constexpr codec_spec spec = Codec::spec();
  detail::begin_one_of_two<is_key<Codec>>();
  encode_tiles<Codec, BFloat>(
      compress_items(a), a.report,
      [&](std::int64_t item, std::uint32_t& flags) {
        const compress_place at = compress_place_of(spec.strips.which, spec, a, item, flags);
        const auto row = static_cast<const char*>(detail::address(in, at.b, at.head, at.first, 0));
        return place_type{at.tile, row, at.tile != nullptr ? at.count : 0};
      },
      [&](const place_type& at) {
        return encoder_type::make_tokens(at.number,
                                         [&in, &at](int t) { return detail::away(at.row, t * in.stride[2]); });
      });
  detail::end_one_of_two<is_key<Codec>>();
}

/// Codes n tiles of one side from where their moves say that the tokens are; otherwise as above.
template <class Codec, bool BFloat>
__global__ void __launch_bounds__(policy::encoder_warps * 32, policy::encoder_blocks)
    fused_store_tiles(const __grid_constant__ pages_view pages, const __grid_constant__ input_view<4> in,
                      const tile_move* moves, std::int64_t n, device_report* report) {
  using encoder_type = warp::tile_encoder<Codec, BFloat>;
  using place_type = coder_place<std::uint8_t, const char>;
  constexpr codec_spec spec = Codec::spec();
  detail::begin_one_of_two<is_key<Codec>>();
  encode_tiles<Codec, BFloat>(
      n * pages.kv_heads, report,
      [&](std::int64_t item, std::uint32_t& flags) {
        const detail::quotient number(item, pages.kv_heads);
        const tile_move move = moves[number.whole];
        const detail::tile_place to = detail::place_of(move, in, pages, flags);
        if (!to.valid) return place_type{};
        return place_type{tile_address(spec.strips.which, spec, pages, to.page, number.rest, to.slot),
                          static_cast<const char*>(detail::address(in, move.row, number.rest, 0, 0)), move.first};
      },
      [&](const place_type& at) {
        const int count = at.tile != nullptr ? tile_tokens : 0;
        return encoder_type::make_tokens(count, [&in, &at](int t) {
          const std::int64_t slot = std::int64_t{at.number} + t;  // at least a tile fits
          return detail::away(at.row, (slot < in.extent[2] ? slot : slot - in.extent[2]) * in.stride[2]);
        });
      });
  detail::end_one_of_two<is_key<Codec>>();
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
  // Of a round to come, each lane its own; of the round before, requested there. Tiles are null without a page, numbers
  // are tokens.
  coder_place<const std::uint8_t, char> ahead, now;
#pragma unroll 1
  for (std::int64_t round = 0; round <= rounds; ++round) {
    const int lane = static_cast<int>(static_cast<std::uint32_t>(round) % warp_threads);
    if (lane == 0) {
      const std::int64_t item = (first_round + round + lane_id()) * decompress_warps<Codec> + warp_id();
      compress_place at;
      if (round + lane_id() < rounds && item < items) at = compress_place_of(spec.strips.which, spec, a, item, flags);
      ahead = {at.tile, static_cast<char*>(address(out, at.b, at.head, at.first, 0)), at.count};
    }
    auto next = ahead.of_lane(lane);
    if (next.tile != nullptr) {
      ring.request({next.tile, storage_type::tile_bytes});
    } else {
      for (int t = 0; t < next.number; ++t)
        for (int c = lane_id(); c < Codec::head_dim; c += warp_threads)
          store_element(next.row + t * stride + 2 * c, out.type, nan_float());
      next.number = 0;
    }
    const std::uint8_t* const tile = now.number > 0 ? ring.wait() : nullptr;
#pragma unroll 1
    for (int first = 0; first < now.number; first += warp_threads) {
      storage_type::decoder::decode(storage.rows, tile, first + lane_id());
      __syncwarp();
      storage_type::decoder::store(storage.rows, now.number - first, now.row + first * stride, stride, wide);
      __syncwarp();
    }
    if (now.number > 0) ring.release();
    now = next;
  }
  detail::add_report(a.report, flags, 0);
  end_one_of_two<is_key<Codec>>();
}

}  // namespace packkv::kernel
