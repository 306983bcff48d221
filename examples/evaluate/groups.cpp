// SPDX-License-Identifier: Apache-2.0
// Encodes both sides of a cache to the bytes of a grouped or strip-adaptive format and decodes them.
#include "groups.hpp"

#include <algorithm>
#include <packkv/reference/grouped.hpp>
#include <packkv/reference/strip_adaptive.hpp>

#include "packs.hpp"
#include "text.hpp"

namespace evaluate {
namespace {

using packkv::adaptive_spec;
using packkv::group_axis;
using packkv::grouped_spec;
using packkv::side;
using packkv::step_rule;

constexpr named<group_axis> axes[] = {{"token", group_axis::token},
                                      {"vector", group_axis::vector},
                                      {"channel", group_axis::channel},
                                      {"block", group_axis::block}};
constexpr named<step_rule> step_rules[] = {
    {"minmax", step_rule::min_max}, {"gaussian", step_rule::gaussian}, {"gaussian_mean", step_rule::gaussian_mean}};

bool parse_flag(const std::string& text, bool& flag) {
  flag = text == "1";
  return text == "0" || text == "1";
}

bool parse_bits(const std::string& text, std::int32_t& bits) {
  return text.size() == 1 && parse_count(text, bits) && bits > 0 && packkv::is_plan_width(bits);
}

bool parse_tokens(const std::string& text, int& tokens) {
  tokens = text == "32" ? 32 : text == "64" ? 64 : text == "128" ? 128 : 0;
  return tokens > 0;
}

bool parse_step(const std::string& text, float& step) { return parse_positive(text, step) && step <= 1.0f; }

/// 16-byte aligned memory.
class aligned_bytes {
 public:
  explicit aligned_bytes(std::int64_t size) : chunks_(static_cast<std::size_t>(size / 16 + 1)) {}
  std::uint8_t* data() { return chunks_[0].bytes; }

 private:
  struct alignas(16) chunk {
    std::uint8_t bytes[16];
  };
  std::vector<chunk> chunks_;
};

grouped_spec make_spec(side which, int head_dim, const group_side& s, step_rule steps) {
  const int group = s.axis == group_axis::vector && s.group == 0 ? head_dim : s.group;
  return packkv::make_grouped(which, head_dim, s.axis, group, s.width, steps,
                              s.hadamard ? packkv::transform_kind::hadamard : packkv::transform_kind::identity,
                              s.centred);
}

adaptive_spec make_spec(side which, int head_dim, const group_side& s) {
  return packkv::make_adaptive(which, head_dim, s.axis, s.relative_step,
                               s.hadamard ? packkv::transform_kind::hadamard : packkv::transform_kind::identity,
                               s.centred, s.zero);
}

int block_tokens(const grouped_spec& spec) { return spec.block_tokens(); }
int block_tokens(const adaptive_spec& spec) { return spec.groups.block_tokens(); }
packkv::status check(const grouped_spec& spec) { return packkv::check_grouped(spec); }
packkv::status check(const adaptive_spec& spec) { return packkv::check_adaptive(spec); }

/// Codes x [heads, tokens, D] but for its newest `recent` tokens, and decodes all of it into y. `stored`: every byte
/// but the 16-bit tail.
packkv::status code(const grouped_spec& spec, const packkv::input_view<3>& x, std::int64_t recent,
                    const packkv::output_view<3>& y, std::int64_t& stored) {
  packkv::grouped_layout layout;
  if (const packkv::status s = packkv::make_grouped_layout(spec, x.extent[0], x.extent[1], recent, layout); !s)
    return s;
  aligned_bytes bytes(layout.total_bytes);
  packkv::device_report report;
  if (const packkv::status s =
          packkv::reference::encode_grouped(spec, x, recent, bytes.data(), layout.total_bytes, report);
      !s)
    return s;
  const packkv::grouped_bytes counted = packkv::count_grouped(spec, layout);
  stored = counted.total() - counted.tail;
  return packkv::reference::decode_grouped(spec, bytes.data(), layout.total_bytes, recent, y);
}

packkv::status code(const adaptive_spec& spec, const packkv::input_view<3>& x, std::int64_t recent,
                    const packkv::output_view<3>& y, std::int64_t& stored) {
  packkv::adaptive_layout layout;
  if (const packkv::status s = packkv::make_adaptive_layout(spec, x.extent[0], x.extent[1], recent, layout); !s)
    return s;
  aligned_bytes bytes(layout.max_bytes);
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(layout.tiles) + 1);
  packkv::device_report report;
  if (const packkv::status s =
          packkv::reference::encode_adaptive(spec, x, recent, bytes.data(), layout.max_bytes, offsets.data(), report);
      !s)
    return s;
  const std::int64_t tail = layout.shared_offset - layout.tail_offset;
  stored = packkv::adaptive_total_bytes(layout, offsets.back()) - tail;
  return packkv::reference::decode_adaptive(spec, bytes.data(), offsets.back(), offsets.data(), recent, y);
}

/// Codes the first `coded` tokens of one side into `decoded` [heads, coded, D].
template <class Spec>
outcome code_side(const Spec& spec, const npy_array& a, std::int64_t coded, std::vector<float>& decoded,
                  std::int64_t& stored) {
  const std::int64_t heads = a.extent(0), tokens = a.extent(1), dim = a.extent(2);
  decoded.resize(static_cast<std::size_t>(heads * tokens * dim));
  const auto y = packkv::make_output<3>(decoded.data(), packkv::dtype::float32, {heads, tokens, dim});
  if (const packkv::status s = code(spec, view_of(a), tokens - coded, y, stored); !s) return failure(s.message);
  for (std::int64_t h = 1; h < heads; ++h)  // closes the gaps that the tails leave
    std::copy_n(decoded.begin() + h * tokens * dim, coded * dim, decoded.begin() + h * coded * dim);
  decoded.resize(static_cast<std::size_t>(heads * coded * dim));
  return {};
}

/// Both sides leave the 16-bit tail together, in the larger one's blocks.
template <class Spec>
std::int64_t coded_tokens(const Spec& key, const Spec& value, std::int64_t recent, std::int64_t tokens) {
  const int block = std::max(block_tokens(key), block_tokens(value));  // 64 or 128
  return tokens > recent ? (tokens - recent) / block * block : 0;
}

template <class Spec>
outcome code_cache(const Spec& key, const Spec& value, std::int64_t recent, const kv_cache& cache, coded_cache& out) {
  out = {};
  out.tokens = coded_tokens(key, value, recent, cache.tokens());
  if (out.tokens == 0) return {};  // a cache too short for a block is 16-bit
  if (outcome o = code_side(key, cache.k, out.tokens, out.k, out.key_bytes); !o) return o;
  return code_side(value, cache.v, out.tokens, out.v, out.value_bytes);
}

template <class Spec>
outcome make_coder(const Spec& key, const Spec& value, std::int64_t recent, whole_cache_codec& coder) {
  if (const packkv::status s = check(key); !s) return failure(std::string("k: ") + s.message);
  if (const packkv::status s = check(value); !s) return failure(std::string("v: ") + s.message);
  coder.code = [=](const kv_cache& c, coded_cache& out) { return code_cache(key, value, recent, c, out); };
  coder.attend_on_gpu = [=](const gpu_sequence_job& job, std::vector<float>& out, packkv::device_report& report) {
    const std::int64_t tokens = job.keys.extent[1];
    return gpu_attention(job, key, value, tokens - coded_tokens(key, value, recent, tokens), out, report);
  };
  return {};
}

}  // namespace

group_choice default_groups(const std::string& name) {
  group_choice c;
  if (name == "kivi") {
    c.bits = 2;
    c.recent = packkv::kivi_recent;
    c.key.axis = group_axis::channel;
    c.key.group = c.value.group = 32;
  } else if (name == "channel") {
    c.key.axis = group_axis::channel;
    c.key.group = 64;
    c.hadamard = true;
  } else if (name == "token") {
    c.key.axis = c.value.axis = group_axis::token;
  } else if (name == "strip") {
    c.adaptive = true;
  }
  return c;
}

bool parse_group_value(const std::string& key, const std::string& value, group_choice& c) {
  if (key == "bits") return parse_bits(value, c.bits);
  if (key == "bits_v") return parse_bits(value, c.value_bits);
  if (key == "tokens") return parse_tokens(value, c.key.group);
  if (key == "group") {
    const bool good = parse_tokens(value, c.key.group);
    c.value.group = c.key.group;
    return good;
  }
  if (key == "hadamard") return parse_flag(value, c.hadamard);
  if (key == "center_k") return parse_flag(value, c.key.centred);
  if (key == "steps") return parse_name(step_rules, value, c.steps);
  if (key == "quant") return parse_name(axes, value, c.axis);
  if (key == "quant_k") return c.key_given = parse_name(axes, value, c.key.axis);
  if (key == "quant_v") return c.value_given = parse_name(axes, value, c.value.axis);
  if (key == "zero") return parse_zero(value, c.zero);
  if (key == "r") return parse_step(value, c.step);
  if (key == "r_k") return parse_step(value, c.key_step);
  if (key == "r_v") return parse_step(value, c.value_step);
  return parse_count(value, c.recent);
}

std::string finish_groups(const std::set<std::string>& given, group_choice& c) {
  for (const std::string name : {"r", "quant"})
    if (given.count(name) + given.count(name + "_k") + given.count(name + "_v") == 3)
      return name + " says nothing beside " + name + "_k and " + name + "_v";
  if (c.adaptive) {
    if (!c.key_given) c.key.axis = c.axis;
    if (!c.value_given) c.value.axis = c.axis;
    c.key.relative_step = c.key_step > 0.0f ? c.key_step : c.step;
    c.value.relative_step = c.value_step > 0.0f ? c.value_step : c.step;
    c.key.zero = c.value.zero = c.zero;
  }
  c.key.width = c.bits;
  c.value.width = c.value_bits > 0 ? c.value_bits : c.bits;
  // Groups along tokens keep channels apart, which the transform would mix.
  c.key.hadamard = c.hadamard && c.key.axis != group_axis::channel;
  c.value.hadamard = c.hadamard;
  return {};
}

outcome make_group_coder(const group_choice& choice, const kv_cache& cache, whole_cache_codec& coder) {
  const int key_dim = cache.key_dim(), value_dim = cache.value_dim();
  if (choice.adaptive)
    return make_coder(make_spec(side::key, key_dim, choice.key), make_spec(side::value, value_dim, choice.value),
                      choice.recent, coder);
  return make_coder(make_spec(side::key, key_dim, choice.key, choice.steps),
                    make_spec(side::value, value_dim, choice.value, choice.steps), choice.recent, coder);
}

}  // namespace evaluate
