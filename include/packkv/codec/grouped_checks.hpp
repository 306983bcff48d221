// SPDX-License-Identifier: Apache-2.0
// Coded sides of the whole-sequence formats as views, and what tensors must satisfy beside them.
//   if (const status s = packkv::detail::check_grouped_view(view, layout); !s) return s;
#pragma once

#include <initializer_list>
#include <packkv/codec/grouped.hpp>
#include <packkv/codec/strip_adaptive.hpp>

namespace packkv {

/// One side of a sequence as encode_grouped left it. The bytes are not owned.
struct grouped_view {
  grouped_spec spec = {};
  const std::uint8_t* bytes = nullptr;  ///< 16-byte aligned
  std::int64_t size = 0;                ///< grouped_layout::total_bytes
  std::int64_t heads = 0;
  std::int64_t tokens = 0;
  std::int64_t recent = 0;
  dtype tail_type = dtype::float16;
};

/// One side of a sequence as encode_adaptive left it. Bytes and offsets are not owned.
struct adaptive_view {
  adaptive_spec spec = {};
  const std::uint8_t* bytes = nullptr;    ///< 16-byte aligned
  std::int64_t size = 0;                  ///< offsets[adaptive_layout::tiles]
  const std::int64_t* offsets = nullptr;  ///< [tiles + 1]
  std::int64_t heads = 0;
  std::int64_t tokens = 0;
  std::int64_t recent = 0;
  dtype tail_type = dtype::float16;
};

/// Tokens of a sequence that attention reads in 16 bits instead of coded, and those that it does not see.
struct sequence_options {
  input_view<3> keys = {}, values = {};  ///< K [heads, tokens, D_k] and V as they were, where sinks or recent > 0
  std::int64_t sinks = 0;                ///< the first tokens
  std::int64_t recent =
      0;  ///< for each query, the tokens whose distance to it is less: itself and recent - 1 before it
  std::int64_t window = 0;  ///< a query sees tokens whose distance to it is less; 0: all before it
};

namespace detail {

inline status check_grouped_bytes(const void* bytes, std::int64_t size, const grouped_layout& layout) {
  if (size != layout.total_bytes)
    return refuse(status_code::shape_mismatch, "the buffer's size is not grouped_layout::total_bytes",
                  layout.total_bytes);
  if (bytes == nullptr && size > 0) return refuse(status_code::invalid_argument, "the buffer is null");
  if (reinterpret_cast<std::uintptr_t>(bytes) % 16 != 0)
    return refuse(status_code::misaligned, "the buffer must be 16-byte aligned");
  return {};
}

inline status check_grouped_view(const grouped_view& view, grouped_layout& layout) {
  if (const status s = make_grouped_layout(view.spec, view.heads, view.tokens, view.recent, layout); !s) return s;
  if (view.tail_type == dtype::float32) return refuse(status_code::invalid_argument, "the tail holds 16-bit elements");
  return check_grouped_bytes(view.bytes, view.size, layout);
}

/// The head dim that a call was compiled for.
inline status check_head_dim(const grouped_spec& spec, int head_dim) {
  if (spec.head_dim != head_dim)
    return refuse(status_code::shape_mismatch, "the spec's head_dim is not the call's", spec.head_dim);
  return {};
}

inline status check_adaptive_buffer(const void* bytes, std::int64_t size, const std::int64_t* offsets) {
  if (offsets == nullptr || (bytes == nullptr && size > 0))
    return refuse(status_code::invalid_argument, "the buffer or the offsets are null");
  if (reinterpret_cast<std::uintptr_t>(bytes) % 16 != 0 || reinterpret_cast<std::uintptr_t>(offsets) % 8 != 0)
    return refuse(status_code::misaligned, "the buffer must be 16-byte aligned, the offsets 8-byte aligned");
  return {};
}

/// All of a view but its offsets and tiles, which may lie in device memory.
inline status check_adaptive_view(const adaptive_view& view, adaptive_layout& layout) {
  if (const status s = make_adaptive_layout(view.spec, view.heads, view.tokens, view.recent, layout); !s) return s;
  if (view.tail_type == dtype::float32) return refuse(status_code::invalid_argument, "the tail holds 16-bit elements");
  if (const status s = check_adaptive_buffer(view.bytes, view.size, view.offsets); !s) return s;
  if (view.size < layout.tiles_offset)
    return refuse(status_code::corrupt, "the buffer is shorter than the parts before its tiles", layout.tiles_offset);
  return {};
}

/// Queries or weights [query heads, n, length] beside `heads` coded heads.
inline status check_sequence_operand(const input_view<3>& x, std::int64_t heads, std::int64_t length) {
  if (const status s = check_view(x); !s) return s;
  if (x.extent[0] < 1 || x.extent[0] % heads != 0)
    return refuse(status_code::shape_mismatch, "query heads must be a positive multiple of the KV heads", x.extent[0]);
  if (x.extent[2] != length)
    return refuse(status_code::shape_mismatch, "the last extent disagrees with the coded side", x.extent[2]);
  if (!(checked(x.extent[0]) * x.extent[1]).valid())
    return refuse(status_code::overflow, "more queries than 63 bits can count");
  return {};
}
/// Scores or outputs [query heads, n, length] for the operand `x`.
inline status check_sequence_output(const output_view<3>& out, const input_view<3>& x, std::int64_t length) {
  if (const status s = check_view(out); !s) return s;
  if (out.extent[0] != x.extent[0] || out.extent[1] != x.extent[1] || out.extent[2] != length)
    return refuse(status_code::shape_mismatch, "the output's extents disagree with the inputs");
  return {};
}
/// Log-sum-exp [query heads, n], or nothing.
inline status check_sequence_lse(const output_view<2>& lse, const input_view<3>& x) {
  if (lse.data == nullptr) return {};
  if (const status s = check_view(lse); !s) return s;
  if (lse.extent[0] != x.extent[0] || lse.extent[1] != x.extent[1])
    return refuse(status_code::shape_mismatch, "lse does not fit the queries");
  return {};
}
/// What attention needs beside the operands' shapes.
inline status check_sequence_queries(std::int64_t queries, std::int64_t tokens, float scale) {
  if (queries > tokens) return refuse(status_code::shape_mismatch, "there are more queries than tokens", queries);
  return check_softmax_scale(scale);
}

inline status check_sequence_options(const sequence_options& o, std::int64_t heads, std::int64_t tokens,
                                     std::int64_t key_dim, std::int64_t value_dim) {
  if (o.sinks < 0 || o.recent < 0 || o.window < 0)
    return refuse(status_code::invalid_argument, "sinks, recent and window must not be negative");
  if (o.sinks == 0 && o.recent == 0) return {};
  for (const input_view<3>* x : {&o.keys, &o.values}) {
    if (const status s = check_view(*x); !s) return s;
    if (x->extent[0] != heads || x->extent[1] != tokens || x->extent[2] != (x == &o.keys ? key_dim : value_dim))
      return refuse(status_code::shape_mismatch, "the 16-bit K or V does not fit the coded sides");
  }
  return {};
}

/// A view of one sequence as a batch of one.
template <class Pointer, int Rank>
tensor_view<Pointer, Rank + 1> as_batch(const tensor_view<Pointer, Rank>& x) {
  tensor_view<Pointer, Rank + 1> out;
  out.data = x.data;
  out.type = x.type;
  out.extent[0] = 1;
  for (int i = 0; i < Rank; ++i) {
    out.extent[i + 1] = x.extent[i];
    out.stride[i + 1] = x.stride[i];
  }
  return out;
}

}  // namespace detail
}  // namespace packkv
