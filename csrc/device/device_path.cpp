#include "device/device_path.h"

#include <chrono>
#include <new>
#include <string>

#include "device/device_session.h"
#include "device/stager_mutation.h"

namespace mld {
namespace {

using cuda::kSuccess;

// A word that does not move for this long makes the writer look whether the context is lost.
constexpr auto kProbeAfter = std::chrono::seconds(1);

}  // namespace

void DevicePath::take_context() {
  // torch computes in the primary context, so this one exists and is only counted up.
  cuda::Result code = driver_.device_get(&handle_, index_);
  if (code == kSuccess) code = driver_.primary_context_retain(&context_, handle_);
  if (code != kSuccess) close(code, "taking the device's context");
}

cuda::Result DevicePath::take_resources(std::size_t ring_bytes) {
  cuda::Result code = driver_.stream_create(&stream_, cuda::kStreamNonBlocking);
  if (code == kSuccess) code = word_.take(driver_, stream_);
  if (code == kSuccess) code = ring_.take_events(driver_);
  if (code == kSuccess) ring_.take_memory(driver_, ring_bytes);
  return code;
}

// Copies that are enqueued still arrive, unless the context is lost.
void DevicePath::close(cuda::Result code, const char* what) noexcept {
  const State state = cuda::is_sticky(code) ? State::kLost : State::kClosed;
  State before = state_.load(std::memory_order_acquire);
  while (before < state && !state_.compare_exchange_weak(before, state, std::memory_order_acq_rel,
                                                         std::memory_order_acquire)) {
  }
  if (before >= state) return;
  try {
    const std::string name = driver_.error_name(code);
    notes_.add("CUDA device " + std::to_string(index_) + ": " + what + " failed with " + name +
               (state == State::kLost ? "; its tensors are not recorded any more"
                                      : "; its tensors are copied synchronously from now on"));
    notes_.add_error(name);
  } catch (const std::exception&) {  // no memory for words
  }
}

bool DevicePath::copy(cuda::Stream compute, cuda::DevicePointer from, std::byte* to,
                      std::size_t bytes, std::uint64_t* sequence) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);  // INVARIANT 2
  if (state() != State::kOpen) return false;
  cuda::Result code = enqueue(compute, from, to, bytes);
  if (code != kSuccess && !cuda::is_sticky(code)) code = drain(compute, code);
  if (code != kSuccess) {
    close(code, "copying a tensor");
    return false;
  }
  *sequence = word_.last();
  copies_.fetch_add(1, std::memory_order_relaxed);
  return true;
}

// REQUIRES: mutex_.
cuda::Result DevicePath::enqueue(cuda::Stream compute, cuda::DevicePointer from, std::byte* to,
                                 std::size_t bytes) noexcept {
  ring_.retire(word_.landed());
  DeviceRing::Place place;
  cuda::Result code = kSuccess;
  try {
    code = ring_.find_place(driver_, bytes, &place);
  } catch (const std::bad_alloc&) {
    code = cuda::kOutOfMemory;
  }
  if (code == kSuccess) code = snapshot(compute, from, to, bytes, place);
  if (code == kSuccess && is_broken(StagerMutation::kWordFirst))
    code = word_.write(driver_, stream_, word_.last() + 1);
  if (code == kSuccess && place.memory != 0) {
    const auto source = is_broken(StagerMutation::kNoSnapshot) ? from : place.memory;
    code = driver_.copy_device_to_host(to, source, bytes, stream_);
  }
  return code == kSuccess ? number(place) : code;
}

// On the compute stream the snapshot, or for want of room the copy itself; on ours the wait for it.
cuda::Result DevicePath::snapshot(cuda::Stream compute, cuda::DevicePointer from, std::byte* to,
                                  std::size_t bytes, const DeviceRing::Place& place) noexcept {
  const bool is_direct = place.memory == 0;
  const bool waits = !is_broken(StagerMutation::kNoWait) &&
                     !(is_direct && is_broken(StagerMutation::kNoWaitForDirect));
  const bool waits_early = is_broken(StagerMutation::kWaitBeforeRecord);
  cuda::Result code = kSuccess;
  const auto step = [&code](auto function, auto... arguments) {
    if (code == kSuccess) code = function(arguments...);
  };
  if (is_direct) {
    step(driver_.copy_device_to_host, to, from, bytes, compute);
    compute_stream_copies_.fetch_add(1, std::memory_order_relaxed);
  } else if (!is_broken(StagerMutation::kNoSnapshot)) {
    step(driver_.copy_device_to_device, place.memory, from, bytes, compute);
  }
  if (waits_early) step(driver_.stream_wait_event, stream_, place.event, 0u);
  if (!is_broken(StagerMutation::kNoRecord)) step(driver_.event_record, place.event, compute);
  if (waits && !waits_early)
    step(driver_.stream_wait_event, stream_, place.event, 0u);  // INVARIANT 1
  return code;
}

// The copy that is enqueued gets its number, and our stream will say it.
cuda::Result DevicePath::number(const DeviceRing::Place& place) noexcept {
  const std::uint64_t sequence = word_.last() + 1;
  ring_.add(place, sequence);
  word_.set_last(sequence);
  if (is_broken(StagerMutation::kWordFirst)) return kSuccess;
  const cuda::Result code = word_.write(driver_, stream_, sequence);
  if (code != kSuccess) {  // nobody will ever write that number
    word_.set_last(sequence - 1);
    ring_.take_back();
  }
  return code;
}

// INVARIANT 3, after a copy that was enqueued in part: no word tells when the part has ended. The
// one host wait of the path, once, where the driver has failed already.
cuda::Result DevicePath::drain(cuda::Stream compute, cuda::Result code) const noexcept {
  if (is_broken(StagerMutation::kNoDrain)) return code;
  for (const cuda::Stream stream : {compute, stream_}) {
    cuda::Result answer = cuda::kUnknown;
    for (int tries = 0; tries < 3 && answer != kSuccess; ++tries) {
      answer = driver_.stream_synchronize(stream);
      if (cuda::is_sticky(answer)) return answer;
    }
    if (answer != kSuccess) return cuda::kUnknown;
  }
  return code;
}

// A lost context never writes the word, and perhaps no hook comes any more to hear of it. Asked
// only after a long silence, since the answer may wait for the context's lock. RELAXED mode makes
// the question legal beside a capture.
void DevicePath::probe() noexcept {
  const auto now = Clock::now();
  const std::uint64_t landed = word_.landed();
  if (word_moved_ == Clock::time_point{} || landed != probed_at_copy_) {
    probed_at_copy_ = landed;
    word_moved_ = now;
    return;
  }
  if (now - word_moved_ < kProbeAfter) return;
  word_moved_ = now;
  const std::uint64_t sent = word_.last();
  cuda::Result code = kSuccess;
  {
    const DeviceSession session(driver_, context_);
    // Asked again in a while, as after every answer that may pass.
    if (session.code() != kSuccess) return;
    code = driver_.stream_query(stream_);
  }
  // A stream that has nothing left to do and has not written its word never will.
  if (code == kSuccess && !word_.has_landed(sent)) code = cuda::kUnknown;
  if (cuda::is_sticky(code)) close(code, "waiting for a copy");
}

// Whatever the driver answers: at the end of a process it may be gone already.
void DevicePath::release() noexcept {
  ring_.release(driver_);
  if (stream_ != nullptr) driver_.stream_destroy(stream_);
  word_.release(driver_);
  driver_.primary_context_release(handle_);
}

}  // namespace mld
