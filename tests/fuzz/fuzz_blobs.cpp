// SPDX-License-Identifier: Apache-2.0
// Blobs from an untrusted source. Properties: a blob is accepted exactly when write_blob makes these bytes of the pages
// that it leaves; what is refused changes nothing; what is accepted changes its heads of its page alone.
#include <packkv/cache/blob.hpp>
#include <packkv/reference/tile.hpp>

#include "formats.hpp"

namespace {

namespace pk = packkv;
using field = pk::detail::blob_field;

/// Bytes that begin as a blob may, or are one that a few edits have changed.
fuzz::memory any_blob(fuzz::input& in, const fuzz::format& f, const pk::blob_id& id, const fuzz::page_pool& pool,
                      int heads) {
  const int how = in.byte();
  fuzz::memory blob(pk::encoded_bytes(f, std::int64_t{heads} * pool.pages.tiles_per_page));
  if ((how & 1) != 0) {
    blob = in.rest();
  } else {
    fuzz::page_pool source(f, 1, heads, pool.pages.tiles_per_page, 0);
    const int edits = in.below(4);
    std::uint64_t edit[3];
    for (int i = 0; i < edits; ++i) edit[i] = in.bits(3);
    in.fill(source.keys), in.fill(source.values);
    fuzz::check(static_cast<bool>(pk::write_blob(f, id, source.pages, 0, blob.data(), blob.size())),
                "a blob is written");
    for (int i = 0; i < edits; ++i)  // half of them in the header
      blob[static_cast<std::int64_t>(edit[i] >> 9) % ((edit[i] & 256) != 0 ? blob.size() : field::end)] =
          static_cast<std::uint8_t>(edit[i]);
  }
  if ((how & 2) != 0 && blob.size() >= field::end)
    pk::detail::store_little(blob.data() + field::checksum,
                             pk::hash64(blob.data() + field::id_low, blob.size() - field::id_low));
  return blob;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::input in(data, size);
  const fuzz::format f = fuzz::any_format(in);
  const int kv_heads = in.few(2), tiles = in.few(2);
  fuzz::page_pool pool(f, 2, kv_heads, tiles, 16 * in.below(2), 0xee);
  const pk::head_range heads = {in.near(2), in.near(kv_heads + 1)};
  const std::int64_t page = in.near<std::int64_t>(2);
  const pk::blob_id id{1, 2, 3, in.byte()};
  const int count = heads.count >= 1 && heads.count <= kv_heads ? heads.count : 1;
  const fuzz::memory blob = any_blob(in, f, id, pool, count);

  const fuzz::memory keys = pool.keys, values = pool.values;
  const pk::status s = pk::read_blob(f, id, blob.data(), blob.size(), pool.pages, page, heads);
  fuzz::memory again(pk::encoded_bytes(f, std::int64_t{count} * tiles));
  if (!s) {
    fuzz::check(pool.keys == keys && pool.values == values, "a refused blob leaves the pages as they were");
    return 0;
  }
  fuzz::check(static_cast<bool>(pk::write_blob(f, id, pool.pages, page, heads, again.data(), again.size())),
              "the pages of an accepted blob can be written");
  fuzz::check(again == blob, "an accepted blob is written as it was read");
  fuzz::page_pool rest(f, 2, kv_heads, tiles,
                       static_cast<int>(pool.pages.key_head_stride - pk::key_page_bytes(f, tiles)), 0xee);
  pk::detail::for_each_part(f, pool.pages, page, heads, [](std::uint8_t* at, std::int64_t, std::int64_t bytes) {
    std::memset(at, 0xee, static_cast<std::size_t>(bytes));
  });
  fuzz::check(pool.keys == rest.keys && pool.values == rest.values, "a blob reaches its own tiles alone");
  return 0;
}
