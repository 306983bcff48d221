// SPDX-License-Identifier: Apache-2.0
// What a step of the program reports: nothing, or one line for the user. The program throws nothing of its own.
//   if (outcome o = read(path, array); !o) return o;
#pragma once

#include <string>
#include <utility>

namespace evaluate {

/// Success, or one sentence that says what is wrong.
class [[nodiscard]] outcome {
 public:
  outcome() = default;
  explicit operator bool() const { return error_.empty(); }
  const std::string& error() const { return error_; }
  friend outcome failure(std::string message);

 private:
  std::string error_;
};

inline outcome failure(std::string message) {
  outcome o;
  o.error_ = std::move(message);
  return o;
}

}  // namespace evaluate
