// The one place where the core's errors become Python's.
#include <unistd.h>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace mld {
namespace {

const char* class_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidInput:
      return "InvalidInputError";
    case ErrorKind::kInvalidType:
      return "InvalidTypeError";
    case ErrorKind::kNotFound:
      return "NotFoundError";
    case ErrorKind::kTracerClosed:
      return "TracerClosedError";
    case ErrorKind::kTraceInUse:
      return "TraceInUseError";
    case ErrorKind::kStorage:
      return "StorageError";
    case ErrorKind::kDiskBudget:
      return "DiskBudgetError";
    case ErrorKind::kCorruptData:
      return "CorruptDataError";
    case ErrorKind::kRingOverflow:
      return "RingOverflowError";
    case ErrorKind::kTraceStall:
      return "TraceStallError";
    case ErrorKind::kStreamCapture:
      return "StreamCaptureError";
  }
  return "MlDebuggerError";
}

}  // namespace

void park_if_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  const bool finalizing = Py_IsFinalizing() != 0;
#else
  const bool finalizing = _Py_IsFinalizing() != 0;
#endif
  while (finalizing) pause();
}

void set_python_error(const Error& error) {
  try {
    const py::object type =
        py::module_::import("ml_debugger.errors").attr(class_name(error.kind()));
    const py::object exception = type(error.what(), error.hint());
    PyErr_SetObject(type.ptr(), exception.ptr());
  } catch (py::error_already_set& failure) {
    failure.restore();  // the package cannot be imported any more: say that, rather than nothing
  }
}

void bind_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      set_python_error(error);
    }
  });
}

}  // namespace mld
