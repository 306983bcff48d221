// SPDX-License-Identifier: Apache-2.0
// JSON text and its way into a file.
#include "json.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>

namespace evaluate {

std::string json_string(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c >= ' ' && c <= '~') {
      out += c;
    } else {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(static_cast<unsigned char>(c)));
      out += code;
    }
  }
  return out + "\"";
}

std::string json_number(double value) {
  char text[40];
  for (int digits = 6; digits <= 17; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  return text;
}

void json_object::add_raw(const std::string& key, const std::string& json) {
  fields_ += (fields_.empty() ? "" : ", ") + json_string(key) + ": " + json;
}
void json_object::add(const std::string& key, const std::string& value) { add_raw(key, json_string(value)); }
void json_object::add(const std::string& key, std::int64_t value) { add_raw(key, std::to_string(value)); }
void json_object::add(const std::string& key, double value) { add_raw(key, json_number(value)); }

namespace {

/// True for what a rename must not replace: devices, pipes. They are written directly.
bool is_special(const std::string& path) {
  struct stat info = {};
  return stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode);
}

outcome write_all(std::FILE* file, const std::string& path, const std::string& text) {
  if (file == nullptr) return failure(path + ": " + std::strerror(errno));
  const bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  const int error = errno;
  const bool closed = std::fclose(file) == 0;
  if (!written || !closed) return failure(path + ": " + std::strerror(written ? errno : error));
  return {};
}

/// The file behind a symbolic link, so that the link itself survives the rename.
std::string resolved(const std::string& path) {
  std::error_code ignored;
  const std::filesystem::path real = std::filesystem::canonical(path, ignored);
  return ignored ? path : real.string();
}

}  // namespace

outcome check_writable(const std::string& path) {
  struct stat info = {};
  if (path.empty()) return failure("--json needs a file name or -");
  if (stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) return failure(path + ": is a directory");
  const std::filesystem::path folder = std::filesystem::path(resolved(path)).parent_path();
  if (!is_special(path) && access(folder.empty() ? "." : folder.c_str(), W_OK) != 0)
    return failure(path + ": the folder cannot be written: " + std::strerror(errno));
  return {};
}

outcome write_file(const std::string& path, const std::string& text) {
  if (is_special(path)) return write_all(std::fopen(path.c_str(), "w"), path, text);
  const std::string target = resolved(path), temporary = target + ".tmp" + std::to_string(getpid());
  outcome o = write_all(std::fopen(temporary.c_str(), "wx"), temporary, text);
  if (o && std::rename(temporary.c_str(), target.c_str()) != 0) o = failure(path + ": " + std::strerror(errno));
  if (!o) std::remove(temporary.c_str());
  return o;
}

}  // namespace evaluate
