#include "bindings/tensor_source.h"

#include <pybind11/gil_safe_call_once.h>

#include <array>
#include <cstring>
#include <string>

#include "bindings/dlpack_abi.h"

namespace py = pybind11;

namespace mld {
namespace {

// torch's name of each dtype that DLPack can carry (codes of DLDataTypeCode).
struct DtypeName {
  std::uint8_t code, bits;
  std::uint16_t lanes;
  const char* name;
};
constexpr std::array kDtypes = {
    DtypeName{0, 8, 1, "int8"},
    DtypeName{0, 16, 1, "int16"},
    DtypeName{0, 32, 1, "int32"},
    DtypeName{0, 64, 1, "int64"},
    DtypeName{1, 8, 1, "uint8"},
    DtypeName{1, 16, 1, "uint16"},
    DtypeName{1, 32, 1, "uint32"},
    DtypeName{1, 64, 1, "uint64"},
    DtypeName{2, 16, 1, "float16"},
    DtypeName{2, 32, 1, "float32"},
    DtypeName{2, 64, 1, "float64"},
    DtypeName{4, 16, 1, "bfloat16"},
    DtypeName{5, 32, 1, "complex32"},
    DtypeName{5, 64, 1, "complex64"},
    DtypeName{5, 128, 1, "complex128"},
    DtypeName{6, 8, 1, "bool"},
    DtypeName{10, 8, 1, "float8_e4m3fn"},
    DtypeName{11, 8, 1, "float8_e4m3fnuz"},
    DtypeName{12, 8, 1, "float8_e5m2"},
    DtypeName{13, 8, 1, "float8_e5m2fnuz"},
    DtypeName{14, 8, 1, "float8_e8m0fnu"},
};

const char* dtype_name(const dlpack::DataType& dtype) noexcept {
  for (const DtypeName& known : kDtypes) {
    if (known.code == dtype.code && known.bits == dtype.bits && known.lanes == dtype.lanes)
      return known.name;
  }
  return nullptr;
}

const char* dtype_name(const std::string& name) {
  for (const DtypeName& known : kDtypes) {
    if (name == known.name) return known.name;
  }
  return nullptr;
}

bool is_complex(const dlpack::DataType& dtype) noexcept { return dtype.code == 5; }

// What we need of torch, looked up once. The objects live as long as the interpreter. A function's
// own static would not do: two threads that met in it first could deadlock, one in the import
// without the GIL, one with the GIL waiting for the first.
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* is_neg = nullptr;  // interned names of methods
  PyObject* is_conj = nullptr;
  PyObject* dtype = nullptr;  // interned name of an attribute
  PyObject* int8 = nullptr;
  PyObject* uint8 = nullptr;
  PyObject* count_modes = nullptr;  // function: how many TorchDispatchModes are active
  PyObject* graph_task = nullptr;   // function: number of the backward that runs in this thread
};

bool g_use_exchange_api = true;

const dlpack::ExchangeApi* find_exchange_api(py::handle tensor_type) {
  const py::object capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeCapsule)) return nullptr;
  auto* header = static_cast<dlpack::ExchangeHeader*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeCapsule));
  while (header != nullptr && header->major != dlpack::kMajorVersion) header = header->previous;
  const auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  return api != nullptr && api->borrow != nullptr ? api : nullptr;
}

const Torch& torch() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> storage;
  const auto look_up = [] {
    const py::module_ module = py::module_::import("torch");
    Torch result;
    const py::object tensor = module.attr("Tensor");
    const py::object parameter = module.attr("nn").attr("Parameter");
    result.tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
    result.parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
    result.api = find_exchange_api(tensor);
    result.is_neg = PyUnicode_InternFromString("is_neg");
    result.is_conj = PyUnicode_InternFromString("is_conj");
    result.dtype = PyUnicode_InternFromString("dtype");
    result.int8 = py::object(module.attr("int8")).release().ptr();
    result.uint8 = py::object(module.attr("uint8")).release().ptr();
    result.count_modes =
        py::object(module.attr("_C").attr("_len_torch_dispatch_stack")).release().ptr();
    const py::object graph_task = module.attr("_C").attr("_current_graph_task_id");
    result.graph_task = graph_task.inc_ref().ptr();
    return result;
  };
  return storage.call_once_and_store_result(look_up).get_stored();
}

const dlpack::ExchangeApi* exchange_api() { return g_use_exchange_api ? torch().api : nullptr; }

bool has_flag(PyObject* tensor, PyObject* method) {
  PyObject* arguments[] = {tensor};
  PyObject* answer =
      PyObject_VectorcallMethod(method, arguments, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (answer == nullptr) throw py::error_already_set();
  const bool flag = answer == Py_True;
  Py_DECREF(answer);
  return flag;
}

bool is_contiguous(const dlpack::Tensor& tensor) noexcept {
  if (tensor.strides == nullptr) return true;
  std::int64_t expected = 1;
  for (std::int32_t dim = tensor.ndim - 1; dim >= 0; --dim) {
    if (tensor.shape[dim] == 0) return true;
    if (tensor.shape[dim] != 1 && tensor.strides[dim] != expected) return false;
    expected *= tensor.shape[dim];
  }
  return true;
}

std::uint64_t bytes_of(const dlpack::Tensor& tensor) noexcept {
  std::uint64_t elements = 1;
  for (std::int32_t dim = 0; dim < tensor.ndim; ++dim)
    elements *= static_cast<std::uint64_t>(tensor.shape[dim]);
  return elements * tensor.dtype.bits * tensor.dtype.lanes / 8;
}

// False for what the record format has no name for. DLPack gives torch's integers of less than a
// byte (int4, uint1, ...) out as bytes, so 8-bit integers are asked for their true dtype.
bool has_storable_dtype(PyObject* tensor, const dlpack::DataType& dtype) noexcept {
  if (dtype_name(dtype) == nullptr) return false;
  if (dtype.code > 1 || dtype.bits != 8) return true;
  PyObject* exact = PyObject_GetAttr(tensor, torch().dtype);
  if (exact == nullptr) PyErr_Clear();
  Py_XDECREF(exact);  // torch's dtypes are immortal; only the address is compared
  return exact == torch().int8 || exact == torch().uint8;
}

// Whether operators that we run would be seen by the user's modes, selective activation
// checkpointing for one, which counts them.
bool is_watched() noexcept {
  PyObject* count = PyObject_CallNoArgs(torch().count_modes);
  if (count == nullptr) PyErr_Clear();
  const bool watched = count == nullptr || PyLong_AsLong(count) != 0;
  Py_XDECREF(count);
  return watched;
}

bool borrow_raw(py::handle object, dlpack::Tensor* out) noexcept {
  if (exchange_api()->borrow(object.ptr(), out) == 0) return true;
  PyErr_Clear();  // sparse, quantized, meta, nested, inside vmap: told by our own error
  return false;
}

}  // namespace

bool is_exact_tensor(PyObject* object) noexcept {
  return Py_TYPE(object) == torch().tensor || Py_TYPE(object) == torch().parameter;
}

bool is_in_backward() {
  PyObject* task = PyObject_CallNoArgs(torch().graph_task);
  if (task == nullptr) throw py::error_already_set();
  const long number = PyLong_AsLong(task);
  Py_DECREF(task);
  return number != -1;
}

std::int64_t first_dimension(PyObject* tensor) noexcept {
  if (exchange_api() == nullptr) return -1;
  dlpack::Tensor raw{};
  if (!borrow_raw(tensor, &raw) || raw.ndim == 0) return -1;
  // FakeTensor and what functionalize() makes answer with no memory.
  const bool has_memory = raw.data != nullptr || bytes_of(raw) == 0;
  if (!has_memory || !has_storable_dtype(tensor, raw.dtype)) return -1;
  const bool is_dense = is_contiguous(raw) && !is_complex(raw.dtype);
  if (!is_dense && is_watched()) return -1;  // to make it dense takes operators
  return raw.shape[0];
}

bool is_dense(PyObject* tensor) {
  if (exchange_api() == nullptr || Py_TYPE(tensor) != torch().tensor) return false;
  dlpack::Tensor raw{};
  if (!borrow_raw(tensor, &raw) || raw.data == nullptr) return false;
  const bool is_here = raw.device.type == dlpack::kCpu || raw.device.type == dlpack::kCuda;
  return is_here && is_contiguous(raw) && !is_complex(raw.dtype) &&
         has_storable_dtype(tensor, raw.dtype) && !has_flag(tensor, torch().is_neg);
}

TensorSource::TensorSource(py::handle tensor)
    : tensor_(py::reinterpret_borrow<py::object>(tensor)) {
  if (!is_exact_tensor(tensor.ptr())) {
    throw Error(ErrorKind::kInvalidType,
                "expected a torch.Tensor, got " +
                    py::str(py::type::of(tensor).attr("__qualname__")).cast<std::string>());
  }
  if (try_borrow()) return;
  make_plain();
  if (!try_borrow()) {
    throw Error(ErrorKind::kInvalidType,
                "a tensor with layout " + py::str(tensor.attr("layout")).cast<std::string>() +
                    ", dtype " + py::str(tensor.attr("dtype")).cast<std::string>() + " on " +
                    py::str(tensor.attr("device")).cast<std::string>() +
                    " has no dense bytes to store",
                "trace a layer with a dense output, or pass TracerConfig.reduce a callable that "
                "makes it dense");
  }
}

// False when the tensor must be made plain first, or has no bytes at all.
bool TensorSource::try_borrow() {
  if (exchange_api() == nullptr) {
    view_by_pointer();
    return view_.dtype != nullptr;
  }
  dlpack::Tensor raw{};
  if (!borrow_raw(tensor_, &raw)) return false;
  const bool on_host = raw.device.type == dlpack::kCpu || raw.device.type == dlpack::kCudaHost;
  const bool on_device = raw.device.type == dlpack::kCuda;
  if (!(on_host || on_device) || !is_contiguous(raw)) return false;
  // DLPack hands conjugated and negated views out as if they were resolved.
  if (has_flag(tensor_.ptr(), torch().is_neg)) return false;
  if (is_complex(raw.dtype) && has_flag(tensor_.ptr(), torch().is_conj)) return false;
  view_ = {static_cast<const std::byte*>(raw.data) + raw.byte_offset, raw.shape,
           static_cast<std::uint32_t>(raw.ndim), bytes_of(raw), dtype_name(raw.dtype)};
  place_.device = on_device ? raw.device.index : -1;
  // FakeTensor and its like answer with no memory.
  return view_.dtype != nullptr && (raw.data != nullptr || view_.bytes == 0);
}

// On the device where there is a way from there; what this makes may be freed at once, since the
// snapshot of it lies before in the order of its stream.
void TensorSource::make_plain() {
  const bool is_cuda = tensor_.attr("is_cuda").cast<bool>();
  try {
    py::object plain = tensor_.attr("detach")().attr("resolve_conj")().attr("resolve_neg")();
    plain = plain.attr("contiguous")();
    tensor_ = is_cuda ? plain : plain.attr("cpu")();
  } catch (const py::error_already_set&) {
    // Of a strided CUDA tensor it is the device that failed: that is the user's to see.
    if (is_cuda && is_strided()) throw;
    // No dense form: try_borrow() fails again and the caller says so.
  }
}

bool TensorSource::is_strided() const {
  return py::str(tensor_.attr("layout")).cast<std::string>() == "torch.strided";
}

void TensorSource::move_to_host() {
  tensor_ = tensor_.attr("detach")().attr("cpu")();
  static_cast<void>(borrow());
}

DevicePlace TensorSource::place() const {
  DevicePlace found = place_;
  const dlpack::ExchangeApi* api = exchange_api();
  if (api != nullptr && api->current_work_stream != nullptr) {
    if (api->current_work_stream(dlpack::kCuda, found.device, &found.stream) == 0) return found;
    throw py::error_already_set();
  }
  const py::object stream =
      py::module_::import("torch").attr("cuda").attr("current_stream")(found.device);
  found.stream = reinterpret_cast<void*>(stream.attr("cuda_stream").cast<std::uintptr_t>());
  return found;
}

void TensorSource::view_by_pointer() {
  view_ = {};
  if (!is_strided()) return;
  make_plain();
  const std::string dtype = py::str(tensor_.attr("dtype")).cast<std::string>();
  dims_.clear();
  for (const py::handle size : tensor_.attr("shape")) dims_.push_back(size.cast<std::int64_t>());
  view_.dims = dims_.data();
  view_.ndim = static_cast<std::uint32_t>(dims_.size());
  view_.bytes = tensor_.attr("nbytes").cast<std::uint64_t>();
  view_.data =
      reinterpret_cast<const std::byte*>(tensor_.attr("data_ptr")().cast<std::uintptr_t>());
  view_.dtype = dtype_name(dtype.substr(dtype.find('.') + 1));
  if (view_.data == nullptr && view_.bytes != 0) view_.dtype = nullptr;
  const bool is_cuda = tensor_.attr("is_cuda").cast<bool>();
  place_.device = is_cuda ? tensor_.attr("device").attr("index").cast<int>() : -1;
}

const std::byte* TensorSource::borrow() {
  const std::uint64_t bytes = view_.bytes;
  if (!try_borrow() || view_.bytes != bytes) {
    throw Error(ErrorKind::kInvalidInput,
                "a tensor was changed by another thread while it was being copied",
                "do not resize a layer's output while its forward runs");
  }
  return view_.data;
}

void look_up_torch() {
  py::module_::import("torch");  // outside of the static's guard: an import may give the GIL away
  torch();
}

void use_exchange_api(bool use) noexcept { g_use_exchange_api = use; }

}  // namespace mld
