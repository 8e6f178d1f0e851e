// The control interface: fake_cuda.h over Driver.
#include <cstdlib>
#include <cstring>
#include <utility>

#include "fake_cuda/call.h"
#include "fake_cuda/fake_cuda.h"

namespace fake_cuda {
namespace {

// The embedding program's own streams and events; a test that names an unknown one is wrong.
Stream& stream_of(void* handle) {
  Stream* const found = driver().stream(static_cast<CUstream>(handle), driver().thread().current());
  if (found == nullptr) std::abort();
  return *found;
}

Operation kernel(const char* name, void (*function)(void*), void* user, const FakeCudaRange* ranges,
                 std::size_t count) {
  Operation operation;
  operation.name = name;
  for (std::size_t i = 0; i < count; ++i) {
    const Allocation* const found = driver().memory.at_device(ranges[i].address, ranges[i].bytes);
    if (found == nullptr) std::abort();
    operation.accesses.push_back(
        {found->canonical(ranges[i].address, ranges[i].bytes), ranges[i].writes != 0});
  }
  operation.runs_unlocked = function != nullptr;
  if (function != nullptr) operation.effect = [=] { function(user); };
  return operation;
}

bool host_touches(const void* memory, std::size_t bytes, bool writes) {
  const Lock lock(driver().mutex);
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const auto other = driver().pending({begin, begin + bytes}, writes);
  if (!other) return true;
  driver().report(writes ? Rule::kHostWriteTooEarly : Rule::kHostReadTooEarly,
                  std::to_string(bytes) + " bytes at " + hex(begin) + ", " + other->operation +
                      " not known to be complete");
  return false;
}

const char* keep(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

std::uint64_t count_of(const std::map<std::string_view, std::uint64_t>& calls, const char* name) {
  std::uint64_t count = 0;
  for (const auto& [called, times] : calls) {
    if (name == nullptr || called == name) count += times;
  }
  return count;
}

}  // namespace

FAKE_CUDA_EXPORT void fake_cuda_reset(std::uint64_t seed, int devices, int mode) {
  driver().reset(seed, devices, static_cast<Mode>(mode));
}

FAKE_CUDA_EXPORT void fake_cuda_set_initialised(int initialised) {
  const Lock lock(driver().mutex);
  driver().initialised = initialised != 0;
}

FAKE_CUDA_EXPORT void fake_cuda_shut_down() {
  const Lock lock(driver().mutex);
  driver().shut_down = true;
}

FAKE_CUDA_EXPORT void fake_cuda_set_memory_operations(int supported) {
  const Lock lock(driver().mutex);
  driver().has_memory_operations = supported != 0;
}

FAKE_CUDA_EXPORT void fake_cuda_set_device_count(int devices) {
  const Lock lock(driver().mutex);
  driver().add_devices(devices);
}

FAKE_CUDA_EXPORT std::size_t fake_cuda_step(std::size_t operations) {
  Lock lock(driver().mutex);
  std::size_t done = 0;
  while (done < operations && driver().scheduler.execute_one(lock)) ++done;
  return done;
}

FAKE_CUDA_EXPORT void fake_cuda_run_until_idle() {
  Lock lock(driver().mutex);
  driver().scheduler.run_until_idle(lock);
}

FAKE_CUDA_EXPORT void fake_cuda_hold_stream(void* stream, int held) {
  const Lock lock(driver().mutex);
  driver().scheduler.hold(stream_of(stream), held != 0);
}

FAKE_CUDA_EXPORT std::uint64_t fake_cuda_schedule_hash() {
  const Lock lock(driver().mutex);
  return driver().scheduler.schedule_hash();
}

FAKE_CUDA_EXPORT void fake_cuda_enter_device(int device) {
  const Lock lock(driver().mutex);
  ThreadState& thread = driver().thread();
  thread.contexts.clear();
  if (device >= 0) thread.contexts.push_back(&driver().activate(device));
}

FAKE_CUDA_EXPORT void* fake_cuda_stream(int device, int non_blocking) {
  const Lock lock(driver().mutex);
  Stream& made = driver().scheduler.add_stream(driver().activate(device), non_blocking == 0);
  return reinterpret_cast<void*>(driver().stream_handles.add(&made));
}

FAKE_CUDA_EXPORT std::uint64_t fake_cuda_tensor(int device, const void* content,
                                                std::size_t bytes) {
  const Lock lock(driver().mutex);
  const Allocation* const made =
      driver().memory.allocate_device(&driver().activate(device), bytes, false);
  if (made == nullptr) std::abort();
  if (content != nullptr) std::memcpy(made->host, content, bytes);
  return made->device.begin;
}

FAKE_CUDA_EXPORT void fake_cuda_free_tensor(std::uint64_t address) {
  const Lock lock(driver().mutex);
  Allocation* const found = driver().memory.at_device(address, 1);
  if (found == nullptr || !found->alive) std::abort();
  driver().release(*found, "the owner's cuMemFree");
}

FAKE_CUDA_EXPORT int fake_cuda_kernel(void* stream, const char* name, void (*function)(void*),
                                      void* user, const FakeCudaRange* ranges,
                                      std::size_t range_count) {
  const Lock lock(driver().mutex);
  return driver().submit(stream_of(stream), kernel(name, function, user, ranges, range_count),
                         false);
}

FAKE_CUDA_EXPORT int fake_cuda_overwrite(void* stream, std::uint64_t address, std::size_t bytes,
                                         unsigned char value) {
  const Lock lock(driver().mutex);
  const FakeCudaRange range{address, bytes, 1};
  Operation operation = kernel("overwrite", nullptr, nullptr, &range, 1);
  Allocation* const target = driver().memory.at_device(address, bytes);
  operation.effect = [=] {
    if (!target->alive) return;
    std::memset(target->host + (address - target->device.begin), value, bytes);
  };
  return driver().submit(stream_of(stream), std::move(operation), false);
}

FAKE_CUDA_EXPORT int fake_cuda_fault_kernel(void* stream, int code) {
  const Lock lock(driver().mutex);
  Stream& target = stream_of(stream);
  Operation operation = kernel("faulting kernel", nullptr, nullptr, nullptr, 0);
  operation.effect = [context = target.context, code] {
    driver().scheduler.break_context(*context, code);
  };
  return driver().submit(target, std::move(operation), false);
}

FAKE_CUDA_EXPORT void fake_cuda_record(void* event, void* stream) {
  const Lock lock(driver().mutex);
  Event* const found = driver().event(static_cast<CUevent>(event));
  if (found == nullptr || driver().record(*found, stream_of(stream), false) != kSuccess) {
    std::abort();
  }
}

FAKE_CUDA_EXPORT void fake_cuda_wait(void* stream, void* event) {
  const Lock lock(driver().mutex);
  Event* const found = driver().event(static_cast<CUevent>(event));
  if (found == nullptr || driver().wait(stream_of(stream), *found, false) != kSuccess) {
    std::abort();
  }
}

FAKE_CUDA_EXPORT int fake_cuda_begin_capture(void* stream) {
  const Lock lock(driver().mutex);
  return driver().begin_capture(stream_of(stream), kGlobal);
}

FAKE_CUDA_EXPORT int fake_cuda_end_capture(void* stream, void** graph) {
  const Lock lock(driver().mutex);
  Capture* made = nullptr;
  const CUresult result = driver().end_capture(stream_of(stream), &made);
  *graph = made == nullptr ? nullptr : reinterpret_cast<void*>(driver().graph_handles.add(made));
  return result;
}

FAKE_CUDA_EXPORT void fake_cuda_replay(void* graph, void* stream) {
  const Lock lock(driver().mutex);
  const Capture* const found = driver().graph_handles.find(graph);
  if (found == nullptr) std::abort();
  for (const Operation& operation : found->operations) {
    driver().submit(stream_of(stream), operation, false);
  }
}

FAKE_CUDA_EXPORT void* fake_cuda_bytes_at(std::uint64_t address) {
  const Lock lock(driver().mutex);
  const Allocation* const found = driver().memory.at_device(address, 1);
  if (found == nullptr || !found->alive) std::abort();
  return found->host + (address - found->device.begin);
}

FAKE_CUDA_EXPORT int fake_cuda_host_read(const void* memory, std::size_t bytes) {
  return host_touches(memory, bytes, false) ? 1 : 0;
}

FAKE_CUDA_EXPORT int fake_cuda_host_write(const void* memory, std::size_t bytes) {
  return host_touches(memory, bytes, true) ? 1 : 0;
}

FAKE_CUDA_EXPORT void fake_cuda_host_use_begin(const void* memory, std::size_t bytes) {
  const Lock lock(driver().mutex);
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  driver().host_ranges_in_use.push_back({begin, begin + bytes});
}

FAKE_CUDA_EXPORT void fake_cuda_host_use_end(const void* memory) {
  const Lock lock(driver().mutex);
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  std::erase_if(driver().host_ranges_in_use,
                [begin](const Range& range) { return range.begin == begin; });
}

FAKE_CUDA_EXPORT void fake_cuda_set_observes_words(int observes) {
  const Lock lock(driver().mutex);
  driver().scheduler.set_observes_words(observes != 0);
}

FAKE_CUDA_EXPORT int fake_cuda_host_acquire(const void* word) {
  const Lock lock(driver().mutex);
  return driver().scheduler.observe_word(reinterpret_cast<std::uintptr_t>(word)) ? 1 : 0;
}

FAKE_CUDA_EXPORT void fake_cuda_fail(const char* name, std::uint64_t nth, int code, int sticky) {
  const Lock lock(driver().mutex);
  driver().faults.push_back({name, nth, code, sticky != 0});
}

FAKE_CUDA_EXPORT void fake_cuda_break_context(int device, int code) {
  const Lock lock(driver().mutex);
  driver().scheduler.break_context(driver().activate(device), code);
}

FAKE_CUDA_EXPORT void fake_cuda_set_memory_limit(std::size_t bytes) {
  const Lock lock(driver().mutex);
  driver().memory.set_limit_bytes(bytes);
}

FAKE_CUDA_EXPORT void fake_cuda_hide_symbol(const char* name) {
  const Lock lock(driver().mutex);
  driver().hidden_symbols.insert(name);
}

FAKE_CUDA_EXPORT void fake_cuda_callee_begin() {
  const Lock lock(driver().mutex);
  ThreadState& thread = driver().thread();
  thread.callee = Callee{thread.contexts, thread.capture_mode};
}

FAKE_CUDA_EXPORT void fake_cuda_callee_end() {
  const Lock lock(driver().mutex);
  ThreadState& thread = driver().thread();
  if (!thread.callee) std::abort();
  if (thread.contexts != thread.callee->contexts) {
    driver().report(Rule::kContextLeftChanged, "stack of contexts of this thread");
  }
  if (thread.capture_mode != thread.callee->capture_mode) {
    driver().report(Rule::kCaptureModeLeftChanged, std::to_string(thread.capture_mode));
  }
  thread.callee.reset();
}

FAKE_CUDA_EXPORT void* fake_cuda_current_context_of_thread() {
  const Lock lock(driver().mutex);
  return reinterpret_cast<void*>(driver().context_handles.handle_of(driver().thread().current()));
}

FAKE_CUDA_EXPORT int fake_cuda_capture_mode_of_thread() {
  const Lock lock(driver().mutex);
  return driver().thread().capture_mode;
}

FAKE_CUDA_EXPORT const char* fake_cuda_violations() {
  const Lock lock(driver().mutex);
  return keep(driver().log.text(false));
}

FAKE_CUDA_EXPORT const char* fake_cuda_warnings() {
  const Lock lock(driver().mutex);
  return keep(driver().log.text(true));
}

FAKE_CUDA_EXPORT std::uint64_t fake_cuda_violation_count(const char* rule) {
  const Lock lock(driver().mutex);
  for (std::size_t i = 0; i < static_cast<std::size_t>(Rule::kCount); ++i) {
    if (std::strcmp(text_of(static_cast<Rule>(i)).id, rule) == 0) {
      return driver().log.count(static_cast<Rule>(i));
    }
  }
  std::abort();  // no such rule
}

FAKE_CUDA_EXPORT const char* fake_cuda_rule(std::size_t index, int* is_warning) {
  if (index >= static_cast<std::size_t>(Rule::kCount)) return nullptr;
  const RuleText& rule = text_of(static_cast<Rule>(index));
  *is_warning = rule.is_warning ? 1 : 0;
  return rule.id;
}

FAKE_CUDA_EXPORT void fake_cuda_check_leaks() {
  const Lock lock(driver().mutex);
  driver().check_leaks();
}

FAKE_CUDA_EXPORT std::uint64_t fake_cuda_child_calls() {
  return child_calls().count.load(std::memory_order_relaxed);  // relaxed: the child was waited for
}

FAKE_CUDA_EXPORT std::uint64_t fake_cuda_calls(const char* name) {
  const Lock lock(driver().mutex);
  return count_of(driver().calls, name);
}

FAKE_CUDA_EXPORT std::uint64_t fake_cuda_calls_of_thread(const char* name) {
  const Lock lock(driver().mutex);
  return count_of(driver().thread().calls, name);
}

FAKE_CUDA_EXPORT std::uint64_t fake_cuda_copied_bytes(int kind) {
  const Lock lock(driver().mutex);
  return driver().copied_bytes[static_cast<std::size_t>(kind)];
}

FAKE_CUDA_EXPORT std::uint64_t fake_cuda_alive_bytes(int device) {
  const Lock lock(driver().mutex);
  return driver().memory.total_bytes([device](const Allocation& allocation) {
    return allocation.kind == MemoryKind::kDevice && allocation.by_api &&
           allocation.context->device == device;
  });
}

FAKE_CUDA_EXPORT std::uint64_t fake_cuda_pinned_bytes() {
  const Lock lock(driver().mutex);
  return driver().memory.total_bytes(
      [](const Allocation& allocation) { return allocation.kind != MemoryKind::kDevice; });
}

}  // namespace fake_cuda
