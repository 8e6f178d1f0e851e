// The directory of one rank: who may write to it, what an earlier process left, what a drop takes
// away.
#include "store/store.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "store/crc32c.h"
#include "store/files.h"
#include "store/segment.h"
#include "store/segment_reader.h"
#include "support.h"

namespace {

using mld::ErrorKind;
using mld::LockFile;
using mld::StoreOptions;
using mld::StoreUse;
using mld::Sync;
using support::in_child;
using support::kind_of;
using support::TempDir;

// A child that runs `body`, says so through a pipe, and lives until it is told to end.
class HeldChild {
 public:
  template <class Body>
  explicit HeldChild(Body body) {
    int ready[2];
    REQUIRE(pipe(ready) == 0);
    pid_ = fork();
    if (pid_ == 0) {
      body([&] {
        const ssize_t written = write(ready[1], "x", 1);
        static_cast<void>(written);
        for (;;) pause();
      });
      _exit(1);
    }
    ::close(ready[1]);
    char byte = 0;
    said_ready_ = ::read(ready[0], &byte, 1) == 1;
    ::close(ready[0]);
  }
  ~HeldChild() { end(); }
  HeldChild(const HeldChild&) = delete;
  HeldChild& operator=(const HeldChild&) = delete;
  [[nodiscard]] bool said_ready() const { return said_ready_; }
  void end() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  pid_t pid_ = -1;
  bool said_ready_ = false;
};

struct Contents {
  std::uint32_t attempt = 0, sequence = 0;
  std::int64_t epoch = 0;
  std::uint64_t first_call = 0, calls = 1;
};

// A segment as a writer leaves it when it dies: `seal` is what it would have done last.
void make_segment(const std::string& rank, const Contents& contents, bool seal,
                  Sync sync = Sync::kEveryCommit) {
  const std::string directory = rank + "/" + mld::partition_name(contents.epoch) + "/" +
                                mld::segment_name(contents.attempt, contents.sequence);
  mld::Segment segment(directory, {0, contents.attempt, contents.sequence, contents.epoch}, sync,
                       std::size_t{16} << 20);
  mld::Segment::Batch batch(segment);
  for (std::uint64_t call = contents.first_call; call < contents.first_call + contents.calls;
       ++call) {
    std::string header;
    mld::encode_call({0, contents.attempt, call, contents.epoch, 10, 7, 0}, {}, "\xC0", "",
                     &header);
    batch.put_header(call, header);
  }
  batch.commit();
  if (seal) segment.seal();
}

std::uint64_t bytes_on_disk(const std::string& rank) {
  std::uint64_t bytes = 0;
  for (const std::string& partition : mld::list_directory(rank)) {
    if (partition.rfind("epoch-", 0) != 0) continue;
    for (const std::string& segment : mld::list_directory(rank + "/" + partition)) {
      bytes += mld::disk_bytes_of(rank + "/" + partition + "/" + segment + "/data.mdb");
    }
  }
  return bytes;
}

}  // namespace

TEST(lock_file_excludes_another_process_until_it_dies) {
  const TempDir directory;
  const std::string path = directory / "writer.lock";
  CHECK(!LockFile::is_held(path));
  HeldChild child([&](auto hold) {
    const LockFile lock(path);
    hold();
  });
  REQUIRE(child.said_ready());
  CHECK(LockFile::is_held(path));
  CHECK(kind_of([&] { LockFile second(path); }) == ErrorKind::kTraceInUse);
  CHECK(kind_of([&] { StoreUse use(directory.path(), {}); }) == ErrorKind::kTraceInUse);
  child.end();
  CHECK(!LockFile::is_held(path));
  const LockFile mine(path);
  CHECK(LockFile::is_held(path));
  CHECK_EQ(in_child([&] {
             return kind_of([&] { LockFile other(path); }) == ErrorKind::kTraceInUse ? 0 : 1;
           }),
           0);
}

// A DataLoader's worker that outlives its killed parent would otherwise lock the next run out.
TEST(orphaned_child_does_not_keep_its_parents_lock) {
  const TempDir directory;
  const std::string path = directory / "writer.lock";
  int orphan_is_up[2];
  REQUIRE(pipe(orphan_is_up) == 0);
  const int status = in_child([&] {
    const LockFile lock(path);
    const pid_t orphan = fork();
    if (orphan == 0) {
      const ssize_t written = write(orphan_is_up[1], "x", 1);
      static_cast<void>(written);
      ::close(orphan_is_up[1]);
      sleep(30);
      _exit(0);
    }
    char byte;
    if (::read(orphan_is_up[0], &byte, 1) != 1) return 1;
    support::write_file(directory / "orphan", std::to_string(orphan));
    raise(SIGKILL);
    return 1;
  });
  ::close(orphan_is_up[0]);
  ::close(orphan_is_up[1]);
  CHECK_EQ(status, 128 + SIGKILL);
  const pid_t orphan = std::stoi(support::read_file(directory / "orphan"));
  CHECK_EQ(kill(orphan, 0), 0);  // it lives
  CHECK(!LockFile::is_held(path));
  CHECK(kind_of([&] { LockFile mine(path); }) == std::nullopt);
  kill(orphan, SIGKILL);
}

TEST(forked_child_releases_nothing_of_its_parent) {
  const TempDir directory;
  auto use = std::make_unique<StoreUse>(directory.path(), StoreOptions{});
  const int status = in_child([&] {
    use.reset();  // an inherited handle: inert
    if (!LockFile::is_held(directory / "writer.lock")) return 1;
    // A store of the child's own is refused, as in any other process.
    return kind_of([&] { StoreUse own(directory.path(), {}); }) == ErrorKind::kTraceInUse ? 0 : 2;
  });
  CHECK_EQ(status, 0);
  CHECK(LockFile::is_held(directory / "writer.lock"));
  use.reset();
  CHECK(!LockFile::is_held(directory / "writer.lock"));
}

TEST(store_is_shared_within_a_process_and_unlocked_by_the_last) {
  const TempDir directory;
  CHECK_EQ(symlink(directory.path().c_str(), (directory.path() + "-link").c_str()), 0);
  auto first = std::make_unique<StoreUse>(directory.path(), StoreOptions{});
  auto second = std::make_unique<StoreUse>(directory.path() + "-link", StoreOptions{});
  unlink((directory.path() + "-link").c_str());
  CHECK(first->state() == second->state());
  auto third = std::make_unique<StoreUse>(*second);
  StoreUse moved(std::move(*third));
  third.reset();
  StoreOptions other;
  other.sync = Sync::kOnRequest;
  CHECK(kind_of([&] { StoreUse use(directory.path(), other); }) == ErrorKind::kInvalidInput);
  other = {};
  other.max_bytes = 5;
  CHECK(kind_of([&] { StoreUse use(directory.path(), other); }) == ErrorKind::kInvalidInput);
  first.reset();
  second.reset();
  CHECK(LockFile::is_held(directory / "writer.lock"));
  moved.release();
  moved.release();
  CHECK(!LockFile::is_held(directory / "writer.lock"));
  const StoreUse again(directory.path(), other);  // others' options bind no more
}

TEST(store_knows_which_segments_are_its_own) {
  const TempDir directory;
  make_segment(directory.path(), {}, false);
  const std::string segment = directory / "epoch-0/a00000-s00000";
  CHECK(!mld::StoreState::owns(segment));
  {
    const StoreUse use(directory.path(), {});
    CHECK(mld::StoreState::owns(segment));
    CHECK(!mld::StoreState::owns("/tmp/elsewhere/epoch-0/a00000-s00000"));
  }
  CHECK(!mld::StoreState::owns(segment));
}

TEST(store_seals_what_a_dead_writer_left) {
  const TempDir directory;
  make_segment(directory.path(), {0, 0, 0}, true);
  make_segment(directory.path(), {0, 1, 0, 1}, false);
  make_segment(directory.path(), {1, 0, 3}, false, Sync::kOnRequest);  // of this boot
  mld::make_directories(directory / "epoch-3/a00001-s00001");          // died before its first row
  support::write_file(directory / "epoch-3/a00001-s00001/data.mdb", support::pattern(1, 50000));
  make_segment(directory.path(), {2, 0, 5}, false, Sync::kOnRequest);
  std::string json = support::read_file(directory / "epoch-5/a00002-s00000/segment.json");
  json.replace(json.find(mld::boot_id()), mld::boot_id().size(), "another-boot");
  support::write_file(directory / "epoch-5/a00002-s00000/segment.json", json);

  const StoreUse use(directory.path(), {});
  CHECK(mld::path_exists(directory / "epoch-0/a00000-s00001/sealed.json"));
  CHECK(mld::path_exists(directory / "epoch-3/a00001-s00000/sealed.json"));
  CHECK(!mld::path_exists(directory / "epoch-3/a00001-s00001"));
  // It went through a power cut without having been synced: left as it is, for `recover`.
  CHECK(!mld::path_exists(directory / "epoch-5/a00002-s00000/sealed.json"));
  CHECK(mld::path_exists(directory / "epoch-5/a00002-s00000/data.mdb"));
  CHECK_EQ(use.state()->disk_bytes(), bytes_on_disk(directory.path()));
  CHECK(use.state()->disk_bytes() > 0);
}

TEST(store_finishes_the_drops_of_a_dead_writer) {
  const TempDir directory;
  make_segment(directory.path(), {0, 0, 4}, true);
  mld::rename_path(directory / "epoch-4", directory / "trash-1-0");
  const StoreUse use(directory.path(), {});
  CHECK(mld::list_directory(directory.path()) == std::vector<std::string>{"writer.lock"});
  CHECK_EQ(use.state()->disk_bytes(), 0);
}

TEST(drop_counts_each_call_once_and_gives_the_space_back) {
  const TempDir directory;
  make_segment(directory.path(), {0, 0, 2, 0, 5}, true);
  make_segment(directory.path(), {0, 1, 2, 4, 3},
               true);  // call 4 once more: its first commit had an unknown end
  make_segment(directory.path(), {1, 0, 2, 0, 5},
               true);  // the same numbers in another attempt are other calls
  make_segment(directory.path(), {0, 0, mld::kNoEpoch, 0, 2}, true);
  const StoreUse use(directory.path(), {});
  const mld::DroppedRows dropped = use.state()->drop_epoch(2, std::nullopt);
  CHECK_EQ(dropped.rows, 120);
  CHECK_EQ(dropped.ground_truth_rows, 84);
  CHECK(!mld::path_exists(directory / "epoch-2"));
  CHECK_EQ(use.state()->disk_bytes(), bytes_on_disk(directory.path()));
  CHECK_EQ(use.state()->drop_epoch(2, std::nullopt).rows, 0);
  CHECK_EQ(use.state()->drop_epoch(77, std::nullopt).rows, 0);
  CHECK_EQ(use.state()->drop_epoch(mld::kNoEpoch, std::nullopt).rows, 20);
  CHECK_EQ(use.state()->disk_bytes(), 0);
  for (const std::string& name : mld::list_directory(directory.path()))
    CHECK(name.rfind("trash-", 0) != 0);
}

TEST(drop_of_one_attempt_leaves_the_others) {
  const TempDir directory;
  make_segment(directory.path(), {0, 0, 2, 0, 5}, true);
  make_segment(directory.path(), {1, 0, 2, 0, 3}, true);
  make_segment(directory.path(), {1, 1, 2, 3, 1}, true);
  make_segment(directory.path(), {10, 0, 2, 0, 2}, true);
  const StoreUse use(directory.path(), {});
  CHECK_EQ(use.state()->drop_epoch(2, 1).rows, 40);
  CHECK(mld::list_directory(directory / "epoch-2") ==
        (std::vector<std::string>{"a00000-s00000", "a00010-s00000"}));
  CHECK_EQ(use.state()->disk_bytes(), bytes_on_disk(directory.path()));
  CHECK_EQ(use.state()->drop_epoch(2, 7).rows, 0);
}

TEST(drop_all_takes_every_epoch) {
  const TempDir directory;
  for (std::int64_t epoch = -1; epoch < 3; ++epoch)
    make_segment(directory.path(), {0, 0, epoch}, epoch != 1);
  support::write_file(directory / "attempts.json", "[]");
  const StoreUse use(directory.path(), {});
  use.state()->drop_all();
  CHECK(mld::list_directory(directory.path()) ==
        (std::vector<std::string>{"attempts.json", "writer.lock"}));
  CHECK_EQ(use.state()->disk_bytes(), 0);
  use.state()->drop_all();
}

// Damage must not keep an epoch from being dropped.
TEST(drop_deletes_a_damaged_segment_too) {
  const TempDir directory;
  make_segment(directory.path(), {0, 0, 2, 0, 5}, true);
  make_segment(directory.path(), {0, 1, 2, 5, 5}, true);
  make_segment(directory.path(), {0, 2, 2, 10, 5}, true);
  support::write_file(directory / "epoch-2/a00000-s00000/data.mdb", support::pattern(1, 50000));
  const StoreUse use(directory.path(), {});
  CHECK_EQ(use.state()->drop_epoch(2, std::nullopt).rows, 100);
  CHECK(mld::list_directory(directory.path()) == std::vector<std::string>{"writer.lock"});
  CHECK_EQ(use.state()->disk_bytes(), 0);
}

// The space comes back with the last handle, so a drop waits a little for readers of this process.
TEST(drop_waits_for_a_reader_that_is_at_work) {
  const TempDir directory;
  const std::string segment = directory / "epoch-2/a00000-s00000";
  make_segment(directory.path(), {0, 0, 2, 0, 5}, true);
  const StoreUse use(directory.path(), {});
  std::atomic<bool> let_go{false};
  auto reader = std::make_unique<mld::SegmentReader>(segment, true);
  std::thread thread([&] {
    CHECK(support::eventually(
        [&] { return !mld::path_exists(segment); }));  // gone for everybody else
    CHECK(kind_of([&] { mld::SegmentReader(segment, true); }) == ErrorKind::kNotFound);
    CHECK_EQ(reader->headers(std::nullopt, 10).size(), 5);
    let_go = true;
    reader.reset();
  });
  CHECK_EQ(use.state()->drop_epoch(2, std::nullopt).rows, 50);
  CHECK(let_go);
  thread.join();
}

TEST(files_are_replaced_whole_and_only_for_their_owner) {
  const TempDir directory;
  mld::replace_file(directory / "f", "old");
  mld::replace_file(directory / "f", "new");
  CHECK_EQ(support::read_file(directory / "f"), "new");
  CHECK(mld::list_directory(directory.path()) == std::vector<std::string>{"f"});
  mld::make_directories(directory / "a/b/c");
  mld::make_directories(directory / "a/b/c");
  mld::remove_tree(directory / "a");
  mld::remove_tree(directory / "a");
  CHECK(!mld::path_exists(directory / "a"));
  CHECK(kind_of([&] { mld::make_directories(directory / "f/g"); }) == ErrorKind::kStorage);
}
