// A partition whose storage refuses: what waits, what moves on to a successor, what gives up; and
// never a row twice.
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include "check.h"
#include "store/files.h"
#include "store/partition.h"
#include "support.h"

namespace {

using namespace std::chrono_literals;
using mld::CommitOutcome;
using support::Bench;
using support::pattern;
using support::SmallDisk;
using support::TempDir;

mld::PartitionOptions options_at(const std::string& directory,
                                 mld::Sync sync = mld::Sync::kEveryCommit) {
  return {directory, 0, 0, 0, sync, std::size_t{64} << 20, 10s};
}

void add_call(Bench& bench, mld::Partition& partition, std::uint64_t call, std::size_t bytes) {
  bench.chunk(1, 0, call, 0, pattern(call, bytes));
  bench.call(1, 0, call, 1, bytes);
  partition.add(bench.take());
  partition.add(bench.take());
}

void check_calls(const std::string& directory, std::uint64_t calls, std::size_t bytes) {
  const auto stored = support::read_partition(directory);
  CHECK_EQ(stored.calls.size(), calls);
  CHECK_EQ(stored.headers, calls);  // each exactly once
  CHECK_EQ(stored.meta_rows, calls);
  for (const auto& [key, call] : stored.calls)
    CHECK(call.captures.at(0) == pattern(key.second, bytes));
}

class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    getrlimit(RLIMIT_FSIZE, &before_);
    handler_ = signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &before_);
    signal(SIGXFSZ, handler_);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

 private:
  rlimit before_{};
  void (*handler_)(int) = SIG_DFL;
};

class DescriptorLimit {
 public:
  DescriptorLimit() {
    getrlimit(RLIMIT_NOFILE, &before_);
    const int lowest_free = open("/dev/null", O_RDONLY | O_CLOEXEC);
    close(lowest_free);
    const rlimit limit{static_cast<rlim_t>(lowest_free), before_.rlim_max};
    setrlimit(RLIMIT_NOFILE, &limit);
  }
  ~DescriptorLimit() { lift(); }
  void lift() { setrlimit(RLIMIT_NOFILE, &before_); }
  DescriptorLimit(const DescriptorLimit&) = delete;
  DescriptorLimit& operator=(const DescriptorLimit&) = delete;

 private:
  rlimit before_{};
};

}  // namespace

TEST(full_disk_is_waited_for_and_the_same_rows_are_written_once) {
  for (const mld::Sync sync : {mld::Sync::kEveryCommit, mld::Sync::kOnRequest}) {
    SmallDisk disk(std::size_t{2} << 20);
    if (!disk.mounted()) return support::skipped("mounting a tmpfs needs root");
    Bench bench(std::size_t{4} << 20);
    mld::Partition partition(options_at(disk / "epoch-0", sync));
    add_call(bench, partition, 0, 100000);
    CHECK(partition.commit(mld::Clock::now()).outcome == CommitOutcome::kCommitted);
    disk.fill();
    const auto begin = mld::Clock::now();
    for (std::uint64_t call = 1; call < 6; ++call) add_call(bench, partition, call, 100000);
    for (auto now = begin; now < begin + 1s; now += 100ms) {
      CHECK(partition.commit(now).outcome == CommitOutcome::kRetryLater);
      CHECK(partition.retry_at() > now);
      CHECK(partition.has_pending());
      CHECK(partition.oldest_position().has_value());
      add_call(bench, partition, 6 + static_cast<std::uint64_t>((now - begin) / 100ms), 100);
      bench.ring().release(*partition.oldest_position());
    }
    CHECK_EQ(support::read_partition(disk / "epoch-0").calls.size(), 1);
    disk.empty();
    const mld::CommitResult result = partition.commit(begin + 2s);
    CHECK(result.outcome == CommitOutcome::kCommitted);
    CHECK_EQ(result.committed.rows, 15);
    CHECK(!partition.has_pending());
    const auto stored = support::read_partition(disk / "epoch-0");
    CHECK_EQ(stored.calls.size(), 16);
    CHECK_EQ(stored.headers, 16);
    CHECK_EQ(stored.meta_rows, 16);
    for (const auto& [key, call] : stored.calls) {
      CHECK(call.captures.at(0) == pattern(key.second, key.second < 6 ? 100000 : 100));
    }
  }
}

TEST(disk_that_is_full_from_the_start_is_waited_for) {
  SmallDisk disk(std::size_t{2} << 20);
  if (!disk.mounted()) return support::skipped("mounting a tmpfs needs root");
  Bench bench;
  mld::Partition partition(options_at(disk / "epoch-0"));
  disk.fill();
  const auto begin = mld::Clock::now();
  add_call(bench, partition, 0, 5000);
  for (int tries = 0; tries < 5; ++tries)
    CHECK(partition.commit(begin).outcome == CommitOutcome::kRetryLater);
  CHECK(mld::list_directory(disk / "epoch-0").empty());  // half a segment does not stay
  disk.empty();
  CHECK(partition.commit(begin).outcome == CommitOutcome::kCommitted);
  check_calls(disk / "epoch-0", 1, 5000);
}

TEST(full_disk_is_given_up_after_the_stall_timeout) {
  SmallDisk disk(std::size_t{2} << 20);
  if (!disk.mounted()) return support::skipped("mounting a tmpfs needs root");
  Bench bench;
  mld::Partition partition(options_at(disk / "epoch-0"));
  disk.fill();
  add_call(bench, partition, 0, 5000);
  const auto begin = mld::Clock::now();
  CHECK(partition.commit(begin).outcome == CommitOutcome::kRetryLater);
  CHECK(partition.commit(begin + 9s).outcome == CommitOutcome::kRetryLater);
  CHECK(partition.commit(begin + 10s).outcome == CommitOutcome::kFailed);
  REQUIRE(partition.failure().has_value());
  CHECK(!partition.failure()->hint().empty());
  const mld::Tally tally = partition.discard_pending();
  CHECK_EQ(tally.rows, 1);
  CHECK_EQ(tally.bytes, 5000);
}

TEST(lack_of_descriptors_is_waited_for) {
  const TempDir directory;
  Bench bench;
  mld::Partition partition(options_at(directory / "epoch-0"));
  add_call(bench, partition, 0, 5000);
  const auto begin = mld::Clock::now();
  {
    const DescriptorLimit limit;
    for (int tries = 0; tries < 3; ++tries)
      CHECK(partition.commit(begin).outcome == CommitOutcome::kRetryLater);
  }
  CHECK(partition.commit(begin).outcome == CommitOutcome::kCommitted);
  check_calls(directory / "epoch-0", 1, 5000);
}

// The limit also bounds every successor, so a batch that no file can take is a permanent failure.
TEST(file_size_limit_is_permanent_for_a_batch_that_no_segment_can_take) {
  const TempDir directory;
  Bench bench(std::size_t{4} << 20);
  mld::Partition partition(options_at(directory / "epoch-0"));
  add_call(bench, partition, 0, 1000000);
  const auto begin = mld::Clock::now();
  {
    const FileSizeLimit limit(std::size_t{256} << 10);
    CHECK(partition.commit(begin).outcome == CommitOutcome::kFailed);
  }
  REQUIRE(partition.failure().has_value());
  CHECK(support::read_partition(directory / "epoch-0").calls.empty());
}

TEST(file_size_limit_moves_small_batches_to_successors_without_loss) {
  const TempDir directory;
  Bench bench(std::size_t{4} << 20);
  mld::Partition partition(options_at(directory / "epoch-0"));
  {
    const FileSizeLimit limit(std::size_t{512} << 10);
    for (std::uint64_t call = 0; call < 12; ++call) {
      add_call(bench, partition, call, 100000);
      CHECK(partition.commit(mld::Clock::now()).outcome == CommitOutcome::kCommitted);
      bench.ring().release(bench.ring().read_position());
    }
  }
  const auto stored = support::read_partition(directory / "epoch-0");
  CHECK(stored.segments > 1);
  CHECK_EQ(stored.calls.size(), 12);
  for (const auto& [key, call] : stored.calls)
    CHECK(call.captures.at(0) == pattern(key.second, 100000));
}

TEST(directory_that_may_not_be_written_is_permanent) {
  const TempDir directory;
  // As root nothing is forbidden, so the directory lies where a file is.
  const bool root = geteuid() == 0;
  if (root) {
    support::write_file(directory / "blocked", "a file");
  } else {
    mkdir((directory / "blocked").c_str(), 0500);
  }
  Bench bench;
  mld::Partition partition(options_at(directory / "blocked/epoch-0"));
  add_call(bench, partition, 0, 5000);
  CHECK(partition.commit(mld::Clock::now()).outcome == CommitOutcome::kFailed);
  REQUIRE(partition.failure().has_value());
  CHECK_EQ(partition.failure()->code(), root ? ENOTDIR : EACCES);
  CHECK_EQ(partition.discard_pending().rows, 1);
  if (!root) chmod((directory / "blocked").c_str(), 0700);
}

TEST(read_only_disk_is_permanent) {
  SmallDisk disk(std::size_t{2} << 20);
  if (!disk.mounted()) return support::skipped("mounting a tmpfs needs root");
  Bench bench;
  mld::Partition partition(options_at(disk / "epoch-0"));
  add_call(bench, partition, 0, 5000);
  CHECK(partition.commit(mld::Clock::now()).outcome == CommitOutcome::kCommitted);
  partition.seal();
  REQUIRE(disk.make_read_only());
  add_call(bench, partition, 1, 5000);
  CHECK(partition.commit(mld::Clock::now()).outcome == CommitOutcome::kFailed);
  CHECK_EQ(partition.failure()->code(), EROFS);
  check_calls(disk / "epoch-0", 1, 5000);
}
