// SPDX-License-Identifier: Apache-2.0
// The strip-adaptive format: sides whose headers, offsets and bytes are anything, and encoders of any elements.
// Properties: a side is accepted by all calls, which agree, or by none, and then nothing is written; what an encoder
// writes is accepted; what is finite and fits is coded finite.
#include <vector>

#include "sequences.hpp"

namespace {

namespace pk = packkv;
pk::adaptive_spec any_spec(fuzz::input& in, int dim) {
  constexpr float steps[] = {0.1f, 1.0f, 1.0f / 255, 0.004f, 1e-3f, 0.0f, NAN};
  const int how = in.byte();
  return pk::make_adaptive(static_cast<pk::side>(how & 1), dim, static_cast<pk::group_axis>(how >> 1 & 3),
                           steps[in.few(7) - 1], static_cast<pk::transform_kind>(how >> 2 & 2), (how & 16) != 0,
                           static_cast<pk::pack_zero>(how >> 5 & 1));
}

void encode(fuzz::input& in, const pk::adaptive_spec& spec, const pk::adaptive_layout& l, int recent) {
  const int dim = spec.groups.head_dim;
  fuzz::tensor<3> x(in.flag() ? pk::dtype::bfloat16 : pk::dtype::float16, {l.heads, l.tokens, dim}),
      y(pk::dtype::float32, {l.heads, l.tokens, dim});
  fuzz::memory bytes(l.max_bytes), offsets(8 * (l.tiles + 1));
  in.fill(x.bytes);
  pk::device_report report;
  fuzz::check(static_cast<bool>(pk::reference::encode_adaptive(spec, x.in(), recent, bytes.data(), bytes.size(),
                                                               offsets.as<std::int64_t>(), report)),
              "any elements are coded");
  const std::int64_t used = offsets.as<std::int64_t>()[l.tiles];
  fuzz::memory exact(used);
  if (used > 0) std::memcpy(exact.data(), bytes.data(), static_cast<std::size_t>(used));
  fuzz::check(static_cast<bool>(pk::reference::decode_adaptive(spec, exact.data(), used, offsets.as<std::int64_t>(),
                                                               recent, y.view, x.view.type)),
              "what is coded is decoded");
  for (std::int64_t i = 0; i < y.elements() && (report.flags & ~pk::report_code_overflow) == 0; ++i)
    fuzz::check(i / dim % l.tokens >= l.coded_tokens || std::isfinite(y.floats()[i]), "finite tokens are coded finite");
}

/// Headers of any widths, mostly good ones, and offsets that fit them, but for a few edits.
fuzz::memory any_tiles(fuzz::input& in, const pk::adaptive_spec& spec, const pk::adaptive_layout& l,
                       std::int64_t* offsets) {
  constexpr std::uint8_t widths[] = {0, 1, 2, 3, 4, 8, 5, 255};
  const int strips = spec.strip_count();
  std::vector<std::uint8_t> headers;
  std::int64_t end = offsets[0] = l.tiles_offset;
  for (std::int64_t i = 0; i < l.tiles; ++i) {
    std::uint8_t header[32] = {};
    for (int s = 0; s < strips; ++s) header[s] = widths[in.below(in.few(8) == 3 ? 8 : 6)];
    for (int s = 0; s < strips; ++s) header[strips + s] = static_cast<std::uint8_t>(in.byte());
    end += spec.header_bytes() + pk::detail::strips_of(spec, header).words * 4 + spec.number_bytes();
    offsets[i + 1] = end;
    headers.insert(headers.end(), header, header + 32);
  }
  const int edits = in.below(3);
  std::uint64_t edit[2] = {};
  for (int i = 0; i < edits; ++i) edit[i] = in.bits(4);
  const std::int64_t cut = in.few(8) == 3 ? in.below(40) : 0;
  fuzz::memory bytes(end > cut && cut > 0 ? end - cut : end);
  fuzz::input rest = in;
  for (int i = 0; i < 8; ++i) rest.byte();
  rest.fill(bytes);
  for (std::int64_t i = 0; i < l.tiles; ++i)
    for (int b = 0; b < 2 * strips && offsets[i] + b < bytes.size(); ++b)
      bytes[offsets[i] + b] = headers[static_cast<std::size_t>(32 * i + b)];
  for (int i = 0; i < edits; ++i) {
    const std::int64_t at = static_cast<std::int64_t>(edit[i] >> 10);
    if ((edit[i] & 512) == 0)
      reinterpret_cast<std::uint8_t*>(offsets)[at % (8 * (l.tiles + 1))] = static_cast<std::uint8_t>(edit[i]);
    else if (bytes.size() > 0)
      bytes[at % bytes.size()] = static_cast<std::uint8_t>(edit[i]);
  }
  return bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::input in(data, size);
  const int how = in.byte(), dim = fuzz::any_side_dim(in);
  const pk::adaptive_spec spec = any_spec(in, dim);
  constexpr int counts[] = {64, 65, 0, 1, 130};
  const int heads = in.few(2), tokens = counts[in.few(5) - 1], recent = in.few(4) == 1 ? 0 : in.byte();
  pk::adaptive_layout l;
  const bool made = static_cast<bool>(pk::make_adaptive_layout(spec, heads, tokens, recent, l));
  fuzz::check(made == static_cast<bool>(pk::check_adaptive(spec)), "a layout is made for what check_adaptive accepts");
  if (!made) return 0;
  if ((how & 3) == 0) return encode(in, spec, l, recent), 0;

  fuzz::memory offsets(8 * (l.tiles + 1));
  const std::int64_t* const at = offsets.as<std::int64_t>();
  const fuzz::memory bytes = any_tiles(in, spec, l, offsets.as<std::int64_t>());
  const pk::adaptive_view view{spec, bytes.data(), bytes.size(), at, heads, tokens, recent, pk::dtype::float16};
  pk::reference::detail::adaptive_side side;
  fuzz::check_side_calls(
      in, heads, tokens, dim, static_cast<bool>(pk::reference::detail::open_side(view, side)),
      [&](const auto& x) {
        return static_cast<bool>(pk::reference::decode_adaptive(spec, bytes.data(), bytes.size(), at, recent, x));
      },
      [&](const auto& q, float scale, const auto& scores) {
        return static_cast<bool>(pk::reference::adaptive_key_gemv(q, view, scale, scores));
      },
      [&](const auto& w, const auto& out) {
        return static_cast<bool>(pk::reference::adaptive_value_gemv(w, view, out));
      },
      [&](const auto& q, float scale, const auto& out) {
        return static_cast<bool>(pk::reference::adaptive_attention(q, view, view, scale, out));
      });
  return 0;
}
