#include "device/device_stager.h"

#include <thread>
#include <utility>

#include "clock.h"
#include "device/device_session.h"
#include "device/stager_mutation.h"

namespace mld {

#ifdef MLD_STAGER_MUTATIONS
StagerMutation stager_mutation = StagerMutation::kNone;
#endif

namespace {

using cuda::kSuccess;
using State = DevicePath::State;

constexpr auto kPoll = std::chrono::microseconds(200);

// What a path that has ended answers.
StageResult refusal(const DevicePath& path) noexcept {
  return path.is_lost() ? StageResult::kLost : StageResult::kUnavailable;
}

}  // namespace

DeviceStager::DeviceStager(std::byte* arena, std::size_t arena_bytes, DeviceOptions options)
    : arena_(arena), arena_bytes_(arena_bytes), options_(std::move(options)) {}

DeviceStager::~DeviceStager() {
  for (auto& slot : paths_) delete slot.load(std::memory_order_acquire);
}

DevicePath* DeviceStager::find(int device) const noexcept {
  if (device < 0 || device >= kMaxDevices) return nullptr;
  return paths_[static_cast<std::size_t>(device)].load(std::memory_order_acquire);
}

StageResult DeviceStager::open(const DevicePlace& place) noexcept {
  if (generation_ != process_generation() || place.device < 0 || place.device >= kMaxDevices ||
      unavailable_.load(std::memory_order_relaxed))
    return StageResult::kUnavailable;
  DevicePath* path = find(place.device);
  try {
    if (path == nullptr) path = make_path(place.device);
  } catch (const std::exception&) {  // no memory
    return StageResult::kUnavailable;
  }
  if (path == nullptr) return StageResult::kUnavailable;
  if (path->state() >= State::kClosed) return refusal(*path);
  const DeviceSession session(*driver_, path->context());
  bool capturing = false;
  cuda::Result code = session.code();
  if (code == kSuccess)
    code = session.ask_capturing(static_cast<cuda::Stream>(place.stream), &capturing);
  if (code != kSuccess) {
    path->close(code, "asking for a graph capture");
    return refusal(*path);
  }
  if (capturing) return StageResult::kCapturing;
  return path->state() == State::kOpen ? StageResult::kStaged : set_up(*path);
}

const cuda::Driver* DeviceStager::load_driver() {
  if (driver_ != nullptr || unavailable_.load(std::memory_order_relaxed)) return driver_.get();
  std::string why;
  driver_ = cuda::Driver::load(options_.library, &why);
  if (driver_ == nullptr) {
    unavailable_.store(true, std::memory_order_relaxed);
    notes_.add("CUDA tensors are copied synchronously: " + why);
  }
  return driver_.get();
}

// Null when there is no driver.
DevicePath* DeviceStager::make_path(int device) {
  const std::lock_guard<std::mutex> lock(setup_mutex_);
  if (DevicePath* known = find(device)) return known;
  const cuda::Driver* driver = load_driver();
  if (driver == nullptr) return nullptr;
  auto path = std::make_unique<DevicePath>(*driver, notes_, device);
  path->take_context();
  DevicePath* made = path.release();
  paths_[static_cast<std::size_t>(device)].store(made, std::memory_order_release);
  return made;
}

StageResult DeviceStager::set_up(DevicePath& path) noexcept {
  const std::lock_guard<std::mutex> lock(setup_mutex_);
  if (path.state() == State::kNew) {
    cuda::Result code = cuda::kOutOfMemory;
    try {
      code = path.take_resources(options_.ring_bytes);
      if (code == kSuccess) pin_arena();
    } catch (const std::exception&) {  // no host memory
      code = cuda::kOutOfMemory;
    }
    if (code == kSuccess) {
      path.open();
    } else {
      path.close(code, "setting the device up");
    }
  }
  return path.state() == State::kOpen ? StageResult::kStaged : refusal(path);
}

// Once for all devices. Refused, copies still arrive, but the driver waits for each on the host.
void DeviceStager::pin_arena() {
  if (arena_tried_) return;
  arena_tried_ = true;
  const cuda::Result code =
      driver_->host_register(arena_, arena_bytes_, cuda::kHostPortable | cuda::kHostDeviceMap);
  pinned_.store(code == kSuccess, std::memory_order_relaxed);
  if (code == kSuccess) return;
  notes_.add("the ring of " + std::to_string(arena_bytes_) +
             " bytes could not be pinned: " + driver_->error_name(code) +
             "; copies from the GPU wait on the host. Lower TracerConfig.ring_bytes");
}

StageResult DeviceStager::stage(const DevicePlace& place, const std::byte* from, std::byte* to,
                                std::size_t bytes, std::uint64_t* sequence) noexcept {
  DevicePath* path = find(place.device);
  if (path == nullptr || generation_ != process_generation()) return StageResult::kUnavailable;
  const auto compute = static_cast<cuda::Stream>(place.stream);
  if (is_broken(StagerMutation::kQueryInHook)) driver_->stream_query(path->stream());
  const DeviceSession session(*driver_, path->context());
  bool capturing = false;
  cuda::Result code = session.code();
  if (code == kSuccess) code = session.ask_capturing(compute, &capturing);
  if (capturing) return StageResult::kCapturing;
  if (code != kSuccess) path->close(code, "copying a tensor");
  return path->copy(compute, reinterpret_cast<cuda::DevicePointer>(from), to, bytes, sequence)
             ? StageResult::kStaged
             : refusal(*path);
}

void DeviceStager::count_synchronous_copy() noexcept {
  synchronous_copies_.fetch_add(1, std::memory_order_relaxed);
}

bool DeviceStager::is_lost(int device) const noexcept {
  const DevicePath* path = find(device);
  return path != nullptr && path->is_lost();
}

bool DeviceStager::has_arrived(int device, std::uint64_t sequence) const noexcept {
  const DevicePath* path = find(device);
  return path != nullptr && path->has_landed(sequence);
}

CopyState DeviceStager::state_of(const RecordHeader& header) noexcept {
  DevicePath* path = find(static_cast<int>(header.copy_device) - 1);
  if (path == nullptr) return CopyState::kLost;
  if (path->has_landed(header.copy_sequence)) return CopyState::kArrived;
  if (path->is_lost()) {
    // What arrived before counts.
    return path->has_landed(header.copy_sequence) ? CopyState::kArrived : CopyState::kLost;
  }
  path->probe();
  return CopyState::kPending;
}

DeviceReport DeviceStager::report() const {
  DeviceReport result;
  for (int device = 0; device < kMaxDevices; ++device) {
    const DevicePath* path = find(device);
    if (path == nullptr) continue;
    result.copies += path->copies();
    result.compute_stream_copies += path->compute_stream_copies();
  }
  result.synchronous_copies = synchronous_copies_.load(std::memory_order_relaxed);
  result.pinned = pinned_.load(std::memory_order_relaxed);
  result.errors = notes_.errors();
  result.last_error = notes_.last_error();
  return result;
}

bool DeviceStager::shut_down(std::chrono::nanoseconds patience) noexcept {
  if (generation_ != process_generation()) return false;
  const auto deadline = Clock::now() + patience;
  for (int device = 0; device < kMaxDevices; ++device) {
    DevicePath* path = find(device);
    if (path == nullptr) continue;
    while (!path->has_landed_all() && !path->is_lost()) {
      if (Clock::now() >= deadline) return false;
      std::this_thread::sleep_for(kPoll);
      path->probe();
    }
  }
  for (int device = 0; device < kMaxDevices; ++device) {
    DevicePath* path = find(device);
    if (path == nullptr || path->context() == nullptr) continue;
    const DeviceSession session(*driver_, path->context());
    // In any context that still works.
    if (pinned_.load(std::memory_order_relaxed) && driver_->host_unregister(arena_) == kSuccess)
      pinned_.store(false, std::memory_order_relaxed);
    path->release();
  }
  return true;
}

}  // namespace mld
