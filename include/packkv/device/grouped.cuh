// SPDX-License-Identifier: Apache-2.0
// The `grouped` formats on the device: encode, decode, GEMVs and attention on the stored bytes of one sequence.
// Definitions: reference/grouped.hpp and reference/grouped_attention.hpp; same bytes. General kernels, not tuned.
//   grouped_view keys{kivi_keys(128, 2), bytes, size, heads, tokens, kivi_recent, dtype::float16};
//   status s = packkv::grouped_attention<128, 128>(queries, keys, values, scale, out, lse, exec{stream, ws, bytes});
#pragma once

#include <packkv/codec/grouped_checks.hpp>
#include <packkv/device/sequences.cuh>
#include <packkv/kernel/grouped.cuh>

namespace packkv {

namespace detail {

/// Channel means (where centred) to `bytes`, and the tokens from `coded` on to `tail`.
inline status launch_means_and_tail(const grouped_spec& spec, const input_view<3>& x, std::int64_t coded,
                                    std::uint8_t* bytes, std::uint8_t* tail, cudaStream_t stream) {
  constexpr int threads = kernel::grouped_warps * 32;
  const std::int64_t channels = x.extent[0] * x.extent[2], elements = channels * (x.extent[1] - coded);
  if (spec.centred)
    if (const status s = launch(kernel::channel_means<threads>, grid_for(ceil_div<std::int64_t>(channels, threads)),
                                threads, stream, x, coded, bytes);
        !s)
      return s;
  if (elements == 0) return {};
  return launch(kernel::copy_tail<threads>, grid_for(ceil_div<std::int64_t>(elements, threads)), threads, stream, x,
                coded, tail);
}

// The calls on one sequence, for every format whose view has heads and tokens and a warp::make_source.

template <int HeadDim, class Source, class View>
status decode_sequence(const View& view, const output_view<3>& x, const exec& e) {
  Source source;
  if (const status s = make_source(view, HeadDim, source); !s) return s;
  if (const status s = check_view(x); !s) return s;
  if (x.extent[0] != view.heads || x.extent[1] != view.tokens || x.extent[2] != HeadDim)
    return refuse(status_code::shape_mismatch, "the tensor's extents are not those of the coded side");
  return launch_sequence_decompress<HeadDim>(source, as_batch(x), view.tokens, e);
}

template <int HeadDim, class Source, class View>
status sequence_key_gemv(const input_view<3>& queries, const View& keys, float scale, const output_view<3>& scores,
                         const exec& e) {
  Source source;
  if (const status s = make_source(keys, HeadDim, source); !s) return s;
  if (const status s = check_sequence_operand(queries, keys.heads, HeadDim); !s) return s;
  if (const status s = check_sequence_output(scores, queries, keys.tokens); !s) return s;
  return launch_sequence_key_gemv<HeadDim>(source, as_batch(queries), keys.heads, scale, as_batch(scores), e);
}

template <int HeadDim, class Source, class View>
status sequence_value_gemv(const input_view<3>& weights, const View& values, const output_view<3>& out, const exec& e) {
  Source source;
  if (const status s = make_source(values, HeadDim, source); !s) return s;
  if (const status s = check_sequence_operand(weights, values.heads, values.tokens); !s) return s;
  if (const status s = check_sequence_output(out, weights, HeadDim); !s) return s;
  return launch_sequence_value_gemv<HeadDim>(source, as_batch(weights), values.heads, as_batch(out), e);
}

template <int KeyDim, int ValueDim, class Source, class View>
status sequence_attention(const input_view<3>& queries, const View& keys, const View& values, float scale,
                          const output_view<3>& out, const output_view<2>& lse, const exec& e,
                          const sequence_options& options) {
  Source key, value;
  if (const status s = make_source(keys, KeyDim, key); !s) return s;
  if (const status s = make_source(values, ValueDim, value); !s) return s;
  if (keys.heads != values.heads || keys.tokens != values.tokens)
    return refuse(status_code::shape_mismatch, "K and V disagree about heads or tokens");
  if (const status s = check_sequence_operand(queries, keys.heads, KeyDim); !s) return s;
  if (const status s = check_sequence_output(out, queries, ValueDim); !s) return s;
  if (const status s = check_sequence_lse(lse, queries); !s) return s;
  if (const status s = check_sequence_queries(queries.extent[1], keys.tokens, scale); !s) return s;
  if (const status s = check_sequence_options(options, keys.heads, keys.tokens, KeyDim, ValueDim); !s) return s;
  const kernel::sequence_attention_args more{as_batch(lse), {as_batch(options.keys)}, {as_batch(options.values)},
                                             options.sinks, options.recent,           options.window};
  return launch_sequence_attention<KeyDim, ValueDim>(key, value, as_batch(queries), keys.heads, scale, as_batch(out),
                                                     more, e);
}

}  // namespace detail

/// Codes one side of a sequence in stream order, as reference::encode_grouped.
/// \param x device memory [heads, tokens, HeadDim], float16 or bfloat16, any strides. \param bytes device memory,
/// 16-byte aligned, `size` = grouped_layout::total_bytes of (spec, heads, tokens, recent); all of it is written. Groups
/// that cannot be coded become NaN and are reported. Uses no workspace.
template <int HeadDim>
status encode_grouped(const grouped_spec& spec, const input_view<3>& x, std::int64_t recent, std::uint8_t* bytes,
                      std::int64_t size, const exec& e) {
  using namespace detail;
  if (const status s = check_grouped(spec); !s) return s;
  if (const status s = check_head_dim(spec, HeadDim); !s) return s;
  if (const status s = check_view(x); !s) return s;
  if (x.type == dtype::float32) return refuse(status_code::unsupported, "grouped formats code 16-bit tensors");
  if (x.extent[2] != HeadDim)
    return refuse(status_code::shape_mismatch, "the tensor's last extent is not the spec's head_dim", x.extent[2]);
  kernel::grouped_args a{spec, {}, x, bytes, e.report};
  if (const status s = make_grouped_layout(spec, x.extent[0], x.extent[1], recent, a.layout); !s) return s;
  if (const status s = check_grouped_bytes(bytes, size, a.layout); !s) return s;

  constexpr int threads = kernel::grouped_warps * 32;
  const auto grid = [](std::int64_t warps) { return grid_for(ceil_div<std::int64_t>(warps, kernel::grouped_warps)); };
  if (a.layout.tail_offset > 0)
    if (const status s = clear(bytes, static_cast<std::size_t>(a.layout.tail_offset), e.stream); !s) return s;
  if (const status s =
          launch_means_and_tail(spec, x, a.layout.coded_tokens, bytes, bytes + a.layout.tail_offset, e.stream);
      !s)
    return s;
  if (a.layout.blocks == 0) return {};
  if (spec.axis == group_axis::channel)
    return launch(kernel::encode_token_groups<HeadDim>, grid(a.layout.heads * a.layout.coded_tokens / spec.group),
                  threads, e.stream, a);
  return launch(kernel::encode_channel_groups<HeadDim>,
                grid(a.layout.coded_tokens * (spec.axis == group_axis::token ? 1 : a.layout.heads)), threads, e.stream,
                a);
}

/// Reconstructs one side into x [heads, tokens, HeadDim] of any element type, device memory, in stream order. Groups
/// that are NaN give NaN. Uses no workspace.
template <int HeadDim>
status decode_grouped(const grouped_view& view, const output_view<3>& x, const exec& e) {
  return detail::decode_sequence<HeadDim, warp::grouped_source>(view, x, e);
}

/// scores[h, i, t] = scale * q[h, i, :] . x^[h / group, t, :] for all tokens, the 16-bit ones too, in stream order.
/// \param queries device memory [query_heads, n, HeadDim], scores [query_heads, n, tokens], any element types. Uses no
/// workspace.
template <int HeadDim>
status grouped_key_gemv(const input_view<3>& queries, const grouped_view& keys, float scale,
                        const output_view<3>& scores, const exec& e) {
  return detail::sequence_key_gemv<HeadDim, warp::grouped_source>(queries, keys, scale, scores, e);
}

/// out[h, i, :] = sum over t of weights[h, i, t] * x^[h / group, t, :], in stream order.
/// \param weights device memory [query_heads, n, tokens], out [query_heads, n, HeadDim], any element types. Tokens of
/// weight 0 do not count, whatever they hold. \param e workspace of sequence_workspace_bytes, initialised once.
template <int HeadDim>
status grouped_value_gemv(const input_view<3>& weights, const grouped_view& values, const output_view<3>& out,
                          const exec& e) {
  return detail::sequence_value_gemv<HeadDim, warp::grouped_source>(weights, values, out, e);
}

/// softmax(scale * q.K^T) V on the stored bytes, in stream order. K and V may have different specs and `recent`.
/// \param queries device memory [query_heads, n, KeyDim], the last n positions: query i sees tokens 0 .. tokens - n +
/// i. \param out [query_heads, n, ValueDim]. \param lse natural logarithm of the sum of exponentials [query_heads, n],
/// or a null view. \param e workspace of sequence_workspace_bytes, initialised once. \param options sinks, recent
/// tokens and a window; a window hides tokens of either kind.
template <int KeyDim, int ValueDim>
status grouped_attention(const input_view<3>& queries, const grouped_view& keys, const grouped_view& values,
                         float scale, const output_view<3>& out, const output_view<2>& lse, const exec& e,
                         const sequence_options& options = {}) {
  return detail::sequence_attention<KeyDim, ValueDim, warp::grouped_source>(queries, keys, values, scale, out, lse, e,
                                                                            options);
}

}  // namespace packkv
