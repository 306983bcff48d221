# SPDX-License-Identifier: Apache-2.0
# Builds one program of tests/simt in a folder of its own and runs it under some schedules:
#   cmake -D source= -D build= -D program= -D compiler= -D flags= -D schedules=a,b -D generator= -D catch2= -P other_build.cmake
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${result}: ${command}")
  endif()
endfunction()

run("${CMAKE_COMMAND}" -S "${source}" -B "${build}" -G "${generator}" "-DCMAKE_CXX_COMPILER=${compiler}"
  "-DCMAKE_CXX_FLAGS=${flags}" -DCMAKE_BUILD_TYPE=None "-DCatch2_DIR=${catch2}" -DPACKKV_ENABLE_CUDA=OFF
  -DPACKKV_BUILD_EXAMPLES=OFF -DPACKKV_BUILD_BENCHMARKS=OFF -DPACKKV_BUILD_TESTS=ON)
run("${CMAKE_COMMAND}" --build "${build}" --target "${program}" --parallel 2)
string(REPLACE "," ";" schedules "${schedules}")
foreach(schedule IN LISTS schedules)
  run("${CMAKE_COMMAND}" -E env "PACKKV_SIMT_SCHEDULE=${schedule}" "${build}/tests/simt/${program}")
endforeach()
