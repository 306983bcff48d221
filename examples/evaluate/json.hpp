// SPDX-License-Identifier: Apache-2.0
// Writes JSON objects: strings are escaped, numbers are the shortest that read back the same.
//   json_object o;   o.add("codec", "fp16");   o.add("tokens", std::int64_t{2048});   text += o.str();
#pragma once

#include <cstdint>
#include <string>

#include "outcome.hpp"

namespace evaluate {

/// One object, built field by field in the order of the calls.
class json_object {
 public:
  void add(const std::string& key, const std::string& value);
  void add(const std::string& key, std::int64_t value);
  /// `value` must be finite: JSON has no NaN.
  void add(const std::string& key, double value);
  std::string str() const { return "{" + fields_ + "}"; }

 private:
  void add_raw(const std::string& key, const std::string& json);
  std::string fields_;
};

/// A JSON string literal. Bytes that are no printable ASCII become \u00XX.
std::string json_string(const std::string& text);
/// The shortest decimal that reads back as `value`.
std::string json_number(double value);

/// Whether write_file(path) can work, as far as can be seen before the work is done.
outcome check_writable(const std::string& path);
/// Puts `text` into `path` in one step (a temporary file, then a rename): the file is complete or as it was.
outcome write_file(const std::string& path, const std::string& text);

}  // namespace evaluate
