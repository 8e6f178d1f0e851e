// What the binding files share. Python appears nowhere else in csrc/.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <memory>
#include <new>
#include <utility>

#include "capture/recorder.h"
#include "wait_hooks.h"

namespace mld {

void bind_errors(pybind11::module_& module);
void bind_store(pybind11::module_& module);
void bind_recorder(pybind11::module_& module);
void bind_segment(pybind11::module_& module);
void bind_capture_hook(pybind11::module_& module);

// Raises the exception of `ml_debugger.errors` for an Error; leaves the Python error set. Throws
// nothing. Not noexcept, since a thread that a finalizing interpreter ends in the midst of Python
// code is unwound through here, which must neither be stopped nor caught.
void set_python_error(const Error& error);

// The body of a C function of a Python type, whose frame no exception may leave.
template <class Body>
PyObject* without_exceptions(Body body) {
  try {
    return body();
  } catch (const Error& error) {
    set_python_error(error);
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Takes the GIL back that PyEval_SaveThread() gave away. The one way to do so here, since a thread
// for which a finalizing interpreter has no GIL any more sleeps in it until the process ends.
void take_gil(PyThreadState* state);

// Waits without the GIL; looks for signals between slices (only the main thread sees any). For work
// that needs Python between its waits, or that mostly need not wait.
class GilWaitHooks final : public WaitHooks {
 public:
  void before_slice() override { state_ = PyEval_SaveThread(); }
  void after_slice() override {
    take_gil(state_);
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  }

 private:
  PyThreadState* state_ = nullptr;
};

// A scope without the GIL; if that is given to a wait as its hooks, the GIL is taken between slices
// to look for signals. pybind11's gil_scoped_release would end the process where take_gil() sleeps.
class Unlocked final : public WaitHooks {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() override {
    if (state_ != nullptr) take_gil(state_);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

  // A signal's exception leaves the scope with the GIL.
  void after_slice() override {
    take_gil(std::exchange(state_, nullptr));
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
    state_ = PyEval_SaveThread();
  }

 private:
  PyThreadState* state_;  // null: the GIL is held
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
