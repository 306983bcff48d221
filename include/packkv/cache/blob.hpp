// SPDX-License-Identifier: Apache-2.0
// Blobs: the tiles of some KV heads of one page as a self-describing, checksummed string of bytes (docs/format.md, 9).
// One idea: a blob names, in 128 bits, everything that decides how its bytes are read; a reader that expects anything
// else, or finds a bit changed, refuses before it touches a page. Host memory, no allocation, thread-safe.
//   std::vector<char> blob(packkv::encoded_bytes(format, heads * tiles_per_page));
//   packkv::status s = packkv::write_blob(format, id, pages, page, blob.data(), blob.size());
//   s = packkv::read_blob(format, id, blob.data(), blob.size(), pages, other_page);
#pragma once

#include <cstdint>
#include <cstring>
#include <packkv/codec/checks.hpp>

namespace packkv {

/// What a blob is of, as far as its tiles do not say. All of it enters the format id.
struct blob_id {
  std::uint64_t model = 0;       ///< the caller's name for the model and its weights, for instance a hash64 of them
  std::uint64_t parameters = 0;  ///< the caller's name for the format's parameters, or parameters_id(); 0: none
  std::int32_t layer = 0;
  std::int32_t head = 0;  ///< KV head of the model that the blob's first head is (tensor parallel shards)
};

/// KV heads first, first + 1, ... first + count - 1 of a pages_view.
struct head_range {
  std::int32_t first = 0;
  std::int32_t count = 0;
};

/// 128 bits that differ whenever bytes of a blob would be read differently.
struct format_id {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  friend constexpr bool operator==(const format_id& a, const format_id& b) {
    return a.low == b.low && a.high == b.high;
  }
  friend constexpr bool operator!=(const format_id& a, const format_id& b) { return !(a == b); }
};

namespace detail {

inline constexpr std::uint32_t blob_magic = 0x564b4b50u;  // "PKKV", little endian
inline constexpr std::uint32_t blob_version = 1;

/// Byte offsets of the header's fields; every field is little endian.
struct blob_field {
  static constexpr int magic = 0, version = 4, checksum = 8, id_low = 16, id_high = 24, payload_bytes = 32, heads = 40,
                       tiles_per_head = 44, key_tile_bytes = 48, value_tile_bytes = 52, reserved = 56, end = 64;
};
inline constexpr int blob_checked_from = blob_field::id_low;  // the checksum covers the bytes from here to the end

template <class Integer>
inline void store_little(std::uint8_t* p, Integer value) {
  for (unsigned i = 0; i < sizeof(Integer); ++i) p[i] = static_cast<std::uint8_t>(value >> (8 * i));
}
/// Spelled out, so that compilers make one load of it.
template <class Integer>
inline Integer load_little(const std::uint8_t* p) {
  static_assert(sizeof(Integer) == 4 || sizeof(Integer) == 8, "header fields have 4 or 8 bytes");
  if constexpr (sizeof(Integer) == 8) {
    return load_little<std::uint32_t>(p) | static_cast<Integer>(load_little<std::uint32_t>(p + 4)) << 32;
  } else {
    return Integer{p[0]} | Integer{p[1]} << 8 | Integer{p[2]} << 16 | Integer{p[3]} << 24;
  }
}

/// XXH64 of Yann Collet's "xxHash fast digest algorithm", specification 0.1.1.
class xxh64 {
 public:
  static std::uint64_t of(const std::uint8_t* p, std::int64_t bytes, std::uint64_t seed) {
    const std::uint8_t* const end = p + bytes;
    std::uint64_t h = seed + prime5;
    if (bytes >= 32) {
      std::uint64_t lane[4] = {seed + prime1 + prime2, seed + prime2, seed, seed - prime1};
      for (; end - p >= 32; p += 32)
        for (int i = 0; i < 4; ++i) lane[i] = round(lane[i], load_little<std::uint64_t>(p + 8 * i));
      h = rotate(lane[0], 1) + rotate(lane[1], 7) + rotate(lane[2], 12) + rotate(lane[3], 18);
      for (const std::uint64_t v : lane) h = (h ^ round(0, v)) * prime1 + prime4;
    }
    h += static_cast<std::uint64_t>(bytes);
    for (; end - p >= 8; p += 8) h = rotate(h ^ round(0, load_little<std::uint64_t>(p)), 27) * prime1 + prime4;
    for (; end - p >= 4; p += 4) h = rotate(h ^ (load_little<std::uint32_t>(p) * prime1), 23) * prime2 + prime3;
    for (; p != end; ++p) h = rotate(h ^ (*p * prime5), 11) * prime1;
    h = (h ^ (h >> 33)) * prime2;
    h = (h ^ (h >> 29)) * prime3;
    return h ^ (h >> 32);
  }

 private:
  static constexpr std::uint64_t prime1 = 0x9e3779b185ebca87u, prime2 = 0xc2b2ae3d27d4eb4fu,
                                 prime3 = 0x165667b19e3779f9u, prime4 = 0x85ebca77c2b2ae63u,
                                 prime5 = 0x27d4eb2f165667c5u;
  static std::uint64_t rotate(std::uint64_t x, int by) { return (x << by) | (x >> (64 - by)); }
  static std::uint64_t round(std::uint64_t lane, std::uint64_t input) {
    return rotate(lane + input * prime2, 31) * prime1;
  }
};

/// 40 bytes that describe one side: kind, transform, head dim, leading components or group size, strips and their
/// widths.
inline void describe_codec(const codec_spec& spec, std::uint8_t (&out)[40]) {
  std::memset(out, 0, sizeof out);
  out[0] = static_cast<std::uint8_t>(spec.kind);
  out[1] = static_cast<std::uint8_t>(spec.transform);
  store_little(out + 2, static_cast<std::uint16_t>(spec.head_dim));
  store_little(out + 4, static_cast<std::uint16_t>(spec.kind == codec_kind::grouped ? spec.group : spec.leading));
  if (!spec.has_codes()) return;
  store_little(out + 6, static_cast<std::uint16_t>(spec.strips.count));
  for (int i = 0; i < spec.strips.count; ++i) out[8 + i] = spec.strips.width[i];
}

/// Calls copy(tiles of one side of one head, their offset in the payload, their size) for every part of a payload.
template <class Format, class Copy>
inline void for_each_part(const Format& format, const pages_view& pages, std::int64_t page, head_range heads,
                          Copy&& copy) {
  const std::int64_t key_bytes = key_page_bytes(format, pages.tiles_per_page);
  const std::int64_t value_bytes = value_page_bytes(format, pages.tiles_per_page);
  for (std::int64_t i = 0; i < heads.count; ++i) {
    const int head = static_cast<int>(heads.first + i);
    const std::int64_t at = blob_field::end + i * (key_bytes + value_bytes);
    copy(key_tile(pages, format.key(), page, head, 0), at, key_bytes);
    copy(value_tile(pages, format.value(), page, head, 0), at + key_bytes, value_bytes);
  }
}

}  // namespace detail

/// Size of a blob of `tiles` pairs of a K tile and a V tile (heads x tiles_per_page); 0 if it does not fit 63 bits or
/// `tiles` is negative.
template <class Format>
constexpr std::int64_t encoded_bytes(const Format& format, std::int64_t tiles) {
  const checked pair = checked(format.key().tile_bytes()) + format.value().tile_bytes();
  return (pair * tiles + detail::blob_field::end).value();
}

/// XXH64 (seed 0) of some bytes: for ids of models and parameters made from names or files.
inline std::uint64_t hash64(const void* data, std::int64_t bytes, std::uint64_t seed = 0) {
  return detail::xxh64::of(static_cast<const std::uint8_t*>(data), bytes, seed);
}

/// A name for the parameters of all KV heads, for blob_id::parameters. Reads the arrays, so they are host memory.
template <class Format>
inline std::uint64_t parameters_id(const parameters<Format>& p, std::int32_t kv_heads) {
  std::uint64_t h = 1;
  const auto add = [&](const void* data, std::int64_t bytes) {
    h = data != nullptr ? hash64(data, bytes, h) : hash64(&h, 0, h);
  };
  const auto add_side = [&](const codec_spec& spec, const side_parameters& s) {
    const std::int64_t channels = static_cast<std::int64_t>(kv_heads) * spec.head_dim;
    const bool coded = spec.has_codes();
    add(spec.kind == codec_kind::plan ? s.column_scale : nullptr, channels * static_cast<std::int64_t>(sizeof(float)));
    add(spec.transform == transform_kind::permutation ? s.permutation : nullptr,
        channels * static_cast<std::int64_t>(sizeof(std::int16_t)));
    if (coded && s.channel_offset != nullptr)
      add(s.channel_offset, channels * static_cast<std::int64_t>(sizeof(float)));
    if (spec.transform == transform_kind::basis)
      add(s.basis, channels * spec.head_dim * static_cast<std::int64_t>(sizeof(float)));
    add(spec.leading > 0 ? s.leading_scale : nullptr,
        static_cast<std::int64_t>(kv_heads) * spec.leading * static_cast<std::int64_t>(sizeof(float)));
    add(spec.kind == codec_kind::fp8 ? &s.tensor_scale : nullptr, static_cast<std::int64_t>(sizeof(float)));
  };
  add_side(p.format.key(), p.key);
  add_side(p.format.value(), p.value);
  return h;
}

/// The 128-bit id that a blob of this format carries: a hash of both codecs and of `id` (docs/format.md, 9.2).
template <class Format>
inline format_id make_format_id(const Format& format, const blob_id& id) {
  std::uint8_t side_bytes[40], text[104];
  detail::describe_codec(format.key(), side_bytes);
  std::memcpy(text, side_bytes, 40);
  detail::describe_codec(format.value(), side_bytes);
  std::memcpy(text + 40, side_bytes, 40);
  detail::store_little(text + 80, id.model);
  detail::store_little(text + 88, id.parameters);
  detail::store_little(text + 96, static_cast<std::uint32_t>(id.layer));
  detail::store_little(text + 100, static_cast<std::uint32_t>(id.head));
  return {detail::xxh64::of(text, sizeof text, 0), detail::xxh64::of(text, sizeof text, 1)};
}

namespace detail {

template <class Format>
inline status check_blob(const Format& format, const pages_view& pages, std::int64_t page, head_range heads,
                         const void* blob, std::int64_t size) {
  if (const status s = check_format(format); !s) return s;
  if (const status s = check_pages(format, pages); !s) return s;
  if (page < 0 || page >= pages.num_pages)
    return refuse(status_code::invalid_argument, "a blob's page is not one of the pages", page);
  if (heads.first < 0 || heads.count <= 0 || heads.count > pages.kv_heads || heads.first > pages.kv_heads - heads.count)
    return refuse(status_code::invalid_argument, "a blob's heads are not among the KV heads of the pages", heads.first);
  if (encoded_bytes(format, static_cast<std::int64_t>(heads.count) * pages.tiles_per_page) == 0)
    return refuse(status_code::overflow, "a blob's size does not fit 63 bits");
  if (blob == nullptr || size < 0)
    return refuse(status_code::invalid_argument, "a blob buffer is null or its size negative");
  return {};
}

}  // namespace detail

/// Writes the tiles of `heads` of page `page` to out[0, encoded_bytes(format, heads.count * tiles_per_page)).
/// pages: host memory. out: any alignment, `capacity` bytes, not part of the pages.
template <class Format>
inline status write_blob(const Format& format, const blob_id& id, const pages_view& pages, std::int64_t page,
                         head_range heads, void* out, std::int64_t capacity) {
  using field = detail::blob_field;
  if (const status s = detail::check_blob(format, pages, page, heads, out, capacity); !s) return s;
  const std::int64_t size = encoded_bytes(format, static_cast<std::int64_t>(heads.count) * pages.tiles_per_page);
  if (capacity < size)
    return refuse(status_code::invalid_argument, "the buffer is smaller than encoded_bytes() of the blob", size);
  std::uint8_t* blob = static_cast<std::uint8_t*>(out);
  const format_id format_bits = make_format_id(format, id);
  detail::store_little(blob + field::magic, detail::blob_magic);
  detail::store_little(blob + field::version, detail::blob_version);
  detail::store_little(blob + field::id_low, format_bits.low);
  detail::store_little(blob + field::id_high, format_bits.high);
  detail::store_little(blob + field::payload_bytes, static_cast<std::uint64_t>(size - field::end));
  detail::store_little(blob + field::heads, static_cast<std::uint32_t>(heads.count));
  detail::store_little(blob + field::tiles_per_head, static_cast<std::uint32_t>(pages.tiles_per_page));
  detail::store_little(blob + field::key_tile_bytes, static_cast<std::uint32_t>(format.key().tile_bytes()));
  detail::store_little(blob + field::value_tile_bytes, static_cast<std::uint32_t>(format.value().tile_bytes()));
  detail::store_little(blob + field::reserved, std::uint64_t{0});
  detail::for_each_part(format, pages, page, heads,
                        [&](const std::uint8_t* tiles, std::int64_t at, std::int64_t bytes) {
                          std::memcpy(blob + at, tiles, static_cast<std::size_t>(bytes));
                        });
  detail::store_little(blob + field::checksum,
                       detail::xxh64::of(blob + detail::blob_checked_from, size - detail::blob_checked_from, 0));
  return {};
}

/// Reads a blob of exactly `size` bytes into `heads` of page `page`. Everything in it is checked before a byte of the
/// pages changes; whatever is not the blob that write_blob makes for these arguments is status_code::corrupt.
template <class Format>
inline status read_blob(const Format& format, const blob_id& id, const void* in, std::int64_t size,
                        const pages_view& pages, std::int64_t page, head_range heads) {
  using field = detail::blob_field;
  if (const status s = detail::check_blob(format, pages, page, heads, in, size); !s) return s;
  const std::uint8_t* blob = static_cast<const std::uint8_t*>(in);
  const auto corrupt = [](const char* message, std::uint64_t number = 0) {
    return refuse(status_code::corrupt, message, static_cast<std::int64_t>(number));
  };
  const auto word = [&](int at) { return detail::load_little<std::uint32_t>(blob + at); };
  const auto wide = [&](int at) { return detail::load_little<std::uint64_t>(blob + at); };
  const std::int64_t expected = encoded_bytes(format, static_cast<std::int64_t>(heads.count) * pages.tiles_per_page);

  if (size < field::end) return corrupt("a blob is shorter than its header", static_cast<std::uint64_t>(size));
  if (word(field::magic) != detail::blob_magic) return corrupt("a blob does not begin with PKKV");
  if (word(field::version) != detail::blob_version)
    return corrupt("a blob of an unknown version", word(field::version));
  if (format_id{wide(field::id_low), wide(field::id_high)} != make_format_id(format, id))
    return corrupt("a blob of another format, model, layer, head or set of parameters");
  if (word(field::heads) != static_cast<std::uint32_t>(heads.count))
    return corrupt("a blob of another number of KV heads", word(field::heads));
  if (word(field::tiles_per_head) != static_cast<std::uint32_t>(pages.tiles_per_page))
    return corrupt("a blob of another page size", word(field::tiles_per_head));
  if (word(field::key_tile_bytes) != static_cast<std::uint32_t>(format.key().tile_bytes()) ||
      word(field::value_tile_bytes) != static_cast<std::uint32_t>(format.value().tile_bytes()) ||
      wide(field::reserved) != 0)
    return corrupt("a blob's header contradicts its format");
  if (wide(field::payload_bytes) != static_cast<std::uint64_t>(expected - field::end))
    return corrupt("a blob's header gives a wrong payload size", wide(field::payload_bytes));
  if (size != expected)
    return corrupt("a blob is truncated or has bytes behind its end", static_cast<std::uint64_t>(size));
  if (wide(field::checksum) != detail::xxh64::of(blob + detail::blob_checked_from, size - detail::blob_checked_from, 0))
    return corrupt("a blob's checksum is wrong");

  detail::for_each_part(format, pages, page, heads, [&](std::uint8_t* tiles, std::int64_t at, std::int64_t bytes) {
    std::memcpy(tiles, blob + at, static_cast<std::size_t>(bytes));
  });
  return {};
}

/// The same for all KV heads of the page.
template <class Format>
inline status write_blob(const Format& format, const blob_id& id, const pages_view& pages, std::int64_t page, void* out,
                         std::int64_t capacity) {
  return write_blob(format, id, pages, page, head_range{0, pages.kv_heads}, out, capacity);
}
/// The same for all KV heads of the page.
template <class Format>
inline status read_blob(const Format& format, const blob_id& id, const void* in, std::int64_t size,
                        const pages_view& pages, std::int64_t page) {
  return read_blob(format, id, in, size, pages, page, head_range{0, pages.kv_heads});
}

}  // namespace packkv
