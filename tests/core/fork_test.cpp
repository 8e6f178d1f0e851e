// A fork in the middle of recording: the child's copies are inert, its own objects work, the parent
// goes on.
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "check.h"
#include "store/files.h"
#include "support.h"
#include "trace_fixture.h"

namespace {

using namespace std::chrono_literals;
using support::in_child;
using support::kind_of;
using support::pattern;
using support::Trace;

// The writer thread sleeps at the fork, so that no allocator of a sanitizer is locked by it; the
// next test forks at any time.
mld::RecorderOptions rarely_committing() {
  mld::RecorderOptions options = Trace::eager();
  options.commit_interval = 3600s;
  return options;
}

}  // namespace

TEST(child_of_a_recording_process_is_inert) {
  auto trace = std::make_unique<Trace>(rarely_committing());
  support::record_call(*trace->recorder, 0, 1, {pattern(1, 50000)});
  support::flush(*trace->recorder);
  trace->recorder->begin_call(0, 1);  // a fork in mid-call
  support::capture(*trace->recorder, 0, pattern(2, 50000));
  const int status = in_child([&] {
    if (!trace->recorder->is_inert()) return 1;
    if (!support::close(*trace->recorder)) return 2;  // at once, with nothing to wait for
    if (kind_of([&] { support::read_back(*trace->recorder, 0); }) != mld::ErrorKind::kNotFound)
      return 3;
    trace->recorder.reset();
    trace->use.release();
    if (support::core_threads() != 0) return 4;
    if (mld::Runtime::current() != nullptr) return 5;
    return mld::LockFile::is_held(trace->directory / "writer.lock") ? 0 : 6;
  });
  CHECK_EQ(status, 0);
  CHECK(support::end_call(*trace->recorder, 1));
  support::record_call(*trace->recorder, 0, 1, {pattern(3, 50000)});
  support::flush(*trace->recorder);
  const auto stored = support::read_partition(trace->directory / "epoch-0");
  CHECK_EQ(stored.calls.size(), 3);
  for (std::uint64_t call = 0; call < 3; ++call)
    CHECK(stored.calls.at({0, call}).captures.at(0) == pattern(call + 1, 50000));
}

TEST(child_may_record_a_trace_of_its_own) {
  // ThreadSanitizer cannot start threads in the child of a process that had several;
  // AddressSanitizer's allocator may be locked by one of the parent's at the fork, and then stays
  // so in the child.
  if (kUnderTsan || kUnderAsan)
    return support::skipped("sanitizers cannot follow a fork of several threads");
  Trace parent;
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    for (std::uint64_t call = 0; !stop && call < 100000; ++call)  // a bounded amount of disk
      support::record_call(*parent.recorder, 0, 1, {pattern(call, 3000)});
  });
  for (int round = 0; round < 10; ++round) {
    const support::TempDir directory;
    const int status = in_child([&] {
      mld::StoreUse use(directory.path(), Trace::unsynced());
      const auto recorder = mld::Recorder::open(use, Trace::eager());
      for (std::uint64_t call = 0; call < 20; ++call)
        support::record_call(*recorder, 0, 1, {pattern(call, 3000)});
      support::flush(*recorder, 10s);
      return support::close(*recorder, 10s) && support::core_threads() == 0 ? 0 : 1;
    });
    CHECK_EQ(status, 0);
    CHECK_EQ(support::read_partition(directory / "epoch-0").calls.size(), 20);
  }
  stop = true;
  busy.join();
  support::flush(*parent.recorder);
  const auto stored = support::read_partition(parent.directory / "epoch-0");
  CHECK_EQ(stored.calls.size(), parent.counters().rows_committed);
  for (const auto& [key, call] : stored.calls)
    CHECK(call.captures.at(0) == pattern(key.second, 3000));
}

// Its parent writes on; the child reads what is committed, with a handle of its own.
TEST(child_reads_the_trace_that_its_parent_writes) {
  Trace trace(rarely_committing());
  support::record_call(*trace.recorder, 0, 1, {pattern(1, 50000)});
  support::flush(*trace.recorder);
  const int status = in_child([&] {
    const auto stored = support::read_partition(trace.directory / "epoch-0");
    return stored.calls.size() == 1 && stored.calls.at({0, 0}).captures.at(0) == pattern(1, 50000)
               ? 0
               : 1;
  });
  CHECK_EQ(status, 0);
  support::record_call(*trace.recorder, 0, 1, {pattern(2, 50000)});
  support::flush(*trace.recorder);
  CHECK_EQ(support::read_partition(trace.directory / "epoch-0").calls.size(), 2);
}
