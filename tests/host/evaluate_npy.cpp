// SPDX-License-Identifier: Apache-2.0
// The .npy reader of examples/evaluate: what numpy writes is read, everything else is refused with a sentence.
#include <evaluate/npy.hpp>

#include "../support/catch.hpp"
#include "evaluate_files.hpp"

using evaluate::npy_array;
using evaluate::outcome;
using packkv_test::npy_header_text;
using packkv_test::npy_prefix;

namespace {

const std::string data24(24 * 2, '\0');  // zeros for the shape (2, 3, 4)

/// The error of opening a file of these bytes; empty if it opens.
std::string error_of(const std::string& bytes) {
  const packkv_test::temporary_folder folder;
  npy_array array;
  const outcome o = npy_array::open(folder.write("x.npy", bytes), array);
  return o.error();
}

bool refused(const std::string& bytes, const std::string& reason) {
  const std::string error = error_of(bytes);
  INFO("error: " << error);
  CHECK(error.find('\n') == std::string::npos);
  return error.find(reason) != std::string::npos;
}

}  // namespace

TEST_CASE("evaluate npy: a valid file of each version gives its shape and elements") {
  const packkv_test::temporary_folder folder;
  packkv_test::random_source random(1);
  const packkv_test::tensor x = packkv_test::random_tensor(random, 2, 3, 4);
  const std::string data(reinterpret_cast<const char*>(x.bits.data()), x.bits.size() * 2);
  for (int version = 1; version <= 3; ++version) {
    npy_array array;
    const std::string bytes = npy_prefix(npy_header_text("(2, 3, 4)"), version) + data;
    REQUIRE(npy_array::open(folder.write("x.npy", bytes), array));
    CHECK(array.extent(0) == 2);
    CHECK(array.extent(1) == 3);
    CHECK(array.extent(2) == 4);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 3; ++j)
        for (int k = 0; k < 4; ++k) REQUIRE(array.row(i, j)[k] == x.bits[x.index(i, j, k)]);
  }
  // Keys in any order, double quotes, no trailing commas.
  CHECK(error_of(npy_prefix("{\"shape\":(2,3,4),\"fortran_order\":False,\"descr\":\"<f2\"}") + data).empty());
}

TEST_CASE("evaluate npy: what is no .npy file is refused") {
  CHECK(refused("", "not a .npy file"));
  CHECK(refused("\x93NUMPY", "not a .npy file"));
  CHECK(refused("PK\x03\x04 this is a zip, perhaps an .npz", "not a .npy file"));
  std::string bytes = npy_prefix(npy_header_text("(2, 3, 4)")) + data24;
  bytes[6] = 4;
  CHECK(refused(bytes, "unknown version"));
  npy_array array;
  CHECK_FALSE(npy_array::open("/nonexistent/x.npy", array));
  CHECK_FALSE(npy_array::open("/tmp", array));
  CHECK_FALSE(npy_array::open("/dev/zero", array));
}

TEST_CASE("evaluate npy: headers that lie about sizes are refused") {
  const std::string good = npy_prefix(npy_header_text("(2, 3, 4)"));
  CHECK(error_of(good + data24).empty());
  CHECK(refused(good + data24.substr(1), "truncated"));
  CHECK(refused(good, "truncated"));
  CHECK(refused(good + data24 + "x", "but the file has"));
  CHECK(refused(good.substr(0, 40), "ends inside the .npy header"));
  CHECK(refused(std::string("\x93NUMPY\x01\x00\xff\xff", 10), "ends inside the .npy header"));
  CHECK(refused(std::string("\x93NUMPY\x02\x00\xff\xff\xff\xff", 12), "larger than 64 KiB"));
  CHECK(refused(std::string("\x93NUMPY\x02\x00\xff\xff", 10), "ends inside the .npy header"));
  for (const char* shape :
       {"(9223372036854775807, 2, 3)", "(4294967296, 4294967296, 4294967296)", "(3037000500, 3037000500, 1)"})
    CHECK(refused(npy_prefix(npy_header_text(shape)) + data24, "overflows"));
  CHECK(refused(npy_prefix(npy_header_text("(9223372036854775808, 1, 1)")) + data24, "no number of 63 bits"));
  CHECK(refused(npy_prefix(npy_header_text("(1000000000, 1000, 128)")) + data24, "truncated"));
}

TEST_CASE("evaluate npy: shapes and layouts other than three dimensions in C order are refused") {
  const auto with_shape = [](const char* shape) { return npy_prefix(npy_header_text(shape)) + data24; };
  CHECK(refused(with_shape("(24,)"), "1 dimensions"));
  CHECK(refused(with_shape("()"), "0 dimensions"));
  CHECK(refused(with_shape("(2, 3, 2, 2)"), "4 dimensions"));
  CHECK(refused(with_shape("(0, 3, 4)"), "zero"));
  CHECK(refused(with_shape("(-2, 3, 4)"), "negative"));
  CHECK(refused(with_shape("(2, 3.0, 4)"), "tuple"));
  CHECK(refused(with_shape("(2 3 4)"), "tuple"));
  CHECK(refused(with_shape("2, 3, 4"), "tuple"));
  CHECK(refused(with_shape("(2, 3, 4"), "dimension"));
  std::string many = "(";
  for (int i = 0; i < 5000; ++i) many += "1,";
  CHECK(refused(with_shape((many + ")").c_str()), "too many dimensions"));
  CHECK(refused(npy_prefix(npy_header_text("(2, 3, 4)", "'<f2'", "True")) + data24, "Fortran"));
  CHECK(refused(npy_prefix(npy_header_text("(2, 3, 4)", "'<f2'", "0")) + data24, "fortran_order"));
}

TEST_CASE("evaluate npy: other dtypes are refused by name") {
  for (const char* descr : {"'<f4'", "'>f2'", "'<u2'", "'|O'", "'<f8'", "'f2'", "''"})
    CHECK(refused(npy_prefix(npy_header_text("(2, 3, 4)", descr)) + data24, "only little-endian float16"));
  CHECK(refused(npy_prefix(npy_header_text("(2, 3, 4)", "[('a', '<f2')]")) + data24, "structured"));
}

TEST_CASE("evaluate npy: malformed dictionaries are refused") {
  for (const char* text : {"", "{", "}", "{}", "[]", "{'descr': '<f2'}", "{'descr': '<f2', 'fortran_order': False, }",
                           "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3, 4)",
                           "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3, 4)} x",
                           "{'descr': '<f2', 'descr': '<f2', 'fortran_order': False, 'shape': (2, 3, 4)}",
                           "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3, 4), 'extra': 1}",
                           "{'descr' '<f2', 'fortran_order': False, 'shape': (2, 3, 4)}",
                           "{'descr': '<f2, 'fortran_order': False, 'shape': (2, 3, 4)}"})
    CHECK(refused(npy_prefix(text) + data24, "."));
}

TEST_CASE("evaluate npy: no prefix and no single changed header byte is read out of bounds") {
  const std::string good = npy_prefix(npy_header_text("(2, 3, 4)"));
  for (std::size_t n = 0; n < good.size(); ++n) CHECK_FALSE(error_of(good.substr(0, n)).empty());
  packkv_test::random_source random(7);
  for (int i = 0; i < 400; ++i) {
    std::string bytes = good + data24;
    bytes[static_cast<std::size_t>(random.between(0, static_cast<int>(good.size()) - 1))] =
        static_cast<char>(random.bits());
    error_of(bytes);  // must return; a change of the padding may even be accepted
  }
}

TEST_CASE("evaluate npy: NaN and infinity are refused with their place") {
  packkv_test::random_source random(3);
  for (const std::uint16_t bits : {0x7c00, 0xfc00, 0x7e00, 0xffff, 0x7c01}) {
    packkv_test::tensor x = packkv_test::random_tensor(random, 2, 3, 4);
    x.bits[x.index(1, 2, 3)] = bits;
    CHECK(refused(x.npy(), "[1, 2, 3] is NaN or infinite"));
  }
}
