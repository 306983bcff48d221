// SPDX-License-Identifier: Apache-2.0
// Runs numbered tasks on threads. What a task computes must depend on its number alone, so that results do not
// depend on the number of threads.
#pragma once

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace evaluate {

/// All hardware threads, at least one.
inline int hardware_threads() {
  const unsigned n = std::thread::hardware_concurrency();
  return n == 0 ? 1 : static_cast<int>(n);
}

/// Calls task(i, worker) for i = 0 .. count-1; calls of one worker (0 .. threads-1) never overlap.
template <class Task>
void parallel_for(int count, int threads, Task&& task) {
  std::atomic<int> next{0};
  const auto work = [&](int worker) {
    for (int i = next++; i < count; i = next++) task(i, worker);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<std::size_t>(threads));
  for (int w = 1; w < threads && w < count; ++w) {
    try {
      helpers.emplace_back(work, w);
    } catch (const std::system_error&) {
      break;  // the machine gives no more threads: those that run share the work
    }
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace evaluate
