// Copies of CUDA memory into ring slots, beside the compute stream: a hook only enqueues, and the
// writer sees when the bytes have arrived. It knows neither calls nor records.
//
//   compute stream:  ... kernel ─ D2D snapshot ─ record event ─ later kernels, in-place operations
//                                                     │
//   our stream:              ... ─ earlier copies ─ wait ─ D2H into the slot ─ write word := n ─
//                                                                                    │
//   host:            writer, by acquire loads only:            "copy n has arrived" ◄┘
//
// One of our streams a device, so its copies end in the order of their sequence numbers and one
// 4-byte word in pinned memory tells about all of them: no query, no callback, no host wait.
// A device slot and an event are free again when the word has passed their number. With no room in
// the device ring, the D2H copy itself goes to the compute stream, and our stream waits for it.
//
// Thread safety: has_arrived, is_lost, report, take_notice from any thread, and a StageSession from
// the thread that made it; state_of from the writer thread; shut_down when neither producers nor
// writer are there any more.
//
// INVARIANT: nothing is enqueued on a stream that is being captured into a graph, and our calls run
//            in sessions (device_session.h), so that they never invalidate a capture of another
//            thread. The orders of one device's copies are device_path.h's invariants.
//
// After an unexpected code of the driver the device's path is closed for good. A lost context
// (a sticky error) loses what is asked of it from then on; otherwise callers copy synchronously.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "device/cuda_driver.h"
#include "device/device_notes.h"
#include "device/device_path.h"
#include "device/device_session.h"
#include "process.h"
#include "ring/copy_watch.h"

namespace mld {

struct DeviceOptions {
  std::string library = cuda::Driver::kLibrary;
  std::size_t ring_bytes = std::size_t{64} << 20;  // a device; at most 1 % of its memory is taken
};

// Where a tensor lies and in which order with what.
struct DevicePlace {
  int device = 0;
  void* stream = nullptr;  // the compute stream; null is the legacy one
};

enum class StageResult {
  kStaged,       // it can be; enqueued, and it arrives by itself
  kCapturing,    // the stream is being captured into a graph; nothing was enqueued
  kUnavailable,  // there is no such path, or not any more: copy synchronously
  kLost,         // the context is lost: nothing can be copied from this device any more
};

struct DeviceReport {
  std::uint64_t copies = 0;  // enqueued
  std::uint64_t compute_stream_copies = 0;
  std::uint64_t synchronous_copies = 0;  // that callers made instead
  std::uint64_t errors = 0;
  std::string last_error;
  bool pinned = false;  // the arena
};

class StageSession;

class DeviceStager final : public CopyWatch {
 public:
  static constexpr int kMaxDevices = 64;

  // `arena` is where slots lie; it outlives the stager. Nothing is loaded or taken before a
  // session.
  DeviceStager(std::byte* arena, std::size_t arena_bytes, DeviceOptions options);
  ~DeviceStager() override;
  DeviceStager(const DeviceStager&) = delete;
  DeviceStager& operator=(const DeviceStager&) = delete;

  void count_synchronous_copy() noexcept;

  // Any thread; false also for what is lost.
  [[nodiscard]] bool has_arrived(int device, std::uint64_t sequence) const noexcept;
  // Any thread: whether what has not arrived yet never will.
  [[nodiscard]] bool is_lost(int device) const noexcept;
  [[nodiscard]] CopyState state_of(const RecordHeader& header) noexcept override;

  [[nodiscard]] DeviceReport report() const;
  // What a user should be told, once each; nullopt when there is nothing new.
  [[nodiscard]] std::optional<std::string> take_notice() { return notes_.take(); }

  // Waits for copies in flight and gives everything back. False when they have not ended by then:
  // all of it, and the arena, must stay for ever.
  [[nodiscard]] bool shut_down(std::chrono::nanoseconds patience) noexcept;

 private:
  friend class StageSession;

  [[nodiscard]] DevicePath* find(int device) const noexcept;
  // The path of a device, made if it is the first; null when there is no way.
  [[nodiscard]] DevicePath* find_or_make(int device) noexcept;
  [[nodiscard]] const cuda::Driver* load_driver();
  [[nodiscard]] DevicePath* make_path(int device);
  [[nodiscard]] StageResult set_up(DevicePath& path) noexcept;
  void pin_arena();

  // constant after construction
  std::byte* const arena_;
  const std::size_t arena_bytes_;
  const DeviceOptions options_;
  const std::uint64_t generation_ = process_generation();
  // shared
  std::array<std::atomic<DevicePath*>, kMaxDevices> paths_{};
  std::atomic<bool> unavailable_{false};  // no driver
  std::atomic<std::uint64_t> synchronous_copies_{0};
  DeviceNotes notes_;
  // Taken to make and set up devices, and by nothing that the writer does.
  std::mutex setup_mutex_;
  std::unique_ptr<cuda::Driver> driver_;  // set once under setup_mutex_, before any path
  bool arena_tried_ = false;              // protected by setup_mutex_
  std::atomic<bool> pinned_{false};
};

// One thread's copies of one tensor. Between enter() and leave() every piece costs the operations
// of its copy alone; what they need around them (the capture mode, the context, the question for a
// graph capture) is done once. So nothing of the user's may run in between, and no host wait:
// leave() comes before, and enter() after it asks again.
class StageSession {
 public:
  StageSession(DeviceStager& stager, const DevicePlace& place) noexcept
      : stager_(stager), place_(place) {}
  StageSession(const StageSession&) = delete;
  StageSession& operator=(const StageSession&) = delete;

  // Whether the tensor can be staged: kStaged, and then the session is entered. Sets the device up
  // when it is the first tensor of it.
  [[nodiscard]] StageResult enter() noexcept;
  // What is enqueued goes on.
  void leave() noexcept { calls_.reset(); }
  // Enqueues the copy of `bytes` at device address `from`, as they are at this point of the compute
  // stream, to `to` in the arena: kStaged, and its number. REQUIRES: entered; `to` stays reserved
  // until that copy has arrived or is lost.
  [[nodiscard]] StageResult stage(const std::byte* from, std::byte* to, std::size_t bytes,
                                  std::uint64_t* sequence) noexcept;
  [[nodiscard]] int device() const noexcept { return place_.device; }

 private:
  [[nodiscard]] cuda::Stream compute() const noexcept {
    return static_cast<cuda::Stream>(place_.stream);
  }

  DeviceStager& stager_;
  const DevicePlace place_;
  DevicePath* path_ = nullptr;
  std::optional<DeviceSession> calls_;
};

}  // namespace mld
