// SPDX-License-Identifier: Apache-2.0
// Calibration on tokens and queries of any elements. Properties: what it makes is accepted by check_parameter_arrays,
// or the call is refused and writes nothing.
#include <packkv/calibrate/columns.hpp>

#include "formats.hpp"

namespace {

namespace pk = packkv;
constexpr int dim = fuzz::head_dim;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::input in(data, size);
  constexpr pk::dtype types[] = {pk::dtype::float16, pk::dtype::bfloat16, pk::dtype::float32};
  fuzz::format f;
  const auto which = static_cast<pk::side>(in.below(2));
  pk::codec_spec& spec = which == pk::side::key ? f.key_spec : f.value_spec;
  spec = fuzz::any_codec(in, which);
  if (spec.transform == pk::transform_kind::basis && in.few(64) != 9)  // its eigenvectors take milliseconds
    spec.transform = pk::transform_kind::permutation;
  const int given = in.byte(), tokens = in.below(4);
  fuzz::tensor<2> x(in.pick(types), {tokens, dim});
  fuzz::tensor<3> q(in.pick(types), {in.few(2), in.below(3), dim});
  in.fill(x.bytes), in.fill(q.bytes);
  fuzz::parameter_arrays a = fuzz::good_arrays();
  pk::calibrate::head_output out{a.permutation, a.column, a.leading, a.offset, a.basis, a.inverse};
  if ((given & 1) != 0) out.column_scale = nullptr;
  if ((given & 2) != 0) out.channel_offset = nullptr;
  if ((given & 4) != 0) out.permutation = nullptr;
  if ((given & 8) != 0) out.basis_inverse = nullptr;
  const fuzz::parameter_arrays before = a;
  const pk::status s =
      pk::calibrate::calibrate_head(spec, x.in(), (given & 16) != 0 ? pk::input_view<3>{} : q.in(), out);
  if (!s) {
    fuzz::check(std::memcmp(&a, &before, sizeof a) == 0, "a refused calibration writes nothing");
    return 0;
  }
  const bool permuted = spec.transform == pk::transform_kind::permutation;
  fuzz::check(permuted || std::memcmp(a.permutation, before.permutation, sizeof a.permutation) == 0,
              "a calibration writes a permutation only where there is one");
  fuzz::check(std::memcmp(a.column + dim, before.column + dim, sizeof a.column / 2) == 0 &&
                  std::memcmp(a.basis + dim * dim, before.basis + dim * dim, sizeof a.basis / 2) == 0,
              "a calibration writes the arrays of one head");
  pk::parameters<fuzz::format> p;
  p.format = f;
  pk::side_parameters& side = which == pk::side::key ? p.key : p.value;
  side.permutation = a.permutation, side.leading_scale = a.leading, side.basis = a.basis,
  side.basis_inverse = a.inverse;
  side.column_scale = a.column, side.channel_offset = a.offset;
  fuzz::check(static_cast<bool>(pk::check_parameter_arrays(p, 1)), "calibrated arrays can be used");
  return 0;
}
