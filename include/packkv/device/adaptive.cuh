// SPDX-License-Identifier: Apache-2.0
// The `strip-adaptive` format on the device: encode, decode, GEMVs and attention on the stored bytes of one sequence.
// Definitions: reference/strip_adaptive.hpp; same bytes. General kernels, not tuned.
//   status s = packkv::encode_adaptive<128>(spec, x, recent, bytes, layout.max_bytes, offsets, exec{stream});
#pragma once

#include <packkv/device/grouped.cuh>
#include <packkv/kernel/adaptive.cuh>
#include <packkv/kernel/offset_scan.cuh>

namespace packkv {

/// Codes one side of a sequence in stream order, as reference::encode_adaptive.
/// \param x device memory [heads, tokens, HeadDim], float16 or bfloat16, any strides. \param bytes device memory,
/// 16-byte aligned, `capacity` >= adaptive_layout::max_bytes of (spec, heads, tokens, recent); what lies behind
/// offsets[tiles] is left as it was. \param offsets device int64 [tiles + 1]. Groups that cannot be coded become NaN
/// and are reported; codes above 255 become 255 and are reported. Uses no workspace.
template <int HeadDim>
status encode_adaptive(const adaptive_spec& spec, const input_view<3>& x, std::int64_t recent, std::uint8_t* bytes,
                       std::int64_t capacity, std::int64_t* offsets, const exec& e) {
  using namespace detail;
  if (const status s = check_adaptive(spec); !s) return s;
  if (const status s = check_head_dim(spec.groups, HeadDim); !s) return s;
  if (const status s = check_view(x); !s) return s;
  if (x.type == dtype::float32) return refuse(status_code::unsupported, "strip-adaptive formats code 16-bit tensors");
  if (x.extent[2] != HeadDim)
    return refuse(status_code::shape_mismatch, "the tensor's last extent is not the spec's head_dim", x.extent[2]);
  kernel::adaptive_args a{spec, {}, x, bytes, offsets, e.report};
  if (const status s = make_adaptive_layout(spec, x.extent[0], x.extent[1], recent, a.layout); !s) return s;
  if (capacity < a.layout.max_bytes)
    return refuse(status_code::workspace_too_small, "the buffer is smaller than adaptive_layout::max_bytes",
                  a.layout.max_bytes);
  if (const status s = check_adaptive_buffer(bytes, a.layout.max_bytes, offsets); !s) return s;

  constexpr int threads = kernel::grouped_warps * 32;
  const auto grid = [](std::int64_t warps) { return grid_for(ceil_div<std::int64_t>(warps, kernel::grouped_warps)); };
  if (const status s =
          launch_means_and_tail(spec.groups, x, a.layout.coded_tokens, bytes, bytes + a.layout.tail_offset, e.stream);
      !s)
    return s;
  if (spec.groups.shared_numbers() && a.layout.tiles > 0)
    if (const status s = launch(kernel::adaptive_shared_numbers<HeadDim>, grid(a.layout.blocks * spec.number_count()),
                                threads, e.stream, a);
        !s)
      return s;
  if (a.layout.tiles > 0)
    if (const status s = launch(kernel::measure_adaptive<HeadDim>, grid(a.layout.tiles), threads, e.stream, a); !s)
      return s;
  if (const status s = launch(kernel::scan_offsets<kernel::scan_threads>, dim3(1), kernel::scan_threads, e.stream,
                              offsets, a.layout.tiles, a.layout.tiles_offset);
      !s)
    return s;
  if (a.layout.tiles == 0) return {};
  return launch(kernel::write_adaptive<HeadDim>, grid(a.layout.tiles), threads, e.stream, a);
}

/// Reconstructs one side into x [heads, tokens, HeadDim] of any element type, device memory, in stream order. Groups
/// that are NaN and damaged tiles give NaN; damage is reported. `view.size` may be the capacity. Uses no workspace.
template <int HeadDim>
status decode_adaptive(const adaptive_view& view, const output_view<3>& x, const exec& e) {
  return detail::decode_sequence<HeadDim, warp::adaptive_source>(view, x, e);
}

/// As grouped_key_gemv.
template <int HeadDim>
status adaptive_key_gemv(const input_view<3>& queries, const adaptive_view& keys, float scale,
                         const output_view<3>& scores, const exec& e) {
  return detail::sequence_key_gemv<HeadDim, warp::adaptive_source>(queries, keys, scale, scores, e);
}

/// As grouped_value_gemv.
template <int HeadDim>
status adaptive_value_gemv(const input_view<3>& weights, const adaptive_view& values, const output_view<3>& out,
                           const exec& e) {
  return detail::sequence_value_gemv<HeadDim, warp::adaptive_source>(weights, values, out, e);
}

/// As grouped_attention.
template <int KeyDim, int ValueDim>
status adaptive_attention(const input_view<3>& queries, const adaptive_view& keys, const adaptive_view& values,
                          float scale, const output_view<3>& out, const output_view<2>& lse, const exec& e,
                          const sequence_options& options = {}) {
  return detail::sequence_attention<KeyDim, ValueDim, warp::adaptive_source>(queries, keys, values, scale, out, lse, e,
                                                                             options);
}

}  // namespace packkv
