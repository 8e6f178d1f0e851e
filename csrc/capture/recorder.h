// The producer side of one attempt: what a hook calls. It turns a call into ring records.
//
//   begin_call -> capture, capture, ... -> end_call | abort_call
//
// Thread safety: all methods from any thread; each has its own current call. A hook takes no lock
// that the writer takes and, once a thread's vectors are warm, allocates nothing.
//
// A capture is copied in pieces of at most Runtime::max_piece_bytes(), each in a ring slot of its
// own, so that a tensor larger than the ring passes through it. A call becomes visible by its last
// record, which carries its description.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "capture/attempt.h"
#include "capture/ring_room.h"
#include "capture/thread_call.h"
#include "clock.h"
#include "device/device_stager.h"
#include "process.h"
#include "ring/byte_ring.h"
#include "ring/record.h"
#include "wait_hooks.h"

namespace mld {

class Runtime;
struct RecordHeader;

// Bytes to copy. They are borrowed before the first piece, and anew after each wait. Of a device
// tensor: its device address.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  [[nodiscard]] virtual const std::byte* borrow() = 0;
};

class Recorder : public std::enable_shared_from_this<Recorder> {
 public:
  // Opens the recording side of an attempt; starts the process's runtime when it is the first.
  // Throws Error.
  static std::shared_ptr<Recorder> open(const StoreUse& store, const RecorderOptions& options);
  Recorder(std::shared_ptr<Runtime> runtime, std::shared_ptr<AttemptState> attempt)
      : attempt_(std::move(attempt)), room_(*attempt_), runtime_(std::move(runtime)) {}
  // Without a close() the writer forgets the attempt when it comes to it; nobody waits.
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  [[nodiscard]] const AttemptState& attempt() const noexcept { return *attempt_; }
  [[nodiscard]] bool is_inert() const noexcept { return generation_ != process_generation(); }
  [[nodiscard]] std::size_t ring_high_water_bytes() const noexcept {
    return room_.high_water_bytes();
  }

  // The calling thread's open call; null when it has none. This is all that a hook outside of a
  // traced call costs.
  [[nodiscard]] ThreadCall* current_call() const noexcept;
  // The same, or the last one that the thread ended.
  [[nodiscard]] ThreadCall* last_call() const noexcept { return find_thread_call(attempt_->id()); }

  std::uint64_t begin_call(std::int64_t epoch, std::uint32_t batch_size);
  // Copies `bytes` from `source`; `device` is where they lay before somebody took them to the host,
  // and is only remembered. Throws Error(kRingOverflow, kTraceStall), and what hooks.after_slice()
  // throws.
  void capture(ThreadCall& call, std::uint32_t column, const char* dtype, const std::int64_t* dims,
               std::uint32_t ndim, std::uint64_t bytes, ByteSource& source, WaitHooks& hooks,
               int device = -1);
  // The same for memory of a CUDA device: enqueues copies and waits for none. False, with nothing
  // done, when the device has no such path: copy to the host, then capture(). A lost device loses
  // the call (counted as failed, with a gap) instead of raising: the error is the user's to see.
  // Throws as capture(), and Error(kStreamCapture).
  [[nodiscard]] bool capture_device(ThreadCall& call, std::uint32_t column, const char* dtype,
                                    const std::int64_t* dims, std::uint32_t ndim,
                                    std::uint64_t bytes, const DevicePlace& place,
                                    ByteSource& source, WaitHooks& hooks);
  // False when the call was lost (and counted). Throws what a capture of the call threw,
  // Error(kRingOverflow, kTraceStall, kDiskBudget), and
  // Error(kTracerClosed) when close() has begun; the call stays open then.
  bool end_call(std::string_view description, std::uint32_t rows, std::uint32_t ground_truth_rows,
                WaitHooks& hooks);
  void abort_call();
  // One capture's bytes, of the thread's open or last ended call. Throws Error(kNotFound).
  std::string read_back(std::uint32_t capture, WaitHooks& hooks);

  // Waits until all calls ended before are committed. Throws Error(kTraceStall), StoreError.
  void flush(std::optional<std::chrono::nanoseconds> timeout, WaitHooks& hooks);
  // Flushes, seals, detaches. False when the deadline passed: the core is left behind then, never
  // freed.
  bool close(std::chrono::nanoseconds timeout, WaitHooks& hooks);

 private:
  using Ring = RingRoom::Ring;

  // Lists a capture and counts its bytes.
  void add_capture(ThreadCall& call, std::uint32_t column, const char* dtype,
                   const std::int64_t* dims, std::uint32_t ndim, std::uint64_t bytes, int device);
  [[nodiscard]] RecordHeader chunk_header(const ThreadCall& call) const noexcept;
  void count_lost(ThreadCall& call, std::uint64_t rows);
  void let_go();
  [[nodiscard]] bool has_let_go() const;
  void wait_for_ending_calls(Clock::time_point deadline, WaitHooks& hooks);
  // Copies what lies at `from`, which was borrowed from `source` just now; after a wait it is
  // borrowed anew.
  template <class Way>
  void copy_pieces(ThreadCall& call, std::uint64_t bytes, const std::byte* from, const Way& way,
                   ByteSource& source, WaitHooks& hooks);
  // Within a catch: the call cannot be stored any more, and end_call() will say why.
  static void break_call(ThreadCall& call) noexcept;
  // Throws Error(kDiskBudget) if the call and `other_bytes` do not fit max_bytes.
  void check_budget(const ThreadCall& call, std::uint64_t more_bytes,
                    std::uint64_t other_bytes) const;
  void note_loss(const ThreadCall& call, std::uint64_t rows, const char* cause);
  // The runtime; throws Error(kTracerClosed) when there is none any more.
  [[nodiscard]] std::shared_ptr<Runtime> runtime() const;

  // constant after construction
  const std::uint64_t generation_ = process_generation();
  const std::shared_ptr<AttemptState> attempt_;
  // shared
  RingRoom room_;
  std::atomic<std::uint64_t> next_call_{0};
  std::atomic<std::uint64_t> next_row_{0};
  std::atomic<bool> closed_{false};
  // Calls between their look at closed_ and their last record.
  std::atomic<std::uint32_t> ending_{0};
  mutable std::mutex mutex_;
  std::shared_ptr<Runtime> runtime_;  // protected by mutex_; null when closed
};

}  // namespace mld
