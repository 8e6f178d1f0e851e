// Allocations of this thread that fail, one after the other: what was half done must be undone.
#include <cstdlib>
#include <list>
#include <memory>
#include <new>
#include <string>

#include "capture/attempt.h"
#include "check.h"
#include "store/environment.h"
#include "store/files.h"
#include "store/segment.h"
#include "store/store.h"
#include "support.h"
#include "writer/writer.h"

namespace {

thread_local long t_left = -1;  // allocations until one fails; negative: none does

void* try_allocate(std::size_t bytes) noexcept {
  if (t_left >= 0 && t_left-- == 0) return nullptr;
  return std::malloc(bytes == 0 ? 1 : bytes);
}

void* allocate(std::size_t bytes) {
  if (void* memory = try_allocate(bytes)) return memory;
  throw std::bad_alloc();
}

// Not inlined: where it is, GCC takes free() for a mismatch with operator new.
[[gnu::noinline]] void release(void* memory) noexcept { std::free(memory); }

// Runs `body` with its first, its second, ... allocation failing, until it needs no more of them;
// `check` looks at what each failure has left. Returns how many failed.
template <class Body, class Check>
long fail_each_allocation(Body body, Check check) {
  for (long number = 0;; ++number) {
    bool failed = false;
    t_left = number;
    try {
      body();
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    failed = failed || t_left < 0;  // or it was swallowed
    t_left = -1;
    if (!failed) return number;
    check();
  }
}

struct EveryCopyIsLost final : mld::CopyWatch {
  mld::CopyState state_of(const mld::RecordHeader&) noexcept override {
    return mld::CopyState::kLost;
  }
};

}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes); }
void* operator new[](std::size_t bytes) { return allocate(bytes); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return try_allocate(bytes);
}
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return try_allocate(bytes);
}
void operator delete(void* memory) noexcept { release(memory); }
void operator delete[](void* memory) noexcept { release(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { release(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { release(memory); }
void operator delete(void* memory, std::size_t) noexcept { release(memory); }
void operator delete[](void* memory, std::size_t) noexcept { release(memory); }

TEST(environment_that_cannot_be_registered_holds_nothing_up) {
  const support::TempDir directory;
  const std::string path = directory / "a00000-s00000";
  mld::Segment(path, {0, 0, 0, 0}, mld::Sync::kOnRequest, std::size_t{16} << 20).seal();
  const std::size_t descriptors = support::open_descriptors();
  const auto open = [&] {
    return mld::Environment::open(path, mld::Access::kReadSealed, mld::Sync::kEveryCommit, 0);
  };
  const long failures =
      fail_each_allocation(open, [&] { CHECK_EQ(support::open_descriptors(), descriptors); });
  CHECK(failures > 3);
  CHECK(open() != nullptr);
}

TEST(lock_files_that_cannot_be_guarded_are_not_held) {
  constexpr int kLocks = 50;  // more than there was room for before
  const support::TempDir directory;
  const auto path = [&](int number) { return directory / std::to_string(number); };
  const std::size_t descriptors = support::open_descriptors();
  const auto lock_all = [&] {
    std::list<mld::LockFile> locks;
    for (int number = 0; number < kLocks; ++number) locks.emplace_back(path(number), "me");
  };
  const long failures = fail_each_allocation(lock_all, [&] {
    CHECK_EQ(support::open_descriptors(), descriptors);
    for (int number = 0; number < kLocks; ++number) CHECK(!mld::LockFile::is_held(path(number)));
  });
  CHECK(failures > kLocks);
}

TEST(directory_that_cannot_be_listed_is_closed) {
  const support::TempDir directory;
  support::write_file(directory / "a name that is too long for a string without memory", "");
  const std::size_t descriptors = support::open_descriptors();
  const long failures =
      fail_each_allocation([&] { mld::list_directory(directory.path()); },
                           [&] { CHECK_EQ(support::open_descriptors(), descriptors); });
  CHECK(failures > 1);
}

TEST(call_that_its_device_lost_is_counted_once_without_memory) {
  for (long number = 0, struck = 1; struck != 0; ++number) {
    const support::TempDir directory;
    support::Bench bench;
    EveryCopyIsLost watch;
    mld::Writer writer(bench.ring(), &watch);
    mld::StoreOptions options;
    options.sync = mld::Sync::kOnRequest;
    options.segment_bytes = std::size_t{16} << 20;
    const auto attempt = std::make_shared<mld::AttemptState>(
        7, mld::StoreUse(directory.path(), options), mld::RecorderOptions());
    writer.attach(attempt);
    const std::uint64_t chunk = bench.chunk(7, 0, 0, 0, "abc");
    auto* memory = const_cast<std::byte*>(bench.ring().at(chunk));
    reinterpret_cast<mld::RecordHeader*>(memory)->copy_device = 1;
    attempt->ledger().submit(4, 3);
    bench.call(7, 0, 0, 4, 3);
    t_left = number;
    try {
      writer.drain_group(mld::Clock::now(), ~std::uint64_t{0});
    } catch (const std::bad_alloc&) {
      // The thread would try again, too.
    }
    struck = t_left < 0 ? 1 : 0;
    t_left = -1;
    for (int seconds = 1; seconds < 4; ++seconds)
      writer.drain_group(mld::Clock::now() + std::chrono::seconds(seconds), ~std::uint64_t{0});
    const mld::Counters counters = attempt->ledger().snapshot();
    CHECK_EQ(counters.rows_failed, 4);
    CHECK_EQ(counters.rows_committed, 0);
    CHECK_EQ(counters.rows_in_flight, 0);
    writer.detach(7);
    const auto stored = support::read_partition(directory / "epoch-0");
    CHECK(stored.calls.empty());
    CHECK_EQ(stored.gaps.size(), 1);
  }
}

TEST(losses_stay_where_the_writer_has_no_memory_for_them) {
  const support::TempDir directory;
  mld::AttemptState attempt(8, mld::StoreUse(directory.path(), mld::StoreOptions()),
                            mld::RecorderOptions());
  for (std::uint64_t call = 0; call < 10; call += 2)
    attempt.note_loss({0, 0, {call, call, 1, 1, mld::kDeviceErrorCause}});
  std::vector<std::uint64_t> taken;
  const auto take_two = [&](const mld::LossNote& note) {
    if (taken.size() % 3 == 2) {
      taken.push_back(99);
      throw std::bad_alloc();
    }
    taken.push_back(note.gap.first_call);
  };
  for (int tries = 0; tries < 3; ++tries) {
    try {
      attempt.take_losses(0, take_two);
    } catch (const std::bad_alloc&) {
    }
  }
  CHECK(taken == (std::vector<std::uint64_t>{0, 2, 99, 4, 6, 99, 8}));
}

TEST(losses_of_a_ring_that_stands_still_are_one_note) {
  const support::TempDir directory;
  mld::AttemptState attempt(9, mld::StoreUse(directory.path(), mld::StoreOptions()),
                            mld::RecorderOptions());
  for (std::uint64_t call = 0; call < 1000; ++call)
    attempt.note_loss({4096, 3, {call, call, 2, 10, "overflow_discard"}});
  attempt.note_loss({4096, 4, {1000, 1000, 2, 10, "overflow_discard"}});
  std::vector<mld::LossNote> notes;
  attempt.take_losses(4096, [&](const mld::LossNote& note) { notes.push_back(note); });
  CHECK_EQ(notes.size(), 2);
  CHECK_EQ(notes[0].gap.last_call, 999);
  CHECK_EQ(notes[0].gap.rows, 2000);
  CHECK_EQ(notes[0].gap.bytes, 10000);
  CHECK_EQ(notes[1].epoch, 4);
}
