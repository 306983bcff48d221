# SPDX-License-Identifier: Apache-2.0
# Installs the headers and the package files that find_package(packkv CONFIG) reads.
include(CMakePackageConfigHelpers)

set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/packkv")  # share/: nothing here depends on the architecture
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/packkv" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
  FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh" REGEX "/detail/nvrtc/[a-z_]+$")
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}")
install(TARGETS packkv EXPORT packkv-targets)
install(EXPORT packkv-targets NAMESPACE packkv:: DESTINATION "${package_dir}")
configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/packkv-config.cmake.in"
  "${PROJECT_BINARY_DIR}/packkv-config.cmake" INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/packkv-config-version.cmake"
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/packkv-config.cmake" "${PROJECT_BINARY_DIR}/packkv-config-version.cmake"
  DESTINATION "${package_dir}")
