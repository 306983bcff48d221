# SPDX-License-Identifier: Apache-2.0
# Builds one target in a folder of its own, as another compiler or with a sanitizer, and runs a program of it, once in each
# environment. Items of lists stand between bars:
#   cmake -D source= -D build= -D generator= -D "options=-DA=1|-DB=2" -D target= -D jobs=
#     [-D program=path/in/build -D "environments=NAME=1|NAME=2"] -P other_build.cmake
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${result}: ${command}")
  endif()
endfunction()

string(REPLACE "|" ";" options "${options}")
string(REPLACE "|" ";" environments "${environments}")
run("${CMAKE_COMMAND}" -S "${source}" -B "${build}" -G "${generator}" ${options})
run("${CMAKE_COMMAND}" --build "${build}" --target "${target}" --parallel "${jobs}")
foreach(environment IN LISTS environments)
  run("${CMAKE_COMMAND}" -E env "${environment}" "${build}/${program}")
endforeach()
