# The extension ml_debugger._core: the core plus csrc/bindings, the only place that includes Python.

find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 CONFIG REQUIRED)

pybind11_add_module(_core MODULE NO_EXTRAS ${MLD_BINDING_SOURCES})
target_link_libraries(_core PRIVATE mld_core)
mld_own_target(_core)
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  # Static libraries stay invisible, so that another LMDB in the process (the PyPI package) never meets ours.
  target_link_options(_core PRIVATE "LINKER:--exclude-libs,ALL")
endif()
install(TARGETS _core LIBRARY DESTINATION ml_debugger)
