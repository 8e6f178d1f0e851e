#include "capture/ring_room.h"

#include <chrono>
#include <string>

#include "clock.h"
#include "writer/runtime.h"

namespace mld {
namespace {

// Counts the time of a wait however it ends.
class StallClock {
 public:
  explicit StallClock(Ledger& ledger) : ledger_(ledger) { ledger_.add_stall(); }
  ~StallClock() { ledger_.add_stall_time(static_cast<std::uint64_t>(elapsed().count())); }
  StallClock(const StallClock&) = delete;
  StallClock& operator=(const StallClock&) = delete;
  [[nodiscard]] std::chrono::nanoseconds elapsed() const { return Clock::now() - begin_; }

 private:
  Ledger& ledger_;
  const Clock::time_point begin_ = Clock::now();
};

bool lose(ThreadCall& call, LossCause cause) noexcept {
  call.fate = ThreadCall::Fate::kDiscarded;
  call.cause = cause;
  return false;
}

}  // namespace

bool RingRoom::try_take(const ThreadCall& call, std::size_t slot_bytes, Ring::Slot* slot) noexcept {
  Ring& ring = call.runtime->ring();
  if (!ring.try_reserve(slot_bytes, slot)) return false;
  note_high_water(ring);
  return true;
}

bool RingRoom::take_slow(ThreadCall& call, std::size_t slot_bytes, Ring::Slot* slot,
                         WaitHooks& hooks) {
  Runtime& runtime = *call.runtime;
  switch (attempt_.options().overflow) {
    case OverflowPolicy::kDiscard:
      runtime.wake();
      return lose(call, LossCause::kRingFull);
    case OverflowPolicy::kRaise:
      runtime.wake();
      throw Error(ErrorKind::kRingOverflow,
                  "the ring of " + std::to_string(runtime.ring().capacity_bytes()) +
                      " bytes is full: " + std::to_string(runtime.ring().used_bytes()) +
                      " wait to be written and " + std::to_string(slot_bytes) + " more came",
                  "raise TracerConfig.ring_bytes, or choose overflow=\"block\" or \"discard\"");
    case OverflowPolicy::kBlock:
      break;
  }
  if (!wait(call, slot_bytes, slot, hooks)) return false;
  note_high_water(runtime.ring());
  return true;
}

bool RingRoom::wait(ThreadCall& call, std::size_t slot_bytes, Ring::Slot* slot, WaitHooks& hooks) {
  Runtime& runtime = *call.runtime;
  const RecorderOptions& options = attempt_.options();
  const bool may_lose = options.on_error == OnError::kWarn;
  // Waited for long enough already: while nothing has moved since, no call waits again.
  if (may_lose && runtime.ring().tail() == stalled_tail_.load(std::memory_order_relaxed)) {
    runtime.wake();
    return lose(call, LossCause::kStall);
  }
  const StallClock stall(attempt_.ledger());
  for (;;) {
    const std::uint64_t seen = runtime.progress();
    if (runtime.ring().try_reserve(slot_bytes, slot)) return true;
    if (attempt_.is_failed()) {
      call.fate = ThreadCall::Fate::kFailed;
      return false;
    }
    if (stall.elapsed() >= options.stall_timeout) {
      if (may_lose) {
        stalled_tail_.store(runtime.ring().tail(), std::memory_order_relaxed);
        return lose(call, LossCause::kStall);
      }
      throw Error(
          ErrorKind::kTraceStall,
          "the ring stayed full for stall_timeout_s=" +
              std::to_string(std::chrono::duration<double>(options.stall_timeout).count()) +
              ": the disk does not take what is recorded",
          "look at the disk, raise TracerConfig.stall_timeout_s, or choose overflow=\"discard\"");
    }
    runtime.wait_slice(seen, hooks);
  }
}

void RingRoom::note_high_water(Ring& ring) noexcept {
  // relaxed: a statistic.
  const std::uint64_t used = ring.used_bytes();
  std::uint64_t seen = high_water_bytes_.load(std::memory_order_relaxed);
  while (used > seen &&
         !high_water_bytes_.compare_exchange_weak(seen, used, std::memory_order_relaxed)) {
  }
}

}  // namespace mld
