# SPDX-License-Identifier: Apache-2.0
# Every header compiles alone and twice, next to hostile macros, and from several translation units of one program.
set(include_dir "${PROJECT_SOURCE_DIR}/include")

# packkv_header_sources(<out> <extension of the sources> <headers>...): one source per header, which includes it alone and
# twice, and one that includes them all after hostile.hpp.
function(packkv_header_sources out extension)
  set(sources)
  set(all "#include \"headers/hostile.hpp\"\n")
  foreach(header IN LISTS ARGN)
    string(MAKE_C_IDENTIFIER "${header}" name)
    set(source "${CMAKE_CURRENT_BINARY_DIR}/headers/${name}.${extension}")
    file(CONFIGURE OUTPUT "${source}" CONTENT "#include <${header}>\n#include <${header}>\n")
    list(APPEND sources "${source}")
    string(APPEND all "#include <${header}>\n")
  endforeach()
  if(sources)
    set(source "${CMAKE_CURRENT_BINARY_DIR}/headers/hostile.${extension}")
    file(CONFIGURE OUTPUT "${source}" CONTENT "${all}")
    list(APPEND sources "${source}")
  endif()
  set(${out} "${sources}" PARENT_SCOPE)
endfunction()

file(GLOB_RECURSE headers RELATIVE "${include_dir}" CONFIGURE_DEPENDS "${include_dir}/packkv/*.hpp")
packkv_header_sources(sources cpp ${headers})
add_library(packkv_header_checks OBJECT ${sources})
packkv_options(packkv_header_checks)
target_include_directories(packkv_header_checks PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")

# Linked together: a function that is not inline is defined twice.
file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/headers/main.cpp" CONTENT "int main() {}\n")
add_executable(packkv_header_link "${CMAKE_CURRENT_BINARY_DIR}/headers/main.cpp"
  $<TARGET_OBJECTS:packkv_header_checks>)
packkv_options(packkv_header_link)
target_link_libraries(packkv_header_link PRIVATE Threads::Threads)

if(packkv_cuda)
  file(GLOB_RECURSE cuda_headers RELATIVE "${include_dir}" CONFIGURE_DEPENDS "${include_dir}/packkv/*.cuh")
  packkv_header_sources(cuda_sources cu ${cuda_headers})
  if(cuda_sources)
    add_library(packkv_cuda_header_checks OBJECT ${cuda_sources})
    packkv_options(packkv_cuda_header_checks)
    target_include_directories(packkv_cuda_header_checks PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
    add_executable(packkv_cuda_header_link "${CMAKE_CURRENT_BINARY_DIR}/headers/main.cpp"
      $<TARGET_OBJECTS:packkv_cuda_header_checks>)
    packkv_options(packkv_cuda_header_link)
    set_target_properties(packkv_cuda_header_link PROPERTIES LINKER_LANGUAGE CUDA)
  endif()
endif()

# The other compilers and C++20: syntax only.
find_program(PACKKV_CLANGXX clang++)
mark_as_advanced(PACKKV_CLANGXX)
set(check_headers "${CMAKE_CURRENT_SOURCE_DIR}/check_headers.sh")
add_test(NAME headers.host_compiler COMMAND "${check_headers}" "${CMAKE_CXX_COMPILER}" "${include_dir}" c++20)
if(PACKKV_CLANGXX)
  add_test(NAME headers.clang COMMAND "${check_headers}" "${PACKKV_CLANGXX}" "${include_dir}" c++17 c++20)
else()
  packkv_skipped_test(headers.clang "clang++ was not found")
endif()

# Which header may include which.
if(PACKKV_PYTHON3)
  add_test(NAME headers.direction
    COMMAND "${PACKKV_PYTHON3}" "${CMAKE_CURRENT_SOURCE_DIR}/headers/direction.py" "${include_dir}")
else()
  packkv_skipped_test(headers.direction "no python3")
endif()

find_program(PACKKV_CLANG_TIDY NAMES clang-tidy-14 clang-tidy)
mark_as_advanced(PACKKV_CLANG_TIDY)
if(PACKKV_CLANG_TIDY)
  add_test(NAME headers.tidy
    COMMAND "${CMAKE_CURRENT_SOURCE_DIR}/check_tidy.sh" "${PACKKV_CLANG_TIDY}" "${PROJECT_SOURCE_DIR}")
  set_tests_properties(headers.tidy PROPERTIES ${skip_property} TIMEOUT 900 COST 80)  # CPU seconds, so that it starts early
else()
  packkv_skipped_test(headers.tidy "clang-tidy was not found")
endif()
