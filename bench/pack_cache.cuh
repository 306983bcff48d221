// SPDX-License-Identifier: Apache-2.0
// Bell-shaped random K and V in packs as PackKV has them by default, one side of them in copies that take turns, and
// the call of packkv's GEMV on it: what gemv::measure_beside_cublas measures.
#pragma once

#include "decode_gemv.cuh"

namespace packs {

/// Steps of a token of 0.1 (K) and 0.2 (V) of its range, packs of 16 tokens.
inline packkv::pack_format format_of(int heads, packkv::token_order order) {
  packkv::pack_format f;
  f.order = order;
  f.kv_heads = heads;
  f.key.relative_step = 0.1f;
  f.value.relative_step = 0.2f;
  return f;
}

class packed_side {
 public:
  packed_side(const gemv::problem& p, packkv::token_order order)
      : p_(p),
        format_(format_of(p.heads, order)),
        blocks_(p.tokens / 64),
        in_(p.inputs()),
        out_(p.outputs()),
        workspace_bytes_(packkv::sequence_workspace_bytes<gemv::dim>({1, p.heads, p.heads, 1, p.tokens, 0})),
        workspace_(workspace_bytes_) {
    random_cache_detail::fill_random<256><<<1024, 256>>>(in_.data(), p.inputs(), 37u);
    require(packkv::initialize_workspace(exec(nullptr)));
    compress();
    require(cudaDeviceSynchronize());
  }

  /// All that is stored of the side.
  std::int64_t bytes() const { return tile_bytes_ + range_bytes_ + offset_bytes_; }
  std::int64_t copy_stride() const { return (bytes() + 255) / 256 * 256; }
  int copies() const { return copies_; }
  const std::uint8_t* data() const { return pool_->data(); }

  void run(int copy, cudaStream_t stream) const {
    const auto in = packkv::make_input<3>(in_.data(), packkv::dtype::float16, {1, p_.heads, p_.inputs() / p_.heads});
    const auto out = packkv::make_output<3>(out_.data(), packkv::dtype::float16, {1, p_.heads, p_.row()});
    require(p_.keys() ? packkv::key_gemv<gemv::dim>(format_, view(copy), in, 1.0f, out, exec(stream))
                      : packkv::value_gemv<gemv::dim>(format_, view(copy), in, out, exec(stream)));
  }

  /// Against plain products with what packkv::decompress makes of the same packs. \return the largest error of a head
  double is_right() const {
    const std::int64_t values = p_.hidden() * p_.tokens;
    device_buffer<std::uint16_t> decoded(values);
    const auto to = packkv::make_output<4>(decoded.data(), packkv::dtype::float16, {1, p_.heads, p_.tokens, gemv::dim});
    require(packkv::detail::launch_sequence_decompress<gemv::dim>(
        packkv::detail::pack_side_source(format_, p_.side, view(0)), to, p_.tokens, packkv::exec{}));
    device_buffer<float> exact(p_.outputs());
    gemv::run_plain(p_, in_.data(), {decoded.data(), gemv::dim, p_.tokens * gemv::dim}, exact.data());
    run(0, nullptr);
    return checks::require_close(p_.keys() ? "key_gemv on packs" : "value_gemv on packs",
                                 checks::to_float(to_host(out_.data(), p_.outputs())),
                                 to_host(exact.data(), p_.outputs()), p_.row(), checks::query_bound);
  }

 private:
  /// Codes both sides, because they share an order, and keeps copies of one.
  void compress() {
    const std::int64_t values = p_.hidden() * p_.tokens, tiles = packkv::tile_count(format_, blocks_);
    device_buffer<std::uint16_t> elements(2 * values);
    random_cache_detail::fill_random<256><<<4096, 256>>>(elements.data(), 2 * values, 12345u);
    const auto tensor = [&](int i) {
      return packkv::make_input(elements.data() + i * values, packkv::dtype::float16,
                                {1, p_.heads, p_.tokens, gemv::dim});
    };
    range_bytes_ = blocks_ * packkv::range_count(format_, p_.side) * std::int64_t{sizeof(packkv::pack_range)};
    offset_bytes_ = (tiles + 1) * 8;
    const std::int64_t most = packkv::max_pack_bytes(format_, p_.side, blocks_);
    device_buffer<packkv::pack_range> key_ranges(range_bytes_ / 4), value_ranges(range_bytes_ / 4);
    device_buffer<std::int64_t> key_offsets(tiles + 1), value_offsets(tiles + 1);
    device_buffer<std::uint8_t> key_data(most), value_data(most), order(p_.tokens);
    require(packkv::compress(
        format_, tensor(0), tensor(1), blocks_, {key_ranges.data(), key_offsets.data(), key_data.data(), most},
        {value_ranges.data(), value_offsets.data(), value_data.data(), most}, {nullptr, order.data()}, packkv::exec{}));
    const std::int64_t* const offsets = p_.keys() ? key_offsets.data() : value_offsets.data();
    require(cudaMemcpy(&tile_bytes_, offsets + tiles, 8, cudaMemcpyDeviceToHost));
    copies_ = timing::copies_for(copy_stride());
    pool_ = std::make_unique<device_buffer<std::uint8_t>>(copy_stride() * copies_);
    for (int i = 0; i < copies_; ++i) {
      std::uint8_t* const to = pool_->data() + i * copy_stride();
      const auto copy = [](void* place, const void* from, std::int64_t n) {
        require(cudaMemcpy(place, from, static_cast<std::size_t>(n), cudaMemcpyDeviceToDevice));
      };
      copy(to, p_.keys() ? key_data.data() : value_data.data(), tile_bytes_);
      copy(to + tile_bytes_, p_.keys() ? key_ranges.data() : value_ranges.data(), range_bytes_);
      copy(to + tile_bytes_ + range_bytes_, offsets, offset_bytes_);
    }
  }
  packkv::packs_view view(int copy) const {
    const std::uint8_t* const from = pool_->data() + copy * copy_stride();
    packkv::packs_view v;
    v.blocks = blocks_;
    v.key = v.value = {reinterpret_cast<const packkv::pack_range*>(from + tile_bytes_),
                       reinterpret_cast<const std::int64_t*>(from + tile_bytes_ + range_bytes_), from, tile_bytes_};
    return v;
  }
  packkv::exec exec(cudaStream_t stream) const {
    return {stream, workspace_.data(), static_cast<std::size_t>(workspace_bytes_), nullptr};
  }

  const gemv::problem p_;
  const packkv::pack_format format_;
  const std::int64_t blocks_;
  std::int64_t tile_bytes_ = 0, range_bytes_ = 0, offset_bytes_ = 0;
  int copies_ = 0;
  std::unique_ptr<device_buffer<std::uint8_t>> pool_;  ///< copies of tiles, ranges and offsets
  device_buffer<std::uint16_t> in_, out_;
  std::int64_t workspace_bytes_;
  device_buffer<std::uint8_t> workspace_;
};

}  // namespace packs
