# SPDX-License-Identifier: Apache-2.0
# What packkv's own programs (tests, examples, benchmarks) share; users of the library never see it.
get_property(multi_config GLOBAL PROPERTY GENERATOR_IS_MULTI_CONFIG)
if(PROJECT_IS_TOP_LEVEL AND NOT multi_config AND NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Release, RelWithDebInfo or Debug" FORCE)
endif()

find_program(PACKKV_CCACHE ccache)
mark_as_advanced(PACKKV_CCACHE)
if(PACKKV_CCACHE)
  foreach(language CXX CUDA)
    if(NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER "${PACKKV_CCACHE}")
    endif()
  endforeach()
endif()

# --------------------------------------------------------------------------------------------------------------- CUDA
set(CMAKE_CUDA_ARCHITECTURES "${PACKKV_CUDA_ARCHITECTURES}")
if(PACKKV_QUICK_CUDA)  # PTX alone: the machine code is the compile gates' part
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^([0-9]+a?)$" "\\1-virtual")
endif()
set(packkv_cuda OFF)
if(PACKKV_ENABLE_CUDA)  # AUTO is true, too
  if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(PACKKV_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
    mark_as_advanced(PACKKV_NVCC)
    if(PACKKV_NVCC)
      set(CMAKE_CUDA_COMPILER "${PACKKV_NVCC}")
    endif()
  endif()
  if(PACKKV_ENABLE_CUDA STREQUAL "AUTO")
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(packkv_cuda ON)
    else()
      message(STATUS "packkv: no CUDA compiler found, only the host part is configured")
    endif()
  else()
    set(packkv_cuda ON)
  endif()
endif()
if(packkv_cuda)
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
    message(FATAL_ERROR "packkv: CUDA 12.0 or newer is needed, found ${CMAKE_CUDA_COMPILER_VERSION}; "
                        "configure with -DPACKKV_ENABLE_CUDA=OFF for the host part")
  endif()
endif()

if(packkv_cuda AND PACKKV_QUICK_CUDA)
  include(CheckCompilerFlag)
  check_compiler_flag(CUDA "--Ofast-compile=max" PACKKV_HAS_FAST_COMPILE)
endif()

find_package(Threads REQUIRED)

# packkv_options(<target>): the language level and warnings of every program here.
function(packkv_options target)
  target_link_libraries(${target} PRIVATE packkv::packkv)
  set_target_properties(${target} PROPERTIES CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF)
  set(host -Wall -Wextra)
  if(PACKKV_WERROR)
    list(APPEND host -Werror)
    target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings>")
  endif()
  if(PACKKV_QUICK_CUDA AND PACKKV_HAS_FAST_COMPILE)
    target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--Ofast-compile=max>")
  endif()
  if(target MATCHES "^packkv_simt_")  # kernels: g++ 12 does not see that members are read where a flag says so alone
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-maybe-uninitialized>)
  endif()
  list(JOIN host "," host_of_nvcc)
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:${host};-Wshadow>" "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${host_of_nvcc}>")
endfunction()
