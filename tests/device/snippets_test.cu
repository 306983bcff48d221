// SPDX-License-Identifier: Apache-2.0
// The device code of README.md and docs/*.md: scripts/snippets copies the marked regions into the pages. One format
// serves them all, because a fused kernel takes long to compile.
// [include]
#include <packkv/packkv.cuh>
namespace pk = packkv;
// [include]

#include <cmath>
#include <vector>

#include "../support/catch.hpp"
#include "test_cache.hpp"

using namespace packkv_test;

namespace {

// [format]
// K: 2.1875 bits per value, everything counted; V: 2.125.
using format = pk::cache_format<pk::key_codec<128, pk::basis, pk::rms_scale, pk::plan<4, 2, 1, 1>, pk::leading<1>>,
                                pk::value_codec<128, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>>;
// [format]
static_assert(format::key().bits_per_value() == 2.1875 && format::value().bits_per_value() == 2.125);

constexpr int batch = 2, kv_heads = 2, query_heads = 4, head_dim = 128, max_seq_len = 192, pages_per_sequence = 3,
              num_pages = 7, sinks = 4, ring_window = 16, ring_capacity = 64, max_query_len = 4;
constexpr std::int64_t pool_bytes =
    std::int64_t{num_pages} * kv_heads * (format::key_tile_bytes + format::value_tile_bytes);

/// An array in device memory and its copy on the host, where the reference works.
template <class T>
struct both {
  std::vector<T> host;
  device_array<T> device;

  both() = default;
  explicit both(std::vector<T> x) : host(std::move(x)), device(host) {}
  void put(std::vector<T> x) {
    host = std::move(x);
    device.assign(host);
  }
  void fetch() { host = device.host(); }
};

std::vector<std::uint16_t> random_halves(random_source& random, std::size_t count) {
  std::vector<std::uint16_t> x(count);
  for (auto& h : x) h = pk::float_to_half(random.normal());
  return x;
}

/// For either memory: `pool` is the first byte of the pages.
pk::pages_view pages_of(std::uint8_t* pool) {
  // [pages]
  // A page holds, for each KV head, a K tile and then a V tile. pool: device memory, 16-byte aligned.
  constexpr std::int64_t head_bytes = format::key_tile_bytes + format::value_tile_bytes;
  pk::pages_view pages;
  pages.key_data = pool;
  pages.value_data = pool + format::key_tile_bytes;
  pages.key_head_stride = pages.value_head_stride = head_bytes;
  pages.key_page_stride = pages.value_page_stride = kv_heads * head_bytes;
  pages.num_pages = num_pages;
  pages.kv_heads = kv_heads;
  pages.tiles_per_page = 1;
  // [pages]
  return pages;
}

pk::cache_view cache_of(const pk::pages_view& pages, const std::int32_t* page_ids, const std::int32_t* seq_lens) {
  // [cache]
  pk::cache_view cache;
  cache.pages = pages;
  cache.table.pages = page_ids;  // int32 [batch, pages_per_sequence]
  cache.table.row_stride = pages_per_sequence;
  cache.seq_lens = seq_lens;  // int32 [batch]
  cache.batch = batch;
  cache.max_seq_len = max_seq_len;  // a bound: lengths themselves are read on the device
  // [cache]
  return cache;
}

void add_recent(pk::cache_view& cache, const std::uint16_t* sink_keys, const std::uint16_t* sink_values,
                const std::uint16_t* ring_keys, const std::uint16_t* ring_values) {
  // [recent]
  const auto halves = [](const void* data, int tokens) {
    return pk::make_input(data, pk::dtype::float16, {batch, kv_heads, tokens, head_dim});
  };
  cache.sinks.keys = halves(sink_keys, sinks);  // tokens 0 .. sinks - 1
  cache.sinks.values = halves(sink_values, sinks);
  cache.ring.keys = halves(ring_keys, ring_capacity);  // token t in slot t % ring_capacity
  cache.ring.values = halves(ring_values, ring_capacity);
  cache.ring.window = ring_window;  // what a query reads there; ring_capacity >= ring_window + max_query_len - 1
  // [recent]
}

pk::parameters<format> parameters_of(const float* basis, const float* basis_inverse, const float* leading_scale) {
  // [parameters]
  pk::parameters<format> parameters;
  parameters.key.basis = basis;                  // float [kv_heads, 128, 128], 16-byte aligned
  parameters.key.basis_inverse = basis_inverse;  // the same shape; only coding reads it
  parameters.key.leading_scale = leading_scale;  // float [kv_heads, 1]
  // [parameters]
  return parameters;
}

/// An engine with one layer: random weights, random tokens, a page table in no order.
struct engine {
  random_source random{11};
  both<float> basis, basis_inverse, leading_scale{std::vector<float>(kv_heads, 0.04f)};
  both<std::uint8_t> pool{std::vector<std::uint8_t>(static_cast<std::size_t>(pool_bytes), 0xff)};
  both<std::int32_t> page_ids{{4, 1, 6, 0, 5, 2}}, seq_lens{{100, 37}};
  both<std::uint16_t> keys, values, sink_keys, sink_values, ring_keys, ring_values;
  both<std::uint16_t> new_keys, new_values, queries;
  both<std::int64_t> slots;
  both<std::int32_t> query_start_loc{{0, 1, 2}};
  both<float> out, lse;
  device_array<pk::device_report> report{std::vector<pk::device_report>(1)};
  pk::device_report host_report;
  pk::exec exec;
  void* workspace = nullptr;
  int query_tokens = batch;

  engine() {
    std::vector<float> b, inverse;
    for (int h = 0; h < kv_heads; ++h) append_basis(random, head_dim, b, inverse);
    basis = both<float>(b), basis_inverse = both<float>(inverse);
    const auto tokens = [&](int count) {
      return both<std::uint16_t>(random_halves(random, static_cast<std::size_t>(batch * kv_heads * count * head_dim)));
    };
    keys = tokens(max_seq_len), values = tokens(max_seq_len);
    sink_keys = tokens(sinks), sink_values = tokens(sinks);
    ring_keys = tokens(ring_capacity), ring_values = tokens(ring_capacity);
    resize(batch);
    slots = both<std::int64_t>({slot_of(0, seq_lens.host[0]), slot_of(1, seq_lens.host[1])});
    allocate();
  }
  ~engine() { (void)cudaFree(workspace); }
  engine(const engine&) = delete;
  engine& operator=(const engine&) = delete;

  /// Operands of `tokens` query tokens.
  void resize(int tokens) {
    query_tokens = tokens;
    const auto of = [&](int heads) {
      return both<std::uint16_t>(random_halves(random, static_cast<std::size_t>(tokens * heads * head_dim)));
    };
    new_keys = of(kv_heads), new_values = of(kv_heads), queries = of(query_heads);
    out = both<float>(std::vector<float>(static_cast<std::size_t>(tokens * query_heads * head_dim), NAN));
    lse = both<float>(std::vector<float>(static_cast<std::size_t>(tokens * query_heads), NAN));
  }

  std::int64_t slot_of(int sequence, int token) const {
    // [slot]
    const std::int64_t page = page_ids.host[sequence * pages_per_sequence + token / 64];
    return page * 64 + token % 64;  // of a page of 64 tokens
    // [slot]
  }

  void allocate() {
    const cudaStream_t stream = nullptr;
    pk::device_report* const device_report = report.data();
    // [workspace]
    pk::decode_maxima maxima;
    maxima.batch = batch;
    maxima.kv_heads = kv_heads;
    maxima.query_heads = query_heads;
    maxima.max_query_len = max_query_len;
    maxima.max_seq_len = max_seq_len;
    const std::int64_t bytes = pk::decode_workspace_bytes<format>(maxima);  // -1: the maxima make no sense
    if (bytes < 0 || cudaMalloc(&workspace, static_cast<std::size_t>(bytes)) != cudaSuccess) return;
    exec = pk::exec{stream, workspace, static_cast<std::size_t>(bytes), device_report};
    const pk::status s = pk::initialize_workspace(exec);  // once, not for every call
    // [workspace]
    require(s);
  }
  static void require(const pk::status& s) {
    INFO(s.message);
    REQUIRE(s);
  }

  pk::parameters<format> parameters() const {
    return parameters_of(basis.device.data(), basis_inverse.device.data(), leading_scale.device.data());
  }
  pk::cache_view cache() {
    return cache_of(pages_of(pool.device.data()), page_ids.device.data(), seq_lens.device.data());
  }
  pk::input_view<3> query_view(const both<std::uint16_t>& x, int heads) const {
    return pk::make_input(x.device.data(), pk::dtype::float16, {query_tokens, heads, head_dim});
  }
  pk::output_view<3> out_view() {
    return pk::make_output(out.device.data(), pk::dtype::float32, {query_tokens, query_heads, head_dim});
  }
  pk::output_view<2> lse_view() {
    return pk::make_output(lse.device.data(), pk::dtype::float32, {query_tokens, query_heads});
  }

  static pk::attention_options attention_options() {
    // [options]
    pk::attention_options options;
    options.softmax_scale = 1.0f / std::sqrt(128.0f);
    options.base = pk::lse_base::e;  // of lse; must be chosen where lse is wanted
    options.max_query_len = max_query_len;
    // [options]
    return options;
  }

  /// What the reference computes from the same bytes: `change` is applied to its cache.
  template <class Change>
  std::vector<float> expected(const pk::attention_options& options, Change&& change) {
    pool.fetch();
    pk::cache_view on_host = cache_of(pages_of(pool.host.data()), page_ids.host.data(), seq_lens.host.data());
    change(on_host);
    std::vector<float> rows(out.host.size());
    pk::input_view<3> q = query_view(queries, query_heads);
    q.data = queries.host.data();
    require(pk::reference::decode_attention(
        q, query_start_loc.host.data(), on_host,
        parameters_of(basis.host.data(), basis_inverse.host.data(), leading_scale.host.data()),
        pk::make_output(rows.data(), pk::dtype::float32, {query_tokens, query_heads, head_dim}), {}, options,
        host_report));
    return rows;
  }
  void check(const pk::attention_options& options) {
    check(options, [](pk::cache_view&) {});
  }
  template <class Change>
  void check(const pk::attention_options& options, Change&& change) {
    out.fetch();
    CHECK(worst_row_error(out.host, expected(options, change), head_dim) < 6e-3);  // as for other plans with 1 bit
    CHECK(report.host()[0].flags == 0);
    CHECK(host_report.flags == 0);
  }
};

/// Codes what the sequences hold, from token 0 on.
void compress_prompt(engine& e) {
  const pk::cache_view cache = e.cache();
  const pk::parameters<format> parameters = e.parameters();
  const std::uint16_t *const prompt_keys = e.keys.device.data(), *const prompt_values = e.values.device.data();
  const std::int32_t* const lengths = e.seq_lens.device.data();
  const pk::exec exec = e.exec;
  // [compress]
  const auto keys = pk::make_input(prompt_keys, pk::dtype::float16, {batch, kv_heads, max_seq_len, head_dim});
  const auto values = pk::make_input(prompt_values, pk::dtype::float16, {batch, kv_heads, max_seq_len, head_dim});
  const pk::status s = pk::compress(keys, values, lengths, parameters, cache.pages, cache.table, exec);
  // [compress]
  engine::require(s);
}

/// Stores new tokens, and attends with the queries, over `cache`. Attends first if its ring has the new tokens; the
/// cache is settled then.
pk::status step(engine& e, const pk::cache_view& cache, bool attend_first = false) {
  const auto new_keys = e.query_view(e.new_keys, kv_heads), new_values = e.query_view(e.new_values, kv_heads);
  const auto queries = e.query_view(e.queries, query_heads);
  const auto out = e.out_view();
  const auto lse = e.lse_view();
  const pk::parameters<format> parameters = e.parameters();
  const pk::attention_options options = engine::attention_options();
  const pk::pages_view& pages = cache.pages;
  pk::exec exec = e.exec;
  const std::int64_t* const slots = e.slots.device.data();
  const std::int32_t* const query_start_loc = e.query_start_loc.device.data();
  if (attend_first) {
    // [settled]
    // The kernel before makes queries and the ring's new tokens; lengths, tables and tiles are older.
    exec.settled_cache = true;
    // [settled]
    // [behind]
    // The ring has the new tokens: attention does not read their codes, which may be stored while it ends.
    pk::status s = pk::decode_attention(queries, query_start_loc, cache, parameters, out, lse, options, exec);
    exec.beside_previous = true;
    if (s) s = pk::store_tokens(new_keys, new_values, slots, parameters, pages, exec);
    // [behind]
    return s;
  }
  // [step]
  // 16-bit tokens into the pages, then attention over the pages, both in the order of exec.stream.
  pk::status s = pk::store_tokens(new_keys, new_values, slots, parameters, pages, exec);
  if (s) s = pk::decode_attention(queries, query_start_loc, cache, parameters, out, lse, options, exec);
  // [step]
  return s;
}

constexpr int layers = 3;

/// Of one layer, in pages that hold all of them.
pk::pages_view layer_pages(std::uint8_t* pool, int layer) {
  // [layers]
  // A page holds the layers one behind the other, for each KV head of a layer a K tile and then a V tile.
  constexpr std::int64_t head_bytes = format::key_tile_bytes + format::value_tile_bytes;
  pk::pages_view pages;
  pages.key_data = pool + layer * kv_heads * head_bytes;
  pages.value_data = pool + layer * kv_heads * head_bytes + format::key_tile_bytes;
  pages.key_head_stride = pages.value_head_stride = head_bytes;
  pages.key_page_stride = pages.value_page_stride = layers * kv_heads * head_bytes;
  pages.num_pages = num_pages;
  pages.kv_heads = kv_heads;
  pages.tiles_per_page = 1;
  // [layers]
  return pages;
}

/// `tokens` new tokens of all layers.
pk::status store_together(std::uint8_t* pool, const std::uint16_t* new_keys, const std::uint16_t* new_values,
                          const std::int64_t* slots, int tokens, const pk::parameters<format>& parameters,
                          const pk::exec& exec) {
  // [together]
  // To store_tokens the KV heads of all layers are those of one.
  const auto keys = pk::make_input(new_keys, pk::dtype::float16, {tokens, layers * kv_heads, head_dim});
  const auto values = pk::make_input(new_values, pk::dtype::float16, {tokens, layers * kv_heads, head_dim});
  pk::pages_view pages = layer_pages(pool, 0);
  pages.kv_heads = layers * kv_heads;  // of parameters, too: [layers * kv_heads, 128, 128], [layers * kv_heads, 1]
  const pk::status s = pk::store_tokens(keys, values, slots, parameters, pages, exec);
  // [together]
  return s;
}

}  // namespace

TEST_CASE("documentation: the tokens of all layers are stored in one call") {
  random_source random(12);
  const std::vector<std::int64_t> slots = {3 * 64 + 17, 5 * 64 + 63, 64};
  const int tokens = static_cast<int>(slots.size());
  constexpr std::size_t row = layers * kv_heads * head_dim;  // of a token
  const auto keys = random_halves(random, slots.size() * row), values = random_halves(random, slots.size() * row);
  std::vector<float> basis, inverse;
  for (int h = 0; h < layers * kv_heads; ++h) append_basis(random, head_dim, basis, inverse);
  std::vector<float> leading;
  for (int h = 0; h < layers * kv_heads; ++h) leading.push_back(0.02f + 0.01f * static_cast<float>(h));
  std::vector<std::uint8_t> expected(static_cast<std::size_t>(layers * pool_bytes), 0xff);
  const device_array<std::uint16_t> device_keys(keys), device_values(values);
  const device_array<std::int64_t> device_slots(slots);
  const device_array<float> device_basis(basis), device_inverse(inverse), device_leading(leading);
  device_array<std::uint8_t> pool(expected);
  engine::require(store_together(pool.data(), device_keys.data(), device_values.data(), device_slots.data(), tokens,
                                 parameters_of(device_basis.data(), device_inverse.data(), device_leading.data()),
                                 pk::exec{}));
  for (int layer = 0; layer < layers; ++layer) {  // layer by layer on the host
    const auto of_layer = [&](const std::vector<std::uint16_t>& x) {
      pk::input_view<3> in =
          pk::make_input(x.data() + layer * kv_heads * head_dim, pk::dtype::float16, {tokens, kv_heads, head_dim});
      in.stride[0] = 2 * row;
      return in;
    };
    const std::ptrdiff_t matrices = layer * kv_heads * head_dim * head_dim;
    pk::device_report report{};
    engine::require(pk::reference::store_tokens(
        of_layer(keys), of_layer(values), slots.data(),
        parameters_of(basis.data() + matrices, inverse.data() + matrices, leading.data() + layer * kv_heads),
        layer_pages(expected.data(), layer), report));
    CHECK(report.flags == 0);
  }
  CHECK(pool.host() == expected);
}

TEST_CASE("documentation: a prompt is compressed, a token stored, and attention computed on the pages") {
  engine e;
  compress_prompt(e);
  e.seq_lens.put({101, 38});
  engine::require(step(e, e.cache()));
  e.check(engine::attention_options());
}

TEST_CASE("documentation: sinks and ring take the place of coded tokens") {
  engine e;
  compress_prompt(e);
  e.seq_lens.put({101, 38});
  pk::cache_view cache = e.cache();
  add_recent(cache, e.sink_keys.device.data(), e.sink_values.device.data(), e.ring_keys.device.data(),
             e.ring_values.device.data());
  for (const bool attend_first : {false, true}) {
    engine::require(step(e, cache, attend_first));
    e.check(engine::attention_options(), [&](pk::cache_view& on_host) {
      add_recent(on_host, e.sink_keys.host.data(), e.sink_values.host.data(), e.ring_keys.host.data(),
                 e.ring_values.host.data());
    });
  }
}

TEST_CASE("documentation: drafts are verified together, and rejected ones overwritten") {
  engine e;
  compress_prompt(e);
  // [drafts]
  // Query tokens of sequence b: query_start_loc[b] .. query_start_loc[b + 1] - 1. Here 3 and 1.
  const std::vector<std::int32_t> query_start_loc = {0, 3, 4};
  // seq_lens counts the new tokens: query i of n stands at position seq_len - n + i and sees up to itself.
  const std::vector<std::int32_t> seq_lens = {100 + 3, 37 + 1};
  // [drafts]
  e.seq_lens.put(seq_lens);
  e.query_start_loc.put(query_start_loc);
  e.resize(4);
  e.slots = both<std::int64_t>({e.slot_of(0, 100), e.slot_of(0, 101), e.slot_of(0, 102), e.slot_of(1, 37)});
  engine::require(step(e, e.cache()));
  e.check(engine::attention_options());

  // Of sequence 0 one draft was accepted: the next token goes where the second was.
  e.resize(2);
  e.query_start_loc = both<std::int32_t>({0, 1, 2});
  e.seq_lens.put({102, 39});
  e.slots = both<std::int64_t>({e.slot_of(0, 101), e.slot_of(1, 38)});
  engine::require(step(e, e.cache()));
  e.check(engine::attention_options());
}

TEST_CASE("documentation: a shared prefix and the rest of a sequence are merged by their log-sum-exps") {
  engine e;
  compress_prompt(e);
  e.seq_lens.put({100, 70});
  compress_prompt(e);
  const pk::attention_options options = engine::attention_options();
  const pk::cache_view cache = e.cache();
  const pk::parameters<format> parameters = e.parameters();
  const auto queries = e.query_view(e.queries, query_heads);
  const pk::exec exec = e.exec;
  const std::int32_t* const query_start_loc = e.query_start_loc.device.data();
  const device_array<std::int32_t> prefix(std::vector<std::int32_t>{64, 64}), rest(std::vector<std::int32_t>{36, 6});
  const std::int32_t *const prefix_lens = prefix.data(), *const rest_lens = rest.data();
  constexpr std::int64_t rows = batch, heads = query_heads;
  device_array<float> two_outs(2 * rows * heads * head_dim), two_lses(2 * rows * heads);
  float *const outs = two_outs.data(), *const lses = two_lses.data();
  const auto out = e.out_view();
  const auto lse = e.lse_view();
  pk::status s;
  const auto attend = [&](const pk::cache_view& part, const pk::attention_options& with, int i) {
    return pk::decode_attention(
        queries, query_start_loc, part, parameters,
        pk::make_output(outs + i * rows * heads * head_dim, pk::dtype::float32, {rows, heads, head_dim}),
        pk::make_output(lses + i * rows * heads, pk::dtype::float32, {rows, heads}), with, exec);
  };
  // [merge]
  pk::cache_view first = cache, second = cache;
  first.seq_lens = prefix_lens;  // 64 tokens each: the page that they share
  pk::attention_options whole = options;
  whole.causal = false;     // every query sees all of the prefix
  second.table.pages += 1;  // what follows it
  second.seq_lens = rest_lens;
  s = attend(first, whole, 0);  // decode_attention into outs[0] and lses[0]
  if (s) s = attend(second, options, 1);
  if (s)
    s = pk::merge_states(pk::make_input(outs, pk::dtype::float32, {2, rows, heads, head_dim}),
                         pk::make_input(lses, pk::dtype::float32, {2, rows, heads}), out, lse, options.base, exec);
  // [merge]
  engine::require(s);
  e.check(options);
}

TEST_CASE("documentation: what the device finds wrong is in the report, what the host sees in the status") {
  engine e;
  compress_prompt(e);
  pk::cache_view cache = e.cache();
  cache.max_seq_len = 64;  // sequence 0 has 100 tokens
  engine::require(step(e, cache));
  const pk::device_report report = e.report.host()[0];
  CHECK(report.flags == pk::report_length_out_of_range);

  const pk::attention_options options;  // no softmax_scale
  const auto run = [&] {
    return pk::decode_attention(e.query_view(e.queries, query_heads), e.query_start_loc.device.data(), cache,
                                e.parameters(), e.out_view(), e.lse_view(), options, e.exec);
  };
  std::string said;
  const auto log = [&](const char* message, long long detail) { said = message + std::to_string(detail); };
  // [status]
  if (const pk::status s = run(); !s) log(s.message, s.detail);  // nothing was launched
  // [status]
  CHECK(said == "the softmax scale must be finite and > 00");
}

TEST_CASE("documentation: layers of different plans choose among compiled formats") {
  using four_bit =
      pk::cache_format<pk::key_codec<128, pk::basis, pk::rms_scale, pk::plan<4, 4, 4, 4>, pk::leading<1>>,
                       pk::value_codec<128, pk::hadamard, pk::rms_scale, pk::plan<4, 4, 4, 4, 4, 4, 4, 4>>>;
  using two_bit = format;
  // [family]
  using family = pk::format_family<two_bit, four_bit>;  // what was compiled; all have the same head dims
  family::runtime_type layer_format;                    // what a layer's configuration says
  layer_format.key_spec = four_bit::key();
  layer_format.value_spec = four_bit::value();
  const int found = family::find(layer_format);  // -1: no kernel; family::decode_attention would refuse it
  // [family]
  CHECK(found == 1);
  layer_format.value_spec = two_bit::value();
  CHECK(family::find(layer_format) == -1);
}

#if !defined(PACKKV_SIMT_EXECUTOR)
TEST_CASE("documentation: a captured step is replayed with other lengths") {
  engine e;
  compress_prompt(e);
  cudaStream_t stream;
  check_cuda(cudaStreamCreate(&stream));
  e.exec.stream = stream;
  check_cuda(cudaDeviceSynchronize());
  const auto store_and_attend = [&] { return step(e, e.cache()); };
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  // [graph]
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  const pk::status s = store_and_attend();  // the two calls of a step, on this stream
  cudaStreamEndCapture(stream, &graph);
  cudaGraphInstantiate(&replay, graph, 0);
  // [graph]
  engine::require(s);
  for (int length = 101; length < 104; ++length) {
    e.seq_lens.put({length, length - 63});
    e.slots.put({e.slot_of(0, length - 1), e.slot_of(1, length - 64)});
    check_cuda(cudaGraphLaunch(replay, stream));
    e.check(engine::attention_options());
  }
  check_cuda(cudaGraphExecDestroy(replay));
  check_cuda(cudaGraphDestroy(graph));
  check_cuda(cudaStreamDestroy(stream));
}
#endif
