// SPDX-License-Identifier: Apache-2.0
// Encodes a cache to packs, decodes the packs, puts the tokens back into their order.
#include "packs.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <packkv/reference/packs.hpp>

#include "text.hpp"

namespace evaluate {
namespace {

using packkv::pack_granularity;
using packkv::pack_zero;
using packkv::side;
using packkv::tile_tokens;
using packkv::token_order;

constexpr named<pack_granularity> granularities[] = {{"token", pack_granularity::token},
                                                     {"vector", pack_granularity::vector},
                                                     {"channel", pack_granularity::channel},
                                                     {"block", pack_granularity::block}};
constexpr named<pack_zero> zeros[] = {{"int", pack_zero::integer}, {"float", pack_zero::floating}};
constexpr named<token_order> orders[] = {
    {"none", token_order::none}, {"median", token_order::median}, {"greedy", token_order::greedy}};

bool parse_step(const std::string& text, float& step) { return parse_positive(text, step) && step <= 1.0f; }

struct free_memory {
  void operator()(void* p) const { std::free(p); }
};

/// Memory for the packs of one side.
struct side_memory {
  std::vector<packkv::pack_range> ranges;
  std::vector<std::int64_t> offsets;
  std::unique_ptr<std::uint8_t, free_memory> data;
  std::int64_t capacity = 0;

  side_memory(const packkv::pack_format& f, side which, std::int64_t blocks)
      : ranges(static_cast<std::size_t>(blocks * f.batch * packkv::range_count(f, which))),
        offsets(static_cast<std::size_t>(packkv::tile_count(f, blocks)) + 1),
        capacity(packkv::max_pack_bytes(f, which, blocks)) {
    data.reset(static_cast<std::uint8_t*>(
        std::aligned_alloc(16, static_cast<std::size_t>(std::max<std::int64_t>(capacity, 16)))));
    if (data == nullptr) throw std::bad_alloc();
  }
  packkv::pack_side write() { return {ranges.data(), offsets.data(), data.get(), capacity}; }
  packkv::const_pack_side read() const { return {ranges.data(), offsets.data(), data.get(), offsets.back()}; }
};

packkv::input_view<4> batch_of_one(const npy_array& a) {
  return packkv::make_input<4>(a.data(), packkv::dtype::float16, {1, a.extent(0), a.extent(1), a.extent(2)});
}

packkv::output_view<4> floats(std::vector<float>& x, const npy_array& a, std::int64_t tokens) {
  x.resize(static_cast<std::size_t>(a.extent(0) * tokens * a.extent(2)));
  return packkv::make_output<4>(x.data(), packkv::dtype::float32, {1, a.extent(0), tokens, a.extent(2)});
}

/// Moves the tokens of every block from their slots to their places. x: [heads, tokens, dim].
void restore_order(const std::vector<std::uint8_t>& order, std::int64_t heads, std::int64_t dim,
                   std::vector<float>& x) {
  const std::int64_t tokens = static_cast<std::int64_t>(order.size());
  std::vector<float> block(static_cast<std::size_t>(tile_tokens * dim));
  for (std::int64_t first = 0; first < heads * tokens; first += tile_tokens) {
    float* const at = x.data() + first * dim;
    std::copy_n(at, tile_tokens * dim, block.data());
    for (int slot = 0; slot < tile_tokens; ++slot)
      std::copy_n(block.data() + slot * dim, dim, at + order[static_cast<std::size_t>(first % tokens + slot)] * dim);
  }
}

/// Counts symbols 0..255 in several classes.
class symbol_counts {
 public:
  explicit symbol_counts(int classes) : counts_(static_cast<std::size_t>(classes) * symbols) {}
  void add(int of_class, int symbol) { ++counts_[static_cast<std::size_t>(of_class) * symbols + symbol]; }
  /// Bits a symbol needs, on average, from a coder that knows its class and how often the class has each symbol.
  double entropy() const {
    double bits = 0.0, all = 0.0;
    for (auto first = counts_.begin(); first != counts_.end(); first += symbols) {
      double sum = 0.0;
      for (auto n = first; n != first + symbols; ++n) {
        sum += static_cast<double>(*n);
        if (*n > 0) bits -= static_cast<double>(*n) * std::log2(static_cast<double>(*n));
      }
      if (sum > 0.0) bits += sum * std::log2(sum);
      all += sum;
    }
    return all > 0.0 ? bits / all : 16.0;
  }

 private:
  static constexpr int symbols = 256;
  std::vector<std::int64_t> counts_;
};

/// Entropy of the codes of a channel of a head, and of the fields of packs (code - minimum) of one width at one place.
void add_entropies(const packkv::pack_format& f, side which, const packkv::const_pack_side& packs, std::int64_t blocks,
                   const std::string& suffix, coded_cache& out) {
  const int dim = f.codec(which).head_dim, size = f.pack_size;
  symbol_counts codes(f.kv_heads * dim), fields(9 * size);
  std::vector<std::uint8_t> tile(static_cast<std::size_t>(tile_tokens * dim));
  for (std::int64_t i = 0; i < blocks * f.kv_heads; ++i) {
    packkv::reference::decode_pack_tile(size, dim, packs.data + packs.offsets[i], tile.data());
    const int head = static_cast<int>(i % f.kv_heads);
    for (int c = 0; c < dim; ++c)
      for (int first = 0; first < tile_tokens; first += size) {
        const auto code = [&](int j) { return int{tile[static_cast<std::size_t>((first + j) * dim + c)]}; };
        int low = 255, high = 0;
        for (int j = 0; j < size; ++j) {
          low = std::min(low, code(j));
          high = std::max(high, code(j));
        }
        const int width = packkv::bit_length(static_cast<std::uint32_t>(high - low));
        for (int j = 0; j < size; ++j) {
          codes.add(head * dim + c, code(j));
          fields.add(width * size + j, code(j) - low);
        }
      }
  }
  out.figures.emplace_back("packkv_entropy_bits_" + suffix, codes.entropy());
  out.figures.emplace_back("packkv_field_entropy_bits_" + suffix, fields.entropy());
}

outcome encode(const packkv::pack_format& f, const kv_cache& cache, coded_cache& out) {
  const std::int64_t blocks = packkv::coded_blocks(cache.tokens());
  side_memory key(f, side::key, blocks), value(f, side::value, blocks);
  std::vector<std::uint8_t> order(static_cast<std::size_t>(blocks * tile_tokens));
  packkv::pack_report report;
  if (const packkv::status s = packkv::reference::compress(f, batch_of_one(cache.k), batch_of_one(cache.v), blocks,
                                                           key.write(), value.write(), order.data(), report);
      !s)
    return failure(s.message);
  out = {};
  out.tokens = blocks * tile_tokens;
  const packkv::output_view<4> k = floats(out.k, cache.k, out.tokens), v = floats(out.v, cache.v, out.tokens);
  if (const packkv::status s = packkv::reference::decompress(f, {key.read(), value.read(), blocks}, k, v); !s)
    return failure(s.message);
  restore_order(order, cache.kv_heads(), cache.key_dim(), out.k);
  restore_order(order, cache.kv_heads(), cache.value_dim(), out.v);
  // A cache too short for a block is 16-bit and has no packs.
  out.key_bytes = blocks > 0 ? packkv::stored_bytes(f, side::key, blocks, report.key.tile_bytes) : 0;
  out.value_bytes = blocks > 0 ? packkv::stored_bytes(f, side::value, blocks, report.value.tile_bytes) : 0;
  out.order_bytes = f.order == token_order::none ? 0 : blocks * tile_tokens;  // a byte a token, for all heads
  out.figures = {{"packkv_payload_bits_k", blocks > 0 ? report.key.payload_bits_per_value() : 16.0},
                 {"packkv_payload_bits_v", blocks > 0 ? report.value.payload_bits_per_value() : 16.0},
                 {"packkv_published_ratio_k", report.key.published_ratio()},
                 {"packkv_published_ratio_v", report.value.published_ratio()}};
  add_entropies(f, side::key, key.read(), blocks, "k", out);
  add_entropies(f, side::value, value.read(), blocks, "v", out);
  return {};
}

}  // namespace

bool parse_zero(const std::string& text, pack_zero& zero) { return parse_name(zeros, text, zero); }

bool parse_pack_value(const std::string& key, const std::string& value, pack_choice& c) {
  if (key == "quant") return parse_name(granularities, value, c.granularity);
  if (key == "quant_k") return c.key_given = parse_name(granularities, value, c.format.key.granularity);
  if (key == "quant_v") return c.value_given = parse_name(granularities, value, c.format.value.granularity);
  if (key == "r") return parse_step(value, c.step);
  if (key == "r_k") return parse_step(value, c.key_step);
  if (key == "r_v") return parse_step(value, c.value_step);
  if (key == "order") return parse_name(orders, value, c.format.order);
  if (key == "zero") {
    const bool good = parse_zero(value, c.format.key.zero);
    c.format.value.zero = c.format.key.zero;
    return good;
  }
  std::int32_t size = 0;
  if (!parse_count(value, size) || (size != 2 && size != 4 && size != 8 && size != 16 && size != 32)) return false;
  c.format.pack_size = size;
  return true;
}

std::string finish_packs(const std::set<std::string>& given, pack_choice& c) {
  for (const std::string name : {"r", "quant"})
    if (given.count(name) + given.count(name + "_k") + given.count(name + "_v") == 3)
      return name + " says nothing beside " + name + "_k and " + name + "_v";
  c.format.key.relative_step = c.key_step > 0.0f ? c.key_step : c.step;
  c.format.value.relative_step = c.value_step > 0.0f ? c.value_step : c.step;
  if (!c.key_given) c.format.key.granularity = c.granularity;
  if (!c.value_given) c.format.value.granularity = c.granularity;
  return {};
}

outcome make_pack_coder(const pack_choice& choice, const kv_cache& cache, whole_cache_codec& coder) {
  packkv::pack_format f = choice.format;
  f.kv_heads = cache.kv_heads();
  f.key.head_dim = static_cast<std::int16_t>(cache.key_dim());
  f.value.head_dim = static_cast<std::int16_t>(cache.value_dim());
  if (const packkv::status s = packkv::check_format(f); !s) return failure(s.message);
  coder.code = [f](const kv_cache& c, coded_cache& out) { return encode(f, c, out); };
  coder.attend_on_gpu = [f](const gpu_sequence_job& job, std::vector<float>& out, packkv::device_report& report) {
    return gpu_attention(job, f, out, report);
  };
  return {};
}

}  // namespace evaluate
