// SPDX-License-Identifier: Apache-2.0
// decode_attention, key_gemv and value_gemv through the public API, on caches that do not lie in the L2, beside what a
// plain read of the same bytes takes and beside 16-bit peers (half_decode.cuh, cuBLAS), in the same rounds. All results
// are checked first; a wrong one ends the program.
//   build/test/bench/decode                                        everything, and a table at the end
//   build/test/bench/decode --benchmark_filter=decode/two_bit/full  one format and way to store
// Names: decode/<format>/<storage>/<case>, or `family` for a format chosen at run time, gemv/<side>/two_bit/<case>, and
// unpack/<side>/<bits>: codes to matrix products alone.
// b8_32x8_128k: 8 sequences of 131,072 tokens, 32 query heads, 8 KV heads.
#include <set>

#include "decode_gemv.cuh"
#include "decode_unpack.cuh"
#include "program.cuh"

namespace pk = packkv;

namespace {

template <int Dim, class KeyPlan, class ValuePlan, class KeyTransform = pk::hadamard>
using plans = pk::cache_format<pk::key_codec<Dim, KeyTransform, pk::rms_scale, KeyPlan>,
                               pk::value_codec<Dim, pk::hadamard, pk::rms_scale, ValuePlan>>;
using two_bit = plans<128, pk::plan<2, 2, 2, 2>, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>;
using four_bit = plans<128, pk::plan<4, 4, 4, 4>, pk::plan<4, 4, 4, 4, 4, 4, 4, 4>>;
using low = plans<128, pk::plan<4, 2, 1, 0>, pk::plan<2, 2, 2, 2, 1, 1, 1, 1>, pk::basis>;
using kivi = pk::cache_format<pk::grouped_key_codec<128, 2>, pk::grouped_value_codec<128, 2>>;
using two_bit_64 = plans<64, pk::plan<2, 2, 2, 2>, pk::plan<2, 2, 2, 2>>;
using two_bit_256 =
    plans<256, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>, pk::plan<2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2>>;

bool fits(std::int64_t bytes) {
  std::size_t free = 0, total = 0;
  require(cudaMemGetInfo(&free, &total));
  return bytes + (std::int64_t{1} << 30) < static_cast<std::int64_t>(free);
}

/// The peer of a case, or null and why there is none.
std::unique_ptr<checks::half_peer> peer_of(const decode_case& c, int dim, std::string& note) {
  static bool checked = false;
  if (!checks::half_peer::serves(c, dim)) {
    note = "no peer: it serves head dim 128, at most 8 heads a KV head, 1 query token";
    return nullptr;
  }
  const std::int64_t bytes = checks::half_peer::bytes_of(c.lengths(), c.kv_heads);
  if (!fits(bytes * timing::copies_for(bytes))) {
    note = "no peer: its 16-bit caches do not fit the free memory";
    return nullptr;
  }
  if (!checked) checks::half_peer::works(program.sms);
  checked = true;
  auto peer = std::make_unique<checks::half_peer>(c, program.sms);
  peer->is_right(c);
  note = "our own 16-bit decode";
  return peer;
}

/// Nothing measured yet, but what is read.
template <class Format>
measured sizes_of(const decode_cache<Format>& cache) {
  measured m;
  m.bytes = static_cast<double>(cache.copy_bytes);
  m.coded_bytes = static_cast<double>(cache.coded_bytes);
  m.values = 2.0 * 64.0 * static_cast<double>(cache.tiles * cache.of.kv_heads) * cache.dim;
  m.half_bytes = 2.0 * static_cast<double>(cache.values());
  return m;
}

template <class Format>
measured measure_decode(const decode_case& c, storage how) {
  timing::stopwatch& watch = *program.watch;
  const decode_cache<Format> cache(c, how);
  measured m = sizes_of(cache);
  m.error = checks::long_decode_is_right(cache);
  const auto peer = peer_of(c, cache.dim, m.peer_note);
  device_buffer<uint4> sink(1);
  timing::timed_call call(watch, cache.copies, [&](int i) { cache.decode(i, watch.stream()); });
  timing::timed_call settled(watch, cache.copies, [&](int i) { cache.decode(i, watch.stream(), true); });
  const auto ceiling = timing::read_ceiling(watch, cache.pool(), cache.copy_bytes, cache.copy_stride(), cache.copies,
                                            sink.data(), program.sms);
  std::vector<timing::timed_call*> calls = {&call, &settled, ceiling.get()};
  std::unique_ptr<timing::timed_call> peer_call, peer_ceiling;
  if (peer != nullptr) {
    peer_call =
        std::make_unique<timing::timed_call>(watch, peer->copies, [&](int i) { peer->decode(i, watch.stream()); });
    peer_ceiling = timing::read_ceiling(watch, peer->data(), peer->copy_bytes, peer->copy_bytes, peer->copies,
                                        sink.data(), program.sms);
    calls.insert(calls.end(), {peer_call.get(), peer_ceiling.get()});
  }
  m.rounds = timing::time_calls(calls);
  m.graph = call.graph(), m.single = call.single(), m.settled = settled.graph(), m.ceiling = ceiling->graph();
  if (peer != nullptr)
    m.peer = peer_call->graph(), m.peer_single = peer_call->single(), m.peer_ceiling = peer_ceiling->graph();
  return m;
}

/// The format chosen at run time from a family, beside the static call on the same copies: that is the peer.
template <class Family, class Format>
measured measure_family(const decode_case& c) {
  timing::stopwatch& watch = *program.watch;
  const decode_cache<Format> cache(c, storage::full);
  measured m = sizes_of(cache);
  cache.template decode_by<Family>(0, watch.stream());
  require(cudaStreamSynchronize(watch.stream()));
  const auto by_family = to_host(cache.out(), cache.queries_count());
  cache.decode(0, watch.stream());
  require(cudaStreamSynchronize(watch.stream()));
  const auto by_format = to_host(cache.out(), cache.queries_count());
  if (by_family != by_format) {
    std::fprintf(stderr, "%s: the family's result is not the format's\n", c.name.c_str());
    std::exit(1);
  }
  m.peer_note = "the same format, known at compile time";
  device_buffer<uint4> sink(1);
  timing::timed_call call(watch, cache.copies, [&](int i) { cache.template decode_by<Family>(i, watch.stream()); });
  timing::timed_call fixed(watch, cache.copies, [&](int i) { cache.decode(i, watch.stream()); });
  const auto ceiling = timing::read_ceiling(watch, cache.pool(), cache.copy_bytes, cache.copy_stride(), cache.copies,
                                            sink.data(), program.sms);
  m.rounds = timing::time_calls({&call, &fixed, ceiling.get()});
  m.graph = call.graph(), m.single = call.single(), m.ceiling = m.peer_ceiling = ceiling->graph();
  m.peer = fixed.graph(), m.peer_single = fixed.single();
  return m;
}

template <class Format>
void add_decode(const char* format, const decode_case& c,
                std::initializer_list<storage> ways = {storage::full, storage::bare}) {
  for (const storage how : ways)
    add(std::string("decode/") + format + "/" + name_of(how) + "/" + c.name, [=] {
      static std::set<std::tuple<storage, int, int>> checked;
      if (checked.insert({how, c.group, c.query_len}).second) checks::decode_is_right<Format>(c, how);
      return measure_decode<Format>(c, how);
    });
}

decode_case shape(const std::string& name, int batch, int kv_heads, int group, std::int64_t tokens, int query_len = 1) {
  decode_case c;
  c.name = name;
  c.batch = batch, c.kv_heads = kv_heads, c.group = group, c.tokens = tokens, c.query_len = query_len;
  return c;
}

constexpr std::int64_t kilo = 1024;

template <int Bits>
void add_unpack() {
  add("unpack/key/" + std::to_string(Bits),
      [] { return unpack::measure<unpack::key_in_place<Bits>, Bits>(*program.watch, program.sms); });
  add("unpack/value/" + std::to_string(Bits),
      [] { return unpack::measure<unpack::value_in_place<Bits>, Bits>(*program.watch, program.sms); });
}

void add_all() {
  const decode_case b1 = shape("b1_32x8_128k", 1, 8, 4, 128 * kilo), b8 = shape("b8_32x8_128k", 8, 8, 4, 128 * kilo),
                    b32 = shape("b32_32x8_32k", 32, 8, 4, 32 * kilo);
  add_decode<two_bit>("two_bit", shape("b1_32x8_4k", 1, 8, 4, 4 * kilo));
  add_decode<two_bit>("two_bit", shape("b1_32x8_32k", 1, 8, 4, 32 * kilo));
  add_decode<two_bit>("two_bit", b1);
  add_decode<two_bit>("two_bit", shape("b1_32x32_128k", 1, 32, 1, 128 * kilo));
  add_decode<two_bit>("two_bit", b8);
  add_decode<two_bit>("two_bit", b32);
  for (const decode_case& c : {b1, b8, b32}) add_decode<low>("low", c);
  for (const decode_case& c : {b1, b8, b32}) add_decode<four_bit>("four_bit", c);
  for (const decode_case& c : {b1, b8, b32}) add_decode<kivi>("kivi", c);
  add_decode<two_bit>("two_bit", shape("b1_32x8_1m", 1, 8, 4, 1024 * kilo));
  add_decode<two_bit>("two_bit", shape("b1_64x8_128k", 1, 8, 8, 128 * kilo));
  add_decode<two_bit>("two_bit", shape("b8_64x8_128k", 8, 8, 8, 128 * kilo));
  for (const int group : {1, 2, 3, 6, 7, 16})
    add_decode<two_bit>("two_bit", shape("b8_" + std::to_string(8 * group) + "x8_128k", 8, 8, group, 128 * kilo));
  for (const int tokens : {2, 3, 4})
    add_decode<two_bit>("two_bit", shape(b8.name + "_q" + std::to_string(tokens), 8, 8, 4, 128 * kilo, tokens));
  add_decode<two_bit>("two_bit", shape("b64_32x8_ragged", 64, 8, 4, 0), {storage::full_in_order, storage::full});
  // As many bytes as b8_32x8_128k: a row scale is stored for every token and side, whatever the head dim.
  const auto same_bytes = [](auto format) {
    using f = decltype(format);
    return std::int64_t{128 * kilo} * (two_bit::key_tile_bytes + two_bit::value_tile_bytes) /
           (f::key_tile_bytes + f::value_tile_bytes) / 64 * 64;
  };
  using family = pk::format_family<four_bit, low, two_bit>;
  for (const decode_case& c : {shape("b1_32x8_4k", 1, 8, 4, 4 * kilo), b8})
    add("decode/two_bit/family/" + c.name, [=] { return measure_family<family, two_bit>(c); });
  add_decode<two_bit_64>("two_bit", shape("b8_32x8_d64", 8, 8, 4, same_bytes(two_bit_64{})));
  add_decode<two_bit_256>("two_bit", shape("b8_32x8_d256", 8, 8, 4, same_bytes(two_bit_256{})));

  for (const int hidden : {512, 1024, 2048, 4096, 8192})
    for (const pk::side side : {pk::side::key, pk::side::value}) {
      const std::int64_t tokens = (hidden == 8192 ? 32 : 128) * kilo;
      add(std::string("gemv/") + (side == pk::side::key ? "key" : "value") + "/two_bit/hidden" +
              std::to_string(hidden) + "_" + std::to_string(tokens / kilo) + "k",
          [=] {
            return gemv::measure<two_bit>(*program.watch, program.sms, {side, hidden / gemv::dim, tokens});
          });
    }
  add_unpack<1>();
  add_unpack<2>();
  add_unpack<4>();
  add_unpack<8>();
}

}  // namespace

int main(int argc, char** argv) { return run_program(argc, argv, add_all); }
