#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "bindings/bindings.h"
#include "store/crc32c.h"
#include "store/segment_reader.h"

namespace py = pybind11;

namespace mld {
namespace {

// The memory behind a Python buffer, held while this lives; made and destroyed with the GIL.
class BufferView {
 public:
  BufferView(const py::buffer& object, int flags) {
    auto view = std::make_unique<Py_buffer>();
    if (PyObject_GetBuffer(object.ptr(), view.get(), flags) != 0) throw py::error_already_set();
    view_.reset(view.release());
  }

  [[nodiscard]] std::byte* data() const noexcept { return static_cast<std::byte*>(view_->buf); }
  [[nodiscard]] std::uint64_t bytes() const noexcept {
    return static_cast<std::uint64_t>(view_->len);
  }

 private:
  struct Release {
    void operator()(Py_buffer* view) const {
      PyBuffer_Release(view);
      delete view;
    }
  };
  std::unique_ptr<Py_buffer, Release> view_;
};

class SegmentHandle {
 public:
  SegmentHandle(const std::string& path, bool sealed) {
    const Unlocked unlocked;
    reader_ = std::make_shared<const SegmentReader>(path, sealed);
  }

  [[nodiscard]] py::bytes meta() const { return reader()->meta(); }

  [[nodiscard]] py::list headers(std::optional<std::uint64_t> after, std::size_t limit) const {
    std::vector<std::pair<std::uint64_t, std::string>> found;
    {
      const auto reader = this->reader();
      const Unlocked unlocked;
      found = reader->headers(after, limit);
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
    const BufferView view(out, PyBUF_WRITABLE);
    const std::uint64_t room = view.bytes();
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
    const auto reader = this->reader();
    const Unlocked unlocked;
    reader->read(requests, view.data());
  }

  [[nodiscard]] py::dict scan(std::optional<std::uint64_t> after, std::size_t limit,
                              std::uint32_t rank, std::uint32_t attempt, std::int64_t epoch,
                              std::uint32_t sequence) const {
    HeaderScan found;
    {
      const auto reader = this->reader();
      const Unlocked unlocked;
      found = reader->scan(after, limit, SegmentIdentity{rank, attempt, sequence, epoch});
    }
    const auto bytes_of = [](const std::vector<std::int64_t>& numbers) {
      return py::bytes(reinterpret_cast<const char*>(numbers.data()),
                       numbers.size() * sizeof numbers[0]);
    };
    const auto list_of = [](const std::vector<std::string>& values) {
      py::list result(values.size());
      for (std::size_t i = 0; i < values.size(); ++i) result[i] = py::bytes(values[i]);
      return result;
    };
    py::dict result;
    result["keys"] = bytes_of(found.keys);
    result["rows"] = bytes_of(found.rows);
    result["ground_truth_rows"] = bytes_of(found.ground_truth_rows);
    result["first_rows"] = bytes_of(found.first_rows);
    result["description"] = bytes_of(found.description);
    result["chunk_bytes"] = bytes_of(found.chunk_bytes);
    result["lengths"] = bytes_of(found.lengths);
    result["descriptions"] = list_of(found.descriptions);
    result["others"] = list_of(found.others);
    return result;
  }

  void gather(const py::buffer& keys,
              const std::vector<std::pair<std::uint32_t, py::buffer>>& targets) const {
    const BufferView numbers(keys, PyBUF_SIMPLE);
    std::vector<std::uint64_t> calls(numbers.bytes() / sizeof(std::uint64_t));
    std::memcpy(calls.data(), numbers.data(), calls.size() * sizeof(std::uint64_t));
    std::vector<BufferView> views;
    views.reserve(targets.size());
    std::vector<GatherTarget> places;
    for (const auto& [capture, out] : targets) {
      const BufferView& view = views.emplace_back(out, PyBUF_WRITABLE);
      places.push_back({capture, view.data(), view.bytes()});
    }
    const auto reader = this->reader();
    const Unlocked unlocked;
    reader->gather(calls, std::move(places));
  }

  void close() { reader_.reset(); }

 private:
  // REQUIRES: the GIL. A share: another thread may close() while the caller works without the GIL.
  [[nodiscard]] std::shared_ptr<const SegmentReader> reader() const {
    if (reader_ == nullptr) throw Error(ErrorKind::kInvalidInput, "the segment is closed");
    return reader_;
  }

  std::shared_ptr<const SegmentReader> reader_;
};

std::uint32_t crc32c_of(const py::buffer& data, std::uint32_t crc) {
  const BufferView view(data, PyBUF_SIMPLE);
  const Unlocked unlocked;
  return crc32c(view.data(), view.bytes(), crc);
}

}  // namespace

void bind_segment(py::module_& module) {
  py::class_<SegmentHandle> type(module, "Segment", py::is_final(),
                                 "Private; see ml_debugger.open_trace.");
  def_init<SegmentHandle, const std::string&, bool>(type, py::arg("path"), py::kw_only(),
                                                    py::arg("sealed"));
  type.def("meta", &SegmentHandle::meta)
      .def("headers", &SegmentHandle::headers, py::arg("after") = py::none(),
           py::arg("limit") = 1024)
      .def("read", &SegmentHandle::read, py::arg("chunks"), py::arg("out"))
      .def("scan", &SegmentHandle::scan, py::arg("after"), py::arg("limit"), py::kw_only(),
           py::arg("rank"), py::arg("attempt"), py::arg("epoch"), py::arg("sequence"))
      .def("gather", &SegmentHandle::gather, py::arg("keys"), py::arg("targets"))
      .def("close", &SegmentHandle::close);
  module.def("crc32c", &crc32c_of, py::arg("data"), py::arg("crc") = 0);
}

}  // namespace mld
