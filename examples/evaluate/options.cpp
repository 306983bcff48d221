// SPDX-License-Identifier: Apache-2.0
// Parses the command line: every option at most once, but --codec.
#include "options.hpp"

#include <cstddef>
#include <set>

#include "text.hpp"

namespace evaluate {
namespace {

bool parse_device(const std::string& text, device_choice& device) {
  if (text == "auto")
    device = device_choice::automatic;
  else if (text == "cpu")
    device = device_choice::cpu;
  else if (text == "gpu")
    device = device_choice::gpu;
  else
    return false;
  return true;
}

/// The string that an option fills, or null.
std::string* path_of(const std::string& name, options& o) {
  if (name == "--k") return &o.cache.k;
  if (name == "--v") return &o.cache.v;
  if (name == "--q") return &o.cache.q;
  if (name == "--calibrate-k") return &o.calibration.k;
  if (name == "--calibrate-v") return &o.calibration.v;
  if (name == "--calibrate-q") return &o.calibration.q;
  if (name == "--json") return &o.json;
  return nullptr;
}

bool takes_value(const std::string& name) {
  static const std::set<std::string> names = {"--k",           "--v",      "--q",     "--calibrate-k", "--calibrate-v",
                                              "--calibrate-q", "--json",   "--codec", "--scale",       "--window",
                                              "--sinks",       "--recent", "--device"};
  return names.count(name) > 0;
}

outcome parse_option(const std::string& name, const std::string& value, options& o) {
  if (std::string* path = path_of(name, o); path != nullptr) {
    *path = value;
    return value.empty() ? failure(name + " needs a file name") : outcome{};
  }
  if (name == "--codec") {
    o.codecs.emplace_back();
    return parse_spec(value, o.codecs.back());
  }
  const bool good = name == "--scale"    ? parse_positive(value, o.scale)
                    : name == "--window" ? parse_count(value, o.window) && o.window > 0
                    : name == "--sinks"  ? parse_count(value, o.sinks)
                    : name == "--recent" ? parse_count(value, o.recent)
                                         : parse_device(value, o.device);
  return good ? outcome{} : failure("bad value '" + value + "' of " + name);
}

outcome check_complete(const options& o) {
  if (o.help || o.list) return {};
  if (!o.cache.all()) return failure("--k, --v and --q are required (--help shows all options)");
  if (o.codecs.empty()) return failure("at least one --codec is required (--list shows all)");
  if (o.calibration.any() && !o.calibration.all())
    return failure("--calibrate-k, --calibrate-v and --calibrate-q go together");
  return {};
}

}  // namespace

outcome parse_options(const std::vector<std::string>& arguments, options& o) {
  std::set<std::string> given;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (name == "--help" || name == "-h") {
      o.help = true;
    } else if (name == "--list") {
      o.list = true;
    } else if (!takes_value(name)) {
      return failure("unknown option '" + name + "' (--help shows all)");
    } else if (i + 1 == arguments.size()) {
      return failure(name + " needs a value");
    } else if (name != "--codec" && !given.insert(name).second) {
      return failure(name + " is given twice");
    } else if (outcome parsed = parse_option(name, arguments[++i], o); !parsed) {
      return parsed;
    }
  }
  return check_complete(o);
}

std::string help_text() {
  return "evaluate: what a KV cache codec costs in bits and in attention error, on a real cache\n"
         "\n"
         "  evaluate --k k.npy --v v.npy --q q.npy --codec SPEC [--codec SPEC ...] [options]\n"
         "\n"
         "  --k, --v, --q FILE   float16 .npy: k [kv_heads, tokens, D_k], v [kv_heads, tokens, D_v],\n"
         "                       q [query_heads, n, D_k], the queries of the last n positions (causal)\n"
         "  --codec SPEC         a codec, e.g. fp16 or plan:k=4.2.1.1,v=2 (may be repeated)\n"
         "  --list               print every codec with its keys, and stop\n"
         "  --scale S            softmax scale (default: 1/sqrt(D_k))\n"
         "  --window W           a query sees the last W positions up to its own (default: all)\n"
         "  --sinks N            the first N tokens stay 16-bit (default: 0)\n"
         "  --recent N           the last N keys of each query stay 16-bit (default: 0)\n"
         "  --device NAME        cpu, gpu or auto: where attention on coded tiles runs (default: auto: the GPU if\n"
         "                       there is one and it has the call, else the CPU)\n"
         "  --calibrate-k, --calibrate-v, --calibrate-q FILE\n"
         "                       another cache of the same layer: steps, permutations and scales come from it\n"
         "  --json FILE          results as JSON; - writes them to stdout and the table to stderr\n"
         "  --help               print this, and stop\n"
         "\n"
         "Exit code 0: all codecs evaluated; 2: something is wrong with the input, one line on stderr says what.\n";
}

}  // namespace evaluate
