// SPDX-License-Identifier: Apache-2.0
// What the host tests share: seeded random numbers, strided tensors with canaries, page pools with canaries.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <packkv/codec/codec.hpp>
#include <packkv/codec/layout.hpp>
#include <packkv/codec/pages.hpp>
#include <random>
#include <vector>

#include "../support/basis.hpp"
#include "../support/catch.hpp"

namespace host_test {

namespace pk = packkv;
using packkv_test::append_basis;

/// Seed of the random tests: PACKKV_TEST_SEED or a constant. Tests print it with INFO.
inline std::uint64_t base_seed() {
  const char* text = std::getenv("PACKKV_TEST_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 20261122u;
}

/// Random numbers that are the same with every standard library.
class random_source {
 public:
  explicit random_source(std::uint64_t seed) : engine_(seed) {}
  std::uint64_t bits() { return engine_(); }
  /// 0 .. n-1
  int below(int n) { return static_cast<int>(bits() % static_cast<std::uint64_t>(n)); }
  /// first .. last
  int between(int first, int last) { return first + below(last - first + 1); }
  bool chance(int one_in) { return below(one_in) == 0; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  float normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return static_cast<float>(radius * std::cos(6.283185307179586 * uniform()));
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (int i = static_cast<int>(items.size()) - 1; i > 0; --i)
      std::swap(items[static_cast<std::size_t>(i)], items[static_cast<std::size_t>(below(i + 1))]);
  }
  template <class T, std::size_t N>
  T pick(const T (&items)[N]) {
    return items[below(static_cast<int>(N))];
  }

 private:
  std::mt19937_64 engine_;
};

/// The seed of section `salt` of a test.
inline std::uint64_t seed_of(std::uint64_t salt) { return base_seed() * 1000003u + salt; }

/// A random plan for a side: widths from {0,1,2,3,4,8}, widest first.
inline pk::strip_widths random_plan(random_source& random, pk::side which, int head_dim) {
  const int widths[] = {0, 1, 2, 3, 4, 8};
  pk::strip_widths plan;
  plan.count = head_dim / pk::strip_channels(which, head_dim);
  for (int i = 0; i < plan.count; ++i) plan.width[i] = static_cast<std::uint8_t>(random.pick(widths));
  for (int i = 0; i < plan.count; ++i)
    for (int j = i + 1; j < plan.count; ++j)
      if (plan.width[j] > plan.width[i]) std::swap(plan.width[i], plan.width[j]);
  return plan;
}

/// The same width for every strip.
inline pk::strip_widths flat_plan(pk::side which, int head_dim, int width) {
  pk::strip_widths plan;
  plan.count = head_dim / pk::strip_channels(which, head_dim);
  for (int i = 0; i < plan.count; ++i) plan.width[i] = static_cast<std::uint8_t>(width);
  return plan;
}

/// Calls put(word, mask, bits) for each field of a code.
template <class Put>
void for_each_write(const pk::code_place& place, std::uint32_t code, Put&& put) {
  const pk::code_writes writes = pk::split_code(place, code);
  for (int i = 0; i < writes.count; ++i) put(writes.write[i].word, writes.write[i].mask, writes.write[i].bits);
}

/// Strides of a tensor: contiguous, or dimensions in random order, padded, some of them running backwards.
enum class walk { contiguous, scrambled };

/// A tensor that owns its memory; bytes between its elements are canaries.
template <int Rank>
class tensor {
 public:
  tensor(pk::dtype type, const std::int64_t (&extent)[Rank], walk how = walk::contiguous,
         random_source* random = nullptr) {
    int order[Rank];
    for (int i = 0; i < Rank; ++i) order[i] = i;
    if (how == walk::scrambled)
      for (int i = Rank - 1; i > 0; --i) std::swap(order[i], order[random->below(i + 1)]);
    const std::int64_t unit = pk::bytes_of(type);
    std::int64_t stride = unit, origin = 0;
    view_.type = type;
    for (int k = Rank - 1; k >= 0; --k) {
      const int i = order[k];
      if (how == walk::scrambled) stride += unit * random->below(3);
      const bool backwards = how == walk::scrambled && random->chance(2);
      view_.extent[i] = extent[i];
      view_.stride[i] = backwards ? -stride : stride;
      if (backwards && extent[i] > 0) origin += stride * (extent[i] - 1);
      stride *= extent[i] > 0 ? extent[i] : 1;
    }
    bytes_.assign(static_cast<std::size_t>(stride + 64), canary);
    view_.data = bytes_.data() + 32 + origin;
  }
  tensor(const tensor&) = delete;
  tensor& operator=(const tensor&) = delete;
  tensor(tensor&&) = default;

  pk::output_view<Rank> out() { return view_; }
  pk::input_view<Rank> in() const {
    pk::input_view<Rank> v;
    v.data = view_.data;
    v.type = view_.type;
    for (int i = 0; i < Rank; ++i) v.extent[i] = view_.extent[i], v.stride[i] = view_.stride[i];
    return v;
  }
  template <class... Index>
  float get(Index... index) const {
    return pk::detail::load_element(pk::detail::address(view_, index...), view_.type);
  }
  template <class... Index>
  void set(float x, Index... index) {
    pk::detail::store_element(pk::detail::address(view_, index...), view_.type, x);
  }
  template <class... Index>
  std::uint16_t raw(Index... index) const {
    std::uint16_t bits;
    std::memcpy(&bits, pk::detail::address(view_, index...), 2);
    return bits;
  }
  /// Calls f(float) for every element and stores what it returns.
  template <class Make>
  void fill(Make&& make) {
    visit([&](void* p) { pk::detail::store_element(p, view_.type, make()); });
  }
  /// True if no byte between the elements has changed.
  bool canaries_intact() {
    std::vector<std::uint8_t> rest = bytes_;
    visit([&](void* p) {
      std::memset(rest.data() + (static_cast<std::uint8_t*>(p) - bytes_.data()), canary,
                  static_cast<std::size_t>(pk::bytes_of(view_.type)));
    });
    for (const std::uint8_t b : rest)
      if (b != canary) return false;
    return true;
  }
  const std::vector<std::uint8_t>& bytes() const { return bytes_; }

 private:
  static constexpr std::uint8_t canary = 0xcd;
  template <class Visit>
  void visit(Visit&& f) {
    std::int64_t index[Rank] = {}, total = 1;
    for (int i = 0; i < Rank; ++i) total *= view_.extent[i];
    for (std::int64_t n = 0; n < total; ++n) {
      std::int64_t offset = 0;
      for (int i = 0; i < Rank; ++i) offset += index[i] * view_.stride[i];
      f(static_cast<char*>(view_.data) + offset);
      for (int i = Rank - 1; i >= 0 && ++index[i] == view_.extent[i]; --i) index[i] = 0;
    }
  }
  std::vector<std::uint8_t> bytes_;
  pk::output_view<Rank> view_;
};

/// How K and V tiles share memory.
enum class pool_kind { two_pools, one_pool, head_major, padded };
inline constexpr pool_kind pool_kinds[] = {pool_kind::two_pools, pool_kind::one_pool, pool_kind::head_major,
                                           pool_kind::padded};

/// Pages in memory of their own, filled with one byte.
class pool {
 public:
  template <class Format>
  pool(const Format& format, int num_pages, int kv_heads, int tiles_per_page, pool_kind kind = pool_kind::one_pool,
       std::uint8_t fill = 0)
      : key_bytes_(format.key().tile_bytes()), value_bytes_(format.value().tile_bytes()) {
    const std::int64_t k = key_bytes_ * tiles_per_page, v = value_bytes_ * tiles_per_page, heads = kv_heads;
    std::int64_t size = 0, value_at = 0;
    pages.num_pages = num_pages, pages.kv_heads = kv_heads, pages.tiles_per_page = tiles_per_page;
    const auto strides = [&](std::int64_t kp, std::int64_t kh, std::int64_t vp, std::int64_t vh) {
      pages.key_page_stride = kp, pages.key_head_stride = kh, pages.value_page_stride = vp,
      pages.value_head_stride = vh;
    };
    switch (kind) {
      case pool_kind::two_pools:
        strides(k * heads, k, v * heads, v);
        value_at = k * heads * num_pages + 4096;
        size = value_at + v * heads * num_pages;
        break;
      case pool_kind::one_pool:  // [page, head, K then V]
        strides((k + v) * heads, k + v, (k + v) * heads, k + v);
        value_at = k;
        size = (k + v) * heads * num_pages;
        break;
      case pool_kind::head_major:  // [head, page, V then K]
        strides(k + v, (k + v) * num_pages, k + v, (k + v) * num_pages);
        value_at = -v;
        size = (k + v) * heads * num_pages;
        break;
      case pool_kind::padded:  // [page, (K of all heads, gap, V of all heads, gap)], heads padded too
        strides((k + v + 96) * heads + 48, k + 32, (k + v + 96) * heads + 48, v + 64);
        value_at = (k + 32) * heads + 16;
        size = ((k + v + 96) * heads + 48) * num_pages;
        break;
    }
    memory_.assign(static_cast<std::size_t>((size + 2 * margin) / 16 + 2), block{});
    std::memset(memory_.data(), fill, memory_.size() * sizeof(block));
    std::uint8_t* start = bytes() + margin + (value_at < 0 ? v : 0);
    pages.key_data = start;
    pages.value_data = start + value_at;
    if (num_pages == 0) pages.key_data = pages.value_data = nullptr;
  }
  pool(const pool&) = delete;
  pool& operator=(const pool&) = delete;

  std::uint8_t* bytes() { return reinterpret_cast<std::uint8_t*>(memory_.data()); }
  std::size_t size() const { return memory_.size() * sizeof(block); }
  std::vector<std::uint8_t> snapshot() { return std::vector<std::uint8_t>(bytes(), bytes() + size()); }
  std::uint8_t* tile(pk::side which, int page, int head, int i) {
    const bool key = which == pk::side::key;
    return static_cast<std::uint8_t*>(key ? pages.key_data : pages.value_data) +
           page * (key ? pages.key_page_stride : pages.value_page_stride) +
           head * (key ? pages.key_head_stride : pages.value_head_stride) + i * tile_bytes(which);
  }
  std::int64_t tile_bytes(pk::side which) const { return which == pk::side::key ? key_bytes_ : value_bytes_; }
  /// Offset of a tile in snapshot().
  std::size_t offset(pk::side which, int page, int head, int i) {
    return static_cast<std::size_t>(tile(which, page, head, i) - bytes());
  }

  pk::pages_view pages;

 private:
  struct alignas(16) block {
    std::uint8_t bytes[16];
  };
  static constexpr std::int64_t margin = 64;
  std::int64_t key_bytes_, value_bytes_;
  std::vector<block> memory_;
};

/// Which of the three kinds of page table a test uses.
enum class table_kind { dense, csr, contiguous };
inline constexpr table_kind table_kinds[] = {table_kind::dense, table_kind::csr, table_kind::contiguous};

/// A page table for sequences of the given lengths, with shuffled pages of a pool that has some to spare.
class table {
 public:
  table(table_kind kind, const std::vector<std::int32_t>& lengths, int page_tokens, random_source& random) {
    const int batch = static_cast<int>(lengths.size());
    int widest = 1, total = 0;
    std::vector<int> need;
    for (const std::int32_t n : lengths) {
      need.push_back((n + page_tokens - 1) / page_tokens);
      widest = need.back() > widest ? need.back() : widest;
      total += need.back();
    }
    num_pages = kind == table_kind::contiguous ? batch * widest + 1 : total + 3;
    std::vector<std::int32_t> ids;
    for (int i = 0; i < num_pages; ++i) ids.push_back(i);
    random.shuffle(ids);
    view.row_stride = kind == table_kind::csr ? 0 : widest + (kind == table_kind::dense ? 2 : 0);
    std::size_t next = 0;
    indptr_.push_back(0);
    for (int b = 0; b < batch; ++b) {
      const int row = kind == table_kind::dense ? static_cast<int>(view.row_stride) : need[static_cast<std::size_t>(b)];
      for (int i = 0; i < row; ++i)
        entries_.push_back(i < need[static_cast<std::size_t>(b)] ? ids[next++] : i % 2 != 0 ? -1 : 2147483647);
      indptr_.push_back(static_cast<std::int32_t>(entries_.size()));
    }
    entries_.push_back(-7);
    if (kind != table_kind::contiguous) view.pages = entries_.data();
    if (kind == table_kind::csr) view.indptr = indptr_.data();
  }
  table(const table&) = delete;
  table& operator=(const table&) = delete;
  /// Page i of sequence b.
  int page(int b, int i) const {
    if (view.indptr != nullptr) return entries_[static_cast<std::size_t>(indptr_[static_cast<std::size_t>(b)] + i)];
    if (view.pages == nullptr) return static_cast<int>(b * view.row_stride) + i;
    return entries_[static_cast<std::size_t>(b * view.row_stride + i)];
  }
  std::vector<std::int32_t>& entries() { return entries_; }

  pk::page_table view;
  int num_pages = 0;

 private:
  std::vector<std::int32_t> entries_, indptr_;
};

/// Parameters that a pair of codecs may need, for kv_heads heads: random bases, permutations, column and leading
/// scales.
struct parameter_arrays {
  std::vector<float> column[2], leading[2], offset[2], basis[2], basis_inverse[2];
  std::vector<std::int16_t> order[2];

  template <class Format>
  pk::parameters<Format> make(const Format& format, int kv_heads, random_source& random, bool columns = false) {
    pk::parameters<Format> p;
    p.format = format;
    fill(0, format.key(), p.key, kv_heads, random, columns);
    fill(1, format.value(), p.value, kv_heads, random, columns);
    return p;
  }

 private:
  void fill(int i, const pk::codec_spec& spec, pk::side_parameters& p, int kv_heads, random_source& random,
            bool columns) {
    column[i].clear(), leading[i].clear(), order[i].clear(), offset[i].clear();
    basis[i].clear(), basis_inverse[i].clear();
    for (int h = 0; h < kv_heads; ++h) {
      std::vector<std::int16_t> row;
      for (int c = 0; c < spec.head_dim; ++c) row.push_back(static_cast<std::int16_t>(c));
      random.shuffle(row);
      order[i].insert(order[i].end(), row.begin(), row.end());
      for (int c = 0; c < spec.head_dim; ++c) column[i].push_back(static_cast<float>(0.25 + random.uniform()));
      for (int c = 0; c < spec.head_dim; ++c) offset[i].push_back(static_cast<float>(4.0 * random.uniform() - 2.0));
      for (int c = 0; c < spec.leading; ++c) leading[i].push_back(static_cast<float>(0.02 + 0.02 * random.uniform()));
    }
    if (spec.transform == pk::transform_kind::basis) {
      for (int h = 0; h < kv_heads; ++h) append_basis(random, spec.head_dim, basis[i], basis_inverse[i]);
      p.basis = basis[i].data(), p.basis_inverse = basis_inverse[i].data();
    }
    if (spec.kind == pk::codec_kind::plan && columns)
      p.column_scale = column[i].data(), p.channel_offset = offset[i].data();
    if (spec.transform == pk::transform_kind::permutation) p.permutation = order[i].data();
    if (spec.leading > 0) p.leading_scale = leading[i].data();
    if (spec.kind == pk::codec_kind::fp8) p.tensor_scale = 0.25f;
  }
};

/// A random codec of a side.
inline pk::codec_spec random_codec(random_source& random, pk::side which, int head_dim) {
  switch (random.below(6)) {
    case 0:
      return pk::make_element_codec(pk::codec_kind::float16, head_dim);
    case 1:
      return pk::make_element_codec(pk::codec_kind::bfloat16, head_dim);
    case 2:
      return pk::make_element_codec(pk::codec_kind::fp8, head_dim);
    default:
      return pk::make_plan_codec(which, head_dim, static_cast<pk::transform_kind>(random.below(4)),
                                 random_plan(random, which, head_dim),
                                 which == pk::side::key ? random.below(pk::max_leading + 1) : 0);
  }
}

}  // namespace host_test
