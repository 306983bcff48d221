// SPDX-License-Identifier: Apache-2.0
// key_gemv and value_gemv of one sequence against cuBLAS: of several calls that give the same result from 16-bit K or
// V, the fastest counts.
#pragma once

#include <cublas_v2.h>

#include "decode_checks.cuh"
#include "report.cuh"

namespace gemv {

inline constexpr int dim = 128;

inline void require_cublas(cublasStatus_t s, const char* what) {
  if (s == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "cuBLAS: %s: %s\n", what, cublasGetStatusString(s));
  std::exit(1);
}

/// K or V of all heads in 16 bits: element (head, token, channel) at head * head_stride + token * token_stride +
/// channel.
struct matrix {
  const std::uint16_t* data;
  std::int64_t token_stride, head_stride;
};

/// scores[h][t] = q[h] . m[h][t], a warp for each token of each head.
template <int Threads>
__global__ void plain_scores(const std::uint16_t* q, matrix m, std::int64_t tokens, float* scores) {
  const std::int64_t h = blockIdx.y, t = static_cast<std::int64_t>(blockIdx.x) * (Threads / 32) + threadIdx.x / 32;
  if (t >= tokens) return;
  float sum = 0.0f;
  for (int c = packkv::detail::lane_id(); c < dim; c += 32)
    sum += packkv::half_to_float(q[h * dim + c]) *
           packkv::half_to_float(m.data[h * m.head_stride + t * m.token_stride + c]);
  sum = packkv::detail::warp_sum(sum);
  if (threadIdx.x % 32 == 0) scores[h * tokens + t] = sum;
}
/// out[h] = sum of weights[h][t] * m[h][t], a block for each head.
template <int Threads>
__global__ void plain_sum(const std::uint16_t* weights, matrix m, std::int64_t tokens, float* out) {
  __shared__ float parts[Threads];
  const std::int64_t h = blockIdx.x;
  const int c = static_cast<int>(threadIdx.x) % dim;
  float sum = 0.0f;
  for (std::int64_t t = threadIdx.x / dim; t < tokens; t += Threads / dim)
    sum += packkv::half_to_float(weights[h * tokens + t]) *
           packkv::half_to_float(m.data[h * m.head_stride + t * m.token_stride + c]);
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= dim) return;
  for (int i = dim; i < Threads; i += dim) sum += parts[threadIdx.x + i];
  out[h * dim + c] = sum;
}

/// One GEMV: K (scores of one query per head) or V (sum of one row of weights per head).
struct problem {
  packkv::side side;
  int heads;
  std::int64_t tokens;
  std::int64_t hidden() const { return std::int64_t{heads} * dim; }
  bool keys() const { return side == packkv::side::key; }
  std::int64_t inputs() const { return heads * (keys() ? dim : tokens); }
  std::int64_t outputs() const { return heads * (keys() ? tokens : dim); }
  int row() const { return static_cast<int>(keys() ? tokens : dim); }  ///< outputs of a head
};

inline void run_plain(const problem& p, const std::uint16_t* in, const matrix& m, float* out) {
  if (p.keys())
    plain_scores<256><<<dim3(static_cast<unsigned>((p.tokens + 7) / 8), static_cast<unsigned>(p.heads)), 256>>>(
        in, m, p.tokens, out);
  else
    plain_sum<1024><<<static_cast<unsigned>(p.heads), 1024>>>(in, m, p.tokens, out);
  require(cudaGetLastError());
}

/// The cuBLAS side: random 16-bit copies, and several ways to ask for the same.
class cublas_peer {
 public:
  cublas_peer(timing::stopwatch& watch, const problem& p)
      : watch_(watch),
        p_(p),
        copy_bytes(2 * p.tokens * p.hidden()),
        copies(timing::copies_for(copy_bytes)),
        data_(copy_bytes / 2 * copies),
        in_(p.inputs()),
        diagonal_(p.hidden() * p.heads),
        out_(p.hidden() * p.heads + p.outputs()),
        workspace_(workspace_bytes) {
    require_cublas(cublasCreate(&handle_), "cublasCreate");
    require_cublas(cublasSetStream(handle_, watch.stream()), "cublasSetStream");
    require_cublas(cublasSetWorkspace(handle_, workspace_.data(), workspace_bytes), "cublasSetWorkspace");
    random_cache_detail::fill_random<256><<<4096, 256>>>(data_.data(), copy_bytes / 2 * copies, 31u);
    random_cache_detail::fill_random<256><<<1024, 256>>>(in_.data(), p.inputs(), 37u);
    require(cudaMemset(diagonal_.data(), 0, static_cast<std::size_t>(p.hidden() * p.heads) * 2));
    if (p.keys())  // column h: the query of head h at its place among `hidden` rows
      require(cudaMemcpy2D(diagonal_.data(), static_cast<std::size_t>(p.hidden() + dim) * 2, in_.data(), dim * 2,
                           dim * 2, static_cast<std::size_t>(p.heads), cudaMemcpyDeviceToDevice));
    require(cudaDeviceSynchronize());
  }
  ~cublas_peer() { (void)cublasDestroy(handle_); }
  cublas_peer(const cublas_peer&) = delete;
  cublas_peer& operator=(const cublas_peer&) = delete;

  /// The fastest call, every one checked on copy 0. `name` becomes which it is.
  std::unique_ptr<timing::timed_call> fastest(std::string& name) {
    std::unique_ptr<timing::timed_call> best;
    for (const way w : {way::gemm, way::gemv, way::one_gemm})
      for (const bool by_head : {false, true}) {
        if (w == way::one_gemm && by_head) continue;
        is_right(w, by_head);
        auto call = std::make_unique<timing::timed_call>(watch_, copies, [=](int i) { run(w, by_head, i); });
        if (best != nullptr && best->warm_ms() <= call->warm_ms()) continue;
        best = std::move(call);
        name = std::string(name_of(w)) + (by_head ? ", [heads, tokens, 128]" : ", [tokens, hidden]");
      }
    return best;
  }
  const std::uint16_t* data() const { return data_.data(); }

 private:
  enum class way { gemm, gemv, one_gemm };
  static const char* name_of(way w) {
    return w == way::gemm   ? "cublasGemmStridedBatchedEx"
           : w == way::gemv ? "cublasHSHgemvStridedBatched"
                            : "cublasGemmEx of all heads";
  }
  static constexpr std::size_t workspace_bytes = std::size_t{64} << 20;

  matrix layout(bool by_head, int copy) const {
    const std::uint16_t* data = data_.data() + copy_bytes / 2 * copy;
    return by_head ? matrix{data, dim, p_.tokens * dim} : matrix{data, p_.hidden(), dim};
  }
  /// Distance of two heads' results.
  std::int64_t out_stride(way w) const { return p_.keys() || w != way::one_gemm ? p_.row() : p_.hidden() + dim; }

  void run(way w, bool by_head, int copy) const {
    const float one = 1.0f, zero = 0.0f;
    const matrix m = layout(by_head, copy);
    const int tokens = static_cast<int>(p_.tokens), hidden = static_cast<int>(p_.hidden()),
              row = static_cast<int>(m.token_stride), in_row = p_.keys() ? dim : tokens;
    const cublasOperation_t op = p_.keys() ? CUBLAS_OP_T : CUBLAS_OP_N;  // a matrix of cuBLAS has tokens as columns
    const auto half = CUDA_R_16F;
    switch (w) {
      case way::gemm:
        require_cublas(
            cublasGemmStridedBatchedEx(handle_, op, CUBLAS_OP_N, p_.row(), 1, in_row, &one, m.data, half, row,
                                       m.head_stride, in_.data(), half, in_row, in_row, &zero, out_.data(), half,
                                       p_.row(), p_.row(), p_.heads, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
            name_of(w));
        break;
      case way::gemv:
        require_cublas(
            cublasHSHgemvStridedBatched(handle_, op, dim, tokens, &one, reinterpret_cast<const __half*>(m.data), row,
                                        m.head_stride, reinterpret_cast<const __half*>(in_.data()), 1, in_row, &zero,
                                        reinterpret_cast<__half*>(out_.data()), 1, p_.row(), p_.heads),
            name_of(w));
        break;
      case way::one_gemm:  // each head's product with every head's input; K: with zeros between
        require_cublas(p_.keys() ? cublasGemmEx(handle_, op, CUBLAS_OP_N, tokens, p_.heads, hidden, &one, m.data, half,
                                                row, diagonal_.data(), half, hidden, &zero, out_.data(), half, tokens,
                                                CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT)
                                 : cublasGemmEx(handle_, op, CUBLAS_OP_N, hidden, p_.heads, tokens, &one, m.data, half,
                                                row, in_.data(), half, tokens, &zero, out_.data(), half, hidden,
                                                CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                       name_of(w));
        break;
    }
  }

  void is_right(way w, bool by_head) const {
    device_buffer<float> exact(p_.outputs());
    run_plain(p_, in_.data(), layout(by_head, 0), exact.data());
    run(w, by_head, 0);
    const auto out = checks::to_float(to_host(out_.data(), p_.hidden() * p_.heads + p_.outputs()));
    std::vector<float> rows;
    for (int h = 0; h < p_.heads; ++h)
      rows.insert(rows.end(), out.begin() + h * out_stride(w), out.begin() + h * out_stride(w) + p_.row());
    checks::require_close(name_of(w), rows, to_host(exact.data(), p_.outputs()), p_.row(), 5e-3);
  }

  timing::stopwatch& watch_;
  const problem p_;

 public:
  const std::int64_t copy_bytes;
  const int copies;

 private:
  device_buffer<std::uint16_t> data_, in_, diagonal_, out_;
  device_buffer<std::uint8_t> workspace_;
  cublasHandle_t handle_ = nullptr;
};

/// packkv's call of one side on a cache of decode_cache.
template <class Format>
class packed_gemv {
 public:
  explicit packed_gemv(const problem& p)
      : p_(p),
        cache_(case_of(p), storage::bare, timing::copies_for(side_bytes(p))),
        in_(p.inputs()),
        out_(p.outputs()),
        workspace_bytes_(packkv::value_gemv_workspace_bytes<Format>({1, p.heads, p.heads, 1, p.tokens, 0})),
        workspace_(workspace_bytes_ + 256) {
    random_cache_detail::fill_random<256><<<1024, 256>>>(in_.data(), p.inputs(), 37u);
    require(packkv::initialize_workspace({nullptr, workspace_.data(), static_cast<std::size_t>(workspace_bytes_)}));
    require(cudaDeviceSynchronize());
  }
  static std::int64_t side_bytes(const problem& p) {
    return (p.tokens + 63) / 64 * p.heads * (p.keys() ? Format::key_tile_bytes : Format::value_tile_bytes);
  }
  /// `settled`: exec::settled_cache.
  void run(int copy, cudaStream_t stream, bool settled = false) const {
    packkv::exec e{stream, workspace_.data(), static_cast<std::size_t>(workspace_bytes_), nullptr};
    e.settled_cache = settled;
    const auto in = packkv::make_input<3>(in_.data(), packkv::dtype::float16, {1, p_.heads, p_.inputs() / p_.heads});
    const auto out = packkv::make_output<3>(out_.data(), packkv::dtype::float16, {1, p_.heads, p_.row()});
    require(p_.keys() ? packkv::key_gemv(in, cache_.view(copy), cache_.parameters, 1.0f, out, e)
                      : packkv::value_gemv(in, cache_.view(copy), cache_.parameters, out, e));
  }
  /// Where this side of copy 0 begins; copies are copy_stride() apart.
  const std::uint8_t* data() const {
    const auto& pages = cache_.view(0).pages;
    return static_cast<const std::uint8_t*>(p_.keys() ? pages.key_data : pages.value_data);
  }
  std::int64_t bytes() const { return side_bytes(p_); }
  std::int64_t copy_stride() const { return cache_.copy_stride(); }
  int copies() const { return cache_.copies; }

  /// Against plain products with what packkv::decompress makes of the same pages. \return the largest error of a head
  double is_right() const {
    const std::int64_t values = p_.hidden() * p_.tokens;
    device_buffer<std::uint16_t> decoded(2 * values);
    const auto to = [&](int i) {
      return packkv::make_output<4>(decoded.data() + i * values, packkv::dtype::float16, {1, p_.heads, p_.tokens, dim});
    };
    const packkv::cache_view v = cache_.view(0);
    require(packkv::decompress(v.pages, v.table, nullptr, cache_.parameters, to(0), to(1), packkv::exec{}));
    device_buffer<float> exact(p_.outputs());
    run_plain(p_, in_.data(), {decoded.data() + (p_.keys() ? 0 : values), dim, p_.tokens * dim}, exact.data());
    run(0, nullptr, true);
    const auto settled = to_host(out_.data(), p_.outputs());
    run(0, nullptr);
    checks::require_same(p_.keys() ? "key_gemv" : "value_gemv", settled, to_host(out_.data(), p_.outputs()));
    return checks::require_close(p_.keys() ? "key_gemv" : "value_gemv",
                                 checks::to_float(to_host(out_.data(), p_.outputs())),
                                 to_host(exact.data(), p_.outputs()), p_.row(), checks::query_bound);
  }

 private:
  static decode_case case_of(const problem& p) {
    decode_case c;
    c.name = "gemv";
    c.kv_heads = p.heads, c.group = 1, c.tokens = p.tokens;
    return c;
  }

  const problem p_;
  decode_cache<Format> cache_;
  device_buffer<std::uint16_t> in_, out_;
  std::int64_t workspace_bytes_;
  device_buffer<std::uint8_t> workspace_;
};

/// Times `ours` beside the read ceiling and the fastest cuBLAS call, once its result has been checked. Ours is like
/// packed_gemv; `settled`, if there is one, is our other call.
template <class Ours>
measured measure_beside_cublas(timing::stopwatch& watch, int sms, const problem& p, const Ours& ours,
                               timing::timed_call* settled = nullptr) {
  cublas_peer cublas(watch, p);
  measured m;
  m.error = ours.is_right();
  m.bytes = m.coded_bytes = static_cast<double>(ours.bytes());
  m.values = static_cast<double>(p.tokens * p.hidden());
  m.half_bytes = static_cast<double>(cublas.copy_bytes);
  device_buffer<uint4> sink(1);
  timing::timed_call call(watch, ours.copies(), [&](int i) { ours.run(i, watch.stream()); });
  const auto ceiling =
      timing::read_ceiling(watch, ours.data(), ours.bytes(), ours.copy_stride(), ours.copies(), sink.data(), sms);
  const auto peer = cublas.fastest(m.peer_note);
  const auto peer_ceiling =
      timing::read_ceiling(watch, cublas.data(), cublas.copy_bytes, cublas.copy_bytes, cublas.copies, sink.data(), sms);
  std::vector<timing::timed_call*> calls = {&call, ceiling.get(), peer.get(), peer_ceiling.get()};
  if (settled != nullptr) calls.push_back(settled);
  m.rounds = timing::time_calls(calls);
  if (settled != nullptr) m.settled = settled->graph();
  m.graph = call.graph(), m.single = call.single(), m.ceiling = ceiling->graph();
  m.peer = peer->graph(), m.peer_single = peer->single(), m.peer_ceiling = peer_ceiling->graph();
  return m;
}

template <class Format>
measured measure(timing::stopwatch& watch, int sms, const problem& p) {
  const packed_gemv<Format> ours(p);
  timing::timed_call settled(watch, ours.copies(), [&](int i) { ours.run(i, watch.stream(), true); });
  return measure_beside_cublas(watch, sms, p, ours, &settled);
}

}  // namespace gemv
