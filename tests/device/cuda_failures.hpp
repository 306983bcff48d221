// SPDX-License-Identifier: Apache-2.0
// Makes the CUDA calls of the library fail, one after the other. It makes four: cudaLaunchKernelExC, cudaMemsetAsync,
// cudaFuncSetAttribute and cudaFuncGetAttributes (detail/cuda.cuh), the first two on the executor as well.
#pragma once

#include <packkv/detail/cuda.cuh>

#include "../support/catch.hpp"

namespace packkv_test {

/// What cuda_failures.cu does with the library's next CUDA calls.
struct watched_calls {
  int left = -1;         ///< calls until one fails; negative: none fails
  bool failed = false;   ///< one has
  bool pending = false;  ///< and nobody has taken the error from the runtime yet
  long long in_all = 0;  ///< that have failed since the program began
};
extern watched_calls cuda_calls;

/// `call` again and again, until no CUDA call in it fails: in round k the call number k does nothing and returns an
/// error, which must be the status, and must not stay in the runtime. Returns the last status. Reports that count
/// are to be set back by `call` itself.
template <class Call>
packkv::status after_failures(Call&& call) {
  for (int k = 0;; ++k) {
    cuda_calls.left = k;
    cuda_calls.failed = false;
    const packkv::status s = call();
    const watched_calls seen = cuda_calls;
    cuda_calls.left = -1;
    if (!seen.failed) return s;
    CHECK(s.code == packkv::status_code::cuda_error);
    CHECK(s.detail == cudaErrorMemoryAllocation);
    CHECK(!seen.pending);
  }
}

}  // namespace packkv_test
