// Which copies of a device have arrived: 4 bytes of pinned memory that the device sets to the
// number of each copy behind it, and the number of the last one that was enqueued. The copies end
// in the order of their numbers, so one word tells about all of them: no query, no callback.
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
  [[nodiscard]] cuda::Result take(const cuda::Driver& driver) noexcept;
  // REQUIRES: nothing that writes it is on its way.
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
  // shared
  std::atomic<std::uint64_t> last_{0};
};

}  // namespace mld
