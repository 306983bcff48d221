// SPDX-License-Identifier: Apache-2.0
// The grouped formats: specs of any numbers, sides of any bytes, encoders of any elements. Properties: a spec is
// accepted only if it is what make_grouped makes; an accepted side is accepted by every call, which agree with each
// other; a refused one is not read and nothing is written; what is finite and fits is coded finite.
#include <packkv/reference/grouped_attention.hpp>

#include "sequences.hpp"

namespace {

namespace pk = packkv;
pk::grouped_spec any_spec(fuzz::input& in, int dim) {
  constexpr int widths[] = {2, 1, 3, 4, 8, 0, 5, 9, -1}, groups[] = {32, 64, 16, 128, 0, 48, -1};
  const auto which = static_cast<pk::side>(in.below(2));
  const auto axis = static_cast<pk::group_axis>(in.below(in.few(8) == 3 ? 5 : 3));
  const int group = axis == pk::group_axis::token ? 0 : groups[in.below(in.few(8) == 3 ? 7 : 2)];
  const int width = widths[in.below(in.few(8) == 3 ? 9 : 5)], how = in.byte();
  return pk::make_grouped(which, in.few(8) == 3 ? how : dim, axis, group, width, static_cast<pk::step_rule>(how % 3),
                          static_cast<pk::transform_kind>(how >> 2 & 2), (how & 16) != 0);
}

/// A few bytes of a spec changed; never its flags, which must be true or false.
void edit(fuzz::input& in, pk::grouped_spec& spec) {
  pk::strip_layout& s = spec.strips;
  const int i = in.below(pk::max_strips);
  switch (in.below(10)) {
    case 0:
      spec.head_dim = static_cast<std::int16_t>(in.bits(2));
      break;
    case 1:
      spec.width = static_cast<std::int16_t>(in.bits(2));
      break;
    case 2:
      spec.group = static_cast<std::int16_t>(in.bits(2));
      break;
    case 3:
      s.count = static_cast<std::int16_t>(in.bits(2));
      break;
    case 4:
      s.channels = static_cast<std::int16_t>(in.bits(2));
      break;
    case 5:
      s.words = static_cast<std::int32_t>(in.bits(4));
      break;
    case 6:
      s.width[i] = static_cast<std::uint8_t>(in.bits(1));
      break;
    case 7:
      s.low[i] = static_cast<std::uint16_t>(in.bits(2));
      break;
    case 8:
      s.high[i] = static_cast<std::uint16_t>(in.bits(2));
      break;
    default:
      s.which = static_cast<pk::side>(in.bits(1));
  }
}

void encode(fuzz::input& in, const pk::grouped_spec& spec, int heads, int tokens, int dim, int recent, bool accepted) {
  pk::grouped_layout layout;
  const bool fits = static_cast<bool>(pk::make_grouped_layout(spec, heads, tokens, recent, layout));
  fuzz::check(fits == accepted, "a layout is made for what check_grouped accepts");
  fuzz::tensor<3> x(in.flag() ? pk::dtype::bfloat16 : pk::dtype::float16, {heads, tokens, dim}),
      y(pk::dtype::float32, {heads, tokens, dim});
  fuzz::memory bytes(layout.total_bytes);
  in.fill(x.bytes);
  pk::device_report report;
  const pk::status s = pk::reference::encode_grouped(spec, x.in(), recent, bytes.data(), bytes.size(), report);
  fuzz::check(static_cast<bool>(s) == (accepted && spec.head_dim == dim), "any elements are coded");
  if (!s) return;
  fuzz::check(
      static_cast<bool>(pk::reference::decode_grouped(spec, bytes.data(), bytes.size(), recent, y.view, x.view.type)),
      "what is coded is decoded");
  for (std::int64_t i = 0; i < y.elements() && report.flags == 0; ++i)
    fuzz::check(i / dim % tokens >= layout.coded_tokens || std::isfinite(y.floats()[i]),
                "finite tokens are coded finite");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::input in(data, size);
  const int how = in.byte(), dim = fuzz::any_side_dim(in);
  pk::grouped_spec spec = any_spec(in, dim);
  const pk::grouped_spec made = spec;
  if ((how & 28) == 28) edit(in, spec);
  const bool accepted = static_cast<bool>(pk::check_grouped(spec));
  constexpr int counts[] = {64, 65, 0, 1, 130};
  const int heads = in.few(2), tokens = counts[in.few(5) - 1], recent = in.few(4) == 1 ? 0 : in.byte();
  if ((how & 3) == 0) return encode(in, spec, heads, tokens, dim, recent, accepted), 0;

  pk::grouped_layout layout;
  if (!pk::make_grouped_layout(spec, heads, tokens, recent, layout)) {
    fuzz::check(!accepted, "a layout is made for what check_grouped accepts");
    static_cast<void>(pk::make_grouped_layout(made, heads, tokens, recent, layout));
  }
  fuzz::memory bytes(layout.total_bytes);
  const std::int64_t claimed = in.few(8) == 5 ? in.near(layout.total_bytes) : layout.total_bytes;
  const pk::dtype tail = in.few(16) == 9 ? pk::dtype::float32 : in.flag() ? pk::dtype::float16 : pk::dtype::bfloat16;
  const pk::grouped_view view{spec, bytes.data(), claimed, heads, tokens, recent, tail};
  const bool good = accepted && spec.head_dim == dim && claimed == layout.total_bytes && tail != pk::dtype::float32;
  fuzz::input rest = in;
  for (int i = 0; i < 8; ++i) rest.byte();
  rest.fill(bytes);
  fuzz::check_side_calls(
      in, heads, tokens, dim, good,
      [&](const auto& x) {
        return static_cast<bool>(pk::reference::decode_grouped(spec, bytes.data(), claimed, recent, x, tail));
      },
      [&](const auto& q, float scale, const auto& scores) {
        return static_cast<bool>(pk::reference::grouped_key_gemv(q, view, scale, scores));
      },
      [&](const auto& w, const auto& out) {
        return static_cast<bool>(pk::reference::grouped_value_gemv(w, view, out));
      },
      [&](const auto& q, float scale, const auto& out) {
        return static_cast<bool>(pk::reference::grouped_attention(q, view, view, scale, out));
      });
  return 0;
}
