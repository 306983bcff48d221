// SPDX-License-Identifier: Apache-2.0
// Kernels that write and read whole tiles: compress and store_tiles (a block per tile), decompress (a warp per token),
// store_tokens (a warp per token).
#pragma once

#include <packkv/detail/report.cuh>
#include <packkv/warp/token_codec.cuh>

namespace packkv::kernel {

inline constexpr int compress_warps = 8;

/// One side of a cache, as these kernels see it.
struct side_args {
  side which;
  codec_spec spec;
  side_parameters parameters;
};

struct compress_args {
  pages_view pages;
  page_table table;
  const std::int32_t* lengths;
  std::int64_t batch;
  std::int32_t max_tokens;
  device_report* report;
};

__device__ inline std::uint8_t* tile_address(const side_args& s, const pages_view& pages, std::int64_t page, int head,
                                             int slot) {
  return s.which == side::key ? key_tile(pages, s.spec, page, head, slot) : value_tile(pages, s.spec, page, head, slot);
}

/// Codes a tile of one KV head from `count` tokens; token(t) is the address of the channels of its token t, which lie
/// `stride` bytes apart. Unused slots become zero bytes. By the whole block; `words` is shared memory.
template <int HeadDim, class Token>
__device__ inline void encode_tile(const codec_spec& spec, const head_parameters& parameters, int count, Token&& token,
                                   std::int64_t stride, dtype type, std::uint8_t* tile,
                                   std::uint32_t (&words)[HeadDim * tile_tokens / 4], std::uint32_t& flags,
                                   std::uint32_t& clamps) {
  using namespace packkv::detail;
  for (int w = static_cast<int>(threadIdx.x); w < spec.strips.words; w += compress_warps * 32) words[w] = 0;
  // What lies behind the code words here, element tiles token by token below.
  if (spec.has_codes())
    for (int i = spec.code_bytes() + 4 * static_cast<int>(threadIdx.x); i < spec.tile_bytes();
         i += 4 * compress_warps * 32)
      *reinterpret_cast<std::uint32_t*>(tile + i) = 0;
  __syncthreads();
  const auto channels_of = [&](int t) {
    const char* const channels = static_cast<const char*>(token(t));
    return [=](int c) { return load_element(channels + c * stride, type); };
  };
  const auto put_bits = [&](const code_write& w) { atomicOr(&words[w.word], w.bits); };
  if (spec.needs_tiles()) {
    for (int first = warp_id() * spec.group; first < count; first += compress_warps * spec.group)
      warp::encode_token_group<HeadDim>(
          spec, first, min_of<int>(spec.group, count - first),
          [&](int t, auto& y) { return warp::to_coded_basis<HeadDim>(spec, parameters, channels_of(t), y); }, tile,
          put_bits, flags);
  } else {
    for (int t = warp_id(); t < tile_tokens; t += compress_warps) {
      if (t < count) {
        warp::encode_token<HeadDim>(spec, parameters, channels_of(t), t, tile, put_bits, flags, clamps);
      } else if (!spec.has_codes()) {
        const int bytes = spec.tile_bytes() / tile_tokens;
        for (int i = 16 * lane_id(); i < bytes; i += 16 * warp_threads) store16(tile + t * bytes + i, bytes16{});
      }
    }
  }
  __syncthreads();
  for (int w = 4 * static_cast<int>(threadIdx.x); w < spec.strips.words; w += 4 * compress_warps * 32)
    store16(tile + 4 * w, bytes16{{words[w], words[w + 1], words[w + 2], words[w + 3]}});
  __syncthreads();
}

/// Codes every tile of one side. Grid: any number of blocks; a block takes whole tiles (sequence, head, tile index).
template <int HeadDim>
__global__ void __launch_bounds__(compress_warps * 32)
    compress(const __grid_constant__ side_args s, const __grid_constant__ compress_args a,
             const __grid_constant__ input_view<4> in) {
  using namespace packkv::detail;
  __shared__ __align__(16) std::uint32_t words[HeadDim * tile_tokens / 4];  // the widest plan: 8 bits a channel
  const std::int64_t tiles = ceil_div(a.max_tokens, tile_tokens);
  const std::int64_t items = a.batch * a.pages.kv_heads * tiles;
  std::uint32_t flags = 0, clamps = 0;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const std::int64_t index = item % tiles, b = item / tiles / a.pages.kv_heads;
    const int head = static_cast<int>(item / tiles % a.pages.kv_heads);
    std::uint32_t table_flags = 0;
    const std::int64_t length = clamp_length(a.lengths, b, a.max_tokens, table_flags);
    const std::int64_t first = index * tile_tokens;
    if (first < length) {  // the same for all threads of the block
      const std::int32_t page = find_page(a.table, a.pages.num_pages, b, index / a.pages.tiles_per_page, table_flags);
      if (page >= 0) {
        std::uint8_t* tile = tile_address(s, a.pages, page, head, static_cast<int>(index % a.pages.tiles_per_page));
        const int count = static_cast<int>(min_of<std::int64_t>(tile_tokens, length - first));
        encode_tile<HeadDim>(
            s.spec, of_head(s.spec, s.parameters, head), count,
            [&](int t) { return address(in, b, head, first + t, 0); }, in.stride[3], in.type, tile, words, flags,
            clamps);
      }
    }
    if (threadIdx.x == 0) flags |= table_flags;
  }
  detail::add_report(a.report, flags, clamps);
}

/// Codes n tiles of one side from where their moves say that the tokens are. Grid: any number of blocks; a block takes
/// whole tiles of a head.
template <int HeadDim>
__global__ void __launch_bounds__(compress_warps * 32)
    store_tiles(const __grid_constant__ side_args s, const __grid_constant__ pages_view pages,
                const __grid_constant__ input_view<4> in, const tile_move* moves, std::int64_t n,
                device_report* report) {
  using namespace packkv::detail;
  __shared__ __align__(16) std::uint32_t words[HeadDim * tile_tokens / 4];
  std::uint32_t flags = 0, clamps = 0;
  for (std::int64_t item = blockIdx.x; item < n * pages.kv_heads; item += gridDim.x) {
    const tile_move move = moves[item / pages.kv_heads];
    const int head = static_cast<int>(item % pages.kv_heads);
    const tile_place to = place_of(move, in, pages, flags);
    if (!to.valid) continue;  // the same for all threads of the block
    encode_tile<HeadDim>(
        s.spec, of_head(s.spec, s.parameters, head), tile_tokens,
        [&](int t) { return address(in, move.row, head, (std::int64_t{move.first} + t) % in.extent[2], 0); },
        in.stride[3], in.type, tile_address(s, pages, to.page, head, to.slot), words, flags, clamps);
  }
  detail::add_report(report, flags, clamps);
}

/// Reconstructs every token of one side; a warp per token.
template <int HeadDim>
__global__ void __launch_bounds__(compress_warps * 32)
    decompress(const __grid_constant__ side_args s, const __grid_constant__ compress_args a,
               const __grid_constant__ output_view<4> out) {
  using namespace packkv::detail;
  const std::int64_t items = a.batch * a.pages.kv_heads * a.max_tokens;
  std::uint32_t flags = 0;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * compress_warps + warp_id(); item < items;
       item += static_cast<std::int64_t>(gridDim.x) * compress_warps) {
    const std::int64_t t = item % a.max_tokens, b = item / a.max_tokens / a.pages.kv_heads;
    const int head = static_cast<int>(item / a.max_tokens % a.pages.kv_heads);
    if (t >= clamp_length(a.lengths, b, a.max_tokens, flags)) continue;
    const std::int64_t index = t / tile_tokens;
    const std::int32_t page = find_page(a.table, a.pages.num_pages, b, index / a.pages.tiles_per_page, flags);
    char* token = static_cast<char*>(address(out, b, head, t, 0));
    const auto sink = [&](int c, float x) { store_element(token + c * out.stride[3], out.type, x); };
    if (page < 0) {
      for (int i = 0; i < HeadDim / 32; ++i) sink(lane_id() + 32 * i, nan_float());
    } else {
      const std::uint8_t* tile = tile_address(s, a.pages, page, head, static_cast<int>(index % a.pages.tiles_per_page));
      warp::decode_token<HeadDim>(s.spec, of_head(s.spec, s.parameters, head), tile, static_cast<int>(t % tile_tokens),
                                  sink);
    }
  }
  detail::add_report(a.report, lane_id() == 0 ? flags : 0u, 0);
}

/// Codes n single tokens of one side into live pages; a warp per (token, head).
template <int HeadDim>
__global__ void __launch_bounds__(compress_warps * 32)
    store_tokens(const __grid_constant__ side_args s, const __grid_constant__ pages_view pages,
                 const __grid_constant__ input_view<3> in, const std::int64_t* slots, device_report* report) {
  using namespace packkv::detail;
  const std::int64_t items = in.extent[0] * pages.kv_heads;
  const std::int64_t page_tokens = static_cast<std::int64_t>(pages.tiles_per_page) * tile_tokens;
  std::uint32_t flags = 0, clamps = 0;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * compress_warps + warp_id(); item < items;
       item += static_cast<std::int64_t>(gridDim.x) * compress_warps) {
    const std::int64_t i = item / pages.kv_heads, slot = slots[i];
    const int head = static_cast<int>(item % pages.kv_heads);
    if (slot < 0) continue;
    if (slot / page_tokens >= pages.num_pages) {
      if (lane_id() == 0) flags |= report_page_out_of_range;
      continue;
    }
    std::uint8_t* tile =
        tile_address(s, pages, slot / page_tokens, head, static_cast<int>(slot % page_tokens / tile_tokens));
    std::uint32_t* words = reinterpret_cast<std::uint32_t*>(tile);
    const char* token = static_cast<const char*>(address(in, i, head, 0));
    // Neighbouring tokens share words, so both halves of and-then-or are atomic; each bit has one owner.
    warp::encode_token<HeadDim>(
        s.spec, of_head(s.spec, s.parameters, head),
        [&](int c) { return load_element(token + c * in.stride[2], in.type); }, static_cast<int>(slot % tile_tokens),
        tile,
        [&](const code_write& w) {
          if (w.bits != w.mask) atomicAnd(&words[w.word], ~(w.mask & ~w.bits));
          if (w.bits != 0) atomicOr(&words[w.word], w.bits);
        },
        flags, clamps);
  }
  detail::add_report(report, flags, clamps);
}

}  // namespace packkv::kernel
