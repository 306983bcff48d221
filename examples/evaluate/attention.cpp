// SPDX-License-Identifier: Apache-2.0
// Streaming attention: tiles of 64 tokens, blocks of queries, a fixed partition of the tokens into chunks.
#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <packkv/reference/tile.hpp>

#include "parallel.hpp"
#include "vector_math.hpp"

namespace evaluate {
namespace {

using packkv::tile_tokens;

constexpr int block_rows = 128;     // queries that share the decoding of a tile; bounds the memory of partial results
constexpr int min_chunk_tiles = 8;  // tokens of a task: at least 512, so that threads start for something
constexpr int max_chunks = 64;

/// A tile's elements in double, and the same after encoding and decoding.
struct tile_data {
  std::vector<double> exact, coded;
};

/// One worker's memory.
struct worker_data {
  tile_data key, value;
  std::vector<std::uint32_t> scratch;
};

/// Softmax statistics and unnormalised outputs of some rows: two softmaxes (exact and coded scores), four outputs.
struct partial_sums {
  std::vector<double> maximum[2], total[2], output[output_kinds];

  void reset(int rows, int value_dim, bool coded) {
    for (int s = 0; s < (coded ? 2 : 1); ++s) {
      maximum[s].assign(static_cast<std::size_t>(rows), -INFINITY);
      total[s].assign(static_cast<std::size_t>(rows), 0.0);
    }
    for (int k = 0; k < (coded ? 4 : 1); ++k)
      output[k].assign(static_cast<std::size_t>(rows) * static_cast<std::size_t>(value_dim), 0.0);
  }
};

/// Which scores weigh the values of an output.
constexpr int softmax_of(int kind) { return kind == key_output || kind == both_output ? 1 : 0; }

void encode_tile(const coded_side& side, const float* x, int count, int head, std::uint8_t* bytes,
                 packkv::device_report& report) {
  const packkv::detail::head_parameters p = packkv::detail::of_head(side.spec, side.parameters(), head);
  std::fill_n(bytes, side.spec.tile_bytes(), std::uint8_t{0});
  for (int t = 0; t < count; ++t)
    packkv::reference::encode_token(side.spec, p, x + t * side.spec.head_dim, t, bytes, report);
}

/// Elements of `count` tokens from `first` on, as floats.
void load_tokens(const npy_array& a, int head, std::int64_t first, int count, float* x) {
  const std::uint16_t* from = a.row(head, first);
  for (std::int64_t i = 0; i < count * a.extent(2); ++i) x[i] = packkv::half_to_float(from[i]);
}

void load_tile(const npy_array& a, packkv::side which, const tile_source* coded, int head, std::int64_t first,
               int count, std::vector<std::uint32_t>& scratch, tile_data& tile) {
  const int dim = static_cast<int>(a.extent(2));
  const std::size_t elements = static_cast<std::size_t>(tile_tokens) * static_cast<std::size_t>(dim);
  tile.exact.resize(elements);
  std::vector<float> x(elements);
  load_tokens(a, head, first, count, x.data());
  std::copy(x.begin(), x.end(), tile.exact.begin());
  if (coded == nullptr) return;
  tile.coded.resize(elements);
  coded->code(which, head, first, count, scratch, x.data());
  std::copy_n(x.begin(), count * dim, tile.coded.begin());
}

/// Everything about one block of queries that its tasks share.
struct block_job {
  const kv_cache& cache;
  const tile_source* coded;
  const attention_rules& rules;
  int kv_head;
  std::int64_t first_row;
  int rows;
  std::vector<double> queries;  ///< [rows][key_dim]

  std::int64_t position(int row) const { return cache.tokens() - cache.queries() + (first_row + row) / cache.group(); }
  std::int64_t first_visible(int row) const {
    return rules.window > 0 ? std::max<std::int64_t>(0, position(row) - rules.window + 1) : 0;
  }
  bool raw(std::int64_t token, int row) const {
    return token < rules.sinks || (rules.recent > 0 && token > position(row) - rules.recent);
  }
};

void load_queries(block_job& job) {
  const int dim = job.cache.key_dim(), group = job.cache.group();
  job.queries.resize(static_cast<std::size_t>(job.rows) * static_cast<std::size_t>(dim));
  for (int r = 0; r < job.rows; ++r) {
    const std::int64_t row = job.first_row + r;
    const std::uint16_t* q = job.cache.q.row(job.kv_head * static_cast<std::int64_t>(group) + row % group, row / group);
    for (int c = 0; c < dim; ++c)
      job.queries[static_cast<std::size_t>(r) * static_cast<std::size_t>(dim) + static_cast<std::size_t>(c)] =
          packkv::half_to_float(q[c]);
  }
}

/// Turns scores into weights relative to the running maximum; returns the factor for what was summed before.
double to_weights(double* scores, int count, double& maximum, double& total) {
  double m = maximum;
  for (int i = 0; i < count; ++i) m = std::max(m, scores[i]);
  const double keep = maximum == m ? 1.0 : std::exp(maximum - m);
  double sum = 0.0;
  for (int i = 0; i < count; ++i) sum += scores[i] = std::exp(scores[i] - m);
  maximum = m;
  total = total * keep + sum;
  return keep;
}

/// Adds one tile to one row's sums.
void add_tile(const block_job& job, const worker_data& tile, std::int64_t first, int count, int r, partial_sums& sums) {
  const std::int64_t begin = std::max(first, job.first_visible(r)), end = std::min(first + count, job.position(r) + 1);
  if (begin >= end) return;
  const int key_dim = job.cache.key_dim(), value_dim = job.cache.value_dim(), visible = static_cast<int>(end - begin);
  const double* query = job.queries.data() + static_cast<std::int64_t>(r) * key_dim;
  const double scale = static_cast<double>(job.rules.scale);
  double weights[2][tile_tokens];
  const double* values[2][tile_tokens];  // exact, and as an attention on the coded cache sees them
  for (int i = 0; i < visible; ++i) {
    const std::int64_t slot = begin - first + i;
    const bool raw = job.raw(begin + i, r);
    weights[0][i] = scale * dot(query, tile.key.exact.data() + slot * key_dim, key_dim);
    values[0][i] = tile.value.exact.data() + slot * value_dim;
    if (job.coded == nullptr) continue;
    weights[1][i] = raw ? weights[0][i] : scale * dot(query, tile.key.coded.data() + slot * key_dim, key_dim);
    values[1][i] = raw ? values[0][i] : tile.value.coded.data() + slot * value_dim;
  }
  double keep[2] = {};
  for (int s = 0; s < (job.coded != nullptr ? 2 : 1); ++s)
    keep[s] = to_weights(weights[s], visible, sums.maximum[s][static_cast<std::size_t>(r)],
                         sums.total[s][static_cast<std::size_t>(r)]);
  for (int kind = 0; kind < (job.coded != nullptr ? 4 : 1); ++kind) {
    double* out = sums.output[kind].data() + static_cast<std::int64_t>(r) * value_dim;
    const int s = softmax_of(kind);
    if (keep[s] != 1.0)
      for (int c = 0; c < value_dim; ++c) out[c] *= keep[s];
    add_weighted(values[kind == value_output || kind == both_output ? 1 : 0], weights[s], visible, out, value_dim);
  }
}

void add_tiles(const block_job& job, std::int64_t first_tile, std::int64_t end_tile, worker_data& worker,
               partial_sums& sums, progress& line) {
  const kv_cache& cache = job.cache;
  for (std::int64_t tile = first_tile; tile < end_tile; ++tile) {
    const std::int64_t first = tile * tile_tokens;
    const int count = static_cast<int>(std::min<std::int64_t>(tile_tokens, cache.tokens() - first));
    load_tile(cache.k, packkv::side::key, job.coded, job.kv_head, first, count, worker.scratch, worker.key);
    load_tile(cache.v, packkv::side::value, job.coded, job.kv_head, first, count, worker.scratch, worker.value);
    for (int r = 0; r < job.rows; ++r) add_tile(job, worker, first, count, r, sums);
    line.advance(1);
  }
}

/// Adds the chunks in their order and normalises.
void merge_chunks(const std::vector<partial_sums>& chunks, bool coded, attention_block& block) {
  block.outputs.assign(static_cast<std::size_t>(coded ? 4 : 1) * static_cast<std::size_t>(block.rows) *
                           static_cast<std::size_t>(block.value_dim),
                       0.0);
  for (int kind = 0; kind < (coded ? 4 : 1); ++kind)
    for (int r = 0; r < block.rows; ++r) {
      const int s = softmax_of(kind);
      const std::size_t row = static_cast<std::size_t>(r);
      double* out = block.outputs.data() + (static_cast<std::int64_t>(kind) * block.rows + r) * block.value_dim;
      double maximum = -INFINITY, total = 0.0;
      for (const partial_sums& chunk : chunks) maximum = std::max(maximum, chunk.maximum[s][row]);
      for (const partial_sums& chunk : chunks) {
        if (chunk.total[s][row] == 0.0) continue;
        const double weight = std::exp(chunk.maximum[s][row] - maximum);
        const double* in = chunk.output[kind].data() + static_cast<std::int64_t>(r) * block.value_dim;
        total += weight * chunk.total[s][row];
        for (int c = 0; c < block.value_dim; ++c) out[c] += weight * in[c];
      }
      for (int c = 0; c < block.value_dim; ++c) out[c] /= total;
    }
}

}  // namespace

void tile_codec::code(packkv::side which, int head, std::int64_t, int count, std::vector<std::uint32_t>& scratch,
                      float* x) const {
  const coded_side& s = which == packkv::side::key ? codec_.key : codec_.value;
  scratch.resize(static_cast<std::size_t>(s.spec.tile_bytes()) / 4);
  std::uint8_t* const bytes = reinterpret_cast<std::uint8_t*>(scratch.data());
  packkv::device_report ignored;
  encode_tile(s, x, count, head, bytes, ignored);
  const packkv::detail::head_parameters p = packkv::detail::of_head(s.spec, s.parameters(), head);
  for (int t = 0; t < count; ++t) packkv::reference::decode_token(s.spec, p, bytes, t, x + t * s.spec.head_dim);
}

void decoded_tiles::code(packkv::side which, int head, std::int64_t first, int count, std::vector<std::uint32_t>&,
                         float* x) const {
  const bool key = which == packkv::side::key;
  const std::int64_t dim = key ? cache_.key_dim() : cache_.value_dim();
  const std::int64_t coded = std::clamp<std::int64_t>(coded_.tokens - first, 0, count);
  std::copy_n((key ? coded_.k : coded_.v).data() + (head * coded_.tokens + first) * dim * (coded > 0), coded * dim, x);
}

void stream_attention(const kv_cache& cache, const tile_source* coded, const attention_rules& rules, int threads,
                      progress& line, const block_sink& sink) {
  const std::int64_t head_rows = cache.queries() * cache.group();
  std::vector<worker_data> workers(static_cast<std::size_t>(threads));
  std::vector<partial_sums> chunks;
  line.expect(cache.kv_heads() * packkv::ceil_div<std::int64_t>(head_rows, block_rows) *
              packkv::ceil_div<std::int64_t>(cache.tokens(), tile_tokens));  // an upper bound: windows need fewer
  for (int head = 0; head < cache.kv_heads(); ++head)
    for (std::int64_t first_row = 0; first_row < head_rows; first_row += block_rows) {
      const int rows = static_cast<int>(std::min<std::int64_t>(block_rows, head_rows - first_row));
      block_job job{cache, coded, rules, head, first_row, rows, {}};
      load_queries(job);
      const std::int64_t first_tile = job.first_visible(0) / tile_tokens,
                         end_tile = job.position(rows - 1) / tile_tokens + 1;
      const std::int64_t tiles = end_tile - first_tile;
      const int count = static_cast<int>(std::clamp<std::int64_t>(tiles / min_chunk_tiles, 1, max_chunks));
      chunks.resize(static_cast<std::size_t>(count));
      for (partial_sums& chunk : chunks) chunk.reset(rows, cache.value_dim(), coded != nullptr);
      parallel_for(count, threads, [&](int i, int worker) {
        add_tiles(job, first_tile + tiles * i / count, first_tile + tiles * (i + 1) / count,
                  workers[static_cast<std::size_t>(worker)], chunks[static_cast<std::size_t>(i)], line);
      });
      attention_block block{head, first_row, rows, cache.value_dim(), {}};
      merge_chunks(chunks, coded != nullptr, block);
      sink(block);
    }
}

coding_report encode_all(const kv_cache& cache, const coding& codec, int threads) {
  const std::int64_t tiles = packkv::ceil_div<std::int64_t>(cache.tokens(), tile_tokens);
  const int chunks = static_cast<int>(std::min<std::int64_t>(tiles, max_chunks));
  std::vector<coding_report> reports(static_cast<std::size_t>(chunks));
  parallel_for(chunks, threads, [&](int i, int) {
    coding_report& total = reports[static_cast<std::size_t>(i)];
    std::vector<float> x(static_cast<std::size_t>(tile_tokens) *
                         static_cast<std::size_t>(std::max(cache.key_dim(), cache.value_dim())));
    std::vector<std::uint32_t> bytes(
        static_cast<std::size_t>(std::max(codec.key.spec.tile_bytes(), codec.value.spec.tile_bytes())) / 4);
    for (std::int64_t tile = tiles * i / chunks; tile < tiles * (i + 1) / chunks; ++tile) {
      const std::int64_t first = tile * tile_tokens;
      const int count = static_cast<int>(std::min<std::int64_t>(tile_tokens, cache.tokens() - first));
      for (int head = 0; head < cache.kv_heads(); ++head)
        for (const bool is_key : {true, false}) {
          packkv::device_report report;
          load_tokens(is_key ? cache.k : cache.v, head, first, count, x.data());
          encode_tile(is_key ? codec.key : codec.value, x.data(), count, head,
                      reinterpret_cast<std::uint8_t*>(bytes.data()), report);
          total.leading_clamps += report.leading_clamps;
          total.flags |= report.flags;
        }
    }
  });
  coding_report sum;
  for (const coding_report& r : reports) sum.leading_clamps += r.leading_clamps, sum.flags |= r.flags;
  return sum;
}

}  // namespace evaluate
