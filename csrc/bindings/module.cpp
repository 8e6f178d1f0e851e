// ml_debugger._core: a table of contents.
#include <lmdb.h>

#include "bindings/bindings.h"
#include "bindings/tensor_source.h"
#include "store/record_format.h"

namespace {

// pybind11 remembers the bases of a class when it makes the first instance, in a function that no
// exception may leave: out of memory there would be the end of the process. So they are known now.
void remember_bases(const pybind11::module_& module) {
  PyTypeObject* bound = pybind11::detail::get_internals().default_metaclass;
  for (const auto& entry : pybind11::dict(module.attr("__dict__"))) {
    if (Py_TYPE(entry.second.ptr()) == bound)
      pybind11::detail::all_type_info(reinterpret_cast<PyTypeObject*>(entry.second.ptr()));
  }
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "C++ core of ml_debugger. Private: the public face is in the Python modules.";
  module.attr("FORMAT_VERSION") = mld::kFormatVersion;
  module.attr("LMDB_VERSION") = std::to_string(MDB_VERSION_MAJOR) + "." +
                                std::to_string(MDB_VERSION_MINOR) + "." +
                                std::to_string(MDB_VERSION_PATCH);
  module.attr("MAX_RANKS") = mld::kMaxRanks;
  module.attr("MAX_ATTEMPTS") = mld::kMaxAttempts;
  module.def("_use_exchange_api", &mld::use_exchange_api, pybind11::arg("use"));
  mld::bind_errors(module);
  mld::bind_store(module);
  mld::bind_recorder(module);
  mld::bind_segment(module);
  mld::bind_capture_hook(module);
  remember_bases(module);
}
