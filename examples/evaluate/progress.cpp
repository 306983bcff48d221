// SPDX-License-Identifier: Apache-2.0
// The progress line.
#include "progress.hpp"

#include <unistd.h>

#include <cstdio>
#include <utility>

namespace evaluate {

progress::progress(std::string label)
    : label_(std::move(label)), terminal_(isatty(STDERR_FILENO) != 0), next_(clock::now() + std::chrono::seconds(1)) {}

progress::~progress() {
  if (shown_) std::fputs("\r\033[K", stderr);
}

void progress::expect(std::int64_t units) {
  const std::lock_guard<std::mutex> lock(mutex_);
  total_ += units;
}

void progress::advance(std::int64_t units) {
  if (!terminal_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  done_ += units;
  const clock::time_point now = clock::now();
  if (now < next_ || total_ <= 0) return;
  next_ = now + std::chrono::milliseconds(200);
  shown_ = true;
  std::fprintf(stderr, "\r\033[K%s: %d %%", label_.c_str(),
               static_cast<int>(100.0 * static_cast<double>(done_) / static_cast<double>(total_)));
  std::fflush(stderr);
}

}  // namespace evaluate
