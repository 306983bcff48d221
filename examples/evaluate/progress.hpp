// SPDX-License-Identifier: Apache-2.0
// One line on stderr for work of more than a second, only where stderr is a terminal.
//   progress line("fp16");   line.expect(100);   line.advance(1);
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>

namespace evaluate {

/// Shows how much of a task is done; erases its line at the end. Calls from several threads are fine.
class progress {
 public:
  explicit progress(std::string label);
  ~progress();
  progress(const progress&) = delete;
  progress& operator=(const progress&) = delete;

  /// Adds work that will be done, or work that has been done, in any unit.
  void expect(std::int64_t units);
  void advance(std::int64_t units);

 private:
  using clock = std::chrono::steady_clock;
  std::string label_;
  bool terminal_ = false, shown_ = false;
  std::int64_t total_ = 0, done_ = 0;
  clock::time_point next_;
  std::mutex mutex_;
};

}  // namespace evaluate
