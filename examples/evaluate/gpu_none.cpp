// SPDX-License-Identifier: Apache-2.0
// What a build without CUDA says about GPUs.
#include "gpu.hpp"

#if !PACKKV_EVALUATE_CUDA

namespace evaluate {

bool gpu_present(std::string& name_or_reason) {
  name_or_reason = "this program was built without CUDA";
  return false;
}

packkv::status gpu_attention(const gpu_job&, std::vector<float>&, packkv::device_report&) {
  return packkv::refuse(packkv::status_code::unsupported, "this program was built without CUDA");
}

}  // namespace evaluate

#endif
