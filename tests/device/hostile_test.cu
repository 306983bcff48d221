// SPDX-License-Identifier: Apache-2.0
// Random page ids, row lengths, sequence lengths, slots and moves, mostly wrong ones, in great numbers: on a GPU
// 100,000 page tables. A call may touch the pages that are named and what it says it writes; everything lies between
// guards. The tokens of a page are equal, so that what a sequence must give is a sum over its few pages.
#include <cstdio>
#include <cstring>

#include "fused_problem.hpp"

using namespace packkv_test;

namespace {

constexpr int dim = 64, heads = 2, group = 2, query_heads = heads * group, entries = 3, pages = 37;
constexpr std::size_t guard = 1 << 16;
#if defined(PACKKV_SIMT_EXECUTOR)
constexpr int batch = 24, rounds = 2;
#else
constexpr int batch = 1000;
const int rounds = small_tests ? 10 : 100;
#endif

using fused = fused_format<dim, dim, pk::plan<4, 3, 2, 1>, pk::plan<3, 2, 2, 1>>;
using simple = pk::runtime_format<dim>;

simple simple_format() {
  simple f;
  f.key_spec = fused::key();
  f.value_spec = fused::value();
  return f;
}

/// Bytes between two guards, on host and device. 0xff: whoever reads them as a float has a NaN.
struct guarded_bytes {
  std::vector<std::uint8_t> host;
  device_array<std::uint8_t> device;

  explicit guarded_bytes(std::size_t size) : host(size + 2 * guard, 0xff), device(host) {}
  std::uint8_t* on_host() { return host.data() + guard; }
  std::uint8_t* on_device() { return device.data() + guard; }
  void upload() { device.assign(host); }
  bool same() const { return device.host() == host; }
};

std::int32_t any_id(random_source& random) {
  constexpr std::int32_t wrong[] = {-1, -2147483647 - 1, 2147483647, pages, pages + 1};
  if (random.one_in(2)) return random.between(0, pages - 1);
  return random.one_in(3) ? static_cast<std::int32_t>(random.bits()) : wrong[random.between(0, 4)];
}
bool is_page(std::int32_t id) { return id >= 0 && id < pages; }

float half_of(const std::vector<std::uint16_t>& x, std::size_t i) { return pk::half_to_float(x[i]); }

template <class Format>
class hostile_calls {
 public:
  hostile_calls(random_source& random, const Format& format, int tiles_per_page)
      : random_(random),
        format_(format),
        page_tokens_(64 * tiles_per_page),
        max_tokens_(entries * page_tokens_),
        keys_(side_bytes(format.key())),
        values_(side_bytes(format.value())) {
    view_.key_head_stride = format.key().tile_bytes() * tiles_per_page;
    view_.value_head_stride = format.value().tile_bytes() * tiles_per_page;
    view_.key_page_stride = heads * view_.key_head_stride;
    view_.value_page_stride = heads * view_.value_head_stride;
    view_.num_pages = pages;
    view_.kv_heads = heads;
    view_.tiles_per_page = tiles_per_page;
    fill_pages();
    draw_tables();
  }

  void reads() {
    upload_pages();
    attention();
    scores();
    sums();
    elements();
    CHECK(unchanged());
  }

  /// Into pages that are named once: the bytes of all pages are known.
  void writes() {
    name_pages_once();
    compress();
    store();
  }

 private:
  std::size_t side_bytes(const pk::codec_spec& spec) const {
    return static_cast<std::size_t>(spec.tile_bytes()) * static_cast<std::size_t>(page_tokens_ / 64 * heads * pages);
  }
  pk::parameters<Format> parameters() const { return {format_, {}, {}}; }
  pk::pages_view on_host() {
    pk::pages_view v = view_;
    v.key_data = keys_.on_host();
    v.value_data = values_.on_host();
    return v;
  }
  pk::pages_view on_device() {
    pk::pages_view v = view_;
    v.key_data = keys_.on_device();
    v.value_data = values_.on_device();
    return v;
  }
  void upload_pages() {
    keys_.upload();
    values_.upload();
  }
  bool unchanged() const { return keys_.same() && values_.same(); }

  /// Random tokens [n, heads, 1, dim] as a tensor that repeats each `tokens` times.
  static pk::input_view<4> repeated(const void* data, int n, int tokens) {
    auto v = pk::make_input(data, pk::dtype::float16, {n, heads, 1, dim});
    v.extent[2] = tokens;
    v.stride[2] = 0;
    return v;
  }
  std::vector<std::uint16_t> random_halves(std::size_t n) {
    std::vector<std::uint16_t> x(n);
    for (auto& y : x) y = pk::float_to_half(random_.normal());
    return x;
  }

  void fill_pages() {
    const std::vector<std::uint16_t> k = random_halves(pages * heads * dim), v = random_halves(k.size());
    pk::device_report report{};
    REQUIRE(pk::reference::compress(repeated(k.data(), pages, page_tokens_), repeated(v.data(), pages, page_tokens_),
                                    nullptr, parameters(), on_host(), contiguous(), report));
    key_of_page_.resize(k.size());
    value_of_page_.resize(k.size());
    const auto first = [](std::vector<std::uint16_t>& x) {
      return pk::make_output(x.data(), pk::dtype::float16, {pages, heads, 1, dim});
    };
    REQUIRE(pk::reference::decompress(on_host(), contiguous(), nullptr, parameters(), first(key_of_page_),
                                      first(value_of_page_), report));
  }
  static pk::page_table contiguous() {
    pk::page_table t;
    t.row_stride = 1;
    return t;
  }

  void draw_tables() {
    table_.clear();
    indptr_ = {0};
    csr_ = random_.one_in(2);
    for (int b = 0; b < batch; ++b) {
      const int row = csr_ ? random_.between(0, entries) : entries;
      for (int i = 0; i < row; ++i) table_.push_back(any_id(random_));
      indptr_.push_back(static_cast<std::int32_t>(table_.size()));
    }
    lengths_.clear();
    const std::int32_t wrong[] = {-1, -2147483647 - 1, 2147483647, max_tokens_ + 1};
    for (int b = 0; b < batch; ++b)
      lengths_.push_back(!random_.one_in(4)  ? random_.between(0, max_tokens_)
                         : random_.one_in(3) ? static_cast<std::int32_t>(random_.bits())
                                             : wrong[random_.between(0, 3)]);
    upload_tables();
  }
  void upload_tables() {
    device_table_ = device_array<std::int32_t>(table_);
    device_indptr_ = device_array<std::int32_t>(indptr_);
    device_lengths_ = device_array<std::int32_t>(lengths_);
  }
  void name_pages_once() {
    std::vector<bool> named(pages);
    for (std::int32_t& id : table_) {
      if (!is_page(id)) continue;
      if (named[static_cast<std::size_t>(id)])
        id = -1 - id;
      else
        named[static_cast<std::size_t>(id)] = true;
    }
    upload_tables();
  }
  pk::page_table device_table() const {
    pk::page_table t;
    t.pages = device_table_.data();
    if (csr_) t.indptr = device_indptr_.data();
    t.row_stride = entries;
    return t;
  }
  pk::cache_view device_cache() {
    pk::cache_view c;
    c.pages = on_device();
    c.table = device_table();
    c.seq_lens = device_lengths_.data();
    c.batch = batch;
    c.max_seq_len = max_tokens_;
    return c;
  }
  /// A call is ok and reports just these flags.
  template <class Call>
  void check(std::uint32_t flags, Call&& call) {
    report_.assign(std::vector<pk::device_report>(1));
    REQUIRE(call());
    CHECK(report_.host()[0].flags == flags);
  }
  pk::exec exec() { return {nullptr, workspace_.data(), workspace_.size(), report_.data()}; }

  std::int32_t length(int b) const { return std::max(0, std::min(lengths_[static_cast<std::size_t>(b)], max_tokens_)); }
  /// What the table says, or -1 behind the end of the row.
  std::int32_t entry(int b, int i) const {
    const std::int32_t begin = indptr_[static_cast<std::size_t>(b)], end = indptr_[static_cast<std::size_t>(b) + 1];
    return i < end - begin ? table_[static_cast<std::size_t>(begin + i)] : -1;
  }
  int tokens_of(int b, int i) const { return std::max(0, std::min(length(b) - i * page_tokens_, page_tokens_)); }
  std::uint32_t expected_flags() const {
    std::uint32_t flags = 0;
    for (int b = 0; b < batch; ++b) {
      if (length(b) != lengths_[static_cast<std::size_t>(b)]) flags |= pk::report_length_out_of_range;
      for (int i = 0; tokens_of(b, i) > 0; ++i) {
        if (entry(b, i) < 0) flags |= pk::report_page_missing;
        if (entry(b, i) >= pages) flags |= pk::report_page_out_of_range;
      }
    }
    return flags;
  }
  static std::size_t of_page(std::int32_t id, int h) { return static_cast<std::size_t>((id * heads + h) * dim); }
  /// scale * q . k of any token of a page.
  double score(int b, int query_head, std::int32_t id) const {
    double s = 0.0;
    for (std::size_t c = 0; c < dim; ++c)
      s += static_cast<double>(half_of(queries_, static_cast<std::size_t>(b * query_heads + query_head) * dim + c)) *
           static_cast<double>(half_of(key_of_page_, of_page(id, query_head / group) + c));
    return s * static_cast<double>(scale);
  }

  void attention() {
    queries_ = random_halves(static_cast<std::size_t>(batch * query_heads * dim));
    device_queries_ = device_array<std::uint16_t>(queries_);
    std::vector<std::int32_t> starts;
    for (int b = 0; b <= batch; ++b) starts.push_back(b);
    const device_array<std::int32_t> device_starts(starts);
    pk::attention_options options;
    options.softmax_scale = scale;
    options.base = pk::lse_base::e;
    options.splits = random_.between(0, 3);
    workspace_ = device_array<std::uint8_t>(static_cast<std::size_t>(
        std::max(pk::decode_workspace_bytes<Format>({batch, heads, query_heads, 1, max_tokens_, options.splits}),
                 pk::value_gemv_workspace_bytes<Format>({batch, heads, query_heads, 1, max_tokens_, 0}))));
    workspace_.poison();
    REQUIRE(pk::initialize_workspace(exec()));
    device_array<float> out(static_cast<std::size_t>(batch * query_heads * dim)),
        lse(static_cast<std::size_t>(batch * query_heads));
    out.poison();
    lse.poison();
    check(expected_flags(), [&] {
      return pk::decode_attention(in(device_queries_.data(), dim), device_starts.data(), device_cache(), parameters(),
                                  pk::make_output(out.data(), pk::dtype::float32, {batch, query_heads, dim}),
                                  pk::make_output(lse.data(), pk::dtype::float32, {batch, query_heads}), options,
                                  exec());
    });
    rows_result expected{std::vector<float>(out.size()), std::vector<float>(lse.size())};
    for (int b = 0; b < batch; ++b)
      for (int h = 0; h < query_heads; ++h) {
        double top = -INFINITY, total = 0.0, sum[dim] = {};
        for (int i = 0; tokens_of(b, i) > 0; ++i)
          if (is_page(entry(b, i))) top = std::max(top, score(b, h, entry(b, i)));
        for (int i = 0; tokens_of(b, i) > 0; ++i) {
          if (!is_page(entry(b, i))) continue;
          const double weight = tokens_of(b, i) * std::exp(score(b, h, entry(b, i)) - top);
          total += weight;
          add(sum, weight, entry(b, i), h);
        }
        const auto row = static_cast<std::size_t>(b * query_heads + h);
        expected.lse[row] = static_cast<float>(total > 0.0 ? top + std::log(total) : -INFINITY);
        for (std::size_t c = 0; c < dim; ++c)
          expected.out[row * dim + c] = static_cast<float>(total > 0.0 ? sum[c] / total : 0.0);
      }
    check_rows<fused>(rows_result{out.host(), lse.host()}, expected);
  }
  void scores() {
    device_array<float> out(static_cast<std::size_t>(batch * query_heads * max_tokens_));
    out.poison();
    check(expected_flags(), [&] {
      return pk::key_gemv(in(device_queries_.data(), dim), device_cache(), parameters(), scale,
                          pk::make_output(out.data(), pk::dtype::float32, {batch, query_heads, max_tokens_}), exec());
    });
    const std::vector<float> got = out.host();
    int wrong = 0;
    std::size_t at = 0;
    for (int b = 0; b < batch; ++b)
      for (int h = 0; h < query_heads; ++h)
        for (int i = 0; i < entries; ++i) {
          const std::int32_t id = entry(b, i);
          const double s = is_page(id) ? score(b, h, id) : -INFINITY;
          for (int t = 0; t < page_tokens_; ++t, ++at) {
            if (t >= tokens_of(b, i))
              wrong += !untouched(got[at]);
            else if (is_page(id))
              wrong += !(std::fabs(static_cast<double>(got[at]) - s) < 0.02);
            else
              wrong += got[at] != -INFINITY;
          }
        }
    CHECK(wrong == 0);
  }
  void sums() {
    std::vector<float> weights;
    for (int row = 0; row < batch * query_heads; ++row)
      for (int i = 0; i < entries; ++i) {
        const auto w = static_cast<float>(random_.uniform());
        weights.insert(weights.end(), static_cast<std::size_t>(page_tokens_), w);
      }
    const device_array<float> device_weights(weights);
    device_array<float> out(static_cast<std::size_t>(batch * query_heads * dim));
    out.poison();
    check(expected_flags(), [&] {
      return pk::value_gemv(in(device_weights.data(), max_tokens_, pk::dtype::float32), device_cache(), parameters(),
                            pk::make_output(out.data(), pk::dtype::float32, {batch, query_heads, dim}), exec());
    });
    rows_result expected{std::vector<float>(out.size()), {}};
    for (int b = 0; b < batch; ++b)
      for (int h = 0; h < query_heads; ++h) {
        const auto row = static_cast<std::size_t>(b * query_heads + h);
        double sum[dim] = {};
        for (int i = 0; tokens_of(b, i) > 0; ++i)
          if (is_page(entry(b, i)))
            add(sum,
                tokens_of(b, i) * static_cast<double>(weights[row * static_cast<std::size_t>(max_tokens_) +
                                                              static_cast<std::size_t>(i * page_tokens_)]),
                entry(b, i), h);
        for (std::size_t c = 0; c < dim; ++c) expected.out[row * dim + c] = static_cast<float>(sum[c]);
      }
    check_rows<fused>(rows_result{out.host(), {}}, expected);
  }
  void elements() {
    const auto count = static_cast<std::size_t>(batch * heads * max_tokens_ * dim);
    device_array<std::uint16_t> k(count), v(count);
    k.poison();
    v.poison();
    const auto to = [&](device_array<std::uint16_t>& x) {
      return pk::make_output(x.data(), pk::dtype::float16, {batch, heads, max_tokens_, dim});
    };
    check(expected_flags(), [&] {
      return pk::decompress(on_device(), device_table(), device_lengths_.data(), parameters(), to(k), to(v), exec());
    });
    CHECK(wrong_elements(k.host(), key_of_page_) == 0);
    CHECK(wrong_elements(v.host(), value_of_page_) == 0);
  }
  int wrong_elements(const std::vector<std::uint16_t>& got, const std::vector<std::uint16_t>& of_pages) const {
    int wrong = 0;
    std::size_t at = 0;
    for (int b = 0; b < batch; ++b)
      for (int h = 0; h < heads; ++h)
        for (int t = 0; t < max_tokens_; ++t, at += dim) {
          const std::int32_t id = entry(b, t / page_tokens_);
          for (std::size_t c = 0; c < dim; ++c) {
            if (t >= length(b))
              wrong += got[at + c] != 0xffff;
            else if (is_page(id))
              wrong += got[at + c] != of_pages[of_page(id, h) + c];
            else
              wrong += !std::isnan(half_of(got, at + c));
          }
        }
    return wrong;
  }

  void compress() {
    std::fill(keys_.host.begin(), keys_.host.end(), std::uint8_t{0xff});
    std::fill(values_.host.begin(), values_.host.end(), std::uint8_t{0xff});
    upload_pages();
    const std::vector<std::uint16_t> k = random_halves(heads * dim), v = random_halves(heads * dim);
    const device_array<std::uint16_t> device_k(k), device_v(v);
    const auto sequences = [&](const void* data) {
      auto x = repeated(data, 1, max_tokens_);
      x.extent[0] = batch;
      x.stride[0] = 0;
      return x;
    };
    check(expected_flags(), [&] {
      return pk::compress(sequences(device_k.data()), sequences(device_v.data()), device_lengths_.data(), parameters(),
                          on_device(), device_table(), exec());
    });
    for (int b = 0; b < batch; ++b)  // one page after the other as a sequence of its own
      for (int i = 0; tokens_of(b, i) > 0; ++i) {
        if (!is_page(entry(b, i))) continue;
        pk::page_table one;
        const std::int32_t id = entry(b, i), tokens = tokens_of(b, i);
        one.pages = &id;
        one.row_stride = 1;
        pk::device_report report{};
        REQUIRE(pk::reference::compress(repeated(k.data(), 1, tokens), repeated(v.data(), 1, tokens), nullptr,
                                        parameters(), on_host(), one, report));
      }
    CHECK(unchanged());
  }
  /// Tokens and tiles at slots of any numbers, each valid one at most once.
  void store() {
    const std::int64_t slots = std::int64_t{pages} * page_tokens_;
    const auto any_slot = [&](std::int64_t unit) {
      const std::int64_t wrong[] = {-1, std::numeric_limits<std::int64_t>::min(), slots,
                                    std::numeric_limits<std::int64_t>::max() / unit * unit};
      if (random_.one_in(2)) return random_.between(0, static_cast<int>(slots / unit) - 1) * unit;
      return random_.one_in(3) ? static_cast<std::int64_t>(random_.bits()) / unit * unit : wrong[random_.between(0, 3)];
    };
    std::vector<bool> taken(static_cast<std::size_t>(slots));
    const auto once = [&](std::int64_t slot) {
      if (slot < 0 || slot >= slots) return slot;
      if (taken[static_cast<std::size_t>(slot)]) return std::int64_t{-7};
      taken[static_cast<std::size_t>(slot)] = true;
      return slot;
    };
    std::vector<std::int64_t> slot_of;
    for (int i = 0; i < batch; ++i) slot_of.push_back(once(any_slot(1)));
    const device_array<std::int64_t> device_slots(slot_of);
    const std::vector<std::uint16_t> k = random_halves(static_cast<std::size_t>(batch * heads * dim)),
                                     v = random_halves(k.size());
    const device_array<std::uint16_t> device_k(k), device_v(v);
    const auto tokens = [](const void* data) { return pk::make_input(data, pk::dtype::float16, {batch, heads, dim}); };
    pk::device_report report{};
    REQUIRE(pk::reference::store_tokens(tokens(k.data()), tokens(v.data()), slot_of.data(), parameters(), on_host(),
                                        report));
    check(report.flags, [&] {
      return pk::store_tokens(tokens(device_k.data()), tokens(device_v.data()), device_slots.data(), parameters(),
                              on_device(), exec());
    });
    CHECK(unchanged());

    taken.assign(taken.size(), false);
    std::vector<pk::tile_move> moves(batch);
    for (pk::tile_move& m : moves) {
      m.slot = once(any_slot(64));
      m.row = random_.one_in(3) ? static_cast<std::int32_t>(random_.bits()) : random_.between(-1, batch);
      m.first = random_.one_in(3) ? static_cast<std::int32_t>(random_.bits()) : random_.between(-1, 64);
    }
    const device_array<pk::tile_move> device_moves(moves);
    report = {};
    REQUIRE(pk::reference::store_tiles(repeated(k.data(), batch, 64), repeated(v.data(), batch, 64), moves.data(),
                                       batch, parameters(), on_host(), report));
    check(report.flags, [&] {
      return pk::store_tiles(repeated(device_k.data(), batch, 64), repeated(device_v.data(), batch, 64),
                             device_moves.data(), batch, parameters(), on_device(), exec());
    });
    CHECK(unchanged());
  }

  struct rows_result {
    std::vector<float> out, lse;
  };
  static pk::input_view<3> in(const void* data, std::int64_t length, pk::dtype type = pk::dtype::float16) {
    return pk::make_input(data, type, {batch, query_heads, length});
  }
  void add(double (&sum)[dim], double weight, std::int32_t id, int query_head) const {
    for (std::size_t c = 0; c < dim; ++c)
      sum[c] += weight * static_cast<double>(half_of(value_of_page_, of_page(id, query_head / group) + c));
  }
  static bool untouched(float x) {
    constexpr std::uint32_t poison = 0xffffffffu;
    return std::memcmp(&x, &poison, 4) == 0;
  }

  static constexpr float scale = 0.125f;
  random_source& random_;
  Format format_;
  int page_tokens_, max_tokens_;
  guarded_bytes keys_, values_;
  pk::pages_view view_ = {};
  std::vector<std::uint16_t> key_of_page_, value_of_page_, queries_;
  std::vector<std::int32_t> table_, indptr_, lengths_;
  bool csr_ = false;
  device_array<std::int32_t> device_table_, device_indptr_, device_lengths_;
  device_array<std::uint16_t> device_queries_;
  device_array<std::uint8_t> workspace_;
  device_array<pk::device_report> report_{std::vector<pk::device_report>(1)};
};

template <class Format>
void check_hostile_numbers(const Format& format, std::uint64_t first_seed) {
  for (int round = 0; round < rounds; ++round) {
    const std::uint64_t seed = first_seed + static_cast<std::uint64_t>(round);
    INFO("seed " << seed);
    random_source random(seed);
    hostile_calls<Format> calls(random, format, 1 + round % 2);
    calls.reads();
    calls.writes();
  }
#if !defined(PACKKV_SIMT_EXECUTOR)
  std::printf("RECORD: %d random page tables, slots and moves\n", rounds * batch);
#endif
}

}  // namespace

TEST_CASE("fused calls touch nothing outside the pages, whatever the tables, lengths, slots and moves") {
  check_hostile_numbers(fused{}, 9800);
}

TEST_CASE("general calls touch nothing outside the pages, whatever the tables, lengths, slots and moves") {
  check_hostile_numbers(simple_format(), 9900);
}
