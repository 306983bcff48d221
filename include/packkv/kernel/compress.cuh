// SPDX-License-Identifier: Apache-2.0
// Kernels that write and read whole tiles: compress and store_tiles (a block per tile), decompress (a warp per token),
// store_tokens (a warp per token).
#pragma once

#include <packkv/core/divisor.hpp>
#include <packkv/detail/report.cuh>
#include <packkv/warp/lone_token.cuh>

namespace packkv::kernel {

inline constexpr int compress_warps = 8;
inline constexpr int token_warps = 4;  ///< of a block of store_tokens_of_plans

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

// `spec` below is a constant where the codec is known at compile time: places in pages take few instructions then.
__device__ inline std::uint8_t* tile_address(side which, const codec_spec& spec, const pages_view& pages,
                                             std::int64_t page, int head, int slot) {
  return which == side::key ? key_tile(pages, spec, page, head, slot) : value_tile(pages, spec, page, head, slot);
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

/// A tile that compress has to code, and its tokens; tile is null if it has no page, or no tokens.
struct compress_place {
  std::uint8_t* tile = nullptr;
  std::int64_t b = 0, first = 0;
  int head = 0, count = 0;
};
/// Items are (sequence, head, tile index), the last one fastest.
__device__ inline compress_place compress_place_of(side which, const codec_spec& spec, const compress_args& a,
                                                   std::int64_t item, std::uint32_t& flags) {
  using namespace packkv::detail;
  const std::int64_t tiles = ceil_div(a.max_tokens, tile_tokens), index = item % tiles;
  compress_place at;
  at.b = item / tiles / a.pages.kv_heads;
  at.head = static_cast<int>(item / tiles % a.pages.kv_heads);
  at.first = index * tile_tokens;
  const std::int64_t length = clamp_length(a.lengths, at.b, a.max_tokens, flags);
  if (at.first >= length) return at;
  at.count = static_cast<int>(min_of<std::int64_t>(tile_tokens, length - at.first));
  const std::int32_t page = find_page(a.table, a.pages.num_pages, at.b, index / a.pages.tiles_per_page, flags);
  if (page >= 0)
    at.tile = tile_address(which, spec, a.pages, page, at.head, static_cast<int>(index % a.pages.tiles_per_page));
  return at;
}
__device__ inline std::int64_t compress_items(const compress_args& a) {
  return a.batch * a.pages.kv_heads * ceil_div(a.max_tokens, tile_tokens);
}

/// Codes every tile of one side. Grid: any number of blocks; a block takes whole tiles.
template <int HeadDim>
__global__ void __launch_bounds__(compress_warps * 32, 1)
    compress(const __grid_constant__ side_args s, const __grid_constant__ compress_args a,
             const __grid_constant__ input_view<4> in) {
  using namespace packkv::detail;
  __shared__ __align__(16) std::uint32_t words[HeadDim * tile_tokens / 4];  // the widest plan: 8 bits a channel
  std::uint32_t flags = 0, clamps = 0;
  for (std::int64_t item = blockIdx.x; item < compress_items(a); item += gridDim.x) {
    std::uint32_t table_flags = 0;
    const compress_place at = compress_place_of(s.which, s.spec, a, item, table_flags);
    if (at.tile != nullptr)  // the same for all threads of the block
      encode_tile<HeadDim>(
          s.spec, of_head(s.spec, s.parameters, at.head), at.count,
          [&](int t) { return address(in, at.b, at.head, at.first + t, 0); }, in.stride[3], in.type, at.tile, words,
          flags, clamps);
    if (threadIdx.x == 0) flags |= table_flags;
  }
  detail::add_report(a.report, flags, clamps);
}

/// Codes n tiles of one side from where their moves say that the tokens are. Grid: any number of blocks; a block takes
/// whole tiles of a head.
template <int HeadDim>
__global__ void __launch_bounds__(compress_warps * 32, 1)
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
        in.stride[3], in.type, tile_address(s.which, s.spec, pages, to.page, head, to.slot), words, flags, clamps);
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
      const std::uint8_t* tile =
          tile_address(s.which, s.spec, a.pages, page, head, static_cast<int>(index % a.pages.tiles_per_page));
      warp::decode_token<HeadDim>(s.spec, of_head(s.spec, s.parameters, head), tile, static_cast<int>(t % tile_tokens),
                                  sink);
    }
  }
  detail::add_report(a.report, lane_id() == 0 ? flags : 0u, 0);
}

/// Where a token is coded; tile is null if it is not.
struct token_place {
  std::uint8_t* tile;
  int slot;
};
__device__ inline token_place token_place_of(side which, const codec_spec& spec, const pages_view& pages,
                                             std::int64_t slot, int head, std::uint32_t& flags) {
  if (slot < 0) return {nullptr, 0};
  const detail::quotient page(slot / tile_tokens, pages.tiles_per_page);
  if (page.whole >= pages.num_pages) {
    if (detail::lane_id() == 0) flags |= report_page_out_of_range;
    return {nullptr, 0};
  }
  return {tile_address(which, spec, pages, page.whole, head, page.rest), static_cast<int>(slot % tile_tokens)};
}

/// Codes n single tokens of one side into live pages; a warp per (token, head).
template <int HeadDim>
__global__ void __launch_bounds__(compress_warps * 32)
    store_tokens(const __grid_constant__ side_args s, const __grid_constant__ pages_view pages,
                 const __grid_constant__ input_view<3> in, const std::int64_t* slots, device_report* report) {
  using namespace packkv::detail;
  std::uint32_t flags = 0, clamps = 0;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * compress_warps + warp_id();
       item < in.extent[0] * pages.kv_heads; item += static_cast<std::int64_t>(gridDim.x) * compress_warps) {
    const std::int64_t i = item / pages.kv_heads;
    const int head = static_cast<int>(item % pages.kv_heads);
    const token_place at = token_place_of(s.which, s.spec, pages, slots[i], head, flags);
    if (at.tile == nullptr) continue;
    const char* token = static_cast<const char*>(address(in, i, head, 0));
    warp::encode_token<HeadDim>(
        s.spec, of_head(s.spec, s.parameters, head),
        [&](int c) { return load_element(token + c * in.stride[2], in.type); }, at.slot, at.tile,
        warp::shared_words(at.tile), flags, clamps);
  }
  detail::add_report(report, flags, clamps);
}

/// A call of store_tokens for plans.
struct plan_tokens_args {
  side_parameters key, value;
  pages_view pages;
  input_view<3> keys, values;  ///< [n, kv_heads, channels]
  const std::int64_t* slots;
  device_report* report;
  divisor kv_heads, tiles_per_page;  ///< those of pages
  bool beside_previous;              ///< needs nothing of the kernel before, and waits for it at the end only
};

/// Codes one side of token `item / kv_heads` into a live page; by a warp.
template <class Codec>
__device__ inline void store_plan_token(const plan_tokens_args& a, const side_parameters& s, const input_view<3>& in,
                                        std::int32_t item) {
  using namespace packkv::detail;
  constexpr codec_spec spec = Codec::spec();
  const quotient token(item, a.pages.kv_heads);
  const std::int64_t slot = a.slots[token.whole];
  // The token is loaded before its slot is known.
  const char* channels = static_cast<const char*>(address(in, token.whole, token.rest, 0));
  const head_parameters parameters = of_head(spec, s, token.rest);
  float y[Codec::head_dim / 32];
  const bool finite = warp::to_coded_basis<Codec::head_dim>(
      spec, parameters,
      [&](int c) { return warp::element_of_bits(warp::load_bits(channels + c * in.stride[2], in.type), in.type); }, y);
  std::uint32_t flags = 0, clamps = 0;
  const token_place at = token_place_of(spec.strips.which, spec, a.pages, slot, token.rest, flags);
  if (at.tile != nullptr) warp::store_plan_token<Codec>(parameters, y, finite, at.slot, at.tile, flags, clamps);
  detail::add_report(a.report, flags, clamps);
}

/// The same out of line, for the tokens that warp::lone_token leaves.
template <class Codec>
#if !defined(PACKKV_SIMT_EXECUTOR)
__noinline__
#endif
    __device__ void
    store_other_token(const plan_tokens_args& a, const side_parameters& s, const input_view<3>& in, std::int32_t item) {
  store_plan_token<Codec>(a, s, in, item);
}
/// The same for codecs of which warp::has_lone_token holds; channels side by side, 8-byte aligned.
template <class Codec, bool BFloat>
__device__ inline void store_lone_token(const plan_tokens_args& a, const side_parameters& s, const input_view<3>& in,
                                        std::int32_t item) {
  using namespace packkv::detail;
  constexpr codec_spec spec = Codec::spec();
  const std::int32_t token = a.kv_heads.quotient(item), head = item - token * a.kv_heads.value;
  const std::int64_t slot = a.slots[token];
  // The token is loaded, and transformed, before its slot is known; its tile is on its way while it is coded.
  warp::lone_token<Codec, BFloat> coded(load8(static_cast<const char*>(address(in, token, head, 0)) + 8 * lane_id()));
  if (slot < 0) return;
  const auto tile = static_cast<std::uint64_t>(slot) / tile_tokens;
  if (tile <= 0x7fffffff) {
    const auto number = static_cast<std::int32_t>(tile), page = a.tiles_per_page.quotient(number);
    if (page < a.pages.num_pages) {
      coded.aim(static_cast<int>(slot % tile_tokens),
                tile_address(spec.strips.which, spec, a.pages, page, head, number - page * a.tiles_per_page.value));
      if (coded.code()) return coded.store();
    }
  }
  store_other_token<Codec>(a, s, in, item);
}

/// The warp's item of a kernel whose grid has keys where y = 0 and values where y = 1; negative: it has none.
__device__ inline std::int32_t begin_token(const plan_tokens_args& a) {
  detail::touch_parameters(a);
  if (!a.beside_previous) detail::wait_for_kernel_before();
  const auto item = static_cast<std::int32_t>(blockIdx.x * token_warps) + detail::warp_id();
  return item < a.keys.extent[0] * a.pages.kv_heads ? item : -1;
}

/// Its last line: whatever comes next waits for the kernel before, too.
__device__ inline void end_token(const plan_tokens_args& a) {
  if (a.beside_previous) detail::wait_for_kernel_before();
}

/// Codes n single tokens of both sides, whose codecs are plans; a warp for a token and a head, of which there are fewer
/// than 2^31.
template <class Format>
__global__ void __launch_bounds__(token_warps * 32) store_tokens_of_plans(const __grid_constant__ plan_tokens_args a) {
  const std::int32_t item = begin_token(a);
  if (item >= 0) {
    if (blockIdx.y == 0)
      store_plan_token<typename Format::key_codec_type>(a, a.key, a.keys, item);
    else
      store_plan_token<typename Format::value_codec_type>(a, a.value, a.values, item);
  }
  end_token(a);
}

/// The same for tokens that store_lone_token takes.
template <class Format, bool BFloat>
__global__ void __launch_bounds__(token_warps * 32) store_lone_tokens(const __grid_constant__ plan_tokens_args a) {
  const std::int32_t item = begin_token(a);
  if (item >= 0) {
    if (blockIdx.y == 0)
      store_lone_token<typename Format::key_codec_type, BFloat>(a, a.key, a.keys, item);
    else
      store_lone_token<typename Format::value_codec_type, BFloat>(a, a.value, a.values, item);
  }
  end_token(a);
}

}  // namespace packkv::kernel
