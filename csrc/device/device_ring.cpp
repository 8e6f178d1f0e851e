#include "device/device_ring.h"

#include <algorithm>

#include "device/stager_mutation.h"

namespace mld {
namespace {

using cuda::kSuccess;

constexpr std::size_t kAlignment = 512;
constexpr std::size_t kSmallestBytes = std::size_t{1} << 20;
constexpr std::size_t kFirstEvents = 64;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

cuda::Result DeviceRing::take_events(const cuda::Driver& driver) {
  return make_events(driver, kFirstEvents);
}

void DeviceRing::take_memory(const cuda::Driver& driver, std::size_t wanted_bytes) noexcept {
  std::size_t free_bytes = 0, total_bytes = 0;
  if (driver.memory_get_info(&free_bytes, &total_bytes) != kSuccess) return;
  std::size_t bytes = std::min(wanted_bytes, total_bytes / 100) / kAlignment * kAlignment;
  while (bytes != 0) {
    if (driver.memory_allocate(&memory_, bytes) == kSuccess) break;
    memory_ = 0;
    bytes = bytes / 2 < kSmallestBytes ? 0 : bytes / 2 / kAlignment * kAlignment;
  }
  bytes_ = bytes;
}

void DeviceRing::release(const cuda::Driver& driver) noexcept {
  for (const cuda::Event event : events_) driver.event_destroy(event);
  if (memory_ != 0) driver.memory_free(memory_);
}

void DeviceRing::retire(std::uint64_t landed) noexcept {
  while (flight_count_ != 0) {
    const Flight& oldest = flights_[first_flight_];
    if (!is_broken(StagerMutation::kReuseAtOnce) &&
        static_cast<std::int64_t>(landed - oldest.sequence) < 0)
      return;
    tail_ = oldest.end;
    first_flight_ = (first_flight_ + 1) % flights_.size();
    --flight_count_;
  }
}

cuda::Result DeviceRing::find_place(const cuda::Driver& driver, std::size_t bytes, Place* place) {
  if (flight_count_ == flights_.size()) {
    const cuda::Result code = make_events(driver, 2 * flights_.size());
    if (code != kSuccess) return code;
  }
  *place = {events_[(first_flight_ + flight_count_) % flights_.size()], 0, head_};
  const std::uint64_t need = aligned(bytes);
  if (need > bytes_) return kSuccess;
  const std::uint64_t offset = head_ % bytes_;
  const std::uint64_t padding = offset + need > bytes_ ? bytes_ - offset : 0;
  if (head_ + padding + need - tail_ > bytes_) return kSuccess;
  place->memory = memory_ + (head_ + padding) % bytes_;
  place->end = head_ + padding + need;
  return kSuccess;
}

void DeviceRing::add(const Place& place, std::uint64_t sequence) noexcept {
  flights_[(first_flight_ + flight_count_) % flights_.size()] = {sequence, place.end};
  ++flight_count_;
  head_ = place.end;
}

cuda::Result DeviceRing::make_events(const cuda::Driver& driver, std::size_t count) {
  // In order again, so that the new places lie behind the youngest flight.
  const auto first = static_cast<std::ptrdiff_t>(first_flight_);
  std::rotate(flights_.begin(), flights_.begin() + first, flights_.end());
  std::rotate(events_.begin(), events_.begin() + first, events_.end());
  first_flight_ = 0;
  events_.reserve(count);
  while (events_.size() < count) {
    cuda::Event event = nullptr;
    if (const auto code = driver.event_create(&event, cuda::kEventDisableTiming); code != kSuccess)
      return code;
    events_.push_back(event);
  }
  flights_.resize(count);
  return kSuccess;
}

}  // namespace mld
