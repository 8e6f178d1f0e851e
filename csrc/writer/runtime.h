// The ring and the writer thread of a process, and how other threads wait for them.
//
// One a process, made by the first recorder and taken down with the last one. The thread never
// touches Python, takes no signals, and may run on every CPU of the process's cpuset, whatever mask
// it inherited.
//
// Waking: the thread looks at the ring every commit interval; a producer wakes it earlier only when
// a group's worth of bytes is waiting, and a waiter when it begins to wait. So an ordinary hook
// makes no system call. In between it wakes for its status file and for requests of other
// processes (Writer::answer_requests), and goes to sleep again.
//
// Thread safety: all methods from any thread.
#pragma once

#include <semaphore.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "capture/attempt.h"
#include "device/device_stager.h"
#include "ring/arena.h"
#include "ring/byte_ring.h"
#include "wait_hooks.h"
#include "writer/writer.h"

namespace mld {

class Runtime {
 public:
  using Ring = Writer::Ring;

  // The process's runtime; the first caller's ring_bytes and device options hold for all.
  static std::shared_ptr<Runtime> acquire(std::size_t ring_bytes, const DeviceOptions& device = {});
  // The process's runtime if there is one.
  static std::shared_ptr<Runtime> current();
  explicit Runtime(std::size_t ring_bytes, const DeviceOptions& device = {});
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  [[nodiscard]] Ring& ring() noexcept { return ring_; }
  [[nodiscard]] DeviceStager& stager() noexcept { return stager_; }
  // Payload of the largest piece: small beside the ring, and with LMDB's 16-byte page header a
  // whole number of pages.
  [[nodiscard]] std::uint64_t max_piece_bytes() const noexcept { return max_piece_bytes_; }

  // Never given twice, not even across a fork: threads remember their calls by it.
  static std::uint32_t next_attempt_id() noexcept;
  void attach(const std::shared_ptr<AttemptState>& attempt);

  // Producer, after a publish: wakes the thread if a group is waiting.
  void note_published() noexcept {
    // relaxed: a decision that may lag; the thread looks by itself every interval.
    if (ring_.head() - read_position_.load(std::memory_order_relaxed) >=
        wake_granules_.load(std::memory_order_relaxed)) {
      wake();
    }
  }
  void wake() noexcept;

  // A count that rises whenever the writer has done something. Read it, look at the state you wait
  // for, then wait.
  [[nodiscard]] std::uint64_t progress() const noexcept {
    return progress_.load(std::memory_order_acquire);
  }
  // Wakes the writer and waits until progress() differs from `seen`, at most one slice.
  void wait_slice(std::uint64_t seen, WaitHooks& hooks);

  // Has `task` run on the writer thread between two groups; what it throws is nobody's.
  void post(std::function<void(Writer&)> task) { add_task(std::move(task)), wake(); }
  // The same, and waits for it; rethrows what it throws.
  // Throws Error(kTraceStall) at the deadline; the task may still run later, so it must own what it
  // touches.
  void run_on_writer(std::function<void(Writer&)> task, std::chrono::nanoseconds timeout,
                     const char* what, WaitHooks& hooks);

 private:
  struct Task {
    std::function<void(Writer&)> run;
    std::atomic<bool> done{false};
    std::exception_ptr error;  // set before done
  };

  std::shared_ptr<Task> add_task(std::function<void(Writer&)> run);
  void thread_main();
  void sleep_until_due();
  bool sleep_until(Clock::time_point due) noexcept;
  [[nodiscard]] bool is_awaited() const noexcept;
  void work();
  void keep_house();
  void run_tasks();
  void wait_for_memory();
  void give_up(const char* why);
  void announce_progress();

  Arena arena_;
  Ring ring_;
  DeviceStager stager_;
  const std::uint64_t max_piece_bytes_;
  // producers and waiters -> thread
  sem_t wake_signal_;
  std::atomic<bool> wake_requested_{false};
  std::atomic<bool> stop_{false};
  std::atomic<std::uint64_t> wake_granules_{0};
  std::atomic<std::uint64_t> group_bytes_{0};
  std::atomic<std::int64_t> interval_ns_{0};
  std::atomic<std::uint32_t> waiters_{0};
  std::mutex tasks_mutex_;
  std::vector<std::shared_ptr<Task>> tasks_;  // protected by tasks_mutex_
  // thread -> waiters
  std::atomic<std::uint64_t> read_position_{0};
  std::atomic<std::uint64_t> progress_{0};
  std::mutex progress_mutex_;
  std::condition_variable progress_changed_;
  // thread only
  Writer writer_;
  std::optional<Clock::time_point> retry_at_;
  std::optional<Clock::time_point> starved_since_;
  Clock::time_point status_written_{};
  // What was published before it is waited for by somebody in another process.
  std::uint64_t requested_position_ = 0;
  std::thread thread_;
};

}  // namespace mld
