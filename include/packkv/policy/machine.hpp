// SPDX-License-Identifier: Apache-2.0
// What the shapes of the fused kernels' blocks need to know of a GPU: the shared memory of an SM.
// One idea: it is a template argument of kernels, and 0 stands for the architecture that they are compiled for.
#pragma once

#include <packkv/core/config.hpp>

namespace packkv::policy {

/// KiB of shared memory of an SM of the architectures we know: sm_90 to sm_110; sm_80, 87; sm_86, 89, 120, 121.
inline constexpr int shared_kib_choices[] = {228, 164, 100};

/// By the value of __CUDA_ARCH__. The least for those that we do not know.
PACKKV_HOST_DEVICE constexpr int shared_kib_of(int architecture) {
  if (architecture >= 900 && architecture < 1200) return 228;
  return architecture == 800 || architecture == 870 ? 164 : 100;
}

/// `shared_kib`, or if that is 0 what the architecture that is compiled for has.
PACKKV_HOST_DEVICE constexpr int resolved_shared_kib(int shared_kib) {
#if defined(__CUDA_ARCH__)
  return shared_kib != 0 ? shared_kib : shared_kib_of(__CUDA_ARCH__);
#else
  return shared_kib != 0 ? shared_kib : 228;
#endif
}

/// What the system takes of the shared memory of an SM for each block.
inline constexpr int shared_bytes_per_block = 1024;

}  // namespace packkv::policy
