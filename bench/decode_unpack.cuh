// SPDX-License-Identifier: Apache-2.0
// Codes to operands of matrix instructions and the products alone: no scales, no softmax, no pages. A gibibyte of
// planes of random codes is read once, each plane's operands are multiplied by one fixed operand and summed. Beside it
// the same with codes shifted to the low bits, made halves by a magic number and scaled one by one, as is usual.
#pragma once

#include <packkv/detail/approx.cuh>
#include <packkv/detail/matrix.cuh>
#include <packkv/detail/unroll.hpp>
#include <packkv/thread/unpack.cuh>

#include "decode_checks.cuh"
#include "report.cuh"

namespace unpack {

using packkv::detail::for_constants;

/// The other operand, a lane's registers, and what `converted` multiplies codes by: two halves.
struct constants {
  std::uint32_t b[2], scale, offset;
};

/// K as decode_attention has it: masked bytes times signed bytes. A code counts code * 2^place; single bits are
/// shifted.
template <int Bits>
struct key_in_place {
  using plane = packkv::thread::key_plane_32<Bits>;
  using sum_type = std::int32_t;
  static constexpr int depth = 32;
  __device__ static void add(sum_type (&sum)[4], const std::uint32_t (&w)[plane::words], const constants& c) {
    for_constants<4>([&](auto t) {
      std::uint32_t a[4];
      for_constants<4>([&](auto r) {
        constexpr int tile = decltype(t)::value, reg = decltype(r)::value;
        if constexpr (Bits == 1)
          a[reg] = plane::template operand<tile, reg>(w);
        else
          a[reg] = plane::template in_place<tile, reg>(w);
      });
      packkv::detail::mma_u8s8(sum, a, c.b);
    });
  }
  static packkv::bit_field field(int token, int channel) {
    return packkv::detail::key_field(Bits, 0, 32, token, channel);
  }
  static double value(std::uint32_t code, packkv::bit_field f) { return code << (Bits == 1 ? 0 : f.bit % 8); }
  static int k_of(int, int channel) { return channel; }
};

/// V: masked halves, which are subnormal numbers code * 2^(place - 24).
template <int Bits>
struct value_in_place {
  using plane = packkv::thread::value_plane<Bits>;
  using sum_type = float;
  static constexpr int depth = 16;
  __device__ static void add(sum_type (&sum)[4], const std::uint32_t (&w)[plane::words], const constants& c) {
    for_constants<4>([&](auto t) {
      std::uint32_t a[4];
      for_constants<4>([&](auto r) {
        constexpr int tile = decltype(t)::value, reg = decltype(r)::value;
        a[reg] = plane::template in_place<tile, reg>(w);
      });
      packkv::detail::mma_f16(sum, a, c.b);
    });
  }
  static packkv::bit_field field(int token, int channel) {
    return packkv::detail::value_field(Bits, 0, token, channel);
  }
  /// A channel's two row halves share a shift, so that bits 8 to 15 of a half count as 0 to 7.
  static double value(std::uint32_t code, packkv::bit_field f) {
    return std::ldexp(static_cast<double>(code), f.bit % 8 - 24);
  }
  static int k_of(int token, int) { return token % 16; }
};

/// The usual way, on the same planes: 1024 + code as a half, minus 1024, times a scale.
template <int Bits>
struct value_converted : value_in_place<Bits> {
  using plane = packkv::thread::value_plane<Bits>;
  static constexpr std::uint32_t magic = 0x64006400u;
  __device__ static void add(float (&sum)[4], const std::uint32_t (&w)[plane::words], const constants& c) {
    for_constants<4>([&](auto t) {
      std::uint32_t a[4];
      for_constants<4>([&](auto r) {
        constexpr int tile = decltype(t)::value, reg = decltype(r)::value;
        a[reg] = packkv::detail::multiply_add_halves(plane::template operand<tile, reg>(w) | magic, c.scale, c.offset);
      });
      packkv::detail::mma_f16(sum, a, c.b);
    });
  }
  static double value(std::uint32_t code, packkv::bit_field) { return code * 0.125; }
};

/// Planes are dealt to warps, `together` at a time, of which `planes` is a multiple. out: [warps of the grid][lane][4]
template <class Way>
__global__ void __launch_bounds__(512)
    multiply(const std::uint32_t* codes, std::int64_t planes, const constants* lanes, typename Way::sum_type* out) {
  using plane = typename Way::plane;
  constexpr int together = plane::words >= 8 ? 2 : 4;
  const int lane = packkv::detail::lane_id();
  const std::int64_t warps = gridDim.x * (blockDim.x / 32),
                     warp = blockIdx.x * (blockDim.x / 32) + packkv::detail::warp_id();
  const constants mine = lanes[lane];
  typename Way::sum_type sum[4] = {};
  for (std::int64_t first = warp * together; first < planes; first += warps * together) {
    std::uint32_t w[together][plane::words];
#pragma unroll
    for (int i = 0; i < together; ++i) plane::load(w[i], codes + (first + i) * plane::plane_words, lane);
#pragma unroll
    for (int i = 0; i < together; ++i) Way::add(sum, w[i], mine);
  }
  for (int r = 0; r < 4; ++r) out[(warp * 32 + lane) * 4 + r] = sum[r];
}

template <int Threads>
__global__ void fill_words(std::uint32_t* out, std::int64_t count) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * Threads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * Threads) {
    std::uint64_t x = (static_cast<std::uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    out[i] = static_cast<std::uint32_t>(x >> 32);
  }
}

/// The other operand as a matrix [k][column], and the lanes' registers.
template <class Way>
std::vector<constants> make_constants(double (&b)[32][8]) {
  constexpr bool bytes = Way::depth == 32;
  std::vector<constants> lanes(32);
  for (int lane = 0; lane < 32; ++lane) {
    constants& c = lanes[static_cast<std::size_t>(lane)];
    c = {{0, 0}, packkv::float_to_half(0.125f) * 0x10001u, packkv::float_to_half(-128.0f) * 0x10001u};
    for (int reg = 0; reg < 2; ++reg)
      for (int part = 0; part < (bytes ? 4 : 2); ++part) {
        const auto p =
            bytes ? packkv::detail::fragment::b<1>(lane, reg, part) : packkv::detail::fragment::b<2>(lane, reg, part);
        const int x = (p.row * 37 + p.column * 11) % 15 - 4;
        b[p.row][p.column] = x;
        c.b[reg] |= bytes ? static_cast<std::uint32_t>(x & 0xff) << (8 * part)
                          : static_cast<std::uint32_t>(packkv::float_to_half(static_cast<float>(x))) << (16 * part);
      }
  }
  return lanes;
}

/// `bytes` of planes in `copies` copies.
class problem {
 public:
  problem(std::int64_t bytes_of_copy, int copy_count, int sms)
      : bytes(bytes_of_copy),
        copies(copy_count),
        blocks(3 * sms),
        codes_(bytes / 4 * copies),
        lanes_(32),
        out_(std::int64_t{blocks} * 512 * 4) {
    fill_words<256><<<1024, 256>>>(codes_.data(), bytes / 4 * copies);
    require(cudaDeviceSynchronize());
  }
  template <class Way>
  void run(int copy, std::int64_t planes, cudaStream_t stream) const {
    static_assert(sizeof(typename Way::sum_type) == 4, "sums share a buffer");
    multiply<Way>
        <<<static_cast<unsigned>(blocks), 512, 0, stream>>>(codes_.data() + copy * (bytes / 4), planes, lanes_.data(),
                                                            reinterpret_cast<typename Way::sum_type*>(out_.data()));
    require(cudaGetLastError());
  }
  const std::uint32_t* codes() const { return codes_.data(); }

  /// Sums by column of the other operand, over all planes and rows, against the definition. \return the largest error
  template <class Way>
  double is_right(const char* what) const {
    using plane = typename Way::plane;
    constexpr int channels = Way::depth;  // of a strip: K's products go over them, V's over as many tokens
    constexpr std::uint32_t mask = (1u << (plane::plane_words * 32 / (64 * channels))) - 1;
    double b[32][8] = {}, exact[8] = {};
    const auto lanes = make_constants<Way>(b);
    require(cudaMemcpy(lanes_.data(), lanes.data(), sizeof(constants) * 32, cudaMemcpyHostToDevice));
    const std::int64_t planes = 1000;  // few enough for sums that wrap nowhere
    const auto words = to_host(codes_.data(), planes * plane::plane_words);
    for (std::int64_t p = 0; p < planes; ++p)
      for (int token = 0; token < 64; ++token)
        for (int channel = 0; channel < channels; ++channel) {
          const auto f = Way::field(token, channel);
          const std::uint32_t code = words[static_cast<std::size_t>(p * plane::plane_words + f.word)] >> f.bit & mask;
          for (int n = 0; n < 8; ++n) exact[n] += Way::value(code, f) * b[Way::k_of(token, channel)][n];
        }
    run<Way>(0, planes, nullptr);
    const auto out =
        to_host(reinterpret_cast<const typename Way::sum_type*>(out_.data()), std::int64_t{blocks} * 512 * 4);
    double sums[8] = {};
    for (std::size_t i = 0; i < out.size(); ++i)
      sums[packkv::detail::fragment::c(static_cast<int>(i / 4 % 32), static_cast<int>(i % 4)).column] +=
          static_cast<double>(out[i]);
    return checks::require_close(what, {sums, sums + 8}, {exact, exact + 8}, 8, 1e-4);
  }

  const std::int64_t bytes;
  const int copies, blocks;

 private:
  device_buffer<std::uint32_t> codes_;
  device_buffer<constants> lanes_;
  device_buffer<float> out_;
};

template <class Way, int Bits>
measured measure(timing::stopwatch& watch, int sms) {
  using usual = value_converted<Bits>;
  const problem p(std::int64_t{1} << 30, 2, sms);
  measured m;
  m.error = std::max(p.is_right<usual>("unpack, usual"), p.is_right<Way>("unpack"));
  m.bytes = m.coded_bytes = static_cast<double>(p.bytes);
  m.values = m.bytes * 8 / Bits;
  m.half_bytes = 2.0 * m.values;
  m.peer_note = "halves by a magic number, each scaled";
  const auto planes_of = [&](int plane_words) { return p.bytes / 4 / plane_words; };
  device_buffer<uint4> sink(1);
  timing::timed_call call(watch, p.copies,
                          [&](int i) { p.run<Way>(i, planes_of(Way::plane::plane_words), watch.stream()); });
  timing::timed_call peer(watch, p.copies,
                          [&](int i) { p.run<usual>(i, planes_of(usual::plane::plane_words), watch.stream()); });
  const auto ceiling = timing::read_ceiling(watch, p.codes(), p.bytes, p.bytes, p.copies, sink.data(), sms);
  m.rounds = timing::time_calls({&call, &peer, ceiling.get()});
  m.graph = call.graph(), m.single = call.single(), m.ceiling = m.peer_ceiling = ceiling->graph();
  m.peer = peer.graph(), m.peer_single = peer.single();
  return m;
}

}  // namespace unpack
