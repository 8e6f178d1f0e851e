# What can be chosen, and the compile flags of our own targets (mld_own_target).

if(DEFINED SKBUILD)
  set(mld_packaging ON)
  set(mld_developing OFF)
else()
  set(mld_packaging OFF)
  set(mld_developing ON)
endif()

option(MLD_BUILD_PYTHON "Build the extension ml_debugger._core" ${mld_packaging})
option(MLD_BUILD_TESTS "Build the tests of the core" ${mld_developing})
# Off unless asked for (presets and Makefile do): the warnings of a compiler newer than ours must not stop an install.
option(MLD_WERROR "Treat warnings in our own code as errors" OFF)
option(MLD_LMDB_SYSTEM "Link the system's liblmdb instead of building LMDB" OFF)
set(MLD_LMDB_SOURCE "" CACHE STRING "Directory or archive with the LMDB source; empty: the environment variable, or pip")
set(MLD_LMDB_CACHE "${CMAKE_CURRENT_BINARY_DIR}/lmdb" CACHE PATH "Where a downloaded LMDB source is kept")
set(MLD_SANITIZE "" CACHE STRING "Sanitizers for our own targets, such as thread or address,undefined")

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Release, Debug, RelWithDebInfo" FORCE)
endif()

set(CMAKE_C_STANDARD 11)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_C_VISIBILITY_PRESET hidden)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

# Release is -O3 without -march: a wheel runs on every machine of its platform.
if(NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  message(FATAL_ERROR "ml_debugger needs GCC 12, Clang 14 or newer; this is ${CMAKE_CXX_COMPILER_ID}. Set CXX and CC.")
endif()

# Flags for targets made of our own code only: LMDB and pybind11 have warnings, and false alarms under sanitizers.
function(mld_own_target target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wconversion)
  if(MLD_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(MLD_SANITIZE)
    set(flags -fsanitize=${MLD_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_compile_options(${target} PRIVATE ${flags})
    target_link_options(${target} PUBLIC ${flags})
  endif()
endfunction()
