// SPDX-License-Identifier: Apache-2.0
// What a build without CUDA says about GPUs.
#include "gpu.hpp"

#if !PACKKV_EVALUATE_CUDA

namespace evaluate {

bool gpu_present(std::string& name_or_reason) {
  name_or_reason = "this program was built without CUDA";
  return false;
}

namespace {
packkv::status no_cuda() {
  return packkv::refuse(packkv::status_code::unsupported, "this program was built without CUDA");
}
}  // namespace

packkv::status gpu_attention(const gpu_job&, std::vector<float>&, packkv::device_report&) { return no_cuda(); }
packkv::status gpu_attention(const gpu_sequence_job&, const packkv::grouped_spec&, const packkv::grouped_spec&,
                             std::int64_t, std::vector<float>&, packkv::device_report&) {
  return no_cuda();
}
packkv::status gpu_attention(const gpu_sequence_job&, const packkv::adaptive_spec&, const packkv::adaptive_spec&,
                             std::int64_t, std::vector<float>&, packkv::device_report&) {
  return no_cuda();
}
packkv::status gpu_attention(const gpu_sequence_job&, const packkv::pack_format&, std::vector<float>&,
                             packkv::device_report&) {
  return no_cuda();
}

}  // namespace evaluate

#endif
