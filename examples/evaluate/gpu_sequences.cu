// SPDX-License-Identifier: Apache-2.0
// Formats of whole caches on the GPU for evaluate: encode one sequence, attend to the stored bytes.
#include <algorithm>
#include <packkv/device/adaptive.cuh>
#include <packkv/device/grouped.cuh>
#include <packkv/device/pack_attention.cuh>
#include <packkv/device/packs.cuh>
#include <packkv/reference/packs.hpp>

#include "gpu.hpp"
#include "gpu_memory.cuh"

namespace evaluate {

namespace {

/// What all formats need on the device: inputs, output, workspace, report.
template <int HeadDim>
struct call_memory {
  device d;
  std::int64_t heads, tokens, query_heads, n, out_count, workspace_bytes;
  device_memory keys, values, queries, out, workspace, report;

  call_memory(const gpu_sequence_job& job, const pk::device_report& zero)
      : heads(job.keys.extent[0]),
        tokens(job.keys.extent[1]),
        query_heads(job.queries.extent[0]),
        n(job.queries.extent[1]),
        out_count(query_heads * n * HeadDim),
        workspace_bytes(pk::sequence_workspace_bytes<HeadDim>({1, heads, query_heads, n, tokens, 0})),
        keys(d.copy(job.keys.data, view_bytes(job.keys))),
        values(d.copy(job.values.data, view_bytes(job.values))),
        queries(d.copy(job.queries.data, view_bytes(job.queries))),
        out(d.allocate(out_count * 4)),
        workspace(d.allocate(workspace_bytes)),
        report(d.copy(&zero, sizeof zero)) {}

  pk::exec exec() const {
    return {nullptr, workspace.get(), static_cast<std::size_t>(workspace_bytes),
            static_cast<pk::device_report*>(report.get())};
  }
  pk::input_view<3> on_device(const pk::input_view<3>& x, const device_memory& memory) const {
    return pk::make_input<3>(memory.get(), x.type, {x.extent[0], x.extent[1], x.extent[2]});
  }
  pk::output_view<3> out_view() const {
    return pk::make_output<3>(out.get(), pk::dtype::float32, {query_heads, n, HeadDim});
  }
  pk::status read(std::vector<float>& to, pk::device_report& r) {
    to.resize(static_cast<std::size_t>(out_count));
    d.note(cudaMemcpy(to.data(), out.get(), static_cast<std::size_t>(out_count) * 4, cudaMemcpyDeviceToHost));
    d.note(cudaMemcpy(&r, report.get(), sizeof r, cudaMemcpyDeviceToHost));
    return d.error;
  }
};

/// One side, coded on the device but for its newest `tail` tokens.
template <int HeadDim>
pk::status encode(const pk::grouped_spec& spec, const pk::input_view<3>& x, std::int64_t tail, device& d,
                  device_memory (&memory)[2], pk::grouped_view& view, const pk::exec& e) {
  pk::grouped_layout layout;
  if (const pk::status s = pk::make_grouped_layout(spec, x.extent[0], x.extent[1], tail, layout); !s) return s;
  memory[0] = d.allocate(layout.total_bytes);
  if (!d.error) return d.error;
  auto* const bytes = static_cast<std::uint8_t*>(memory[0].get());
  view = {spec, bytes, layout.total_bytes, x.extent[0], x.extent[1], tail, x.type};
  return pk::encode_grouped<HeadDim>(spec, x, tail, bytes, layout.total_bytes, e);
}
template <int HeadDim>
pk::status encode(const pk::adaptive_spec& spec, const pk::input_view<3>& x, std::int64_t tail, device& d,
                  device_memory (&memory)[2], pk::adaptive_view& view, const pk::exec& e) {
  pk::adaptive_layout layout;
  if (const pk::status s = pk::make_adaptive_layout(spec, x.extent[0], x.extent[1], tail, layout); !s) return s;
  memory[0] = d.allocate(layout.max_bytes);
  memory[1] = d.allocate(8 * (layout.tiles + 1));
  if (!d.error) return d.error;
  auto* const bytes = static_cast<std::uint8_t*>(memory[0].get());
  auto* const offsets = static_cast<std::int64_t*>(memory[1].get());
  view = {spec, bytes, layout.max_bytes, offsets, x.extent[0], x.extent[1], tail, x.type};
  return pk::encode_adaptive<HeadDim>(spec, x, tail, bytes, layout.max_bytes, offsets, e);
}

template <int HeadDim>
pk::status attend(const pk::input_view<3>& queries, const pk::grouped_view& keys, const pk::grouped_view& values,
                  float scale, const pk::output_view<3>& out, const pk::exec& e, const pk::sequence_options& options) {
  return pk::grouped_attention<HeadDim, HeadDim>(queries, keys, values, scale, out, {}, e, options);
}
template <int HeadDim>
pk::status attend(const pk::input_view<3>& queries, const pk::adaptive_view& keys, const pk::adaptive_view& values,
                  float scale, const pk::output_view<3>& out, const pk::exec& e, const pk::sequence_options& options) {
  return pk::adaptive_attention<HeadDim, HeadDim>(queries, keys, values, scale, out, {}, e, options);
}

template <int HeadDim, class View, class Spec>
pk::status run(const gpu_sequence_job& job, const Spec& key, const Spec& value, std::int64_t tail,
               std::vector<float>& out, pk::device_report& report) {
  call_memory<HeadDim> m(job, report);
  if (!m.d.error) return m.d.error;
  const pk::input_view<3> k = m.on_device(job.keys, m.keys), v = m.on_device(job.values, m.values);
  device_memory key_memory[2], value_memory[2];
  View keys, values;
  // A side that is not coded is all tail.
  pk::status s = pk::initialize_workspace(m.exec());
  if (s) s = encode<HeadDim>(key, k, job.code_keys ? tail : m.tokens, m.d, key_memory, keys, m.exec());
  if (s) s = encode<HeadDim>(value, v, job.code_values ? tail : m.tokens, m.d, value_memory, values, m.exec());
  const pk::sequence_options options{k, v, job.sinks, job.recent, job.window};
  if (s)
    s = attend<HeadDim>(m.on_device(job.queries, m.queries), keys, values, job.scale, m.out_view(), m.exec(), options);
  return s ? m.read(out, report) : s;
}

/// Packs of one side in device memory.
struct pack_memory {
  device_memory ranges, offsets, data;
  std::int64_t capacity;

  pack_memory(device& d, const pk::pack_format& f, pk::side which, std::int64_t blocks)
      : ranges(d.allocate(blocks * f.batch * pk::range_count(f, which) * 4)),
        offsets(d.allocate(8 * (pk::tile_count(f, blocks) + 1))),
        capacity(pk::max_pack_bytes(f, which, blocks)) {
    data = d.allocate(capacity);
  }
  pk::pack_side write() const {
    return {static_cast<pk::pack_range*>(ranges.get()), static_cast<std::int64_t*>(offsets.get()),
            static_cast<std::uint8_t*>(data.get()), capacity};
  }
  pk::const_pack_side read() const {
    const pk::pack_side s = write();
    return {s.ranges, s.offsets, s.data, capacity};
  }
};

/// x [heads, tokens, dim] of 16-bit elements with the tokens of every block in the order of its slots.
std::vector<std::uint16_t> in_slots(const pk::input_view<3>& x, const std::vector<std::uint8_t>& order) {
  const auto* const from = static_cast<const std::uint16_t*>(x.data);
  const std::int64_t tokens = x.extent[1], dim = x.extent[2];
  std::vector<std::uint16_t> to(from, from + x.extent[0] * tokens * dim);
  for (std::int64_t h = 0; h < x.extent[0]; ++h)
    for (std::int64_t t = 0; t < static_cast<std::int64_t>(order.size()); ++t) {
      const std::int64_t token = t / 64 * 64 + order[static_cast<std::size_t>(t)];
      std::copy_n(from + (h * tokens + token) * dim, dim, to.data() + (h * tokens + t) * dim);
    }
  return to;
}

/// `rows` tokens of [heads, tokens, dim] from `first` on, as a batch of one.
pk::input_view<4> tokens_from(const pk::input_view<3>& x, std::int64_t first) {
  pk::input_view<4> out = pk::detail::as_batch(x);
  out.data = static_cast<const char*>(x.data) + first * x.stride[1];
  out.extent[2] -= first;
  return out;
}

template <int HeadDim>
pk::status run_packs(const gpu_sequence_job& job, const pk::pack_format& f, std::vector<float>& out,
                     pk::device_report& report) {
  call_memory<HeadDim> m(job, report);
  const std::int64_t blocks = pk::coded_blocks(m.tokens), tail = m.tokens - blocks * pk::tile_tokens;
  if (job.sinks > 0 || job.window > 0 || (job.recent > 0 && job.recent + m.n - 1 > tail))
    return pk::refuse(
        pk::status_code::unsupported,
        "packs have no order of tokens on the GPU: no sinks, no window, no recent tokens beyond the tail");
  const pack_memory key(m.d, f, pk::side::key, blocks), value(m.d, f, pk::side::value, blocks);
  std::vector<std::uint8_t> order(static_cast<std::size_t>(blocks * pk::tile_tokens));
  if (f.order == pk::token_order::greedy)
    if (const pk::status s = pk::reference::token_orders(f, pk::detail::as_batch(job.keys),
                                                         pk::detail::as_batch(job.values), blocks, order.data());
        !s)
      return s;
  const device_memory device_order = m.d.copy(order.data(), static_cast<std::int64_t>(order.size()));
  if (!m.d.error) return m.d.error;
  auto* const slots = static_cast<std::uint8_t*>(device_order.get());
  const bool given = f.order == pk::token_order::greedy;
  const pk::input_view<3> k = m.on_device(job.keys, m.keys), v = m.on_device(job.values, m.values);
  pk::status s = pk::initialize_workspace(m.exec());
  if (s)
    s = pk::compress(f, pk::detail::as_batch(k), pk::detail::as_batch(v), blocks, key.write(), value.write(),
                     {given ? slots : nullptr, given ? nullptr : slots}, m.exec());
  if (!s) return s;
  m.d.note(cudaMemcpy(order.data(), slots, order.size(), cudaMemcpyDeviceToHost));
  if (!m.d.error) return m.d.error;

  const pk::packs_view packs{key.read(), value.read(), blocks};
  const pk::input_view<4> queries = pk::detail::as_batch(m.on_device(job.queries, m.queries));
  const pk::output_view<4> to = pk::detail::as_batch(m.out_view());
  const pk::input_view<4> key_tail = tokens_from(k, blocks * pk::tile_tokens),
                          value_tail = tokens_from(v, blocks * pk::tile_tokens);
  if (job.code_keys && job.code_values) {
    s = pk::attention<HeadDim, HeadDim>(f, packs, key_tail, value_tail, queries, job.scale, to, {}, m.exec());
  } else {
    // The side that is not coded, in the order of the other one's slots.
    const std::vector<std::uint16_t> raw = in_slots(job.code_keys ? job.values : job.keys, order);
    const device_memory memory = m.d.copy(raw.data(), static_cast<std::int64_t>(raw.size()) * 2);
    if (!m.d.error) return m.d.error;
    const pk::warp::raw_source exact{pk::detail::as_batch(m.on_device(job.keys, memory))};
    const pk::warp::pack_source coded = pk::detail::pack_side_source(f, job.code_keys ? pk::side::key : pk::side::value,
                                                                     packs, job.code_keys ? key_tail : value_tail);
    s = job.code_keys ? pk::detail::launch_sequence_attention<HeadDim, HeadDim>(coded, exact, queries, m.heads,
                                                                                job.scale, to, {}, m.exec())
                      : pk::detail::launch_sequence_attention<HeadDim, HeadDim>(exact, coded, queries, m.heads,
                                                                                job.scale, to, {}, m.exec());
    if (s) s = m.read(out, report);  // before the memory goes
    return s;
  }
  return s ? m.read(out, report) : s;
}

/// Calls f(head dim as a constant). Every head dim costs a minute of compilation, so there are few.
template <class Function>
pk::status with_head_dim(const gpu_sequence_job& job, Function&& f) {
  const std::int64_t dim = job.keys.extent[2];
  if (dim == job.values.extent[2]) {
    if (dim == 64) return f(std::integral_constant<int, 64>{});
    if (dim == 128) return f(std::integral_constant<int, 128>{});
    if (dim == 256) return f(std::integral_constant<int, 256>{});
  }
  return pk::refuse(pk::status_code::unsupported,
                    "this program has formats of whole caches for D_k = D_v = 64, 128 and 256 on the GPU", dim);
}

}  // namespace

pk::status gpu_attention(const gpu_sequence_job& job, const pk::grouped_spec& key, const pk::grouped_spec& value,
                         std::int64_t tail, std::vector<float>& out, pk::device_report& report) {
  return with_head_dim(
      job, [&](auto dim) { return run<decltype(dim)::value, pk::grouped_view>(job, key, value, tail, out, report); });
}

pk::status gpu_attention(const gpu_sequence_job& job, const pk::adaptive_spec& key, const pk::adaptive_spec& value,
                         std::int64_t tail, std::vector<float>& out, pk::device_report& report) {
  return with_head_dim(
      job, [&](auto dim) { return run<decltype(dim)::value, pk::adaptive_view>(job, key, value, tail, out, report); });
}

pk::status gpu_attention(const gpu_sequence_job& job, const pk::pack_format& format, std::vector<float>& out,
                         pk::device_report& report) {
  return with_head_dim(job, [&](auto dim) { return run_packs<decltype(dim)::value>(job, format, out, report); });
}

}  // namespace evaluate
