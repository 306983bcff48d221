// SPDX-License-Identifier: Apache-2.0
// A measured case of bench/decode.cu: into Google Benchmark's counters, and into the table at the end.
#pragma once

#include <benchmark/benchmark.h>

#include "timing.cuh"

/// Times are milliseconds of a launch. Ceilings are plain reads of the same bytes, in the same rounds.
struct measured {
  std::string name;
  timing::spread graph, single;
  timing::spread settled;                ///< in a graph, with exec::settled_cache; zeros: not measured
  double bytes = 0.0, half_bytes = 0.0;  ///< read by a launch; of the same tokens in 16 bits
  double values = 0.0;                   ///< that half_bytes hold
  double coded_bytes = 0.0;              ///< bytes, less the 16-bit overlays
  timing::spread ceiling;
  timing::spread peer, peer_single, peer_ceiling;  ///< zeros: no peer
  std::string peer_note;                           ///< which it is, or why there is none
  double error = 0.0;                              ///< largest relative error of a checked row of the case itself
  int rounds = 0;

  bool has_peer() const { return peer.median > 0.0; }
  double terabytes() const { return bytes / graph.median * 1e-9; }
  double half_terabytes() const { return half_bytes / graph.median * 1e-9; }
  double to_ceiling() const { return graph.median / ceiling.median; }
  double speedup() const { return peer.median / graph.median; }
  double peer_to_ceiling() const { return peer.median / peer_ceiling.median; }
};

inline void to_counters(const measured& m, benchmark::State& state) {
  const auto spread = [&](const std::string& name, const timing::spread& s) {
    state.counters[name] = s.median;
    state.counters[name + "_p5"] = s.p5;
    state.counters[name + "_p95"] = s.p95;
  };
  spread("ms", m.graph);
  spread("single_ms", m.single);
  if (m.settled.median > 0.0) spread("settled_ms", m.settled);
  spread("ceiling_ms", m.ceiling);
  state.counters["bytes"] = m.bytes;
  state.counters["fp16_bytes"] = m.half_bytes;
  state.counters["bits_per_value"] = 8.0 * m.coded_bytes / m.values;
  state.counters["TB/s"] = m.terabytes();
  state.counters["fp16_TB/s"] = m.half_terabytes();
  state.counters["to_ceiling"] = m.to_ceiling();
  state.counters["error"] = m.error;
  state.counters["rounds"] = m.rounds;
  if (m.has_peer()) {
    spread("peer_ms", m.peer);
    spread("peer_single_ms", m.peer_single);
    state.counters["peer_ceiling_ms"] = m.peer_ceiling.median;
    state.counters["peer_to_ceiling"] = m.peer_to_ceiling();
    state.counters["speedup"] = m.speedup();
  }
  state.SetLabel(m.peer_note);
}

inline void print_table(const std::vector<measured>& all) {
  if (all.empty()) return;
  std::printf("\n%-42s %9s %19s %9s %9s %7s %7s %9s %6s %9s %6s %7s\n", "ms of a launch in a graph", "median",
              "p5 .. p95", "single", "settled", "TB/s", "fp16", "ceiling", "ratio", "peer", "ratio", "speedup");
  for (const measured& m : all) {
    std::printf("%-42s %9.4f %9.4f %9.4f %9.4f %9.4f %7.3f %7.2f %9.4f %6.3f ", m.name.c_str(), m.graph.median,
                m.graph.p5, m.graph.p95, m.single.median, m.settled.median, m.terabytes(), m.half_terabytes(),
                m.ceiling.median, m.to_ceiling());
    if (m.has_peer())
      std::printf("%9.4f %6.3f %7.2f\n", m.peer.median, m.peer_to_ceiling(), m.speedup());
    else
      std::printf("%s\n", m.peer_note.c_str());
  }
  std::printf(
      "settled: in a graph, with exec::settled_cache. TB/s: bytes read; fp16: bytes of the same tokens in 16 bits. "
      "ceiling: a plain read of the same bytes, and "
      "behind "
      "it\nthe time as a multiple of it. peer: our own 16-bit decode, or cuBLAS; its ratio is to its own ceiling.\n");
}
