// The whole state of the fake driver, and what its two faces share: the driver API (api_*.cpp) and
// the control interface of the tests (control.cpp). One mutex protects everything here.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "fake_cuda/accesses.h"
#include "fake_cuda/cuda_abi.h"
#include "fake_cuda/memory.h"
#include "fake_cuda/rules.h"
#include "fake_cuda/scheduler.h"

namespace fake_cuda {

enum class CopyKind { kDeviceToDevice, kDeviceToHost, kHostToDevice, kSet, kWord, kCount };

// A stream capture, and afterwards the graph that it made.
struct Capture {
  int mode = kGlobal;
  std::thread::id owner;
  Stream* origin = nullptr;
  std::set<Stream*> unjoined;  // drawn in by an event, not waited for by the origin since
  bool invalid = false;
  bool ended = false;
  std::vector<Operation> operations;
};

struct Callee {  // between fake_cuda_callee_begin and _end
  std::vector<Context*> contexts;
  int capture_mode = kGlobal;
};

struct ThreadState {
  std::uint64_t generation = 0;
  std::vector<Context*> contexts;  // the stack; the last one is current
  int capture_mode = kGlobal;
  std::map<std::string_view, std::uint64_t> calls;
  std::optional<Callee> callee;

  [[nodiscard]] Context* current() const { return contexts.empty() ? nullptr : contexts.back(); }
};

struct Fault {
  std::string name;
  std::uint64_t calls_left = 0;
  CUresult code = kSuccess;
  bool sticky = false;
};

// Handles are numbers that are never used twice, so that one of a destroyed object is recognised.
template <class Object>
class Handles {
 public:
  std::uintptr_t add(Object* object) {
    objects_[next_] = object;
    return std::exchange(next_, next_ + 16);
  }
  [[nodiscard]] Object* find(const void* handle) const {
    const auto found = objects_.find(reinterpret_cast<std::uintptr_t>(handle));
    return found == objects_.end() ? nullptr : found->second;
  }
  [[nodiscard]] std::uintptr_t handle_of(const Object* object) const {
    for (const auto& [handle, known] : objects_) {
      if (known == object) return handle;
    }
    return 0;
  }
  void clear() { objects_.clear(); }

 private:
  std::uintptr_t next_ = 0x100000;
  std::map<std::uintptr_t, Object*> objects_;
};

class Driver {
 public:
  // REQUIRES: no call is under way in another thread.
  void reset(std::uint64_t seed, int devices, Mode mode);
  void add_devices(int devices);  // until there are so many

  // Of the calling thread.
  ThreadState& thread();
  Context* context_of_device(int device);
  Context& activate(int device);  // as the embedding program does, by its first use of the device

  // The stream of a handle, special ones included; nullptr: reported, kInvalidHandle is due.
  Stream* stream(CUstream handle, Context* current);
  Event* event(CUevent handle);

  // Checks an operation against all rules of order and capture and enqueues it; after `also_after`
  // too, if given (of a wait, which touches no memory).
  CUresult submit(Stream& stream, Operation operation, bool by_api,
                  const VectorClock* also_after = nullptr);
  CUresult record(Event& event, Stream& stream, bool by_api);
  CUresult wait(Stream& stream, Event& event, bool by_api);

  CUresult begin_capture(Stream& stream, int mode);
  CUresult end_capture(Stream& stream, Capture** graph);
  // A potentially unsafe call of this thread; kSuccess if no capture forbids it.
  CUresult refuse_unsafe(const char* name, const ThreadState& thread);
  // Asking or waiting for a stream that captures, whatever the thread's mode.
  CUresult refuse_query(const char* name, Stream& stream);
  [[nodiscard]] Capture* capture_behind_legacy(const Stream& stream);

  // Work that touches these bytes and that the host has not seen the end of.
  std::optional<RecordedAccess> pending(const Range& range, bool reads_conflict);
  void release(Allocation& allocation, const char* name);
  void check_leaks();

  void report(Rule rule, const std::string& detail) { log.report(rule, detail); }
  std::optional<Fault> take_fault(std::string_view name);

  std::mutex mutex;
  std::uint64_t generation = 0;
  bool initialised = true;
  bool shut_down = false;
  bool has_memory_operations = true;  // of streams
  Scheduler scheduler{mutex};
  Memory memory;
  AccessLog accesses;
  ViolationLog log;
  std::vector<std::unique_ptr<Context>> contexts;  // by device
  std::vector<std::unique_ptr<Event>> events;
  std::vector<std::unique_ptr<Capture>> captures;
  Handles<Context> context_handles;
  Handles<Stream> stream_handles;
  Handles<Event> event_handles;
  Handles<Capture> graph_handles;
  std::vector<Fault> faults;
  std::set<std::string, std::less<>> hidden_symbols;
  std::vector<Range> host_ranges_in_use;
  std::map<std::string_view, std::uint64_t> calls;
  std::uint64_t copied_bytes[static_cast<std::size_t>(CopyKind::kCount)] = {};

 private:
  void check_order(const Operation& operation, const VectorClock& after);
};

// Never destroyed: a thread of the program may call until the very end.
Driver& driver();

// A forked child may not call; it only leaves a note in memory that it shares with its parent.
struct ChildCalls {
  std::atomic<std::uint64_t> count;
};
ChildCalls& child_calls();
bool is_forked_child();

std::string hex(std::uintptr_t value);

}  // namespace fake_cuda
