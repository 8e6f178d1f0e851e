// Streams as queues, and the device that executes them: late, in any order that the program's
// streams, events and waits allow, chosen by a seed.
//
// An operation's clock is known when it is enqueued: its stream's, what its stream waits for, the
// legacy stream's rules, and what the host had seen. It may execute once everything in that clock
// has executed. So "may run now" and "is ordered after" are one relation, computed once.
//
// All under the driver's mutex. INVARIANT 1: one operation executes at a time (`busy_`).
// INVARIANT 2: kernels and host functions execute with the mutex released, everything else under
// it.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fake_cuda/accesses.h"
#include "fake_cuda/cuda_abi.h"
#include "fake_cuda/vector_clock.h"

namespace fake_cuda {

struct Capture;
struct Context;
struct Stream;

using Lock = std::unique_lock<std::mutex>;

struct Operation {
  std::string name;
  std::vector<Access> accesses;
  std::function<void()> effect;
  bool runs_unlocked = false;  // a kernel or host function of the test
  bool is_host_function = false;
  std::uintptr_t word = 0;  // host address of what may be a completion word; 0: none
  VectorClock after;        // what must have executed before
  VectorClock clock;        // `after`, and itself
  std::uint64_t count = 0;  // its number in its stream
};

struct Stream {
  std::size_t actor = 0;
  Context* context = nullptr;
  bool is_blocking = true;  // serialises with the legacy stream
  bool is_legacy = false;
  bool by_api = false;
  bool destroyed = false;
  bool held = false;
  VectorClock clock;  // of the last operation enqueued
  std::deque<Operation> queue;
  Capture* capture = nullptr;
};

struct Event {
  Context* context = nullptr;
  bool by_api = true;
  bool destroyed = false;
  bool recorded = false;
  VectorClock clock;
  Capture* capture = nullptr;       // last recorded inside this capture
  Stream* captured_from = nullptr;  // in this stream of it
};

struct Context {
  int device = 0;
  bool active = false;
  int retains_by_api = 0;
  CUresult error = kSuccess;  // sticky
  Stream* legacy = nullptr;
  std::map<std::thread::id, Stream*> per_thread;
};

enum class Mode { kStepped = 0, kWorker = 1, kInterleaved = 2 };

class Scheduler {
 public:
  explicit Scheduler(std::mutex& mutex) : mutex_(mutex) {}
  // Ends the worker, forgets all streams. REQUIRES: the caller does not hold the mutex, and nobody
  // waits.
  void reset(std::uint64_t seed, Mode mode);

  Stream& add_stream(Context& context, bool is_blocking);
  // Also orders the operation after `also_after`, if given. Returns it as enqueued.
  const Operation& enqueue(Stream& stream, Operation operation,
                           const VectorClock* also_after = nullptr);
  // What an operation enqueued now on `stream` would come after.
  [[nodiscard]] VectorClock order_of(const Stream& stream) const;

  // Executes one operation, if one may run; returns whether.
  bool execute_one(Lock& lock);
  void run_until_idle(Lock& lock);
  // In mode kInterleaved: executes as many as the seed says, before a call of the host.
  void interleave(Lock& lock);
  // Blocks until all of `target` has executed; the code of a broken context that keeps it from it,
  // kUnknown if nothing can ever finish it (only where no worker or other thread executes).
  CUresult wait_for(const VectorClock& target, Lock& lock);
  [[nodiscard]] bool has_executed(const VectorClock& target) const {
    return executed_.includes(target);
  }
  void break_context(Context& context, CUresult code);
  void hold(Stream& stream, bool held);
  void set_observes_words(bool observes) { observes_words_ = observes; }
  // The host saw the completion word at this address (0: all that are set). False: not set.
  bool observe_word(std::uintptr_t word);

  VectorClock& host() { return host_; }
  [[nodiscard]] std::vector<std::unique_ptr<Stream>>& streams() { return streams_; }
  // Of the order in which operations executed: equal for equal schedules.
  [[nodiscard]] std::uint64_t schedule_hash() const { return schedule_hash_; }

  // The kernel or host function that the calling thread is inside of; nullptr: none.
  static const Operation* running_operation();

 private:
  Stream* pick();
  void finish(Stream& stream, const Operation& operation);
  void stop_worker();
  void work();
  std::uint64_t random();

  std::mutex& mutex_;
  Mode mode_ = Mode::kStepped;
  std::uint64_t random_state_ = 0;
  std::uint64_t eagerness_ = 0;      // of kInterleaved: 0 = the device is always late
  std::uint64_t changeability_ = 1;  // in eighths: how soon another stream gets its turn
  bool observes_words_ = true;
  bool busy_ = false;
  bool stopping_ = false;
  std::size_t favourite_ = 0;  // the stream that runs ahead of the others for a while
  std::uint64_t schedule_hash_ = 0;
  VectorClock executed_;
  VectorClock host_;  // what the host has seen finish; one clock for all threads: that host threads
                      // hand work to each other correctly is ThreadSanitizer's to check
  std::map<std::uintptr_t, VectorClock> words_;
  std::vector<std::unique_ptr<Stream>> streams_;  // by actor
  std::condition_variable changed_;
  std::thread worker_;
};

}  // namespace fake_cuda
