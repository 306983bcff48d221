// SPDX-License-Identifier: Apache-2.0
// The parser of codec SPECs: one table of names and keys serves parsing, error messages and --list.
#include "spec.hpp"

#include <cstddef>
#include <iterator>
#include <set>

#include "text.hpp"

namespace evaluate {
namespace {

using packkv::codec_kind;
using packkv::transform_kind;

struct key_entry {
  const char* name;
  const char* values;
  const char* preset;  ///< what holds when the key is absent
  const char* meaning;
};

struct name_entry {
  const char* name;
  const char* meaning;
  const char* example;
  const key_entry* keys;
  std::size_t key_count;
  void (*begin)(const std::string& name, codec_choice&);                           ///< sets the defaults
  bool (*parse)(const std::string& key, const std::string& value, codec_choice&);  ///< one key of `keys`
  std::string (*finish)(const std::set<std::string>& given, codec_choice&);  ///< what is wrong, or an empty string
};

constexpr key_entry fp8_keys[] = {
    {"k_scale", "NUMBER", "largest |k| / 448", "K is stored divided by this"},
    {"v_scale", "NUMBER", "largest |v| / 448", "V is stored divided by this"},
};

constexpr key_entry pack_keys[] = {
    {"quant", "token|vector|channel|block", "token",
     "what shares a step: a token of all heads, a token of a head, 64 tokens of a channel, a block of 64 tokens"},
    {"quant_k", "as quant", "quant", "the same, for K"},
    {"quant_v", "as quant", "quant", "the same, for V"},
    {"r", "NUMBER", "0.1", "step of a group / (its largest - its smallest element), at most 1"},
    {"r_k", "NUMBER", "r", "the same, for K"},
    {"r_v", "NUMBER", "r", "the same, for V"},
    {"zero", "int|float", "int", "zero point: a multiple of the step, or the group's smallest element"},
    {"order", "none|median|greedy", "greedy", "order of the tokens within 64; K and V share it"},
    {"pack", "2|4|8|16|32", "16", "tokens of a pack, which has a minimum and a width for each channel"},
};

constexpr key_entry kivi_keys[] = {
    {"bits", "1|2|3|4|8", "2", "bits of a code"},
    {"group", "32|64|128", "32", "tokens of a K group of one channel, channels of a V group of one token"},
    {"recent", "COUNT", "128", "the newest tokens that stay 16-bit, and those that fill no block (64; group=128: 128)"},
};

constexpr key_entry channel_keys[] = {
    {"bits", "1|2|3|4|8", "4", "bits of a K code"},
    {"bits_v", "1|2|3|4|8", "bits", "bits of a V code"},
    {"tokens", "32|64|128", "64", "tokens of a K group of one channel; V: one token of a head"},
    {"hadamard", "0|1", "1", "Hadamard transform of V; K stays as it is"},
    {"center_k", "0|1", "0", "subtract the mean of each K channel of this cache; stored and counted"},
    {"steps", "minmax|gaussian|gaussian_mean", "minmax",
     "a scale and a minimum, a scale centred on 0, or both from mean and deviation"},
    {"recent", "COUNT", "0", "the newest tokens that stay 16-bit, and those that fill no block (64; tokens=128: 128)"},
};

constexpr key_entry row_keys[] = {
    {"bits", "1|2|3|4|8", "4", "bits of a K code"},
    {"bits_v", "1|2|3|4|8", "bits", "bits of a V code"},
    {"hadamard", "0|1", "0", "Hadamard transform of K and V"},
    {"center_k", "0|1", "0", "subtract the mean of each K channel of this cache; stored and counted"},
    {"steps", "minmax|gaussian|gaussian_mean", "minmax",
     "a scale and a minimum, a scale centred on 0, or both from mean and deviation"},
    {"recent", "COUNT", "0", "the newest tokens that stay 16-bit, and those that fill no block of 64"},
};

constexpr key_entry strip_keys[] = {
    {"quant", "token|vector|channel|block", "token",
     "what shares a step: a token of all heads, a token of a head, 64 tokens of a channel, a block of 64 tokens"},
    {"quant_k", "as quant", "quant", "the same, for K"},
    {"quant_v", "as quant", "quant", "the same, for V"},
    {"r", "NUMBER", "0.1", "step of a group / (its largest - its smallest element), 1/255 to 1"},
    {"r_k", "NUMBER", "r", "the same, for K"},
    {"r_v", "NUMBER", "r", "the same, for V"},
    {"zero", "int|float", "float", "zero point: a multiple of the step, or the group's smallest element"},
    {"hadamard", "0|1", "0", "Hadamard transform of V, and of K unless it is quantised by channel"},
    {"center_k", "0|1", "0", "subtract the mean of each K channel of this cache; stored and counted"},
    {"recent", "COUNT", "0", "the newest tokens that stay 16-bit, and those that fill no block of 64"},
};

constexpr key_entry plan_keys[] = {
    {"k", "WIDTHS|fp16|bf16|fp8", "required",
     "bits of each K strip of 32 channels (16 at head_dim 64), or a 16-bit or FP8 side"},
    {"v", "WIDTHS|fp16|bf16|fp8", "required", "bits of each V strip of 16 channels, or a 16-bit or FP8 side"},
    {"transform_k", "identity|permutation|hadamard|basis", "identity",
     "basis of K; permutation and basis need calibration files"},
    {"transform_v", "identity|permutation|hadamard|basis", "hadamard",
     "basis of V; permutation and basis need calibration files"},
    {"center_k", "0|1", "0", "subtract the mean of each K channel before coding; needs calibration files"},
    {"leading", "0..4", "0", "first K components kept in 8 bits; needs calibration files"},
    {"steps", "gaussian|calibrated", "calibrated with calibration files, else gaussian",
     "quantiser steps of the channels"},
    {"k_scale", "NUMBER", "largest |k| / 448", "with k=fp8 only"},
    {"v_scale", "NUMBER", "largest |v| / 448", "with v=fp8 only"},
};

bool parse_kind(const std::string& text, codec_kind& kind) {
  if (text == "fp16")
    kind = codec_kind::float16;
  else if (text == "bf16")
    kind = codec_kind::bfloat16;
  else if (text == "fp8")
    kind = codec_kind::fp8;
  else
    return false;
  return true;
}

bool parse_transform(const std::string& text, transform_kind& transform) {
  if (text == "identity")
    transform = transform_kind::identity;
  else if (text == "permutation")
    transform = transform_kind::permutation;
  else if (text == "hadamard")
    transform = transform_kind::hadamard;
  else if (text == "basis")
    transform = transform_kind::basis;
  else
    return false;
  return true;
}

/// A side's value: a 16-bit or FP8 name, or widths separated by dots, widest first.
bool parse_side(const std::string& text, side_choice& choice) {
  if (parse_kind(text, choice.kind)) return true;
  choice.kind = codec_kind::plan;
  const std::vector<std::string> parts = split(text, '.');
  if (parts.size() > packkv::max_strips) return false;
  choice.widths = {};
  for (const std::string& part : parts) {
    std::int32_t width = 0;
    if (part.size() != 1 || !parse_count(part, width) || !packkv::is_plan_width(width)) return false;
    const int at = choice.widths.count++;
    if (at > 0 && width > choice.widths.width[at - 1]) return false;
    choice.widths.width[at] = static_cast<std::uint8_t>(width);
  }
  return true;
}

bool parse_value(const std::string& key, const std::string& value, codec_choice& c) {
  if (key == "k") return parse_side(value, c.key);
  if (key == "v") return parse_side(value, c.value);
  if (key == "transform_k") return parse_transform(value, c.key.transform);
  if (key == "transform_v") return parse_transform(value, c.value.transform);
  if (key == "k_scale") return parse_positive(value, c.key.tensor_scale);
  if (key == "v_scale") return parse_positive(value, c.value.tensor_scale);
  if (key == "center_k") {
    c.key.center = value == "1";
    return value == "0" || value == "1";
  }
  if (key == "leading") return parse_count(value, c.key.leading) && c.key.leading <= packkv::max_leading;
  if (value == "gaussian")
    c.steps = step_choice::gaussian;
  else if (value == "calibrated")
    c.steps = step_choice::calibrated;
  else
    return false;
  return true;
}

/// Keys that contradict what k= and v= chose, and sides that are missing.
std::string contradiction(const std::set<std::string>& given, const codec_choice& c) {
  const auto has = [&](const char* key) { return given.count(key) > 0; };
  if (!has("k") || !has("v")) return "plan needs k= and v=";
  if (c.key.kind != codec_kind::plan && (has("transform_k") || has("leading") || has("center_k")))
    return "transform_k, leading and center_k need a plan in k=";
  if (c.value.kind != codec_kind::plan && has("transform_v")) return "transform_v needs a plan in v=";
  if (c.key.kind != codec_kind::fp8 && has("k_scale")) return "k_scale needs k=fp8";
  if (c.value.kind != codec_kind::fp8 && has("v_scale")) return "v_scale needs v=fp8";
  return {};
}

void begin_elements(const std::string& name, codec_choice& c) {
  if (parse_kind(name, c.key.kind)) c.value.kind = c.key.kind;
}
std::string finish_elements(const std::set<std::string>&, codec_choice&) { return {}; }

void begin_plan(const std::string&, codec_choice& c) { c.value.transform = transform_kind::hadamard; }
std::string finish_plan(const std::set<std::string>& given, codec_choice& c) {
  std::string what = contradiction(given, c);
  if (what.empty() && c.value.kind != codec_kind::plan) c.value.transform = transform_kind::identity;
  return what;
}

void begin_packs(const std::string&, codec_choice& c) { c.packs.emplace(); }
bool parse_packs(const std::string& key, const std::string& value, codec_choice& c) {
  return parse_pack_value(key, value, *c.packs);
}
std::string finish_pack_choice(const std::set<std::string>& given, codec_choice& c) {
  return finish_packs(given, *c.packs);
}

void begin_groups(const std::string& name, codec_choice& c) { c.groups = default_groups(name); }
bool parse_groups(const std::string& key, const std::string& value, codec_choice& c) {
  return parse_group_value(key, value, *c.groups);
}
std::string finish_group_choice(const std::set<std::string>& given, codec_choice& c) {
  return finish_groups(given, *c.groups);
}

constexpr name_entry names[] = {
    {"fp16", "both sides as IEEE half: the baseline, lossless here", "fp16", nullptr, 0, begin_elements, parse_value,
     finish_elements},
    {"bf16", "both sides as bfloat16", "bf16", nullptr, 0, begin_elements, parse_value, finish_elements},
    {"fp8", "both sides as FP8 E4M3 with one scale per tensor", "fp8:k_scale=0.05,v_scale=0.01", fp8_keys,
     std::size(fp8_keys), begin_elements, parse_value, finish_elements},
    {"plan",
     "fixed widths per strip of channels and a 16-bit scale per token; WIDTHS: 0 1 2 3 4 8, widest first, or one for "
     "all",
     "plan:k=4.2.1.1,v=2.2.2.2.2.2.2.2,transform_v=hadamard", plan_keys, std::size(plan_keys), begin_plan, parse_value,
     finish_plan},
    {"packkv",
     "PackKV as published: relative steps, tokens reordered, packs of a minimum and a width; the newest 128..191 "
     "tokens "
     "stay 16-bit; on the CPU",
     "packkv:quant=token,r=0.1,zero=int,order=greedy,pack=16", pack_keys, std::size(pack_keys), begin_packs,
     parse_packs, finish_pack_choice},
    {"kivi",
     "KIVI as published: K per channel over `group` tokens, V per token over `group` channels, a scale and a minimum "
     "per group; on the CPU",
     "kivi:bits=2,group=32", kivi_keys, std::size(kivi_keys), begin_groups, parse_groups, finish_group_choice},
    {"channel", "K per channel over `tokens` tokens, V per token of a head; on the CPU", "channel:bits=3,tokens=64",
     channel_keys, std::size(channel_keys), begin_groups, parse_groups, finish_group_choice},
    {"token", "K and V with one scale per token, shared by all heads; on the CPU", "token:bits=4,hadamard=1", row_keys,
     std::size(row_keys), begin_groups, parse_groups, finish_group_choice},
    {"vector", "K and V with one scale per token of a head; on the CPU", "vector:bits=4,hadamard=1", row_keys,
     std::size(row_keys), begin_groups, parse_groups, finish_group_choice},
    {"strip",
     "strip-adaptive: relative steps as packkv, tokens in their order, a width and a base per strip of 64 tokens; on "
     "the CPU",
     "strip:quant=token,r=0.1", strip_keys, std::size(strip_keys), begin_groups, parse_groups, finish_group_choice},
};

const name_entry* find_name(const std::string& name) {
  for (const name_entry& entry : names)
    if (name == entry.name) return &entry;
  return nullptr;
}

bool has_key(const name_entry& entry, const std::string& key) {
  for (std::size_t i = 0; i < entry.key_count; ++i)
    if (key == entry.keys[i].name) return true;
  return false;
}

}  // namespace

outcome parse_spec(const std::string& text, codec_choice& choice) {
  const auto wrong = [&](const std::string& what) { return failure("codec '" + text + "': " + what); };
  const std::size_t colon = text.find(':');
  const name_entry* entry = find_name(text.substr(0, colon));
  if (entry == nullptr) return wrong("unknown name (--list shows all)");
  choice = {};
  choice.text = text;
  entry->begin(entry->name, choice);
  std::set<std::string> given;
  if (colon != std::string::npos) {
    for (const std::string& field : split(text.substr(colon + 1), ',')) {
      const std::size_t equals = field.find('=');
      const std::string key = field.substr(0, equals);
      if (equals == std::string::npos) return wrong("'" + field + "' is not key=value");
      if (!has_key(*entry, key)) return wrong("unknown key '" + key + "'");
      if (!given.insert(key).second) return wrong("key '" + key + "' is given twice");
      if (!entry->parse(key, field.substr(equals + 1), choice)) return wrong("bad value in '" + field + "'");
    }
  }
  if (const std::string what = entry->finish(given, choice); !what.empty()) return wrong(what);
  return {};
}

std::string list_codecs() {
  std::string out = "Codecs, written as name:key=value,...\n";
  for (const name_entry& entry : names) {
    out += std::string("\n") + entry.name + "  " + entry.meaning + "\n";
    for (std::size_t i = 0; i < entry.key_count; ++i) {
      const key_entry& key = entry.keys[i];
      out += std::string("    ") + key.name + "=" + key.values + "  (" +
             (std::string(key.preset) == "required" ? "" : "default: ") + key.preset + ")  " + key.meaning + "\n";
    }
    out += std::string("    example: --codec ") + entry.example + "\n";
  }
  return out;
}

}  // namespace evaluate
