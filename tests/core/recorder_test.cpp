// The whole core with its thread: calls from many threads in, rows on disk out.
#include "capture/recorder.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "store/files.h"
#include "support.h"
#include "trace_fixture.h"
#include "writer/runtime.h"

namespace {

using namespace std::chrono_literals;
using mld::ErrorKind;
using support::kind_of;
using support::pattern;
using support::Trace;

struct Interrupted {};  // what a signal handler throws through a wait

class InterruptingHooks final : public mld::WaitHooks {
 public:
  void after_slice() override { throw Interrupted(); }
};

}  // namespace

TEST(recorder_stores_every_size_of_capture) {
  Trace trace;
  const std::uint64_t piece = mld::Runtime::current()->max_piece_bytes();
  std::vector<std::string> captures;
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{4096},
                                  std::size_t{4097}, std::size_t{piece - 1}, std::size_t{piece},
                                  std::size_t{piece + 1}, std::size_t{3 * piece + 5}}) {
    captures.push_back(pattern(bytes, bytes));
  }
  for (const std::int64_t epoch : {0, 7, -1}) {
    for (int call = 0; call < 3; ++call) support::record_call(*trace.recorder, epoch, 4, captures);
  }
  support::flush(*trace.recorder);
  const mld::Counters counters = trace.counters();
  CHECK_EQ(counters.rows_committed, 36);
  CHECK_EQ(counters.rows_in_flight, 0);
  CHECK(counters.commits > 0);
  const auto stored = support::read_rank(trace.directory.path());
  CHECK_EQ(stored.size(), 3);
  std::set<std::int64_t> row_ids;
  std::uint64_t number = 0;
  for (const char* epoch : {"epoch-0", "epoch-7", "epoch-none"}) {
    const auto& calls = stored.at(epoch).calls;
    CHECK_EQ(calls.size(), 3);
    for (const auto& [key, call] : calls) {
      CHECK_EQ(key.second, number++);
      row_ids.insert(call.identity.first_row);
      CHECK_EQ(call.captures.size(), captures.size() - 1);  // that of no bytes has no piece
      for (const auto& [capture, bytes] : call.captures) CHECK(bytes == captures[capture]);
    }
  }
  CHECK_EQ(row_ids.size(), 9);
  CHECK_EQ(*row_ids.rbegin(), 32);
}

TEST(recorder_makes_row_ids_of_rank_attempt_and_row) {
  mld::RecorderOptions options = Trace::eager();
  options.attempt = 5;
  mld::StoreOptions store = Trace::unsynced();
  store.rank = 3;
  Trace trace(options, store);
  support::record_call(*trace.recorder, 0, 10, {"a"});
  support::record_call(*trace.recorder, 0, 1, {"b"});
  support::flush(*trace.recorder);
  const auto stored = support::read_partition(trace.directory / "epoch-0");
  const std::int64_t base = (std::int64_t{3} << 49) | (std::int64_t{5} << 36);
  CHECK_EQ(stored.calls.at({5, 0}).identity.first_row, base);
  CHECK_EQ(stored.calls.at({5, 1}).identity.first_row, base + 10);
}

TEST(recorder_lists_captures_with_their_shapes) {
  Trace trace;
  trace.recorder->begin_call(0, 2);
  const std::int64_t dims[] = {2, 3};
  support::StringSource source("abcdef");
  mld::WaitHooks hooks;
  trace.recorder->capture(*trace.recorder->current_call(), 9, "int8", dims, 2, 6, source, hooks);
  support::capture(*trace.recorder, 4, "");
  const mld::ThreadCall* call = trace.recorder->last_call();
  REQUIRE(call->captures.size() == 2);
  CHECK_EQ(call->captures[0].column, 9);
  CHECK_EQ(call->captures[0].ndim, 2);
  CHECK_EQ(call->dims.at(call->captures[0].first_dim + 1), 3);
  CHECK_EQ(call->captures[1].column, 4);
  CHECK_EQ(call->captures[1].bytes, 0);
  trace.recorder->abort_call();
}

TEST(recorder_reads_back_from_ring_chunk_and_header) {
  Trace trace;
  const std::string small = pattern(1, 100), large = pattern(2, 50000);
  CHECK(kind_of([&] { support::read_back(*trace.recorder, 0); }) == ErrorKind::kNotFound);
  trace.recorder->begin_call(0, 1);
  support::capture(*trace.recorder, 0, large);
  support::capture(*trace.recorder, 1, small);
  CHECK(support::read_back(*trace.recorder, 0) == large);  // just captured
  support::flush(*trace.recorder);                         // now its pieces are chunks
  CHECK(support::read_back(*trace.recorder, 0) == large);
  CHECK(support::read_back(*trace.recorder, 1) == small);
  support::capture(*trace.recorder, 2, small);
  support::capture(*trace.recorder, 3, "");
  CHECK(support::end_call(*trace.recorder, 1));
  CHECK(support::read_back(*trace.recorder, 2) == small);
  support::flush(*trace.recorder);  // and the last one lies in the header
  for (const auto& [capture, bytes] : {std::pair(0u, large), std::pair(1u, small),
                                       std::pair(2u, small), std::pair(3u, std::string())}) {
    CHECK(support::read_back(*trace.recorder, capture) == bytes);
  }
  CHECK(kind_of([&] { support::read_back(*trace.recorder, 4); }) == ErrorKind::kNotFound);
  std::thread([&] {
    CHECK(kind_of([&] { support::read_back(*trace.recorder, 0); }) == ErrorKind::kNotFound);
  }).join();
  trace.drop(0);
  CHECK(kind_of([&] { support::read_back(*trace.recorder, 0); }) == ErrorKind::kNotFound);
}

TEST(recorder_stores_nothing_of_an_aborted_call) {
  Trace trace;
  for (int round = 0; round < 20; ++round) {
    trace.recorder->begin_call(0, 4);
    support::capture(*trace.recorder, 0, pattern(1, round % 2 == 0 ? 50000 : 10));
    if (round % 3 == 0) support::flush(*trace.recorder);
    trace.recorder->abort_call();
    CHECK(kind_of([&] { support::read_back(*trace.recorder, 0); }) == ErrorKind::kNotFound);
    trace.recorder->abort_call();  // nothing to abort
  }
  support::record_call(*trace.recorder, 0, 4, {"kept"});
  support::flush(*trace.recorder);
  CHECK_EQ(trace.counters().rows_submitted, 4);
  const auto stored = support::read_partition(trace.directory / "epoch-0");
  CHECK_EQ(stored.calls.size(), 1);
  CHECK(stored.gaps.empty());
}

TEST(recorder_refuses_calls_out_of_order) {
  Trace trace;
  CHECK(trace.recorder->current_call() == nullptr);
  CHECK(kind_of([&] { support::end_call(*trace.recorder, 1); }) == ErrorKind::kInvalidInput);
  trace.recorder->begin_call(0, 1);
  CHECK(kind_of([&] { trace.recorder->begin_call(0, 1); }) == ErrorKind::kInvalidInput);
  CHECK(trace.recorder->current_call() != nullptr);
  CHECK(kind_of([&] {
          mld::WaitHooks hooks;
          trace.recorder->end_call(std::string(1 << 20, 'x'), 1, 0, hooks);
        }) == ErrorKind::kInvalidInput);
  trace.recorder->abort_call();
}

TEST(recorder_refuses_a_call_beyond_its_disk_budget) {
  mld::StoreOptions store = Trace::unsynced();
  store.max_bytes = 200000;
  Trace trace(Trace::eager(), store);
  support::record_call(*trace.recorder, 0, 1, {pattern(1, 50000)});
  support::flush(*trace.recorder);
  trace.recorder->begin_call(0, 1);
  CHECK(kind_of([&] { support::capture(*trace.recorder, 0, pattern(2, 190000)); }) ==
        ErrorKind::kDiskBudget);
  // Whoever called the capture may have swallowed that; the call must not be stored all the same.
  CHECK(kind_of([&] { support::end_call(*trace.recorder, 1); }) == ErrorKind::kDiskBudget);
  CHECK(trace.recorder->current_call() != nullptr);
  trace.recorder->abort_call();
  support::flush(*trace.recorder);
  CHECK_EQ(support::read_partition(trace.directory / "epoch-0").calls.size(), 1);
  CHECK_EQ(trace.counters().rows_submitted, 1);
}

TEST(recorder_takes_calls_of_many_threads_and_keeps_its_law_at_every_moment) {
  Trace trace;
  std::atomic<bool> stop{false};
  std::atomic<int> looks{0};
  std::thread watcher([&] {
    do {
      CHECK(support::is_conserved(trace.counters()));
      ++looks;
    } while (!stop);
  });
  constexpr std::uint64_t kThreads = 4, kCalls = kUnderTsan ? 150 : 500;
  std::vector<std::thread> threads;
  for (std::uint64_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&trace, thread] {
      for (std::uint64_t call = 0; call < kCalls; ++call) {
        const std::uint64_t seed = thread * kCalls + call;
        const std::string tag(reinterpret_cast<const char*>(&seed), sizeof seed);
        support::record_call(*trace.recorder, static_cast<std::int64_t>(call % 3), 2,
                             {tag, pattern(seed, 1 + seed % 9000)});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  support::flush(*trace.recorder);
  stop = true;
  watcher.join();
  CHECK(looks > 0);
  CHECK_EQ(trace.counters().rows_committed, 2 * kThreads * kCalls);
  std::set<std::uint64_t> seen;
  std::set<std::int64_t> rows;
  for (const auto& [name, partition] : support::read_rank(trace.directory.path())) {
    for (const auto& [key, call] : partition.calls) {
      std::uint64_t seed = 0;
      std::memcpy(&seed, call.captures.at(0).data(), sizeof seed);
      seen.insert(seed);
      rows.insert(call.identity.first_row);
      CHECK(call.captures.at(1) == pattern(seed, 1 + seed % 9000));
    }
  }
  CHECK_EQ(seen.size(), kThreads * kCalls);
  CHECK_EQ(rows.size(), kThreads * kCalls);
}

TEST(recorders_of_two_attempts_share_ring_store_and_thread) {
  const std::size_t threads_before = support::core_threads();
  Trace trace;
  mld::RecorderOptions options = Trace::eager();
  options.attempt = 1;
  const auto second = mld::Recorder::open(trace.use, options);
  CHECK_EQ(support::core_threads(), threads_before + 1);
  support::record_call(*trace.recorder, 0, 1, {"first"});
  support::record_call(*second, 0, 1, {"second"});
  CHECK(trace.recorder->last_call() != second->last_call());
  support::flush(*second);
  support::flush(*trace.recorder);
  const auto stored = support::read_partition(trace.directory / "epoch-0");
  CHECK_EQ(stored.calls.at({0, 0}).captures.at(0), "first");
  CHECK_EQ(stored.calls.at({1, 0}).captures.at(0), "second");
  CHECK(support::close(*second));
  CHECK_EQ(support::core_threads(), threads_before + 1);
}

TEST(recorder_leaves_no_thread_and_no_descriptor_behind) {
  const std::size_t descriptors = support::open_descriptors();
  CHECK_EQ(support::core_threads(), 0);
  for (int round = 0; round < 5; ++round) {
    Trace trace;
    for (std::int64_t epoch = 0; epoch < 12; ++epoch)
      support::record_call(*trace.recorder, epoch, 1, {"x"});
    CHECK_EQ(support::core_threads(), 1);
    CHECK(support::close(*trace.recorder));
    CHECK_EQ(support::core_threads(), 0);
    trace.use.release();
    CHECK(!mld::LockFile::is_held(trace.directory / "writer.lock"));
    CHECK_EQ(support::open_descriptors(), descriptors);
    CHECK(mld::Runtime::current() == nullptr);
  }
}

TEST(recorder_that_is_not_closed_commits_and_lets_go_of_its_store) {
  const Trace trace;  // keeps the writer thread alive
  const support::TempDir directory;
  mld::StoreUse use(directory.path(), Trace::unsynced());
  auto recorder = mld::Recorder::open(use, Trace::eager());
  use.release();
  support::record_call(*recorder, 0, 1, {"x"});
  CHECK(mld::LockFile::is_held(directory / "writer.lock"));
  recorder.reset();
  CHECK(support::eventually([&] { return !mld::LockFile::is_held(directory / "writer.lock"); }));
  CHECK_EQ(support::read_partition(directory / "epoch-0").calls.size(), 1);
}

TEST(recorder_whose_opening_took_too_long_keeps_no_lock) {
  Trace trace;
  support::record_call(*trace.recorder, 0, 1, {"x"});
  support::flush(*trace.recorder);
  support::Gate gate(trace.directory / "epoch-0");
  support::record_call(*trace.recorder, 0, 1, {"y"});
  std::this_thread::sleep_for(50ms);  // the writer stands at the gate
  const support::TempDir directory;
  mld::StoreUse use(directory.path(), Trace::unsynced());
  mld::RecorderOptions options = Trace::eager();
  options.stall_timeout = 50ms;
  CHECK(kind_of([&] { mld::Recorder::open(use, options); }) == ErrorKind::kTraceStall);
  use.release();
  CHECK(mld::LockFile::is_held(directory / "writer.lock"));  // the writer has yet to hear of it
  gate.open();
  CHECK(support::eventually([&] { return !mld::LockFile::is_held(directory / "writer.lock"); }));
}

TEST(closing_commits_seals_and_is_idempotent) {
  Trace trace;
  support::record_call(*trace.recorder, 0, 1, {"x"});
  CHECK(support::close(*trace.recorder));
  CHECK(support::close(*trace.recorder));
  CHECK_EQ(trace.counters().rows_committed, 1);
  CHECK(mld::path_exists(trace.directory / "epoch-0/a00000-s00000/sealed.json"));
  CHECK(kind_of([&] { trace.recorder->begin_call(0, 1); }) == ErrorKind::kTracerClosed);
  CHECK(kind_of([&] { support::flush(*trace.recorder); }) == ErrorKind::kTracerClosed);
  trace.recorder->abort_call();
}

TEST(closing_in_the_middle_of_another_threads_call_is_safe) {
  for (const bool with_chunks : {false, true}) {
    Trace trace;
    std::atomic<int> step{0};
    std::thread caller([&] {
      trace.recorder->begin_call(0, 1);
      if (with_chunks) support::capture(*trace.recorder, 0, pattern(1, 60000));
      step = 1;
      CHECK(support::eventually([&] { return step == 2; }));
      support::capture(*trace.recorder, 1, pattern(2, 60000));
      CHECK(kind_of([&] { support::end_call(*trace.recorder, 1); }) == ErrorKind::kTracerClosed);
      trace.recorder->abort_call();
    });
    CHECK(support::eventually([&] { return step == 1; }));
    CHECK(support::close(*trace.recorder));
    step = 2;
    caller.join();
    CHECK_EQ(support::core_threads(), 0);
    const mld::Counters counters = trace.counters();
    CHECK(support::is_conserved(counters));
    CHECK_EQ(counters.rows_in_flight, 0);
    for (const auto& [name, partition] : support::read_rank(trace.directory.path()))
      CHECK(partition.calls.empty());
  }
}

// Calls race with a close: each is either refused or on disk.
TEST(closing_loses_no_call_that_was_taken) {
  for (std::uint64_t round = 0; round < 10; ++round) {
    Trace trace;
    std::atomic<std::uint64_t> taken{0};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 3; ++thread) {
      threads.emplace_back([&] {
        try {
          for (;;) {
            trace.recorder->begin_call(0, 1);
            support::capture(*trace.recorder, 0, "0123456789");
            if (support::end_call(*trace.recorder, 1)) ++taken;
          }
        } catch (const mld::Error& error) {
          CHECK(error.kind() == ErrorKind::kTracerClosed);
          trace.recorder->abort_call();
        }
      });
    }
    CHECK(support::eventually([&] { return taken > round * 20; }));
    CHECK(support::close(*trace.recorder));
    for (std::thread& thread : threads) thread.join();
    const mld::Counters counters = trace.counters();
    CHECK_EQ(counters.rows_committed, taken.load());
    CHECK_EQ(counters.rows_in_flight, 0);
    CHECK_EQ(support::read_partition(trace.directory / "epoch-0").calls.size(), taken.load());
  }
}

// Ctrl-C in the wait of a close: the exception comes through, and the close at exit still saves
// everything.
TEST(closing_that_a_signal_interrupted_can_be_done_again) {
  Trace trace;
  support::record_call(*trace.recorder, 0, 1, {pattern(1, 100)});
  InterruptingHooks interrupting;
  bool interrupted = false;
  try {
    trace.recorder->close(10s, interrupting);
  } catch (const Interrupted&) {
    interrupted = true;
  }
  CHECK(interrupted);
  CHECK(support::close(*trace.recorder));
  CHECK_EQ(support::core_threads(), 0);
  CHECK_EQ(support::read_partition(trace.directory / "epoch-0").sealed, 1);
}

// A steady trickle of calls is committed in groups, an interval apart, not call by call with a sync
// each. The ring is wide, so that no group fills up; commits are synced, so that one takes longer
// than the next call.
TEST(writer_thread_commits_a_steady_trickle_in_groups) {
  mld::RecorderOptions options = Trace::eager();
  options.ring_bytes = std::size_t{64} << 20;
  options.commit_interval = 200ms;
  mld::StoreOptions store = Trace::unsynced();
  store.sync = mld::Sync::kEveryCommit;
  Trace trace(options, store);
  const auto begin = mld::Clock::now();
  std::uint64_t calls = 0;
  while (mld::Clock::now() - begin < 600ms) {
    support::record_call(*trace.recorder, 0, 1, {pattern(calls, 500)});
    ++calls;
    std::this_thread::sleep_for(100us);
  }
  const std::uint64_t commits = trace.counters().commits;
  const auto intervals = static_cast<std::uint64_t>((mld::Clock::now() - begin) / 200ms);
  CHECK(calls > 30);
  CHECK(commits >= 1);
  CHECK(commits <= intervals + 1);
}
