// SPDX-License-Identifier: Apache-2.0
// What a call reports: a code and one sentence. No call of the library throws.
//   if (packkv::status s = packkv::compress(...); !s) return fail(s.message);
#pragma once

#include <cstdint>
#include <packkv/core/config.hpp>

namespace packkv {

/// Why a call was refused. Nothing has been written when the code is not `ok`.
enum class status_code : std::int32_t {
  ok = 0,
  invalid_argument,     ///< a null pointer, a negative extent, a value outside its stated range
  shape_mismatch,       ///< two arguments disagree about heads, tokens, head dim or batch
  unsupported,          ///< valid in itself, but not offered by this format or architecture
  misaligned,           ///< a pointer or stride misses the stated alignment
  overflow,             ///< sizes whose product or sum does not fit 64 bits (or 31 bits, for counts)
  workspace_too_small,  ///< exec::workspace_bytes is less than the matching *_workspace_bytes()
  corrupt,              ///< a blob whose magic, version, format id, size or checksum is wrong
  cuda_error,           ///< a call of the CUDA runtime failed; `detail` is its error number. Launches before it stay
                        ///< made; the same call made again gives what it would have given, except that reports count twice
};

/// Result of a call: `code`, a static sentence, and an optional number that the sentence is about.
struct [[nodiscard]] status {
  status_code code = status_code::ok;
  const char* message = "ok";
  std::int64_t detail = 0;

  /// True if the call did what it says.
  PACKKV_HOST_DEVICE constexpr explicit operator bool() const { return code == status_code::ok; }
};

/// A status that refuses: `return refuse(status_code::misaligned, "keys must be 2-byte aligned");`
PACKKV_HOST_DEVICE constexpr status refuse(status_code code, const char* message, std::int64_t detail = 0) {
  return status{code, message, detail};
}

}  // namespace packkv
