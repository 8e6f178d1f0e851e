#include "fake_cuda/driver.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>

namespace fake_cuda {
namespace {

std::atomic<pid_t> home_process{0};

std::string_view without_version(std::string_view name) {
  return name.ends_with("_v2") ? name.substr(0, name.size() - 3) : name;
}

}  // namespace

Driver& driver() {
  static Driver* const only = new Driver;
  return *only;
}

ChildCalls& child_calls() {
  static ChildCalls* const shared = [] {
    void* page = mmap(nullptr, sizeof(ChildCalls), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) std::abort();
    return new (page) ChildCalls{};
  }();
  return *shared;
}

bool is_forked_child() {
  const pid_t home = home_process.load(std::memory_order_relaxed);  // relaxed: set long before
  return home != 0 && home != getpid();
}

std::string hex(std::uintptr_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<std::size_t>(value));
  return text;
}

void Driver::reset(std::uint64_t seed, int devices, Mode mode) {
  home_process.store(getpid(), std::memory_order_relaxed);  // relaxed: no other thread calls now
  child_calls().count.store(0, std::memory_order_relaxed);  // relaxed: likewise
  scheduler.reset(seed, mode);
  const Lock lock(mutex);
  ++generation;
  initialised = true;
  shut_down = false;
  has_memory_operations = true;
  memory.clear();
  accesses.clear();
  log.clear();
  captures.clear();
  events.clear();
  context_handles.clear();
  stream_handles.clear();
  event_handles.clear();
  graph_handles.clear();
  contexts.clear();
  add_devices(devices);
  faults.clear();
  hidden_symbols.clear();
  host_ranges_in_use.clear();
  calls.clear();
  std::fill(std::begin(copied_bytes), std::end(copied_bytes), 0);
}

void Driver::add_devices(int devices) {
  while (contexts.size() < static_cast<std::size_t>(devices)) {
    auto context = std::make_unique<Context>();
    context->device = static_cast<int>(contexts.size());
    context->legacy = &scheduler.add_stream(*context, true);
    context->legacy->is_legacy = true;
    context_handles.add(context.get());
    contexts.push_back(std::move(context));
  }
}

ThreadState& Driver::thread() {
  thread_local ThreadState state;
  if (state.generation != generation) {
    state = ThreadState();
    state.generation = generation;
  }
  return state;
}

Context* Driver::context_of_device(int device) {
  if (device < 0 || static_cast<std::size_t>(device) >= contexts.size()) return nullptr;
  return contexts[static_cast<std::size_t>(device)].get();
}

Context& Driver::activate(int device) {
  Context* const context = context_of_device(device);
  if (context == nullptr) std::abort();  // a mistake in the test
  context->active = true;
  return *context;
}

Stream* Driver::stream(CUstream handle, Context* current) {
  const auto number = reinterpret_cast<std::uintptr_t>(handle);
  if (number <= 2) {  // NULL and CU_STREAM_LEGACY, CU_STREAM_PER_THREAD (cuda.h 440, 450)
    if (current == nullptr) {
      report(Rule::kNoContext, "stream " + hex(number) + " means one of the current context");
      return nullptr;
    }
    if (number < 2) return current->legacy;
    Stream*& own = current->per_thread[std::this_thread::get_id()];
    if (own == nullptr) own = &scheduler.add_stream(*current, true);
    return own;
  }
  Stream* const found = stream_handles.find(handle);
  if (found == nullptr) {
    report(Rule::kUnknownHandle, "stream " + hex(number));
  } else if (found->destroyed) {
    report(Rule::kDestroyedHandle, "stream " + hex(number));
    return nullptr;
  }
  return found;
}

Event* Driver::event(CUevent handle) {
  Event* const found = event_handles.find(handle);
  const auto number = reinterpret_cast<std::uintptr_t>(handle);
  if (found == nullptr) {
    report(Rule::kUnknownHandle, "event " + hex(number));
  } else if (found->destroyed) {
    report(Rule::kDestroyedHandle, "event " + hex(number));
    return nullptr;
  }
  return found;
}

void Driver::check_order(const Operation& operation, const VectorClock& after) {
  for (const Access& access : operation.accesses) {
    const auto other = accesses.conflict(access.range, access.writes, after);
    if (other) {
      report(access.writes ? Rule::kUnorderedWrite : Rule::kUnorderedRead,
             operation.name + (access.writes ? " writes [" : " reads [") + hex(access.range.begin) +
                 ", " + hex(access.range.end) + "), not ordered with " + other->operation +
                 ", which " + (other->access.writes ? "writes" : "reads") + " there on stream " +
                 std::to_string(other->actor));
    }
    for (const Range& used : host_ranges_in_use) {
      if (access.writes && used.overlaps(access.range)) {
        report(Rule::kHostRangeInUse, operation.name + " writes at " + hex(access.range.begin));
      }
    }
  }
}

CUresult Driver::submit(Stream& stream, Operation operation, bool by_api,
                        const VectorClock* also_after) {
  if (stream.context->error != kSuccess) return stream.context->error;
  if (stream.capture != nullptr) {
    if (by_api) report(Rule::kEnqueueOnCapturing, operation.name);
    if (stream.capture->invalid) return kCaptureInvalidated;
    if (&stream != stream.capture->origin) stream.capture->unjoined.insert(&stream);
    stream.capture->operations.push_back(std::move(operation));
    return kSuccess;
  }
  if (Capture* const behind = capture_behind_legacy(stream)) {
    report(Rule::kLegacyWhileCapturing, operation.name + " on the legacy stream");
    behind->invalid = true;
    return kCaptureImplicit;
  }
  check_order(operation, scheduler.order_of(stream));
  const Operation& enqueued = scheduler.enqueue(stream, std::move(operation), also_after);
  for (const Access& access : enqueued.accesses) {
    accesses.add({access, stream.actor, enqueued.count, enqueued.name}, enqueued.clock,
                 scheduler.host());
  }
  return kSuccess;
}

CUresult Driver::record(Event& event, Stream& stream, bool by_api) {
  if (event.context != stream.context) {
    report(Rule::kContextMismatch, "event and stream of cuEventRecord");
    return kInvalidHandle;
  }
  Operation operation;
  operation.name = "cuEventRecord";
  const CUresult result = submit(stream, std::move(operation), by_api);
  if (result != kSuccess) return result;
  event.recorded = true;
  event.capture = stream.capture;
  event.captured_from = stream.capture != nullptr ? &stream : nullptr;
  event.clock = stream.clock;
  return kSuccess;
}

CUresult Driver::wait(Stream& stream, Event& event, bool by_api) {
  if (!event.recorded) {
    report(Rule::kUnrecordedEvent, "the wait does nothing");
    return kSuccess;
  }
  Operation operation;
  operation.name = "cuStreamWaitEvent";
  if (event.capture == nullptr && stream.capture == nullptr) {
    return submit(stream, std::move(operation), by_api, &event.clock);
  }
  if (by_api) report(Rule::kEnqueueOnCapturing, operation.name);
  if (event.capture == nullptr || event.capture->ended) {
    if (stream.capture != nullptr) stream.capture->invalid = true;
    return kCaptureIsolation;  // captured work cannot wait for other work, nor the reverse
  }
  if (stream.capture == nullptr) {
    stream.capture = event.capture;
    event.capture->unjoined.insert(&stream);
  } else {
    event.capture->unjoined.erase(event.captured_from);
  }
  return kSuccess;
}

std::optional<RecordedAccess> Driver::pending(const Range& range, bool reads_conflict) {
  // A broken context touches nothing more: of its streams nothing is left to come.
  VectorClock ended = scheduler.host();
  for (const auto& stream : scheduler.streams()) {
    if (stream->context->error != kSuccess)
      ended.set(stream->actor, std::numeric_limits<std::uint64_t>::max());
  }
  return accesses.conflict(range, reads_conflict, ended);
}

void Driver::release(Allocation& allocation, const char* name) {
  const bool is_device = allocation.kind == MemoryKind::kDevice;
  const Range range = is_device ? allocation.device : allocation.host_range();
  if (const auto other = pending(range, true)) {
    report(is_device ? Rule::kFreeWhilePending : Rule::kHostReleasePending,
           std::string(name) + " while " + other->operation + " may still use it");
  }
  memory.release(allocation);
}

void Driver::check_leaks() {
  for (const auto& [address, allocation] : memory.all()) {
    if (allocation.alive && allocation.by_api && allocation.context->error == kSuccess) {
      report(Rule::kLeak, std::to_string(allocation.bytes()) + " bytes at " + hex(address));
    }
  }
  for (const auto& stream : scheduler.streams()) {
    if (stream->by_api && !stream->destroyed && stream->context->error == kSuccess) {
      report(Rule::kLeak, "stream " + std::to_string(stream->actor));
    }
  }
  for (const auto& event : events) {
    if (event->by_api && !event->destroyed && event->context->error == kSuccess) {
      report(Rule::kLeak, "event");
    }
  }
  for (const auto& context : contexts) {
    if (context->retains_by_api > 0 && context->error == kSuccess) {
      report(Rule::kLeak, "context of device " + std::to_string(context->device));
    }
  }
}

std::optional<Fault> Driver::take_fault(std::string_view name) {
  for (auto fault = faults.begin(); fault != faults.end(); ++fault) {
    if (without_version(fault->name) != without_version(name) || --fault->calls_left > 0) continue;
    const Fault taken = *fault;
    faults.erase(fault);
    return taken;
  }
  return std::nullopt;
}

}  // namespace fake_cuda
