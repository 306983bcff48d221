// SPDX-License-Identifier: Apache-2.0
// Strict conversions of user text.
#include "text.hpp"

#include <cstdlib>

#include <packkv/detail/arith.hpp>

namespace evaluate {

bool parse_count(const std::string& text, std::int32_t& value) {
  if (text.empty() || text.size() > 10) return false;
  std::int64_t sum = 0;
  for (const char c : text) {
    if (c < '0' || c > '9') return false;
    sum = sum * 10 + (c - '0');
  }
  value = static_cast<std::int32_t>(sum);
  return sum <= 2147483647;
}

bool parse_positive(const std::string& text, float& value) {
  // strtof also takes blanks, hexadecimals, "inf" and "nan": the first filter leaves plain decimals.
  if (text.empty() || text.find_first_not_of("0123456789.eE+-") != std::string::npos) return false;
  char* end = nullptr;
  value = std::strtof(text.c_str(), &end);
  return end == text.c_str() + text.size() && packkv::detail::is_finite(value) && value > 0.0f;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  for (std::size_t at; (at = text.find(separator, begin)) != std::string::npos; begin = at + 1)
    parts.push_back(text.substr(begin, at - begin));
  parts.push_back(text.substr(begin));
  return parts;
}

}  // namespace evaluate
