// A store in a temporary directory and one recorder on it, closed at the end whatever the test did;
// and a gate that holds the writer thread in the middle of a commit.
#pragma once

#include <memory>
#include <string>

#include "store/environment.h"
#include "support.h"
#include "writer/runtime.h"

namespace support {

struct Trace {
  static mld::StoreOptions unsynced() {
    mld::StoreOptions options;
    options.sync = mld::Sync::kOnRequest;
    options.segment_bytes = std::size_t{256} << 20;
    return options;
  }
  static mld::RecorderOptions eager() {
    mld::RecorderOptions options;
    options.ring_bytes = std::size_t{1} << 20;
    options.commit_interval = 20ms;
    options.stall_timeout = 20s;
    return options;
  }

  explicit Trace(const mld::RecorderOptions& options = eager(),
                 const mld::StoreOptions& store = unsynced())
      : use(directory.path(), store), recorder(mld::Recorder::open(use, options)) {}
  ~Trace() { CHECK(support::close(*recorder)); }
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  [[nodiscard]] mld::Counters counters() const { return recorder->attempt().ledger().snapshot(); }
  mld::DroppedRows drop(std::int64_t epoch) {
    auto dropped = std::make_shared<mld::DroppedRows>();
    mld::WaitHooks hooks;
    mld::Runtime::current()->run_on_writer(
        [dropped, epoch, state = use.state()](mld::Writer& writer) {
          *dropped = writer.drop_epoch(*state, epoch, std::nullopt);
        },
        20s, "drop", hooks);
    return *dropped;
  }

  TempDir directory;
  mld::StoreUse use;
  std::shared_ptr<mld::Recorder> recorder;
};

// While it stands, no commit to the partition's segment can begin: LMDB has one writer at a time,
// and this is it. The partition must have been written to. A writer thread that meets it is stuck,
// as in a frozen disk.
class Gate {
 public:
  explicit Gate(const std::string& partition)
      : environment_(mld::Environment::open(partition + "/a00000-s00000", mld::Access::kWrite,
                                            mld::Sync::kOnRequest, 0)),
        transaction_(std::make_unique<mld::Transaction>(*environment_, false)) {}
  void open() { transaction_.reset(); }

 private:
  std::shared_ptr<mld::Environment> environment_;
  std::unique_ptr<mld::Transaction> transaction_;
};

}  // namespace support
