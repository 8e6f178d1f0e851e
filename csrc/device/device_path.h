// The way of one device's copies: its context, our stream there, its ring and its completion word.
// Made once, never freed before the stager.
//
// Thread safety: state, has_landed, is_lost, close from any thread; copy from any thread inside a
// DeviceSession, one at a time by the path's mutex; probe from the writer thread; the rest from one
// thread at a time, as each says.
//
// INVARIANT 1: a stream only waits for an event that is already recorded (waiting for another one
//              is a no-op), so all waits depend on device work alone, never on disk or writer.
// INVARIANT 2: numbers are given and their operations enqueued under one lock a device, so the
//              order of numbers is the order of our stream.
// INVARIANT 3: a copy counts as lost only when its context is lost, and a copy enqueued in part is
//              waited for, so nobody writes to a slot that was given up.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "clock.h"
#include "device/completion_word.h"
#include "device/cuda_driver.h"
#include "device/device_notes.h"
#include "device/device_ring.h"

namespace mld {

class DevicePath {
 public:
  enum class State {
    kNew,     // has a context at most
    kOpen,    // copies
    kClosed,  // ended by an error; copies under way still arrive
    kLost,    // its context is lost: nothing of it arrives any more
  };

  DevicePath(const cuda::Driver& driver, DeviceNotes& notes, int index)
      : driver_(driver), notes_(notes), index_(index) {}
  DevicePath(const DevicePath&) = delete;
  DevicePath& operator=(const DevicePath&) = delete;

  // --- set-up. REQUIRES: before any other thread knows the path.
  // The context and nothing else, so that the device can be asked about captures.
  void take_context();
  // REQUIRES: state kNew, a session, one thread at a time.
  [[nodiscard]] cuda::Result take_resources(std::size_t ring_bytes);
  void open() noexcept { state_.store(State::kOpen, std::memory_order_release); }

  [[nodiscard]] cuda::Context context() const noexcept { return context_; }
  [[nodiscard]] cuda::Stream stream() const noexcept { return stream_; }
  // acquire PAIRS WITH open() and close(): what was taken; that nothing is enqueued any more.
  [[nodiscard]] State state() const noexcept { return state_.load(std::memory_order_acquire); }
  [[nodiscard]] bool is_lost() const noexcept { return state() == State::kLost; }
  // Ends the path after an unexpected `code`; said once.
  void close(cuda::Result code, const char* what) noexcept;

  // Enqueues a copy, in a session whose stream is not being captured. False when the path has
  // ended, now or before.
  [[nodiscard]] bool copy(cuda::Stream compute, cuda::DevicePointer from, std::byte* to,
                          std::size_t bytes, std::uint64_t* sequence) noexcept;

  [[nodiscard]] bool has_landed(std::uint64_t sequence) const noexcept {
    return word_.is_taken() && word_.has_landed(sequence);
  }
  [[nodiscard]] bool has_landed_all() const noexcept {
    return !word_.is_taken() || word_.has_landed(word_.last());
  }
  // Looks whether the context is lost, after a long silence of the word. Writer, and shut-down.
  void probe() noexcept;

  // relaxed: counts.
  [[nodiscard]] std::uint64_t copies() const noexcept {
    return copies_.load(std::memory_order_relaxed);
  }
  [[nodiscard]] std::uint64_t compute_stream_copies() const noexcept {
    return compute_stream_copies_.load(std::memory_order_relaxed);
  }

  // Gives everything back. REQUIRES: a session; no other thread; all copies have landed or are
  // lost.
  void release() noexcept;

 private:
  [[nodiscard]] cuda::Result enqueue(cuda::Stream compute, cuda::DevicePointer from, std::byte* to,
                                     std::size_t bytes) noexcept;
  [[nodiscard]] cuda::Result snapshot(cuda::Stream compute, cuda::DevicePointer from, std::byte* to,
                                      std::size_t bytes, const DeviceRing::Place& place) noexcept;
  [[nodiscard]] cuda::Result number(const DeviceRing::Place& place) noexcept;
  // `code`, or that of a context that turns out to be lost.
  [[nodiscard]] cuda::Result drain(cuda::Stream compute, cuda::Result code) const noexcept;

  // constant once open
  const cuda::Driver& driver_;
  DeviceNotes& notes_;
  const int index_;
  cuda::Device handle_ = 0;
  cuda::Context context_ = nullptr;
  cuda::Stream stream_ = nullptr;
  // shared
  std::atomic<State> state_{State::kNew};
  CompletionWord word_;
  std::atomic<std::uint64_t> copies_{0}, compute_stream_copies_{0};
  // producers
  std::mutex mutex_;
  DeviceRing ring_;  // protected by mutex_
  // writer
  std::uint64_t probed_at_copy_ = 0;
  Clock::time_point word_moved_{};
};

}  // namespace mld
