// Which copies of a device have arrived: 4 bytes of pinned memory that the device sets to the
// number of each copy behind it, and the number of the last one that was enqueued. The copies end
// in the order of their numbers, so one word tells about all of them: no query, no callback.
//
// Set by a stream memory operation, or, where the driver has none, by a copy from a counter in
// device memory that our stream has set before. Both lie behind the copy in the order of our
// stream, and an operation of a stream begins when those before it are complete, their bytes
// visible: a memory operation is a fence (cuda.h, CU_STREAM_WRITE_VALUE_DEFAULT), and the counter's
// setting stands between two copies and needs the first one's end.
//
// Thread safety: take, write and release under whatever orders our stream; the rest from any
// thread.
#pragma once

#include <atomic>
#include <cstdint>

#include "device/cuda_driver.h"

namespace mld {

class CompletionWord {
 public:
  // Finds the way by setting number 0 on our stream, which has to arrive like any other.
  [[nodiscard]] cuda::Result take(const cuda::Driver& driver, cuda::Stream stream) noexcept;
  // REQUIRES: last() has landed, or its context is lost.
  void release(const cuda::Driver& driver) noexcept;
  [[nodiscard]] bool is_taken() const noexcept { return word_ != nullptr; }

  // Enqueues on our stream that copy `sequence` has ended.
  [[nodiscard]] cuda::Result write(const cuda::Driver& driver, cuda::Stream stream,
                                   std::uint64_t sequence) const noexcept;
  // Number of the last copy. REQUIRES: set before its word can be written.
  void set_last(std::uint64_t sequence) noexcept {
    last_.store(sequence, std::memory_order_release);  // PAIRS WITH last()
  }
  [[nodiscard]] std::uint64_t last() const noexcept {
    return last_.load(std::memory_order_acquire);
  }
  // REQUIRES: is_taken(). All copies up to this number have arrived, and their bytes are visible.
  [[nodiscard]] std::uint64_t landed() const noexcept;
  [[nodiscard]] bool has_landed(std::uint64_t sequence) const noexcept {
    return static_cast<std::int64_t>(landed() - sequence) >= 0;
  }

 private:
  // constant once taken
  std::uint32_t* word_ = nullptr;  // written by the device
  cuda::DevicePointer address_ = 0;
  cuda::DevicePointer counter_ = 0;  // only without stream memory operations
  // shared
  std::atomic<std::uint64_t> last_{0};
};

}  // namespace mld
