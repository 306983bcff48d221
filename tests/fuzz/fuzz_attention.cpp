// SPDX-License-Identifier: Apache-2.0
// decode_attention over pages of any bytes, with sinks, ring, window, query and position arrays of any numbers, and
// merge_states. Properties: a refused call writes nothing; where all that is read is finite, an output lies within the
// values that it may be a mean of, and so does the merge of two.
#include <cmath>

#include "paged.hpp"

namespace {

namespace pk = packkv;
constexpr int dim = fuzz::head_dim;
constexpr int canary = 0x5a;

float largest(const float* x, std::int64_t n, float so_far) {
  for (std::int64_t i = 0; i < n; ++i) so_far = std::fabs(x[i]) > so_far || std::isnan(x[i]) ? std::fabs(x[i]) : so_far;
  return so_far;
}

/// Largest magnitude of all that a query may see; not finite if something is not.
float reach(const fuzz::paged_cache& c, const fuzz::tensor<4>* raw[2]) {
  float x[dim], most = 0.0f;
  for (int b = 0; b < c.batch; ++b)
    for (int h = 0; h < c.kv_heads; ++h)
      for (int t = 0; t < c.length(b); ++t)
        for (const pk::side which : {pk::side::key, pk::side::value}) {
          if (!c.decode(which, b, h, t, x)) continue;
          most = largest(x, which == pk::side::key && fuzz::all_finite(x, dim) ? 0 : dim, most);
          if (!std::isfinite(most)) return most;
        }
  for (const fuzz::tensor<4>* t : {raw[0], raw[1]})
    for (std::int64_t i = 0; t != nullptr && i < t->elements(); ++i) {
      x[0] = pk::detail::load_element(static_cast<const std::uint16_t*>(t->in().data) + i, t->view.type);
      most = largest(x, 1, most);
    }
  return most;
}

pk::attention_options any_options(fuzz::input& in, const std::int32_t* context, int max_seq_len) {
  constexpr float scales[] = {1.0f, 0.125f, 1e30f, 1e-30f, 0.0f, -1.0f, INFINITY, NAN},
                  caps[] = {0.0f, 5.0f, 1e-30f, -1.0f};
  pk::attention_options o;
  o.softmax_scale = scales[in.few(8) - 1], o.soft_cap = caps[in.few(4) - 1];
  o.base = in.few(8) == 3 ? pk::lse_base::unset : in.flag() ? pk::lse_base::e : pk::lse_base::two;
  o.window = in.flag() ? in.near(max_seq_len) : 0;
  o.causal = in.flag();
  if (in.flag()) {
    o.context_lens = context;
    o.position_stride = 1 + in.near(3) / 2, o.position_offset = in.near(3);
  }
  o.max_query_len = in.few(8) == 5 ? in.near(3) : 2;
  o.splits = in.few(8) == 5 ? in.near(3) : 0;
  return o;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::input in(data, size);
  fuzz::paged_cache c(in);
  const int n = in.below(4), heads = c.kv_heads * in.few(2), sinks = in.below(3), rows = in.below(3),
            capacity = in.between(1, 4);
  const fuzz::memory context = fuzz::int32s(c.batch, [&](int) { return in.near(c.max_seq_len + 1); }),
                     starts = fuzz::int32s(c.batch + 1, [&](int i) { return i == 0 ? in.near(1) : in.near(n + 1); }),
                     ring_row = fuzz::int32s(c.batch, [&](int) { return in.near(rows); });
  const auto numbers = [](const fuzz::memory& m) { return reinterpret_cast<const std::int32_t*>(m.data()); };
  const pk::attention_options o = any_options(in, numbers(context), c.max_seq_len);
  fuzz::tensor<4> sink(pk::dtype::float16, {c.batch, c.kv_heads, sinks, dim}),
      ring(pk::dtype::bfloat16, {rows, c.kv_heads, capacity, dim});
  const fuzz::tensor<4>* raw[2] = {};
  if (in.flag()) c.view.sinks.keys = c.view.sinks.values = (raw[0] = &sink)->in();
  if (in.flag()) {
    c.view.ring.keys = c.view.ring.values = (raw[1] = &ring)->in();
    c.view.ring.window = in.near(capacity + 1);
    if (in.flag()) c.view.ring.row = numbers(ring_row);
  }
  fuzz::tensor<3> q(pk::dtype::float16, {n, heads, dim}), out(pk::dtype::float32, {n, heads, dim}, canary);
  fuzz::tensor<2> lse(pk::dtype::float32, {n, heads}, canary);
  if (in.flag()) lse.view.data = nullptr;
  in.fill(sink.bytes), in.fill(ring.bytes), c.fill_pages(in), in.fill(q.bytes);

  const fuzz::memory before = out.bytes, lse_before = lse.bytes;
  pk::device_report report;
  const pk::status s =
      pk::reference::decode_attention(q.in(), numbers(starts), c.view, c.parameters, out.view, lse.view, o, report);
  fuzz::check((report.flags & ~fuzz::known_flags) == 0, "a report has known flags");
  if (!s) {
    fuzz::check(out.bytes == before && lse.bytes == lse_before, "a refused call writes nothing");
    return 0;
  }
  for (std::int64_t i = 0; i < q.elements(); ++i)
    if (!std::isfinite(pk::half_to_float(q.bytes.as<std::uint16_t>()[i]))) return 0;
  const float most = reach(c, raw);
  if (!std::isfinite(most)) return 0;
  float unwritten;
  std::memcpy(&unwritten, before.size() > 0 ? before.data() : reinterpret_cast<const std::uint8_t*>("ZZZZ"), 4);
  for (std::int64_t i = 0; i < out.elements(); ++i)
    fuzz::check(out.floats()[i] == unwritten || std::fabs(out.floats()[i]) <= most * 1.001f,
                "an output lies within the values that it is a mean of");
  if (n < 2 || lse.view.data == nullptr) return 0;
  // Two of its rows as states of one.
  fuzz::tensor<3> merged(pk::dtype::float32, {1, heads, dim});
  const auto outs = pk::make_input<4>(out.bytes.data(), pk::dtype::float32, {2, 1, heads, dim});
  const auto lses = pk::make_input<3>(lse.bytes.data(), pk::dtype::float32, {2, 1, heads});
  fuzz::check(static_cast<bool>(pk::reference::merge_states(outs, lses, merged.view, {}, o.base)), "states are merged");
  for (std::int64_t i = 0; i < lse.elements(); ++i)
    if (!(lse.floats()[i] < INFINITY)) return 0;  // scores beyond floats
  for (std::int64_t i = 0; i < merged.elements(); ++i)
    fuzz::check(std::fabs(merged.floats()[i]) <= std::fmax(most, unwritten) * 1.001f,
                "a merge lies between its states");
  return 0;
}
