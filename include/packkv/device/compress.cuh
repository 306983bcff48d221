// SPDX-License-Identifier: Apache-2.0
// Device-wide compress, decompress, store_tokens and store_tiles. Definitions: reference/compress.hpp; same bytes.
//   status s = packkv::compress(keys, values, lengths, params, pages, table, exec{stream});
#pragma once

#include <packkv/codec/checks.hpp>
#include <packkv/device/exec.cuh>
#include <packkv/kernel/fused_compress.cuh>

namespace packkv {

namespace detail {

template <class Format>
kernel::side_args key_side(const parameters<Format>& p) {
  return {side::key, p.format.key(), p.key};
}
template <class Format>
kernel::side_args value_side(const parameters<Format>& p) {
  return {side::value, p.format.value(), p.value};
}

template <class Format>
kernel::compress_args make_compress_args(const std::int64_t (&extent)[4], const std::int32_t* lengths,
                                         const pages_view& pages, const page_table& table, const exec& e) {
  return {pages, table, lengths, extent[0], static_cast<std::int32_t>(extent[2]), e.report};
}

/// Codec of one side of a format; void where it is known at run time only.
template <class Format, side Which, class = void>
struct static_codec {
  using type = void;
};
template <class Format, side Which>
struct static_codec<Format, Which, std::void_t<typename Format::key_codec_type>> {
  using type =
      std::conditional_t<Which == side::key, typename Format::key_codec_type, typename Format::value_codec_type>;
};

/// Whether both codecs of a format are plans that are known at compile time.
template <class Format, class = void>
inline constexpr bool has_plans = false;
template <class Format>
inline constexpr bool has_plans<Format, std::void_t<typename Format::key_codec_type>> =
    Format::key().kind == codec_kind::plan&& Format::value().kind == codec_kind::plan;

/// Whether warp::tile_encoder and tile_decoder serve a codec with these parameters and tensors.
template <class Codec, class Data, int Rank>
bool encoder_serves([[maybe_unused]] const side_parameters& p, [[maybe_unused]] const tensor_view<Data, Rank>& in) {
  if constexpr (warp::has_tile_encoder<Codec>) {
    bool aligned = reinterpret_cast<std::uintptr_t>(in.data) % 8 == 0 && in.stride[Rank - 1] == 2;
    for (int i = 0; i < Rank - 1; ++i) aligned = aligned && in.stride[i] % 8 == 0;
    return aligned && p.column_scale == nullptr && p.channel_offset == nullptr;
  } else {
    return false;
  }
}

/// The kernel that stores such tokens of plans, faster where warp::lone_token serves both sides.
template <class Format>
auto kernel_of_tokens(const kernel::plan_tokens_args& a) -> void (*)(kernel::plan_tokens_args) {
  using key_type = typename Format::key_codec_type;
  using value_type = typename Format::value_codec_type;
  if constexpr (warp::has_lone_token<key_type> && warp::has_lone_token<value_type>)
    if (encoder_serves<key_type>(a.key, a.keys) && encoder_serves<value_type>(a.value, a.values) &&
        a.keys.type == a.values.type)
      return a.keys.type == dtype::bfloat16 ? kernel::store_lone_tokens<Format, true>
                                            : kernel::store_lone_tokens<Format, false>;
  return kernel::store_tokens_of_plans<Format>;
}

/// Launches the kernel of keys, or that of values beside its last blocks.
template <class Codec, class... Parameter>
status launch_side(void (*kernel)(Parameter...), std::int64_t blocks, block_size block, cudaStream_t stream,
                   Parameter... parameter) {
  return kernel::is_key<Codec> ? launch(kernel, grid_for(blocks), block, stream, parameter...)
                               : launch_early(kernel, grid_for(blocks), block, stream, parameter...);
}

/// Blocks of a launch that codes so many tiles.
inline std::int64_t encoder_grid(std::int64_t tiles) {
  return policy::coder_grid(tiles, policy::encoder_warps, policy::encoder_blocks, policy::encoder_tiles);
}

/// The block of a kernel that codes one side, with as much shared memory as that of the other side has: an SM holds
/// blocks of both kernels only where it is divided alike for them (4 bits, one sequence of 4,096 tokens: 0.021 ms for
/// 0.038; H200, 2026-11-30).
template <class Codec, class Other>
block_size encoder_block() {
  int bytes = static_cast<int>(sizeof(kernel::encode_storage<Codec, false>));
  if constexpr (warp::has_tile_encoder<Other>)
    bytes = max_of(bytes, static_cast<int>(sizeof(kernel::encode_storage<Other, false>)));
  return {policy::encoder_warps * 32, policy::encoder_warps * bytes};
}

template <int HeadDim, class Codec, class Other>
status compress_side(const kernel::side_args& s, const kernel::compress_args& a, const input_view<4>& in,
                     std::int64_t tiles, cudaStream_t stream) {
  if constexpr (warp::has_tile_encoder<Codec>)
    if (encoder_serves<Codec>(s.parameters, in))
      return launch_side<Codec>(
          in.type == dtype::bfloat16 ? kernel::fused_compress<Codec, true> : kernel::fused_compress<Codec, false>,
          encoder_grid(tiles), encoder_block<Codec, Other>(), stream, a, in);
  return launch(kernel::compress<HeadDim>, grid_for(tiles), kernel::compress_warps * 32, stream, s, a, in);
}

template <int HeadDim, class Codec>
status decompress_side(const kernel::side_args& s, const kernel::compress_args& a, const output_view<4>& out,
                       std::int64_t tiles, std::int64_t tokens, cudaStream_t stream) {
  if constexpr (warp::has_tile_encoder<Codec>)
    if (encoder_serves<Codec>(s.parameters, out) && out.type != dtype::float32)
      return launch_side<Codec>(
          out.type == dtype::bfloat16 ? kernel::fused_decompress<Codec, true> : kernel::fused_decompress<Codec, false>,
          policy::decoder_grid(tiles, kernel::decompress_warps<Codec>, kernel::decompress_blocks<Codec>),
          {kernel::decompress_warps<Codec> * 32, kernel::decompress_bytes<Codec>}, stream, a, out);
  return launch(kernel::decompress<HeadDim>, grid_for(ceil_div<std::int64_t>(tokens, kernel::compress_warps)),
                kernel::compress_warps * 32, stream, s, a, out);
}

template <int HeadDim, class Codec, class Other>
status store_tiles_of_side(const kernel::side_args& s, const pages_view& pages, const input_view<4>& in,
                           const tile_move* moves, std::int64_t n, const exec& e) {
  const std::int64_t tiles = n * pages.kv_heads;
  if constexpr (warp::has_tile_encoder<Codec>)
    if (encoder_serves<Codec>(s.parameters, in))
      return launch_side<Codec>(
          in.type == dtype::bfloat16 ? kernel::fused_store_tiles<Codec, true> : kernel::fused_store_tiles<Codec, false>,
          encoder_grid(tiles), encoder_block<Codec, Other>(), e.stream, pages, in, moves, n, e.report);
  return launch(kernel::store_tiles<HeadDim>, grid_for(tiles), kernel::compress_warps * 32, e.stream, s, pages, in,
                moves, n, e.report);
}

}  // namespace detail

/// Codes whole sequences from their token 0 on, in stream order. Fast where warp::has_tile_encoder holds for the codec,
/// no calibrated steps or offsets are given, and channels lie side by side with all strides and the address multiples
/// of 8; otherwise by a general kernel. The bytes are the same.
/// \param keys,values device memory [batch, kv_heads, tokens, D_k / D_v], float16 or bfloat16, any strides (bytes).
/// \param lengths device int32 [batch] or null (all `tokens`); values outside 0..tokens are clamped and reported.
/// \param pages, table where the tiles go; unused slots of a sequence's last tile become zero bytes; tiles
///        whose page id is invalid are skipped and reported.
/// \return not ok, with nothing launched, for shapes, strides or parameters that do not fit. Uses no workspace.
template <class Format>
status compress(const input_view<4>& keys, const input_view<4>& values, const std::int32_t* lengths,
                const parameters<Format>& params, const pages_view& pages, const page_table& table, const exec& e) {
  if (const status s = detail::check_kv(params, pages, keys, values); !s) return s;
  if (const status s = detail::check_encoder(params); !s) return s;
  if (const status s = detail::check_table(table, static_cast<std::int32_t>(keys.extent[0])); !s) return s;
  const auto args = detail::make_compress_args<Format>(keys.extent, lengths, pages, table, e);
  const std::int64_t tiles = ceil_div<std::int64_t>(keys.extent[2], tile_tokens);
  const checked items = checked(keys.extent[0]) * keys.extent[1] * tiles;
  if (!items.valid()) return refuse(status_code::overflow, "more tiles than 63 bits can count");
  if (items.value() == 0) return {};
  using keys_of = typename detail::static_codec<Format, side::key>::type;
  using values_of = typename detail::static_codec<Format, side::value>::type;
  if (const status s = detail::compress_side<Format::key_head_dim, keys_of, values_of>(detail::key_side(params), args,
                                                                                       keys, items.value(), e.stream);
      !s)
    return s;
  return detail::compress_side<Format::value_head_dim, values_of, keys_of>(detail::value_side(params), args, values,
                                                                           items.value(), e.stream);
}

/// Reconstructs whole sequences into float16, bfloat16 tensors of the shapes that compress takes. Tokens at or past a
/// sequence's length are left as they were; tokens whose page is missing become NaN and are reported. Fast for the same
/// as compress. Uses no workspace.
template <class Format>
status decompress(const pages_view& pages, const page_table& table, const std::int32_t* lengths,
                  const parameters<Format>& params, const output_view<4>& keys, const output_view<4>& values,
                  const exec& e) {
  if (const status s = detail::check_kv(params, pages, keys, values); !s) return s;
  if (const status s = detail::check_table(table, static_cast<std::int32_t>(keys.extent[0])); !s) return s;
  const auto args = detail::make_compress_args<Format>(keys.extent, lengths, pages, table, e);
  const checked items = checked(keys.extent[0]) * keys.extent[1] * keys.extent[2];
  if (!items.valid()) return refuse(status_code::overflow, "more tokens than 63 bits can count");
  if (items.value() == 0) return {};
  const std::int64_t tiles = keys.extent[0] * keys.extent[1] * ceil_div<std::int64_t>(keys.extent[2], tile_tokens);
  using keys_of = typename detail::static_codec<Format, side::key>::type;
  using values_of = typename detail::static_codec<Format, side::value>::type;
  if (const status s = detail::decompress_side<Format::key_head_dim, keys_of>(detail::key_side(params), args, keys,
                                                                              tiles, items.value(), e.stream);
      !s)
    return s;
  return detail::decompress_side<Format::value_head_dim, values_of>(detail::value_side(params), args, values, tiles,
                                                                    items.value(), e.stream);
}

/// Codes n single tokens into their slots, in stream order; capturable in a graph. On sm_90 and later, for plans known
/// at compile time, it is launched with programmatic stream serialization, and lets a kernel behind it that is launched
/// so, as decode_attention is, begin while it ends.
/// Fast for plans known at compile time; faster for those and the tensors of which compress says so, where both
/// head dims are 128 and both tensors of one type.
/// \param keys,values device memory [n, kv_heads, D_k / D_v], float16 or bfloat16, any strides (bytes).
/// \param slots device int64 [n]: page * page_tokens + token in page; negative = skip; distinct where not negative.
///        Pages may be uninitialised, tokens may come in any order, old tokens are overwritten; bits of other
///        tokens are untouched. Slots beyond the pages are skipped and reported. Uses no workspace.
/// \remark May run beside calls that read other tokens of the same pages, as decode_attention does whose ring has the
///         new tokens, which leaves less of this call's time to wait for: in another stream, or right behind such a
///         call with exec::beside_previous.
/// \return unsupported for keys that are grouped along tokens: code their tiles with store_tiles when they are full;
///         overflow for 2^31 tokens x KV heads or (nearly) as many.
template <class Format>
status store_tokens(const input_view<3>& keys, const input_view<3>& values, const std::int64_t* slots,
                    const parameters<Format>& params, const pages_view& pages, const exec& e) {
  if (const status s = detail::check_kv(params, pages, keys, values); !s) return s;
  if (const status s = detail::check_token_encoder(params); !s) return s;
  if (slots == nullptr && keys.extent[0] > 0) return refuse(status_code::invalid_argument, "slots is null");
  const checked items = checked(keys.extent[0]) * keys.extent[1];
  if (!items.valid() || items.value() > 0x7fffffff - kernel::token_warps)
    return refuse(status_code::overflow, "more tokens of heads than 31 bits can count: cut the call into smaller ones");
  if (items.value() == 0) return {};
  if constexpr (detail::has_plans<Format>) {
    const kernel::plan_tokens_args args{params.key,
                                        params.value,
                                        pages,
                                        keys,
                                        values,
                                        slots,
                                        e.report,
                                        divisor(pages.kv_heads),
                                        divisor(pages.tiles_per_page),
                                        e.beside_previous};
    dim3 grid = detail::grid_for(ceil_div<std::int64_t>(items.value(), kernel::token_warps));
    grid.y = 2;
    return detail::launch_early(detail::kernel_of_tokens<Format>(args), grid, kernel::token_warps * 32, e.stream, args);
  } else {
    const auto key = detail::key_side(params), value = detail::value_side(params);
    const dim3 grid = detail::grid_for(ceil_div<std::int64_t>(items.value(), kernel::compress_warps));
    constexpr int threads = kernel::compress_warps * 32;
    if (const status s = detail::launch(kernel::store_tokens<Format::key_head_dim>, grid, threads, e.stream, key, pages,
                                        keys, slots, e.report);
        !s)
      return s;
    return detail::launch(kernel::store_tokens<Format::value_head_dim>, grid, threads, e.stream, value, pages, values,
                          slots, e.report);
  }
}

/// Codes n whole tiles, in stream order; capturable in a graph: what a cache needs whose keys are grouped along tokens
/// (grouped_key_codec). Keep at least the newest 64 tokens in a ring, which decode_attention reads in their place; when
/// a sequence reaches a multiple of 64 tokens, code the tile that is full from the ring. Any format will do;
/// fast for the same as compress.
/// \param keys,values device memory [rows, kv_heads, tokens, D_k / D_v] with at least 64 tokens, float16 or
///        bfloat16, any strides (bytes): the ring, or new tokens of a prompt.
/// \param moves device memory [n], 8-byte aligned, with different slots; negative slots are skipped, so that a
///        graph can hold the most tiles that may fill. Moves out of range are skipped and reported.
/// \return not ok, with nothing launched, for shapes, strides or parameters that do not fit. Uses no workspace.
template <class Format>
status store_tiles(const input_view<4>& keys, const input_view<4>& values, const tile_move* moves, std::int64_t n,
                   const parameters<Format>& params, const pages_view& pages, const exec& e) {
  if (const status s = detail::check_store_tiles(keys, values, moves, n, params, pages); !s) return s;
  if (n == 0) return {};
  using keys_of = typename detail::static_codec<Format, side::key>::type;
  using values_of = typename detail::static_codec<Format, side::value>::type;
  if (const status s = detail::store_tiles_of_side<Format::key_head_dim, keys_of, values_of>(detail::key_side(params),
                                                                                             pages, keys, moves, n, e);
      !s)
    return s;
  return detail::store_tiles_of_side<Format::value_head_dim, values_of, keys_of>(detail::value_side(params), pages,
                                                                                 values, moves, n, e);
}

}  // namespace packkv
