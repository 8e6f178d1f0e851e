// What the fake CUDA driver executes, and when; captures, faults, symbols, forks. Its rules:
// fake_cuda_rules_test.cpp.
#include <atomic>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "fake_machine.h"

namespace {

using namespace fake_machine;

}  // namespace

TEST(fake_cuda_executes_nothing_at_enqueue) {
  Machine m;
  Pinned pinned;
  CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, kBytes, m.compute);
  CHECK_EQ(CUDA(cuStreamQuery)(m.compute), kNotReady);
  CHECK_EQ(pinned.text(), std::string(kBytes, '\0'));
  overwrite(m, m.compute, 1);
  CHECK_EQ(FAKE(fake_cuda_step)(1), 1);
  CHECK_EQ(CUDA(cuStreamQuery)(m.compute), kNotReady);
  CHECK_EQ(FAKE(fake_cuda_step)(10), 1);
  CHECK_EQ(CUDA(cuStreamQuery)(m.compute), kSuccess);
  CHECK_EQ(pinned.text(), m.content);
  CHECK_EQ(FAKE(fake_cuda_host_read)(pinned.bytes, kBytes), 1);  // the query told
  CHECK_EQ(FAKE(fake_cuda_copied_bytes)(FAKE_CUDA_DEVICE_TO_HOST), kBytes);
  CHECK_EQ(std::string(FAKE(fake_cuda_violations)()), "");
}

TEST(fake_cuda_runs_streams_out_of_step) {
  std::set<std::string> orders;
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    Machine m(seed);
    static std::string order;
    order.clear();
    const CUstream other = new_stream();
    for (int i = 0; i < 2; ++i) {
      FAKE(fake_cuda_kernel)(m.compute, "a", [](void*) { order += 'a'; }, nullptr, nullptr, 0);
      FAKE(fake_cuda_kernel)(other, "b", [](void*) { order += 'b'; }, nullptr, nullptr, 0);
    }
    FAKE(fake_cuda_run_until_idle)();
    orders.insert(order);
  }
  const std::set<std::string> all = {"aabb", "abab", "abba", "baab", "baba", "bbaa"};
  CHECK_EQ(orders, all);
}

TEST(fake_cuda_serialises_the_legacy_stream_with_blocking_streams_only) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    Machine m(seed);
    void* const blocking = FAKE(fake_cuda_stream)(0, 0);
    const auto per_thread = reinterpret_cast<CUstream>(2);
    overwrite(m, static_cast<CUstream>(blocking), 1);
    overwrite(m, nullptr, 2);
    overwrite(m, per_thread, 3);
    CHECK_EQ(CUDA(cuStreamSynchronize)(per_thread), kSuccess);
    CHECK_EQ(device_text(m.tensor), std::string(kBytes, '\3'));
    CHECK(broken_rules().empty());
    overwrite(m, nullptr, 4);
    overwrite(m, m.compute, 5);  // non-blocking: not ordered with the legacy stream
    CHECK_EQ(broken_rules(), std::set<std::string>{"unordered-write"});
  }
}

TEST(fake_cuda_event_stands_for_the_work_at_its_last_record) {
  Machine m;
  CUevent event = new_event();
  CHECK_EQ(CUDA(cuEventQuery)(event), kSuccess);  // never recorded: an empty set of work
  overwrite(m, m.compute, 1);
  CUDA(cuEventRecord)(event, m.compute);
  CHECK_EQ(CUDA(cuEventQuery)(event), kNotReady);
  const CUstream waiting = new_stream();
  CUDA(cuStreamWaitEvent)(waiting, event, 0);
  overwrite(m, m.compute, 2);
  CUDA(cuEventRecord)(event, m.compute);  // the wait keeps to the first record
  CHECK_EQ(CUDA(cuStreamSynchronize)(waiting), kSuccess);
  CHECK_EQ(CUDA(cuEventSynchronize)(event), kSuccess);
  CHECK_EQ(device_text(m.tensor), std::string(kBytes, '\2'));
  CHECK(broken_rules().empty());
  FAKE(fake_cuda_overwrite)(waiting, m.tensor, kBytes, 3);  // the host waited for all of it
  CHECK(broken_rules().empty());
}

TEST(fake_cuda_worker_finishes_copies_while_the_host_only_polls) {
  Machine m(5, FAKE_CUDA_WORKER);
  Snapshots snapshots(m, Flaw::kNone);
  snapshots.take(0);
  overwrite(m, m.compute, 1);
  CHECK(support::eventually([&] { return snapshots.wait(0); }));
  CHECK_EQ(snapshots.read(0), m.content);
  CHECK_EQ(CUDA(cuCtxSynchronize)(), kSuccess);
  CHECK_EQ(std::string(FAKE(fake_cuda_violations)()), "");
}

TEST(fake_cuda_takes_calls_from_several_threads) {
  Machine m(7, FAKE_CUDA_WORKER);
  std::vector<std::thread> threads;
  for (unsigned char thread = 1; thread <= 3; ++thread) {
    threads.emplace_back([thread] {
      FAKE(fake_cuda_enter_device)(0);
      const CUstream stream = new_stream();
      const CUevent copied = new_event();
      const CUdeviceptr memory = new_memory();
      Pinned pinned;
      for (unsigned char round = 0; round < 20; ++round) {
        const auto value = static_cast<unsigned char>(thread * 50 + round);
        CUDA(cuMemsetD8Async)(memory, value, kBytes, stream);
        CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, memory, kBytes, stream);
        CUDA(cuEventRecord)(copied, stream);
        while (CUDA(cuEventQuery)(copied) == kNotReady) std::this_thread::yield();
        CHECK_EQ(FAKE(fake_cuda_host_read)(pinned.bytes, kBytes), 1);
        CHECK_EQ(pinned.text(), std::string(kBytes, static_cast<char>(value)));
      }
      CHECK_EQ(CUDA(cuMemHostUnregister)(pinned.bytes), kSuccess);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(broken_rules().empty());
}

TEST(fake_cuda_host_knows_a_word_only_by_reading_it) {
  Machine m;
  Pinned pinned;
  Pinned word;
  FAKE(fake_cuda_set_observes_words)(0);
  CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, kBytes, m.compute);
  CUDA(cuStreamWriteValue32_v2)(m.compute, word.device, 7, 0);
  CHECK_EQ(FAKE(fake_cuda_host_acquire)(word.bytes), 0);
  FAKE(fake_cuda_run_until_idle)();
  CHECK_EQ(FAKE(fake_cuda_host_read)(pinned.bytes, kBytes), 0);
  CHECK_EQ(FAKE(fake_cuda_host_acquire)(word.bytes), 1);
  CHECK_EQ(FAKE(fake_cuda_host_read)(pinned.bytes, kBytes), 1);
}

TEST(fake_cuda_capture_is_invalidated_by_another_thread_unless_relaxed) {
  for (const bool relaxed : {false, true}) {
    Machine m;
    FAKE(fake_cuda_begin_capture)(m.compute);
    int status = kNone;
    CHECK_EQ(CUDA(cuStreamIsCapturing)(m.compute, &status), kSuccess);
    CHECK_EQ(status, kActive);
    std::thread([&] {
      FAKE(fake_cuda_enter_device)(0);
      if (relaxed) relax();
      CUdeviceptr made = 0;
      CHECK_EQ(CUDA(cuMemAlloc_v2)(&made, 8), relaxed ? kSuccess : kCaptureUnsupported);
    }).join();
    void* graph = nullptr;
    CHECK_EQ(FAKE(fake_cuda_end_capture)(m.compute, &graph),
             relaxed ? kSuccess : kCaptureInvalidated);
    CHECK_EQ(graph != nullptr, relaxed);
    CHECK_EQ(broken_rules().count("unsafe-while-capturing"), relaxed ? 0 : 1);
  }
}

TEST(fake_cuda_thread_local_mode_minds_only_captures_of_its_own_thread) {
  for (const bool own : {false, true}) {
    Machine m;
    if (!own) FAKE(fake_cuda_begin_capture)(m.compute);
    std::thread([&] {
      FAKE(fake_cuda_enter_device)(0);
      int mode = kThreadLocal;
      CHECK_EQ(CUDA(cuThreadExchangeStreamCaptureMode)(&mode), kSuccess);
      CHECK_EQ(mode, kGlobal);
      if (own) FAKE(fake_cuda_begin_capture)(m.compute);
      CHECK_EQ(CUDA(cuEventQuery)(new_event()), own ? kCaptureUnsupported : kSuccess);
    }).join();
    void* graph = nullptr;
    CHECK_EQ(FAKE(fake_cuda_end_capture)(m.compute, &graph), own ? kCaptureWrongThread : kSuccess);
  }
}

TEST(fake_cuda_legacy_stream_may_be_used_while_a_non_blocking_stream_captures) {
  Machine m;
  FAKE(fake_cuda_begin_capture)(m.compute);
  CHECK_EQ(CUDA(cuMemsetD8Async)(m.tensor, 1, kBytes, nullptr), kSuccess);
  CHECK(broken_rules().empty());
}

TEST(fake_cuda_host_function_may_read_what_was_copied_before_it) {
  Machine m;
  Pinned pinned;
  static int legal;
  legal = -1;
  FAKE(fake_cuda_set_observes_words)(0);
  const auto read = [](void* bytes) { legal = FAKE(fake_cuda_host_read)(bytes, kBytes); };
  CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, kBytes, m.compute);
  CUDA(cuLaunchHostFunc)(m.compute, read, pinned.bytes);
  FAKE(fake_cuda_run_until_idle)();
  CHECK_EQ(legal, 1);
  CHECK(broken_rules().empty());
}

TEST(fake_cuda_graph_replays_what_was_captured) {
  Machine m;
  FAKE(fake_cuda_begin_capture)(m.compute);
  overwrite(m, m.compute, 9);
  void* graph = nullptr;
  CHECK_EQ(FAKE(fake_cuda_end_capture)(m.compute, &graph), kSuccess);
  FAKE(fake_cuda_run_until_idle)();
  CHECK_EQ(device_text(m.tensor), m.content);  // captured, not executed
  FAKE(fake_cuda_replay)(graph, m.compute);
  FAKE(fake_cuda_run_until_idle)();
  CHECK_EQ(device_text(m.tensor), std::string(kBytes, '\11'));
  CHECK(broken_rules().empty());
}

TEST(fake_cuda_capture_draws_in_a_stream_that_waits_for_it) {
  for (const bool joined : {false, true}) {
    Machine m;
    CUevent forked = new_event();
    CUevent done = new_event();
    void* const branch = FAKE(fake_cuda_stream)(0, 1);
    FAKE(fake_cuda_begin_capture)(m.compute);
    FAKE(fake_cuda_record)(forked, m.compute);
    FAKE(fake_cuda_wait)(branch, forked);
    FAKE(fake_cuda_overwrite)(branch, m.tensor, kBytes, 1);
    int status = kNone;
    CHECK_EQ(CUDA(cuStreamIsCapturing)(static_cast<CUstream>(branch), &status), kSuccess);
    CHECK_EQ(status, kActive);
    FAKE(fake_cuda_record)(done, branch);
    if (joined) FAKE(fake_cuda_wait)(m.compute, done);
    void* graph = nullptr;
    CHECK_EQ(FAKE(fake_cuda_end_capture)(m.compute, &graph), joined ? kSuccess : kCaptureUnjoined);
    CHECK(broken_rules().empty());
  }
}

TEST(fake_cuda_legacy_stream_can_be_asked_while_a_blocking_stream_captures) {
  Machine m;
  void* const blocking = FAKE(fake_cuda_stream)(0, 0);
  FAKE(fake_cuda_begin_capture)(blocking);
  int status = kNone;
  CHECK_EQ(CUDA(cuStreamIsCapturing)(nullptr, &status), kCaptureImplicit);
  void* graph = nullptr;
  CHECK_EQ(FAKE(fake_cuda_end_capture)(blocking, &graph), kSuccess);  // without harm
  CHECK_EQ(CUDA(cuStreamIsCapturing)(nullptr, &status), kSuccess);
  CHECK_EQ(status, kNone);
  CHECK(broken_rules().empty());
}

TEST(fake_cuda_sticky_error_ends_the_context_for_good) {
  Machine m;
  Snapshots snapshots(m, Flaw::kNone);
  CUevent event = new_event();
  FAKE(fake_cuda_fault_kernel)(m.compute, kIllegalAddress);
  snapshots.take(0);
  CHECK(!snapshots.wait(0));  // the word never comes
  CHECK_EQ(CUDA(cuStreamSynchronize)(m.compute), kIllegalAddress);
  CHECK_EQ(CUDA(cuEventQuery)(event), kIllegalAddress);
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  CHECK_EQ(CUDA(cuMemGetInfo_v2)(&free_bytes, &total_bytes), kIllegalAddress);
  CUcontext context = nullptr;
  CHECK_EQ(CUDA(cuCtxGetCurrent)(&context), kSuccess);
  CHECK(context != nullptr);
  FAKE(fake_cuda_check_leaks)();  // what a broken context holds cannot be given back
  CHECK(broken_rules().empty());
}

TEST(fake_cuda_sticky_error_wakes_who_waits) {
  Machine m(3, FAKE_CUDA_WORKER);
  FAKE(fake_cuda_hold_stream)(m.compute, 1);
  overwrite(m, m.compute, 1);
  std::atomic<int> result{-1};
  std::thread waiting([&] {
    FAKE(fake_cuda_enter_device)(0);
    result.store(CUDA(cuStreamSynchronize)(m.compute), std::memory_order_release);
  });
  CHECK(support::eventually([] { return FAKE(fake_cuda_calls)("cuStreamSynchronize") == 1; }));
  CHECK_EQ(result.load(std::memory_order_acquire), -1);
  FAKE(fake_cuda_break_context)(0, kLaunchFailed);
  waiting.join();
  CHECK_EQ(result.load(std::memory_order_acquire), kLaunchFailed);
}

TEST(fake_cuda_breaks_one_device_and_not_another) {
  Machine m(1, FAKE_CUDA_STEPPED, 2);
  FAKE(fake_cuda_fail)("cuMemcpyDtoDAsync", 1, kIllegalAddress, 1);
  CHECK_EQ(CUDA(cuMemcpyDtoDAsync_v2)(m.tensor, m.tensor, 1, m.compute), kIllegalAddress);
  CHECK_EQ(CUDA(cuStreamQuery)(m.compute), kIllegalAddress);
  FAKE(fake_cuda_enter_device)(1);
  CUdevice device = -1;
  CHECK_EQ(CUDA(cuCtxGetDevice)(&device), kSuccess);
  CHECK_EQ(device, 1);
  CHECK_EQ(CUDA(cuStreamSynchronize)(nullptr), kSuccess);
  CHECK_EQ(overwrite(m, m.compute, 1), kIllegalAddress);  // its stream is still the broken one's
}

TEST(fake_cuda_a_broken_context_writes_nothing_more_wherever_its_memory_came_from) {
  for (const int broken : {0, 1}) {  // device 0 pins the memory; each device copies into it
    Machine m(1, FAKE_CUDA_STEPPED, 2);
    Pinned pinned;
    CHECK_EQ(CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, 8, m.compute), kSuccess);
    FAKE(fake_cuda_enter_device)(1);
    const auto other = static_cast<CUstream>(FAKE(fake_cuda_stream)(1, 1));
    const CUdeviceptr tensor = FAKE(fake_cuda_tensor)(1, m.content.data(), kBytes);
    CHECK_EQ(CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes + 32, tensor, 8, other), kSuccess);
    FAKE(fake_cuda_break_context)(broken, kLaunchFailed);
    CHECK_EQ(FAKE(fake_cuda_host_write)(pinned.bytes, 8), broken == 0);
    CHECK_EQ(FAKE(fake_cuda_host_write)(pinned.bytes + 32, 8), broken == 1);
    // One copy is still to come, so the memory must not go.
    FAKE(fake_cuda_enter_device)(1 - broken);
    CHECK_EQ(CUDA(cuMemHostUnregister)(pinned.bytes), kSuccess);
    CHECK_EQ(FAKE(fake_cuda_violation_count)("host-release-pending"), 1);
  }
}

TEST(fake_cuda_fails_the_call_that_the_test_names) {
  Machine m;
  FAKE(fake_cuda_fail)("cuMemHostRegister_v2", 2, kNotPermitted, 0);
  Pinned first;
  unsigned char memory[8] = {};
  CHECK_EQ(CUDA(cuMemHostRegister_v2)(memory, sizeof memory, 0), kNotPermitted);
  CHECK_EQ(CUDA(cuMemHostRegister_v2)(memory, sizeof memory, 0), kSuccess);
  CHECK_EQ(CUDA(cuMemHostRegister_v2)(memory + 4, 8, 0), kAlreadyRegistered);
  CHECK_EQ(FAKE(fake_cuda_pinned_bytes)(), kBytes + sizeof memory);
  FAKE(fake_cuda_set_memory_limit)(2 * kBytes);  // the tensor has half of it
  CUdeviceptr address = 0;
  CHECK_EQ(CUDA(cuMemAlloc_v2)(&address, kBytes + 1), kOutOfMemory);
  CHECK_EQ(CUDA(cuMemAlloc_v2)(&address, kBytes), kSuccess);
  CHECK_EQ(FAKE(fake_cuda_alive_bytes)(0), kBytes);
  CHECK_EQ(CUDA(cuMemFree_v2)(address), kSuccess);
  CHECK_EQ(FAKE(fake_cuda_alive_bytes)(0), 0);
  CHECK(broken_rules().empty());
}

TEST(fake_cuda_registered_memory_is_pinned_for_other_devices_only_if_portable) {
  for (const bool portable : {false, true}) {
    Machine m(1, FAKE_CUDA_STEPPED, 2);
    Pinned pinned(portable ? kRegisterPortable : 0);
    const std::uint64_t far = FAKE(fake_cuda_tensor)(1, m.content.data(), kBytes);
    FAKE(fake_cuda_enter_device)(1);
    CHECK_EQ(CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, far, kBytes, new_stream()), kSuccess);
    CHECK_EQ(FAKE(fake_cuda_violation_count)("pageable-copy"), portable ? 0 : 1);
    CHECK_EQ(pinned.text() == m.content, !portable);  // pageable: complete on return
  }
}

TEST(fake_cuda_looks_symbols_up_by_version) {
  Machine m;
  void* found = nullptr;
  int status = -1;
  const auto look = [&](const char* name, int version) {
    return CUDA(cuGetProcAddress_v2)(name, &found, version, 0, &status);
  };
  const auto is = [&](const char* name) { return found == dlsym(fake_cuda::library(), name); };
  CHECK_EQ(look("cuStreamWriteValue32", 12000), kSuccess);
  CHECK(is("cuStreamWriteValue32_v2") && status == 0);
  CHECK_EQ(look("cuStreamWriteValue32", 11000), kSuccess);
  CHECK(is("cuStreamWriteValue32") && status == 0);
  CHECK_EQ(look("cuLaunchHostFunc", 9000), kSuccess);
  CHECK(found == nullptr && status == 2);
  CHECK_EQ(look("cuNoSuchCall", 12000), kSuccess);
  CHECK(found == nullptr && status == 1);
  FAKE(fake_cuda_hide_symbol)("cuLaunchHostFunc");
  CHECK_EQ(look("cuLaunchHostFunc", 12000), kSuccess);
  CHECK(found == nullptr && status == 1);
  CHECK_EQ(look("cuInit", 99000), kInvalidValue);
  CHECK_EQ(CUDA(cuGetProcAddress)("cuMemFree", &found, 12000, 0), kSuccess);
  CHECK(is("cuMemFree_v2"));
}

TEST(fake_cuda_names_error_codes) {
  const char* name = nullptr;
  CHECK_EQ(CUDA(cuGetErrorName)(kIllegalAddress, &name), kSuccess);
  CHECK_EQ(std::string(name), "CUDA_ERROR_ILLEGAL_ADDRESS");
  CHECK_EQ(CUDA(cuGetErrorString)(-5, &name), kInvalidValue);
  CHECK(name == nullptr);
}

TEST(fake_cuda_answers_nothing_before_initialisation_and_after_shutdown) {
  Machine m;
  FAKE(fake_cuda_set_initialised)(0);
  int count = -1;
  CHECK_EQ(CUDA(cuDeviceGetCount)(&count), kNotInitialized);
  CHECK_EQ(CUDA(cuDriverGetVersion)(&count), kSuccess);
  FAKE(fake_cuda_set_initialised)(1);
  CHECK_EQ(CUDA(cuDeviceGetCount)(&count), kSuccess);
  CHECK_EQ(count, 1);
  FAKE(fake_cuda_shut_down)();
  CHECK_EQ(CUDA(cuDeviceGetCount)(&count), kDeinitialized);
  CHECK(broken_rules().empty());
}

TEST(fake_cuda_forked_child_gets_nothing_and_is_noticed) {
  Machine m;
  const int status = support::in_child([] {
    int count = 0;
    return CUDA(cuDeviceGetCount)(&count) == kNotInitialized && CUDA(cuInit)(0) == kNotInitialized
               ? 0
               : 1;
  });
  CHECK_EQ(status, 0);
  CHECK_EQ(FAKE(fake_cuda_child_calls)(), 2);
  CHECK(broken_rules().empty());
}

TEST(fake_cuda_counts_calls_by_thread_and_what_is_alive) {
  Machine m;
  CUcontext context = nullptr;
  CHECK_EQ(CUDA(cuDevicePrimaryCtxRetain)(&context, 0), kSuccess);
  std::thread([&] {
    CHECK_EQ(CUDA(cuCtxSetCurrent)(context), kSuccess);
    CHECK_EQ(CUDA(cuCtxPushCurrent_v2)(context), kSuccess);
    CUcontext popped = nullptr;
    CHECK_EQ(CUDA(cuCtxPopCurrent_v2)(&popped), kSuccess);
    CHECK(popped == context);
    CHECK_EQ(FAKE(fake_cuda_calls_of_thread)("cuCtxSetCurrent"), 1);
    CHECK_EQ(CUDA(cuStreamDestroy_v2)(new_stream()), kSuccess);
  }).join();
  CHECK_EQ(FAKE(fake_cuda_calls)("cuCtxSetCurrent"), 1);
  CHECK_EQ(FAKE(fake_cuda_calls_of_thread)("cuCtxSetCurrent"), 0);
  CHECK_EQ(CUDA(cuDevicePrimaryCtxRelease_v2)(0), kSuccess);
  FAKE(fake_cuda_check_leaks)();
  CHECK(broken_rules().empty());
}

TEST(fake_cuda_executes_what_is_queued_on_a_destroyed_stream) {
  Machine m;
  Pinned pinned;
  const CUstream side = new_stream();
  CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, kBytes, side);
  CHECK_EQ(CUDA(cuStreamDestroy_v2)(side), kSuccess);
  CHECK_EQ(CUDA(cuCtxSynchronize)(), kSuccess);
  CHECK_EQ(FAKE(fake_cuda_host_read)(pinned.bytes, kBytes), 1);
  CHECK_EQ(pinned.text(), m.content);
  CHECK(broken_rules().empty());
}
