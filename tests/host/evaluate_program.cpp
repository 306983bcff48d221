// SPDX-License-Identifier: Apache-2.0
// The program `evaluate` as a user meets it: exit codes, streams, files.
#include <sys/wait.h>

#include <cstdlib>

#include "../support/catch.hpp"
#include "evaluate_files.hpp"

#ifdef PACKKV_EVALUATE_BINARY

using packkv_test::cache_files;
using packkv_test::read_file;

namespace {

struct run_result {
  int code = -1;
  std::string out, err;
};

std::string quoted(const std::string& text) { return "'" + text + "'"; }

run_result run(const packkv_test::temporary_folder& folder, const std::vector<std::string>& arguments) {
  std::string command = quoted(PACKKV_EVALUATE_BINARY);
  for (const std::string& a : arguments) command += " " + quoted(a);
  const int status =
      std::system((command + " > " + quoted(folder.file("out")) + " 2> " + quoted(folder.file("err"))).c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(folder.file("out")), read_file(folder.file("err"))};
}

/// Exit code 2, nothing on stdout, one line on stderr.
bool refused(const run_result& r) {
  INFO("code " << r.code << " stderr " << r.err);
  CHECK(r.out.empty());
  CHECK(r.err.find('\n') == r.err.size() - 1);
  return r.code == 2;
}

std::vector<std::string> operator+(std::vector<std::string> a, const std::vector<std::string>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace

TEST_CASE("evaluate program: help, list and a good run exit with 0") {
  const packkv_test::temporary_folder folder;
  CHECK(run(folder, {"--help"}).code == 0);
  const run_result list = run(folder, {"--list"});
  CHECK(list.code == 0);
  CHECK(list.out.find("plan:k=4.2.1.1") != std::string::npos);
  const cache_files f(folder, "", 31, 1, 2, 65, 1, 64, 64);
  const run_result good =
      run(folder, f.arguments() + std::vector<std::string>{"--codec", "plan:k=2,v=2", "--device", "auto"});
  CHECK(good.code == 0);
  CHECK(good.err.empty());
  CHECK(good.out.find("plan:k=2,v=2") != std::string::npos);
}

TEST_CASE("evaluate program: mistakes exit with 2 and one line") {
  const packkv_test::temporary_folder folder;
  const cache_files f(folder, "", 32, 2, 2, 65, 2, 64, 64);
  const std::vector<std::string> good =
      f.arguments() + std::vector<std::string>{"--device", "cpu", "--codec", "plan:k=2,v=2"};
  REQUIRE(run(folder, good).code == 0);
  CHECK(refused(run(folder, {})));
  CHECK(refused(run(folder, f.arguments())));
  CHECK(refused(run(folder, good + std::vector<std::string>{"--unknown"})));
  CHECK(refused(run(folder, good + std::vector<std::string>{"--codec", "zip"})));
  CHECK(refused(run(folder, good + std::vector<std::string>{"--codec", "plan:k=2,v=2,k=2"})));
  CHECK(refused(run(folder, good + std::vector<std::string>{"--codec", "plan:k=4.2,v=2"})));
  CHECK(refused(run(folder, good + std::vector<std::string>{"--codec", "plan:k=2,v=2,transform_k=permutation"})));
  CHECK(refused(run(folder, good + std::vector<std::string>{"--codec", "plan:k=2,v=2,leading=1"})));
  CHECK(refused(run(folder, good + std::vector<std::string>{"--codec", "plan:k=2,v=2,steps=calibrated"})));
  CHECK(refused(run(folder, good + std::vector<std::string>{"--json", folder.file("no/such/folder.json")})));
  CHECK(refused(run(folder, good + std::vector<std::string>{"--json", folder.file("")})));
#if !PACKKV_EVALUATE_CUDA
  CHECK(refused(run(folder, f.arguments() + std::vector<std::string>{"--codec", "fp16", "--device", "gpu"})));
#endif
}

TEST_CASE("evaluate program: files that disagree or lie exit with 2 and one line") {
  const packkv_test::temporary_folder folder;
  const cache_files f(folder, "", 33, 2, 2, 65, 2, 64, 64);
  packkv_test::random_source random(34);
  const auto with = [&](const std::string& option, const std::string& bytes) {
    std::vector<std::string> arguments = f.arguments();
    for (std::size_t i = 0; i < arguments.size(); ++i)
      if (arguments[i] == option) arguments[i + 1] = folder.write("bad\n.npy", bytes);
    return run(folder, arguments + std::vector<std::string>{"--codec", "fp16", "--device", "cpu"});
  };
  REQUIRE(with("--q", f.q.npy()).code == 0);
  CHECK(refused(with("--q", packkv_test::random_tensor(random, 3, 2, 64).npy())));   // heads no multiple
  CHECK(refused(with("--q", packkv_test::random_tensor(random, 4, 66, 64).npy())));  // more queries than tokens
  CHECK(refused(with("--q", packkv_test::random_tensor(random, 4, 2, 96).npy())));   // other head dim
  CHECK(refused(with("--v", packkv_test::random_tensor(random, 2, 64, 64).npy())));  // other tokens
  CHECK(refused(with("--v", packkv_test::random_tensor(random, 1, 65, 64).npy())));  // other heads
  CHECK(refused(with("--v", packkv_test::random_tensor(random, 2, 65, 80).npy())));  // unsupported head dim
  CHECK(refused(with("--k", f.k.npy() + "x")));
  CHECK(refused(with("--k", f.k.npy().substr(0, 1000))));
  CHECK(refused(with("--k", "")));
  packkv_test::tensor bad = f.k;
  bad.bits.back() = 0x7e00;
  CHECK(refused(with("--k", bad.npy())));
  const cache_files other(folder, "other", 35, 1, 2, 65, 2, 64, 64);
  CHECK(refused(
      run(folder, f.arguments() + other.arguments("--calibrate-") + std::vector<std::string>{"--codec", "fp16"})));
  CHECK(refused(run(folder, {"--k", "/nonexistent", "--v", f.v_path, "--q", f.q_path, "--codec", "fp16"})));
}

TEST_CASE("evaluate program: JSON appears only after success, and - means stdout") {
  const packkv_test::temporary_folder folder;
  const cache_files f(folder, "", 36, 1, 1, 65, 1, 64, 64);
  const std::string json = folder.write("result.json", "old");
  const std::vector<std::string> arguments =
      f.arguments() + std::vector<std::string>{"--device", "cpu", "--json", json};
  CHECK(refused(run(folder, arguments + std::vector<std::string>{"--codec", "fp16", "--codec", "plan:k=4.2,v=2"})));
  CHECK(read_file(json) == "old");
  CHECK(run(folder, arguments + std::vector<std::string>{"--codec", "fp16"}).code == 0);
  CHECK(read_file(json).find("[\n {\"codec\": \"fp16\"") == 0);
  const run_result r =
      run(folder, f.arguments() + std::vector<std::string>{"--device", "cpu", "--codec", "fp16", "--json", "-"});
  CHECK(r.code == 0);
  CHECK(r.out == read_file(json));
  CHECK(r.err.find("bits K") != std::string::npos);
}

#endif
