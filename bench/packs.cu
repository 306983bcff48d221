// SPDX-License-Identifier: Apache-2.0
// Compressing into PackKV's packs on the GPU: orders none, median and greedy of 8 KV heads x 128, beside a plain read
// of the same 16-bit elements in the same rounds. Copies of input and output rotate over more than the L2. A small case
// of each order is compared with the reference first, byte for byte.
#include <benchmark/benchmark.h>

#include <cstring>
#include <packkv/reference/packs.hpp>

#include "timing.cuh"

namespace pk = packkv;

namespace {

constexpr int heads = 8, dim = 128;

pk::pack_format format_of(pk::token_order order) {
  pk::pack_format f;
  f.order = order;
  f.kv_heads = heads;
  return f;
}

/// Keys and values, and where their packs go, on the device.
class problem {
 public:
  problem(const pk::pack_format& f, std::int64_t blocks, std::uint32_t seed)
      : format_(f),
        blocks_(blocks),
        elements_(blocks * 64 * heads * dim),
        tensors_(2 * elements_),
        order_(blocks * 64) {
    random_cache_detail::fill_random<256><<<4096, 256>>>(tensors_.data(), 2 * elements_, seed);
    require(cudaGetLastError());
    for (const pk::side which : {pk::side::key, pk::side::value}) {
      const int i = static_cast<int>(which);
      const std::int64_t tiles = pk::tile_count(f, blocks), most = pk::max_pack_bytes(f, which, blocks);
      ranges_[i] = std::make_unique<device_buffer<pk::pack_range>>(blocks * pk::range_count(f, which));
      offsets_[i] = std::make_unique<device_buffer<std::int64_t>>(tiles + 1);
      data_[i] = std::make_unique<device_buffer<std::uint8_t>>(most);
      require(cudaMemset(data_[i]->data(), 0xff, static_cast<std::size_t>(most)));
    }
    require(cudaDeviceSynchronize());
  }

  void compress(cudaStream_t stream) {
    const auto to = [&](int i) {
      return pk::pack_side{ranges_[i]->data(), offsets_[i]->data(), data_[i]->data(),
                           pk::max_pack_bytes(format_, static_cast<pk::side>(i), blocks_)};
    };
    require(pk::compress(format_, tensor(tensors_.data(), 0), tensor(tensors_.data(), 1), blocks_, to(0), to(1),
                         {nullptr, order_.data()}, pk::exec{stream}));
  }

  /// Compresses on the CPU as well; ends the program if a byte differs.
  void check() {
    compress(nullptr);
    const auto elements = host(tensors_.data(), 2 * elements_);
    struct side {
      std::vector<pk::pack_range> ranges;
      std::vector<std::int64_t> offsets;
      std::vector<std::uint64_t> data;
      pk::pack_side out;
    } sides[2];
    for (int i = 0; i < 2; ++i) {
      const auto which = static_cast<pk::side>(i);
      const std::int64_t most = pk::max_pack_bytes(format_, which, blocks_);
      sides[i].ranges.resize(static_cast<std::size_t>(blocks_ * pk::range_count(format_, which)));
      sides[i].offsets.resize(static_cast<std::size_t>(pk::tile_count(format_, blocks_)) + 1);
      sides[i].data.resize(static_cast<std::size_t>(most) / 8 + 2);
      auto* const data = reinterpret_cast<std::uint8_t*>(sides[i].data.data());
      sides[i].out = {sides[i].ranges.data(), sides[i].offsets.data(),
                      data + (16 - reinterpret_cast<std::uintptr_t>(data) % 16) % 16, most};
    }
    std::vector<std::uint8_t> order(static_cast<std::size_t>(blocks_) * 64);
    pk::pack_report report;
    require(pk::reference::compress(format_, tensor(elements.data(), 0), tensor(elements.data(), 1), blocks_,
                                    sides[0].out, sides[1].out, order.data(), report));
    bool right = host(order_.data(), blocks_ * 64) == order;
    for (int i = 0; i < 2; ++i) {
      const side& s = sides[i];
      const auto ranges = host(ranges_[i]->data(), static_cast<std::int64_t>(s.ranges.size()));
      const auto data = host(data_[i]->data(), s.offsets.back());
      right = right && host(offsets_[i]->data(), static_cast<std::int64_t>(s.offsets.size())) == s.offsets &&
              std::memcmp(ranges.data(), s.ranges.data(), ranges.size() * sizeof(pk::pack_range)) == 0 &&
              std::memcmp(data.data(), s.out.data, data.size()) == 0;
    }
    if (right) return;
    std::fprintf(stderr, "packs of order %d are not the reference's\n", static_cast<int>(format_.order));
    std::exit(1);
  }

  std::int64_t input_bytes() const { return 4 * elements_; }
  std::int64_t coded_bytes() const {
    std::int64_t sum = 0;
    for (int i = 0; i < 2; ++i)
      sum += pk::stored_bytes(format_, static_cast<pk::side>(i), blocks_,
                              host(offsets_[i]->data() + pk::tile_count(format_, blocks_), 1)[0]);
    return sum;
  }

 private:
  pk::input_view<4> tensor(const std::uint16_t* data, int which) const {
    return pk::make_input(data + which * elements_, format_.element, {1, heads, blocks_ * 64, dim});
  }
  template <class T>
  static std::vector<T> host(const T* from, std::int64_t count) {
    std::vector<T> to(static_cast<std::size_t>(count));
    require(cudaMemcpy(to.data(), from, to.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
  }

  pk::pack_format format_;
  std::int64_t blocks_, elements_;
  device_buffer<std::uint16_t> tensors_;
  device_buffer<std::uint8_t> order_;
  std::unique_ptr<device_buffer<pk::pack_range>> ranges_[2];
  std::unique_ptr<device_buffer<std::int64_t>> offsets_[2];
  std::unique_ptr<device_buffer<std::uint8_t>> data_[2];
};

struct row {
  std::string name;
  timing::spread graph, single, ceiling;
  double input_bytes, bits;
  int rounds;
};
std::vector<row> rows;

void run(benchmark::State& state, const std::string& name, pk::token_order order) {
  const std::int64_t tokens = state.range(0);
  const pk::pack_format f = format_of(order);
  problem(f, 5, 1).check();
  timing::stopwatch watch;
  std::vector<std::unique_ptr<problem>> copies;
  const int count = timing::copies_for(4 * tokens * heads * dim);
  for (int i = 0; i < count; ++i)
    copies.push_back(std::make_unique<problem>(f, tokens / 64, 100u + static_cast<std::uint32_t>(i)));
  const std::int64_t bytes = copies[0]->input_bytes();
  // The ceiling reads memory of its own, in one piece, as its copies are.
  device_buffer<std::uint8_t> read(count * bytes);
  device_buffer<uint4> sink(1);
  require(cudaMemset(read.data(), 0x5a, static_cast<std::size_t>(count * bytes)));
  int device = 0, sms = 0;
  require(cudaGetDevice(&device));
  require(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  for (auto _ : state) {
    timing::timed_call encode(watch, count,
                              [&](int i) { copies[static_cast<std::size_t>(i)]->compress(watch.stream()); });
    const auto ceiling = timing::read_ceiling(watch, read.data(), bytes, bytes, count, sink.data(), sms);
    const int rounds = timing::time_calls({&encode, ceiling.get()});
    rows.push_back({name, encode.graph(), encode.single(), ceiling->graph(), static_cast<double>(bytes),
                    16.0 * static_cast<double>(copies[0]->coded_bytes()) / static_cast<double>(bytes), rounds});
    const row& r = rows.back();
    state.SetIterationTime(r.graph.median * 1e-3);
    state.counters["ms"] = r.graph.median;
    state.counters["ms_p5"] = r.graph.p5;
    state.counters["ms_p95"] = r.graph.p95;
    state.counters["single_ms"] = r.single.median;
    state.counters["input_TB/s"] = r.input_bytes / r.graph.median * 1e-9;
    state.counters["read_ms"] = r.ceiling.median;
    state.counters["to_read"] = r.graph.median / r.ceiling.median;
    state.counters["bits_per_value"] = r.bits;
    state.counters["rounds"] = rounds;
  }
}

void print_rows() {
  std::printf("\n%-22s %9s %19s %9s %11s %9s %7s %6s\n", "ms of a launch", "median", "p5 .. p95", "single",
              "input TB/s", "read", "ratio", "bits");
  for (const row& r : rows)
    std::printf("%-22s %9.4f %9.4f %9.4f %9.4f %11.3f %9.4f %7.2f %6.2f\n", r.name.c_str(), r.graph.median, r.graph.p5,
                r.graph.p95, r.single.median, r.input_bytes / r.graph.median * 1e-9, r.ceiling.median,
                r.graph.median / r.ceiling.median, r.bits);
  std::printf("input: 16-bit elements of K and V. read: a plain read of as many bytes. bits: of a value, all parts.\n");
}

}  // namespace

int main(int argc, char** argv) {
  struct named {
    const char* name;
    pk::token_order order;
  };
  for (const named n : {named{"none", pk::token_order::none}, named{"median", pk::token_order::median},
                        named{"greedy", pk::token_order::greedy}})
    for (const std::int64_t tokens : {32768, 131072}) {
      const std::string name = std::string("encode/") + n.name + "/" + std::to_string(tokens);
      benchmark::RegisterBenchmark((std::string("encode/") + n.name).c_str(),
                                   [=](benchmark::State& state) { run(state, name, n.order); })
          ->Arg(tokens)
          ->ArgName("tokens")
          ->UseManualTime()
          ->Iterations(1)
          ->Unit(benchmark::kMillisecond);
    }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  print_rows();
  return 0;
}
