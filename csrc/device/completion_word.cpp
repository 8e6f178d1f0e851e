#include "device/completion_word.h"

#include "device/stager_mutation.h"

namespace mld {

using cuda::kSuccess;

cuda::Result CompletionWord::take(const cuda::Driver& driver) noexcept {
  void* word = nullptr;
  const cuda::Result code = driver.host_allocate(&word, sizeof(std::uint32_t),
                                                 cuda::kHostPortable | cuda::kHostDeviceMap);
  if (code != kSuccess) return code;
  word_ = static_cast<std::uint32_t*>(word);
  __atomic_store_n(word_, 0, __ATOMIC_RELEASE);
  return driver.host_device_pointer(&address_, word, 0);
}

void CompletionWord::release(const cuda::Driver& driver) noexcept {
  if (word_ != nullptr) driver.host_free(word_);
  word_ = nullptr;
}

cuda::Result CompletionWord::write(const cuda::Driver& driver, cuda::Stream stream,
                                   std::uint64_t sequence) const noexcept {
  if (is_broken(StagerMutation::kNoWord)) return kSuccess;
  return driver.stream_write_value(stream, address_, static_cast<std::uint32_t>(sequence), 0u);
}

std::uint64_t CompletionWord::landed() const noexcept {
  const std::uint64_t sent = last();
  if (is_broken(StagerMutation::kArrivedAtOnce)) return sent;
  // acquire PAIRS WITH the device's write, which its driver fences behind the copy's: the bytes of
  // all copies up to it are visible.
  const std::uint32_t seen = __atomic_load_n(word_, __ATOMIC_ACQUIRE);
  // The word holds the low half; the copies in flight are far fewer than 2^31.
  const auto ahead = static_cast<std::int32_t>(seen - static_cast<std::uint32_t>(sent));
  return sent + static_cast<std::uint64_t>(std::int64_t{ahead});
}

}  // namespace mld
