# Makes the target mld_lmdb: LMDB 0.9.36, static, hidden symbols.
#
# The source is, in this order: the system's library (MLD_LMDB_SYSTEM), a directory or archive (MLD_LMDB_SOURCE, also
# from the environment; no network), or the source distribution of the PyPI package `lmdb`, which pip fetches by name.
# That package applies patches of its own when it is built; we compile the files as LMDB's authors wrote them.

set(MLD_LMDB_VERSION "0.9.36")
set(mld_lmdb_package "lmdb==3.0.0") # the release that carries this LMDB in lib/
set(mld_lmdb_sha256 "06dda0723545e14d56ac7dcd6f582d9922c2ed5e16f1c3f8d0e670a96ec2ee65")
set(mld_lmdb_remedy
    "Set MLD_LMDB_SOURCE to a directory or archive with the source of LMDB ${MLD_LMDB_VERSION} (such as the source "
    "distribution of the PyPI package ${mld_lmdb_package}), or pass -DMLD_LMDB_SYSTEM=ON to use the system's library.")
string(CONCAT mld_lmdb_remedy ${mld_lmdb_remedy})

# The version that an lmdb.h declares, or an empty string.
function(mld_lmdb_header_version header result)
  file(STRINGS "${header}" lines REGEX "^#define[ \t]+MDB_VERSION_(MAJOR|MINOR|PATCH)[ \t]+[0-9]+")
  string(REGEX REPLACE "[^0-9;]" "" version "${lines}")
  string(REPLACE ";" "." version "${version}")
  set(${result} "${version}" PARENT_SCOPE)
endfunction()

# Sets MLD_LMDB_DIR to the directory below `root` that holds mdb.c of the right version.
function(mld_lmdb_find root)
  set(seen "")
  file(GLOB headers "${root}/lmdb.h" "${root}/lib/lmdb.h" "${root}/libraries/liblmdb/lmdb.h" "${root}/*/lmdb.h"
       "${root}/*/lib/lmdb.h" "${root}/*/libraries/liblmdb/lmdb.h")
  foreach(header IN LISTS headers)
    get_filename_component(dir "${header}" DIRECTORY)
    mld_lmdb_header_version("${header}" version)
    list(APPEND seen "${version}")
    if(version STREQUAL MLD_LMDB_VERSION AND EXISTS "${dir}/mdb.c" AND EXISTS "${dir}/midl.c")
      set(MLD_LMDB_DIR "${dir}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  if(NOT seen)
    set(seen "no lmdb.h")
  endif()
  message(FATAL_ERROR "Expected the source of LMDB ${MLD_LMDB_VERSION} in ${root}, found ${seen}. ${mld_lmdb_remedy}")
endfunction()

# Unpacks `archive` into the build tree, anew whenever its content changed, and sets MLD_LMDB_DIR.
function(mld_lmdb_unpack archive)
  file(SHA256 "${archive}" hash)
  string(SUBSTRING "${hash}" 0 16 hash)
  set(root "${CMAKE_CURRENT_BINARY_DIR}/lmdb-source-${hash}")
  if(NOT EXISTS "${root}/unpacked")
    file(REMOVE_RECURSE "${root}")
    file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${root}")
    file(TOUCH "${root}/unpacked")
  endif()
  mld_lmdb_find("${root}")
  set(MLD_LMDB_DIR "${MLD_LMDB_DIR}" PARENT_SCOPE)
endfunction()

# Asks pip for the package, unless the cache has it, and sets `result` to the archive. Its SHA-256 is checked either way.
function(mld_lmdb_download result)
  if(NOT Python_EXECUTABLE)
    find_package(Python QUIET COMPONENTS Interpreter)
  endif()
  if(NOT Python_EXECUTABLE)
    message(FATAL_ERROR "LMDB is fetched with pip, and no Python was found. ${mld_lmdb_remedy}")
  endif()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/scripts/fetch_lmdb.py" "${mld_lmdb_package}" --sha256
            "${mld_lmdb_sha256}" --cache "${MLD_LMDB_CACHE}"
    RESULT_VARIABLE status
    OUTPUT_VARIABLE archive
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "The source of LMDB ${MLD_LMDB_VERSION} could not be fetched (see above). ${mld_lmdb_remedy}")
  endif()
  set(${result} "${archive}" PARENT_SCOPE)
endfunction()

function(mld_lmdb_use_system)
  find_path(MLD_LMDB_INCLUDE_DIR lmdb.h)
  find_library(MLD_LMDB_LIBRARY lmdb)
  if(NOT MLD_LMDB_INCLUDE_DIR OR NOT MLD_LMDB_LIBRARY)
    message(FATAL_ERROR "MLD_LMDB_SYSTEM=ON, but liblmdb and lmdb.h were not found: install liblmdb-dev (Debian), "
                        "lmdb-devel (Fedora) or lmdb (Homebrew), or leave the option off.")
  endif()
  mld_lmdb_header_version("${MLD_LMDB_INCLUDE_DIR}/lmdb.h" version)
  # LMDB 1.0 writes another file format, which readers of 0.9 refuse.
  if(NOT version MATCHES "^0\\.9\\.")
    message(FATAL_ERROR "Expected the system's LMDB to be 0.9.x, found ${version}. Leave MLD_LMDB_SYSTEM off.")
  endif()
  if(version VERSION_LESS MLD_LMDB_VERSION)
    message(WARNING "The system's LMDB ${version} lacks fixes that ${MLD_LMDB_VERSION} has.")
  endif()
  message(STATUS "LMDB ${version}: ${MLD_LMDB_LIBRARY}")
  add_library(mld_lmdb INTERFACE)
  target_compile_definitions(mld_lmdb INTERFACE MLD_LMDB_SYSTEM)
  target_include_directories(mld_lmdb SYSTEM INTERFACE "${MLD_LMDB_INCLUDE_DIR}")
  target_link_libraries(mld_lmdb INTERFACE "${MLD_LMDB_LIBRARY}")
endfunction()

function(mld_lmdb_build)
  set(source "${MLD_LMDB_SOURCE}")
  if(NOT source) # read at each configure, never cached, so that a change of the environment counts
    set(source "$ENV{MLD_LMDB_SOURCE}")
  endif()
  if(NOT source)
    mld_lmdb_download(archive)
    mld_lmdb_unpack("${archive}")
  elseif(IS_DIRECTORY "${source}")
    mld_lmdb_find("${source}")
  elseif(EXISTS "${source}")
    mld_lmdb_unpack("${source}")
  else()
    message(FATAL_ERROR "MLD_LMDB_SOURCE names ${source}, which does not exist. ${mld_lmdb_remedy}")
  endif()
  message(STATUS "LMDB ${MLD_LMDB_VERSION}: ${MLD_LMDB_DIR}")

  # Release and RelWithDebInfo define NDEBUG: an assert of LMDB would abort() the training.
  add_library(mld_lmdb STATIC "${MLD_LMDB_DIR}/mdb.c" "${MLD_LMDB_DIR}/midl.c")
  target_include_directories(mld_lmdb SYSTEM INTERFACE "${MLD_LMDB_DIR}")
  target_compile_options(mld_lmdb PRIVATE -w)
  # Its pages may be ours, and it writes through us: csrc/store/page_loan.h, early_write_back.h, meta_write.h.
  target_compile_definitions(mld_lmdb PRIVATE malloc=mld_lmdb_malloc free=mld_lmdb_free writev=mld_lmdb_writev
                                              pwrite=mld_lmdb_pwrite)
  target_link_libraries(mld_lmdb PUBLIC Threads::Threads mld_lmdb_needs)

  # A wheel contains LMDB's object code, so it carries LMDB's licence.
  find_file(license LICENSE PATHS "${MLD_LMDB_DIR}" "${MLD_LMDB_DIR}/.." NO_DEFAULT_PATH NO_CACHE)
  if(MLD_BUILD_PYTHON AND license)
    install(FILES "${license}" DESTINATION ml_debugger RENAME LICENSE.lmdb)
  endif()
endfunction()

find_package(Threads REQUIRED)
if(MLD_LMDB_SYSTEM)
  mld_lmdb_use_system()
else()
  mld_lmdb_build()
endif()
