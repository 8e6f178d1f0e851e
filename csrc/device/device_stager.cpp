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

DevicePath* DeviceStager::find_or_make(int device) noexcept {
  if (generation_ != process_generation() || device < 0 || device >= kMaxDevices ||
      unavailable_.load(std::memory_order_relaxed))
    return nullptr;
  if (DevicePath* known = find(device)) return known;
  try {
    return make_path(device);
  } catch (const std::exception&) {  // no memory
    return nullptr;
  }
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
  if (path.state() == State::kOpen) return StageResult::kStaged;
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

StageResult StageSession::enter() noexcept {
  path_ = stager_.find_or_make(place_.device);
  if (path_ == nullptr) return StageResult::kUnavailable;
  if (path_->state() >= State::kClosed) return refusal(*path_);
  const cuda::Driver& driver = *stager_.driver_;
  if (is_broken(StagerMutation::kQueryInHook) && path_->state() == State::kOpen)
    driver.stream_query(path_->stream());
  calls_.emplace(driver, path_->context());
  bool capturing = false;
  cuda::Result code = calls_->code();
  if (code == kSuccess) code = calls_->ask_capturing(compute(), &capturing);
  if (code != kSuccess) path_->close(code, "asking for a graph capture");
  const StageResult result = capturing          ? StageResult::kCapturing
                             : code != kSuccess ? refusal(*path_)
                                                : stager_.set_up(*path_);
  if (result != StageResult::kStaged) leave();
  return result;
}

StageResult StageSession::stage(const std::byte* from, std::byte* to, std::size_t bytes,
                                std::uint64_t* sequence) noexcept {
  return path_->copy(compute(), reinterpret_cast<cuda::DevicePointer>(from), to, bytes, sequence)
             ? StageResult::kStaged
             : refusal(*path_);
}

}  // namespace mld
