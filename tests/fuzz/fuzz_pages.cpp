// SPDX-License-Identifier: Apache-2.0
// Pages of any bytes and tables of any ids, read by decompress, key_gemv and value_gemv. Properties: every call ends
// well; what lies behind a sequence's length is not written; a score with a unit query, and a sum with a unit weight,
// is the decoded element.
#include "paged.hpp"

namespace {

namespace pk = packkv;
constexpr int dim = fuzz::head_dim;
constexpr int canary = 0x5a;

void decompress(const fuzz::paged_cache& c, pk::dtype type) {
  fuzz::tensor<4> keys(type, {c.batch, c.kv_heads, c.max_seq_len, dim}, canary),
      values(type, {c.batch, c.kv_heads, c.max_seq_len, dim}, canary);
  pk::device_report report;
  fuzz::check(static_cast<bool>(pk::reference::decompress(c.view.pages, c.view.table, c.view.seq_lens, c.parameters,
                                                          keys.view, values.view, report)),
              "decompress takes any bytes, ids and lengths");
  fuzz::check((report.flags & ~fuzz::known_flags) == 0, "a report has known flags");
  float x[dim];
  for (int b = 0; b < c.batch; ++b)
    for (int t = c.length(b); t < c.max_seq_len; ++t)
      for (int i = 0; i < 2 * dim; ++i)
        fuzz::check(static_cast<const std::uint8_t*>(pk::detail::address(values.view, b, 0, t, 0))[i] == canary,
                    "decompress leaves what is behind a sequence");
  if (c.batch == 0 || c.length(0) == 0) return;
  const bool present = c.decode(pk::side::key, 0, 0, 0, x);
  const float got = pk::detail::load_element(pk::detail::address(keys.view, 0, 0, 0, 0), type);
  fuzz::check(present || pk::detail::is_nan(got), "tokens without a page are NaN");
}

void key_gemv(const fuzz::paged_cache& c, int group, int channel) {
  fuzz::tensor<3> q(pk::dtype::float32, {c.batch, c.kv_heads * group, dim}),
      scores(pk::dtype::float32, {c.batch, c.kv_heads * group, c.max_seq_len}, canary);
  for (std::int64_t i = channel; i < q.elements(); i += dim) q.bytes.as<float>()[i] = 1.0f;
  pk::device_report report;
  fuzz::check(static_cast<bool>(pk::reference::key_gemv(q.in(), c.view, c.parameters, 1.0f, scores.view, report)),
              "key_gemv takes any bytes, ids and lengths");
  float k[dim];
  for (int b = 0; b < c.batch; ++b)
    for (int t = 0; t < c.length(b); t += 7) {
      const float got = scores.floats()[(b * c.kv_heads * group + group - 1) * c.max_seq_len + t];
      if (!c.decode(pk::side::key, b, 0, t, k))
        fuzz::check(got == -pk::detail::infinity(), "the score of a token without a page is -inf");
      else if (fuzz::all_finite(k, dim))
        fuzz::check(got == k[channel], "the score with a unit query is the key's element");
    }
}

void value_gemv(const fuzz::paged_cache& c, int group, int token) {
  fuzz::tensor<3> w(pk::dtype::float32, {c.batch, c.kv_heads * group, c.max_seq_len}),
      out(pk::dtype::float32, {c.batch, c.kv_heads * group, dim}, canary);
  for (std::int64_t i = token; i < w.elements(); i += c.max_seq_len) w.bytes.as<float>()[i] = 1.0f;
  pk::device_report report;
  fuzz::check(static_cast<bool>(pk::reference::value_gemv(w.in(), c.view, c.parameters, out.view, report)),
              "value_gemv takes any bytes, ids and lengths");
  float v[dim] = {}, other[dim];
  for (int b = 0; b < c.batch; ++b) {
    bool finite = true;
    for (int t = 0; t < c.length(b) && finite; ++t)
      finite = !c.decode(pk::side::value, b, 0, t, other) || fuzz::all_finite(other, dim);
    if (!finite) continue;
    const bool counts = token < c.length(b) && c.decode(pk::side::value, b, 0, token, v);
    for (int i = 0; i < dim; ++i)
      fuzz::check(out.floats()[b * c.kv_heads * group * dim + i] == (counts ? v[i] : 0.0f),
                  "the sum with a unit weight is the value's element");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::input in(data, size);
  const int call = in.below(3), group = in.few(2), place = in.byte();
  fuzz::paged_cache c(in);
  c.fill_pages(in);
  if (call == 0) decompress(c, (place & 1) != 0 ? pk::dtype::bfloat16 : pk::dtype::float16);
  if (call == 1) key_gemv(c, group, place % dim);
  if (call == 2) value_gemv(c, group, c.max_seq_len > 0 ? place % c.max_seq_len : 0);
  return 0;
}
