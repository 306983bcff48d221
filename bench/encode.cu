// SPDX-License-Identifier: Apache-2.0
// compress, decompress and store_tokens of plans that are known at compile time, on 16-bit tensors that do not lie in
// the L2, beside a plain read of the 16-bit bytes in the same rounds. Each format is compared with the reference first;
// the program ends at the first wrong byte.
//   build/test/bench/encode [--benchmark_filter=compress/two_bit]
// Names: <call>/<format>/<case>; b8_32k: 8 sequences of 32,768 tokens, 8 KV heads. K and V are one call. TB/s: 16-bit
// bytes over time; bytes of codes come on top. step: store_tokens and decode_attention, beside decode_attention alone.
// step_side: store_tokens in another stream, step_behind: behind decode_attention and beside its end, step_together: of
// 24 layers in one call behind the last; decode_attention need not wait for it then, since its ring has the new tokens.
// layer, layer_side, layer_behind and layer_together: the same, and before both a kernel that stands for the one that
// makes queries and new tokens.
#include "decode_checks.cuh"
#include "program.cuh"

namespace pk = packkv;

namespace {

constexpr int dim = 128, kv_heads = 8;
template <class Transform, class KeyPlan, class ValuePlan>
using plans = pk::cache_format<pk::key_codec<dim, Transform, pk::rms_scale, KeyPlan>,
                               pk::value_codec<dim, Transform, pk::rms_scale, ValuePlan>>;
using two_bit = plans<pk::hadamard, pk::plan<2, 2, 2, 2>, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>;
using four_bit = plans<pk::hadamard, pk::plan<4, 4, 4, 4>, pk::plan<4, 4, 4, 4, 4, 4, 4, 4>>;
using untransformed = plans<pk::identity, pk::plan<2, 2, 2, 2>, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>;

/// Copies of K and V of `batch` sequences and their tiles, a page a sequence.
template <class Format>
class problem {
 public:
  problem(int batch, int tokens, int least_copies = 2)
      : batch_(batch),
        tokens_(tokens),
        values_(std::int64_t{batch} * kv_heads * tokens * dim),
        tiles_(std::int64_t{batch} * kv_heads * ((tokens + 63) / 64)),
        copies(std::max(least_copies, timing::copies_for(half_bytes()))),
        data_(2 * values_ * copies),
        pool_(code_bytes() * copies) {
    random_cache_detail::fill_random<256><<<1024, 256>>>(data_.data(), 2 * values_ * copies, 7u);
    require(cudaMemset(pool_.data(), 0xff, static_cast<std::size_t>(code_bytes() * copies)));
    require(cudaDeviceSynchronize());
  }
  std::int64_t half_bytes() const { return 4 * values_; }
  std::int64_t code_bytes() const { return tiles_ * (Format::key_tile_bytes + Format::value_tile_bytes); }
  std::int64_t values() const { return 2 * values_; }
  const std::uint16_t* data() const { return data_.data(); }

  void compress(int copy, cudaStream_t stream) const {
    require(pk::compress(keys(copy), values(copy), nullptr, parameters, pages(pool_.data(), copy), table(),
                         pk::exec{stream}));
  }
  void decompress(int copy, cudaStream_t stream) const {
    const auto out = [](const pk::input_view<4>& in) {
      return pk::make_output<4>(const_cast<void*>(in.data), in.type,
                                {in.extent[0], in.extent[1], in.extent[2], in.extent[3]});
    };
    require(pk::decompress(pages(pool_.data(), copy), table(), nullptr, parameters, out(keys(copy)), out(values(copy)),
                           pk::exec{stream}));
  }
  /// Of copy 0, with the reference's bytes and bits.
  void is_right() const {
    auto tensors = to_host(data_.data(), 2 * values_);
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(code_bytes()), 0xff);
    pk::input_view<4> k = keys(0), v = values(0);
    k.data = tensors.data(), v.data = tensors.data() + values_;
    pk::device_report report{};
    require(pk::reference::compress(k, v, nullptr, parameters, pages(codes.data(), 0), table(), report));
    compress(0, nullptr);
    require(cudaDeviceSynchronize());
    const bool same_codes = to_host(pool_.data(), code_bytes()) == codes;
    decompress(0, nullptr);
    require(cudaDeviceSynchronize());
    const auto out = [](const pk::input_view<4>& in) {
      return pk::make_output<4>(const_cast<void*>(in.data), in.type,
                                {in.extent[0], in.extent[1], in.extent[2], in.extent[3]});
    };
    require(pk::reference::decompress(pages(codes.data(), 0), table(), nullptr, parameters, out(k), out(v), report));
    if (same_codes && to_host(data_.data(), 2 * values_) == tensors) return;
    std::fprintf(stderr, "WRONG RESULT: %s differs from the reference\n", same_codes ? "decompress" : "compress");
    std::exit(1);
  }

 private:
  pk::input_view<4> tensor(std::int64_t begin) const {
    return pk::make_input<4>(data_.data() + begin, pk::dtype::float16, {batch_, kv_heads, tokens_, dim});
  }
  pk::input_view<4> keys(int copy) const { return tensor(2 * values_ * copy); }
  pk::input_view<4> values(int copy) const { return tensor(2 * values_ * copy + values_); }
  pk::page_table table() const {
    pk::page_table t;
    t.row_stride = 1;
    return t;
  }
  pk::pages_view pages(std::uint8_t* pool, int copy) const {
    pk::pages_view p;
    const int tiles = (tokens_ + 63) / 64;
    p.key_data = pool + copy * code_bytes();
    p.value_data = pool + copy * code_bytes() + tiles_ * Format::key_tile_bytes;
    p.key_head_stride = std::int64_t{tiles} * Format::key_tile_bytes;
    p.value_head_stride = std::int64_t{tiles} * Format::value_tile_bytes;
    p.key_page_stride = kv_heads * p.key_head_stride;
    p.value_page_stride = kv_heads * p.value_head_stride;
    p.num_pages = batch_, p.kv_heads = kv_heads, p.tiles_per_page = tiles;
    return p;
  }

  const int batch_, tokens_;
  const std::int64_t values_, tiles_;
  const pk::parameters<Format> parameters = {};

 public:
  const int copies;

 private:
  device_buffer<std::uint16_t> data_;
  device_buffer<std::uint8_t> pool_;
};

/// Times call(problem, copy) on filled caches.
template <class Format, class Call>
measured measure(int batch, int tokens, Call&& call) {
  static bool checked = false;
  if (!checked) problem<Format>(2, 1000).is_right();
  checked = true;
  const problem<Format> p(batch, tokens);
  timing::stopwatch& watch = *program.watch;
  for (int i = 0; i < p.copies; ++i) p.compress(i, watch.stream());
  device_buffer<uint4> sink(1);
  timing::timed_call timed(watch, p.copies, [&](int i) { call(p, i); });
  const auto ceiling =
      timing::read_ceiling(watch, p.data(), p.half_bytes(), p.half_bytes(), p.copies, sink.data(), program.sms);
  measured m;
  m.bytes = m.half_bytes = static_cast<double>(p.half_bytes());
  m.coded_bytes = static_cast<double>(p.code_bytes());
  m.values = static_cast<double>(p.values());
  m.rounds = timing::time_calls({&timed, ceiling.get()});
  m.graph = timed.graph(), m.single = timed.single(), m.ceiling = ceiling->graph();
  return m;
}

/// Reads elements and writes them back, as a kernel does that rotates queries and new keys.
__global__ void __launch_bounds__(256) pass_through(uint4* queries, std::int64_t n, uint4* tokens, std::int64_t m) {
  packkv::detail::wait_for_kernel_before();
  for (std::int64_t i = std::int64_t{blockIdx.x} * 256 + threadIdx.x; i < n + m; i += std::int64_t{gridDim.x} * 256) {
    uint4* const p = i < n ? queries + i : tokens + (i - n);
    __stcg(p, __ldcg(p));
  }
}

/// New tokens of `steps` steps for `count` sequences, and their slots.
class new_tokens {
 public:
  /// slot_of(step, i): of sequence i.
  template <class SlotOf>
  new_tokens(int steps, int count, SlotOf&& slot_of)
      : steps(steps),
        values(std::int64_t{count} * kv_heads * dim),
        count_(count),
        data_(2 * values * steps),
        slots_(std::int64_t{steps} * count) {
    random_cache_detail::fill_random<256><<<1024, 256>>>(data_.data(), 2 * values * steps, 7u);
    std::vector<std::int64_t> all;
    for (int step = 0; step < steps; ++step)
      for (int i = 0; i < count; ++i) all.push_back(slot_of(step, i));
    require(cudaMemcpy(slots_.data(), all.data(), all.size() * 8, cudaMemcpyHostToDevice));
  }
  const std::uint16_t* data() const { return data_.data(); }
  /// A kernel that writes part number `part` of all tokens, of `parts`, and these queries, as they are.
  void make(int part, int parts, const std::uint16_t* queries, std::int64_t count, cudaStream_t stream) const {
    const auto words = [](const std::uint16_t* p) { return reinterpret_cast<uint4*>(const_cast<std::uint16_t*>(p)); };
    const std::int64_t n = 2 * values * steps / parts;
    require(pk::detail::launch_early(pass_through, dim3(static_cast<unsigned>(program.sms)), 256, stream,
                                     words(queries), count / 8, words(data_.data() + n * part), n / 8));
  }
  template <class Format>
  void store(int step, const pk::parameters<Format>& parameters, const pk::pages_view& pages, cudaStream_t stream,
             bool beside_previous = false) const {
    require(pk::store_tokens(tokens(2 * values * step), tokens(2 * values * step + values),
                             slots_.data() + step * count_, parameters, pages,
                             pk::exec{stream, nullptr, 0, nullptr, beside_previous}));
  }
  /// The codes of all steps in these pages, which fill the pool, are the reference's.
  template <class Format>
  void is_right(const pk::pages_view& in_pool, std::uint8_t* pool, std::int64_t bytes) const {
    require(cudaMemset(pool, 0, static_cast<std::size_t>(bytes)));
    for (int step = 0; step < steps; ++step) store<Format>(step, {}, in_pool, nullptr);
    const auto codes = to_host(pool, bytes);
    const auto tensors = to_host(data_.data(), 2 * values * steps);
    const auto slots = to_host(slots_.data(), std::int64_t{steps} * count_);
    std::vector<std::uint8_t> expected(codes.size());
    pk::pages_view pages = in_pool;
    pages.key_data = expected.data() + (static_cast<std::uint8_t*>(in_pool.key_data) - pool);
    pages.value_data = expected.data() + (static_cast<std::uint8_t*>(in_pool.value_data) - pool);
    pk::device_report report{};
    for (int step = 0; step < steps; ++step) {
      pk::input_view<3> k = tokens(0), v = k;
      k.data = tensors.data() + 2 * values * step, v.data = tensors.data() + 2 * values * step + values;
      require(pk::reference::store_tokens(k, v, slots.data() + step * count_, pk::parameters<Format>{}, pages, report));
    }
    if (codes == expected) return;
    std::fprintf(stderr, "WRONG RESULT: store_tokens differs from the reference\n");
    std::exit(1);
  }

  const int steps;
  const std::int64_t values;  ///< of K, and of V, of a step

 private:
  pk::input_view<3> tokens(std::int64_t begin) const {
    return pk::make_input<3>(data_.data() + begin, pk::dtype::float16, {count_, kv_heads, dim});
  }
  const int count_;
  device_buffer<std::uint16_t> data_;
  device_buffer<std::int64_t> slots_;
};

/// store_tokens of one new token of each of `count` sequences, in pages of 64 tokens, the slots of 48 steps.
template <class Format>
measured measure_store(int count) {
  constexpr int pages = 4096;
  constexpr std::int64_t page_bytes = kv_heads * (Format::key_tile_bytes + Format::value_tile_bytes);
  timing::stopwatch& watch = *program.watch;
  const new_tokens tokens(48, count,
                          [](int step, int i) { return std::int64_t{i * 2741 % pages} * 64 + (i * 13 + step) % 64; });
  device_buffer<std::uint8_t> pool(pages * page_bytes);
  pk::pages_view p;
  p.key_data = pool.data(), p.value_data = pool.data() + kv_heads * Format::key_tile_bytes;
  p.key_page_stride = p.value_page_stride = page_bytes;
  p.key_head_stride = Format::key_tile_bytes, p.value_head_stride = Format::value_tile_bytes;
  p.num_pages = pages, p.kv_heads = kv_heads, p.tiles_per_page = 1;
  static bool checked = false;
  if (!checked) tokens.is_right<Format>(p, pool.data(), pages * page_bytes);
  checked = true;
  timing::timed_call timed(watch, tokens.steps, [&](int i) { tokens.store<Format>(i, {}, p, watch.stream()); });
  device_buffer<uint4> sink(1);
  const std::int64_t bytes = 4 * tokens.values;
  const auto ceiling = timing::read_ceiling(watch, tokens.data(), bytes, bytes, tokens.steps, sink.data(), program.sms);
  measured m;
  m.bytes = m.half_bytes = static_cast<double>(bytes);
  m.values = static_cast<double>(2 * tokens.values);
  m.coded_bytes = m.values * (Format::key().bits_per_value() + Format::value().bits_per_value()) / 16;
  m.rounds = timing::time_calls({&timed, ceiling.get()});
  m.graph = timed.graph(), m.single = timed.single(), m.ceiling = ceiling->graph();
  return m;
}

/// A stream beside the one that is timed.
class side_stream {
 public:
  side_stream() {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    require(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
  }
  side_stream(const side_stream&) = delete;
  ~side_stream() {
    (void)cudaEventDestroy(event_);
    (void)cudaStreamDestroy(stream_);
  }
  cudaStream_t stream() const { return stream_; }
  /// What comes here waits for what is in `main` now.
  void follow(cudaStream_t main) const { wait(main, stream_); }
  /// `main` waits for what is here: in a graph behind its last call, else at once.
  void join_at_end(cudaStream_t main) {
    cudaStreamCaptureStatus capturing;
    require(cudaStreamIsCapturing(main, &capturing));
    if (capturing == cudaStreamCaptureStatusNone || ++calls_ % timing::launches_of_graph == 0) wait(stream_, main);
  }

 private:
  void wait(cudaStream_t first, cudaStream_t second) const {
    require(cudaEventRecord(event_, first));
    require(cudaStreamWaitEvent(second, event_, 0));
  }
  cudaStream_t stream_;
  cudaEvent_t event_;
  int calls_ = 0;  ///< captured
};

/// Where store_tokens is called: before decode_attention, in a stream of its own, which is waited for at the end of a
/// graph, or behind decode_attention, beside which it may begin; or once for the layers of a graph, behind the last.
/// Nowhere: instead, decode_attention has exec::settled_cache.
enum class place { first, other_stream, behind, together, nowhere };

/// What a layer does for each new token: store_tokens of one of each of `count` sequences of 4,096, and
/// decode_attention; its peer is decode_attention alone, on the same cache in the same rounds. Made:
/// both come behind pass_through of the layer, else behind decode_attention of the layer before.
template <class Format>
measured measure_step(int count, bool made, place at) {
  decode_case c;
  c.batch = count, c.tokens = 4096;
  timing::stopwatch& watch = *program.watch;
  const bool together = at == place::together;
  const decode_cache<Format> cache(c, storage::full, together ? timing::launches_of_graph : 0);
  const auto slot = [&](int, int i) {  // of the last token; together: of sequence i % count in copy i / count
    const std::int64_t page = cache.table[static_cast<std::size_t>((i % count + 1) * cache.row_tiles - 1)];
    return (page + i / count * (cache.copy_stride() / cache.page_bytes())) * 64 + 63;
  };
  const new_tokens tokens(together ? 1 : cache.copies, together ? cache.copies * count : count, slot);
  pk::pages_view of_all = cache.view(0).pages;
  of_all.num_pages = static_cast<std::int32_t>(cache.copies * (cache.copy_stride() / cache.page_bytes()));
  side_stream side;
  const auto make = [&](int i) {
    if (made) tokens.make(i, cache.copies, cache.queries(), cache.queries_count(), watch.stream());
  };
  timing::timed_call both(watch, cache.copies, [&](int i) {
    make(i);
    const auto store = [&](cudaStream_t stream, bool beside_previous) {
      tokens.store<Format>(together ? 0 : i, cache.parameters, together ? of_all : cache.view(i).pages, stream,
                           beside_previous);
    };
    if (at == place::other_stream) side.follow(watch.stream());
    if (at == place::first || at == place::other_stream)
      store(at == place::other_stream ? side.stream() : watch.stream(), false);
    cache.decode(i, watch.stream(), at == place::nowhere);
    if (at == place::behind || (together && i == cache.copies - 1)) store(watch.stream(), true);
    if (at == place::other_stream) side.join_at_end(watch.stream());
  });
  timing::timed_call alone(watch, cache.copies, [&](int i) {
    make(i);
    cache.decode(i, watch.stream());
  });
  device_buffer<uint4> sink(1);
  const auto ceiling = timing::read_ceiling(watch, cache.pool(), cache.copy_bytes, cache.copy_stride(), cache.copies,
                                            sink.data(), program.sms);
  measured m;
  m.bytes = static_cast<double>(cache.copy_bytes);
  m.coded_bytes = static_cast<double>(cache.coded_bytes);
  m.values = static_cast<double>(cache.values());
  m.half_bytes = 2.0 * m.values;
  m.peer_note = made ? "without store_tokens" : "decode_attention alone";
  m.error = checks::long_decode_is_right(cache);  // of what store_tokens has left, too
  m.rounds = timing::time_calls({&both, &alone, ceiling.get()});
  m.graph = both.graph(), m.single = both.single(), m.ceiling = m.peer_ceiling = ceiling->graph();
  m.peer = alone.graph(), m.peer_single = alone.single();
  return m;
}

template <class Format>
void add_format(const std::string& format) {
  for (const auto& [name, batch, tokens] :
       {std::tuple{"b1_4k", 1, 4096}, {"b1_128k", 1, 131072}, {"b8_32k", 8, 32768}}) {
    add("compress/" + format + "/" + name, [batch = batch, tokens = tokens] {
      return measure<Format>(batch, tokens, [](const auto& p, int i) { p.compress(i, program.watch->stream()); });
    });
    add("decompress/" + format + "/" + name, [batch = batch, tokens = tokens] {
      return measure<Format>(batch, tokens, [](const auto& p, int i) { p.decompress(i, program.watch->stream()); });
    });
  }
  for (const int count : {1, 64, 512})
    add("store_tokens/" + format + "/" + std::to_string(count), [=] { return measure_store<Format>(count); });
  for (const int count : {1, 64})
    for (const auto& [name, made, at] : {std::tuple{"step/", false, place::first},
                                         {"step_side/", false, place::other_stream},
                                         {"step_behind/", false, place::behind},
                                         {"step_together/", false, place::together},
                                         {"step_settled/", false, place::nowhere},
                                         {"layer/", true, place::first},
                                         {"layer_side/", true, place::other_stream},
                                         {"layer_behind/", true, place::behind},
                                         {"layer_together/", true, place::together},
                                         {"layer_settled/", true, place::nowhere}})
      add(name + format + "/" + std::to_string(count),
          [count, made = made, at = at] { return measure_step<Format>(count, made, at); });
}

void add_all() {
  add_format<two_bit>("two_bit");
  add_format<four_bit>("four_bit");
  add_format<untransformed>("untransformed");
}

}  // namespace

int main(int argc, char** argv) { return run_program(argc, argv, add_all); }
