// What the binding files share. Python appears nowhere else in csrc/.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "capture/recorder.h"

namespace mld {

void bind_errors(pybind11::module_& module);
void bind_store(pybind11::module_& module);
void bind_recorder(pybind11::module_& module);
void bind_segment(pybind11::module_& module);
void bind_capture_hook(pybind11::module_& module);

// Raises the exception of `ml_debugger.errors` for an Error; leaves the Python error set.
void set_python_error(const Error& error);

// Before Python 3.14 a thread that asks a finalizing interpreter for the GIL is ended by unwinding,
// through frames that cannot be unwound. It sleeps instead; the process is about to end.
void park_if_finalizing();

// Waits without the GIL; looks for signals between slices (only the main thread sees any).
class GilWaitHooks final : public WaitHooks {
 public:
  void before_slice() override { state_ = PyEval_SaveThread(); }
  void after_slice() override {
    park_if_finalizing();
    PyEval_RestoreThread(state_);
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  }

 private:
  PyThreadState* state_ = nullptr;
};

// REQUIRES: the GIL. Copies one exact tensor into the call.
void capture_tensor(Recorder& recorder, ThreadCall& call, std::uint32_t column,
                    pybind11::handle tensor);

// A `_core.Recorder` for one that has none.
pybind11::object to_python(std::shared_ptr<Recorder> recorder);

// The C++ object behind a `_core.Recorder`; throws TypeError for anything else.
std::shared_ptr<Recorder> recorder_of(pybind11::handle object);

// Gives a new Python object of T's class what `holder` holds. pybind11's own ways allocate outside
// of every handler (py::init), or free the object twice if that fails (a holder that is returned).
template <class Holder>
void adopt(pybind11::detail::instance* self, Holder holder) {
  using T = typename Holder::element_type;
  auto place = self->get_value_and_holder(pybind11::detail::get_type_info(typeid(T)));
  place.value_ptr() = holder.get();
  try {
    place.type->init_instance(self, &holder);
  } catch (...) {
    place.value_ptr() = nullptr;
    throw;
  }
}

// The `__init__` of T's class, with the parameters of a constructor of T.
template <class T, class... Args, class Class, class... Extra>
void def_init(Class& type, const Extra&... extra) {
  const auto init = [](pybind11::detail::value_and_holder& self, Args... args) {
    adopt(self.inst, std::make_unique<T>(std::forward<Args>(args)...));
  };
  type.def("__init__", init, pybind11::detail::is_new_style_constructor(), extra...);
}

// Seconds as Python gives them; infinity and huge values become ten years.
std::chrono::nanoseconds to_duration(double seconds);

}  // namespace mld
