#include "device/device_notes.h"

#include <exception>
#include <utility>

namespace mld {

void DeviceNotes::add(const std::string& text) noexcept try {
  const std::lock_guard<std::mutex> lock(mutex_);
  text_ += (text_.empty() ? "" : "; ") + text;
  is_new_.store(true, std::memory_order_relaxed);  // relaxed: the mutex orders
} catch (const std::exception&) {                  // no memory for words
}

void DeviceNotes::add_error(const std::string& name) noexcept try {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++errors_;
  last_error_ = name;
} catch (const std::exception&) {  // likewise
}

std::optional<std::string> DeviceNotes::take() {
  // relaxed: a hook's glance; the mutex orders.
  if (!is_new_.load(std::memory_order_relaxed)) return std::nullopt;
  const std::lock_guard<std::mutex> lock(mutex_);
  is_new_.store(false, std::memory_order_relaxed);
  return std::exchange(text_, {});
}

std::uint64_t DeviceNotes::errors() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return errors_;
}

std::string DeviceNotes::last_error() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return last_error_;
}

}  // namespace mld
