# SPDX-License-Identifier: Apache-2.0
# Runs one target over its corpus and on from there; new inputs, and those that fail, go to a folder that begins empty:
#   cmake -D target= -D corpus= -D work= -D options=-seed=1;-max_total_time=30 -P run.cmake
file(REMOVE_RECURSE "${work}")
file(MAKE_DIRECTORY "${work}/corpus" "${work}/failures")
execute_process(COMMAND "${target}" ${options} -print_final_stats=1 "-artifact_prefix=${work}/failures/"
  "${work}/corpus" "${corpus}" RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${result}: the input that failed lies in ${work}/failures")
endif()
