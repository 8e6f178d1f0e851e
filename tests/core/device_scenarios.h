// Programs that run the device stager on the fake driver, and what was found while they ran. Used
// twice: the sound stager must pass them all, and each broken one must be found by one of them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "device/device_stager.h"
#include "fake_cuda/fake_cuda_loader.h"
#include "ring/arena.h"

namespace device_scenarios {

struct Findings {
  std::string wrong;   // what went wrong in the host's eyes; empty: nothing
  std::string broken;  // the fake's violations
  mld::DeviceReport report;
  [[nodiscard]] bool none() const { return wrong.empty() && broken.empty(); }
};

// How machines complete copies from now on: with stream memory operations (as after the start), or
// without.
void set_memory_operations(bool supported);

// A machine with GPUs, as torch leaves it to us: initialised, every context made, device 0 current.
class Machine {
 public:
  static constexpr std::size_t kMemoryBytes = std::size_t{1} << 30;  // a device
  explicit Machine(std::uint64_t seed, int mode = FAKE_CUDA_INTERLEAVED, int devices = 2);
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
};

// A tensor on a stream, as a hook meets it; whatever happens to it afterwards, `content` is what
// the hook saw.
struct Tensor {
  Tensor(const mld::DevicePlace& tensor_place, std::string tensor_content)
      : place(tensor_place),
        content(std::move(tensor_content)),
        address(FAKE(fake_cuda_tensor)(place.device, content.data(), content.size())) {}
  [[nodiscard]] const std::byte* data() const {
    return reinterpret_cast<const std::byte*>(address);
  }
  // An in-place operation behind the hook; also what a caching allocator makes of a freed tensor.
  void overwrite(unsigned char value) const {
    FAKE(fake_cuda_overwrite)(place.stream, address, content.size(), value);
  }
  mld::DevicePlace place;
  std::string content;
  std::uint64_t address;
};

inline mld::DeviceOptions options(std::size_t ring_bytes) {
  return {MLD_FAKE_CUDA_LIBRARY, ring_bytes};
}

// A stager and slots that are used once each.
class Rig {
 public:
  explicit Rig(std::size_t device_ring_bytes);
  // As a hook: enter a session, stage; the tensor may be changed afterwards.
  mld::StageResult stage(const Tensor& tensor);
  // Compares what has arrived; false when something has not.
  bool check_arrived();
  // Lets the device run until all has arrived or is lost, gives everything back, looks for leaks.
  Findings finish();
  // Where the driver fails, the stager may wait once for a copy that it has enqueued in part.
  void allow_host_wait() { may_wait_ = true; }
  [[nodiscard]] mld::DeviceStager& stager() { return *stager_; }
  void say(const std::string& what) {
    if (wrong_.empty()) wrong_ = what;
  }

 private:
  struct Flight {
    int device;
    std::uint64_t sequence;
    std::byte* to;
    std::string content;
  };
  static constexpr std::size_t kArenaBytes = std::size_t{1} << 20;

  mld::Arena arena_{kArenaBytes};
  std::unique_ptr<mld::DeviceStager> stager_;
  std::size_t used_ = 0;
  std::vector<Flight> flights_;
  std::string wrong_;
  bool may_wait_ = false;
};

// Layers on two streams of two devices, in-place operations behind each hook, a device ring that
// wraps and is full at times.
Findings train(std::uint64_t seed);
// The same without a device ring.
Findings train_without_device_ring(std::uint64_t seed);
// Another thread captures a graph, in mode "global", during set-up and copies.
Findings capture_elsewhere(std::uint64_t seed);
// The hook's own stream is being captured.
Findings capture_here(std::uint64_t seed);
// The `nth` call of `function` fails, in the middle of training.
Findings fail_call(std::uint64_t seed, const char* function, std::uint64_t nth, int code,
                   bool sticky);

// Every function that a failing call is tried for.
const std::vector<const char*>& driver_functions();

}  // namespace device_scenarios
