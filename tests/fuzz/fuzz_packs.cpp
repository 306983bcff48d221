// SPDX-License-Identifier: Apache-2.0
// PackKV's packs from an untrusted source: tiles, offsets and ranges of any bytes, or compressed ones that edits have
// changed. Properties: every call accepts what check_packs accepts, and else writes nothing; scores and sums agree with
// the reconstruction; the codes of an accepted tile survive another encoding.
#include <cmath>

#include "packs.hpp"

namespace {

namespace pk = packkv;
using fuzz::canary;
using fuzz::dim;

/// The codes of a good tile survive another encoding.
void encode_again(const pk::pack_format& f, const std::uint8_t* tile) {
  std::uint8_t codes[64 * dim], again[64 * dim], order[64];
  for (int t = 0; t < 64; ++t) order[t] = static_cast<std::uint8_t>(t);
  pk::reference::decode_pack_tile(f.pack_size, dim, tile, codes);
  std::vector<std::uint8_t> bytes;
  pk::pack_statistics statistics;
  pk::reference::encode_pack_tile(f.pack_size, dim, codes, dim, order, bytes, statistics);
  fuzz::check(static_cast<bool>(pk::reference::check_pack_tile(f.pack_size, dim, bytes.data(), statistics.tile_bytes)),
              "a tile that is encoded is good");
  pk::reference::decode_pack_tile(f.pack_size, dim, bytes.data(), again);
  fuzz::check(std::memcmp(codes, again, sizeof codes) == 0, "codes survive another encoding");
}

/// Attention of a few queries over packs and a tail of finite tokens; reach(): the largest magnitude in the packs.
template <class Reach>
void attend(fuzz::input& in, const pk::pack_format& f, const pk::packs_view& packs, bool good, Reach&& reach) {
  constexpr float scales[] = {0.125f, 1.0f, 1e30f, 0.0f, -1.0f, NAN, INFINITY};
  const int tail = in.below(3), queries = in.below(3);
  const float scale = scales[in.few(7) - 1];
  fuzz::tensor<4> x(pk::dtype::float16, {f.batch, f.kv_heads, tail, dim}, 0x3c),
      q(pk::dtype::float16, {f.batch, f.kv_heads, queries, dim}, 0x31),
      out(pk::dtype::float32, {f.batch, f.kv_heads, queries, dim}, canary);
  const fuzz::memory before = out.bytes;
  const bool done = static_cast<bool>(pk::reference::attention(f, packs, x.in(), x.in(), q.in(), scale, out.view, {}));
  const bool allowed =
      good && scale > 0.0f && std::isfinite(scale) && (queries <= tail || (queries == 1 && packs.blocks > 0));
  fuzz::check(done == allowed, "attention takes good packs, scales and numbers of queries");
  if (!done) return fuzz::check(out.bytes == before, "a refused call writes nothing");
  const float most = std::fmax(2.0f, reach());
  for (std::int64_t i = 0; i < out.elements() && std::isfinite(most); ++i)
    fuzz::check(std::fabs(out.floats()[i]) <= 1.001f * most, "an output lies within the values that it is a mean of");
}

/// Largest magnitude, which may be infinite.
float largest(const fuzz::memory& m) {
  float most = 1e-30f;
  for (std::int64_t i = 0; i < m.size() / 4; ++i) {
    const float x = reinterpret_cast<const float*>(m.data())[i];
    fuzz::check(!std::isnan(x), "accepted packs hold numbers");
    most = std::fmax(most, std::fabs(x));
  }
  return most;
}

/// One call over packs that check_packs takes or not.
void read(fuzz::input& in, const pk::pack_format& f, const pk::packs_view& packs, int blocks) {
  const bool good = static_cast<bool>(pk::reference::check_packs(f, packs));
  const std::int64_t slots = 64 * blocks, heads = f.kv_heads;
  const int call = in.below(4), channel = in.below(dim), slot = in.below(64);
  fuzz::tensor<4> k(pk::dtype::float32, {f.batch, heads, slots, dim}, canary),
      v(pk::dtype::float32, {f.batch, heads, slots, dim}, canary);
  const auto decompress = [&] { return static_cast<bool>(pk::reference::decompress(f, packs, k.view, v.view)); };
  // The call's output and whether it was made; where it was, element i of the output is expected(i).
  const auto agrees = [&](bool done, const fuzz::memory& before, const fuzz::memory& after, const fuzz::memory& decoded,
                          auto&& expected) {
    fuzz::check(done == good, "a call agrees with check_packs");
    if (!good) fuzz::check(before == after, "refused packs are not decoded");
    if (!good || (call != 0 && !decompress())) return;
    const float most = largest(decoded);
    for (std::int64_t i = 0; i < after.size() / 4 && std::isfinite(most); i += 5)
      fuzz::check(std::fabs(reinterpret_cast<const float*>(after.data())[i] - expected(i)) <= 0.001f * most,
                  "a score or sum is that of the reconstruction");
  };
  if (call == 0) {
    const fuzz::memory before = k.bytes;
    agrees(decompress(), before, k.bytes, k.bytes, [&](std::int64_t i) { return k.floats()[i]; });
  } else if (call == 1) {
    fuzz::tensor<3> q(pk::dtype::float32, {f.batch, heads, dim}),
        scores(pk::dtype::float32, {f.batch, heads, slots}, canary);
    for (std::int64_t i = channel; i < q.elements(); i += dim) q.bytes.as<float>()[i] = 1.0f;
    const fuzz::memory before = scores.bytes;
    agrees(static_cast<bool>(pk::reference::key_gemv(f, packs, q.in(), 1.0f, scores.view)), before, scores.bytes,
           k.bytes, [&](std::int64_t i) { return k.floats()[i * dim + channel]; });
  } else if (call == 2) {
    fuzz::tensor<3> w(pk::dtype::float32, {f.batch, heads, slots}),
        sums(pk::dtype::float32, {f.batch, heads, dim}, canary);
    for (std::int64_t i = slot; i < w.elements(); i += slots) w.bytes.as<float>()[i] = 1.0f;
    const fuzz::memory before = sums.bytes;
    agrees(static_cast<bool>(pk::reference::value_gemv(f, packs, w.in(), sums.view)), before, sums.bytes, v.bytes,
           [&](std::int64_t i) { return slots == 0 ? 0.0f : v.floats()[(i / dim * slots + slot) * dim + i % dim]; });
  } else {
    attend(in, f, packs, good, [&] { return decompress() ? std::fmax(largest(k.bytes), largest(v.bytes)) : 0.0f; });
  }
  if (good && blocks > 0 && call == 0) encode_again(f, packs.key.data);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::input in(data, size);
  const pk::pack_format f = fuzz::any_pack_format(in);
  const int how = in.byte(), blocks = in.few(2) - (how == 255 ? 1 : 0);
  const std::int64_t hostile[] = {-1, std::int64_t{1} << 57, std::int64_t{1} << 62};
  fuzz::pack_side_arrays s[2] = {{in, f, pk::side::key, blocks}, {in, f, pk::side::value, blocks}};
  if (how % 4 == 1) fuzz::compress_and_edit(in, f, blocks, s);
  if (how > 250 && how < 254) {  // a number of blocks that no array can have
    const pk::packs_view packs{s[0].view(), s[1].view(), hostile[how - 251]};
    fuzz::tensor<3> x(pk::dtype::float32, {f.batch, f.kv_heads, dim});
    fuzz::check(!pk::reference::check_packs(f, packs) && !pk::reference::key_gemv(f, packs, x.in(), 1.0f, x.view) &&
                    !pk::reference::value_gemv(f, packs, x.in(), x.view),
                "impossible numbers of blocks are refused");
    return 0;
  }
  read(in, f, {s[0].view(), s[1].view(), blocks}, blocks);
  return 0;
}
