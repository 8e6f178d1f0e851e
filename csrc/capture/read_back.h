// The way back: a capture's bytes, from the ring or from the store, for the thread that made it.
#pragma once

#include <cstdint>
#include <string>

#include "capture/attempt.h"
#include "capture/thread_call.h"
#include "wait_hooks.h"

namespace mld {

class Runtime;

// Waits for the copies of a device that bring them, and for the writer. REQUIRES: the calling
// thread's call, open or ended, and one of its captures. Throws Error(kNotFound) when they are
// gone, Error(kTraceStall), and what hooks.after_slice() throws.
[[nodiscard]] std::string read_capture(Runtime& runtime, const AttemptState& attempt,
                                       const ThreadCall& call, std::uint32_t capture,
                                       WaitHooks& hooks);

}  // namespace mld
