// One (trace, rank) that this process writes to: the lock, what is on disk already, and dropping.
//
//   StoreState        one a directory and process, found by device and inode
//   StoreUse          a share in it; the lock is held from the first to the last
//   segments on disk  those of earlier processes are sealed when the store opens, and only read or
//   dropped afterwards
//
// Thread safety: construction and destruction from any thread; process().stores_mutex is never held
// over file work, which may take for ever on a frozen disk; drop_* on the writer thread, or on any
// one thread while no writer runs; the counters from anywhere.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "process.h"
#include "store/environment.h"

namespace mld {

struct StoreOptions {
  std::uint32_t rank = 0;
  Sync sync = Sync::kEveryCommit;
  std::optional<std::uint64_t> max_bytes;
  std::size_t segment_bytes = std::size_t{4} << 30;
  std::string owner;  // what the lock file tells others of who holds it
  // Where segments are written until they are sealed and somebody moves them to the rank's
  // directory, its home; empty: there.
  std::string staging;
};

struct DroppedRows {
  std::uint64_t rows = 0, ground_truth_rows = 0;
};

// flock on a file, let go by forked children.
class LockFile {
 public:
  // Throws Error(kTraceInUse) when another process holds it. `owner` is written into the file.
  explicit LockFile(const std::string& path, std::string_view owner = {});
  ~LockFile();
  LockFile(const LockFile&) = delete;
  LockFile& operator=(const LockFile&) = delete;

  // Whether anybody holds the lock of `path`; asks without keeping it.
  static bool is_held(const std::string& path);

 private:
  int descriptor_ = -1;
  std::uint64_t generation_ = process_generation();
};

class StoreState : public std::enable_shared_from_this<StoreState> {
 public:
  // Whether this process writes to the rank directory that `segment_directory` lies in.
  static bool owns(const std::string& segment_directory);

  [[nodiscard]] const std::string& directory() const noexcept { return directory_; }
  [[nodiscard]] const StoreOptions& options() const noexcept { return options_; }
  // Where an epoch is written to, and where its sealed segments end up.
  [[nodiscard]] std::string partition_directory(std::int64_t epoch) const;
  [[nodiscard]] std::string home_directory(std::int64_t epoch) const;
  [[nodiscard]] bool is_staged() const noexcept { return !options_.staging.empty(); }

  // Of all segments of this rank, as last seen by the writer.
  [[nodiscard]] std::uint64_t disk_bytes() const noexcept {
    return disk_bytes_.load(std::memory_order_relaxed);
  }
  // relaxed: a budget's count; only the writer thread and drops write it.
  void add_disk_bytes(std::uint64_t bytes) noexcept {
    disk_bytes_.fetch_add(bytes, std::memory_order_relaxed);
  }

  // Deletes an epoch, or one attempt of it. REQUIRES: no environment of it is open for writing.
  DroppedRows drop_epoch(std::int64_t epoch, std::optional<std::uint32_t> attempt);
  void drop_all();

 private:
  friend class StoreUse;
  StoreState(std::string directory, const StoreOptions& options)
      : directory_(std::move(directory)), options_(options) {}
  // Takes the lock and what earlier processes left, unless that is done. REQUIRES: users_ counts
  // the caller.
  void take();
  void adopt_earlier_segments();
  // The directories of this rank that hold epochs: its home, and the staging one.
  [[nodiscard]] std::vector<std::string> roots() const;
  DroppedRows delete_directories(const std::vector<std::string>& directories, bool count);
  std::string next_trash_name(const std::string& doomed);
  void subtract_disk_bytes(std::uint64_t bytes) noexcept;

  const std::string directory_;
  const StoreOptions options_;
  std::mutex taking_;               // held by the one who takes
  std::unique_ptr<LockFile> lock_;  // protected by process().stores_mutex, as is users_
  std::size_t users_ = 0;
  std::uint64_t trash_counter_ = 0;
  std::atomic<std::uint64_t> disk_bytes_{0};
};

class StoreUse {
 public:
  StoreUse() = default;
  // A share in the process's store of `directory`, which is made if it is missing. Throws
  // Error(kTraceInUse), Error(kInvalidInput) when it is open with other options, StoreError.
  StoreUse(const std::string& directory, const StoreOptions& options);
  // One more share in a store that is in use.
  explicit StoreUse(const StoreUse& other);
  StoreUse(StoreUse&& other) noexcept = default;
  StoreUse& operator=(StoreUse&& other) noexcept;
  StoreUse& operator=(const StoreUse&) = delete;
  ~StoreUse() { release(); }

  [[nodiscard]] const std::shared_ptr<StoreState>& state() const noexcept { return state_; }
  explicit operator bool() const noexcept { return state_ != nullptr; }
  // Lets go; the last one of the process unlocks the directory.
  void release() noexcept;

 private:
  std::shared_ptr<StoreState> state_;
};

}  // namespace mld
