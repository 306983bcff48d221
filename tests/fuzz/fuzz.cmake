# SPDX-License-Identifier: Apache-2.0
# ctest fuzz.<target>: each target over its corpus, then 30 s of fuzzing from there. CMakeLists.txt in this folder builds
# the targets in a folder of their own, within the test fuzz.build.
set(fuzz_seconds 30)
file(GLOB fuzz_targets RELATIVE "${CMAKE_CURRENT_LIST_DIR}" CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/fuzz_*.cpp")

set(fuzz_reason "")
if(NOT PACKKV_CLANGXX)
  set(fuzz_reason "clang++ was not found")
else()  # clang++ may come without the library
  set(fuzz_probe "${CMAKE_CURRENT_BINARY_DIR}/fuzz_probe")
  file(CONFIGURE OUTPUT "${fuzz_probe}.cpp" CONTENT
    "extern \"C\" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n")
  execute_process(COMMAND "${PACKKV_CLANGXX}" -fsanitize=fuzzer,address,undefined "${fuzz_probe}.cpp" -o "${fuzz_probe}"
    RESULT_VARIABLE fuzz_result OUTPUT_QUIET ERROR_QUIET)
  if(NOT fuzz_result EQUAL 0)
    set(fuzz_reason "clang++ cannot link -fsanitize=fuzzer")
  endif()
endif()

if(packkv_builds_again AND NOT fuzz_reason)
  set(fuzz_build "${PROJECT_BINARY_DIR}/fuzz")
  add_test(NAME fuzz.build COMMAND "${CMAKE_COMMAND}" -D source=${CMAKE_CURRENT_LIST_DIR} -D build=${fuzz_build}
    -D generator=${CMAKE_GENERATOR} -D options=-DCMAKE_CXX_COMPILER=${PACKKV_CLANGXX} -D target=all -D jobs=1
    -P "${CMAKE_CURRENT_SOURCE_DIR}/other_build.cmake")
  set_tests_properties(fuzz.build PROPERTIES TIMEOUT 900 FIXTURES_SETUP fuzz_targets)
endif()

foreach(source IN LISTS fuzz_targets)
  string(REGEX REPLACE "fuzz_(.*)\\.cpp" "\\1" name "${source}")
  if(fuzz_reason)
    packkv_skipped_test(fuzz.${name} "${fuzz_reason}")
  elseif(packkv_builds_again)
    # The seed is fixed: where a run fails, it is the change's doing. scripts/fuzz takes others.
    add_test(NAME fuzz.${name} COMMAND "${CMAKE_COMMAND}" -D target=${fuzz_build}/fuzz_${name}
      -D corpus=${CMAKE_CURRENT_LIST_DIR}/corpus/${name} -D work=${fuzz_build}/work/${name}
      -D "options=-max_total_time=${fuzz_seconds};-seed=1;-timeout=10;-rss_limit_mb=1024"
      -P "${CMAKE_CURRENT_LIST_DIR}/run.cmake")
    set_tests_properties(fuzz.${name} PROPERTIES TIMEOUT 300 FIXTURES_REQUIRED fuzz_targets)
  endif()
endforeach()
