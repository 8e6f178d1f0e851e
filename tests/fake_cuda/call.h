// What every driver call goes through before it does its own work: the process, the counters, the
// seeded device, initialisation, injected faults, the context and the rules of capture.
#pragma once

#include <optional>

#include "fake_cuda/driver.h"

#define FAKE_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace fake_cuda {

enum Needs : unsigned {
  kAlways = 1,     // answers before initialisation and in a broken context
  kContext = 2,    // documents CUDA_ERROR_INVALID_CONTEXT
  kUnsafe = 4,     // potentially unsafe while a capture is under way
  kHostWaits = 8,  // waits for the device, or may
  kManages = 16,   // works on contexts, broken or not
};

struct Call {
  Driver& driver;
  ThreadState& thread;
  Lock& lock;
  Context* context;  // current; not nullptr with kContext
};

// A code: the call ends with it. Nothing: it goes on.
std::optional<CUresult> refuse(Call& call, const char* name, unsigned needs);

template <class Body>
CUresult run_call(const char* name, unsigned needs, Body body) {
  if (is_forked_child()) {
    child_calls().count.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count
    return kNotInitialized;
  }
  Lock lock(driver().mutex);
  Call call{driver(), driver().thread(), lock, nullptr};
  if (const auto refused = refuse(call, name, needs)) return *refused;
  return body(call);
}

}  // namespace fake_cuda
