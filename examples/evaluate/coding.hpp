// SPDX-License-Identifier: Apache-2.0
// A codec made ready for one cache: the library's specs and the arrays that they need, calibrated where asked for.
//   coding c;   if (outcome o = make_coding(choice, cache, calibration, threads, c); !o) return o;
#pragma once

#include <cstdint>
#include <packkv/codec/parameters.hpp>
#include <string>
#include <vector>

#include "cache.hpp"
#include "spec.hpp"
#include "whole_cache.hpp"

namespace evaluate {

/// One side: its spec and host arrays [kv_heads, ...]; empty arrays are not used by the codec.
struct coded_side {
  packkv::codec_spec spec;
  std::vector<float> column_scale;
  std::vector<std::int16_t> permutation;
  std::vector<float> basis, basis_inverse;
  std::vector<float> leading_scale;
  std::vector<float> channel_offset;
  float tensor_scale = 1.0f;

  packkv::side_parameters parameters() const;
  /// Bytes of the arrays, of all heads.
  std::int64_t model_bytes() const;
};

struct coding {
  std::string text;               ///< the SPEC as given
  coded_side key, value;          ///< formats of tiles that stand for themselves
  whole_cache_codec whole_cache;  ///< formats of whole caches; where set, the sides are not used
};

/// Meets a choice with the shapes of `cache`. `calibration` is null if there are no calibration files.
outcome make_coding(const codec_choice& choice, const kv_cache& cache, const kv_cache* calibration, int threads,
                    coding& out);

}  // namespace evaluate
