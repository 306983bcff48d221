// SPDX-License-Identifier: Apache-2.0
// Settles the numerical rules of DESIGN.md section 4 on real caches and real tensor cores: attention over the same codes
// in fp64 on the CPU, and on the GPU with every rounding that the in-place scheme would make, one rule at a time.
//   numerics [--cpu-only] [--k-norm=std|centred|rms] K.npy V.npy Q.npy SCALE LABEL [K V Q SCALE LABEL ...]
// Not a benchmark: codes lie one per byte in global memory, only the *numbers* are those of the in-place scheme.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#define CUDA_CHECK(call)                                                                                     \
  do {                                                                                                       \
    cudaError_t status_ = (call);                                                                            \
    if (status_ != cudaSuccess) {                                                                            \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status_));       \
      std::exit(1);                                                                                          \
    }                                                                                                        \
  } while (0)

constexpr int tile_tokens = 64, queries = 16, max_fold = 7, max_q_int = 32639;
constexpr float lazy_threshold = 8.f;  // in log2: the operand may grow to 2^8 x fold 2^7 = 2^15 before a rescale
constexpr float step_of_width[5] = {0.f, 1.596f, 0.996f, 0.586f, 0.335f};  // optimal uniform Gaussian steps

// ---------------------------------------------------------------------------------------------------- the variants
enum class key_path { exact_fp32, fp16_query, int16_fold, int16_shift };
enum class mid_source { exact_query, rounded_query, rounded_integer };  // rounded_integer: subtracted before fp32
enum class value_path { exact_fp32, fp16_operand };
enum class max_rule { score, score_plus_row, relative_row };

struct variant {
  const char* name;
  key_path key;
  mid_source mid;
  value_path value;
  max_rule rule;
  bool rounded_sums;  // zero term and denominator from the fp16 operand instead of from fp32
};

using kp = key_path;
using ms = mid_source;
using vp = value_path;
using mr = max_rule;
static const variant variants[] = {
    {"base  K exact, V exact", kp::exact_fp32, ms::exact_query, vp::exact_fp32, mr::score, false},
    {"K     fp16 q, exact mid", kp::fp16_query, ms::exact_query, vp::exact_fp32, mr::score, false},
    {"K     fp16 q, rounded mid", kp::fp16_query, ms::rounded_query, vp::exact_fp32, mr::score, false},
    {"K     fold, exact mid", kp::int16_fold, ms::exact_query, vp::exact_fp32, mr::score, false},
    {"K     fold, rounded mid", kp::int16_fold, ms::rounded_query, vp::exact_fp32, mr::score, false},
    {"K     shift, exact mid", kp::int16_shift, ms::exact_query, vp::exact_fp32, mr::score, false},
    {"K     shift, rounded mid", kp::int16_shift, ms::rounded_query, vp::exact_fp32, mr::score, false},
    {"K     shift, integer mid", kp::int16_shift, ms::rounded_integer, vp::exact_fp32, mr::score, false},
    {"V (a) max s, unrounded", kp::exact_fp32, ms::exact_query, vp::fp16_operand, mr::score, false},
    {"V (a')max s, rounded", kp::exact_fp32, ms::exact_query, vp::fp16_operand, mr::score, true},
    {"V (b) max s+log2 row, unr.", kp::exact_fp32, ms::exact_query, vp::fp16_operand, mr::score_plus_row, false},
    {"V (c) max s+log2 row, rnd.", kp::exact_fp32, ms::exact_query, vp::fp16_operand, mr::score_plus_row, true},
    {"V (d) relative row, rounded", kp::exact_fp32, ms::exact_query, vp::fp16_operand, mr::relative_row, true},
    {"V (e) relative row, unr.", kp::exact_fp32, ms::exact_query, vp::fp16_operand, mr::relative_row, false},
    {"full  probe: fold,exact,(a)", kp::int16_fold, ms::exact_query, vp::fp16_operand, mr::score, false},
    {"full  shift,rounded,(c)", kp::int16_shift, ms::rounded_query, vp::fp16_operand, mr::score_plus_row, true},
    {"full  shift,rounded,(d)", kp::int16_shift, ms::rounded_query, vp::fp16_operand, mr::relative_row, true},
};
constexpr int variant_count = sizeof(variants) / sizeof(variants[0]);

// ------------------------------------------------------------------------------------------------- host: the layer
struct array3 {
  int n0 = 0, n1 = 0, n2 = 0;
  std::vector<float> data;
};

static void fail(const std::string& message) {
  std::fprintf(stderr, "numerics: %s\n", message.c_str());
  std::exit(1);
}

static array3 read_npy(const char* path) {
  FILE* file = std::fopen(path, "rb");
  if (!file) fail(std::string("cannot open ") + path);
  unsigned char head[12];
  if (std::fread(head, 1, 10, file) != 10 || std::memcmp(head, "\x93NUMPY", 6)) fail(std::string("not a .npy: ") + path);
  size_t header_bytes = head[8] | head[9] << 8;
  if (head[6] > 1) {
    if (std::fread(head + 10, 1, 2, file) != 2) fail(std::string("short header: ") + path);
    header_bytes |= size_t(head[10]) << 16 | size_t(head[11]) << 24;
  }
  std::string header(header_bytes, ' ');
  if (std::fread(&header[0], 1, header_bytes, file) != header_bytes) fail(std::string("short header: ") + path);
  array3 a;
  const size_t shape = header.find("'shape'");
  const size_t open = shape == std::string::npos ? shape : header.find('(', shape);
  if (header.find("'<f2'") == std::string::npos || header.find("False") == std::string::npos || open == std::string::npos ||
      std::sscanf(header.c_str() + open, "(%d, %d, %d", &a.n0, &a.n1, &a.n2) != 3)
    fail(std::string("want a C-ordered 3-d '<f2' array: ") + path);
  const size_t count = size_t(a.n0) * a.n1 * a.n2;
  std::vector<__half> raw(count);
  if (std::fread(raw.data(), 2, count, file) != count) fail(std::string("short data: ") + path);
  std::fclose(file);
  a.data.resize(count);
  for (size_t i = 0; i < count; ++i) a.data[i] = __half2float(raw[i]);
  return a;
}

template <class F>
static void parallel_for(int n, F f) {
  const int workers = std::max(1, std::min<int>(n, std::thread::hardware_concurrency()));
  std::vector<std::thread> pool;
  for (int w = 0; w < workers; ++w) pool.emplace_back([=] { for (int i = w; i < n; i += workers) f(i); });
  for (auto& t : pool) t.join();
}

struct coded {  // one side of one layer; token count padded to whole tiles with zeros
  int heads, tokens, padded, dim, width;
  std::vector<uint8_t> code;    // [head][padded][dim]
  std::vector<float> row, col;  // [head][padded] (values of fp16), [head][dim]
};

static void hadamard(float* x, int dim) {  // block-diagonal, blocks of dim's largest power-of-two divisor
  const int block = dim & -dim;
  for (int b = 0; b < dim; b += block) {
    for (int s = 1; s < block; s *= 2)
      for (int i = 0; i < block; ++i)
        if (!(i & s)) {
          const float u = x[b + i], v = x[b + i + s];
          x[b + i] = u + v, x[b + i + s] = u - v;
        }
    for (int i = 0; i < block; ++i) x[b + i] /= std::sqrt(float(block));
  }
}

enum class k_norm { std_only, centred, rms };

static coded encode(const array3& a, int width, bool is_key, float gain, k_norm norm) {
  const int dim = a.n2, tokens = a.n1, padded = (tokens + tile_tokens - 1) / tile_tokens * tile_tokens;
  coded e{a.n0, tokens, padded, dim, width, {}, {}, {}};
  e.code.assign(size_t(a.n0) * padded * dim, 0);
  e.row.assign(size_t(a.n0) * padded, 0.f);
  e.col.assign(size_t(a.n0) * dim, 1.f);
  parallel_for(a.n0, [&](int h) {
    std::vector<float> mean(dim, 0.f), y(dim);
    float* col = &e.col[size_t(h) * dim];
    for (int c = 0; is_key && c < dim; ++c) {
      double sum = 0, squares = 0;
      for (int t = 0; t < tokens; ++t) {
        const double x = a.data[(size_t(h) * tokens + t) * dim + c];
        sum += x, squares += x * x;
      }
      const double mu = sum / tokens, variance = squares / tokens - (norm == k_norm::rms ? 0. : mu * mu);
      // Subtracting the channel mean shifts every score of a query alike, so softmax does not see it.
      if (norm == k_norm::centred) mean[c] = float(mu);
      col[c] = variance > 0 ? float(std::sqrt(variance)) : 1.f;
    }
    for (int t = 0; t < tokens; ++t) {
      double squares = 0;
      for (int c = 0; c < dim; ++c) y[c] = (a.data[(size_t(h) * tokens + t) * dim + c] - mean[c]) * gain / col[c];
      if (!is_key) hadamard(y.data(), dim);
      for (int c = 0; c < dim; ++c) squares += double(y[c]) * y[c];
      const float row = __half2float(__float2half_rn(std::min(65504.f, float(std::sqrt(squares / dim)))));
      e.row[size_t(h) * padded + t] = row;
      for (int c = 0; c < dim; ++c) {
        const float level = row > 0 ? std::floor(y[c] / (row * step_of_width[width])) + float(1 << (width - 1)) : 0.f;
        e.code[(size_t(h) * padded + t) * dim + c] = uint8_t(std::min(std::max(level, 0.f), float((1 << width) - 1)));
      }
    }
  });
  return e;
}

// fp64 attention on the codes; V stays in the rotated space, where norms are the same.
static std::vector<double> reference(const coded& k, const coded& v, const array3& q, double scale) {
  const int dim = k.dim, group = q.n0 / k.heads;
  const double mid_k = ((1 << k.width) - 1) * 0.5, mid_v = ((1 << v.width) - 1) * 0.5;
  std::vector<double> out(size_t(q.n0) * queries * dim);
  parallel_for(q.n0, [&](int hq) {
    const int h = hq / group;
    std::vector<double> folded(dim), score(k.tokens);
    for (int i = 0; i < queries; ++i) {
      const int visible = k.tokens - queries + i + 1;
      for (int c = 0; c < dim; ++c)
        folded[c] = double(q.data[(size_t(hq) * queries + i) * dim + c]) * k.col[size_t(h) * dim + c];
      double top = -1e300, total = 0;
      for (int t = 0; t < visible; ++t) {
        const uint8_t* code = &k.code[(size_t(h) * k.padded + t) * dim];
        double dot = 0;
        for (int c = 0; c < dim; ++c) dot += folded[c] * (code[c] - mid_k);
        score[t] = scale * k.row[size_t(h) * k.padded + t] * step_of_width[k.width] * dot;
        top = std::max(top, score[t]);
      }
      double* o = &out[(size_t(hq) * queries + i) * dim];
      for (int t = 0; t < visible; ++t) {
        const uint8_t* code = &v.code[(size_t(h) * v.padded + t) * dim];
        const double p = std::exp(score[t] - top);
        const double weight = p * v.row[size_t(h) * v.padded + t] * step_of_width[v.width];
        total += p;
        for (int c = 0; c < dim; ++c) o[c] += weight * (code[c] - mid_v);
      }
      for (int c = 0; c < dim; ++c) o[c] /= total;
    }
  });
  return out;
}

// ---------------------------------------------------------------------------------------------------- device: MMAs
__device__ inline void mma_u8s8(int* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ inline void mma_f16(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ inline float exp2_approx(float x) {  // what a fast kernel would use
  float r;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}

// Bit positions of the in-place words: of K channel c inside its 32-channel strip, of V token t inside its tile.
__host__ __device__ inline int key_bit(int width, int c) { return (c & 16) ? width : 0; }
__host__ __device__ inline int value_bit(int width, int t) {
  const int token_tile = t >> 4, upper = (t >> 3) & 1;
  return width == 4 ? upper * 4 : width == 2 ? (token_tile & 1) * 4 + upper * 2 : token_tile * 2 + upper;
}

struct problem {
  const uint8_t *k_code, *v_code;
  const float *k_row, *v_row, *v_top;  // v_top: largest V row of each kv head
  const float* q;                      // [query head][16][dim], K's column scales folded in
  float* out;                          // [query head][16][dim]
  int group, tokens, padded, k_width, v_width;
  float score_factor;  // softmax scale x log2(e) x K step: scores are in log2
};

// One warp: one kv head, one query position, up to four query heads; lane = 4*g + h as in the C layout of the MMAs,
// where columns 2h and 2h+1 belong to query head h.
template <int dim>
__global__ void __launch_bounds__(32) attend(problem in, variant how) {
  __shared__ float q_used[4][dim];  // the query as the chosen path sees it (exact or fp16)
  __shared__ int q_int[4][dim];
  __shared__ float weight_s[4][tile_tokens];    // P x row in fp32, for the exact V path
  __shared__ __half operand_s[4][tile_tokens];  // fp16(P x row x fold), on its way from the C to the B layout
  const int lane = threadIdx.x, g = lane >> 2, h = lane & 3;
  const int chunks = (in.group + 3) / 4, chunk = blockIdx.x % chunks, query = blockIdx.x / chunks % queries;
  const int kv_head = blockIdx.x / (chunks * queries), heads = min(4, in.group - chunk * 4);
  const int first_head = kv_head * in.group + chunk * 4, visible = in.tokens - queries + query + 1;
  const float mid_k = ((1 << in.k_width) - 1) * 0.5f, mid_v = ((1 << in.v_width) - 1) * 0.5f;

  // -- the query. Every lane prepares channels g, g+8, ... of its own head h; absent heads are zero.
  float q_max = 0.f;
  for (int c = g; c < dim; c += 8) {
    const float x = h < heads ? in.q[(size_t(first_head + h) * queries + query) * dim + c] : 0.f;
    q_used[h][c] = x;
    q_max = fmaxf(q_max, fabsf(x));
  }
  for (int x = 4; x < 32; x *= 2) q_max = fmaxf(q_max, __shfl_xor_sync(~0u, q_max, x));
  const bool integer = how.key == key_path::int16_fold || how.key == key_path::int16_shift;
  float q_scale = 1.f;
  if (q_max > 0.f && integer) q_scale = max_q_int / q_max;
  if (q_max > 0.f && how.key == key_path::fp16_query) q_scale = exp2f(8.f - ceilf(log2f(q_max)));  // keeps fp16 in range
  float sum_exact = 0.f, sum_rounded = 0.f;  // of q and of the rounded q, the latter in units of 1 / q_scale
  int sum_int = 0;
  for (int c = g; c < dim; c += 8) {
    const float x = q_used[h][c];
    const int shift = how.key == key_path::int16_fold ? key_bit(in.k_width, c) : 0;
    sum_exact += x;
    q_int[h][c] = __float2int_rn(x * q_scale / float(1 << shift));
    sum_int += q_int[h][c] << shift;
    if (how.key == key_path::fp16_query) q_used[h][c] = __half2float(__float2half_rn(x * q_scale));
    sum_rounded += q_used[h][c];
  }
  for (int x = 4; x < 32; x *= 2) {
    sum_exact += __shfl_xor_sync(~0u, sum_exact, x);
    sum_rounded += __shfl_xor_sync(~0u, sum_rounded, x);
    sum_int += __shfl_xor_sync(~0u, sum_int, x);
  }
  if (integer) sum_rounded = float(sum_int);
  const float k_factor = in.score_factor / q_scale;
  const float mid_term =
      mid_k * (how.mid == mid_source::exact_query ? in.score_factor * sum_exact : k_factor * sum_rounded);
  __syncwarp();

  // B operand of K: column n = g holds the high (even n) or balanced low (odd n) byte of head n / 2.
  uint32_t b_query[dim / 32][2];
#pragma unroll
  for (int j = 0; j < dim / 32; ++j)
    for (int half_strip = 0; half_strip < 2; ++half_strip) {
      uint32_t word = 0;
      for (int b = 0; b < 4; ++b) {
        const int x = q_int[g >> 1][32 * j + 16 * half_strip + 4 * h + b], high = (x + 128) >> 8;
        word |= uint32_t((g & 1 ? x - high * 256 : high) & 255) << (8 * b);
      }
      b_query[j][half_strip] = word;
    }

  const float inverse_top = how.rule == max_rule::relative_row ? 1.f / fmaxf(in.v_top[kv_head], 0x1p-24f) : 1.f;
  float o[dim / 16][4] = {}, running_max = -1e30f, denominator = 0.f, zero_sum = 0.f;
  for (int tile = 0; tile * tile_tokens < visible; ++tile) {
    const size_t base = size_t(kv_head) * in.padded + tile * tile_tokens;
    const uint8_t *k_code = in.k_code + base * dim, *v_code = in.v_code + base * dim;

    // -- scores in log2: slot 2*i+r is token 16*i + 8*r + g of head h
    float score[8], v_row[8], top = running_max;
    for (int i = 0; i < 4; ++i) {
      int s[4] = {0, 0, 0, 0};
      if (integer) {
#pragma unroll
        for (int j = 0; j < dim / 32; ++j) {
          const uint8_t* a = k_code + (16 * i + g) * dim + 32 * j + 4 * h;
          uint32_t x[4] = {*(const uint32_t*)a, *(const uint32_t*)(a + 8 * dim), *(const uint32_t*)(a + 16),
                           *(const uint32_t*)(a + 8 * dim + 16)};
          if (how.key == key_path::int16_fold) x[2] <<= key_bit(in.k_width, 16), x[3] <<= key_bit(in.k_width, 16);
          mma_u8s8(s, x[0], x[1], x[2], x[3], b_query[j][0], b_query[j][1]);
        }
      }
      for (int r = 0; r < 2; ++r) {
        const int t = 16 * i + 8 * r + g, slot = 2 * i + r;
        const float k_row = in.k_row[base + t];
        v_row[slot] = in.v_row[base + t] * inverse_top;
        if (integer) {
          const int dot = s[2 * r] * 256 + s[2 * r + 1];
          if (how.mid == mid_source::rounded_integer)  // doubled, because the mid-point is a half-integer
            score[slot] = k_row * (0.5f * k_factor) * float(2 * dot - ((1 << in.k_width) - 1) * sum_int);
          else
            score[slot] = k_row * fmaf(k_factor, float(dot), -mid_term);
        } else {
          const bool exact = how.key == key_path::exact_fp32;  // exact: centred codes, no cancellation
          float dot = 0.f;
          for (int c = 0; c < dim; ++c) dot = fmaf(q_used[h][c], float(k_code[t * dim + c]) - (exact ? mid_k : 0.f), dot);
          score[slot] = k_row * (exact ? k_factor * dot : fmaf(k_factor, dot, -mid_term));
        }
        if (tile * tile_tokens + t >= visible) score[slot] = -INFINITY;
        top = fmaxf(top, score[slot] + (how.rule == max_rule::score_plus_row ? log2f(fmaxf(v_row[slot], 0x1p-24f)) : 0.f));
      }
    }

    // -- lazy maximum: rescale only when some head grew by more than the threshold
    if (__any_sync(~0u, top > running_max + lazy_threshold)) {
      for (int x = 4; x < 32; x *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
      const float keep = exp2_approx(running_max - top);
      running_max = top;
      denominator *= keep, zero_sum *= keep;
      for (int i = 0; i < dim / 16; ++i)
        for (int e = 0; e < 4; ++e) o[i][e] *= keep;
    }

    // -- weights, their sums, and the operand
    for (int slot = 0; slot < 8; ++slot) {
      const int t = 8 * slot + g;
      const float fold = float(1 << (max_fold - value_bit(in.v_width, t)));
      const float p = exp2_approx(score[slot] - running_max), weight = p * v_row[slot];
      const __half operand = __float2half_rn(weight * fold);
      const float rounded = __half2float(operand) / fold;  // fold is a power of two: exact
      weight_s[h][t] = weight;
      operand_s[h][t] = operand;
      // A row of zero has an empty operand but still counts in the denominator.
      denominator += how.rounded_sums && v_row[slot] > 0.f ? rounded / v_row[slot] : p;
      zero_sum += how.rounded_sums ? rounded : weight;
    }
    __syncwarp();

    // -- O^T += V^T P: channel 16*i + g (+8) of head h
    if (how.value == value_path::exact_fp32) {
      for (int t = 0; t < tile_tokens; ++t)
#pragma unroll
        for (int i = 0; i < dim / 16; ++i)
          for (int r = 0; r < 2; ++r)
            o[i][2 * r] = fmaf(weight_s[h][t], float(v_code[t * dim + 16 * i + 8 * r + g]) - mid_v, o[i][2 * r]);
    } else {
      for (int tk = 0; tk < 4; ++tk) {
        // As in the probe, column 2h carries tokens 0-7 of each 16 and column 2h+1 tokens 8-15: same partial sums.
        const uint32_t pair = *(const uint32_t*)&operand_s[g >> 1][16 * tk + 8 * (g & 1) + 2 * h];
        const int shift0 = value_bit(in.v_width, 16 * tk), shift1 = value_bit(in.v_width, 16 * tk + 8);
        auto codes = [&](int channel, int t) {
          return uint32_t(v_code[t * dim + channel]) | uint32_t(v_code[(t + 1) * dim + channel]) << 16;
        };
#pragma unroll
        for (int i = 0; i < dim / 16; ++i) {
          const int c = 16 * i + g, t = 16 * tk + 2 * h;
          mma_f16(o[i], codes(c, t) << shift0, codes(c + 8, t) << shift0, codes(c, t + 8) << shift1,
                  codes(c + 8, t + 8) << shift1, g & 1 ? 0u : pair, g & 1 ? pair : 0u);
        }
      }
    }
    __syncwarp();
  }

  for (int x = 4; x < 32; x *= 2) {
    denominator += __shfl_xor_sync(~0u, denominator, x);
    zero_sum += __shfl_xor_sync(~0u, zero_sum, x);
  }
  if (h >= heads) return;
  constexpr float operand_unit = float(1 << (24 - max_fold));  // undoes 2^-24 of the subnormals and the fold
  const bool exact = how.value == value_path::exact_fp32;
  constexpr float steps[5] = {step_of_width[0], step_of_width[1], step_of_width[2], step_of_width[3], step_of_width[4]};
  const float unit = steps[in.v_width] / inverse_top / denominator;
  float* out = in.out + (size_t(first_head + h) * queries + query) * dim;
#pragma unroll
  for (int i = 0; i < dim / 16; ++i)
    for (int r = 0; r < 2; ++r)
      out[16 * i + 8 * r + g] =
          unit * (exact ? o[i][2 * r] : (o[i][2 * r] + o[i][2 * r + 1]) * operand_unit - zero_sum * mid_v);
}

// ------------------------------------------------------------------------------- all fp16 patterns times subnormals
// A: 16 subnormals in column k = 0; B: eight patterns per warp in row k = 0. So every output is one bare product.
__global__ void multiply_patterns(const uint16_t* subnormal, float* product) {
  const int lane = threadIdx.x, g = lane >> 2, h = lane & 3;
  const uint32_t pattern = blockIdx.x * 8 + g;
  float c[4] = {0.f, 0.f, 0.f, 0.f};
  mma_f16(c, h ? 0u : subnormal[g], h ? 0u : subnormal[g + 8], 0u, 0u, h ? 0u : pattern, 0u);
  for (int e = 0; e < 4; ++e) product[size_t(g + 8 * (e >> 1)) * 65536 + blockIdx.x * 8 + 2 * h + (e & 1)] = c[e];
}

template <class T>
static T* upload(const std::vector<T>& host) {
  T* device = nullptr;
  CUDA_CHECK(cudaMalloc(&device, host.size() * sizeof(T)));
  CUDA_CHECK(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

static double half_value(uint16_t bits) {
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
}

static void check_patterns() {
  const std::vector<uint16_t> subnormal = {1,   2,   3,   5,   12,  15,   16,     48,
                                           192, 240, 255, 512, 682, 1023, 0x8001, 0x83ff};
  uint16_t* d_subnormal = upload(subnormal);
  std::vector<float> product(16 * 65536);
  float* d_product = upload(product);
  multiply_patterns<<<65536 / 8, 32>>>(d_subnormal, d_product);
  CUDA_CHECK(cudaGetLastError());
  CUDA_CHECK(cudaMemcpy(product.data(), d_product, product.size() * sizeof(float), cudaMemcpyDeviceToHost));
  long wrong = 0, finite = 0, lost = 0;
  for (int i = 0; i < 16; ++i)
    for (int b = 0; b < 65536; ++b) {
      const double want = half_value(subnormal[i]) * half_value(uint16_t(b)), got = product[size_t(i) * 65536 + b];
      if (std::isfinite(want)) ++finite, wrong += want != got;
      else lost += std::isfinite(got);  // infinities and NaNs must stay visible
    }
  std::printf("patterns: %ld finite products of 16 subnormals x 65536 fp16 patterns, %ld not exact, %ld non-finite lost\n",
              finite, wrong, lost);
  CUDA_CHECK(cudaFree(d_subnormal));
  CUDA_CHECK(cudaFree(d_product));
}

// ------------------------------------------------------------------------------------------------------- measuring
struct tally {
  double mean_sum = 0, max = 0;
  int layers = 0, empty = 0;  // empty: layers without one finite output
  long bad = 0;
};

static void judge(const std::vector<float>& out, const std::vector<double>& ref, int dim, const std::string& line, tally& sum) {
  double total = 0, worst = 0;
  long bad = 0, good = 0;
  for (size_t i = 0; i < out.size(); i += dim) {
    double error = 0, norm = 0;
    for (int c = 0; c < dim; ++c) {
      error += (out[i + c] - ref[i + c]) * (out[i + c] - ref[i + c]);
      norm += ref[i + c] * ref[i + c];
    }
    const double relative = std::sqrt(error / norm);
    if (!std::isfinite(relative)) { ++bad; continue; }
    ++good, total += relative, worst = std::max(worst, relative);
  }
  if (good) sum.mean_sum += total / good, ++sum.layers;
  else ++sum.empty;
  sum.max = std::max(sum.max, worst), sum.bad += bad;
  std::printf("%s mean %.2e max %.2e nonfinite %ld/%ld\n", line.c_str(), good ? total / good : 0., worst, bad, good + bad);
}

static void launch(int dim, int blocks, const problem& in, const variant& how) {
  if (dim == 64) attend<64><<<blocks, 32>>>(in, how);
  else if (dim == 128) attend<128><<<blocks, 32>>>(in, how);
  else attend<256><<<blocks, 32>>>(in, how);
  CUDA_CHECK(cudaGetLastError());
}

int main(int argc, char** argv) {
  bool cpu_only = false;
  k_norm norm = k_norm::std_only;
  std::vector<char*> args;
  for (int i = 1; i < argc; ++i) {
    const std::string s = argv[i];
    if (s == "--cpu-only") cpu_only = true;
    else if (s == "--k-norm=std") norm = k_norm::std_only;
    else if (s == "--k-norm=centred") norm = k_norm::centred;
    else if (s == "--k-norm=rms") norm = k_norm::rms;
    else if (s.rfind("--", 0) == 0) fail("unknown flag " + s);
    else args.push_back(argv[i]);
  }
  if (args.size() % 5) fail("want groups of: K.npy V.npy Q.npy SCALE LABEL");
  if (!cpu_only) check_patterns();
  static tally table[2][2][variant_count];  // [width][natural, stress][variant]
  const int widths[2] = {2, 4};
  for (size_t a = 0; a < args.size(); a += 5) {
    const array3 k = read_npy(args[a]), v = read_npy(args[a + 1]), q = read_npy(args[a + 2]);
    const double scale = std::atof(args[a + 3]);
    const int dim = k.n2, group = q.n0 / k.n0;
    if (dim != 64 && dim != 128 && dim != 256) fail("head_dim must be 64, 128 or 256");
    if (v.n0 != k.n0 || v.n1 != k.n1 || v.n2 != dim || q.n1 != queries || q.n2 != dim || q.n0 % k.n0 || k.n1 < queries || !(scale > 0))
      fail(std::string("shapes do not fit: ") + args[a + 4]);
    for (int w = 0; w < 2; ++w) {
      const coded ck = encode(k, widths[w], true, 1.f, norm);
      std::vector<float> folded(q.data);
      for (int h = 0; h < q.n0; ++h)
        for (int i = 0; i < queries * dim; ++i) folded[size_t(h) * queries * dim + i] *= ck.col[size_t(h / group) * dim + i % dim];
      for (int stress = 0; stress < 2; ++stress) {
        const coded cv = encode(v, widths[w], false, stress ? 64.f : 1.f, norm);
        const std::vector<double> ref = reference(ck, cv, q, scale);
        std::vector<float> top(k.n0, 0.f);
        for (size_t i = 0; i < cv.row.size(); ++i) top[i / cv.padded] = std::max(top[i / cv.padded], cv.row[i]);
        char text[256];
        std::snprintf(text, sizeof text, "%s D%d T%d w(%d,%d) %s", args[a + 4], dim, k.n1, widths[w], widths[w], stress ? "stress " : "natural");
        const std::string head = text;
        if (cpu_only) {
          double least = 1e300, most = 0, sum = 0, row_max = *std::max_element(top.begin(), top.end());
          for (size_t i = 0; i < ref.size(); i += dim) {
            double n = 0;
            for (int c = 0; c < dim; ++c) n += ref[i + c] * ref[i + c];
            n = std::sqrt(n), least = std::min(least, n), most = std::max(most, n), sum += n;
          }
          std::printf("%s |o_ref| min %.4g mean %.4g max %.4g, largest V row %.4g\n", head.c_str(), least,
                      sum / (q.n0 * queries), most, row_max);
          continue;
        }
        std::vector<float> out(ref.size());
        uint8_t *k_code = upload(ck.code), *v_code = upload(cv.code);
        float *k_row = upload(ck.row), *v_row = upload(cv.row), *v_top = upload(top), *d_q = upload(folded), *d_out = upload(out);
        const problem in{k_code, v_code, k_row, v_row, v_top, d_q, d_out, group, k.n1, ck.padded, widths[w], widths[w],
                         float(scale * 1.4426950408889634 * step_of_width[widths[w]])};
        for (int i = 0; i < variant_count; ++i) {
          CUDA_CHECK(cudaMemset(d_out, 0xff, out.size() * sizeof(float)));  // NaN: an output not written is seen
          launch(dim, k.n0 * queries * ((group + 3) / 4), in, variants[i]);
          CUDA_CHECK(cudaMemcpy(out.data(), d_out, out.size() * sizeof(float), cudaMemcpyDeviceToHost));
          std::snprintf(text, sizeof text, "%s %-28s", head.c_str(), variants[i].name);
          judge(out, ref, dim, text, table[w][stress][i]);
        }
        for (void* p : {(void*)k_code, (void*)v_code, (void*)k_row, (void*)v_row, (void*)v_top, (void*)d_q, (void*)d_out})
          CUDA_CHECK(cudaFree(p));
      }
    }
  }
  for (int w = 0; w < 2 && !cpu_only; ++w)
    for (int stress = 0; stress < 2; ++stress) {
      std::printf("\nSUMMARY widths (%d,%d) %s: variant | mean of means | max of max | non-finite outputs (layers all non-finite)\n",
                  widths[w], widths[w], stress ? "stress" : "natural");
      for (int i = 0; i < variant_count; ++i) {
        const tally& t = table[w][stress][i];
        std::printf("  %-28s | %.2e | %.2e | %ld (%d)\n", variants[i].name, t.layers ? t.mean_sum / t.layers : 0., t.max, t.bad, t.empty);
      }
    }
  return 0;
}
