// The forward hook: a raw CPython type, because a hook runs for every layer of every step and
// pybind11's dispatch alone would cost more than the copy of a small tensor.
//
// It holds no state of a call; that belongs to the thread (ThreadCall). A deepcopy or a pickle of a
// traced model must neither fail nor record, so both turn the hook into a do-nothing callable of
// the standard library, which also loads where this package is not installed.
//
// torch.compile looks at a callable object's type and inlines its __call__ if that is a Python
// function. So the type's attribute __call__ is one (tracer/compiled.py), and its slot is the C
// function below: the interpreter uses the slot, the compiler the attribute. Python itself does the
// same to methods with METH_COEXIST. The instance dictionary holds what the Python function reads.
#include <pybind11/pybind11.h>
#include <structmember.h>

#include <new>

#include "bindings/bindings.h"
#include "bindings/tensor_source.h"

namespace py = pybind11;

namespace mld {
namespace {

struct CaptureHook {
  PyObject_HEAD vectorcallfunc vectorcall;
  PyObject* weak_references;
  PyObject* attributes;
  PyObject* prepare;
  std::shared_ptr<Recorder> recorder;
  std::uint32_t column;
  bool always_prepare;
};

// The output goes as it stands when it is one plain tensor whose rows are the batch; all else is
// prepare's.
bool is_plain(const CaptureHook& hook, const ThreadCall& call, PyObject* output) {
  return !hook.always_prepare && is_exact_tensor(output) &&
         first_dimension(output) == call.batch_size;
}

PyObject* hook_call(PyObject* self, PyObject* const* arguments, std::size_t flags,
                    PyObject* keywords) {
  auto& hook = *reinterpret_cast<CaptureHook*>(self);
  const Py_ssize_t count = PyVectorcall_NARGS(flags);
  if (count < 2 || (keywords != nullptr && PyTuple_GET_SIZE(keywords) != 0)) {
    PyErr_SetString(PyExc_TypeError,
                    "CaptureHook is called as (module, arguments, output) or (module, arguments)");
    return nullptr;
  }
  ThreadCall* call = hook.recorder->current_call();
  if (call == nullptr || hook.recorder->is_inert()) Py_RETURN_NONE;
  PyObject* output = arguments[count - 1];
  return without_exceptions([&]() -> PyObject* {
    // Activation checkpointing runs layers again in backward, which may lie inside of the forward.
    if (is_in_backward()) Py_RETURN_NONE;
    if (is_plain(hook, *call, output)) {
      capture_tensor(*hook.recorder, *call, hook.column, output);
    } else {
      const auto tensor =
          py::reinterpret_steal<py::object>(PyObject_CallOneArg(hook.prepare, output));
      if (!tensor) return nullptr;
      capture_tensor(*hook.recorder, *call, hook.column, tensor);
    }
    Py_RETURN_NONE;
  });
}

PyObject* hook_new(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"recorder", "column", "prepare", "always_prepare", nullptr};
  PyObject *recorder = nullptr, *prepare = nullptr;
  unsigned column = 0;
  int always_prepare = 0;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OIO|$p", const_cast<char**>(names),
                                   &recorder, &column, &prepare, &always_prepare)) {
    return nullptr;
  }
  return without_exceptions([&]() -> PyObject* {
    std::shared_ptr<Recorder> owner = recorder_of(recorder);
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    auto* hook = reinterpret_cast<CaptureHook*>(self);
    hook->vectorcall = hook_call;
    new (&hook->recorder) std::shared_ptr<Recorder>(std::move(owner));
    Py_INCREF(prepare);
    hook->prepare = prepare;
    hook->column = column;
    hook->always_prepare = always_prepare != 0;
    return self;
  });
}

int hook_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<CaptureHook*>(self)->attributes);
  Py_VISIT(reinterpret_cast<CaptureHook*>(self)->prepare);
  return 0;
}

int hook_clear(PyObject* self) {
  Py_CLEAR(reinterpret_cast<CaptureHook*>(self)->attributes);
  Py_CLEAR(reinterpret_cast<CaptureHook*>(self)->prepare);
  return 0;
}

void hook_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  auto* hook = reinterpret_cast<CaptureHook*>(self);
  if (hook->weak_references != nullptr) PyObject_ClearWeakRefs(self);
  Py_CLEAR(hook->attributes);
  Py_CLEAR(hook->prepare);
  hook->recorder.~shared_ptr();
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

// contextlib.nullcontext().__exit__: takes three arguments, does nothing, returns None.
py::object do_nothing() {
  return py::module_::import("contextlib").attr("nullcontext")().attr("__exit__");
}

PyObject* hook_deepcopy(PyObject*, PyObject*) {
  return without_exceptions([] { return do_nothing().release().ptr(); });
}

PyObject* hook_reduce(PyObject*, PyObject*) {
  return without_exceptions([] {
    const py::object context = py::module_::import("contextlib").attr("nullcontext")();
    const py::object getattr = py::module_::import("builtins").attr("getattr");
    return py::make_tuple(getattr, py::make_tuple(context, "__exit__")).release().ptr();
  });
}

// Sets attributes of the type and leaves its slots alone, which setattr() would rewrite.
PyObject* hook_extend(PyObject* type_object, PyObject* attributes) {
  auto* type = reinterpret_cast<PyTypeObject*>(type_object);
  if (PyDict_Check(attributes) == 0) {
    PyErr_SetString(PyExc_TypeError, "extend() expects a dict of attributes");
    return nullptr;
  }
  if (PyDict_Update(type->tp_dict, attributes) != 0) return nullptr;
  PyType_Modified(type);
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"extend", hook_extend, METH_O | METH_CLASS, "Sets attributes of the type, not its slots."},
    {"__deepcopy__", hook_deepcopy, METH_O, "A callable that does nothing."},
    {"__copy__", hook_deepcopy, METH_NOARGS, "A callable that does nothing."},
    {"__reduce__", hook_reduce, METH_NOARGS, "Pickles as a callable that does nothing."},
    {nullptr, nullptr, 0, nullptr}};

// torch.jit.script asks each hook for its name, to compile its source.
PyObject* hook_name(PyObject*, void*) {
  PyErr_SetString(PyExc_AttributeError,
                  "a hook of ml_debugger has no __name__ and no source that torch.jit.script could "
                  "compile: script the model before it is traced, or after the tracer's close()");
  return nullptr;
}

PyGetSetDef kAttributes[] = {{"__name__", hook_name, nullptr, nullptr, nullptr},
                             {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyMemberDef kMembers[] = {
    {"__vectorcalloffset__", T_PYSSIZET, static_cast<Py_ssize_t>(offsetof(CaptureHook, vectorcall)),
     READONLY, nullptr},
    {"__weaklistoffset__", T_PYSSIZET,
     static_cast<Py_ssize_t>(offsetof(CaptureHook, weak_references)), READONLY, nullptr},
    {"__dictoffset__", T_PYSSIZET, static_cast<Py_ssize_t>(offsetof(CaptureHook, attributes)),
     READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};

template <class Function>
void* slot(Function* function) {
  return reinterpret_cast<void*>(function);
}

PyType_Slot kSlots[] = {{Py_tp_new, slot(hook_new)},
                        {Py_tp_call, slot(PyVectorcall_Call)},
                        {Py_tp_traverse, slot(hook_traverse)},
                        {Py_tp_clear, slot(hook_clear)},
                        {Py_tp_dealloc, slot(hook_dealloc)},
                        {Py_tp_methods, kMethods},
                        {Py_tp_members, kMembers},
                        {Py_tp_getset, kAttributes},
                        {Py_tp_doc, const_cast<char*>("Private; see ml_debugger.tracer.hooks.")},
                        {0, nullptr}};

PyType_Spec kSpec = {"ml_debugger._core.CaptureHook", sizeof(CaptureHook), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, kSlots};

}  // namespace

void bind_capture_hook(py::module_& module) {
  module.attr("CaptureHook") = py::reinterpret_steal<py::object>(PyType_FromSpec(&kSpec));
}

}  // namespace mld
