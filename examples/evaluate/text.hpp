// SPDX-License-Identifier: Apache-2.0
// Strict conversions of user text: the whole text is the number, or it is refused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace evaluate {

/// A decimal integer of digits only, 0 .. 2^31 - 1.
bool parse_count(const std::string& text, std::int32_t& value);
/// A decimal number > 0 that is finite and not zero as a float.
bool parse_positive(const std::string& text, float& value);
/// What a text stands for, where it is one of a few.
template <class T>
struct named {
  const char* name;
  T value;
};
/// The value of that name; false if there is none.
template <class T, std::size_t N>
bool parse_name(const named<T> (&names)[N], const std::string& text, T& value) {
  for (const named<T>& n : names)
    if (text == n.name) {
      value = n.value;
      return true;
    }
  return false;
}
/// The parts of `text` between `separator`s; at least one part, parts may be empty.
std::vector<std::string> split(const std::string& text, char separator);

}  // namespace evaluate
