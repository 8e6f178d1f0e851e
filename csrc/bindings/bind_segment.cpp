#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "store/crc32c.h"
#include "store/segment_reader.h"

namespace py = pybind11;

namespace mld {
namespace {

class SegmentHandle {
 public:
  SegmentHandle(const std::string& path, bool sealed) {
    const py::gil_scoped_release unlocked;
    reader_ = std::make_unique<SegmentReader>(path, sealed);
  }

  [[nodiscard]] py::bytes meta() const { return reader().meta(); }

  [[nodiscard]] py::list headers(std::optional<std::uint64_t> after, std::size_t limit) const {
    std::vector<std::pair<std::uint64_t, std::string>> found;
    {
      const py::gil_scoped_release unlocked;
      found = reader().headers(after, limit);
    }
    py::list result(found.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
      result[i] = py::make_tuple(found[i].first, py::bytes(found[i].second));
    }
    return result;
  }

  void read(const std::vector<
                std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, std::uint32_t>>& chunks,
            const py::buffer& out) const {
    Py_buffer view{};
    if (PyObject_GetBuffer(out.ptr(), &view, PyBUF_WRITABLE) != 0) throw py::error_already_set();
    const std::unique_ptr<Py_buffer, decltype(&PyBuffer_Release)> guard(&view, &PyBuffer_Release);
    const auto room = static_cast<std::uint64_t>(view.len);
    std::vector<ChunkRequest> requests;
    requests.reserve(chunks.size());
    for (const auto& [key, offset, bytes, crc] : chunks) {
      if (offset > room || bytes > room - offset) {
        throw Error(ErrorKind::kInvalidInput,
                    "a chunk of " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                        " does not fit a buffer of " + std::to_string(room));
      }
      requests.push_back({key, offset, bytes, crc});
    }
    const py::gil_scoped_release unlocked;
    reader().read(requests, static_cast<std::byte*>(view.buf));
  }

  void close() { reader_.reset(); }

 private:
  [[nodiscard]] const SegmentReader& reader() const {
    if (reader_ == nullptr) throw Error(ErrorKind::kInvalidInput, "the segment is closed");
    return *reader_;
  }

  std::unique_ptr<SegmentReader> reader_;
};

std::uint32_t crc32c_of(const py::buffer& data, std::uint32_t crc) {
  Py_buffer view{};
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  const std::unique_ptr<Py_buffer, decltype(&PyBuffer_Release)> guard(&view, &PyBuffer_Release);
  const py::gil_scoped_release unlocked;
  return crc32c(view.buf, static_cast<std::size_t>(view.len), crc);
}

}  // namespace

void bind_segment(py::module_& module) {
  py::class_<SegmentHandle>(module, "Segment", py::is_final(),
                            "Private; see ml_debugger.open_trace.")
      .def(py::init<const std::string&, bool>(), py::arg("path"), py::kw_only(), py::arg("sealed"))
      .def("meta", &SegmentHandle::meta)
      .def("headers", &SegmentHandle::headers, py::arg("after") = py::none(),
           py::arg("limit") = 1024)
      .def("read", &SegmentHandle::read, py::arg("chunks"), py::arg("out"))
      .def("close", &SegmentHandle::close);
  module.def("crc32c", &crc32c_of, py::arg("data"), py::arg("crc") = 0);
}

}  // namespace mld
