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

// Before Python 3.14 such a thread is ended by unwinding, in PyEval_RestoreThread() itself, since
// the interpreter may begin to finalize while the thread waits there. Our frames could not be left
// so: their objects need the GIL, and a destructor must not throw. The thread that finalizes gets
// the GIL as ever. A cleanup, not a handler: within another one a handler could not catch it.
void take_gil(PyThreadState* state) {
  struct Sleep {
    bool has_gil = false;
    ~Sleep() {
      while (!has_gil) pause();
    }
  } otherwise;
  PyEval_RestoreThread(state);
  otherwise.has_gil = true;
}

void set_python_error(const Error& error) {
  try {
    const py::object type =
        py::module_::import("ml_debugger.errors").attr(class_name(error.kind()));
    const py::object exception = type(error.what(), error.hint());
    PyErr_SetObject(type.ptr(), exception.ptr());
  } catch (py::error_already_set& failure) {
    failure.restore();  // the package cannot be imported any more: say that, rather than nothing
  } catch (const std::exception&) {
    PyErr_NoMemory();  // how pybind11 says that an object could not be made
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
