// SPDX-License-Identifier: Apache-2.0
// compress, store_tokens and store_tiles of any elements to any slots, moves and tables. Properties: every call ends
// well, or is refused and writes nothing; what is not finite, or does not fit, is reported, and only that decodes to
// NaN; tokens that a call does not name keep their bytes.
#include <optional>

#include "paged.hpp"

namespace {

namespace pk = packkv;
constexpr int dim = fuzz::head_dim;

/// Token `t` of a tile of K and of V, as floats.
struct decoded {
  float x[2][dim] = {};

  decoded(const fuzz::paged_cache& c, int page, int head, int tile, int t) {
    const pk::codec_spec key = c.f.key(), value = c.f.value();
    const auto of_head = [&](const pk::codec_spec& spec, const pk::side_parameters& p) {
      return pk::of_head(spec, p, head);
    };
    pk::reference::decode_token(key, of_head(key, c.parameters.key), pk::key_tile(c.view.pages, key, page, head, tile),
                                t, x[0]);
    pk::reference::decode_token(value, of_head(value, c.parameters.value),
                                pk::value_tile(c.view.pages, value, page, head, tile), t, x[1]);
  }
  bool finite() const { return fuzz::all_finite(x[0], 2 * dim); }
  friend bool operator==(const decoded& a, const decoded& b) { return std::memcmp(a.x, b.x, sizeof a.x) == 0; }
};

void store_tokens(fuzz::input& in, fuzz::paged_cache& c) {
  const int n = in.below(4), page_tokens = 64 * c.view.pages.tiles_per_page, all = c.num_pages * page_tokens;
  fuzz::memory slots(8 * n);
  for (int i = 0; i < n; ++i) slots.as<std::int64_t>()[i] = in.near<std::int64_t>(all);
  fuzz::tensor<3> keys(pk::dtype::float16, {n, c.kv_heads, dim}), values(pk::dtype::bfloat16, {n, c.kv_heads, dim});
  const int probe = all > 0 ? in.near(all) : -1;
  in.fill(keys.bytes), in.fill(values.bytes), c.fill_pages(in);
  const bool probed = probe >= 0 && probe < all;
  const auto at_probe = [&] {
    return decoded(c, probe / page_tokens, c.kv_heads - 1, probe % page_tokens / 64, probe % 64);
  };
  const fuzz::memory old_keys = c.pool.keys, old_values = c.pool.values;
  bool named = false, any = false;
  for (int i = 0; i < n; ++i) {
    const std::int64_t slot = slots.as<std::int64_t>()[i];
    named = named || slot == probe, any = any || (slot >= 0 && slot < all);
  }
  const std::optional<decoded> before = probed ? std::optional<decoded>(at_probe()) : std::nullopt;
  pk::device_report report;
  const pk::status s =
      pk::reference::store_tokens(keys.in(), values.in(), slots.as<std::int64_t>(), c.parameters, c.view.pages, report);
  fuzz::check(static_cast<bool>(s) == !c.f.key().needs_tiles(), "only grouped keys cannot be stored by tokens");
  if (!s || !any)
    fuzz::check(c.pool.keys == old_keys && c.pool.values == old_values, "what has no slot changes no page");
  if (!s || !probed) return;
  const decoded after = at_probe();
  if (!named) fuzz::check(after == *before, "a token that is not named stays");
  if (named && report.flags == 0) fuzz::check(after.finite(), "finite tokens are stored finite");
}

void store_tiles(fuzz::input& in, fuzz::paged_cache& c) {
  const int n = in.below(3), rows = in.below(3), tokens = 63 + in.below(4),
            all = c.num_pages * c.view.pages.tiles_per_page;
  fuzz::memory moves(static_cast<std::int64_t>(sizeof(pk::tile_move)) * n);
  for (int i = 0; i < n; ++i) {
    const std::int64_t slot = in.near<std::int64_t>(all * 64);
    moves.as<pk::tile_move>()[i] = {in.few(8) == 2 ? slot : slot - slot % 64, in.near(rows), in.near(tokens)};
  }
  fuzz::tensor<4> keys(pk::dtype::float16, {rows, c.kv_heads, tokens, dim}),
      values(pk::dtype::float16, {rows, c.kv_heads, tokens, dim});
  in.fill(keys.bytes), in.fill(values.bytes), c.fill_pages(in);
  const fuzz::memory old_keys = c.pool.keys, old_values = c.pool.values;
  std::uint32_t flags = 0;
  int done = -1;
  for (int i = 0; i < n; ++i)
    if (pk::detail::place_of(moves.as<pk::tile_move>()[i], keys.in(), c.view.pages, flags).valid) done = i;
  pk::device_report report;
  const pk::status s = pk::reference::store_tiles(keys.in(), values.in(), moves.as<pk::tile_move>(), n, c.parameters,
                                                  c.view.pages, report);
  fuzz::check(static_cast<bool>(s) == (n == 0 || tokens >= 64), "tiles of at least 64 tokens are stored");
  if (!s || done < 0)
    fuzz::check(c.pool.keys == old_keys && c.pool.values == old_values, "what has no place changes no page");
  if (!s || done < 0 || report.flags != 0) return;
  const int tile = static_cast<int>(moves.as<pk::tile_move>()[done].slot / 64), tiles = c.view.pages.tiles_per_page;
  fuzz::check(decoded(c, tile / tiles, c.kv_heads - 1, tile % tiles, 63).finite(), "finite tiles are stored finite");
}

void compress(fuzz::input& in, fuzz::paged_cache& c) {
  fuzz::tensor<4> keys(pk::dtype::float16, {c.batch, c.kv_heads, c.max_seq_len, dim}),
      values(pk::dtype::float16, {c.batch, c.kv_heads, c.max_seq_len, dim});
  in.fill(keys.bytes), in.fill(values.bytes), c.fill_pages(in);
  pk::device_report report;
  fuzz::check(static_cast<bool>(pk::reference::compress(keys.in(), values.in(), c.view.seq_lens, c.parameters,
                                                        c.view.pages, c.view.table, report)),
              "compress takes any elements, ids and lengths");
  constexpr std::uint32_t values_flags = pk::report_nonfinite_input | pk::report_scale_overflow;
  float x[dim];
  for (int b = 0; b < c.batch && (report.flags & values_flags) == 0; ++b)
    for (const pk::side which : {pk::side::key, pk::side::value})
      if (c.length(b) > 0 && c.decode(which, b, c.kv_heads - 1, c.length(b) - 1, x))
        fuzz::check(fuzz::all_finite(x, dim), "finite tokens are coded finite");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::input in(data, size);
  const int call = in.below(3);
  fuzz::paged_cache c(in);
  if (call == 0) store_tokens(in, c);
  if (call == 1) store_tiles(in, c);
  if (call == 2) compress(in, c);
  return 0;
}
