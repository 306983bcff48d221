// SPDX-License-Identifier: Apache-2.0
// key_gemv and value_gemv on packs, as PackKV measures them: one query per KV head, 1k to 128k tokens, hidden (KV heads
// x head dim 128) 512 to 8192, beside the fastest cuBLAS call on 16-bit K and V and the read ceiling of the same bytes.
// Every result is checked first; a wrong one ends the program.
//   build/test/bench/pack_gemv                                   everything, and a table at the end
//   build/test/bench/pack_gemv --benchmark_filter=hidden1024_    one size
// Names: packs/<side>/hidden<channels>_<tokens>.
#include "pack_cache.cuh"
#include "program.cuh"

namespace {

void add_all() {
  for (const int hidden : {512, 1024, 2048, 4096, 8192})
    for (const packkv::side side : {packkv::side::key, packkv::side::value})
      for (const int kilo : {1, 4, 16, 64, 128})
        add(std::string("packs/") + (side == packkv::side::key ? "key" : "value") + "/hidden" + std::to_string(hidden) +
                "_" + std::to_string(kilo) + "k",
            [=] {
              const gemv::problem p{side, hidden / gemv::dim, std::int64_t{kilo} * 1024};
              const packs::packed_side ours(p, packkv::token_order::none);
              return gemv::measure_beside_cublas(*program.watch, program.sms, p, ours);
            });
}

}  // namespace

int main(int argc, char** argv) { return run_program(argc, argv, add_all); }
