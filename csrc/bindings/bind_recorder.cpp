#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "bindings/bindings.h"
#include "bindings/tensor_source.h"
#include "writer/runtime.h"

namespace py = pybind11;

namespace mld {
namespace {

class BufferSource final : public ByteSource {
 public:
  explicit BufferSource(const py::buffer& buffer) {
    if (PyObject_GetBuffer(buffer.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~BufferSource() override { PyBuffer_Release(&view_); }
  BufferSource(const BufferSource&) = delete;
  BufferSource& operator=(const BufferSource&) = delete;

  [[nodiscard]] std::uint64_t bytes() const noexcept {
    return static_cast<std::uint64_t>(view_.len);
  }
  [[nodiscard]] const std::byte* borrow() override {
    return static_cast<const std::byte*>(view_.buf);
  }

 private:
  Py_buffer view_{};
};

ThreadCall& open_call(Recorder& recorder) {
  ThreadCall* call = recorder.current_call();
  if (call == nullptr)
    throw Error(ErrorKind::kInvalidInput, "capture without begin_call in this thread");
  return *call;
}

void capture(Recorder& recorder, std::uint32_t column, const py::object& tensor) {
  if (recorder.is_inert()) return;
  capture_tensor(recorder, open_call(recorder), column, tensor);
}

void capture_buffer(Recorder& recorder, std::uint32_t column, const py::buffer& data) {
  if (recorder.is_inert()) return;
  BufferSource source(data);
  GilWaitHooks hooks;
  const auto length = static_cast<std::int64_t>(source.bytes());
  recorder.capture(open_call(recorder), column, "uint8", &length, 1, source.bytes(), source, hooks);
}

py::list captures(Recorder& recorder) {
  py::list found;
  const ThreadCall* call = recorder.last_call();
  if (call == nullptr) return found;
  for (const CaptureInfo& info : call->captures) {
    py::tuple shape(info.ndim);
    for (std::uint32_t dim = 0; dim < info.ndim; ++dim)
      shape[dim] = py::int_(call->dims[info.first_dim + dim]);
    found.append(py::make_tuple(info.column, info.dtype, shape, info.device));
  }
  return found;
}

bool end_call(Recorder& recorder, const py::bytes& description, std::uint32_t rows,
              std::uint32_t ground_truth_rows) {
  if (recorder.is_inert()) return false;
  GilWaitHooks hooks;
  return recorder.end_call(std::string_view(description), rows, ground_truth_rows, hooks);
}

py::bytearray read_back(Recorder& recorder, std::uint32_t capture_number) {
  std::string bytes;
  {
    Unlocked unlocked;
    bytes = recorder.read_back(capture_number, unlocked);
  }
  return py::bytearray(bytes.data(), bytes.size());
}

void flush(Recorder& recorder, std::optional<double> timeout_s) {
  if (recorder.is_inert()) return;
  Unlocked unlocked;
  recorder.flush(timeout_s ? std::optional(to_duration(*timeout_s)) : std::nullopt, unlocked);
}

bool close(Recorder& recorder, double timeout_s) {
  Unlocked unlocked;  // to its end: the last close of the process joins the writer thread
  return recorder.close(to_duration(timeout_s), unlocked);
}

py::dict counters(const Recorder& recorder) {
  const Ledger& ledger = recorder.attempt().ledger();
  const Counters counters = recorder.is_inert() ? ledger.inherited() : ledger.snapshot();
  py::dict by_cause;
  for (std::size_t cause = 0; cause < kLossCauseNames.size(); ++cause) {
    by_cause[kLossCauseNames[cause]] = counters.rows_discarded_by_cause[cause];
  }
  py::dict result;
  result["rows_submitted"] = counters.rows_submitted;
  result["rows_committed"] = counters.rows_committed;
  result["rows_discarded"] = counters.rows_discarded;
  result["rows_failed"] = counters.rows_failed;
  result["rows_in_flight"] = counters.rows_in_flight;
  result["bytes_submitted"] = counters.bytes_submitted;
  result["bytes_committed"] = counters.bytes_committed;
  result["bytes_discarded"] = counters.bytes_discarded;
  result["bytes_failed"] = counters.bytes_failed;
  result["bytes_in_flight"] = counters.bytes_in_flight;
  result["discarded_by_cause"] = by_cause;
  result["stalls"] = counters.stalls;
  result["stall_seconds"] = static_cast<double>(counters.stall_ns) * 1e-9;
  result["ring_high_water_bytes"] = recorder.ring_high_water_bytes();
  result["commits"] = counters.commits;
  result["write_throughput_bytes_per_s"] =
      counters.write_ns == 0 ? 0.0
                             : static_cast<double>(counters.written_bytes) /
                                   (static_cast<double>(counters.write_ns) * 1e-9);
  return result;
}

// What the device path has to say, as a log line: a hook must not raise for it.
void log_notice(DeviceStager& stager) {
  if (const auto notice = stager.take_notice()) {
    py::module_::import("logging").attr("getLogger")("ml_debugger").attr("warning")("%s", *notice);
  }
}

// False when the tensor is a CPU copy now, for want of a path.
bool capture_device_tensor(Recorder& recorder, ThreadCall& call, std::uint32_t column,
                           TensorSource& source, WaitHooks& hooks) {
  DeviceStager& stager = call.runtime->stager();
  const TensorView& view = source.view();
  const bool is_done = recorder.capture_device(call, column, view.dtype, view.dims, view.ndim,
                                               view.bytes, source.place(), source, hooks);
  log_notice(stager);
  if (is_done) return true;
  stager.count_synchronous_copy();
  source.move_to_host();
  return false;
}

py::dict device_report() {
  py::dict result;
  const auto runtime = Runtime::current();
  if (runtime == nullptr) return result;
  const DeviceReport report = runtime->stager().report();
  result["copies"] = report.copies;
  result["compute_stream_copies"] = report.compute_stream_copies;
  result["synchronous_copies"] = report.synchronous_copies;
  result["errors"] = report.errors;
  result["last_error"] = report.last_error;
  result["pinned"] = report.pinned;
  return result;
}

// The same recorder, let go of without the GIL: the last one of the process joins the writer
// thread, which may have to wait for its disk.
std::shared_ptr<Recorder> unlocked_at_end(std::shared_ptr<Recorder> recorder) {
  Recorder* const target = recorder.get();
  return {target, [owner = std::move(recorder)](Recorder*) mutable {
            const Unlocked unlocked;
            owner.reset();
          }};
}

}  // namespace

void capture_tensor(Recorder& recorder, ThreadCall& call, std::uint32_t column, py::handle tensor) {
  TensorSource source(tensor);
  GilWaitHooks hooks;
  const TensorView& view = source.view();
  const int device = source.device();
  if (source.is_on_device() && capture_device_tensor(recorder, call, column, source, hooks)) return;
  recorder.capture(call, column, view.dtype, view.dims, view.ndim, view.bytes, source, hooks,
                   device);
}

py::object to_python(std::shared_ptr<Recorder> recorder) {
  const py::type class_of_it = py::type::of<Recorder>();
  auto* type = reinterpret_cast<PyTypeObject*>(class_of_it.ptr());
  // As pybind11's make_new_instance(), which takes it for granted that there is memory.
  PyObject* object = type->tp_alloc(type, 0);
  if (object == nullptr) throw py::error_already_set();
  auto* instance = reinterpret_cast<py::detail::instance*>(object);
  instance->allocate_layout();
  auto result = py::reinterpret_steal<py::object>(object);
  std::shared_ptr<Recorder> held = unlocked_at_end(std::move(recorder));
  adopt(instance, held);
  // pybind11 has entered what shared_from_this() gives instead.
  instance->get_value_and_holder().holder<std::shared_ptr<Recorder>>() = std::move(held);
  return result;
}

std::shared_ptr<Recorder> recorder_of(py::handle object) {
  try {
    // None casts to a null pointer.
    if (auto recorder = object.cast<std::shared_ptr<Recorder>>()) return recorder;
  } catch (const py::cast_error&) {
    // Told below.
  }
  throw py::type_error(std::string("expected a _core.Recorder, got ") +
                       Py_TYPE(object.ptr())->tp_name);
}

std::chrono::nanoseconds to_duration(double seconds) {
  constexpr double kLongest = 10.0 * 365 * 86400;
  const double bounded = std::isnan(seconds) ? 0.0 : std::min(std::max(seconds, 0.0), kLongest);
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
      std::chrono::duration<double>(bounded));
}

void bind_recorder(py::module_& module) {
  py::class_<Recorder, std::shared_ptr<Recorder>>(module, "Recorder", py::is_final(),
                                                  "Private; see ml_debugger.tracer.TorchTracer.")
      .def_property_readonly(
          "attempt", [](const Recorder& recorder) { return recorder.attempt().options().attempt; })
      .def_property_readonly("inert", &Recorder::is_inert)
      .def_property_readonly(
          "failed", [](const Recorder& recorder) { return recorder.attempt().is_failed(); })
      .def(
          "begin_call",
          [](Recorder& recorder, std::int64_t epoch, std::uint32_t batch_size) {
            return recorder.is_inert() ? std::uint64_t{0} : recorder.begin_call(epoch, batch_size);
          },
          py::arg("epoch"), py::arg("batch_size"))
      .def("capture", &capture, py::arg("column"), py::arg("tensor"))
      .def("capture_buffer", &capture_buffer, py::arg("column"), py::arg("data"))
      .def("captures", &captures)
      .def("end_call", &end_call, py::arg("description"), py::arg("rows"),
           py::arg("ground_truth_rows"))
      .def("abort_call",
           [](Recorder& recorder) {
             if (!recorder.is_inert()) recorder.abort_call();
           })
      .def("read_back", &read_back, py::arg("capture"))
      .def("flush", &flush, py::arg("timeout_s"))
      .def("raise_failure",
           [](const Recorder& recorder) {
             if (!recorder.is_inert()) recorder.attempt().raise_failure();
           })
      .def("counters", &counters)
      .def("close", &close, py::arg("timeout_s"));
  module.def("device_report", &device_report);
  module.def(
      "is_dense", [](py::handle tensor) { return is_dense(tensor.ptr()); }, py::arg("tensor"));
}

}  // namespace mld
