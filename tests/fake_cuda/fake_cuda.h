// libfake_cuda.so: the CUDA driver API over host memory, for machines without a GPU. A program
// opens it instead of libcuda.so.1; a test opens it too (fake_cuda_loader.h, or ctypes) and steers
// it by the functions below.
//
//   streams   queues that a seeded device executes late and out of step; nothing happens at enqueue
//   rules     checked at every call; what was broken stands in fake_cuda_violations() (ids:
//   rules.h) ours      whoever calls the driver API is the program under test; whoever calls the
//   functions
//             below plays the embedding program (torch): its memory is no leak, it may capture
//
// Handles: a stream, graph or device pointer here is the driver API's. Every function may be called
// from any thread, but fake_cuda_reset only when no other thread calls, waits or executes. A
// mistake of the test itself (a device that is not there, an unknown handle) aborts. A forked child
// may call the driver API, which refuses, and fake_cuda_child_calls; nothing else here.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum FakeCudaMode {
  FAKE_CUDA_STEPPED = 0,  // nothing executes but in fake_cuda_step, or to end a wait of the host
  FAKE_CUDA_WORKER = 1,   // a thread of the fake executes, with seeded pauses
  // As stepped, and a seeded number of operations executes before each driver call, in the calling
  // thread: with one host thread, one seed is one schedule.
  FAKE_CUDA_INTERLEAVED = 2,
};

enum FakeCudaCopy {
  FAKE_CUDA_DEVICE_TO_DEVICE = 0,
  FAKE_CUDA_DEVICE_TO_HOST = 1,
  FAKE_CUDA_HOST_TO_DEVICE = 2,
  FAKE_CUDA_SET = 3,
  FAKE_CUDA_WORD = 4,
};

struct FakeCudaRange {
  uint64_t address;
  size_t bytes;
  int writes;
};

// Forgets everything: memory, streams, contexts, faults, violations, counters. CUDA is initialised
// then, as by torch, and no context is active. Ends the worker of the mode before.
void fake_cuda_reset(uint64_t seed, int devices, int mode);
void fake_cuda_set_initialised(int initialised);
void fake_cuda_shut_down(void);  // as in static destructors: every call answers DEINITIALIZED
void fake_cuda_set_device_count(int devices);  // adds devices
// Whether streams have memory operations (1, after a reset); without, cuStreamWriteValue32_v2
// answers NOT_SUPPORTED. The manual (Driver API 11.8, Stream Memory Operations) says that the `_v2`
// are available on all platforms, where version 1 is off by default; 0 is a driver that disagrees.
void fake_cuda_set_memory_operations(int supported);

// Execution. step returns how many operations ran; run_until_idle ends when none can run any more.
size_t fake_cuda_step(size_t operations);
void fake_cuda_run_until_idle(void);
void fake_cuda_hold_stream(void* stream, int held);  // held: a device that is stuck, or far behind
// In the order of execution; equal for equal schedules.
uint64_t fake_cuda_schedule_hash(void);

// The embedding program. enter_device makes a device's primary context current in this thread (and
// active); -1: none. A stream's device is given, the default stream's (NULL) is the current one.
void fake_cuda_enter_device(int device);
void* fake_cuda_stream(int device, int non_blocking);
uint64_t fake_cuda_tensor(int device, const void* content, size_t bytes);
void fake_cuda_free_tensor(uint64_t address);
// A kernel that touches exactly `ranges`; `function` runs when the kernel does and may not call the
// driver API. NULL: it does nothing but take its turn.
int fake_cuda_kernel(void* stream, const char* name, void (*function)(void*), void* user,
                     const struct FakeCudaRange* ranges, size_t range_count);
int fake_cuda_overwrite(void* stream, uint64_t address, size_t bytes, unsigned char value);
int fake_cuda_fault_kernel(void* stream, int code);  // breaks its context when it executes
void fake_cuda_record(void* event, void* stream);
void fake_cuda_wait(void* stream, void* event);
int fake_cuda_begin_capture(void* stream);  // mode "global", as torch does
int fake_cuda_end_capture(void* stream, void** graph);
void fake_cuda_replay(void* graph, void* stream);
// The bytes behind a device address, now, whatever is still to execute.
void* fake_cuda_bytes_at(uint64_t address);

// What the host does with memory that the device writes; each returns whether it was legal.
int fake_cuda_host_read(const void* memory, size_t bytes);
int fake_cuda_host_write(const void* memory, size_t bytes);
// From begin to end the host uses the range: no copy into it may be enqueued.
void fake_cuda_host_use_begin(const void* memory, size_t bytes);
void fake_cuda_host_use_end(const void* memory);
// Whether a program that polls completion words is taken to have seen each one as soon as it is set
// (1, after a reset), or only by fake_cuda_host_acquire (0). The first never blames a sound
// program, and blames one that does not look in every schedule in which the word comes late.
void fake_cuda_set_observes_words(int observes);
// This thread saw the word that the device set at this address (NULL: all that are set).
int fake_cuda_host_acquire(const void* word);

// Faults. The nth call from now (1: the next) of `name`, with or without its `_v2`, returns `code`;
// sticky: from then on the caller's context is broken, and what is queued in it never executes.
void fake_cuda_fail(const char* name, uint64_t nth, int code, int sticky);
void fake_cuda_break_context(int device, int code);
void fake_cuda_set_memory_limit(size_t bytes);  // of each device
void fake_cuda_hide_symbol(const char* name);   // from cuGetProcAddress; dlsym still finds it

// Brackets a callee that must leave the thread's context and capture mode alone and must not wait.
void fake_cuda_callee_begin(void);
void fake_cuda_callee_end(void);
void* fake_cuda_current_context_of_thread(void);
int fake_cuda_capture_mode_of_thread(void);

// Findings. A line each, "" if there are none; valid until this thread asks again.
const char* fake_cuda_violations(void);
const char* fake_cuda_warnings(void);  // legal, but slow
uint64_t fake_cuda_violation_count(const char* rule);
const char* fake_cuda_rule(size_t index, int* is_warning);  // ids in order; NULL behind the last
void fake_cuda_check_leaks(void);      // reports what the program under test has not given back
uint64_t fake_cuda_child_calls(void);  // driver calls made by forked children since the reset

// Counters since the reset. Calls by the name of the symbol ("cuMemFree_v2"; NULL: of all),
// refused ones too.
uint64_t fake_cuda_calls(const char* name);
uint64_t fake_cuda_calls_of_thread(const char* name);
uint64_t fake_cuda_copied_bytes(int kind);
uint64_t fake_cuda_alive_bytes(int device);  // device memory of the program under test
uint64_t fake_cuda_pinned_bytes(void);

#ifdef __cplusplus
}
#endif
