// One environment a process, whatever path leads to it; and nothing of it after a fork.
#include "store/environment.h"

#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <thread>
#include <vector>

#include "check.h"
#include "store/files.h"
#include "store/segment.h"
#include "support.h"

namespace {

using mld::Access;
using mld::Environment;
using mld::Sync;
using support::TempDir;

constexpr std::size_t kMap = std::size_t{16} << 20;

std::shared_ptr<Environment> create(const std::string& directory) {
  mld::make_directories(directory);
  return Environment::open(directory, Access::kCreate, Sync::kOnRequest, kMap);
}

int error_code(const std::string& directory, Access access) {
  try {
    static_cast<void>(Environment::open(directory, access, Sync::kOnRequest, 0));
  } catch (const mld::StoreError& error) {
    return error.code();
  }
  return 0;
}

}  // namespace

TEST(environment_is_one_a_process_even_by_a_symlink) {
  const TempDir directory;
  const auto first = create(directory / "env");
  CHECK_EQ(symlink((directory / "env").c_str(), (directory / "link").c_str()), 0);
  for (const Access access : {Access::kWrite, Access::kReadLive, Access::kReadSealed}) {
    CHECK(Environment::open(directory / "env", access, Sync::kEveryCommit, 0) == first);
    CHECK(Environment::open(directory / "link", access, Sync::kEveryCommit, 0) == first);
  }
  mld::rename_path(directory / "env", directory / "moved");  // as a drop does
  CHECK(Environment::open(directory / "moved", Access::kReadSealed, Sync::kEveryCommit, 0) ==
        first);
}

TEST(environment_gives_its_descriptors_back) {
  const TempDir directory;
  const std::size_t before = support::open_descriptors();
  auto environment = create(directory / "env");
  CHECK(support::open_descriptors() > before);
  environment.reset();
  CHECK_EQ(support::open_descriptors(), before);
  environment = Environment::open(directory / "env", Access::kReadSealed, Sync::kOnRequest, 0);
  environment.reset();
  CHECK_EQ(support::open_descriptors(), before);
  CHECK(mld::process().environments.empty());
}

TEST(environment_that_is_gone_or_garbage_is_an_error_and_leaves_nothing) {
  const TempDir directory;
  const std::size_t before = support::open_descriptors();
  for (const Access access : {Access::kWrite, Access::kReadLive, Access::kReadSealed}) {
    CHECK_EQ(error_code(directory / "none", access), ENOENT);
  }
  mld::make_directories(directory / "garbage");
  support::write_file(directory / "garbage/data.mdb", support::pattern(1, 100000));
  CHECK_EQ(error_code(directory / "garbage", Access::kReadSealed), MDB_INVALID);
  CHECK_EQ(error_code(directory / "garbage", Access::kReadLive), MDB_INVALID);

  {  // LMDB, but not ours
    MDB_env* handle = nullptr;
    mld::make_directories(directory / "foreign");
    mdb_env_create(&handle);
    CHECK_EQ(mdb_env_open(handle, (directory / "foreign").c_str(), 0, 0600), 0);
    mdb_env_close(handle);
  }
  CHECK_EQ(error_code(directory / "foreign", Access::kReadSealed), MDB_NOTFOUND);
  CHECK_EQ(support::open_descriptors(), before);
  CHECK(mld::process().environments.empty());
}

// The last owner may be closing the very environment that somebody opens: there must be one handle
// at any time, since closing one of two would drop the locks of both.
TEST(environment_is_opened_and_closed_from_many_threads) {
  const TempDir directory;
  create(directory / "env").reset();
  std::atomic<int> alive{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (int round = 0; round < 100; ++round) {
        const auto environment =
            Environment::open(directory / "env", Access::kWrite, Sync::kOnRequest, 0);
        const mld::Transaction transaction(*environment, true);
        ++alive;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(alive.load(), 400);
  CHECK(mld::process().environments.empty());
}

TEST(environment_of_a_parent_is_inert_in_a_child) {
  const TempDir directory;
  auto environment = create(directory / "env");
  const int status = support::in_child([&] {
    environment.reset();  // neither closed nor touched
    if (!mld::process().environments.empty()) return 1;
    // A handle of the child's own is another one.
    const auto own = Environment::open(directory / "env", Access::kReadLive, Sync::kOnRequest, 0);
    const mld::Transaction transaction(*own, true);
    return 0;
  });
  CHECK_EQ(status, 0);
  const mld::Transaction transaction(*environment, false);  // the parent still writes
  CHECK(transaction.get() != nullptr);
}

// A sparse lock.mdb that is written to through a map is a SIGBUS when the disk is full.
TEST(environment_takes_the_blocks_of_its_lock_file_when_it_is_made) {
  const TempDir directory;
  const auto environment = create(directory / "env");
  struct stat status{};
  CHECK_EQ(stat((directory / "env/lock.mdb").c_str(), &status), 0);
  CHECK(status.st_blocks * 512 >= status.st_size);
  CHECK(status.st_size >= 510 * 64);
}
