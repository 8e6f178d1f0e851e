// Device memory and page-locked host memory. A device address is reserved and never mapped, so that
// a program that touches device memory from the host dies; its bytes lie elsewhere. Addresses are
// not given out twice before `clear`.
//
// Registered host memory gets a device address of its own (the manual allows it, and warns of it at
// cuPointerGetAttribute), so that a host pointer passed for a device address is found out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "fake_cuda/accesses.h"

namespace fake_cuda {

struct Context;

enum class MemoryKind { kDevice, kHostAllocated, kHostRegistered };

struct Allocation {
  MemoryKind kind = MemoryKind::kDevice;
  Range device;               // as the device addresses it
  std::byte* host = nullptr;  // where the bytes are; of host memory its host address
  std::unique_ptr<std::byte[]> backing;
  Context* context = nullptr;
  unsigned flags = 0;
  bool by_api = true;  // else by the embedding program, whose memory is no leak of ours
  bool alive = true;

  [[nodiscard]] std::size_t bytes() const { return device.end - device.begin; }
  [[nodiscard]] Range host_range() const {
    const auto begin = reinterpret_cast<std::uintptr_t>(host);
    return {begin, begin + bytes()};
  }
  // Accesses through either address meet in one range: the host's, if the host has one.
  [[nodiscard]] Range canonical(std::uintptr_t device_address, std::size_t length) const;
};

class Memory {
 public:
  Memory() = default;
  ~Memory() { clear(); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // nullptr: no more than `limit_bytes()` for each device.
  Allocation* allocate_device(Context* context, std::size_t bytes, bool by_api);
  Allocation* allocate_host(Context* context, std::size_t bytes, unsigned flags);
  Allocation* register_host(Context* context, void* memory, std::size_t bytes, unsigned flags);
  void release(Allocation& allocation);

  // The allocation, dead or alive, that holds all of `bytes` from this device address; or nullptr.
  Allocation* at_device(std::uintptr_t address, std::size_t bytes);
  // Live page-locked memory that holds these host bytes.
  Allocation* at_host(const void* memory, std::size_t bytes);
  Allocation* overlapping_host(const void* memory, std::size_t bytes);

  // Of live memory that `counts` says yes to.
  template <class Predicate>
  [[nodiscard]] std::size_t total_bytes(Predicate counts) const {
    std::size_t total = 0;
    for (const auto& [address, allocation] : allocations_) {
      if (allocation.alive && counts(allocation)) total += allocation.bytes();
    }
    return total;
  }
  [[nodiscard]] std::size_t used_bytes(const Context* context) const;
  [[nodiscard]] std::size_t limit_bytes() const { return limit_bytes_; }
  void set_limit_bytes(std::size_t bytes) { limit_bytes_ = bytes; }
  [[nodiscard]] const std::map<std::uintptr_t, Allocation>& all() const { return allocations_; }
  void clear();

 private:
  Allocation* add(Allocation allocation, std::size_t bytes);

  std::map<std::uintptr_t, Allocation> allocations_;  // by device address
  std::size_t limit_bytes_ = kDefaultLimitBytes;
  static constexpr std::size_t kDefaultLimitBytes = std::size_t{1} << 30;
};

}  // namespace fake_cuda
