// Where the snapshots of one device wait for our stream: device memory, taken once and used in a
// circle, and an event for each copy in flight. It enqueues nothing and waits for nothing.
//
// Thread safety: none; the mutex of its path protects it.
//
// INVARIANT: from add() until its copy has landed, a part of the memory and an event belong to that
//            copy alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/cuda_driver.h"

namespace mld {

class DeviceRing {
 public:
  struct Place {
    cuda::Event event = nullptr;
    cuda::DevicePointer memory = 0;  // 0: there is no room
    std::uint64_t end = 0;           // position behind it
  };

  [[nodiscard]] cuda::Result take_events(const cuda::Driver& driver);
  // Refused, it takes less, down to nothing; at most 1 % of the device.
  void take_memory(const cuda::Driver& driver, std::size_t wanted_bytes) noexcept;
  // REQUIRES: every copy has landed, or its context is lost.
  void release(const cuda::Driver& driver) noexcept;

  // Everything of copies up to number `landed` is free again.
  void retire(std::uint64_t landed) noexcept;
  // A place for a copy of `bytes`; makes more events when all are in flight. Not taken before
  // add().
  [[nodiscard]] cuda::Result find_place(const cuda::Driver& driver, std::size_t bytes,
                                        Place* place);
  void add(const Place& place, std::uint64_t sequence) noexcept;
  // The youngest copy will never be.
  void take_back() noexcept { --flight_count_; }

 private:
  struct Flight {
    std::uint64_t sequence;
    std::uint64_t end;  // tail_ once it has landed
  };

  [[nodiscard]] cuda::Result make_events(const cuda::Driver& driver, std::size_t count);

  // constant once taken
  cuda::DevicePointer memory_ = 0;
  std::size_t bytes_ = 0;
  // the rest
  std::vector<Flight> flights_;      // circular, oldest at first_flight_
  std::vector<cuda::Event> events_;  // that of the flight in the same place
  std::size_t first_flight_ = 0, flight_count_ = 0;
  std::uint64_t head_ = 0, tail_ = 0;  // positions in bytes, only grow
};

}  // namespace mld
