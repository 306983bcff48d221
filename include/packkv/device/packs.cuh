// SPDX-License-Identifier: Apache-2.0
// Device-wide compress into PackKV's packs. Definition: reference/packs.hpp; same bytes.
//   status s = packkv::compress(format, keys, values, coded_blocks(tokens), key_packs, value_packs, order,
//   exec{stream});
#pragma once

#include <packkv/codec/pack_checks.hpp>
#include <packkv/device/exec.cuh>
#include <packkv/kernel/offset_scan.cuh>
#include <packkv/kernel/pack_encode.cuh>
#include <packkv/kernel/pack_order.cuh>
#include <packkv/kernel/packs.cuh>
#include <packkv/policy/machine.hpp>

namespace packkv {

/// The orders of tokens that a compress into packs reads or writes: device uint8 [blocks][64], the token of each slot.
struct pack_order {
  const std::uint8_t* given = nullptr;  ///< an order that is known, for token_order::greedy alone; else null
  std::uint8_t* computed = nullptr;     ///< median, and greedy if none is given, write it and need it; none unless null
};

namespace detail {

inline constexpr int pack_threads = kernel::pack_warps * warp_threads;

inline status check_pack_order(const pack_format& f, std::int64_t blocks, const pack_order& order) {
  if (order.given != nullptr && f.order != token_order::greedy)
    return refuse(status_code::invalid_argument, "only the greedy order is given: pack_order::given must be null");
  if (order.given != nullptr && order.computed != nullptr)
    return refuse(status_code::invalid_argument, "a greedy order is given or computed: one of pack_order must be null");
  if (f.order != token_order::none && order.given == nullptr && order.computed == nullptr && blocks > 0)
    return refuse(status_code::invalid_argument, "the order is kept in pack_order::computed, which is null");
  return {};
}

/// Formats whose sides have this head dim have an encoder of their own, but for the smallest packs.
inline constexpr int usual_head_dim = 128, usual_pack_size = 8;
static_assert(kernel::stages_in_place(usual_head_dim), "encode_shared_bytes is told so");
inline bool has_usual_encoder(const pack_format& f) {
  return f.key.head_dim == usual_head_dim && f.value.head_dim == usual_head_dim && f.pack_size >= usual_pack_size;
}

/// Ranges of one side, in the order of tokens.
inline status find_pack_ranges(const kernel::pack_args& a, cudaStream_t stream) {
  const std::int64_t groups = a.blocks * a.format.batch * range_count(a.format, a.which);
  return launch(kernel::find_pack_ranges<kernel::pack_warps>,
                grid_for(ceil_div<std::int64_t>(groups, kernel::pack_warps)), pack_threads, stream, a);
}

/// Shared memory that a block of threads may have where code of this kernel's architecture runs.
template <class... Parameter>
inline status shared_limit(void (*kernel)(Parameter...), int& bytes) {
  int architecture = 0;
  const status s = compiled_architecture(kernel, architecture);
  bytes = policy::shared_kib_of(architecture) * 1024 - policy::shared_bytes_per_block;
  return s;
}

inline constexpr int greedy_blocks = 264;  ///< most blocks of threads whose codes lie in global memory: 2 an SM

/// Whether codes of the greedy order fit shared memory.
inline bool greedy_fits(const pack_format& f, int shared_bytes) {
  const block::code_rows rows(f);
  return rows.slabs() <= kernel::greedy_warps &&
         rows.bytes() + std::int64_t{sizeof(block::greedy_storage<true>)} <= shared_bytes;
}
inline checked greedy_workspace(const pack_format& f, std::int64_t blocks) {
  return checked(min_of<std::int64_t>(blocks, greedy_blocks)) * kernel::greedy_bytes(block::code_rows(f)) +
         workspace_counter_bytes;
}

template <bool BFloat>
inline status find_greedy_order(const kernel::pack_args& key, const kernel::pack_args& value, bool key_fast,
                                bool value_fast, std::uint8_t* order, int shared_bytes, const exec& e) {
  constexpr int threads = kernel::greedy_warps * warp_threads;
  kernel::greedy_args args{key, value, key_fast, value_fast, order, nullptr};
  if (greedy_fits(key.format, shared_bytes))
    return launch(kernel::order_by_greed<BFloat, true, kernel::greedy_warps>, grid_for(key.blocks),
                  block_size(threads, static_cast<int>(block::code_rows(key.format).bytes())), e.stream, args);
  args.workspace = static_cast<std::uint8_t*>(e.workspace) + workspace_counter_bytes;
  return launch(kernel::order_by_greed<BFloat, false, kernel::greedy_warps>,
                grid_for(min_of<std::int64_t>(key.blocks, greedy_blocks)), threads, e.stream, args);
}

template <bool BFloat>
inline status find_median_order(const kernel::pack_args& value, std::uint8_t* order, const exec& e) {
  constexpr int warps = kernel::median_warps;
  const auto run = [&](auto function) {
    return launch_early(function, grid_for(value.blocks), warps * warp_threads, e.stream, value, order);
  };
  if (!kernel::medians_in_registers(value.format)) return run(kernel::order_by_counts<BFloat, warps>);
  return value.format.value.head_dim == usual_head_dim ? run(kernel::order_by_median<BFloat, usual_head_dim, warps>)
                                                       : run(kernel::order_by_median<BFloat, 0, warps>);
}

/// The order of the blocks, if there is one to compute or to check. Ranges of a side that is not fast are those that
/// find_pack_ranges wrote. A template as compress is.
template <int Unused = 0>
inline status find_pack_order(const kernel::pack_args& key, const kernel::pack_args& value, bool key_fast,
                              bool value_fast, const pack_order& order, int shared_bytes, const exec& e) {
  const std::int64_t blocks = value.blocks;
  const bool bfloat = value.format.element == dtype::bfloat16;
  if (order.given != nullptr)
    return launch(kernel::check_pack_order<kernel::pack_warps>,
                  grid_for(ceil_div<std::int64_t>(blocks, kernel::pack_warps)), pack_threads, e.stream, value);
  if (order.computed == nullptr) return {};
  if (value.format.order == token_order::greedy)
    return bfloat ? find_greedy_order<true>(key, value, key_fast, value_fast, order.computed, shared_bytes, e)
                  : find_greedy_order<false>(key, value, key_fast, value_fast, order.computed, shared_bytes, e);
  if (value.format.order == token_order::median && value_fast)
    return bfloat ? find_median_order<true>(value, order.computed, e)
                  : find_median_order<false>(value, order.computed, e);
  return launch(kernel::order_packs<kernel::pack_warps>, grid_for(blocks), pack_threads, e.stream, value,
                order.computed);
}

/// Tiles and offsets of one side, whose ranges are in the order of tokens before and in that of slots after it.
inline status write_packs(const kernel::pack_args& a, cudaStream_t stream) {
  const pack_granularity g = a.format.codec(a.which).granularity;
  const std::int64_t tiles = tile_count(a.format, a.blocks);
  if (a.order != nullptr && tiles > 0 && (g == pack_granularity::token || g == pack_granularity::vector)) {
    const std::int64_t rows = a.blocks * a.format.batch * range_count(a.format, a.which) / tile_tokens;
    if (const status s = launch(kernel::move_pack_ranges<kernel::pack_warps>,
                                grid_for(ceil_div<std::int64_t>(rows, kernel::pack_warps)), pack_threads, stream, a);
        !s)
      return s;
  }
  const block_size threads(pack_threads, tile_tokens * a.format.codec(a.which).head_dim);
  if (tiles > 0)
    if (const status s = launch(kernel::measure_packs<kernel::pack_warps>, grid_for(tiles), threads, stream, a); !s)
      return s;
  if (const status s = launch(kernel::scan_offsets<kernel::scan_threads>, dim3(1), kernel::scan_threads, stream,
                              a.out.offsets, tiles, std::int64_t{0});
      !s)
    return s;
  return tiles > 0 ? launch(kernel::write_packs<kernel::pack_warps>, grid_for(tiles), threads, stream, a) : status{};
}

/// Heads of encode_packs' units, or 0 if the side needs the general kernels: what encode_packs does is a range within a
/// token, channels side by side, and 16-byte loads.
inline int encoder_heads(const pack_format& f, side which, const input_view<4>& x, std::int64_t blocks,
                         int shared_bytes) {
  const pack_granularity g = f.codec(which).granularity;
  if (g != pack_granularity::token && g != pack_granularity::vector) return 0;
  bool aligned = x.stride[3] == 2 && is_aligned(x.data, 16);
  for (int i = 0; i < 3; ++i) aligned = aligned && (x.extent[i] == 1 || x.stride[i] % 16 == 0);
  if (!aligned) return 0;
  int heads = kernel::encode_heads;
  const int room = shared_bytes - static_cast<int>(sizeof(kernel::encode_unit));
  while (heads > 0 && kernel::encode_shared_bytes(f, which, heads, has_usual_encoder(f)) > room) heads /= 2;
  // Launches count both sides' units in 32 bits.
  return heads > 0 && kernel::pack_units(f, which, heads).count(f, blocks) < (std::int64_t{1} << 30) ? heads : 0;
}

template <bool BFloat, int PackSize>
inline status encode_packs(const kernel::pack_encode_args& args, cudaStream_t stream) {
  int shared_bytes = 0;
  std::int64_t offsets[2] = {};
  for (const kernel::pack_encode_side* s : {&args.key, &args.value}) {
    if (s->units == 0) continue;
    const kernel::pack_args& a = s->args;
    shared_bytes = max_of(shared_bytes,
                          kernel::encode_shared_bytes(a.format, a.which, s->most_heads, has_usual_encoder(a.format)));
    offsets[static_cast<int>(a.which)] = tile_count(a.format, a.blocks) + 1;
    if (!s->ranges_span_units()) continue;
    constexpr int warps = kernel::pack_warps;
    const std::int64_t rows = a.blocks * a.format.batch * tile_tokens;
    if (const status r = launch(kernel::find_row_ranges<BFloat, warps>, grid_for(ceil_div<std::int64_t>(rows, warps)),
                                pack_threads, stream, a);
        !r)
      return r;
  }
  constexpr int threads = 256;
  if (const status s = launch_early(
          kernel::clear_offsets<threads>, grid_for(ceil_div<std::int64_t>(max_of(offsets[0], offsets[1]), threads)),
          threads, stream, args.key.args.out.offsets, offsets[0], args.value.args.out.offsets, offsets[1]);
      !s)
    return s;
  const auto run = [&](auto function) {
    return launch_early(function, grid_for(args.key.units + args.value.units),
                        block_size(kernel::encode_warps * warp_threads, shared_bytes), stream, args);
  };
  if constexpr (PackSize >= usual_pack_size)
    if (has_usual_encoder(args.key.args.format)) return run(kernel::encode_packs<BFloat, PackSize, usual_head_dim>);
  return run(kernel::encode_packs<BFloat, PackSize, 0>);
}

template <bool BFloat>
inline status encode_packs(const kernel::pack_encode_args& args, cudaStream_t stream) {
  switch (args.key.args.format.pack_size) {
    case 2:
      return encode_packs<BFloat, 2>(args, stream);
    case 4:
      return encode_packs<BFloat, 4>(args, stream);
    case 8:
      return encode_packs<BFloat, 8>(args, stream);
    case 16:
      return encode_packs<BFloat, 16>(args, stream);
    default:
      return encode_packs<BFloat, 32>(args, stream);
  }
}

}  // namespace detail

/// Bytes of exec::workspace that compress needs: none, unless it computes the greedy order of more codes than shared
/// memory holds (64 bytes a channel of K and V, all heads and batch rows). shared_kib: of an SM of the machine, one of
/// policy::shared_kib_choices, or 0 for a size that suffices everywhere. 0 as well if it does not fit 63 bits.
inline std::int64_t pack_workspace_bytes(const pack_format& f, std::int64_t blocks, int shared_kib = 0) {
  if (f.order != token_order::greedy || blocks <= 0 || !check_format(f)) return 0;
  const int least = shared_kib != 0 ? shared_kib : policy::shared_kib_choices[2];
  if (detail::greedy_fits(f, least * 1024 - policy::shared_bytes_per_block)) return 0;
  return detail::greedy_workspace(f, blocks).value();
}

/// Codes the first `blocks` * 64 tokens (PackKV's own choice is coded_blocks(tokens)), in stream order; capturable in a
/// graph. The bytes are those of reference::compress.
///
/// Sides of granularity token or vector whose channels lie side by side (stride 2 bytes) in rows that are multiples
/// of 16 bytes apart are coded by fast kernels, which read each element once, and once more for an order; the others by
/// general ones, which compute codes several times.
/// \param keys,values device memory [batch, kv_heads, tokens, D_k / D_v], float16 or bfloat16 as the format says, any
///        strides (bytes).
/// \param key, value where the packs go, in device memory: ranges at 4, offsets at 8, data at 16 bytes. `capacity` is
/// at
///        least max_pack_bytes(), because the size of the tiles is known on the device alone: offsets[tile_count()].
///        Bytes of `data` behind that are left as they were.
/// \param order the tokens of slots: an output, or an input for token_order::greedy.
/// \param e its workspace has pack_workspace_bytes(), if an order is computed.
/// \return not ok, with nothing launched, for shapes, types, alignments or orders that do not fit; overflow, with the
///         bytes needed as `detail`, for a capacity below max_pack_bytes().
/// What reference::compress refuses for its values is coded and reported here:
/// - report_nonfinite_input, report_scale_overflow: a group with an element that is not finite, or whose range
/// overflows
///   a float, has NaN as both ends of its range and codes 0. It reads as NaN, and reference::check_packs refuses it;
/// - report_code_overflow: codes above 255 become 255, so that the group's largest elements read as too small;
/// - report_order_invalid: a given order is no permutation; its entries are taken modulo 64.
/// A template, so that its kernels, of which there are many, are compiled only where it is called.
template <int Unused = 0>
inline status compress(const pack_format& f, const input_view<4>& keys, const input_view<4>& values,
                       std::int64_t blocks, const pack_side& key, const pack_side& value, const pack_order& order,
                       const exec& e) {
  if (const status s = detail::check_pack_tensors(f, keys, values, blocks); !s) return s;
  if (keys.type != f.element || values.type != f.element)
    return refuse(status_code::invalid_argument, "keys and values must have the format's element type");
  if (const status s = detail::check_pack_output(key, blocks); !s) return s;
  if (const status s = detail::check_pack_output(value, blocks); !s) return s;
  if (const status s = detail::check_pack_order(f, blocks, order); !s) return s;
  for (const side which : {side::key, side::value})
    if (const std::int64_t bytes = max_pack_bytes(f, which, blocks);
        (which == side::key ? key : value).capacity < bytes)
      return refuse(status_code::overflow, "a capacity is less than max_pack_bytes()", bytes);
  int limit = 0;
  if (const status s = detail::shared_limit(kernel::order_by_greed<false, true, kernel::greedy_warps>, limit); !s)
    return s;
  const bool greedy = f.order == token_order::greedy && order.computed != nullptr && blocks > 0;
  if (greedy && !detail::greedy_fits(f, limit))
    if (const status s = detail::check_workspace(e, detail::greedy_workspace(f, blocks)); !s) return s;
  const std::uint8_t* const slots = order.given != nullptr ? order.given : order.computed;
  const kernel::pack_args k{f, side::key, keys, key, blocks, slots, e.report};
  const kernel::pack_args v{f, side::value, values, value, blocks, slots, e.report};
  const auto encoder = [&](const kernel::pack_args& a) {
    const int heads = blocks > 0 ? detail::encoder_heads(f, a.which, a.in, blocks, limit) : 0;
    return kernel::pack_encode_side{a, heads, heads > 0 ? kernel::pack_units(f, a.which, heads).count(f, blocks) : 0};
  };
  const kernel::pack_encode_args both{encoder(k), encoder(v)};
  const bool fast_keys = both.key.units > 0, fast_values = both.value.units > 0;
  if (blocks > 0) {
    if (!fast_keys)
      if (const status s = detail::find_pack_ranges(k, e.stream); !s) return s;
    if (!fast_values)
      if (const status s = detail::find_pack_ranges(v, e.stream); !s) return s;
    if (const status s = detail::find_pack_order(k, v, fast_keys, fast_values, order, limit, e); !s) return s;
  }
  if (fast_keys || fast_values) {
    const status s = f.element == dtype::bfloat16 ? detail::encode_packs<true>(both, e.stream)
                                                  : detail::encode_packs<false>(both, e.stream);
    if (!s) return s;
  }
  if (!fast_keys)
    if (const status s = detail::write_packs(k, e.stream); !s) return s;
  return fast_values ? status{} : detail::write_packs(v, e.stream);
}

}  // namespace packkv
