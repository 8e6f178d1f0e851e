// The writer stepped by hand, without its thread: records are put into the ring, groups are drained
// one at a time.
#include "writer/writer.h"

#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "store/files.h"
#include "support.h"

namespace {

using namespace std::chrono_literals;
using mld::Clock;
using mld::RecorderOptions;
using mld::StoreUse;
using support::Bench;
using support::pattern;
using support::SmallDisk;
using support::TempDir;

constexpr std::uint64_t kAll = ~std::uint64_t{0};

mld::StoreOptions unsynced() {
  mld::StoreOptions options;
  options.sync = mld::Sync::kOnRequest;
  options.segment_bytes = std::size_t{64} << 20;
  return options;
}

// An attempt without a recorder: what its producers would put into the ring, the test puts there.
struct Attempt {
  Attempt(mld::Writer& writer_of_test, Bench& bench_of_test, const std::string& directory,
          RecorderOptions options = {})
      : writer(writer_of_test),
        bench(bench_of_test),
        state(std::make_shared<mld::AttemptState>(next_id(), StoreUse(directory, unsynced()),
                                                  options)) {
    writer.attach(state);
  }
  static std::uint32_t next_id() {
    static std::uint32_t id = 1000000;
    return ++id;
  }
  // Returns the ring position of the call's first record.
  std::uint64_t call(std::int64_t epoch, std::uint64_t number, std::size_t bytes) {
    const std::uint64_t position =
        bench.chunk(state->id(), epoch, number, 0, pattern(number, bytes));
    end(epoch, number, bytes);
    return position;
  }
  void end(std::int64_t epoch, std::uint64_t number, std::size_t bytes) {
    state->ledger().submit(2, bytes);
    bench.call(state->id(), epoch, number, 2, bytes);
  }
  [[nodiscard]] mld::Counters counters() const { return state->ledger().snapshot(); }

  mld::Writer& writer;
  Bench& bench;
  std::shared_ptr<mld::AttemptState> state;
};

}  // namespace

TEST(writer_commits_what_it_drains_and_gives_the_ring_back) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  CHECK(!writer.has_attempts());
  Attempt attempt(writer, bench, directory.path());
  CHECK(!writer.drain_group(Clock::now(), kAll));
  attempt.call(0, 0, 5000);
  attempt.call(1, 1, 100);
  CHECK_EQ(attempt.counters().rows_in_flight, 4);
  CHECK(writer.drain_group(Clock::now(), kAll));
  CHECK_EQ(attempt.counters().rows_committed, 4);
  CHECK_EQ(attempt.counters().bytes_committed, 5100);
  CHECK_EQ(attempt.counters().commits, 2);
  CHECK_EQ(bench.ring().used_bytes(), 0);
  CHECK(!writer.drain_group(Clock::now(), kAll));
  CHECK(!writer.next_retry().has_value());
  writer.detach(attempt.state->id());
  const auto stored = support::read_rank(directory.path());
  CHECK_EQ(stored.at("epoch-0").calls.size(), 1);
  CHECK_EQ(stored.at("epoch-1").sealed, 1);
  CHECK(!writer.has_attempts());
}

TEST(writer_reads_no_more_than_a_group_at_a_time) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, directory.path());
  for (std::uint64_t call = 0; call < 6; ++call) attempt.call(0, call, 10000);
  CHECK(writer.drain_group(Clock::now(), 20000));
  CHECK_EQ(attempt.counters().rows_committed, 2);  // the first, and the second's chunk
  CHECK(bench.ring().used_bytes() > 0);
  writer.drain_all();
  CHECK_EQ(attempt.counters().rows_committed, 12);
  CHECK_EQ(bench.ring().used_bytes(), 0);
}

TEST(writer_steps_over_what_was_abandoned_or_has_no_recorder) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, directory.path());
  Bench::Ring::Slot slot;
  REQUIRE(bench.ring().try_reserve(1000, &slot));
  bench.ring().abandon(slot);
  bench.chunk(1, 0, 0, 0, "of nobody");
  bench.call(1, 0, 0, 5, 9);
  attempt.call(0, 0, 10);
  writer.drain_all();
  CHECK_EQ(attempt.counters().rows_committed, 2);
  CHECK_EQ(bench.ring().used_bytes(), 0);
  CHECK_EQ(support::read_rank(directory.path()).at("epoch-0").calls.size(), 1);
}

TEST(writer_releases_the_chunks_of_a_call_that_goes_on) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, directory.path());
  std::string whole;
  for (std::uint64_t piece = 0; piece < 30; ++piece) {  // several times the ring
    const std::string text = pattern(piece, 100000);
    bench.chunk(attempt.state->id(), 0, 0, 0, text);
    whole += text;
    writer.drain_all();
    CHECK_EQ(bench.ring().used_bytes(), 0);
  }
  attempt.end(0, 0, whole.size());
  writer.drain_all();
  CHECK(support::read_rank(directory.path()).at("epoch-0").calls.at({0, 0}).captures.at(0) ==
        whole);
}

// Of two partitions one cannot be written: the other's rows are committed, and only the tail waits.
TEST(writer_holds_the_tail_but_no_other_partition_for_a_full_disk) {
  SmallDisk disk(std::size_t{2} << 20);
  if (!disk.mounted()) return support::skipped("mounting a tmpfs needs root");
  const TempDir directory;
  mld::make_directories(disk / "epoch-1");
  REQUIRE(symlink((disk / "epoch-1").c_str(), (directory / "epoch-1").c_str()) == 0);
  disk.fill();
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, directory.path());
  const auto begin = Clock::now();
  attempt.call(0, 0, 5000);
  const std::uint64_t held = attempt.call(1, 1, 6000);
  attempt.call(0, 2, 7000);
  writer.drain_group(begin, kAll);
  CHECK_EQ(attempt.counters().rows_committed, 4);
  CHECK_EQ(attempt.counters().rows_in_flight, 2);
  CHECK_EQ(bench.ring().tail(), held);
  REQUIRE(writer.next_retry().has_value());
  CHECK(*writer.next_retry() > begin);
  attempt.call(0, 3, 100);
  writer.drain_group(begin, kAll);
  CHECK_EQ(attempt.counters().rows_committed, 6);
  CHECK_EQ(bench.ring().tail(), held);

  disk.empty();
  CHECK(!writer.drain_group(begin, kAll));  // not yet its time
  CHECK(writer.drain_group(*writer.next_retry(), kAll));
  CHECK_EQ(attempt.counters().rows_committed, 8);
  CHECK_EQ(bench.ring().used_bytes(), 0);
  writer.detach(attempt.state->id());
  const auto stored = support::read_rank(directory.path());
  CHECK(stored.at("epoch-1").calls.at({0, 1}).captures.at(0) == pattern(1, 6000));
  CHECK_EQ(stored.at("epoch-1").headers, 1);
  CHECK_EQ(stored.at("epoch-0").headers, 3);
}

// An attempt whose storage is beyond hope ends, counted; another store's rows go on.
TEST(writer_ends_an_attempt_that_cannot_be_complete_and_no_other) {
  const TempDir broken, sound;
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt lost(writer, bench, broken.path()), kept(writer, bench, sound.path());
  support::write_file(broken / "epoch-1", "a file where the partition should be");
  lost.call(0, 0, 1000);
  lost.call(1, 1, 2000);
  kept.call(1, 0, 3000);
  writer.drain_all();
  CHECK(lost.state->is_failed());
  CHECK(support::kind_of([&] { lost.state->raise_failure(); }) == mld::ErrorKind::kStorage);
  CHECK_EQ(lost.counters().rows_failed, 2);
  CHECK_EQ(lost.counters().bytes_failed, 2000);
  CHECK_EQ(lost.counters().rows_committed, 2);
  CHECK_EQ(kept.counters().rows_committed, 2);
  CHECK(!kept.state->is_failed());
  CHECK_EQ(bench.ring().used_bytes(), 0);
  lost.call(0, 2, 10);  // what still comes is counted, not written
  kept.call(1, 1, 10);
  writer.drain_all();
  CHECK_EQ(lost.counters().rows_failed, 4);
  CHECK_EQ(kept.counters().rows_committed, 4);
  CHECK_EQ(bench.ring().used_bytes(), 0);
  CHECK(support::is_conserved(lost.counters()));
  writer.detach(lost.state->id());  // its failure was told; there is no second one
  writer.detach(kept.state->id());
  CHECK_EQ(support::read_partition(sound / "epoch-1").calls.size(), 2);
}

TEST(writer_fails_what_waits_for_a_disk_when_its_recorder_is_detached) {
  SmallDisk disk(std::size_t{2} << 20);
  if (!disk.mounted()) return support::skipped("mounting a tmpfs needs root");
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, disk / "rank-00000");
  disk.fill();
  attempt.call(0, 0, 5000);
  writer.drain_all();
  CHECK_EQ(attempt.counters().rows_in_flight, 2);
  writer.detach(attempt.state->id());
  CHECK_EQ(attempt.counters().rows_failed, 2);
  CHECK(support::is_conserved(attempt.counters()));
  CHECK(!writer.drain_group(Clock::now(), kAll));
  CHECK_EQ(bench.ring().used_bytes(), 0);
}

TEST(writer_drops_an_epoch_with_what_is_on_its_way) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, directory.path());
  mld::StoreState& store = attempt.state->store();
  attempt.call(3, 0, 5000);
  attempt.call(4, 1, 5000);
  writer.drain_all();
  attempt.call(3, 2, 5000);
  bench.chunk(attempt.state->id(), 3, 3, 0, pattern(3, 5000));  // of a call that goes on
  CHECK(store.disk_bytes() > 10000);
  const mld::DroppedRows dropped = writer.drop_epoch(store, 3, std::nullopt);
  CHECK_EQ(dropped.rows, 4);
  CHECK(!mld::path_exists(directory / "epoch-3"));
  attempt.end(3, 3, 5000);
  attempt.call(3, 4, 50);
  writer.drain_all();
  CHECK_EQ(attempt.counters().rows_discarded, 2);
  CHECK_EQ(attempt.counters().rows_committed, 8);
  CHECK(support::is_conserved(attempt.counters()));
  const auto stored = support::read_rank(directory.path());
  CHECK_EQ(stored.at("epoch-3").calls.size(), 1);
  CHECK_EQ(stored.at("epoch-4").calls.size(), 1);
  writer.drop_all_epochs(store);
  CHECK_EQ(store.disk_bytes(), 0);
  CHECK(support::read_rank(directory.path()).empty());
  attempt.call(3, 5, 60);
  writer.drain_all();
  CHECK_EQ(support::read_rank(directory.path()).at("epoch-3").calls.size(), 1);
}

TEST(writer_drops_only_the_attempt_that_is_named) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  RecorderOptions second_options;
  second_options.attempt = 1;
  Attempt first(writer, bench, directory.path()),
      second(writer, bench, directory.path(), second_options);
  first.call(0, 0, 100);
  second.call(0, 0, 200);
  CHECK_EQ(writer.drop_epoch(first.state->store(), 0, 1).rows, 2);
  writer.drain_all();
  const auto stored = support::read_rank(directory.path());
  CHECK_EQ(stored.at("epoch-0").calls.size(), 1);
  CHECK_EQ(stored.at("epoch-0").calls.count({0, 0}), 1);
}

// Each epoch's environment takes descriptors and a map; a long run has thousands of epochs.
TEST(writer_keeps_at_most_eight_environments_open) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, directory.path());
  const std::size_t before = support::open_descriptors();
  std::uint64_t number = 0;
  constexpr int kEpochs = 1000;
  for (int epoch = 0; epoch < kEpochs; ++epoch) {
    attempt.call(epoch, number++, 10);
    writer.drain_all();
    if (epoch % 50 == 0) CHECK(support::open_descriptors() <= before + 8 * 3);
  }
  for (int epoch = 0; epoch < kEpochs; epoch += 10) {  // and back again
    attempt.call(epoch, number++, 10);
    writer.drain_all();
    CHECK(mld::process().environments.size() <= 8);
  }
  CHECK_EQ(attempt.counters().rows_committed, 2 * number);
  writer.detach(attempt.state->id());
  CHECK_EQ(support::open_descriptors(), before);
  CHECK_EQ(mld::list_directory(directory / "epoch-990").size(), 1);  // the same segment, reopened
}

TEST(writer_tells_other_processes_its_counters) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, directory.path());
  attempt.call(0, 0, 5000);
  writer.drain_all();
  writer.write_changed_status();
  const std::string status = support::read_file(directory / "status.json");
  CHECK(status.find("\"rows_committed\": 2, ") != std::string::npos);
  CHECK(status.find("\"recording\": true") != std::string::npos);
  CHECK_EQ(status.size() % 4096, 0);
  writer.detach(attempt.state->id());
  CHECK(support::read_file(directory / "status.json").find("\"recording\": false") !=
        std::string::npos);
}

TEST(writer_answers_a_request_with_a_status_that_is_newer) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, directory.path());
  CHECK(!writer.answer_requests());
  attempt.call(0, 0, 5000);
  mld::replace_file(directory / "flush.request", "");
  CHECK(writer.answer_requests());
  CHECK(!mld::path_exists(directory / "flush.request"));
  CHECK(!mld::path_exists(directory / "flush.taken"));
  const std::string status = support::read_file(directory / "status.json");
  CHECK(status.find("\"rows_submitted\": 2, ") != std::string::npos);
  CHECK(status.find("\"rows_in_flight\": 2, ") != std::string::npos);
  CHECK(!writer.answer_requests());
  writer.detach(attempt.state->id());
}

TEST(writer_keeps_a_request_whose_status_it_cannot_write) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, directory.path());
  attempt.call(0, 0, 5000);
  const std::string status = directory / "status.json";
  CHECK_EQ(mkdir(status.c_str(), 0700), 0);
  mld::replace_file(directory / "flush.request", "");
  CHECK(!writer.answer_requests());
  writer.write_changed_status();
  CHECK(!mld::path_exists(directory / "flush.request"));
  CHECK(mld::path_exists(directory / "flush.taken"));  // who asked sees it, and waits
  CHECK_EQ(rmdir(status.c_str()), 0);
  writer.write_changed_status();  // the one that failed is not taken for told
  CHECK(support::read_file(status).find("\"rows_submitted\": 2, ") != std::string::npos);
  CHECK(writer.answer_requests());
  CHECK(!mld::path_exists(directory / "flush.taken"));
  CHECK(!writer.answer_requests());
  writer.detach(attempt.state->id());
}

TEST(writer_cuts_a_status_that_has_become_shorter) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  std::vector<std::unique_ptr<Attempt>> attempts;
  for (int number = 0; number < 20; ++number)
    attempts.push_back(std::make_unique<Attempt>(writer, bench, directory.path()));
  attempts[0]->call(0, 0, 100);
  writer.write_changed_status();
  const std::string status = directory / "status.json";
  CHECK_EQ(support::read_file(status).size(), 8192);
  for (int number = 1; number < 20; ++number) writer.detach(attempts[number]->state->id());
  CHECK_EQ(support::read_file(status).size(), 4096);
  writer.detach(attempts[0]->state->id());
}

TEST(epoch_whose_drop_fails_goes_on_in_its_next_segment) {
  const TempDir directory;
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, directory.path());
  attempt.call(3, 0, 5000);
  writer.drain_all();
  rlimit before{};
  getrlimit(RLIMIT_NOFILE, &before);
  const rlimit none{3, before.rlim_max};
  setrlimit(RLIMIT_NOFILE, &none);
  int code = 0;
  try {
    writer.drop_epoch(*attempt.state->shared_store(), 3, std::nullopt);
  } catch (const mld::StoreError& error) {
    code = error.code();
  }
  setrlimit(RLIMIT_NOFILE, &before);
  CHECK_EQ(code, EMFILE);
  attempt.call(3, 1, 5000);
  writer.drain_all();
  writer.detach(attempt.state->id());
  const auto stored = support::read_partition(directory / "epoch-3");
  CHECK_EQ(stored.calls.size(), 2);
  CHECK_EQ(stored.segments, 2);
  CHECK_EQ(stored.meta_calls, 2);
}

TEST(attempt_that_is_detached_waits_for_nobody_elses_records) {
  const TempDir directory, other;
  Bench bench;
  mld::Writer writer(bench.ring());
  Attempt attempt(writer, bench, directory.path());
  Attempt busy(writer, bench, other.path());
  writer.detach(attempt.state->id());
  busy.call(0, 0, 5000);  // behind it a close() that was interrupted comes again
  CHECK(attempt.state->settled() >= bench.ring().head());
  writer.detach(busy.state->id());
}
