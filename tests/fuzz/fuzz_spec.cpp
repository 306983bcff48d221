// SPDX-License-Identifier: Apache-2.0
// SPECs and command lines of evaluate. Properties: what is parsed keeps its text and is parsed again; what meets a
// cache codes it to finite elements, or says in words why not; JSON of any text is printable ASCII.
#include <cmath>
#include <evaluate/coding.hpp>
#include <evaluate/json.hpp>
#include <evaluate/options.hpp>
#include <evaluate/text.hpp>
#include <packkv/reference/tile.hpp>

#include "../host/evaluate_files.hpp"
#include "input.hpp"

namespace {

namespace pk = packkv;

/// A random cache with one block for PackKV, whose files are gone once they are mapped.
const evaluate::kv_cache& small_cache() {
  static const evaluate::kv_cache cache = [] {
    const packkv_test::temporary_folder folder;
    const packkv_test::cache_files files(folder, "", 1, 1, 2, 192, 2, 64, 64);
    evaluate::kv_cache c;
    fuzz::check(static_cast<bool>(evaluate::load_cache(files.k_path, files.v_path, files.q_path, c)),
                "the cache is read");
    return c;
  }();
  return cache;
}

/// The first token of a side as its codec codes it.
void code_token(const evaluate::coded_side& side, const evaluate::npy_array& from) {
  float x[pk::max_head_dim];
  for (int c = 0; c < side.spec.head_dim; ++c) x[c] = pk::half_to_float(from.row(0, 0)[c]);
  fuzz::memory tile(side.spec.tile_bytes());
  pk::device_report report;
  const pk::head_parameters head = pk::of_head(side.spec, side.parameters(), 0);
  pk::reference::encode_token(side.spec, head, x, 0, tile.data(), report);
  pk::reference::decode_token(side.spec, head, tile.data(), 0, x);
  for (int c = 0; c < side.spec.head_dim; ++c) fuzz::check(std::isfinite(x[c]), "a token is coded finite");
}

void use(const evaluate::codec_choice& choice) {
  const evaluate::kv_cache& cache = small_cache();
  evaluate::coding coding;
  const bool calibrated = choice.text.size() % 4 == 0;
  const evaluate::outcome made = evaluate::make_coding(choice, cache, calibrated ? &cache : nullptr, 1, coding);
  if (!made) return fuzz::check(made.error().size() > choice.text.size(), "a refusal says why");
  if (!coding.whole_cache) return code_token(coding.key, cache.k), code_token(coding.value, cache.v);
  if (choice.text.size() % 8 != 1) return;  // these take milliseconds
  evaluate::coded_cache coded;
  if (!coding.whole_cache.code(cache, coded)) return;
  for (const std::vector<float>* x : {&coded.k, &coded.v}) {
    fuzz::check(static_cast<std::int64_t>(x->size()) == coded.tokens * 64, "all coded tokens are there");
    for (const float element : *x) fuzz::check(std::isfinite(element), "a cache is coded finite");
  }
  for (const auto& figure : coded.figures) fuzz::check(std::isfinite(figure.second), "figures are finite");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  for (const char c : evaluate::json_string(text)) fuzz::check(c >= ' ' && c <= '~', "JSON is printable ASCII");
  evaluate::options options;
  if (text.find('\n') != std::string::npos) {  // a command line, an argument a line
    if (evaluate::parse_options(evaluate::split(text, '\n'), options))
      fuzz::check(options.help || options.list || (options.cache.all() && !options.codecs.empty()),
                  "an accepted command line is complete");
    return 0;
  }
  evaluate::codec_choice choice, again;
  const evaluate::outcome parsed = evaluate::parse_spec(text, choice);
  if (!parsed) {
    fuzz::check(parsed.error().find(text) != std::string::npos, "a refusal names the SPEC");
    return 0;
  }
  fuzz::check(choice.text == text && evaluate::parse_spec(choice.text, again), "a SPEC keeps its text");
  use(choice);
  return 0;
}
