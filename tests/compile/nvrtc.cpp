// SPDX-License-Identifier: Apache-2.0
// nvrtc SOURCE OPTION...: kernels of SOURCE, which includes all device headers, through NVRTC as a user who compiles at
// run time has them, without a warning. No GPU is needed.
#include <nvrtc.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>

namespace {

constexpr const char* kernels[] = {
    "packkv::kernel::fused_decode<gate::two_bit, 4, packkv::warp::copy_engine::best, packkv::block::plain_scores, 0, "
    "2>",
    "packkv::kernel::fused_value_gemv<gate::kivi::value_codec_type, 8, packkv::warp::copy_engine::best, 0, 1>",
    "packkv::kernel::decode_attention<128, 128>",
    "packkv::kernel::store_tokens<128>",
    "packkv::kernel::write_packs<4>",
};

bool ok(nvrtcResult result, const char* what) {
  if (result != NVRTC_SUCCESS) std::printf("FAILED: %s: %s\n", what, nvrtcGetErrorString(result));
  return result == NVRTC_SUCCESS;
}

bool compile(nvrtcProgram program, int options, const char* const* option) {
  for (const char* kernel : kernels)
    if (!ok(nvrtcAddNameExpression(program, kernel), kernel)) return false;
  const bool compiled = ok(nvrtcCompileProgram(program, options, option), "compilation");
  std::size_t size = 0;
  if (!ok(nvrtcGetProgramLogSize(program, &size), "log")) return false;
  std::string log(size, '\0');
  if (!ok(nvrtcGetProgramLog(program, log.data()), "log")) return false;
  log.resize(log.find('\0'));
  if (!log.empty()) std::printf("FAILED: NVRTC says\n%s\n", log.c_str());
  if (!compiled || !log.empty() || !ok(nvrtcGetCUBINSize(program, &size), "cubin")) return false;
  const char* name = nullptr;
  for (const char* kernel : kernels)
    if (!ok(nvrtcGetLoweredName(program, kernel, &name), kernel)) return false;
  std::printf("%zu kernels, %zu bytes\n", std::size(kernels), size);
  return size > 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  std::ifstream file(argv[1]);
  const std::string source{std::istreambuf_iterator<char>(file), {}};
  nvrtcProgram program = nullptr;
  if (!ok(nvrtcCreateProgram(&program, source.c_str(), argv[1], 0, nullptr, nullptr), argv[1])) return 1;
  const bool passed = compile(program, argc - 2, argv + 2);
  return ok(nvrtcDestroyProgram(&program), "end") && passed ? 0 : 1;
}
