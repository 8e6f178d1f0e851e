// The counters of one attempt and the law they obey.
//
// INVARIANT: rows_submitted == rows_committed + rows_discarded + rows_failed + rows_in_flight at
// every moment that snapshot() can see, and the same for bytes. Each counter is counted at its own
// place; none is derived from others.
//
// Thread safety: all. A mutex, not atomics: a call (not a hook) takes it twice and the writer once
// a commit, and only a lock lets a reader see all of them at one moment.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>

namespace mld {

enum class LossCause { kRingFull, kStall, kDropped };
inline constexpr std::array<const char*, 3> kLossCauseNames = {"ring_full", "stall", "dropped"};

struct Counters {
  std::uint64_t rows_submitted = 0, rows_committed = 0, rows_discarded = 0, rows_failed = 0,
                rows_in_flight = 0;
  std::uint64_t bytes_submitted = 0, bytes_committed = 0, bytes_discarded = 0, bytes_failed = 0,
                bytes_in_flight = 0;
  std::array<std::uint64_t, 3> rows_discarded_by_cause{};
  std::uint64_t stalls = 0, stall_ns = 0, commits = 0;
  std::uint64_t write_ns = 0, written_bytes = 0;  // of committed group writes, for the throughput
};

class Ledger {
 public:
  // A call's header was handed to the ring.
  void submit(std::uint64_t rows, std::uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    counters_.rows_submitted += rows;
    counters_.bytes_submitted += bytes;
    counters_.rows_in_flight += rows;
    counters_.bytes_in_flight += bytes;
  }
  // Calls in flight are on disk now.
  void commit(std::uint64_t rows, std::uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    counters_.rows_committed += rows;
    counters_.bytes_committed += bytes;
    land(rows, bytes);
  }
  // Calls in flight were given up with their storage.
  void fail(std::uint64_t rows, std::uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    counters_.rows_failed += rows;
    counters_.bytes_failed += bytes;
    land(rows, bytes);
  }
  // Calls in flight vanished with their epoch.
  void drop(std::uint64_t rows, std::uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    count_discarded(rows, bytes, LossCause::kDropped);
    land(rows, bytes);
  }
  // A call that never got into the ring: submitted and lost at once.
  void submit_discarded(std::uint64_t rows, std::uint64_t bytes, LossCause cause) {
    const std::lock_guard<std::mutex> lock(mutex_);
    counters_.rows_submitted += rows;
    counters_.bytes_submitted += bytes;
    count_discarded(rows, bytes, cause);
  }
  void submit_failed(std::uint64_t rows, std::uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    counters_.rows_submitted += rows;
    counters_.bytes_submitted += bytes;
    counters_.rows_failed += rows;
    counters_.bytes_failed += bytes;
  }
  void add_stall() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counters_.stalls;
  }
  void add_stall_time(std::uint64_t waited_ns) {
    const std::lock_guard<std::mutex> lock(mutex_);
    counters_.stall_ns += waited_ns;
  }
  void add_commit(std::uint64_t written_bytes, std::uint64_t write_ns) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counters_.commits;
    counters_.written_bytes += written_bytes;
    counters_.write_ns += write_ns;
  }
  // For a forked child's copy, whose mutex may be held by a thread that is not there.
  [[nodiscard]] const Counters& inherited() const noexcept { return counters_; }
  [[nodiscard]] Counters snapshot() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return counters_;
  }

 private:
  void land(std::uint64_t rows, std::uint64_t bytes) {
    counters_.rows_in_flight -= rows;
    counters_.bytes_in_flight -= bytes;
  }
  void count_discarded(std::uint64_t rows, std::uint64_t bytes, LossCause cause) {
    counters_.rows_discarded += rows;
    counters_.bytes_discarded += bytes;
    counters_.rows_discarded_by_cause[static_cast<std::size_t>(cause)] += rows;
  }

  mutable std::mutex mutex_;
  Counters counters_;  // protected by mutex_
};

}  // namespace mld
