// SPDX-License-Identifier: Apache-2.0
// The language of --codec: `name:key=value,...`.
// One idea: a parsed SPEC is complete (defaults filled in) and free of shapes; coding.hpp meets it with a cache.
//   codec_choice c;   if (outcome o = parse_spec("plan:k=4.2.1.1,v=2", c); !o) return o;
#pragma once

#include <optional>
#include <string>

#include <packkv/codec/codec.hpp>

#include "groups.hpp"
#include "outcome.hpp"
#include "packs.hpp"

namespace evaluate {

/// How one side is to be stored.
struct side_choice {
  packkv::codec_kind kind = packkv::codec_kind::float16;
  packkv::strip_widths widths = {};  ///< plan; count 1 means: this width for every strip
  packkv::transform_kind transform = packkv::transform_kind::identity;
  int leading = 0;
  bool center = false;  ///< subtract the calibrated mean of each channel
  float tensor_scale = 0.0f;  ///< fp8; 0 means: computed from the data
};

enum class step_choice { automatic, gaussian, calibrated };

/// A codec of both sides, as the user wrote it.
struct codec_choice {
  std::string text;
  side_choice key, value;
  step_choice steps = step_choice::automatic;
  std::optional<pack_choice> packs;    ///< packkv; the fields above are not used then
  std::optional<group_choice> groups;  ///< kivi, channel, token, vector, strip; nor are they then
};

/// Parses a SPEC. Unknown names and keys, keys given twice and bad values are failures.
outcome parse_spec(const std::string& text, codec_choice& choice);

/// What --list prints: every name with its keys, their defaults, a line of meaning and an example.
std::string list_codecs();

}  // namespace evaluate
