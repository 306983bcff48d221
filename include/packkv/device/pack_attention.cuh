// SPDX-License-Identifier: Apache-2.0
// Decompress, GEMVs and attention on PackKV's packs, on the device. Definitions: reference/packs.hpp and
// reference/pack_attention.hpp. GEMVs and attention on packs of 16 tokens with steps of a token or a vector, head dims
// up to 256, have kernels of their own (device/pack_gemv.cuh); everything else general ones, which are not tuned.
//   status s = packkv::attention<128, 128>(format, packs, key_tail, value_tail, queries, scale, out, lse, exec{...});
#pragma once

#include <packkv/codec/pack_checks.hpp>
#include <packkv/device/pack_gemv.cuh>

namespace packkv {

namespace detail {

/// What the host can see of packs in device memory.
inline status check_device_packs(const pack_format& f, const packs_view& packs) {
  if (const status s = check_format(f); !s) return s;
  if (packs.blocks < 0) return refuse(status_code::invalid_argument, "a number of blocks is negative");
  for (const side which : {side::key, side::value}) {
    if (max_pack_bytes(f, which, packs.blocks) == 0 && packs.blocks > 0)
      return refuse(status_code::overflow, "the packs may not fit 63 bits");
    if (const status s = check_pack_pointers(which == side::key ? packs.key : packs.value, packs.blocks); !s) return s;
  }
  return {};
}

/// The head dims that a call was compiled for.
inline status check_pack_dims(const pack_format& f, int key_dim, int value_dim) {
  if ((key_dim != 0 && f.key.head_dim != key_dim) || (value_dim != 0 && f.value.head_dim != value_dim))
    return refuse(status_code::shape_mismatch, "the format's head_dim is not the call's");
  return {};
}

/// in [batch, query_heads, queries, in_extent], out [batch, query_heads, queries, out_extent].
inline status check_pack_operands(const pack_format& f, const input_view<4>& in, std::int64_t in_extent,
                                  const output_view<4>& out, std::int64_t out_extent) {
  if (const status s = check_view(in); !s) return s;
  if (const status s = check_view(out); !s) return s;
  if (in.extent[0] != f.batch || out.extent[0] != f.batch)
    return refuse(status_code::shape_mismatch, "a tensor's batch is not the format's");
  if (in.extent[1] < 1 || in.extent[1] != out.extent[1] || in.extent[1] % f.kv_heads != 0)
    return refuse(status_code::shape_mismatch, "query heads must be the same multiple of the KV heads everywhere");
  if (in.extent[2] != out.extent[2] || in.extent[3] != in_extent || out.extent[3] != out_extent)
    return refuse(status_code::shape_mismatch, "a tensor does not fit the packs or the format's head_dim");
  return {};
}

/// [batch, query_heads, length] with a dimension of one query.
template <class Pointer>
tensor_view<Pointer, 4> with_one_query(const tensor_view<Pointer, 3>& x) {
  tensor_view<Pointer, 4> out;
  out.data = x.data;
  out.type = x.type;
  constexpr int from[] = {0, 1, -1, 2};
  for (int i = 0; i < 4; ++i) {
    out.extent[i] = from[i] < 0 ? 1 : x.extent[from[i]];
    out.stride[i] = from[i] < 0 ? 0 : x.stride[from[i]];
  }
  return out;
}

inline warp::pack_source pack_side_source(const pack_format& f, side which, const packs_view& packs,
                                          const input_view<4>& tail = {}) {
  return {f, which, which == side::key ? packs.key : packs.value, packs.blocks, tail};
}

}  // namespace detail

/// Reconstructs all blocks in the order of their slots, in stream order.
/// \param packs in device memory; `size` of a side is the number of bytes at `data` that may be read. A tile that
/// contradicts itself gives NaN and is reported. \param keys device memory [batch, kv_heads, tokens, KeyDim], values
/// [.., ValueDim], of any element type, tokens >= blocks * 64; later tokens are left as they were. Uses no workspace.
template <int KeyDim, int ValueDim>
status decompress(const pack_format& f, const packs_view& packs, const output_view<4>& keys,
                  const output_view<4>& values, const exec& e) {
  using namespace detail;
  if (const status s = check_pack_tensors(f, keys, values, packs.blocks); !s) return s;
  if (const status s = check_device_packs(f, packs); !s) return s;
  if (const status s = check_pack_dims(f, KeyDim, ValueDim); !s) return s;
  const std::int64_t tokens = packs.blocks * tile_tokens;
  if (const status s = launch_sequence_decompress<KeyDim>(pack_side_source(f, side::key, packs), keys, tokens, e); !s)
    return s;
  return launch_sequence_decompress<ValueDim>(pack_side_source(f, side::value, packs), values, tokens, e);
}

/// scores[b, h, s] = scale * q[b, h, :] . k^[b, s, :], in stream order. queries device memory [batch, query_heads,
/// KeyDim]; scores [batch, query_heads, blocks * 64] in the order of the slots. Uses no workspace. A tile that
/// contradicts itself gives NaN and is reported, here and below. \remark Kernels for packs of 16 tokens are launched
/// with programmatic stream serialization on sm_90 and later: they may begin while the kernel before them in the stream
/// ends, and wait for that end before they read anything. Queries that are not finite give NaN.
template <int KeyDim>
status key_gemv(const pack_format& f, const packs_view& packs, const input_view<3>& queries, float scale,
                const output_view<3>& scores, const exec& e) {
  using namespace detail;
  if (const status s = check_device_packs(f, packs); !s) return s;
  if (const status s = check_pack_dims(f, KeyDim, 0); !s) return s;
  const input_view<4> in = with_one_query(queries);
  const output_view<4> out = with_one_query(scores);
  if (const status s = check_pack_operands(f, in, KeyDim, out, packs.blocks * tile_tokens); !s) return s;
  if constexpr (KeyDim <= 256)
    if (takes_pack_kernels<KeyDim>(f, side::key, packs.blocks))
      return launch_pack_key_gemv<KeyDim>(pack_side_source(f, side::key, packs), in, f.kv_heads, scale, out, e);
  return launch_sequence_key_gemv<KeyDim>(pack_side_source(f, side::key, packs), in, f.kv_heads, scale, out, e);
}

/// out[b, h, :] = sum over slots s of weights[b, h, s] * v^[b, s, :], in stream order. weights device memory [batch,
/// query_heads, blocks * 64] in the order of the slots, out [batch, query_heads, ValueDim]. Slots of weight 0 do not
/// count, whatever they hold. Weights of packs of 16 tokens that are not finite make their row NaN. \param e workspace
/// of sequence_workspace_bytes, initialised once.
template <int ValueDim>
status value_gemv(const pack_format& f, const packs_view& packs, const input_view<3>& weights,
                  const output_view<3>& out, const exec& e) {
  using namespace detail;
  if (const status s = check_device_packs(f, packs); !s) return s;
  if (const status s = check_pack_dims(f, 0, ValueDim); !s) return s;
  const input_view<4> in = with_one_query(weights);
  const output_view<4> to = with_one_query(out);
  if (const status s = check_pack_operands(f, in, packs.blocks * tile_tokens, to, ValueDim); !s) return s;
  if constexpr (ValueDim <= 256)
    if (takes_pack_kernels<ValueDim>(f, side::value, packs.blocks))
      return launch_pack_value_gemv<ValueDim>(pack_side_source(f, side::value, packs), in, f.kv_heads, to, e);
  return launch_sequence_value_gemv<ValueDim>(pack_side_source(f, side::value, packs), in, f.kv_heads, to, e);
}

/// softmax(scale * q . K^T) V over all packed tokens and the 16-bit tokens that follow them, in stream order. Query i
/// of n sees all packed tokens and the first tail - n + 1 + i tokens of the tail (n <= tail; one query sees them all).
/// \param key_tail device memory [batch, kv_heads, tail, KeyDim], value_tail [.., ValueDim]; queries [batch,
/// query_heads, n, KeyDim]; out [batch, query_heads, n, ValueDim]; lse [batch, query_heads, n], natural logarithm, may
/// be a null view. \param e workspace of sequence_workspace_bytes, initialised once.
template <int KeyDim, int ValueDim>
status attention(const pack_format& f, const packs_view& packs, const input_view<4>& key_tail,
                 const input_view<4>& value_tail, const input_view<4>& queries, float scale, const output_view<4>& out,
                 const output_view<3>& lse, const exec& e) {
  using namespace detail;
  if (const status s = check_device_packs(f, packs); !s) return s;
  if (const status s = check_pack_dims(f, KeyDim, ValueDim); !s) return s;
  if (const status s = check_pack_tensors(f, key_tail, value_tail, 0); !s) return s;
  if (const status s = check_softmax_scale(scale); !s) return s;
  const std::int64_t tail = key_tail.extent[2], n = queries.extent[2];
  if (value_tail.extent[2] != tail) return refuse(status_code::shape_mismatch, "the tails of K and V differ in tokens");
  if (n > tail && !(n == 1 && packs.blocks > 0))
    return refuse(status_code::shape_mismatch, "there are more queries than tokens in the tail");
  if (const status s = check_pack_operands(f, queries, KeyDim, out, ValueDim); !s) return s;
  if (lse.data != nullptr) {
    if (const status s = check_view(lse); !s) return s;
    for (int i = 0; i < 3; ++i)
      if (lse.extent[i] != queries.extent[i])
        return refuse(status_code::shape_mismatch, "lse does not fit the queries");
  }
  if constexpr (KeyDim <= 256 && ValueDim <= 256)
    if (takes_pack_kernels<KeyDim>(f, side::key, packs.blocks) &&
        takes_pack_kernels<ValueDim>(f, side::value, packs.blocks))
      return launch_pack_attention<KeyDim, ValueDim>(pack_side_source(f, side::key, packs, key_tail),
                                                     pack_side_source(f, side::value, packs, value_tail), queries,
                                                     f.kv_heads, scale, out, lse, e);
  return launch_sequence_attention<KeyDim, ValueDim>(pack_side_source(f, side::key, packs, key_tail),
                                                     pack_side_source(f, side::value, packs, value_tail), queries,
                                                     f.kv_heads, scale, out, {lse, {}, {}, 0, 0, 0}, e);
}

}  // namespace packkv
