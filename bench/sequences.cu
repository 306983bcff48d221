// SPDX-License-Identifier: Apache-2.0
// The formats of whole sequences on the GPU: encode, decompress, GEMVs and attention of one sequence, 8 KV heads, 32
// query heads, head dim 128, coded copies rotated over more than the L2. One iteration is a median of 72 launches.
#include <benchmark/benchmark.h>

#include <memory>

#include "../examples/random_cache.cuh"

namespace pk = packkv;

namespace {

constexpr int dim = 128;
constexpr std::int64_t heads = 8, query_heads = 32;

/// Random K and V [heads, tokens, dim], queries, weights, outputs.
struct tensors {
  std::int64_t tokens;
  device_buffer<std::uint16_t> data, decoded;
  device_buffer<float> scores, out;
  device_buffer<std::uint8_t> workspace;
  std::int64_t workspace_bytes;

  explicit tensors(std::int64_t n)
      : tokens(n),
        data(2 * heads * n * dim),
        decoded(heads * n * dim),
        scores(query_heads * n),
        out(query_heads * dim),
        workspace(pk::sequence_workspace_bytes<dim>({1, heads, query_heads, 1, n, 0})),
        workspace_bytes(pk::sequence_workspace_bytes<dim>({1, heads, query_heads, 1, n, 0})) {
    random_cache_detail::fill_random<256><<<4096, 256>>>(data.data(), 2 * heads * n * dim, 12345u);
    require(cudaGetLastError());
    require(cudaMemset(scores.data(), 0x1c, static_cast<std::size_t>(query_heads * n) * 4));  // tiny weights
    require(pk::initialize_workspace(exec()));
  }
  pk::exec exec() const { return {nullptr, workspace.data(), static_cast<std::size_t>(workspace_bytes), nullptr}; }
  pk::input_view<3> side(int which) const {
    return pk::make_input<3>(data.data() + which * heads * tokens * dim, pk::dtype::float16, {heads, tokens, dim});
  }
  pk::output_view<3> decoded_view() const {
    return pk::make_output<3>(decoded.data(), pk::dtype::float16, {heads, tokens, dim});
  }
  pk::input_view<3> queries() const {
    return pk::make_input<3>(data.data(), pk::dtype::float16, {query_heads, 1, dim});
  }
  pk::output_view<3> scores_out(std::int64_t n) const {
    return pk::make_output<3>(scores.data(), pk::dtype::float32, {query_heads, 1, n});
  }
  pk::input_view<3> weights(std::int64_t n) const {
    return pk::make_input<3>(scores.data(), pk::dtype::float32, {query_heads, 1, n});
  }
  pk::output_view<3> outputs() const {
    return pk::make_output<3>(out.data(), pk::dtype::float32, {query_heads, 1, dim});
  }
};

constexpr float scale = 0.08838835f;

/// One coded copy of K and V of a grouped format.
struct grouped_copy {
  const tensors& x;
  pk::grouped_spec spec[2];
  pk::grouped_view view[2];
  std::unique_ptr<device_buffer<std::uint8_t>> bytes[2];
  std::int64_t coded_bytes = 0;

  grouped_copy(const tensors& t, const pk::grouped_spec& key, const pk::grouped_spec& value) : x(t), spec{key, value} {
    for (int i = 0; i < 2; ++i) {
      pk::grouped_layout layout;
      require(pk::make_grouped_layout(spec[i], heads, x.tokens, 0, layout));
      bytes[i] = std::make_unique<device_buffer<std::uint8_t>>(layout.total_bytes);
      view[i] = {spec[i], bytes[i]->data(), layout.total_bytes, heads, x.tokens, 0, pk::dtype::float16};
      coded_bytes += layout.total_bytes;
    }
    encode();
  }
  void encode() {
    for (int i = 0; i < 2; ++i)
      require(pk::encode_grouped<dim>(spec[i], x.side(i), 0, bytes[i]->data(), view[i].size, x.exec()));
  }
  void decompress() {
    for (const pk::grouped_view& v : view) require(pk::decode_grouped<dim>(v, x.decoded_view(), x.exec()));
  }
  void key_gemv() { require(pk::grouped_key_gemv<dim>(x.queries(), view[0], scale, x.scores_out(x.tokens), x.exec())); }
  void value_gemv() { require(pk::grouped_value_gemv<dim>(x.weights(x.tokens), view[1], x.outputs(), x.exec())); }
  void attention() {
    require((pk::grouped_attention<dim, dim>(x.queries(), view[0], view[1], scale, x.outputs(), {}, x.exec())));
  }
};

/// The same of packs in the orders none and median; bench/packs times encoding in every order.
struct pack_copy {
  const tensors& x;
  pk::pack_format format;
  std::int64_t blocks, coded_bytes = 0;
  device_buffer<std::uint8_t> order;
  std::unique_ptr<device_buffer<pk::pack_range>> ranges[2];
  std::unique_ptr<device_buffer<std::int64_t>> offsets[2];
  std::unique_ptr<device_buffer<std::uint8_t>> data[2];
  pk::pack_side sides[2];

  pack_copy(const tensors& t, const pk::pack_format& f) : x(t), format(f), blocks(t.tokens / 64), order(blocks * 64) {
    for (const pk::side which : {pk::side::key, pk::side::value}) {
      const int i = static_cast<int>(which);
      const std::int64_t tiles = pk::tile_count(f, blocks), most = pk::max_pack_bytes(f, which, blocks);
      ranges[i] = std::make_unique<device_buffer<pk::pack_range>>(blocks * pk::range_count(f, which));
      offsets[i] = std::make_unique<device_buffer<std::int64_t>>(tiles + 1);
      data[i] = std::make_unique<device_buffer<std::uint8_t>>(most);
      sides[i] = {ranges[i]->data(), offsets[i]->data(), data[i]->data(), most};
    }
    encode();
    for (int i = 0; i < 2; ++i) {
      std::int64_t end = 0;
      require(cudaMemcpy(&end, sides[i].offsets + pk::tile_count(f, blocks), 8, cudaMemcpyDeviceToHost));
      coded_bytes += pk::stored_bytes(f, static_cast<pk::side>(i), blocks, end);
    }
  }
  pk::packs_view view() const {
    const auto read = [](const pk::pack_side& s) {
      return pk::const_pack_side{s.ranges, s.offsets, s.data, s.capacity};
    };
    return {read(sides[0]), read(sides[1]), blocks};
  }
  static pk::input_view<3> without_queries(const pk::input_view<3>& v) {  // [heads, 1, n] as [1, heads, n]
    return pk::make_input<3>(v.data, v.type, {1, v.extent[0], v.extent[2]});
  }
  static pk::output_view<3> without_queries(const pk::output_view<3>& v) {
    return pk::make_output<3>(v.data, v.type, {1, v.extent[0], v.extent[2]});
  }
  void encode() {
    require(pk::compress(format, pk::detail::as_batch(x.side(0)), pk::detail::as_batch(x.side(1)), blocks, sides[0],
                         sides[1], {nullptr, order.data()}, x.exec()));
  }
  void decompress() {
    const auto to = pk::detail::as_batch(x.decoded_view());
    require((pk::decompress<dim, dim>(format, view(), to, to, x.exec())));
  }
  void key_gemv() {
    require(pk::key_gemv<dim>(format, view(), without_queries(x.queries()), scale,
                              without_queries(x.scores_out(blocks * 64)), x.exec()));
  }
  void value_gemv() {
    require(pk::value_gemv<dim>(format, view(), without_queries(x.weights(blocks * 64)), without_queries(x.outputs()),
                                x.exec()));
  }
  void attention() {
    auto tail = pk::detail::as_batch(x.side(0));
    tail.extent[2] = 0;
    require((pk::attention<dim, dim>(format, view(), tail, tail, pk::detail::as_batch(x.queries()), scale,
                                     pk::detail::as_batch(x.outputs()), {}, x.exec())));
  }
};

/// Copies enough to fill 256 MiB.
template <class Copy, class... Format>
std::vector<std::unique_ptr<Copy>> copies_of(const tensors& x, const Format&... format) {
  std::vector<std::unique_ptr<Copy>> copies;
  std::int64_t bytes = 0;
  do {
    copies.push_back(std::make_unique<Copy>(x, format...));
    bytes += copies.back()->coded_bytes;
  } while (bytes < std::int64_t{256} << 20);
  require(cudaDeviceSynchronize());
  return copies;
}

template <class Copy>
void time(benchmark::State& state, const std::vector<std::unique_ptr<Copy>>& copies, void (Copy::*call)()) {
  const std::int64_t tokens = copies[0]->x.tokens;
  double ms = 0.0;
  for (auto _ : state) {
    ms = median_ms([&](int i) { (copies[static_cast<std::size_t>(i) % copies.size()].get()->*call)(); });
    state.SetIterationTime(ms * 1e-3);
  }
  state.counters["coded_MB"] = static_cast<double>(copies[0]->coded_bytes) * 1e-6;
  state.counters["coded_GB/s"] = static_cast<double>(copies[0]->coded_bytes) / ms * 1e-6;
  state.counters["fp16_GB/s"] = static_cast<double>(4 * heads * tokens * dim) / ms * 1e-6;
}

pk::pack_format packs(pk::token_order order) {
  pk::pack_format f;
  f.order = order;
  f.kv_heads = heads;
  return f;
}

template <class Copy, class... Format>
void add(const char* name, const Format&... format) {
  struct named {
    const char* name;
    void (Copy::*call)();
  };
  for (const named n :
       {named{"encode", &Copy::encode}, named{"decompress", &Copy::decompress}, named{"key_gemv", &Copy::key_gemv},
        named{"value_gemv", &Copy::value_gemv}, named{"attention", &Copy::attention}})
    benchmark::RegisterBenchmark((std::string(n.name) + "/" + name).c_str(),
                                 [=](benchmark::State& state) {
                                   const tensors x(state.range(0));
                                   time(state, copies_of<Copy>(x, format...), n.call);
                                 })
        ->Arg(32768)
        ->ArgName("tokens")
        ->UseManualTime()
        ->Iterations(1)
        ->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  add<grouped_copy>("kivi2", pk::kivi_keys(dim, 2), pk::kivi_values(dim, 2));
  add<grouped_copy>("channel4_hadamard4", pk::make_grouped(pk::side::key, dim, pk::group_axis::channel, 64, 4),
                    pk::make_grouped(pk::side::value, dim, pk::group_axis::vector, dim, 4, pk::step_rule::min_max,
                                     pk::transform_kind::hadamard));
  add<grouped_copy>("token4", pk::make_grouped(pk::side::key, dim, pk::group_axis::token, 0, 4),
                    pk::make_grouped(pk::side::value, dim, pk::group_axis::token, 0, 4));
  add<pack_copy>("packkv_none", packs(pk::token_order::none));
  add<pack_copy>("packkv_median", packs(pk::token_order::median));
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
