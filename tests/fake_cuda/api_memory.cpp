// The driver API: memory, copies, completion words, host functions.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "fake_cuda/call.h"

namespace fake_cuda {
namespace {

// One end of a copy. Allocations are never erased before a reset, so their addresses hold.
struct Place {
  Allocation* allocation = nullptr;  // nullptr: pageable host memory
  std::byte* bytes = nullptr;
  Range range;

  // When the copy executes; nullptr: gone since it was enqueued.
  [[nodiscard]] std::byte* at_execution(const char* name) const {
    if (allocation == nullptr || allocation->alive) return bytes;
    if (allocation->kind == MemoryKind::kDevice) {
      driver().report(Rule::kUseAfterFree, std::string(name) + " executes on freed memory");
    }  // of host memory the release itself was reported
    return nullptr;
  }
};

// Reports an address that is none, and returns nothing.
std::optional<Place> device_place(Call& call, CUdeviceptr address, std::size_t bytes,
                                  const char* name) {
  Allocation* const found = call.driver.memory.at_device(address, bytes);
  if (found == nullptr || !found->alive) {
    call.driver.report(found == nullptr ? Rule::kBadAddress : Rule::kUseAfterFree,
                       std::string(name) + " at " + hex(address));
    return std::nullopt;
  }
  return Place{found, found->host + (address - found->device.begin),
               found->canonical(address, bytes)};
}

// Registered memory is page-locked for its own context only, unless PORTABLE (cuda.h 9473).
Place host_place(Call& call, const void* memory, std::size_t bytes, const Stream& stream) {
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  Allocation* found = call.driver.memory.at_host(memory, bytes);
  const bool is_pinned = found != nullptr && (found->kind == MemoryKind::kHostAllocated ||
                                              (found->flags & kRegisterPortable) != 0 ||
                                              found->context == stream.context);
  return {is_pinned ? found : nullptr,
          static_cast<std::byte*>(const_cast<void*>(memory)),
          {begin, begin + bytes}};
}

// A word is stored as one that another thread polls.
void copy_bytes(std::byte* to, const std::byte* from, std::size_t bytes) {
  if (bytes == sizeof(std::uint32_t) && reinterpret_cast<std::uintptr_t>(to) % bytes == 0) {
    std::uint32_t value = 0;
    std::memcpy(&value, from, bytes);
    // PAIRS WITH: the acquire load of whoever polls the word.
    std::atomic_ref(*reinterpret_cast<std::uint32_t*>(to)).store(value, std::memory_order_release);
  } else {
    std::memmove(to, from, bytes);
  }
}

Operation copy(const char* name, CopyKind kind, const Place& to, const Place& from,
               std::size_t bytes) {
  Operation operation;
  operation.name = name;
  operation.accesses = {{from.range, false}, {to.range, true}};
  operation.effect = [=] {
    std::byte* const target = to.at_execution(name);
    const std::byte* const source = from.at_execution(name);
    if (target == nullptr || source == nullptr) return;
    copy_bytes(target, source, bytes);
    driver().copied_bytes[static_cast<std::size_t>(kind)] += bytes;
  };
  const bool may_be_word = kind == CopyKind::kDeviceToHost && bytes <= sizeof(std::uint64_t);
  operation.word = may_be_word ? to.range.begin : 0;
  return operation;
}

// "dstDevice must be aligned" to the unit (cuMemsetD32Async, Driver API, Memory Management).
template <class Unit>
CUresult set_memory(Call& call, const char* name, CUdeviceptr to, Unit value, std::size_t count,
                    CUstream stream) {
  Stream* const queue = call.driver.stream(stream, call.context);
  if (queue == nullptr) return kInvalidHandle;
  const std::size_t bytes = count * sizeof(Unit);
  const auto target = device_place(call, to, bytes, name);
  if (!target || to % sizeof(Unit) != 0) return kInvalidValue;
  Operation operation;
  operation.name = name;
  operation.accesses = {{target->range, true}};
  operation.effect = [=, place = *target] {
    std::byte* const memory = place.at_execution(name);
    if (memory == nullptr) return;
    for (std::size_t i = 0; i < count; ++i)
      std::memcpy(memory + i * sizeof(Unit), &value, sizeof(Unit));
    driver().copied_bytes[static_cast<std::size_t>(CopyKind::kSet)] += bytes;
  };
  return call.driver.submit(*queue, std::move(operation), true);
}

}  // namespace

FAKE_CUDA_EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* address, std::size_t bytes) {
  return run_call(__func__, kContext | kUnsafe, [&](Call& call) -> CUresult {
    if (bytes == 0) return kInvalidValue;
    const Allocation* const made = call.driver.memory.allocate_device(call.context, bytes, true);
    if (made == nullptr) return kOutOfMemory;
    *address = made->device.begin;
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuMemFree_v2(CUdeviceptr address) {
  return run_call(__func__, kContext | kUnsafe | kHostWaits, [&](Call& call) -> CUresult {
    if (address == 0) return kSuccess;
    const auto place = device_place(call, address, 1, "cuMemFree_v2");
    if (!place || place->allocation->device.begin != address) return kInvalidValue;
    call.driver.release(*place->allocation, "cuMemFree_v2");
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuMemGetInfo_v2(std::size_t* free_bytes, std::size_t* total_bytes) {
  return run_call(__func__, kContext, [&](Call& call) -> CUresult {
    *total_bytes = call.driver.memory.limit_bytes();
    *free_bytes =
        *total_bytes - std::min(*total_bytes, call.driver.memory.used_bytes(call.context));
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuMemHostAlloc(void** memory, std::size_t bytes, unsigned flags) {
  return run_call(__func__, kContext | kUnsafe, [&](Call& call) -> CUresult {
    if (bytes == 0 || flags > 7) return kInvalidValue;
    const Allocation* const made = call.driver.memory.allocate_host(call.context, bytes, flags);
    if (made == nullptr) return kOutOfMemory;
    *memory = made->host;
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuMemFreeHost(void* memory) {
  return run_call(__func__, kContext | kUnsafe | kHostWaits, [&](Call& call) -> CUresult {
    Allocation* const found = call.driver.memory.at_host(memory, 1);
    if (found == nullptr || found->kind != MemoryKind::kHostAllocated || found->host != memory) {
      return kInvalidValue;
    }
    call.driver.release(*found, "cuMemFreeHost");
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuMemHostRegister_v2(void* memory, std::size_t bytes, unsigned flags) {
  return run_call(__func__, kContext | kUnsafe, [&](Call& call) -> CUresult {
    if (memory == nullptr || bytes == 0 || flags > 15) return kInvalidValue;
    if (call.driver.memory.overlapping_host(memory, bytes) != nullptr) return kAlreadyRegistered;
    return call.driver.memory.register_host(call.context, memory, bytes, flags) == nullptr
               ? kOutOfMemory
               : kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuMemHostUnregister(void* memory) {
  return run_call(__func__, kContext | kUnsafe | kHostWaits, [&](Call& call) -> CUresult {
    Allocation* const found = call.driver.memory.at_host(memory, 1);
    if (found == nullptr || found->kind != MemoryKind::kHostRegistered || found->host != memory) {
      return kNotRegistered;
    }
    call.driver.release(*found, "cuMemHostUnregister");
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* memory,
                                                       unsigned flags) {
  return run_call(__func__, kContext, [&](Call& call) -> CUresult {
    const Allocation* const found = call.driver.memory.at_host(memory, 1);
    if (found == nullptr || flags != 0) return kInvalidValue;
    *address = found->device.begin +
               static_cast<std::size_t>(static_cast<std::byte*>(memory) - found->host);
    return kSuccess;
  });
}

// Attributes by number: cuda.h 901-912.
FAKE_CUDA_EXPORT CUresult cuPointerGetAttribute(void* value, int attribute, CUdeviceptr address) {
  return run_call(__func__, kContext, [&](Call& call) -> CUresult {
    const Allocation* found = call.driver.memory.at_device(address, 1);
    if (found == nullptr) {
      found = call.driver.memory.at_host(reinterpret_cast<const void*>(address), 1);
    }
    if (found == nullptr || !found->alive) return kInvalidValue;
    const bool is_device = found->kind == MemoryKind::kDevice;
    switch (attribute) {
      case 1:
        *static_cast<std::uintptr_t*>(value) =
            call.driver.context_handles.handle_of(found->context);
        return kSuccess;
      case 2:
        *static_cast<unsigned*>(value) = is_device ? 2 : 1;
        return kSuccess;
      case 9:
        *static_cast<int*>(value) = found->context->device;
        return kSuccess;
      case 11:
        *static_cast<CUdeviceptr*>(value) = found->device.begin;
        return kSuccess;
      case 12:
        *static_cast<std::size_t*>(value) = found->bytes();
        return kSuccess;
      default:
        return kNotSupported;
    }
  });
}

FAKE_CUDA_EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, std::size_t bytes,
                                               CUstream stream) {
  constexpr const char* kName = "cuMemcpyDtoDAsync_v2";
  return run_call(kName, kContext, [&](Call& call) -> CUresult {
    Stream* const queue = call.driver.stream(stream, call.context);
    if (queue == nullptr) return kInvalidHandle;
    const auto target = device_place(call, to, bytes, kName);
    const auto source = device_place(call, from, bytes, kName);
    if (!target || !source) return kInvalidValue;
    return call.driver.submit(
        *queue, copy(kName, CopyKind::kDeviceToDevice, *target, *source, bytes), true);
  });
}

FAKE_CUDA_EXPORT CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, std::size_t bytes,
                                               CUstream stream) {
  constexpr const char* kName = "cuMemcpyDtoHAsync_v2";
  return run_call(kName, kContext, [&](Call& call) -> CUresult {
    Stream* const queue = call.driver.stream(stream, call.context);
    if (queue == nullptr) return kInvalidHandle;
    const auto source = device_place(call, from, bytes, kName);
    if (!source) return kInvalidValue;
    const Place target = host_place(call, to, bytes, *queue);
    const CUresult result = call.driver.submit(
        *queue, copy(kName, CopyKind::kDeviceToHost, target, *source, bytes), true);
    if (result != kSuccess || target.allocation != nullptr) return result;
    // "The function will return only once the copy has completed."
    call.driver.report(Rule::kPageableCopy, std::string(kName) + " to " + hex(target.range.begin));
    if (call.thread.callee) call.driver.report(Rule::kHostWaitInCallee, kName);
    const VectorClock all = queue->clock;
    return queue->capture != nullptr ? result : call.driver.scheduler.wait_for(all, call.lock);
  });
}

FAKE_CUDA_EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, std::size_t bytes,
                                               CUstream stream) {
  constexpr const char* kName = "cuMemcpyHtoDAsync_v2";
  return run_call(kName, kContext, [&](Call& call) -> CUresult {
    Stream* const queue = call.driver.stream(stream, call.context);
    if (queue == nullptr) return kInvalidHandle;
    const auto target = device_place(call, to, bytes, kName);
    if (!target) return kInvalidValue;
    Place source = host_place(call, from, bytes, *queue);
    std::shared_ptr<std::vector<std::byte>> staged;
    if (source.allocation == nullptr) {
      call.driver.report(Rule::kPageableCopy,
                         std::string(kName) + " from " + hex(source.range.begin));
      staged = std::make_shared<std::vector<std::byte>>(source.bytes, source.bytes + bytes);
      const auto begin = reinterpret_cast<std::uintptr_t>(staged->data());
      source = {nullptr, staged->data(), {begin, begin + bytes}};
    }
    Operation operation = copy(kName, CopyKind::kHostToDevice, *target, source, bytes);
    if (staged != nullptr) {
      operation.accesses.erase(operation.accesses.begin());  // nobody else knows the staging
      operation.effect = [staged, run = std::move(operation.effect)] { run(); };
    }
    return call.driver.submit(*queue, std::move(operation), true);
  });
}

FAKE_CUDA_EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, std::size_t bytes,
                                          CUstream stream) {
  constexpr const char* kName = "cuMemsetD8Async";
  return run_call(kName, kContext, [&](Call& call) -> CUresult {
    return set_memory<unsigned char>(call, kName, to, value, bytes, stream);
  });
}

FAKE_CUDA_EXPORT CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, std::size_t count,
                                           CUstream stream) {
  constexpr const char* kName = "cuMemsetD32Async";
  return run_call(kName, kContext, [&](Call& call) -> CUresult {
    return set_memory<std::uint32_t>(call, kName, to, value, count, stream);
  });
}

// Fenced: everything before it in its stream is visible before the word is (cuda.h 509-515).
FAKE_CUDA_EXPORT CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr to,
                                                  std::uint32_t value, unsigned flags) {
  constexpr const char* kName = "cuStreamWriteValue32_v2";
  return run_call(kName, kContext, [&](Call& call) -> CUresult {
    if (!call.driver.has_memory_operations) return kNotSupported;
    Stream* const queue = call.driver.stream(stream, call.context);
    if (queue == nullptr) return kInvalidHandle;
    const auto target = device_place(call, to, sizeof value, kName);
    if (!target || flags != 0 || to % sizeof value != 0) return kInvalidValue;
    Operation operation;
    operation.name = kName;
    operation.accesses = {{target->range, true}};
    operation.word = target->range.begin;
    operation.effect = [=, place = *target] {
      std::byte* const memory = place.at_execution(kName);
      if (memory == nullptr) return;
      copy_bytes(memory, reinterpret_cast<const std::byte*>(&value), sizeof value);
      driver().copied_bytes[static_cast<std::size_t>(CopyKind::kWord)] += sizeof value;
    };
    return call.driver.submit(*queue, std::move(operation), true);
  });
}

FAKE_CUDA_EXPORT CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* user) {
  return run_call(__func__, kContext, [&](Call& call) -> CUresult {
    Stream* const queue = call.driver.stream(stream, call.context);
    if (queue == nullptr) return kInvalidHandle;
    if (function == nullptr) return kInvalidValue;
    Operation operation;
    operation.name = "cuLaunchHostFunc";
    operation.runs_unlocked = operation.is_host_function = true;
    operation.effect = [=] { function(user); };
    return call.driver.submit(*queue, std::move(operation), true);
  });
}

}  // namespace fake_cuda
