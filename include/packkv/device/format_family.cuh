// SPDX-License-Identifier: Apache-2.0
// A family of compiled formats, one of which is chosen at run time: what an engine uses whose layers differ in plan.
// One idea: a run-time format that equals a compiled one takes its kernel; any other is refused, never run slowly.
//   using family = packkv::format_family<plan_a, plan_b, plan_c>;
//   status s = family::decode_attention(queries, query_start_loc, cache, params, out, lse, options, exec);
#pragma once

#include <packkv/device/decode_attention.cuh>

namespace packkv {

/// Formats: cache_format types with the same head dims.
template <class First, class... Others>
struct format_family {
  static constexpr int key_head_dim = First::key_head_dim, value_head_dim = First::value_head_dim;
  static_assert(((Others::key_head_dim == key_head_dim && Others::value_head_dim == value_head_dim) && ...),
                "the formats of a family have the same head dims");
  using runtime_type = runtime_format<key_head_dim, value_head_dim>;

  /// Number of the format's equal in the family, or -1.
  static int find(const runtime_type& format) {
    const bool equal[] = {same<First>(format), same<Others>(format)...};
    for (int i = 0; i < static_cast<int>(1 + sizeof...(Others)); ++i)
      if (equal[i]) return i;
    return -1;
  }

  /// Workspace that serves every format of the family; see packkv::decode_workspace_bytes.
  static std::int64_t decode_workspace_bytes(const decode_maxima& m) {
    std::int64_t most = packkv::decode_workspace_bytes<First>(m);
    ((most = most < 0 ? most : max_of(most, packkv::decode_workspace_bytes<Others>(m))), ...);
    return most;
  }

  /// packkv::decode_attention by the kernel of the format that equals params.format. \return unsupported if none does.
  static status decode_attention(const input_view<3>& queries, const std::int32_t* query_start_loc,
                                 const cache_view& cache, const parameters<runtime_type>& params,
                                 const output_view<3>& out, const output_view<2>& lse, const attention_options& options,
                                 const exec& e) {
    if (const status s = check_format(params.format); !s) return s;
    status result = refuse(status_code::unsupported, "the format is not one of the family's");
    const auto attend = [&](auto format) {
      const parameters<decltype(format)> p{format, params.key, params.value};
      result = packkv::decode_attention(queries, query_start_loc, cache, p, out, lse, options, e);
      return true;
    };
    (void)((same<First>(params.format) && attend(First{})) || ... || (same<Others>(params.format) && attend(Others{})));
    return result;
  }

 private:
  static bool same(const codec_spec& a, const codec_spec& b) {
    return a.kind == b.kind && a.transform == b.transform && a.head_dim == b.head_dim && a.leading == b.leading &&
           a.group == b.group && detail::same_layout(a.strips, b.strips);
  }
  template <class Format>
  static bool same(const runtime_type& format) {
    return same(format.key(), Format::key()) && same(format.value(), Format::value());
  }
};

}  // namespace packkv
