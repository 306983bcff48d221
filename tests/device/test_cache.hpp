// SPDX-License-Identifier: Apache-2.0
// A random cache for tests: K and V tensors, a format with parameters, pages and tables, on host and device alike.
// The host side is filled by the reference, so a device result always has its CPU definition beside it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <packkv/packkv.cuh>
#include <vector>

#include "../support/basis.hpp"
#include "../support/random.hpp"
#include "../support/small_tests.hpp"
#include "cuda_failures.hpp"
#include "device_array.hpp"

namespace packkv_test {

namespace pk = packkv;

/// A random codec of one side; about one in four is a 16-bit or FP8 baseline.
inline pk::codec_spec random_codec(random_source& random, pk::side which, int head_dim) {
  if (random.one_in(4)) {
    constexpr pk::codec_kind kinds[] = {pk::codec_kind::float16, pk::codec_kind::bfloat16, pk::codec_kind::fp8};
    return pk::make_element_codec(kinds[random.between(0, 2)], head_dim);
  }
  constexpr std::uint8_t widths[] = {0, 1, 2, 3, 4, 8};
  pk::strip_widths plan;
  plan.count = head_dim / pk::strip_channels(which, head_dim);
  for (int i = 0; i < plan.count; ++i) plan.width[i] = widths[random.between(0, 5)];
  std::sort(plan.width, plan.width + plan.count, [](int a, int b) { return a > b; });
  auto transform = static_cast<pk::transform_kind>(random.between(0, 2));
  // A third of the plans that begin with 4 or 8 bits; not by chance, which would change all the random cases behind it.
  if (transform == pk::transform_kind::identity && plan.width[0] >= 4) transform = pk::transform_kind::basis;
  return pk::make_plan_codec(which, head_dim, transform, plan,
                             which == pk::side::key ? random.between(0, pk::max_leading) : 0);
}

/// Parameters of one side as host arrays, with a copy on the device.
struct side_data {
  std::vector<float> columns;
  std::vector<std::int16_t> permutation;
  std::vector<float> leading, offset, basis, basis_inverse;
  float tensor_scale = 1.0f;
  device_array<float> device_columns, device_leading, device_offset, device_basis, device_basis_inverse;
  device_array<std::int16_t> device_permutation;

  void fill(random_source& random, const pk::codec_spec& spec, int kv_heads) {
    if (spec.kind == pk::codec_kind::fp8) tensor_scale = 0.01f + 0.02f * static_cast<float>(random.uniform());
    if (spec.kind == pk::codec_kind::plan && random.one_in(2))
      for (int i = 0; i < kv_heads * spec.head_dim; ++i) {
        const int width = spec.strips.width[i % spec.head_dim / spec.strips.channels];
        columns.push_back(pk::gaussian_step(width) * (0.7f + 0.6f * static_cast<float>(random.uniform())));
      }
    if (spec.transform == pk::transform_kind::permutation)
      for (int h = 0; h < kv_heads; ++h) {
        std::vector<std::int16_t> p(static_cast<std::size_t>(spec.head_dim));
        std::iota(p.begin(), p.end(), std::int16_t{0});
        for (int i = spec.head_dim - 1; i > 0; --i)
          std::swap(p[static_cast<std::size_t>(i)], p[static_cast<std::size_t>(random.between(0, i))]);
        permutation.insert(permutation.end(), p.begin(), p.end());
      }
    random_source of_basis(static_cast<unsigned>(spec.head_dim));
    for (int h = 0; h < kv_heads && spec.transform == pk::transform_kind::basis; ++h)
      append_basis(of_basis, spec.head_dim, basis, basis_inverse);
    for (int i = 0; i < kv_heads * spec.leading; ++i)
      leading.push_back(0.02f + 0.03f * static_cast<float>(random.uniform()));
    if (spec.kind == pk::codec_kind::plan ? random.one_in(3) : spec.kind == pk::codec_kind::grouped && random.one_in(2))
      for (int i = 0; i < kv_heads * spec.head_dim; ++i) offset.push_back(0.5f * random.normal());
    device_basis = device_array<float>(basis);
    device_basis_inverse = device_array<float>(basis_inverse);
    device_offset = device_array<float>(offset);
    device_columns = device_array<float>(columns);
    device_leading = device_array<float>(leading);
    device_permutation = device_array<std::int16_t>(permutation);
  }
  void clear_offset() {
    offset.clear();
    device_offset = {};
  }
  pk::side_parameters host() const {
    return {columns.empty() ? nullptr : columns.data(),
            permutation.empty() ? nullptr : permutation.data(),
            leading.empty() ? nullptr : leading.data(),
            tensor_scale,
            offset.empty() ? nullptr : offset.data(),
            basis.empty() ? nullptr : basis.data(),
            basis_inverse.empty() ? nullptr : basis_inverse.data()};
  }
  pk::side_parameters device() const {
    return {device_columns.data(), device_permutation.data(), device_leading.data(),      tensor_scale,
            device_offset.data(),  device_basis.data(),       device_basis_inverse.data()};
  }
};

/// 16-bit random tensor [rows, heads, tokens, dim] with padded token rows, host and device copy.
struct tensor_data {
  std::vector<std::uint16_t> host_bits;
  device_array<std::uint16_t> device_bits;
  pk::dtype type = pk::dtype::float16;
  std::int64_t rows = 0, heads = 0, tokens = 0, dim = 0, pad = 0;

  tensor_data() = default;
  tensor_data(random_source& random, pk::dtype dtype, std::int64_t r, std::int64_t h, std::int64_t t, std::int64_t d,
              float scale = 1.0f)
      : type(dtype), rows(r), heads(h), tokens(t), dim(d), pad(random.between(0, 3)) {
    host_bits.resize(static_cast<std::size_t>(rows * heads * tokens * (dim + pad)));
    for (std::size_t i = 0; i < host_bits.size(); ++i) {
      const float outlier = i % static_cast<std::size_t>(dim + pad) % 23 == 5 ? 4.0f : 1.0f;
      const float x = random.normal() * scale * outlier;
      host_bits[i] = type == pk::dtype::float16 ? pk::float_to_half(x) : pk::float_to_bfloat16(x);
    }
    device_bits = device_array<std::uint16_t>(host_bits);
  }
  pk::input_view<4> view(const void* data) const {
    auto v = pk::make_input(data, type, {rows, heads, tokens, dim});
    v.stride[2] = (dim + pad) * 2;
    v.stride[1] = tokens * v.stride[2];
    v.stride[0] = heads * v.stride[1];
    return v;
  }
  pk::input_view<4> host() const { return view(host_bits.data()); }
  pk::input_view<4> device() const { return view(device_bits.data()); }
};

/// [1, heads, tokens, dim] as [heads, tokens, dim].
template <class Pointer>
pk::tensor_view<Pointer, 3> sequence(const pk::tensor_view<Pointer, 4>& x) {
  pk::tensor_view<Pointer, 3> out;
  out.data = x.data;
  out.type = x.type;
  for (int i = 0; i < 3; ++i) {
    out.extent[i] = x.extent[i + 1];
    out.stride[i] = x.stride[i + 1];
  }
  return out;
}

/// A tensor to be written.
inline pk::output_view<4> as_output(const pk::input_view<4>& in) {
  pk::output_view<4> out;
  out.data = const_cast<void*>(in.data);
  out.type = in.type;
  for (int i = 0; i < 4; ++i) {
    out.extent[i] = in.extent[i];
    out.stride[i] = in.stride[i];
  }
  return out;
}
/// The tokens of the first row as store_tokens takes them: [tokens, heads, dim].
inline pk::input_view<3> one_by_one(const pk::input_view<4>& all) {
  pk::input_view<3> x;
  x.data = all.data;
  x.type = all.type;
  constexpr int from[] = {2, 1, 3};
  for (int i = 0; i < 3; ++i) {
    x.extent[i] = all.extent[from[i]];
    x.stride[i] = all.stride[from[i]];
  }
  return x;
}

struct cache_shape {
  int batch = 1;
  int kv_heads = 1;
  int max_tokens = 64;
  int tiles_per_page = 1;
  pk::dtype type = pk::dtype::float16;
};

inline cache_shape random_shape(random_source& random, int max_tokens) {
  cache_shape s;
  s.batch = random.between(1, 3);
  s.kv_heads = random.between(1, 3);
  s.max_tokens = random.between(1, max_tokens);
  s.tiles_per_page = random.between(1, 3);
  s.type = random.one_in(2) ? pk::dtype::float16 : pk::dtype::bfloat16;
  return s;
}

/// element(row, head, token, channel, what is there) for every element of a tensor.
template <class Element>
void change(tensor_data& x, Element&& element) {
  std::size_t at = 0;
  for (std::int64_t r = 0; r < x.rows; ++r)
    for (std::int64_t h = 0; h < x.heads; ++h)
      for (std::int64_t t = 0; t < x.tokens; ++t, at += static_cast<std::size_t>(x.pad))
        for (std::int64_t c = 0; c < x.dim; ++c, ++at) {
          auto& bits = x.host_bits[at];
          const bool half = x.type == pk::dtype::float16;
          const float y = element(r, h, t, c, half ? pk::half_to_float(bits) : pk::bfloat16_to_float(bits));
          bits = half ? pk::float_to_half(y) : pk::float_to_bfloat16(y);
        }
  x.device_bits.assign(x.host_bits);
}

/// K, V, lengths, pages and table of a random cache. Pages start poisoned; `compress_reference` fills the host copy.
template <class Format>
class test_cache {
 public:
  cache_shape shape;
  Format format;
  side_data key_data, value_data;
  tensor_data keys, values;
  std::vector<std::int32_t> lengths, table, indptr;
  std::vector<std::uint8_t> pages;
  device_array<std::int32_t> device_lengths, device_table, device_indptr;
  device_array<std::uint8_t> device_pages;
  device_array<pk::device_report> device_report;
  pk::device_report report = {};

  test_cache(random_source& random, const cache_shape& s, const Format& f) : shape(s), format(f) {
    key_data.fill(random, format.key(), shape.kv_heads);
    value_data.fill(random, format.value(), shape.kv_heads);
    keys = tensor_data(random, shape.type, shape.batch, shape.kv_heads, shape.max_tokens, Format::key_head_dim);
    values =
        tensor_data(random, shape.type, shape.batch, shape.kv_heads, shape.max_tokens, Format::value_head_dim, 0.5f);
    for (int b = 0; b < shape.batch; ++b) lengths.push_back(random.one_in(6) ? 0 : random.between(0, shape.max_tokens));
    if (!random.one_in(3)) lengths[0] = shape.max_tokens;
    place_pages(random);
    device_lengths = device_array<std::int32_t>(lengths);
    device_report = device_array<pk::device_report>(std::vector<pk::device_report>(1));
    device_pages = device_array<std::uint8_t>(pages);
  }

  /// Tables for the same pages: dense, CSR or contiguous, as drawn.
  pk::page_table host_table() const { return make_table(table.data(), indptr.data()); }
  pk::page_table gpu_table() const { return make_table(device_table.data(), device_indptr.data()); }
  pk::pages_view host_pages() { return make_pages(pages.data()); }
  pk::pages_view gpu_pages() { return make_pages(device_pages.data()); }
  pk::parameters<Format> host_parameters() const { return {format, key_data.host(), value_data.host()}; }
  pk::parameters<Format> gpu_parameters() const { return {format, key_data.device(), value_data.device()}; }

  pk::cache_view host_cache() {
    pk::cache_view c;
    c.pages = host_pages();
    c.table = host_table();
    c.seq_lens = lengths.data();
    c.batch = shape.batch;
    c.max_seq_len = shape.max_tokens;
    return c;
  }
  pk::cache_view gpu_cache() {
    pk::cache_view c = host_cache();
    c.pages = gpu_pages();
    c.table = gpu_table();
    c.seq_lens = device_lengths.data();
    return c;
  }

  pk::status compress_reference() {
    return pk::reference::compress(keys.host(), values.host(), lengths.data(), host_parameters(), host_pages(),
                                   host_table(), report);
  }
  /// Fills both copies with the reference's bytes and forgets what the encoder reported.
  void fill() {
    if (const pk::status s = compress_reference(); !s) throw std::runtime_error(s.message);
    report = {};
    device_pages.assign(pages);
  }
  pk::exec exec() { return pk::exec{nullptr, nullptr, 0, device_report.data()}; }
  /// A call of which a part may have been made before it failed: each time from the same report on.
  template <class Call>
  pk::status after_failures(Call&& call) {
    const std::vector<pk::device_report> before = device_report.host();
    return packkv_test::after_failures([&] {
      device_report.assign(before);
      return call();
    });
  }
  pk::device_report gpu_report() { return device_report.host()[0]; }

 private:
  void place_pages(random_source& random) {
    const std::int64_t page_tokens = static_cast<std::int64_t>(shape.tiles_per_page) * pk::tile_tokens;
    pages_per_sequence_ = static_cast<int>(pk::ceil_div<std::int64_t>(shape.max_tokens, page_tokens));
    kind_ = random.between(0, 2);
    spare_ = kind_ == 2 ? 0 : random.between(0, 2);
    num_pages_ = shape.batch * pages_per_sequence_ + spare_;
    std::vector<std::int32_t> ids(static_cast<std::size_t>(num_pages_));
    std::iota(ids.begin(), ids.end(), 0);
    if (kind_ != 2)
      for (int i = num_pages_ - 1; i > 0; --i)
        std::swap(ids[static_cast<std::size_t>(i)], ids[static_cast<std::size_t>(random.between(0, i))]);
    ids.resize(static_cast<std::size_t>(shape.batch * pages_per_sequence_));
    table = ids;
    for (int b = 0; b <= shape.batch; ++b) indptr.push_back(b * pages_per_sequence_);
    device_table = device_array<std::int32_t>(table);
    device_indptr = device_array<std::int32_t>(indptr);

    const std::int64_t key_bytes = pk::key_page_bytes(format, shape.tiles_per_page);
    const std::int64_t value_bytes = pk::value_page_bytes(format, shape.tiles_per_page);
    const std::int64_t pad = 16 * random.between(0, 3);
    if (random.one_in(2)) {  // one pool: a page holds K then V of each head
      key_head_stride_ = value_head_stride_ = key_bytes + value_bytes + pad;
      key_page_stride_ = value_page_stride_ = shape.kv_heads * key_head_stride_ + 16 * random.between(0, 2);
      value_offset_ = key_bytes;
      pages.assign(static_cast<std::size_t>(num_pages_ * key_page_stride_), 0xff);
    } else {  // two pools
      key_head_stride_ = key_bytes + pad;
      value_head_stride_ = value_bytes + pad;
      key_page_stride_ = shape.kv_heads * key_head_stride_;
      value_page_stride_ = shape.kv_heads * value_head_stride_ + pad;
      value_offset_ = num_pages_ * key_page_stride_;
      pages.assign(static_cast<std::size_t>(num_pages_ * (key_page_stride_ + value_page_stride_)), 0xff);
    }
  }
  pk::page_table make_table(const std::int32_t* pages_of, const std::int32_t* begin) const {
    pk::page_table t;
    t.row_stride = pages_per_sequence_;
    if (kind_ != 2) t.pages = pages_of;
    if (kind_ == 1) t.indptr = begin;
    return t;
  }
  pk::pages_view make_pages(std::uint8_t* base) const {
    pk::pages_view p;
    p.key_data = base;
    p.value_data = base + value_offset_;
    p.key_page_stride = key_page_stride_;
    p.key_head_stride = key_head_stride_;
    p.value_page_stride = value_page_stride_;
    p.value_head_stride = value_head_stride_;
    p.num_pages = num_pages_;
    p.kv_heads = shape.kv_heads;
    p.tiles_per_page = shape.tiles_per_page;
    return p;
  }

  int kind_ = 0, spare_ = 0, num_pages_ = 0, pages_per_sequence_ = 0;
  std::int64_t key_page_stride_ = 0, key_head_stride_ = 0, value_page_stride_ = 0, value_head_stride_ = 0,
               value_offset_ = 0;
};

/// Calls f(format) with a random run-time format of every pair of head dims that has kernels in these tests.
template <class F>
void for_each_format(random_source& random, F&& f) {
  const auto with = [&](auto format) {
    using type = decltype(format);
    format.key_spec = random_codec(random, pk::side::key, type::key_head_dim);
    format.value_spec = random_codec(random, pk::side::value, type::value_head_dim);
    f(format);
  };
  with(pk::runtime_format<64>{});
  with(pk::runtime_format<96>{});
  with(pk::runtime_format<128>{});
  with(pk::runtime_format<192, 128>{});
  with(pk::runtime_format<256>{});
  with(pk::runtime_format<512>{});
}

/// max over rows of |a - b| / max(|b|, floor) with rows of `dim` values.
inline double worst_row_error(const std::vector<float>& a, const std::vector<float>& b, int dim) {
  double worst = 0.0;
  for (std::size_t first = 0; first + static_cast<std::size_t>(dim) <= a.size();
       first += static_cast<std::size_t>(dim)) {
    double difference = 0.0, norm = 0.0;
    for (std::size_t i = first; i < first + static_cast<std::size_t>(dim); ++i) {
      difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
      norm += std::pow(static_cast<double>(b[i]), 2);
    }
    const double error = std::sqrt(difference) / std::max(std::sqrt(norm), 1e-3);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  return worst;
}

#if defined(PACKKV_SIMT_EXECUTOR)
inline constexpr int repeats = 1;  ///< the executor is slow: one round with small shapes
inline constexpr int most_tokens = 150;
#else
/// So that the tools of compute-sanitizer come to an end: scripts/verify-gpu sets it for them.
inline const int repeats = small_tests ? 1 : 8;
inline const int most_tokens = small_tests ? 150 : 700;
#endif

}  // namespace packkv_test
