// SPDX-License-Identifier: Apache-2.0
// Attention on the GPU for evaluate: compress the cache into contiguous pages, then decode_attention over it.
#include <algorithm>
#include <packkv/device/compress.cuh>
#include <packkv/device/decode_attention.cuh>

#include "gpu.hpp"
#include "gpu_memory.cuh"

namespace evaluate {

namespace {

/// A side's arrays in device memory.
struct side_memory {
  device_memory columns, permutation, leading, offset, basis, basis_inverse;
  pk::side_parameters parameters;

  side_memory(device& d, const gpu_side& side, std::int64_t heads) : parameters(side.parameters) {
    const std::int64_t channels = heads * side.spec.head_dim;
    columns = d.copy(side.parameters.column_scale, channels * 4);
    permutation = d.copy(side.parameters.permutation, channels * 2);
    leading = d.copy(side.parameters.leading_scale, heads * side.spec.leading * 4);
    offset = d.copy(side.parameters.channel_offset, channels * 4);
    basis = d.copy(side.parameters.basis, channels * side.spec.head_dim * 4);
    basis_inverse = d.copy(side.parameters.basis_inverse, channels * side.spec.head_dim * 4);
    parameters.basis = static_cast<const float*>(basis.get());
    parameters.basis_inverse = static_cast<const float*>(basis_inverse.get());
    parameters.column_scale = static_cast<const float*>(columns.get());
    parameters.channel_offset = static_cast<const float*>(offset.get());
    parameters.permutation = static_cast<const std::int16_t*>(permutation.get());
    parameters.leading_scale = static_cast<const float*>(leading.get());
  }
};

/// [heads, tokens, dim] as a cache of one sequence.
pk::input_view<4> as_batch(const pk::input_view<3>& v, const void* data, std::int64_t tokens) {
  pk::input_view<4> out = pk::make_input(data, pk::dtype::float16, {1, v.extent[0], v.extent[1], v.extent[2]});
  out.extent[2] = tokens;
  return out;
}

template <int KeyDim, int ValueDim>
pk::status attend(const gpu_job& job, std::vector<float>& out, pk::device_report& report) {
  const std::int64_t heads = job.keys.extent[0], tokens = job.keys.extent[1], query_heads = job.queries.extent[0],
                     n = job.queries.extent[1];
  device d;
  const device_memory keys = d.copy(job.keys.data, view_bytes(job.keys)),
                      values = d.copy(job.values.data, view_bytes(job.values)),
                      queries = d.copy(job.queries.data, view_bytes(job.queries));
  const side_memory key(d, job.key, heads), value(d, job.value, heads);
  const std::int32_t numbers[] = {static_cast<std::int32_t>(tokens), 0, static_cast<std::int32_t>(n)};
  const device_memory lengths = d.copy(numbers, sizeof numbers), report_memory = d.copy(&report, sizeof report);

  pk::parameters<pk::runtime_format<KeyDim, ValueDim>> params;
  params.format.key_spec = job.key.spec;
  params.format.value_spec = job.value.spec;
  params.key = key.parameters;
  params.value = value.parameters;

  const std::int64_t tiles = pk::ceil_div<std::int64_t>(tokens, pk::tile_tokens);
  pk::cache_view cache;
  cache.pages.num_pages = static_cast<std::int32_t>(tiles);
  cache.pages.kv_heads = static_cast<std::int32_t>(heads);
  cache.pages.key_head_stride = job.key.spec.tile_bytes();
  cache.pages.value_head_stride = job.value.spec.tile_bytes();
  cache.pages.key_page_stride = heads * cache.pages.key_head_stride;
  cache.pages.value_page_stride = heads * cache.pages.value_head_stride;
  const device_memory key_pages = d.allocate(tiles * cache.pages.key_page_stride),
                      value_pages = d.allocate(tiles * cache.pages.value_page_stride);
  cache.pages.key_data = key_pages.get();
  cache.pages.value_data = value_pages.get();
  cache.table.row_stride = tiles;
  cache.seq_lens = static_cast<const std::int32_t*>(lengths.get());
  cache.batch = 1;
  cache.max_seq_len = static_cast<std::int32_t>(tokens);
  if (job.sinks > 0)
    cache.sinks = {as_batch(job.keys, keys.get(), job.sinks), as_batch(job.values, values.get(), job.sinks)};
  if (job.recent > 0) {
    // The tensors themselves serve as a ring that never wraps: slot t % capacity = t.
    const std::int64_t capacity = std::max(tokens, job.recent + n - 1);
    cache.ring = {as_batch(job.keys, keys.get(), capacity), as_batch(job.values, values.get(), capacity), nullptr,
                  job.recent};
  }

  pk::attention_options options;
  options.softmax_scale = job.scale;
  options.window = job.window;
  options.max_query_len = static_cast<std::int32_t>(n);
  const std::int64_t workspace_bytes =
      pk::decode_workspace_bytes<pk::runtime_format<KeyDim, ValueDim>>({1, heads, query_heads, n, tokens, 0});
  const device_memory workspace = d.allocate(workspace_bytes);
  const std::int64_t out_count = query_heads * n * ValueDim;
  const device_memory out_memory = d.allocate(out_count * 4);
  if (!d.error) return d.error;

  pk::exec e{nullptr, workspace.get(), static_cast<std::size_t>(workspace_bytes),
             static_cast<pk::device_report*>(report_memory.get())};
  const auto swap_first_two = [](auto view) {  // [heads, n, dim] as [n, heads, dim]
    std::swap(view.extent[0], view.extent[1]);
    std::swap(view.stride[0], view.stride[1]);
    return view;
  };
  pk::status s = pk::initialize_workspace(e);
  if (s)
    s = pk::compress(as_batch(job.keys, keys.get(), tokens), as_batch(job.values, values.get(), tokens), nullptr,
                     params, cache.pages, cache.table, e);
  if (s)
    s = pk::decode_attention(
        swap_first_two(pk::make_input(queries.get(), pk::dtype::float16, {query_heads, n, KeyDim})), cache.seq_lens + 1,
        cache, params,
        swap_first_two(pk::make_output(out_memory.get(), pk::dtype::float32, {query_heads, n, ValueDim})), {}, options,
        e);
  if (!s) return s;
  out.resize(static_cast<std::size_t>(out_count));
  d.note(cudaMemcpy(out.data(), out_memory.get(), static_cast<std::size_t>(out_count) * 4, cudaMemcpyDeviceToHost));
  d.note(cudaMemcpy(&report, report_memory.get(), sizeof report, cudaMemcpyDeviceToHost));
  return d.error;
}

}  // namespace

bool gpu_present(std::string& name_or_reason) {
  int count = 0;
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count == 0) error = cudaErrorNoDevice;
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, 0);
  // Whether this build has code for the device: an attribute query fails where no image fits.
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, pk::kernel::compress<64>);
  (void)cudaGetLastError();
  name_or_reason = error == cudaSuccess ? properties.name : cudaGetErrorString(error);
  return error == cudaSuccess;
}

packkv::status gpu_attention(const gpu_job& job, std::vector<float>& out, packkv::device_report& report) {
  const std::int64_t key_dim = job.keys.extent[2], value_dim = job.values.extent[2];
  if (key_dim == 192 && value_dim == 128) return attend<192, 128>(job, out, report);
  if (key_dim != value_dim)
    return packkv::refuse(packkv::status_code::unsupported,
                          "the GPU build has D_k = D_v, and 192/128: use --device cpu", key_dim);
  switch (key_dim) {
    case 64:
      return attend<64, 64>(job, out, report);
    case 96:
      return attend<96, 96>(job, out, report);
    case 128:
      return attend<128, 128>(job, out, report);
    case 192:
      return attend<192, 192>(job, out, report);
    case 256:
      return attend<256, 256>(job, out, report);
    case 512:
      return attend<512, 512>(job, out, report);
    default:
      return packkv::refuse(packkv::status_code::unsupported, "head_dim must be 64, 96, 128, 192, 256 or 512", key_dim);
  }
}

}  // namespace evaluate
