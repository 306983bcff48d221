// SPDX-License-Identifier: Apache-2.0
#include "symbols.hpp"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

namespace packkv_simt::detail {
namespace {

struct symbol {
  std::string name;
  ElfW(Addr) address;
  std::size_t bytes;
  bool function, zero_initialised;
};

/// Symbols of the main program, at their addresses in memory.
std::vector<symbol> read_symbols() {
  std::vector<symbol> result;
  std::ifstream file("/proc/self/exe", std::ios::binary);
  const std::vector<char> image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto at = [&](std::size_t offset, std::size_t bytes) {
    return bytes <= image.size() && offset <= image.size() - bytes ? image.data() + offset : nullptr;
  };
  ElfW(Addr) base = 0;
  dl_iterate_phdr([](dl_phdr_info* info, std::size_t, void* p) { return *static_cast<ElfW(Addr)*>(p) = info->dlpi_addr, 1; }, &base);
  ElfW(Ehdr) header;
  const char* start = at(0, sizeof header);
  if (start == nullptr || std::memcmp(start, ELFMAG, SELFMAG) != 0) return result;
  std::memcpy(&header, start, sizeof header);
  std::vector<ElfW(Shdr)> sections(header.e_shnum);
  const char* table = at(header.e_shoff, sections.size() * sizeof sections[0]);
  if (table == nullptr || sections.empty()) return result;
  std::memcpy(sections.data(), table, sections.size() * sizeof sections[0]);
  for (const auto& s : sections) {
    if (s.sh_type != SHT_SYMTAB || s.sh_link >= sections.size()) continue;
    const auto& strings = sections[s.sh_link];
    const char* names = at(strings.sh_offset, strings.sh_size);
    const char* entries = at(s.sh_offset, s.sh_size);
    if (names == nullptr || entries == nullptr) continue;
    for (std::size_t i = 0; i < s.sh_size / sizeof(ElfW(Sym)); ++i) {
      ElfW(Sym) entry;
      std::memcpy(&entry, entries + i * sizeof entry, sizeof entry);
      const int type = entry.st_info & 15;
      if ((type != STT_FUNC && type != STT_OBJECT) || entry.st_shndx == SHN_UNDEF || entry.st_shndx >= sections.size() ||
          entry.st_name >= strings.sh_size)
        continue;
      result.push_back({names + entry.st_name, base + entry.st_value, entry.st_size, type == STT_FUNC,
                        sections[entry.st_shndx].sh_type == SHT_NOBITS});
    }
  }
  return result;
}

const std::vector<symbol>& symbols() {
  static const std::vector<symbol> all = read_symbols();
  return all;
}

bool starts_with(const std::string& text, const char* prefix) { return text.compare(0, std::strlen(prefix), prefix) == 0; }

/// "void a::b<(int)128>(c, d)" -> "a::b<(int)128>".
std::string without_parameters(const std::string& name) {
  std::size_t end = name.size(), begin = 0;
  if (end > 0 && name[end - 1] == ')') {
    int depth = 0;
    for (std::size_t i = end; i-- > 0;) {
      depth += name[i] == ')' ? 1 : name[i] == '(' ? -1 : 0;
      if (depth == 0) {
        end = i;
        break;
      }
    }
  }
  if (starts_with(name, "void ")) begin = 5;
  return name.substr(begin, end - begin);
}

}  // namespace

std::string function_name(const void* function) {
  for (const symbol& s : symbols())
    if (s.function && s.address == reinterpret_cast<ElfW(Addr)>(function)) {
      int failed = 0;
      char* readable = abi::__cxa_demangle(s.name.c_str(), nullptr, nullptr, &failed);
      const std::string name = failed == 0 && readable != nullptr ? without_parameters(readable) : s.name;
      std::free(readable);
      return name;
    }
  char text[32];
  std::snprintf(text, sizeof text, "kernel at %p", function);
  return text;
}

namespace {

constexpr char guard_name[] = "packkv_simt_guard_";

/// "_ZZ<function>E" of every function with a guard, and so with a __shared__ variable.
std::vector<std::string> functions_with_shared() {
  std::vector<std::string> prefixes;
  for (const symbol& s : symbols()) {
    std::size_t end = s.name.find(guard_name);
    if (s.function || end == std::string::npos) continue;
    while (end > 0 && s.name[end - 1] >= '0' && s.name[end - 1] <= '9') --end;  // the length of the name
    prefixes.push_back(s.name.substr(0, end));
  }
  std::sort(prefixes.begin(), prefixes.end());
  prefixes.erase(std::unique(prefixes.begin(), prefixes.end()), prefixes.end());
  return prefixes;
}

/// Their zero-initialised statics: the guards among them, or the others.
std::vector<memory_range> find_shared(bool guards) {
  static const std::vector<std::string> prefixes = functions_with_shared();
  std::vector<memory_range> ranges;
  for (const symbol& s : symbols()) {
    if (s.function || !s.zero_initialised || !starts_with(s.name, "_ZZ") || (s.name.find(guard_name) != std::string::npos) != guards) continue;
    if (std::any_of(prefixes.begin(), prefixes.end(), [&](const std::string& p) { return starts_with(s.name, p.c_str()); }))
      ranges.push_back({reinterpret_cast<unsigned char*>(s.address), s.bytes});
  }
  return ranges;
}

}  // namespace

const std::vector<memory_range>& shared_variables() {
  static const std::vector<memory_range> all = find_shared(false);
  return all;
}

const std::vector<memory_range>& shared_guards() {
  static const std::vector<memory_range> all = find_shared(true);
  return all;
}

}  // namespace packkv_simt::detail
