// SPDX-License-Identifier: Apache-2.0
// Codecs and parameters as data: specs of any numbers, bases, permutations, scales and offsets of any floats, through
// the calls that use them. Properties: a spec is accepted only if it is what the make functions make, with the numbers
// that it was made from; arrays that a spec cannot use are refused before anything is written; what is accepted codes
// and decodes.
#include <cmath>
#include <optional>

#include "paged.hpp"

namespace {

namespace pk = packkv;
constexpr int dim = fuzz::head_dim;

/// A codec from hostile numbers, or a good one of which a field is changed.
pk::codec_spec any_spec(fuzz::input& in, pk::side which) {
  pk::codec_spec spec;
  const int how = in.byte();
  if (how < 128) return fuzz::any_codec(in, which);
  if (how < 192) {
    const int d = how % 4 == 0 ? in.near(513) : dim, leading = in.near(5), group = in.near(65), transform = in.near(4),
              width = in.near(9);
    pk::strip_widths widths;
    widths.count = in.near(5);
    for (std::uint8_t& w : widths.width) w = static_cast<std::uint8_t>(in.below(9));
    const bool plan = how % 2 == 0;
    spec = plan ? pk::make_plan_codec(which, d, static_cast<pk::transform_kind>(transform), widths, leading)
                : pk::make_grouped_codec(which, d, width, group, static_cast<pk::transform_kind>(transform));
    if (pk::check_codec(which, spec))
      fuzz::check(
          spec.head_dim == d && (plan ? spec.leading == leading : spec.group == group && spec.strips.width[0] == width),
          "an accepted codec has the numbers that it was made from");
    return spec;
  }
  spec = fuzz::any_codec(in, which);
  const int i = in.below(pk::max_strips);
  switch (in.below(11)) {
    case 0:
      spec.kind = static_cast<pk::codec_kind>(in.byte());
      break;
    case 1:
      spec.transform = static_cast<pk::transform_kind>(in.byte());
      break;
    case 2:
      spec.head_dim = static_cast<std::int16_t>(in.bits(2));
      break;
    case 3:
      spec.leading = static_cast<std::int16_t>(in.bits(2));
      break;
    case 4:
      spec.group = static_cast<std::int16_t>(in.bits(2));
      break;
    case 5:
      spec.strips.count = static_cast<std::int16_t>(in.bits(2));
      break;
    case 6:
      spec.strips.channels = static_cast<std::int16_t>(in.bits(2));
      break;
    case 7:
      spec.strips.words = static_cast<std::int32_t>(in.bits(4));
      break;
    case 8:
      spec.strips.width[i] = static_cast<std::uint8_t>(in.byte());
      break;
    case 9:
      spec.strips.low[i] = static_cast<std::uint16_t>(in.bits(2));
      break;
    default:
      spec.strips.high[i] = static_cast<std::uint16_t>(in.bits(2));
  }
  return spec;
}

/// Good arrays, of which a few elements are changed.
struct arrays {
  fuzz::parameter_arrays a = fuzz::good_arrays();
  int edits;

  explicit arrays(fuzz::input& in) : edits(in.below(3)) {
    for (int edit = 0; edit < edits; ++edit) {
      const int which = in.below(6), i = in.byte() % (fuzz::max_heads * dim);
      float x = 0.0f;
      const auto bits = static_cast<std::uint32_t>(in.bits(4));
      std::memcpy(&x, &bits, 4);
      if (which == 0) a.column[i] = x;
      if (which == 1) a.leading[i % (fuzz::max_heads * pk::max_leading)] = x;
      if (which == 2) a.offset[i] = x;
      if (which == 3) a.permutation[i] = static_cast<std::int16_t>(bits);
      if (which == 4) a.basis[i * 37] = x;
      if (which == 5) a.inverse[i * 37] = x;
    }
  }
  void give(fuzz::input& in, pk::side_parameters& p) const {
    const int given = in.byte();
    if ((given & 1) != 0) p.column_scale = a.column;
    if ((given & 2) == 0) p.permutation = a.permutation;
    if ((given & 4) == 0) p.leading_scale = a.leading;
    if ((given & 8) != 0) p.channel_offset = a.offset;
    if ((given & 16) == 0) p.basis = a.basis;
    if ((given & 32) == 0) p.basis_inverse = a.inverse;
    constexpr float scales[] = {1.0f, 0.25f, 1e-45f, 3e38f, 0.0f, -1.0f, NAN, INFINITY};
    p.tensor_scale = scales[in.few(8) - 1];
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::input in(data, size);
  const arrays from(in);
  pk::parameters<fuzz::format> p;
  p.format.key_spec = any_spec(in, pk::side::key), p.format.value_spec = any_spec(in, pk::side::value);
  from.give(in, p.key), from.give(in, p.value);
  const bool usable = static_cast<bool>(pk::check_format(p.format));
  const int kv_heads = in.few(2), tokens = in.between(1, 3);
  const fuzz::format plain;  // what the pages of a refused format are measured by
  fuzz::page_pool pool(usable ? p.format : plain, 1, kv_heads, 1, 0, 0xee);
  fuzz::tensor<4> keys(pk::dtype::float16, {1, kv_heads, tokens, dim}),
      values(pk::dtype::bfloat16, {1, kv_heads, tokens, dim});
  in.fill(keys.bytes), in.fill(values.bytes);
  const fuzz::memory old_keys = pool.keys, old_values = pool.values;
  pk::device_report report;
  const pk::page_table table{nullptr, nullptr, 1};
  const pk::status coded = pk::reference::compress(keys.in(), values.in(), nullptr, p, pool.pages, table, report);
  if (!coded) fuzz::check(pool.keys == old_keys && pool.values == old_values, "refused parameters change no page");
  fuzz::check(usable || !coded, "a format that is refused codes nothing");
  if (usable && from.edits == 0 && pk::check_parameters(p))
    fuzz::check(static_cast<bool>(pk::check_parameter_arrays(p, kv_heads)), "good arrays are accepted");
  const pk::status decoded = pk::reference::decompress(pool.pages, table, nullptr, p, keys.view, values.view, report);
  fuzz::check(decoded || !coded, "what is coded is decoded");
  return 0;
}
