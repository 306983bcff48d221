// SPDX-License-Identifier: Apache-2.0
// Byte accounting and error statistics.
#include "evaluation.hpp"

#include <algorithm>
#include <cmath>

#include "gpu.hpp"

namespace evaluate {
namespace {

/// |o - reference| / |reference|; a zero reference counts as 0 or 1.
template <class A, class B>
double relative_error(const A* o, const B* reference, int n) {
  double difference = 0.0, norm = 0.0;
  for (int c = 0; c < n; ++c) {
    const double x = static_cast<double>(o[c]), y = static_cast<double>(reference[c]);
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  if (norm == 0.0) return difference == 0.0 ? 0.0 : 1.0;
  return std::sqrt(difference / norm);
}

/// Mean and maximum of errors. A NaN stays visible in the mean.
struct error_sum {
  double sum = 0.0, maximum = 0.0;
  std::int64_t count = 0;

  void add(double error) {
    sum += error;
    maximum = std::max(maximum, error);
    ++count;
  }
  double mean() const { return sum / static_cast<double>(count); }
};

}  // namespace

void count_bytes(const kv_cache& cache, const coding& codec, const attention_rules& rules, result& r) {
  const double tokens = static_cast<double>(cache.tokens());
  const double tiles = static_cast<double>(packkv::ceil_div<std::int64_t>(cache.tokens(), packkv::tile_tokens));
  const double key_bytes = tiles * codec.key.spec.tile_bytes(), value_bytes = tiles * codec.value.spec.tile_bytes();
  const double ring =
      rules.recent > 0 ? static_cast<double>(rules.recent) + static_cast<double>(cache.queries()) - 1.0 : 0.0;
  const int dims = cache.key_dim() + cache.value_dim();
  const double raw_bytes = (static_cast<double>(rules.sinks) + ring) * 2.0 * dims;
  r.codec = codec.text;
  r.tokens = r.coded_tokens = cache.tokens();  // sinks and recent tokens are coded, too
  r.bits_per_value_k = 8.0 * key_bytes / (tokens * cache.key_dim());
  r.bits_per_value_v = 8.0 * value_bytes / (tokens * cache.value_dim());
  r.total_bits_per_value = 8.0 * (key_bytes + value_bytes + raw_bytes) / (tokens * dims);
  r.model_bytes = codec.key.model_bytes() + codec.value.model_bytes();
}

void count_bytes(const kv_cache& cache, const coded_cache& coded, const attention_rules& rules, result& r) {
  const std::int64_t tail = cache.tokens() - coded.tokens;
  const std::int64_t sinks = std::min<std::int64_t>(rules.sinks, coded.tokens);
  const std::int64_t ring = rules.recent > 0 ? std::max<std::int64_t>(rules.recent + cache.queries() - 1 - tail, 0) : 0;
  const double dims = cache.key_dim() + cache.value_dim(), heads = cache.kv_heads();
  const double raw_bytes = static_cast<double>(tail + sinks + ring) * 2.0 * dims * heads;
  const double key_bytes = static_cast<double>(coded.key_bytes), value_bytes = static_cast<double>(coded.value_bytes);
  const double vectors = static_cast<double>(coded.tokens) * heads;
  // Sinks, recent tokens and windows are tokens by position: whoever reorders them must say which are which.
  const bool positions = rules.sinks > 0 || rules.recent > 0 || rules.window > 0;
  const double order_bytes = positions ? static_cast<double>(coded.order_bytes) : 0.0;
  r.tokens = cache.tokens();
  r.coded_tokens = coded.tokens;
  r.bits_per_value_k = coded.tokens > 0 ? 8.0 * key_bytes / (vectors * cache.key_dim()) : 16.0;
  r.bits_per_value_v = coded.tokens > 0 ? 8.0 * value_bytes / (vectors * cache.value_dim()) : 16.0;
  r.total_bits_per_value =
      8.0 * (key_bytes + value_bytes + raw_bytes + order_bytes) / (static_cast<double>(cache.tokens()) * dims * heads);
  r.model_bytes = coded.model_bytes;
}

outcome evaluator::run(const coding& codec, result& r) {
  r = {};
  if (codec.whole_cache) {
    if (outcome o = run_whole(codec, r); !o) return o;
  } else {
    count_bytes(cache_, codec, rules_, r);
    if (gpu_name_.empty())
      run_cpu(codec, r);
    else if (outcome o = run_gpu(codec, r); !o)
      return o;
  }
  if (!std::isfinite(r.error_k + r.error_v + r.error_attention + r.error_attention_max))
    return failure("codec '" + codec.text + "': the coded cache gives non-finite attention (a scale is out of range)");
  return {};
}

void evaluator::run_cpu(const coding& codec, result& r) const {
  if (codec.key.spec.leading > 0) r.leading_clamps = encode_all(cache_, codec, threads_).leading_clamps;
  attend(tile_codec(codec), codec.text, r);
}

outcome evaluator::run_whole(const coding& codec, result& r) {
  coded_cache coded;
  if (outcome o = codec.whole_cache.code(cache_, coded); !o) return failure("codec '" + codec.text + "': " + o.error());
  count_bytes(cache_, coded, rules_, r);
  r.codec = codec.text;
  r.figures = coded.figures;
  if (!gpu_name_.empty()) {
    const packkv::status s = run_whole_on_gpu(codec, r);
    if (s) return {};
    if (gpu_required_ || s.code != packkv::status_code::unsupported)
      return failure("codec '" + codec.text + "' on the GPU: " + s.message);
  }
  attend(decoded_tiles(cache_, coded), codec.text, r);
  return {};
}

packkv::status evaluator::run_whole_on_gpu(const coding& codec, result& r) {
  return compare_gpu(r, [&](int kind, std::vector<float>& out) {
    const gpu_sequence_job job{view_of(cache_.k), view_of(cache_.v),    view_of(cache_.q),
                               rules_.scale,      rules_.window,        rules_.sinks,
                               rules_.recent,     kind != value_output, kind != key_output};
    packkv::device_report report;
    return codec.whole_cache.attend_on_gpu(job, out, report);
  });
}

void evaluator::attend(const tile_source& source, const std::string& label, result& r) const {
  error_sum errors[output_kinds];
  progress line(label);
  stream_attention(cache_, &source, rules_, threads_, line, [&](const attention_block& b) {
    for (int kind = key_output; kind < output_kinds; ++kind)
      for (int row = 0; row < b.rows; ++row)
        errors[kind].add(
            relative_error(b.output(static_cast<output_kind>(kind), row), b.output(exact_output, row), b.value_dim));
  });
  r.error_k = errors[key_output].mean();
  r.error_v = errors[value_output].mean();
  r.error_attention = errors[both_output].mean();
  r.error_attention_max = errors[both_output].maximum;
}

template <class Attention>
packkv::status evaluator::compare_gpu(result& r, const Attention& attention) {
  const int dim = cache_.value_dim();
  const std::int64_t n = cache_.queries(), rows = cache_.query_heads() * n;
  if (reference_.empty()) {
    reference_.resize(static_cast<std::size_t>(rows * dim));
    progress line("reference on the CPU");
    stream_attention(cache_, nullptr, rules_, threads_, line, [&](const attention_block& b) {
      const int group = cache_.group();
      for (int row = 0; row < b.rows; ++row) {
        const std::int64_t head = static_cast<std::int64_t>(b.kv_head) * group + (b.first_row + row) % group;
        const double* from = b.output(exact_output, row);
        std::transform(from, from + dim, reference_.data() + (head * n + (b.first_row + row) / group) * dim,
                       [](double x) { return static_cast<float>(x); });
      }
    });
  }
  error_sum errors[output_kinds];
  std::vector<float> out;
  for (int kind = key_output; kind < output_kinds; ++kind) {
    if (const packkv::status s = attention(kind, out); !s) return s;
    if (out.size() != reference_.size())
      return packkv::refuse(packkv::status_code::cuda_error, "the output has the wrong size");
    for (std::int64_t row = 0; row < rows; ++row)
      errors[kind].add(relative_error(out.data() + row * dim, reference_.data() + row * dim, dim));
  }
  r.error_k = errors[key_output].mean();
  r.error_v = errors[value_output].mean();
  r.error_attention = errors[both_output].mean();
  r.error_attention_max = errors[both_output].maximum;
  r.device = gpu_name_;
  return {};
}

outcome evaluator::run_gpu(const coding& codec, result& r) {
  const gpu_side key{codec.key.spec, codec.key.parameters()}, value{codec.value.spec, codec.value.parameters()};
  const gpu_side raw_key{packkv::make_element_codec(packkv::codec_kind::float16, cache_.key_dim()), {}};
  const gpu_side raw_value{packkv::make_element_codec(packkv::codec_kind::float16, cache_.value_dim()), {}};
  const packkv::status s = compare_gpu(r, [&](int kind, std::vector<float>& out) {
    const gpu_job job{view_of(cache_.k),
                      view_of(cache_.v),
                      view_of(cache_.q),
                      kind == value_output ? raw_key : key,
                      kind == key_output ? raw_value : value,
                      rules_.scale,
                      rules_.window,
                      rules_.sinks,
                      rules_.recent};
    packkv::device_report report;
    const packkv::status state = gpu_attention(job, out, report);
    if (kind == both_output) r.leading_clamps = report.leading_clamps;
    return state;
  });
  return s ? outcome{} : failure("codec '" + codec.text + "' on the GPU: " + s.message);
}

}  // namespace evaluate
