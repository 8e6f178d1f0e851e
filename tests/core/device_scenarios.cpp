#include "device_scenarios.h"

#include <cstring>
#include <sstream>
#include <thread>

#include "support.h"

namespace device_scenarios {
namespace {

using mld::StageResult;
using support::Random;

constexpr std::size_t kRingBytes = std::size_t{16} << 10;

bool has_memory_operations = true;

std::string random_bytes(Random& random, std::size_t bytes) {
  std::string text(bytes, '\0');
  for (char& byte : text) byte = static_cast<char>(random.next());
  return text;
}

std::vector<mld::DevicePlace> places(int devices) {
  std::vector<mld::DevicePlace> all = {{0, nullptr}};  // the legacy stream: torch's default
  for (const int device : {0, devices - 1, devices - 1})
    all.push_back({device, FAKE(fake_cuda_stream)(device, 1)});
  return all;
}

// `copies` hooks; what the driver may answer is `is_fine`.
template <class IsFine>
void run_hooks(Rig& rig, Random& random, int devices, int copies, IsFine is_fine) {
  const auto where = places(devices);
  std::vector<std::unique_ptr<Tensor>> tensors;
  for (int i = 0; i < copies; ++i) {
    // Most tensors fit the device ring several times, some not at all.
    const std::size_t bytes = 1 + random.below(random.below(10) == 0 ? 20000 : 6000);
    tensors.push_back(
        std::make_unique<Tensor>(where[random.below(where.size())], random_bytes(random, bytes)));
    if (!is_fine(rig.stage(*tensors.back()))) rig.say("an unexpected answer of the stager");
    tensors.back()->overwrite(static_cast<unsigned char>(i));
    if (random.below(3) == 0) rig.check_arrived();
  }
}

Findings train_with(std::uint64_t seed, std::size_t device_ring_bytes, std::size_t memory_limit) {
  Random random(seed);
  const Machine machine(seed);
  if (memory_limit != 0) FAKE(fake_cuda_set_memory_limit)(memory_limit);
  Rig rig(device_ring_bytes);
  run_hooks(rig, random, 2, 24, [](StageResult result) { return result == StageResult::kStaged; });
  return rig.finish();
}

}  // namespace

void set_memory_operations(bool supported) { has_memory_operations = supported; }

Machine::Machine(std::uint64_t seed, int mode, int devices) {
  FAKE(fake_cuda_reset)(seed, devices, mode);
  FAKE(fake_cuda_set_memory_limit)(kMemoryBytes);
  FAKE(fake_cuda_set_memory_operations)(has_memory_operations ? 1 : 0);
  for (int device = devices - 1; device >= 0; --device) FAKE(fake_cuda_enter_device)(device);
}

Machine::~Machine() { FAKE(fake_cuda_reset)(0, 1, FAKE_CUDA_STEPPED); }

Rig::Rig(std::size_t device_ring_bytes)
    : stager_(std::make_unique<mld::DeviceStager>(arena_.data(), arena_.bytes(),
                                                  options(device_ring_bytes))) {}

StageResult Rig::stage(const Tensor& tensor) {
  std::byte* const to = arena_.data() + used_;
  used_ += (tensor.content.size() + 511) / 512 * 512;
  if (used_ > arena_.bytes()) std::abort();
  std::uint64_t sequence = 0;
  FAKE(fake_cuda_callee_begin)();
  StageResult result = StageResult::kUnavailable;
  {
    mld::StageSession session(*stager_, tensor.place);
    result = session.enter();
    if (result == StageResult::kStaged)
      result = session.stage(tensor.data(), to, tensor.content.size(), &sequence);
  }
  FAKE(fake_cuda_callee_end)();
  if (result == StageResult::kStaged)
    flights_.push_back({tensor.place.device, sequence, to, tensor.content});
  // A slot that was not published is somebody else's at once.
  else if (FAKE(fake_cuda_host_write)(to, tensor.content.size()) == 0)
    say("a slot was given up while the device writes to it");
  return result;
}

bool Rig::check_arrived() {
  std::erase_if(flights_, [&](const Flight& flight) {
    if (!stager_->has_arrived(flight.device, flight.sequence)) return false;
    if (FAKE(fake_cuda_host_read)(flight.to, flight.content.size()) == 0)
      say("read before the copy ended");
    if (std::memcmp(flight.to, flight.content.data(), flight.content.size()) != 0)
      say("wrong bytes");
    return true;
  });
  return flights_.empty();
}

Findings Rig::finish() {
  while (!check_arrived()) {
    if (FAKE(fake_cuda_step)(1) != 0) continue;
    if (check_arrived()) break;
    bool is_stuck = false;
    for (const Flight& flight : flights_) is_stuck |= !stager_->is_lost(flight.device);
    if (is_stuck) say("a copy never arrived");
    break;
  }
  FAKE(fake_cuda_run_until_idle)();
  Findings findings;
  findings.report = stager_->report();
  if (!stager_->shut_down(wrong_.empty() ? std::chrono::seconds(5) : std::chrono::seconds(0)))
    say("the end did not come");
  stager_.reset();
  FAKE(fake_cuda_check_leaks)();
  findings.wrong = wrong_;
  std::istringstream lines(FAKE(fake_cuda_violations)());
  for (std::string line; std::getline(lines, line);) {
    if (!may_wait_ || line.rfind("host-wait-in-callee:", 0) != 0) findings.broken += line + "\n";
  }
  return findings;
}

Findings train(std::uint64_t seed) { return train_with(seed, kRingBytes, 0); }

Findings train_without_device_ring(std::uint64_t seed) { return train_with(seed, 0, 0); }

Findings capture_elsewhere(std::uint64_t seed) {
  Random random(seed);
  const Machine machine(seed);
  void* const captured = FAKE(fake_cuda_stream)(0, 1);
  FAKE(fake_cuda_begin_capture)(captured);
  Rig rig(kRingBytes);
  std::thread hooks([&] {
    FAKE(fake_cuda_enter_device)(0);
    const Tensor tensor({0, FAKE(fake_cuda_stream)(0, 1)}, random_bytes(random, 3000));
    for (unsigned char i = 0; i < 6; ++i) {
      const Tensor next(tensor.place, random_bytes(random, 3000));
      if (rig.stage(next) != StageResult::kStaged) rig.say("refused beside a capture");
      next.overwrite(i);
    }
  });
  hooks.join();
  void* graph = nullptr;
  if (FAKE(fake_cuda_end_capture)(captured, &graph) != fake_cuda::kSuccess)
    rig.say("the capture was invalidated");
  return rig.finish();
}

Findings capture_here(std::uint64_t seed) {
  Random random(seed);
  const Machine machine(seed);
  Rig rig(kRingBytes);
  const Tensor tensor({0, FAKE(fake_cuda_stream)(0, 1)}, random_bytes(random, 3000));
  const bool set_up_before = seed % 2 == 0;
  if (set_up_before && rig.stage(tensor) != StageResult::kStaged) rig.say("not staged");
  FAKE(fake_cuda_begin_capture)(tensor.place.stream);
  if (rig.stage(tensor) != StageResult::kCapturing) rig.say("a capture was not noticed");
  void* graph = nullptr;
  if (FAKE(fake_cuda_end_capture)(tensor.place.stream, &graph) != fake_cuda::kSuccess)
    rig.say("the capture was invalidated");
  if (rig.stage(tensor) != StageResult::kStaged) rig.say("not staged after the capture");
  return rig.finish();
}

Findings fail_call(std::uint64_t seed, const char* function, std::uint64_t nth, int code,
                   bool sticky) {
  Random random(seed);
  const int devices = 2;
  const Machine machine(seed, FAKE_CUDA_INTERLEAVED, devices);
  Rig rig(kRingBytes);
  rig.allow_host_wait();
  FAKE(fake_cuda_fail)(function, nth, code, sticky ? 1 : 0);
  run_hooks(rig, random, devices, 12,
            [](StageResult result) { return result != StageResult::kCapturing; });
  return rig.finish();
}

const std::vector<const char*>& driver_functions() {
  static const std::vector<const char*> all = {"cuDeviceGet",
                                               "cuDevicePrimaryCtxRetain",
                                               "cuCtxGetCurrent",
                                               "cuCtxPushCurrent_v2",
                                               "cuThreadExchangeStreamCaptureMode",
                                               "cuStreamIsCapturing",
                                               "cuStreamCreate",
                                               "cuStreamWaitEvent",
                                               "cuStreamWriteValue32_v2",
                                               "cuEventCreate",
                                               "cuEventRecord",
                                               "cuMemGetInfo_v2",
                                               "cuMemAlloc_v2",
                                               "cuMemsetD32Async",
                                               "cuMemHostAlloc",
                                               "cuMemHostRegister_v2",
                                               "cuMemHostGetDevicePointer_v2",
                                               "cuMemcpyDtoDAsync_v2",
                                               "cuMemcpyDtoHAsync_v2"};
  return all;
}

}  // namespace device_scenarios
