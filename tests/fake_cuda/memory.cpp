#include "fake_cuda/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

namespace fake_cuda {
namespace {

constexpr int kFreshByte = 0xCD;  // what nobody wrote looks like nothing that anybody wrote

std::uintptr_t reserve(std::size_t bytes, int protection) {
  void* address =
      mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return address == MAP_FAILED ? 0 : reinterpret_cast<std::uintptr_t>(address);
}

}  // namespace

Range Allocation::canonical(std::uintptr_t device_address, std::size_t length) const {
  const std::uintptr_t base =
      kind == MemoryKind::kDevice ? device.begin : reinterpret_cast<std::uintptr_t>(host);
  const std::uintptr_t begin = base + (device_address - device.begin);
  return {begin, begin + length};
}

Allocation* Memory::add(Allocation allocation, std::size_t bytes) {
  if (allocation.device.begin == 0) return nullptr;
  allocation.device.end = allocation.device.begin + bytes;
  const std::uintptr_t key = allocation.device.begin;
  return &(allocations_[key] = std::move(allocation));
}

Allocation* Memory::allocate_device(Context* context, std::size_t bytes, bool by_api) {
  if (used_bytes(context) + bytes > limit_bytes_) return nullptr;
  Allocation made;
  made.device.begin = reserve(bytes, PROT_NONE);
  made.backing.reset(new std::byte[bytes]);
  made.host = made.backing.get();
  std::fill_n(made.host, bytes, std::byte{kFreshByte});
  made.context = context;
  made.by_api = by_api;
  return add(std::move(made), bytes);
}

Allocation* Memory::allocate_host(Context* context, std::size_t bytes, unsigned flags) {
  Allocation made;
  made.kind = MemoryKind::kHostAllocated;
  made.device.begin = reserve(bytes, PROT_READ | PROT_WRITE);  // one address for both sides
  made.host = reinterpret_cast<std::byte*>(made.device.begin);
  made.context = context;
  made.flags = flags;
  return add(std::move(made), bytes);
}

Allocation* Memory::register_host(Context* context, void* memory, std::size_t bytes,
                                  unsigned flags) {
  Allocation made;
  made.kind = MemoryKind::kHostRegistered;
  made.device.begin = reserve(bytes, PROT_NONE);
  made.host = static_cast<std::byte*>(memory);
  made.context = context;
  made.flags = flags;
  return add(std::move(made), bytes);
}

void Memory::release(Allocation& allocation) {
  allocation.alive = false;
  allocation.backing.reset();
  // The address stays reserved; host memory becomes untouchable, as if it had been unmapped.
  if (allocation.kind == MemoryKind::kHostAllocated) {
    mprotect(allocation.host, allocation.bytes(), PROT_NONE);
  }
}

Allocation* Memory::at_device(std::uintptr_t address, std::size_t bytes) {
  auto after = allocations_.upper_bound(address);
  if (after == allocations_.begin()) return nullptr;
  Allocation& found = std::prev(after)->second;
  const std::size_t offset = address - found.device.begin;
  return offset <= found.bytes() && bytes <= found.bytes() - offset ? &found : nullptr;
}

Allocation* Memory::at_host(const void* memory, std::size_t bytes) {
  Allocation* const found = overlapping_host(memory, bytes);
  if (found == nullptr) return nullptr;
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const Range whole = found->host_range();
  return whole.begin <= begin && begin + bytes <= whole.end ? found : nullptr;
}

Allocation* Memory::overlapping_host(const void* memory, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  for (auto& [address, allocation] : allocations_) {
    if (!allocation.alive || allocation.kind == MemoryKind::kDevice) continue;
    if (allocation.host_range().overlaps({begin, begin + std::max<std::size_t>(bytes, 1)})) {
      return &allocation;
    }
  }
  return nullptr;
}

std::size_t Memory::used_bytes(const Context* context) const {
  return total_bytes([context](const Allocation& allocation) {
    return allocation.kind == MemoryKind::kDevice && allocation.context == context;
  });
}

void Memory::clear() {
  for (auto& [address, allocation] : allocations_) {
    munmap(reinterpret_cast<void*>(address), allocation.bytes());
  }
  allocations_.clear();
  limit_bytes_ = kDefaultLimitBytes;
}

}  // namespace fake_cuda
