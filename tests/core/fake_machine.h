// What the tests of the fake CUDA driver share: a machine as torch leaves it to us, short names for
// its objects, and the smallest program of the shape that the core's device path has.
#pragma once

#include <algorithm>
#include <atomic>
#include <set>
#include <string>

#include "check.h"
#include "fake_cuda/fake_cuda_loader.h"
#include "support.h"

namespace fake_machine {

using namespace fake_cuda;
using support::pattern;

constexpr std::size_t kBytes = 64;

inline std::set<std::string> broken_rules() {
  std::set<std::string> broken;
  int is_warning = 0;
  for (std::size_t i = 0; const char* id = FAKE(fake_cuda_rule)(i, &is_warning); ++i) {
    if (FAKE(fake_cuda_violation_count)(id) > 0) broken.insert(id);
  }
  return broken;
}

// A machine with GPUs, as torch leaves it to us: initialised, device 0 current. Ends the worker.
struct Machine {
  explicit Machine(std::uint64_t seed = 1, int mode = FAKE_CUDA_STEPPED, int devices = 1) {
    FAKE(fake_cuda_reset)(seed, devices, mode);
    FAKE(fake_cuda_enter_device)(0);
    compute = static_cast<CUstream>(FAKE(fake_cuda_stream)(0, 1));
    content = pattern(seed, kBytes);
    tensor = FAKE(fake_cuda_tensor)(0, content.data(), kBytes);
  }
  ~Machine() { FAKE(fake_cuda_reset)(0, 1, FAKE_CUDA_STEPPED); }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  CUstream compute;
  std::string content;
  CUdeviceptr tensor;
};

inline CUstream new_stream() {
  CUstream made = nullptr;
  CHECK_EQ(CUDA(cuStreamCreate)(&made, kStreamNonBlocking), kSuccess);
  return made;
}

inline CUevent new_event() {
  CUevent made = nullptr;
  CHECK_EQ(CUDA(cuEventCreate)(&made, 2), kSuccess);
  return made;
}

inline CUdeviceptr new_memory(std::size_t bytes = kBytes) {
  CUdeviceptr made = 0;
  CHECK_EQ(CUDA(cuMemAlloc_v2)(&made, bytes), kSuccess);
  return made;
}

// Page-locked by registration; never unregistered: a reset forgets it.
struct Pinned {
  explicit Pinned(unsigned flags = kRegisterPortable | kRegisterDeviceMap) {
    CHECK_EQ(CUDA(cuMemHostRegister_v2)(bytes, sizeof bytes, flags), kSuccess);
    CHECK_EQ(CUDA(cuMemHostGetDevicePointer_v2)(&device, bytes, 0), kSuccess);
  }
  [[nodiscard]] std::string text() const {
    return {reinterpret_cast<const char*>(bytes), sizeof bytes};
  }
  alignas(4) unsigned char bytes[kBytes] = {};
  CUdeviceptr device = 0;
};

inline int overwrite(const Machine& machine, CUstream stream, unsigned char value) {
  return FAKE(fake_cuda_overwrite)(stream, machine.tensor, kBytes, value);
}

inline std::string device_text(CUdeviceptr address) {
  return {static_cast<const char*>(FAKE(fake_cuda_bytes_at)(address)), kBytes};
}

inline void relax() {
  int mode = kRelaxed;
  CUDA(cuThreadExchangeStreamCaptureMode)(&mode);
}

// The shape of the core's device path: snapshot on the compute stream, an event, a copy on a stream
// of our own, a completion word; and each way to get it wrong.
enum class Flaw { kNone, kNoWait, kNoRecord, kNoReuseWait, kPublishedEarly };

class Snapshots {
 public:
  Snapshots(const Machine& machine, Flaw flaw) : machine_(machine), flaw_(flaw) {
    std::fill(std::begin(words_), std::end(words_), 0);
    CUDA(cuMemHostRegister_v2)(words_, sizeof words_, kRegisterPortable | kRegisterDeviceMap);
    CUDA(cuMemHostGetDevicePointer_v2)(&words_device_, words_, 0);
    CUDA(cuMemHostRegister_v2)(host_, sizeof host_, kRegisterPortable);
  }

  void take(std::uint32_t number) {
    const Slot& slot = slots_[number % 2];
    if (number >= 2 && flaw_ != Flaw::kNoReuseWait) {
      CUDA(cuStreamWaitEvent)(machine_.compute, slot.copied, 0);
    }
    CUDA(cuMemcpyDtoDAsync_v2)(slot.memory, machine_.tensor, kBytes, machine_.compute);
    if (flaw_ != Flaw::kNoRecord) CUDA(cuEventRecord)(slot.taken, machine_.compute);
    if (flaw_ != Flaw::kNoWait) CUDA(cuStreamWaitEvent)(side_, slot.taken, 0);
    CUDA(cuMemcpyDtoHAsync_v2)(host_[number], slot.memory, kBytes, side_);
    CUDA(cuEventRecord)(slot.copied, side_);
    CUDA(cuStreamWriteValue32_v2)(side_, words_device_ + 4 * number, number + 1, 0);
  }

  // False: the copy never ends.
  bool wait(std::uint32_t number) {
    std::atomic_ref word(words_[number]);
    while (flaw_ != Flaw::kPublishedEarly && word.load(std::memory_order_acquire) != number + 1) {
      if (FAKE(fake_cuda_step)(1) == 0) return false;
    }
    return true;
  }
  std::string read(std::uint32_t number) {
    FAKE(fake_cuda_host_read)(host_[number], kBytes);
    return {reinterpret_cast<const char*>(host_[number]), kBytes};
  }

  static constexpr std::uint32_t kCount = 5;

 private:
  struct Slot {
    CUdeviceptr memory = new_memory();
    CUevent taken = new_event();
    CUevent copied = new_event();
  };

  const Machine& machine_;
  const Flaw flaw_;
  CUstream side_ = new_stream();
  const Slot slots_[2];
  CUdeviceptr words_device_ = 0;
  std::uint32_t words_[kCount];
  unsigned char host_[kCount][kBytes];
};

}  // namespace fake_machine
