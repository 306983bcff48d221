// SPDX-License-Identifier: Apache-2.0
// Codec choices become specs and calibrated arrays.
#include "coding.hpp"

#include <packkv/calibrate/columns.hpp>

#include "parallel.hpp"

namespace evaluate {
namespace {

using packkv::codec_kind;
using packkv::side;
using packkv::transform_kind;

/// The FP8 scale that maps the largest magnitude to 448; 1 for a tensor of zeros.
float computed_tensor_scale(const npy_array& a) {
  unsigned largest = 0;  // magnitudes of half order as their bits do
  for (std::int64_t i = 0; i < a.elements(); ++i) largest = packkv::max_of<unsigned>(largest, a.data()[i] & 0x7fffu);
  return largest == 0 ? 1.0f : packkv::half_to_float(static_cast<std::uint16_t>(largest)) / 448.0f;
}

packkv::codec_spec make_spec(side which, const side_choice& choice, int head_dim) {
  if (choice.kind != codec_kind::plan) return packkv::make_element_codec(choice.kind, head_dim);
  packkv::strip_widths widths = choice.widths;
  if (widths.count == 1) {
    widths.count = head_dim / packkv::strip_channels(which, head_dim);
    for (int i = 1; i < widths.count; ++i) widths.width[i] = widths.width[0];
  }
  return packkv::make_plan_codec(which, head_dim, choice.transform, widths, choice.leading);
}

template <class T>
T* row_or_null(std::vector<T>& rows, int head, int length) {
  return rows.empty() ? nullptr : rows.data() + static_cast<std::ptrdiff_t>(head) * length;
}

/// Calibrates every head of a plan side. `queries` is null for values.
outcome calibrate(const npy_array& samples, const npy_array* queries, int threads, coded_side& s) {
  const int heads = static_cast<int>(samples.extent(0));
  std::vector<packkv::status> states(static_cast<std::size_t>(heads));
  parallel_for(heads, threads, [&](int h, int) {
    const auto x =
        packkv::make_input<2>(samples.row(h, 0), packkv::dtype::float16, {samples.extent(1), samples.extent(2)});
    packkv::input_view<3> q;
    if (queries != nullptr) {
      const std::int64_t group = queries->extent(0) / heads;
      q = packkv::make_input<3>(queries->row(h * group, 0), packkv::dtype::float16,
                                {group, queries->extent(1), queries->extent(2)});
    }
    states[static_cast<std::size_t>(h)] = packkv::calibrate::calibrate_head(
        s.spec, x, q,
        {row_or_null(s.permutation, h, s.spec.head_dim), row_or_null(s.column_scale, h, s.spec.head_dim),
         row_or_null(s.leading_scale, h, s.spec.leading), row_or_null(s.channel_offset, h, s.spec.head_dim),
         row_or_null(s.basis, h, s.spec.head_dim * s.spec.head_dim),
         row_or_null(s.basis_inverse, h, s.spec.head_dim * s.spec.head_dim)});
  });
  for (const packkv::status& state : states)
    if (!state) return failure(state.message);
  return {};
}

/// Prepares one side. `calibration` is null without calibration files; `queries` is null for values.
outcome make_side(side which, const side_choice& choice, step_choice steps, const npy_array& data,
                  const npy_array* calibration, const npy_array* queries, int threads, coded_side& s) {
  const int head_dim = static_cast<int>(data.extent(2));
  const std::string name = which == side::key ? "k" : "v";
  if (choice.kind == codec_kind::plan && choice.widths.count > 1 &&
      choice.widths.count != head_dim / packkv::strip_channels(which, head_dim))
    return failure(name + " has " + std::to_string(choice.widths.count) + " widths, but head_dim " +
                   std::to_string(head_dim) + " has " +
                   std::to_string(head_dim / packkv::strip_channels(which, head_dim)) + " strips");
  s.spec = make_spec(which, choice, head_dim);
  if (const packkv::status state = packkv::check_codec(which, s.spec); !state)
    return failure(name + ": " + state.message);
  if (choice.kind == codec_kind::fp8) {
    s.tensor_scale = choice.tensor_scale > 0.0f ? choice.tensor_scale
                                                : computed_tensor_scale(calibration != nullptr ? *calibration : data);
    return {};
  }
  if (choice.kind != codec_kind::plan) return {};

  const bool permuted = choice.transform == transform_kind::permutation,
             has_basis = choice.transform == transform_kind::basis;
  if (calibration == nullptr && (permuted || has_basis))
    return failure("transform_" + name + (permuted ? "=permutation" : "=basis") + " needs the --calibrate files");
  if (calibration == nullptr && choice.leading > 0) return failure("leading needs the --calibrate files");
  if (calibration == nullptr && choice.center) return failure("center_" + name + "=1 needs the --calibrate files");
  if (calibration == nullptr) return {};
  const std::size_t heads = static_cast<std::size_t>(data.extent(0)), dim = static_cast<std::size_t>(head_dim);
  if (steps != step_choice::gaussian) s.column_scale.resize(heads * dim);
  if (permuted) s.permutation.resize(heads * dim);
  if (has_basis) s.basis.resize(heads * dim * dim), s.basis_inverse.resize(heads * dim * dim);
  if (choice.center) s.channel_offset.resize(heads * dim);
  s.leading_scale.resize(heads * static_cast<std::size_t>(choice.leading));
  return calibrate(*calibration, queries, threads, s);
}

}  // namespace

packkv::side_parameters coded_side::parameters() const {
  packkv::side_parameters p;
  if (!column_scale.empty()) p.column_scale = column_scale.data();
  if (!permutation.empty()) p.permutation = permutation.data();
  if (!basis.empty()) p.basis = basis.data(), p.basis_inverse = basis_inverse.data();
  if (!leading_scale.empty()) p.leading_scale = leading_scale.data();
  if (!channel_offset.empty()) p.channel_offset = channel_offset.data();
  p.tensor_scale = tensor_scale;
  return p;
}

std::int64_t coded_side::model_bytes() const {
  return static_cast<std::int64_t>(
      column_scale.size() * sizeof(float) + permutation.size() * sizeof(std::int16_t) +
      (leading_scale.size() + channel_offset.size() + basis.size() + basis_inverse.size()) * sizeof(float));
}

outcome make_coding(const codec_choice& choice, const kv_cache& cache, const kv_cache* calibration, int threads,
                    coding& out) {
  const auto wrong = [&](const outcome& o) { return failure("codec '" + choice.text + "': " + o.error()); };
  out = {};
  out.text = choice.text;
  if (choice.packs) {
    if (outcome o = make_pack_coder(*choice.packs, cache, out.whole_cache); !o) return wrong(o);
    return {};
  }
  if (choice.groups) {
    if (outcome o = make_group_coder(*choice.groups, cache, out.whole_cache); !o) return wrong(o);
    return {};
  }
  const kv_cache* const c = calibration;
  if (c == nullptr && choice.steps == step_choice::calibrated)
    return wrong(failure("steps=calibrated needs the --calibrate files"));
  if (outcome o = make_side(side::key, choice.key, choice.steps, cache.k, c ? &c->k : nullptr, c ? &c->q : nullptr,
                            threads, out.key);
      !o)
    return wrong(o);
  if (outcome o =
          make_side(side::value, choice.value, choice.steps, cache.v, c ? &c->v : nullptr, nullptr, threads, out.value);
      !o)
    return wrong(o);
  return {};
}

}  // namespace evaluate
