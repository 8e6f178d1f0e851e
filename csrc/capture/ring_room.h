// Room in the ring for a call's records, and what the overflow policy says when there is none.
//
// Thread safety: all methods from any thread, each with a call of its own.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "capture/attempt.h"
#include "capture/thread_call.h"
#include "ring/byte_ring.h"
#include "wait_hooks.h"

namespace mld {

class RingRoom {
 public:
  using Ring = MpscByteRing<std::uint64_t>;

  explicit RingRoom(AttemptState& attempt) : attempt_(attempt) {}

  // At once; false when the ring is full.
  [[nodiscard]] bool try_take(const ThreadCall& call, std::size_t slot_bytes,
                              Ring::Slot* slot) noexcept;
  // The same when it is full, by the policy: may wait. False when the call was lost instead, to the
  // policy or with its storage. Throws Error(kRingOverflow, kTraceStall), and what
  // hooks.after_slice() throws.
  [[nodiscard]] bool take_slow(ThreadCall& call, std::size_t slot_bytes, Ring::Slot* slot,
                               WaitHooks& hooks);
  // One after the other.
  [[nodiscard]] bool take(ThreadCall& call, std::size_t slot_bytes, Ring::Slot* slot,
                          WaitHooks& hooks) {
    return try_take(call, slot_bytes, slot) || take_slow(call, slot_bytes, slot, hooks);
  }
  // The most that its calls have found taken.
  [[nodiscard]] std::size_t high_water_bytes() const noexcept {
    return high_water_bytes_.load(std::memory_order_relaxed);
  }

 private:
  [[nodiscard]] bool wait(ThreadCall& call, std::size_t slot_bytes, Ring::Slot* slot,
                          WaitHooks& hooks);
  void note_high_water(Ring& ring) noexcept;

  AttemptState& attempt_;
  std::atomic<std::uint64_t> high_water_bytes_{0};
  // Where the ring's tail stood when a wait last ended by its timeout. relaxed: it spares waits.
  std::atomic<std::uint64_t> stalled_tail_{UINT64_MAX};
};

}  // namespace mld
