# SPDX-License-Identifier: Apache-2.0
# What the kernels need of registers and memory, source by source, for architectures that no machine here has, too.
if(NOT packkv_cuda)
  packkv_skipped_test(compile "no CUDA toolkit, nothing was compiled for sm_80, sm_90a, sm_100a and sm_120")
elseif(NOT PACKKV_PYTHON3)
  packkv_skipped_test(compile "no python3")
else()
  set(gates "${PACKKV_PYTHON3}" "${CMAKE_CURRENT_SOURCE_DIR}/compile/gates.py" --nvcc "${CMAKE_CUDA_COMPILER}")
  file(GLOB gate_sources CONFIGURE_DEPENDS compile/*.cu)
  foreach(source IN LISTS gate_sources)
    cmake_path(GET source STEM name)
    add_test(NAME compile.${name} COMMAND ${gates} "${source}")
    set_tests_properties(compile.${name} PROPERTIES TIMEOUT 900)
  endforeach()
  set_tests_properties(compile.general compile.decode_two_bit PROPERTIES COST 100)  # the longest, for four architectures
  add_test(NAME compile.every_kernel COMMAND ${gates} --complete)
endif()
