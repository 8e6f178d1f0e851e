// A full ring, under each policy. The ring is kept full by a gate in front of the writer's commit,
// never by a sleep.
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "check.h"
#include "store/files.h"
#include "support.h"
#include "trace_fixture.h"

namespace {

using namespace std::chrono_literals;
using mld::Clock;
using mld::ErrorKind;
using mld::LossCause;
using mld::OnError;
using mld::OverflowPolicy;
using support::Gate;
using support::kind_of;
using support::pattern;
using support::Trace;

mld::RecorderOptions with(OverflowPolicy overflow, OnError on_error = OnError::kRaise,
                          std::chrono::nanoseconds stall_timeout = 20s) {
  mld::RecorderOptions options = Trace::eager();
  options.ring_bytes = std::size_t{64} << 10;
  options.overflow = overflow;
  options.on_error = on_error;
  options.stall_timeout = stall_timeout;
  return options;
}

constexpr std::size_t kCallBytes = 5000;

// A trace whose first call is committed, so that a gate can be put up.
struct GatedTrace : Trace {
  explicit GatedTrace(const mld::RecorderOptions& options) : Trace(options) {
    support::record_call(*recorder, 0, 1, {"first"});
    support::flush(*recorder);
    gate = std::make_unique<Gate>(directory / "epoch-0");
  }
  ~GatedTrace() { gate->open(); }
  // False when the call was lost.
  bool call(std::uint64_t seed) {
    recorder->begin_call(0, 2);
    support::capture(*recorder, 0, pattern(seed, kCallBytes));
    return support::end_call(*recorder, 2);
  }
  // Calls that are taken until the ring takes no more.
  std::uint64_t fill() {
    std::uint64_t taken = 0;
    try {
      while (call(taken + 1)) ++taken;
    } catch (const mld::Error&) {
      recorder->abort_call();
    }
    return taken;
  }

  std::unique_ptr<Gate> gate;
};

}  // namespace

TEST(discard_loses_whole_calls_and_marks_the_gap) {
  GatedTrace trace(with(OverflowPolicy::kDiscard));
  const std::uint64_t taken = trace.fill();  // and one that was lost
  CHECK(taken > 2);
  for (int call = 0; call < 3; ++call) CHECK(!trace.call(99));
  CHECK(kind_of([&] { support::read_back(*trace.recorder, 0); }) == ErrorKind::kNotFound);
  mld::Counters counters = trace.counters();
  CHECK(support::is_conserved(counters));
  CHECK_EQ(counters.rows_discarded, 8);
  CHECK_EQ(counters.bytes_discarded, 4 * kCallBytes);
  CHECK_EQ(counters.rows_discarded_by_cause[static_cast<std::size_t>(LossCause::kRingFull)], 8);
  CHECK_EQ(counters.rows_in_flight, 2 * taken);
  CHECK_EQ(counters.stalls, 0);

  trace.gate->open();
  support::flush(*trace.recorder);
  CHECK(trace.call(1000));
  support::flush(*trace.recorder);
  const auto stored = support::read_partition(trace.directory / "epoch-0");
  CHECK_EQ(stored.calls.size(), taken + 2);
  // The writer may have met them in two goes: one record or more, without a hole.
  std::uint64_t next_lost = taken + 1, lost_rows = 0, lost_bytes = 0;
  for (const support::StoredGap& gap : stored.gaps) {
    CHECK_EQ(gap.first_call, next_lost);
    CHECK_EQ(gap.cause, "ring_full");
    next_lost = gap.last_call + 1;
    lost_rows += gap.rows;
    lost_bytes += gap.bytes;
  }
  CHECK_EQ(next_lost, taken + 5);
  CHECK_EQ(lost_rows, 8);
  CHECK_EQ(lost_bytes, 4 * kCallBytes);
  CHECK_EQ(stored.meta_discarded_rows, 8);
  counters = trace.counters();
  CHECK_EQ(counters.rows_committed, 1 + 2 * (taken + 1));
  CHECK(support::is_conserved(counters));
}

// All that is in the ring is settled already when the call is lost: the flush behind it must write
// the gap none the less.
TEST(flush_makes_a_gap_visible_also_when_nothing_else_is_pending) {
  mld::RecorderOptions options = with(OverflowPolicy::kDiscard);
  options.commit_interval = 3600s;
  GatedTrace trace(options);
  const std::uint64_t taken = trace.fill();
  trace.gate->open();
  support::flush(*trace.recorder);
  // A capture larger than the ring cannot pass under discard; its pieces are given back before it
  // is lost.
  trace.gate = std::make_unique<Gate>(trace.directory / "epoch-0");
  trace.recorder->begin_call(0, 3);
  support::capture(*trace.recorder, 0, pattern(1, 200000));
  CHECK(!support::end_call(*trace.recorder, 3));
  trace.gate->open();
  support::flush(*trace.recorder);
  const auto stored = support::read_partition(trace.directory / "epoch-0");
  REQUIRE(stored.gaps.size() == 2);
  CHECK_EQ(stored.gaps[1].first_call, taken + 2);
  CHECK_EQ(stored.gaps[1].rows, 3);
  CHECK_EQ(stored.gaps[1].bytes, 200000);
}

// Another trace holds the ring while its disk is full; of ours nothing is pending but the mark of
// what was lost.
TEST(flush_writes_a_gap_that_stands_alone) {
  support::SmallDisk disk(std::size_t{2} << 20);
  if (!disk.mounted()) return support::skipped("mounting a tmpfs needs root");
  const mld::StoreUse other_use(disk / "rank-00000", Trace::unsynced());
  mld::RecorderOptions options = with(OverflowPolicy::kDiscard);
  options.commit_interval = 3600s;
  const auto other = mld::Recorder::open(other_use, options);
  Trace trace(options);
  disk.fill();
  bool taken = true;
  while (taken) {
    other->begin_call(0, 1);
    support::capture(*other, 0, pattern(1, kCallBytes));
    taken = support::end_call(*other, 1);
  }
  for (std::uint64_t lost = 1; lost <= 8; ++lost) {
    trace.recorder->begin_call(0, 1);
    support::capture(*trace.recorder, 0, pattern(lost, kCallBytes));
    CHECK(!support::end_call(*trace.recorder, 1));
    support::flush(*trace.recorder);
    CHECK_EQ(support::read_partition(trace.directory / "epoch-0").meta_discarded_rows, lost);
  }
  disk.empty();
  CHECK(support::close(*other));
}

TEST(raise_throws_at_once_and_the_call_can_be_aborted) {
  GatedTrace trace(with(OverflowPolicy::kRaise));
  const std::uint64_t taken = trace.fill();
  CHECK(taken > 2);
  const auto begin = Clock::now();
  CHECK(kind_of([&] { trace.call(99); }) == ErrorKind::kRingOverflow);
  CHECK(Clock::now() - begin < 1s);
  CHECK(trace.recorder->current_call() != nullptr);
  trace.recorder->abort_call();
  CHECK_EQ(trace.counters().rows_submitted, 1 + 2 * taken);  // an aborted call counts nowhere
  trace.gate->open();
  support::flush(*trace.recorder);
  CHECK(trace.call(100));
  support::flush(*trace.recorder);
  const auto stored = support::read_partition(trace.directory / "epoch-0");
  CHECK_EQ(stored.calls.size(), taken + 2);
  CHECK(stored.gaps.empty());
}

TEST(block_waits_and_loses_nothing) {
  GatedTrace trace(with(OverflowPolicy::kBlock));
  std::atomic<std::uint64_t> done{0};
  constexpr std::uint64_t kCalls = 40;
  std::thread producer([&] {
    for (std::uint64_t call = 0; call < kCalls; ++call, ++done) CHECK(trace.call(call));
  });
  CHECK(support::eventually([&] { return trace.counters().stalls == 1; }));
  CHECK(done < kCalls);
  CHECK(support::is_conserved(trace.counters()));
  trace.gate->open();
  producer.join();
  support::flush(*trace.recorder);
  CHECK_EQ(trace.counters().rows_committed, 1 + 2 * kCalls);
  CHECK_EQ(trace.counters().rows_discarded, 0);
  CHECK(trace.counters().stall_ns > 0);
  CHECK(trace.recorder->ring_high_water_bytes() > (std::size_t{64} << 10) / 2);
  CHECK(trace.recorder->ring_high_water_bytes() <= std::size_t{64} << 10);
  const auto stored = support::read_partition(trace.directory / "epoch-0");
  for (std::uint64_t call = 0; call < kCalls; ++call) {
    CHECK(stored.calls.at({0, call + 1}).captures.at(0) == pattern(call, kCallBytes));
  }
}

TEST(block_passes_a_call_that_is_larger_than_the_ring) {
  Trace trace(with(OverflowPolicy::kBlock));
  const std::string huge = pattern(1, std::size_t{3} << 20);
  support::record_call(*trace.recorder, 0, 1, {"small", huge, "tail"});
  CHECK(support::read_back(*trace.recorder, 1) == huge);
  support::flush(*trace.recorder);
  CHECK(support::read_back(*trace.recorder, 1) == huge);
  const auto stored = support::read_partition(trace.directory / "epoch-0");
  CHECK(stored.calls.at({0, 0}).captures.at(1) == huge);
  CHECK(stored.calls.at({0, 0}).captures.at(2) == "tail");
}

TEST(block_raises_after_the_stall_timeout) {
  GatedTrace trace(with(OverflowPolicy::kBlock, OnError::kRaise, 300ms));
  const auto begin = Clock::now();
  const std::uint64_t taken = trace.fill();  // ends with the error
  const auto waited = Clock::now() - begin;
  CHECK(waited >= 300ms);
  CHECK(waited < 3s);
  CHECK_EQ(trace.counters().stalls, 1);
  CHECK(trace.counters().stall_ns >= 300000000);
  CHECK(kind_of([&] { trace.call(99); }) == ErrorKind::kTraceStall);
  trace.recorder->abort_call();
  trace.gate->open();
  support::flush(*trace.recorder, 20s);
  CHECK_EQ(support::read_partition(trace.directory / "epoch-0").calls.size(), taken + 1);
}

TEST(block_with_warn_discards_after_the_stall_timeout) {
  GatedTrace trace(with(OverflowPolicy::kBlock, OnError::kWarn, 200ms));
  const std::uint64_t taken = trace.fill();  // ends with a lost call
  mld::Counters counters = trace.counters();
  CHECK_EQ(counters.rows_discarded, 2);
  CHECK_EQ(counters.rows_discarded_by_cause[static_cast<std::size_t>(LossCause::kStall)], 2);
  CHECK(support::is_conserved(counters));
  trace.gate->open();
  support::flush(*trace.recorder, 20s);
  const auto stored = support::read_partition(trace.directory / "epoch-0");
  REQUIRE(stored.gaps.size() == 1);
  CHECK_EQ(stored.gaps[0].cause, "stall");
  CHECK_EQ(stored.gaps[0].first_call, taken + 1);
}

TEST(block_with_warn_waits_once_for_a_disk_that_does_not_move) {
  GatedTrace trace(with(OverflowPolicy::kBlock, OnError::kWarn, 300ms));
  trace.fill();  // ends with a call that was lost after the wait
  const auto begin = Clock::now();
  for (int call = 0; call < 20; ++call) CHECK(!trace.call(1));
  CHECK(Clock::now() - begin < 3s);  // twenty waits would take six
  CHECK_EQ(trace.counters().stalls, 1);
  trace.gate->open();
  support::flush(*trace.recorder, 20s);
  CHECK(trace.call(1));
  CHECK(support::is_conserved(trace.counters()));
}

TEST(flush_keeps_its_deadline) {
  GatedTrace trace(with(OverflowPolicy::kBlock));
  CHECK(trace.call(1));
  for (const auto timeout : {0ms, 200ms}) {
    const auto begin = Clock::now();
    CHECK(kind_of([&] { support::flush(*trace.recorder, timeout); }) == ErrorKind::kTraceStall);
    CHECK(Clock::now() - begin >= timeout);
    CHECK(Clock::now() - begin < timeout + 2s);
  }
  trace.gate->open();
  support::flush(*trace.recorder, 20s);
  support::flush(*trace.recorder, 20s);
}

TEST(flush_without_a_deadline_gives_up_when_nothing_moves) {
  GatedTrace trace(with(OverflowPolicy::kBlock, OnError::kRaise, 200ms));
  CHECK(trace.call(1));
  const auto begin = Clock::now();
  CHECK(kind_of([&] { support::flush(*trace.recorder); }) == ErrorKind::kTraceStall);
  CHECK(Clock::now() - begin < 5s);
  trace.gate->open();
  support::flush(*trace.recorder, 20s);
}

TEST(close_in_a_signal_handler_waits_for_no_call_of_its_own_thread) {
  class ClosingHooks final : public mld::WaitHooks {
   public:
    explicit ClosingHooks(GatedTrace& trace) : trace_(trace) {}
    void after_slice() override {
      if (std::exchange(has_closed_, true)) return;
      trace_.gate->open();
      const auto begin = Clock::now();
      CHECK(support::close(*trace_.recorder));
      CHECK(Clock::now() - begin < 10s);
    }

   private:
    GatedTrace& trace_;
    bool has_closed_ = false;
  };
  GatedTrace trace(with(OverflowPolicy::kBlock));
  trace.recorder->begin_call(0, 2);
  const auto& ring = trace.recorder->current_call()->runtime->ring();
  while (ring.used_bytes() < ring.capacity_bytes())
    support::capture(*trace.recorder, 0, pattern(1, 448));  // a granule with its header
  ClosingHooks hooks(trace);
  const auto kind = kind_of([&] { trace.recorder->end_call("\xC0", 2, 0, hooks); });
  CHECK(kind == ErrorKind::kTracerClosed);
  trace.recorder->abort_call();
  CHECK_EQ(trace.counters().rows_submitted, 1);
  CHECK_EQ(trace.counters().rows_committed, 1);
}

// A writer thread that sits in the kernel is left behind: close() returns in time, and what it uses
// stays alive.
TEST(close_that_misses_its_deadline_leaves_the_core_behind) {
  const int status = support::in_child([] {
    auto trace = std::make_unique<GatedTrace>(with(OverflowPolicy::kBlock));
    trace->call(1);
    const auto begin = Clock::now();
    if (support::close(*trace->recorder, 200ms)) return 1;
    if (Clock::now() - begin > 5s) return 2;
    const mld::Counters counters = trace->counters();
    if (!support::is_conserved(counters) || counters.rows_in_flight != 2) return 3;
    if (!support::close(*trace->recorder, 200ms)) return 4;  // idempotent
    trace->gate
        ->open();  // the disk comes back: the thread goes on in memory that must still be there
    trace->use.release();
    return support::eventually([&] { return trace->counters().rows_committed == 3; }) ? 0 : 5;
  });
  CHECK_EQ(status, 0);
}

TEST(failed_storage_is_raised_at_the_next_call_flush_and_close) {
  Trace trace(with(OverflowPolicy::kBlock));
  support::write_file(trace.directory / "epoch-0", "a file where the partition should be");
  support::record_call(*trace.recorder, 0, 4, {"lost"});
  CHECK(kind_of([&] { support::flush(*trace.recorder); }) == ErrorKind::kStorage);
  CHECK(trace.recorder->attempt().is_failed());
  CHECK(kind_of([&] { trace.recorder->begin_call(0, 1); }) == ErrorKind::kStorage);
  CHECK_EQ(trace.counters().rows_failed, 4);
  CHECK(support::is_conserved(trace.counters()));
  CHECK(support::close(*trace.recorder));
  CHECK_EQ(support::core_threads(), 0);
}

TEST(failed_storage_with_warn_counts_and_lets_the_training_go_on) {
  Trace trace(with(OverflowPolicy::kBlock, OnError::kWarn));
  support::write_file(trace.directory / "epoch-0", "a file where the partition should be");
  support::record_call(*trace.recorder, 0, 4, {"lost"});
  CHECK(support::eventually([&] { return trace.recorder->attempt().is_failed(); }));
  for (int call = 0; call < 3; ++call) {
    trace.recorder->begin_call(0, 2);
    support::capture(*trace.recorder, 0,
                     pattern(1, 300000));  // more than the ring: it must not wait for anything
    CHECK(!support::end_call(*trace.recorder, 2));
  }
  CHECK_EQ(trace.counters().rows_failed, 10);
  CHECK_EQ(trace.counters().bytes_failed, 4 + 3 * 300000);
  CHECK(support::is_conserved(trace.counters()));
}

TEST(producer_that_waits_learns_that_its_storage_has_failed) {
  GatedTrace trace(with(OverflowPolicy::kBlock));
  support::write_file(trace.directory / "epoch-1", "a file where the partition should be");
  std::thread producer([&] {
    CHECK(kind_of([&] {
            for (;;) {
              trace.recorder->begin_call(1, 1);
              support::capture(*trace.recorder, 0, pattern(1, 5000));
              support::end_call(*trace.recorder, 1);
            }
          }) == ErrorKind::kStorage);
    trace.recorder->abort_call();
  });
  CHECK(support::eventually(
      [&] { return trace.counters().stalls > 0 || trace.recorder->attempt().is_failed(); }));
  trace.gate->open();
  producer.join();
  CHECK(support::is_conserved(trace.counters()));
  CHECK(support::eventually(
      [&] { return trace.counters().rows_in_flight == 0; }));  // read and counted as failed
}
