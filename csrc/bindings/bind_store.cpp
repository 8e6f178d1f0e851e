#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "bindings/tensor_source.h"
#include "writer/runtime.h"

namespace py = pybind11;

namespace mld {
namespace {

// A handle on the process's StoreState; `close` lets go of it early.
class StoreHandle {
 public:
  StoreHandle(const std::string& directory, std::uint32_t rank, const std::string& durability,
              std::optional<std::uint64_t> max_bytes, std::size_t segment_bytes,
              const std::string& owner, const std::string& staging)
      : directory_(directory) {
    if (rank >= kMaxRanks) {
      throw Error(ErrorKind::kInvalidInput,
                  "rank " + std::to_string(rank) + " is not below " + std::to_string(kMaxRanks));
    }
    StoreOptions options{rank,      durability == "process" ? Sync::kOnRequest : Sync::kEveryCommit,
                         max_bytes, segment_bytes,
                         owner,     staging};
    const Unlocked unlocked;
    use_ = StoreUse(directory, options);
  }

  [[nodiscard]] const std::string& directory() const { return directory_; }
  [[nodiscard]] std::uint64_t disk_bytes() const { return state().disk_bytes(); }

  py::object recorder(std::uint32_t attempt, const std::string& overflow,
                      const std::string& on_error, std::size_t ring_bytes, std::size_t commit_bytes,
                      double commit_interval_s, double stall_timeout_s,
                      std::optional<std::size_t> device_ring_bytes) {
    if (attempt >= kMaxAttempts) {
      throw Error(ErrorKind::kInvalidInput,
                  "this trace has seen " + std::to_string(kMaxAttempts) +
                      " attempts, as many as it can number",
                  "record under another version_name, or set force_table_recreate=True");
    }
    RecorderOptions options;
    options.attempt = attempt;
    options.overflow = overflow == "discard" ? OverflowPolicy::kDiscard
                       : overflow == "raise" ? OverflowPolicy::kRaise
                                             : OverflowPolicy::kBlock;
    options.on_error = on_error == "warn" ? OnError::kWarn : OnError::kRaise;
    options.ring_bytes = ring_bytes;
    options.commit_bytes = commit_bytes;
    options.commit_interval = to_duration(commit_interval_s);
    options.stall_timeout = to_duration(stall_timeout_s);
    if (device_ring_bytes) options.device.ring_bytes = *device_ring_bytes;
    require_open();
    look_up_torch();
    const auto share = own_share();
    std::shared_ptr<Recorder> opened;
    {
      const Unlocked unlocked;
      opened = Recorder::open(*share, options);
    }
    return to_python(std::move(opened));
  }

  std::pair<std::uint64_t, std::uint64_t> drop_epoch(std::int64_t epoch,
                                                     std::optional<std::uint32_t> attempt,
                                                     double timeout_s) {
    const auto dropped = std::make_shared<DroppedRows>();
    const auto drop = [dropped, epoch, attempt](StoreState& store, Writer* writer) {
      *dropped = writer != nullptr ? writer->drop_epoch(store, epoch, attempt)
                                   : store.drop_epoch(epoch, attempt);
    };
    run(drop, timeout_s, "drop_epoch_data");
    return {dropped->rows, dropped->ground_truth_rows};
  }

  void drop_all(double timeout_s) {
    const auto drop = [](StoreState& store, Writer* writer) {
      writer != nullptr ? writer->drop_all_epochs(store) : store.drop_all();
    };
    run(drop, timeout_s, "drop_version_data");
  }

  void close() { use_.release(); }

 private:
  void require_open() const {
    if (generation_ != process_generation()) {
      throw Error(ErrorKind::kTraceInUse,
                  "the trace belongs to the process that this one was forked from",
                  "drop it there, or record under another version_name");
    }
    if (!use_) throw Error(ErrorKind::kTracerClosed, "the store is closed", "open the trace again");
  }
  [[nodiscard]] StoreState& state() const {
    require_open();
    return *use_.state();
  }

  // Dropping belongs to the writer thread when there is one, since that has the environments open.
  // The share keeps the trace locked until the drop is done, whatever becomes of this handle.
  template <class Drop>
  void run(Drop drop, double timeout_s, const char* what) {
    const auto share = own_share();
    Unlocked unlocked;
    if (const auto runtime = Runtime::current()) {
      const auto task = [share, drop](Writer& writer) { drop(*share->state(), &writer); };
      runtime->run_on_writer(task, to_duration(timeout_s), what, unlocked);
      return;
    }
    drop(*share->state(), nullptr);
  }

  // REQUIRES: the GIL. For work without it: another thread may close() meanwhile.
  [[nodiscard]] std::shared_ptr<const StoreUse> own_share() const {
    require_open();
    return std::make_shared<const StoreUse>(use_);
  }

  const std::string directory_;
  const std::uint64_t generation_ = process_generation();
  StoreUse use_;
};

}  // namespace

void bind_store(py::module_& module) {
  py::class_<StoreHandle> type(module, "Store", py::is_final(),
                               "Private; see ml_debugger.training.TrainingTracer.");
  def_init<StoreHandle, const std::string&, std::uint32_t, const std::string&,
           std::optional<std::uint64_t>, std::size_t, const std::string&, const std::string&>(
      type, py::arg("directory"), py::kw_only(), py::arg("rank"), py::arg("durability"),
      py::arg("max_bytes") = py::none(), py::arg("segment_bytes") = std::size_t{4} << 30,
      py::arg("owner") = "", py::arg("staging") = "");
  type.def_property_readonly("directory", &StoreHandle::directory)
      .def_property_readonly("disk_bytes", &StoreHandle::disk_bytes)
      .def("recorder", &StoreHandle::recorder, py::arg("attempt"), py::kw_only(),
           py::arg("overflow"), py::arg("on_error"), py::arg("ring_bytes"), py::arg("commit_bytes"),
           py::arg("commit_interval_s"), py::arg("stall_timeout_s"),
           py::arg("device_ring_bytes") = py::none())
      .def("drop_epoch", &StoreHandle::drop_epoch, py::arg("epoch"), py::kw_only(),
           py::arg("attempt"), py::arg("timeout_s"))
      .def("drop_all", &StoreHandle::drop_all, py::kw_only(), py::arg("timeout_s"))
      .def("close", &StoreHandle::close);
  module.def("is_locked", &LockFile::is_held, py::arg("path"));
}

}  // namespace mld
