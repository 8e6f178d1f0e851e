// ml_debugger._core: a table of contents.
#include <lmdb.h>

#include "bindings/bindings.h"
#include "bindings/tensor_source.h"
#include "store/record_format.h"

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
}
