#include "writer/runtime.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

#include "errors.h"
#include "process.h"

namespace mld {
namespace {

constexpr std::size_t kSmallestRingBytes = std::size_t{64} << 10;
constexpr std::uint64_t kLargestPieceBytes = std::uint64_t{1} << 20;
constexpr auto kWaitSlice = std::chrono::milliseconds(50);
// However long a tracer lets rows wait, the house is kept now and then.
constexpr std::chrono::nanoseconds kLongestSleep = std::chrono::seconds(60);
constexpr auto kCopyPoll = std::chrono::milliseconds(1);
constexpr auto kCopyPatience = std::chrono::seconds(10);
constexpr auto kMemoryPause = std::chrono::milliseconds(100);
constexpr auto kMemoryPatience = std::chrono::seconds(60);
constexpr std::chrono::nanoseconds kShortestSleep = std::chrono::milliseconds(1);
constexpr auto kStatusInterval = std::chrono::milliseconds(200);

// A call of several columns should be able to fill the ring while earlier pieces are written: 1/8
// of it a piece.
std::uint64_t piece_bytes_for(std::uint64_t ring_bytes) {
  const std::uint64_t pages =
      std::max<std::uint64_t>(std::min(kLargestPieceBytes, ring_bytes / 8) / kPageBytes, 1);
  return pages * kPageBytes - kPageHeaderBytes;
}

std::size_t usable_ring_bytes(std::size_t ring_bytes) {
  if (ring_bytes < kSmallestRingBytes) {
    throw Error(ErrorKind::kInvalidInput,
                "ring_bytes=" + std::to_string(ring_bytes) + " is below " +
                    std::to_string(kSmallestRingBytes),
                "raise TracerConfig.ring_bytes");
  }
  return ring_bytes / Writer::Ring::kGranuleBytes * Writer::Ring::kGranuleBytes;
}

// With OMP_PROC_BIND the main thread is bound to one core, and a thread that inherits its mask
// competes with it.
void use_every_cpu() {
  cpu_set_t cpus;
  std::memset(&cpus, 0xFF, sizeof cpus);
  sched_setaffinity(0, sizeof cpus,
                    &cpus);  // the kernel cuts it down to the cpuset; failing changes nothing
}

}  // namespace

std::shared_ptr<Runtime> Runtime::acquire(std::size_t ring_bytes, const DeviceOptions& device) {
  Process& state = process();
  const std::lock_guard<std::mutex> lock(state.runtime_mutex);
  if (auto runtime = state.runtime.lock()) return runtime;
  const std::uint64_t generation = process_generation();
  // In a forked child the ring's memory is not there and the thread does not run: leaked, never
  // torn down.
  std::shared_ptr<Runtime> runtime(new Runtime(ring_bytes, device), [generation](Runtime* owned) {
    if (generation == process_generation()) delete owned;
  });
  state.runtime = runtime;
  return runtime;
}

std::uint32_t Runtime::next_attempt_id() noexcept {
  static std::atomic<std::uint32_t> next{1};
  return next.fetch_add(1, std::memory_order_relaxed);
}

std::shared_ptr<Runtime> Runtime::current() {
  Process& state = process();
  const std::lock_guard<std::mutex> lock(state.runtime_mutex);
  return state.runtime.lock();
}

Runtime::Runtime(std::size_t ring_bytes, const DeviceOptions& device)
    : arena_(usable_ring_bytes(ring_bytes)),
      ring_(arena_.data(), arena_.bytes() / Ring::kGranuleBytes),
      stager_(arena_.data(), arena_.bytes(), device),
      max_piece_bytes_(piece_bytes_for(arena_.bytes())),
      writer_(ring_, &stager_) {
  sem_init(&wake_signal_, 0, 0);
  group_bytes_.store(std::numeric_limits<std::uint64_t>::max(), std::memory_order_relaxed);
  wake_granules_.store(arena_.bytes() / 2 / Ring::kGranuleBytes, std::memory_order_relaxed);
  interval_ns_.store(kLongestSleep.count(), std::memory_order_relaxed);
  // All signals stay with the user's threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { thread_main(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw Error(ErrorKind::kStorage, "cannot start the writer thread",
                "raise the limit of processes (ulimit -u)");
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Runtime::~Runtime() {
  stop_.store(true, std::memory_order_release);
  wake();
  thread_.join();
  sem_destroy(&wake_signal_);
  // A call that raced with the last close may have left copies; a device that still writes into the
  // ring keeps it.
  if (!stager_.shut_down(kCopyPatience)) arena_.leak();
}

void Runtime::attach(const std::shared_ptr<AttemptState>& attempt) {
  const RecorderOptions& options = attempt->options();
  // The most eager tracer sets the pace for all: they share the ring.
  const std::uint64_t group =
      std::min<std::uint64_t>(group_bytes_.load(std::memory_order_relaxed), options.commit_bytes);
  group_bytes_.store(std::max<std::uint64_t>(group, 1), std::memory_order_relaxed);
  const std::uint64_t wake_bytes = std::min<std::uint64_t>(group, arena_.bytes() / 2);
  wake_granules_.store(std::max<std::uint64_t>(wake_bytes / Ring::kGranuleBytes, 1),
                       std::memory_order_relaxed);
  interval_ns_.store(
      std::min<std::int64_t>(interval_ns_.load(std::memory_order_relaxed),
                             std::max(options.commit_interval, kShortestSleep).count()),
      std::memory_order_relaxed);
  WaitHooks no_hooks;
  run_on_writer([attempt](Writer& writer) { writer.attach(attempt); }, options.stall_timeout,
                "opening an attempt", no_hooks);
}

void Runtime::wake() noexcept {
  // relaxed: the semaphore orders; the flag only spares system calls.
  if (wake_requested_.load(std::memory_order_relaxed)) return;
  if (!wake_requested_.exchange(true, std::memory_order_relaxed)) sem_post(&wake_signal_);
}

void Runtime::wait_slice(std::uint64_t seen, WaitHooks& hooks) {
  // relaxed: is_awaited() may lag; the wake-up orders.
  waiters_.fetch_add(1, std::memory_order_relaxed);
  wake();
  hooks.before_slice();
  {
    std::unique_lock<std::mutex> lock(progress_mutex_);
    progress_changed_.wait_for(lock, kWaitSlice, [&] { return progress() != seen; });
  }
  waiters_.fetch_sub(1, std::memory_order_relaxed);
  hooks.after_slice();
}

std::shared_ptr<Runtime::Task> Runtime::add_task(std::function<void(Writer&)> run) {
  auto task = std::make_shared<Task>();
  task->run = std::move(run);
  const std::lock_guard<std::mutex> lock(tasks_mutex_);
  tasks_.push_back(task);
  return task;
}

void Runtime::run_on_writer(std::function<void(Writer&)> run, std::chrono::nanoseconds timeout,
                            const char* what, WaitHooks& hooks) {
  const auto task = add_task(std::move(run));
  const auto deadline = Clock::now() + timeout;
  for (;;) {
    const std::uint64_t seen = progress();
    if (task->done.load(std::memory_order_acquire)) break;
    if (Clock::now() >= deadline) {
      throw Error(ErrorKind::kTraceStall,
                  std::string(what) + " took longer than " +
                      std::to_string(std::chrono::duration<double>(timeout).count()) + " s",
                  "look whether the disk still answers, or raise TracerConfig.stall_timeout_s");
    }
    wait_slice(seen, hooks);
  }
  if (task->error) std::rethrow_exception(task->error);
}

void Runtime::thread_main() {
  pthread_setname_np(pthread_self(), "mld-writer");
  use_every_cpu();
  while (!stop_.load(std::memory_order_acquire)) {
    sleep_until_due();
    try {
      work();
      starved_since_.reset();
    } catch (const std::bad_alloc&) {
      wait_for_memory();
    } catch (const std::exception& error) {
      give_up(error.what());
    }
  }
  run_tasks();  // of a recorder that was the last one, and was not closed
}

// Nothing was lost by it: what needed memory is done again.
void Runtime::wait_for_memory() {
  const auto now = Clock::now();
  if (!starved_since_) starved_since_ = now;
  retry_at_ = now + kMemoryPause;
  if (now - *starved_since_ >= kMemoryPatience) give_up("out of memory");
}

// Beyond what a partition handles; training must not die of it.
void Runtime::give_up(const char* why) {
  writer_.give_up(why);
  announce_progress();
}

void Runtime::sleep_until_due() {
  auto sleep = std::chrono::nanoseconds(interval_ns_.load(std::memory_order_relaxed));
  const auto now = Clock::now();
  if (retry_at_) sleep = std::min(sleep, std::max(*retry_at_ - now, std::chrono::nanoseconds(0)));
  // A copy announces itself to nobody. Without hurry it is looked for at the next interval, so that
  // the youngest copies of a steady training do not cut its groups into pieces.
  if (writer_.waits_for_copy() && (is_awaited() || ring_.read_position() < requested_position_))
    sleep = std::min<std::chrono::nanoseconds>(sleep, kCopyPoll);
  const auto due = now + sleep;
  for (;;) {
    const auto next = std::min(due, Clock::now() + kStatusInterval);
    if (sleep_until(next) || next == due) break;
    if (writer_.answer_requests()) {
      requested_position_ = ring_.head();
      break;
    }
    writer_.write_changed_status();
  }
  // A producer that the flag spares its system call just now may publish after our look: then its
  // bytes wait for the next interval, and a waiter wakes us again with each slice.
  wake_requested_.exchange(false, std::memory_order_acq_rel);
}

// Whether somebody has woken us before the time.
bool Runtime::sleep_until(Clock::time_point due) noexcept {
  const auto left = std::max(due - Clock::now(), Clock::duration(0));
  timespec until{};
  clock_gettime(CLOCK_MONOTONIC, &until);
  const std::int64_t ns =
      until.tv_nsec + std::chrono::duration_cast<std::chrono::nanoseconds>(left).count();
  until.tv_sec += ns / 1000000000;
  until.tv_nsec = ns % 1000000000;
  for (;;) {
    if (sem_clockwait(&wake_signal_, CLOCK_MONOTONIC, &until) == 0) return true;
    if (errno != EINTR) return false;
  }
}

bool Runtime::is_awaited() const noexcept {
  return waiters_.load(std::memory_order_relaxed) != 0 ||
         ring_.head() - ring_.read_position() >= wake_granules_.load(std::memory_order_relaxed);
}

void Runtime::work() {
  const std::uint64_t group_bytes = group_bytes_.load(std::memory_order_relaxed);
  bool more = true;
  while (more) {
    run_tasks();
    const bool did_some = writer_.drain_group(Clock::now(), group_bytes);
    read_position_.store(ring_.read_position(), std::memory_order_relaxed);
    if (did_some) announce_progress();
    // What came meanwhile waits for its interval unless it makes a group: else a steady producer
    // would keep us committing call by call, each with a sync of its own.
    more = did_some &&
           ring_.head() - ring_.read_position() >= wake_granules_.load(std::memory_order_relaxed);
    keep_house();
  }
  retry_at_ = writer_.next_retry();
}

void Runtime::keep_house() {
  const auto now = Clock::now();
  writer_.maintain(now);
  if (now - status_written_ < kStatusInterval) return;
  status_written_ = now;
  if (writer_.answer_requests()) requested_position_ = ring_.head();
  writer_.write_changed_status();
}

void Runtime::run_tasks() {
  std::vector<std::shared_ptr<Task>> tasks;  // unlike a deque, an empty one needs no memory
  {
    const std::lock_guard<std::mutex> lock(tasks_mutex_);
    tasks.swap(tasks_);
  }
  for (const auto& task : tasks) {
    try {
      task->run(writer_);
    } catch (...) {
      task->error = std::current_exception();
    }
    task->run = nullptr;  // what it owns goes before the waiter goes on
    task->done.store(true, std::memory_order_release);
  }
  if (!tasks.empty()) announce_progress();
}

void Runtime::announce_progress() {
  {
    const std::lock_guard<std::mutex> lock(progress_mutex_);
    progress_.fetch_add(1, std::memory_order_release);
  }
  progress_changed_.notify_all();
}

}  // namespace mld
