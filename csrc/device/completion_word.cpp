#include "device/completion_word.h"

#include "device/stager_mutation.h"

namespace mld {

using cuda::kSuccess;

cuda::Result CompletionWord::take(const cuda::Driver& driver, cuda::Stream stream) noexcept {
  void* word = nullptr;
  cuda::Result code = driver.host_allocate(&word, sizeof(std::uint32_t),
                                           cuda::kHostPortable | cuda::kHostDeviceMap);
  if (code != kSuccess) return code;
  word_ = static_cast<std::uint32_t*>(word);
  __atomic_store_n(word_, ~std::uint32_t{0}, __ATOMIC_RELEASE);  // number 0 is on its way
  code = driver.host_device_pointer(&address_, word, 0);
  if (code == kSuccess) code = write(driver, stream, 0);
  if (code == cuda::kNotSupported) {
    code = driver.memory_allocate(&counter_, sizeof(std::uint32_t));
    if (code != kSuccess) counter_ = 0;
    if (code == kSuccess) code = write(driver, stream, 0);
  }
  if (code != kSuccess) {
    // Half of it may be enqueued. Nothing else is on that stream, and the driver has failed.
    driver.stream_synchronize(stream);
    __atomic_store_n(word_, 0, __ATOMIC_RELEASE);
  }
  return code;
}

void CompletionWord::release(const cuda::Driver& driver) noexcept {
  if (counter_ != 0) driver.memory_free(counter_);
  if (word_ != nullptr) driver.host_free(word_);
  word_ = nullptr;
}

cuda::Result CompletionWord::write(const cuda::Driver& driver, cuda::Stream stream,
                                   std::uint64_t sequence) const noexcept {
  if (is_broken(StagerMutation::kNoWord)) return kSuccess;
  const auto value = static_cast<std::uint32_t>(sequence);
  if (counter_ == 0) return driver.stream_write_value(stream, address_, value, 0u);
  const auto set = [&] { return driver.memory_set(counter_, value, 1, stream); };
  const auto copy = [&] {
    return driver.copy_device_to_host(word_, counter_, sizeof value, stream);
  };
  const bool is_late = is_broken(StagerMutation::kCounterLate);
  const cuda::Result code = is_late ? copy() : set();
  if (code != kSuccess) return code;
  return is_late ? set() : copy();
}

std::uint64_t CompletionWord::landed() const noexcept {
  const std::uint64_t sent = last();
  if (is_broken(StagerMutation::kArrivedAtOnce)) return sent;
  // acquire PAIRS WITH the device's write, which comes after those of the copies up to it.
  const std::uint32_t seen = __atomic_load_n(word_, __ATOMIC_ACQUIRE);
  // The word holds the low half; the copies in flight are far fewer than 2^31.
  const auto ahead = static_cast<std::int32_t>(seen - static_cast<std::uint32_t>(sent));
  return sent + static_cast<std::uint64_t>(std::int64_t{ahead});
}

}  // namespace mld
