// SPDX-License-Identifier: Apache-2.0
// The grouped formats on real caches: the error of every named format is that of a textbook quantiser in double.
#include <cstdio>
#include <fstream>
#include <functional>
#include <iterator>
#include <packkv/reference/grouped_attention.hpp>

#include "grouped_fixture.hpp"

#if !defined(PACKKV_SAMPLE_DATA)
#define PACKKV_SAMPLE_DATA "examples/data/sample"
#endif
#if !defined(PACKKV_SHARED_DATA)
#define PACKKV_SHARED_DATA "../shared/data/kv"
#endif

namespace pk = packkv;
using namespace grouped_test;

namespace {

/// A float16 .npy of three dimensions, at most `max_tokens` rows of each head; false if there is no such file.
bool read_npy(const std::string& path, int max_tokens, tensor16& x) {
  std::ifstream file(path, std::ios::binary);
  if (!file.good()) return false;
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  REQUIRE(bytes.size() > 10);
  const std::size_t start = 10u + static_cast<unsigned char>(bytes[8]) + 256u * static_cast<unsigned char>(bytes[9]);
  const std::string header = bytes.substr(10, start - 10);
  REQUIRE(header.find("'<f2'") != std::string::npos);
  int extent[3] = {};
  const std::size_t at = header.find("'shape': (");
  REQUIRE(at != std::string::npos);
  REQUIRE(std::sscanf(header.c_str() + at, "'shape': (%d, %d, %d)", &extent[0], &extent[1], &extent[2]) == 3);
  REQUIRE(bytes.size() - start == static_cast<std::size_t>(extent[0]) * extent[1] * extent[2] * 2);
  x = tensor16(extent[0], std::min(max_tokens, extent[1]), extent[2]);
  for (int h = 0; h < x.heads; ++h)
    std::memcpy(x.bits.data() + x.at(h, 0, 0),
                bytes.data() + start + static_cast<std::size_t>(h) * extent[1] * extent[2] * 2,
                static_cast<std::size_t>(x.tokens) * x.dim * 2);
  return true;
}

/// Min-max quantisation as the papers write it, in double and with unrounded scales, of the rows
/// index(group, 0 .. size - 1). Returns sum of squared errors.
double textbook_error(int groups, int size, int width, const std::function<double(int, int)>& element) {
  double error = 0.0;
  for (int g = 0; g < groups; ++g) {
    double low = element(g, 0), high = low;
    for (int i = 1; i < size; ++i) {
      low = std::fmin(low, element(g, i));
      high = std::fmax(high, element(g, i));
    }
    const double scale = (high - low) / (std::pow(2.0, width) - 1.0);
    for (int i = 0; i < size; ++i) {
      const double x = element(g, i);
      const double back = scale > 0.0 ? std::nearbyint((x - low) / scale) * scale + low : low;
      error += (x - back) * (x - back);
    }
  }
  return error;
}

double squared_error(const tensor16& x, const std::vector<float>& back) {
  double error = 0.0;
  for (std::size_t i = 0; i < back.size(); ++i)
    error += std::pow(double(back[i]) - double(clean::from_fp16(x.bits[i])), 2);
  return error;
}

/// Library and textbook agree within 1 % in root mean square error. tokens is a multiple of 128.
void compare(const tensor16& x) {
  const int d = x.dim;
  for (const int width : {2, 3, 4, 8}) {
    const auto check = [&](const pk::grouped_spec& spec, double expected) {
      const coded e(spec, x);
      REQUIRE(e.layout.coded_tokens == x.tokens);
      REQUIRE(e.report.flags == 0);
      const double ratio = std::sqrt(squared_error(x, e.decode()) / expected);
      INFO(describe(spec) << ": root mean square error over the textbook's " << ratio);
      CHECK(std::fabs(ratio - 1.0) < 0.01);
    };
    for (const int g : {32, 64, 128})
      check(pk::make_grouped(pk::side::key, d, pk::group_axis::channel, g, width),
            textbook_error(x.heads * x.tokens / g * d, g, width, [&](int i, int t) {
              const int chunk = i / d;
              return x.value(chunk / (x.tokens / g), chunk % (x.tokens / g) * g + t, i % d);
            }));
    for (const int g : {32, d})
      check(pk::make_grouped(pk::side::value, d, pk::group_axis::vector, g, width),
            textbook_error(x.heads * x.tokens * (d / g), g, width, [&](int i, int c) {
              const int row = i / (d / g);
              return x.value(row / x.tokens, row % x.tokens, i % (d / g) * g + c);
            }));
    check(pk::make_grouped(pk::side::key, d, pk::group_axis::token, 0, width),
          textbook_error(x.tokens, x.heads * d, width, [&](int t, int i) { return x.value(i / d, t, i % d); }));
  }
}

}  // namespace

TEST_CASE("grouped formats on the sample cache have the error of a textbook quantiser", "[grouped][data]") {
  for (const char* name : {"k.npy", "v.npy"}) {
    tensor16 x(0, 0, 0);
    INFO(name);
    REQUIRE(read_npy(std::string(PACKKV_SAMPLE_DATA) + "/" + name, 1024, x));
    compare(x);
  }
}

TEST_CASE("grouped formats on further real caches have the error of a textbook quantiser", "[grouped][data]") {
  const char* const layers[] = {"qwen2.5-coder-0.5b/textB/L00", "smollm2-135m/textA/L10", "gemma3-270m/textB/L11"};
  for (const char* layer : layers)
    for (const char* name : {".k.npy", ".v.npy"}) {
      tensor16 x(0, 0, 0);
      const std::string path = std::string(PACKKV_SHARED_DATA) + "/" + layer + name;
      INFO(path);
      if (!read_npy(path, 512, x)) {
        std::printf("SKIPPED: %s is not there\n", path.c_str());
        return;
      }
      compare(x);
    }
}

TEST_CASE("on the sample, steps and transforms rank as they should", "[grouped][data]") {
  tensor16 k(0, 0, 0), v(0, 0, 0);
  REQUIRE(read_npy(std::string(PACKKV_SAMPLE_DATA) + "/k.npy", 2048, k));
  REQUIRE(read_npy(std::string(PACKKV_SAMPLE_DATA) + "/v.npy", 2048, v));
  const auto error = [](const tensor16& x, const pk::grouped_spec& spec) {
    double norm = 0.0;
    for (const std::uint16_t bits : x.bits) norm += std::pow(double(clean::from_fp16(bits)), 2);
    const double e = std::sqrt(squared_error(x, coded(spec, x).decode()) / norm);
    std::printf("  sample, %s: %.5f\n", describe(spec).c_str(), e);
    return e;
  };
  using pk::group_axis;
  using pk::make_grouped;
  using pk::side;
  using pk::step_rule;
  using pk::transform_kind;
  const int d = 128, all = 128;
  const double vector = error(k, make_grouped(side::key, d, group_axis::vector, all, 4));
  const double centred = error(
      k, make_grouped(side::key, d, group_axis::vector, all, 4, step_rule::min_max, transform_kind::identity, true));
  const double channel = error(k, make_grouped(side::key, d, group_axis::channel, 64, 4));
  CHECK(centred < vector);
  CHECK(channel < vector);
  const double min_max = error(k, make_grouped(side::key, d, group_axis::channel, 64, 2));
  const double gaussian = error(k, make_grouped(side::key, d, group_axis::channel, 64, 2, step_rule::gaussian_mean));
  CHECK(gaussian < min_max);
  const auto values = [&](step_rule step, transform_kind transform) {
    return error(v, make_grouped(side::value, d, group_axis::vector, all, 2, step, transform));
  };
  CHECK(values(step_rule::min_max, transform_kind::hadamard) < values(step_rule::min_max, transform_kind::identity));
  CHECK(values(step_rule::gaussian, transform_kind::hadamard) < values(step_rule::min_max, transform_kind::hadamard));
}
