// SPDX-License-Identifier: Apache-2.0
// Compressed caches for bench/decode.cu: random codes and plausible row scales written straight into the pages, in
// copies that take turns, with everything that a call of packkv::decode_attention needs. The call goes through the
// public API.
#pragma once

#include <numeric>
#include <random>

#include "timing.cuh"

/// Device memory, once all that was launched has ended.
template <class T>
std::vector<T> to_host(const T* data, std::int64_t count) {
  std::vector<T> host(static_cast<std::size_t>(count));
  require(cudaDeviceSynchronize());
  require(cudaMemcpy(host.data(), data, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

/// What is measured, beside the format.
struct decode_case {
  std::string name;
  int batch = 1, kv_heads = 8, group = 4, query_len = 1;
  std::int64_t tokens = 0;  ///< of every sequence; 0: lengths round(65536^((i / 63)^0.51)), i = 0..63
  std::vector<std::int32_t> given_lengths = {};  ///< instead of both

  std::vector<std::int32_t> lengths() const {
    if (!given_lengths.empty()) return given_lengths;
    std::vector<std::int32_t> all(static_cast<std::size_t>(batch), static_cast<std::int32_t>(tokens));
    for (int i = 0; i < batch && tokens == 0; ++i)
      all[static_cast<std::size_t>(i)] =
          static_cast<std::int32_t>(std::lround(std::pow(65536.0, std::pow(i / (batch - 1.0), 0.51))));
    return all;
  }
};

/// How a cache is stored. The transforms of the format are part of every figure.
enum class storage {
  bare,           ///< no sinks, no ring; a sequence's tiles lie side by side
  full,           ///< sinks 16, ring 64, pages of 64 tokens in random order through a dense table
  full_in_order,  ///< the same, pages in order
};
inline const char* name_of(storage s) {
  return s == storage::bare ? "bare" : s == storage::full ? "full" : "full_in_order";
}

namespace decode_cache_detail {

__device__ inline std::uint32_t scrambled(std::uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

/// Tile i at base + i * stride: random code bits, then numbers of 0.2 to 1.2, from byte `minima` on with a minus.
template <int Threads>
__global__ void fill_tiles(std::uint8_t* base, std::int64_t tiles, std::int64_t stride, int code_bytes, int minima,
                           int tile_bytes, std::uint32_t seed) {
  const int words = tile_bytes / 16;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * Threads + threadIdx.x; i < tiles * words;
       i += static_cast<std::int64_t>(gridDim.x) * Threads) {
    const int at = static_cast<int>(i % words) * 16;
    packkv::detail::bytes16 x;
    for (int k = 0; k < 4; ++k) {
      std::uint32_t bits = scrambled(static_cast<std::uint32_t>(4 * i + k) * 2654435761u + seed);
      if (at >= code_bytes) {
        const auto scale = [](std::uint32_t b) {
          return packkv::float_to_half(0.2f + static_cast<float>(b) / 65536.0f);
        };
        bits = scale(bits & 0xffffu) | static_cast<std::uint32_t>(scale(bits >> 16)) << 16;
        if (at >= minima) bits |= 0x80008000u;
      }
      x.word[k] = bits;
    }
    packkv::detail::store16(base + i / words * stride + at, x);
  }
}

/// A dense orthogonal matrix for each KV head, a reflection, if the format wants one: side_parameters::basis.
inline std::vector<float> random_bases(const packkv::codec_spec& spec, int kv_heads, unsigned seed) {
  std::vector<float> all;
  std::mt19937 random(seed);
  for (int h = 0; h < kv_heads && spec.transform == packkv::transform_kind::basis; ++h) {
    std::vector<double> axis;
    for (int c = 0; c < spec.head_dim; ++c) axis.push_back(static_cast<double>(random()) * 0x1p-31 - 1.0);
    const double norm = std::inner_product(axis.begin(), axis.end(), axis.begin(), 0.0);
    for (std::size_t i = 0; i < axis.size(); ++i)
      for (std::size_t c = 0; c < axis.size(); ++c)
        all.push_back(static_cast<float>((i == c ? 1.0 : 0.0) - 2.0 * axis[i] * axis[c] / norm));
  }
  return all;
}

}  // namespace decode_cache_detail

template <class Format>
class decode_cache {
 public:
  static_assert(Format::key_head_dim == Format::value_head_dim, "one head dim");
  static constexpr int dim = Format::key_head_dim;
  static constexpr int sink_tokens = 16, ring_window = 64;
  static constexpr int key_bytes = Format::key_tile_bytes, value_bytes = Format::value_tile_bytes;

  decode_cache(const decode_case& c, storage s, int copies_wanted = 0)
      : of(c),
        how(s),
        lengths(c.lengths()),
        tiles_of(tile_counts(lengths)),
        tiles(std::accumulate(tiles_of.begin(), tiles_of.end(), std::int64_t{0})),
        row_tiles(*std::max_element(tiles_of.begin(), tiles_of.end())),
        coded_bytes(tiles * c.kv_heads * (key_bytes + value_bytes)),
        raw_bytes(s == storage::bare ? 0 : 2 * (raw_values(sink_tokens) + raw_values(ring_capacity())) * 2),
        copy_bytes(coded_bytes + raw_bytes),
        copies(copies_wanted > 0 ? copies_wanted : timing::copies_for(copy_bytes, raw_bytes)),
        table(page_ids()),
        query_begin(query_begins()),
        pool_(copy_stride() * copies),
        table_(static_cast<std::int64_t>(table.size()) + 1),
        lengths_(c.batch),
        query_begin_(c.batch + 1),
        queries_(queries_count()),
        out_(queries_count()),
        bases_{decode_cache_detail::random_bases(Format::key(), c.kv_heads, 11),
               decode_cache_detail::random_bases(Format::value(), c.kv_heads, 12)},
        device_bases_{device_buffer<float>(static_cast<std::int64_t>(bases_[0].size()) + 1),
                      device_buffer<float>(static_cast<std::int64_t>(bases_[1].size()) + 1)},
        workspace_bytes_(
            packkv::decode_workspace_bytes<Format>({c.batch, c.kv_heads, heads(), c.query_len, longest(), 0})),
        workspace_(workspace_bytes_ + 256) {
    upload(table_, table);
    upload(lengths_, lengths);
    upload(query_begin_, query_begin);
    for (int i = 0; i < 2; ++i) {
      upload(device_bases_[i], bases_[i]);
      if (!bases_[i].empty()) (i == 0 ? parameters.key : parameters.value).basis = device_bases_[i].data();
    }
    random_cache_detail::fill_random<256><<<1024, 256>>>(queries_.data(), queries_count(), 777u);
    for (int i = 0; i < copies; ++i) fill(i);
    require(packkv::initialize_workspace(exec(nullptr)));
    require(cudaDeviceSynchronize());
  }

  std::int64_t heads() const { return std::int64_t{of.kv_heads} * of.group; }
  std::int32_t longest() const { return *std::max_element(lengths.begin(), lengths.end()); }
  std::int64_t tokens() const { return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0}); }
  std::int64_t values() const { return 2 * tokens() * of.kv_heads * dim; }  ///< K and V of all tokens
  std::int64_t queries_count() const { return std::int64_t{of.batch} * of.query_len * heads() * dim; }
  /// All copies together are a pool of such pages, too, of which a copy begins at one.
  std::int64_t page_bytes() const { return std::int64_t{of.kv_heads} * (key_bytes + value_bytes); }
  std::int64_t copy_stride() const { return (copy_bytes + page_bytes() - 1) / page_bytes() * page_bytes(); }
  int ring_capacity() const { return ring_window + of.query_len - 1; }
  const std::uint8_t* pool() const { return pool_.data(); }
  const std::uint16_t* queries() const { return queries_.data(); }
  const std::uint16_t* out() const { return out_.data(); }

  /// One launch on copy i; `settled`: exec::settled_cache.
  void decode(int i, cudaStream_t stream, bool settled = false) const {
    packkv::exec e = exec(stream);
    e.settled_cache = settled;
    require(packkv::decode_attention(query_view(), query_begin_.data(), view(i), parameters, output_view(out_.data()),
                                     {}, options(), e));
  }
  /// The same with the format chosen at run time from a family of compiled ones.
  template <class Family>
  void decode_by(int i, cudaStream_t stream) const {
    const packkv::parameters<typename Family::runtime_type> chosen{
        {parameters.format.key(), parameters.format.value()}, parameters.key, parameters.value};
    require(Family::decode_attention(query_view(), query_begin_.data(), view(i), chosen, output_view(out_.data()), {},
                                     options(), exec(stream)));
  }
  packkv::input_view<3> query_view() const {
    return packkv::make_input<3>(queries_.data(), packkv::dtype::float16, {of.batch * of.query_len, heads(), dim});
  }
  packkv::output_view<3> output_view(void* data) const {
    return packkv::make_output<3>(data, packkv::dtype::float16, {of.batch * of.query_len, heads(), dim});
  }
  packkv::attention_options options() const {
    packkv::attention_options o;
    o.softmax_scale = 1.0f / std::sqrt(static_cast<float>(dim));
    o.max_query_len = of.query_len;
    return o;
  }
  packkv::cache_view view(int i) const {
    return view(pool_.data() + copy_stride() * i, table_.data(), lengths_.data());
  }

  /// `parameters` with arrays of the host.
  packkv::parameters<Format> host_parameters() const {
    packkv::parameters<Format> p = parameters;
    if (!bases_[0].empty()) p.key.basis = bases_[0].data();
    if (!bases_[1].empty()) p.value.basis = bases_[1].data();
    return p;
  }
  /// The cache whose copy, table and lengths lie at these addresses, of the GPU or of the CPU.
  packkv::cache_view view(std::uint8_t* copy, const std::int32_t* page_table, const std::int32_t* seq_lens) const {
    packkv::cache_view c;
    c.batch = of.batch;
    c.max_seq_len = longest();
    c.seq_lens = seq_lens;
    c.pages.kv_heads = of.kv_heads;
    c.pages.key_data = copy;
    if (how == storage::bare) {  // one page for a sequence
      c.pages.value_data = copy + tiles * of.kv_heads * key_bytes;
      c.pages.tiles_per_page = static_cast<std::int32_t>(row_tiles);
      c.pages.num_pages = of.batch;
      c.pages.key_head_stride = row_tiles * key_bytes;
      c.pages.value_head_stride = row_tiles * value_bytes;
      c.table.row_stride = 1;
    } else {
      c.pages.value_data = copy + key_bytes;
      c.pages.num_pages = static_cast<std::int32_t>(tiles);
      c.pages.key_head_stride = c.pages.value_head_stride = key_bytes + value_bytes;
      c.table = {page_table, nullptr, row_tiles};
      std::uint16_t* raw = reinterpret_cast<std::uint16_t*>(copy + coded_bytes);
      const auto next = [&](int capacity) {
        const auto v = packkv::make_input<4>(raw, packkv::dtype::float16, {of.batch, of.kv_heads, capacity, dim});
        raw += raw_values(capacity);
        return v;
      };
      c.sinks.keys = next(sink_tokens);
      c.sinks.values = next(sink_tokens);
      c.ring.keys = next(ring_capacity());
      c.ring.values = next(ring_capacity());
      c.ring.window = ring_window;
    }
    c.pages.key_page_stride = of.kv_heads * c.pages.key_head_stride;
    c.pages.value_page_stride = of.kv_heads * c.pages.value_head_stride;
    return c;
  }

  const decode_case of;
  const storage how;
  const std::vector<std::int32_t> lengths;
  const std::vector<std::int64_t> tiles_of;  ///< by sequence
  const std::int64_t tiles, row_tiles, coded_bytes, raw_bytes, copy_bytes;
  const int copies;
  const std::vector<std::int32_t> table, query_begin;
  packkv::parameters<Format> parameters;

 private:
  static std::vector<std::int64_t> tile_counts(const std::vector<std::int32_t>& lengths) {
    std::vector<std::int64_t> counts;
    for (const std::int32_t n : lengths) counts.push_back((n + 63) / 64);
    return counts;
  }
  std::int64_t raw_values(int capacity) const { return std::int64_t{of.batch} * of.kv_heads * capacity * dim; }
  std::vector<std::int32_t> page_ids() const {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(tiles));
    std::iota(ids.begin(), ids.end(), 0);
    if (how == storage::full) std::shuffle(ids.begin(), ids.end(), std::mt19937(5));
    std::vector<std::int32_t> rows(static_cast<std::size_t>(of.batch * row_tiles), -1);
    auto next = ids.begin();
    for (int b = 0; b < of.batch; ++b) {
      const std::int64_t n = tiles_of[static_cast<std::size_t>(b)];
      std::copy(next, next + n, rows.begin() + b * row_tiles);
      next += n;
    }
    return rows;
  }
  std::vector<std::int32_t> query_begins() const {
    std::vector<std::int32_t> begins;
    for (int b = 0; b <= of.batch; ++b) begins.push_back(b * of.query_len);
    return begins;
  }
  packkv::exec exec(cudaStream_t stream) const {
    return {stream, workspace_.data(), static_cast<std::size_t>(workspace_bytes_), nullptr};
  }
  template <class T>
  static void upload(const device_buffer<T>& to, const std::vector<T>& from) {
    require(cudaMemcpy(to.data(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  void fill(int i) {
    using namespace decode_cache_detail;
    const packkv::cache_view c = view(i);
    const std::int64_t all = tiles * of.kv_heads;
    const bool bare = how == storage::bare;
    const auto side = [&](void* data, const packkv::codec_spec& spec, std::uint32_t seed) {
      const bool grouped = spec.kind == packkv::codec_kind::grouped;
      const int minima = grouped ? spec.minimum_offset(0) : spec.tile_bytes();
      fill_tiles<256><<<4096, 256>>>(static_cast<std::uint8_t*>(data), all,
                                     bare ? spec.tile_bytes() : key_bytes + value_bytes, spec.code_bytes(), minima,
                                     spec.tile_bytes(), seed + 2u * static_cast<unsigned>(i));
      require(cudaGetLastError());
    };
    side(c.pages.key_data, parameters.format.key(), 1u);
    side(c.pages.value_data, parameters.format.value(), 2u);
    if (raw_bytes == 0) return;
    random_cache_detail::fill_random<256>
        <<<256, 256>>>(reinterpret_cast<std::uint16_t*>(pool_.data() + copy_stride() * i + coded_bytes), raw_bytes / 2,
                       static_cast<unsigned>(i));
    require(cudaGetLastError());
  }

  device_buffer<std::uint8_t> pool_;
  device_buffer<std::int32_t> table_, lengths_, query_begin_;
  device_buffer<std::uint16_t> queries_, out_;
  std::vector<float> bases_[2];
  device_buffer<float> device_bases_[2];
  std::int64_t workspace_bytes_;
  device_buffer<std::uint8_t> workspace_;
};
