#include "device/device_stager.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "device/stager_mutation.h"

namespace mld {

#ifdef MLD_STAGER_MUTATIONS
StagerMutation stager_mutation = StagerMutation::kNone;
#endif

namespace {

using cuda::kSuccess;

constexpr std::size_t kAlignment = 512;
constexpr std::size_t kSmallestDeviceRing = std::size_t{1} << 20;
constexpr std::size_t kFirstEvents = 64;
// A word that does not move for this long makes the writer look whether the context is lost.
constexpr auto kProbeAfter = std::chrono::seconds(1);
constexpr auto kPoll = std::chrono::microseconds(200);

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

// One device. Made once, never freed before the stager.
struct DeviceStager::Device {
  enum class State { kNew, kOpen, kClosed, kLost };

  struct Flight {
    std::uint64_t sequence;
    std::uint64_t ring_end;  // ring_tail once it has landed
  };

  explicit Device(int device_index) : index(device_index) {}

  // constant once state is kOpen
  const int index;
  cuda::Device handle = 0;
  cuda::Context context = nullptr;
  cuda::Stream stream = nullptr;
  std::uint32_t* word = nullptr;  // written by the device
  cuda::DevicePointer word_address = 0;
  cuda::DevicePointer ring = 0;
  std::size_t ring_bytes = 0;
  // shared. release PAIRS WITH acquire: the constants above, and that all copies have ended.
  std::atomic<State> state{State::kNew};
  // Number of the last copy. Stored before its word can be written.
  std::atomic<std::uint64_t> last{0};
  // producers, protected by mutex
  std::mutex mutex;
  std::vector<Flight> flights;      // circular, oldest at first_flight
  std::vector<cuda::Event> events;  // that of the flight in the same place
  std::size_t first_flight = 0, flight_count = 0;
  std::uint64_t ring_head = 0, ring_tail = 0;  // positions in bytes, only grow
  // writer
  std::uint64_t probed_at_copy = 0;
  Clock::time_point word_moved{};

  [[nodiscard]] std::uint64_t landed() const noexcept {
    const std::uint64_t sent = last.load(std::memory_order_acquire);
    if (is_broken(StagerMutation::kArrivedAtOnce)) return sent;
    // acquire PAIRS WITH the device's write, which its driver fences behind the copy's: the bytes
    // of all copies up to it are visible.
    const std::uint32_t seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
    // The word holds the low half; the copies in flight are far fewer than 2^31.
    const auto ahead = static_cast<std::int32_t>(seen - static_cast<std::uint32_t>(sent));
    return sent + static_cast<std::uint64_t>(std::int64_t{ahead});
  }
  [[nodiscard]] bool has_landed(std::uint64_t sequence) const noexcept {
    return static_cast<std::int64_t>(landed() - sequence) >= 0;
  }
  void retire() noexcept {
    while (flight_count != 0) {
      const Flight& oldest = flights[first_flight];
      if (!is_broken(StagerMutation::kReuseAtOnce) && !has_landed(oldest.sequence)) return;
      ring_tail = oldest.ring_end;
      first_flight = (first_flight + 1) % flights.size();
      --flight_count;
    }
  }
  // Address of `bytes` of the device ring; 0 when there is no room. Sets `end` to the new head.
  [[nodiscard]] cuda::DevicePointer find_room(std::size_t bytes,
                                              std::uint64_t* end) const noexcept {
    *end = ring_head;
    const std::uint64_t need = aligned(bytes);
    if (need > ring_bytes) return 0;
    const std::uint64_t offset = ring_head % ring_bytes;
    const std::uint64_t padding = offset + need > ring_bytes ? ring_bytes - offset : 0;
    if (ring_head + padding + need - ring_tail > ring_bytes) return 0;
    *end = ring_head + padding + need;
    return ring + (ring_head + padding) % ring_bytes;
  }
  [[nodiscard]] cuda::Result make_events(const cuda::Driver& driver, std::size_t count) {
    // In order again, so that the new places lie behind the youngest flight.
    std::rotate(flights.begin(), flights.begin() + static_cast<std::ptrdiff_t>(first_flight),
                flights.end());
    std::rotate(events.begin(), events.begin() + static_cast<std::ptrdiff_t>(first_flight),
                events.end());
    first_flight = 0;
    events.reserve(count);
    while (events.size() < count) {
      cuda::Event event = nullptr;
      if (const auto code = driver.event_create(&event, cuda::kEventDisableTiming);
          code != kSuccess)
        return code;
      events.push_back(event);
    }
    flights.resize(count);
    return kSuccess;
  }
};

// Our calls on this thread: the device's context current, RELAXED capture mode; both as they were
// afterwards, so torch's current device never changes.
class DeviceStager::Session {
 public:
  Session(const cuda::Driver& driver, const Device& device) noexcept : driver_(driver) {
    if (!is_broken(StagerMutation::kNoRelaxedMode)) {
      code_ = driver_.exchange_capture_mode(&mode_);
      if (code_ != kSuccess) return;
      has_mode_ = true;
    }
    if (is_broken(StagerMutation::kNoContext)) return;
    cuda::Context current = nullptr;
    code_ = driver_.context_get_current(&current);
    if (code_ != kSuccess || current == device.context) return;
    code_ = driver_.context_push(device.context);
    has_context_ = code_ == kSuccess;
  }
  ~Session() {
    cuda::Context popped = nullptr;
    if (has_context_ && !is_broken(StagerMutation::kContextStays))
      insist([&] { return driver_.context_pop(&popped); });
    if (has_mode_ && !is_broken(StagerMutation::kModeStays))
      insist([&] { return driver_.exchange_capture_mode(&mode_); });
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  [[nodiscard]] cuda::Result code() const noexcept { return code_; }

 private:
  // What is the caller's is given back, also by a driver that has refused once.
  template <class Call>
  static void insist(Call call) noexcept {
    for (int tries = 0; tries < 3 && call() != kSuccess; ++tries) {
    }
  }

  const cuda::Driver& driver_;
  cuda::Result code_ = kSuccess;
  int mode_ = cuda::kCaptureModeRelaxed;  // ours, then what the thread had
  bool has_mode_ = false, has_context_ = false;
};

namespace {

// Asked before anything else. The driver refuses to say for the legacy stream while a stream that
// synchronises with it is being captured, and that means yes.
cuda::Result ask_capturing(const cuda::Driver& driver, cuda::Stream stream, bool* capturing) {
  int status = 0;
  *capturing = false;
  if (is_broken(StagerMutation::kNoCaptureQuestion)) return kSuccess;
  const cuda::Result code = driver.stream_is_capturing(stream, &status);
  *capturing = code == cuda::kStreamCaptureImplicit || (code == kSuccess && status != 0);
  return *capturing ? kSuccess : code;
}

}  // namespace

DeviceStager::DeviceStager(std::byte* arena, std::size_t arena_bytes, DeviceOptions options)
    : arena_(arena), arena_bytes_(arena_bytes), options_(std::move(options)) {}

DeviceStager::~DeviceStager() {
  for (auto& slot : devices_) delete slot.load(std::memory_order_acquire);
}

DeviceStager::Device* DeviceStager::find(int device) const noexcept {
  if (device < 0 || device >= kMaxDevices) return nullptr;
  return devices_[static_cast<std::size_t>(device)].load(std::memory_order_acquire);
}

StageResult DeviceStager::open(const DevicePlace& place) noexcept {
  if (generation_ != process_generation() || place.device < 0 || place.device >= kMaxDevices ||
      unavailable_.load(std::memory_order_relaxed))
    return StageResult::kUnavailable;
  Device* device = find(place.device);
  try {
    if (device == nullptr) device = make_device(place.device);
  } catch (const std::exception&) {  // no memory
    return StageResult::kUnavailable;
  }
  if (device == nullptr) return StageResult::kUnavailable;
  const auto closed = [&] {
    return device->state.load(std::memory_order_acquire) == Device::State::kLost
               ? StageResult::kLost
               : StageResult::kUnavailable;
  };
  if (device->state.load(std::memory_order_acquire) >= Device::State::kClosed) return closed();
  const Session session(*driver_, *device);
  bool capturing = false;
  cuda::Result code = session.code();
  if (code == kSuccess)
    code = ask_capturing(*driver_, static_cast<cuda::Stream>(place.stream), &capturing);
  if (code != kSuccess) {
    close_device(*device, code, "asking for a graph capture");
    return closed();
  }
  if (capturing) return StageResult::kCapturing;
  if (device->state.load(std::memory_order_acquire) == Device::State::kOpen)
    return StageResult::kStaged;
  return set_up(*device);
}

const cuda::Driver* DeviceStager::load_driver() {
  if (driver_ != nullptr || unavailable_.load(std::memory_order_relaxed)) return driver_.get();
  std::string why;
  driver_ = cuda::Driver::load(options_.library, &why);
  if (driver_ == nullptr) {
    unavailable_.store(true, std::memory_order_relaxed);
    note("CUDA tensors are copied synchronously: " + why);
  }
  return driver_.get();
}

// The device with its context and nothing else, so that it can be asked about captures. Null when
// there is no way.
DeviceStager::Device* DeviceStager::make_device(int index) {
  const std::lock_guard<std::mutex> lock(setup_mutex_);
  if (Device* known = find(index)) return known;
  const cuda::Driver* driver = load_driver();
  if (driver == nullptr) return nullptr;
  auto device = std::make_unique<Device>(index);
  // torch computes in the primary context, so this one exists and is only counted up.
  cuda::Result code = driver->device_get(&device->handle, index);
  if (code == kSuccess) code = driver->primary_context_retain(&device->context, device->handle);
  if (code != kSuccess) close_device(*device, code, "taking the device's context");
  Device* made = device.release();
  devices_[static_cast<std::size_t>(index)].store(made, std::memory_order_release);
  return made;
}

StageResult DeviceStager::set_up(Device& device) noexcept {
  const std::lock_guard<std::mutex> lock(setup_mutex_);
  if (device.state.load(std::memory_order_acquire) == Device::State::kNew) {
    cuda::Result code = cuda::kOutOfMemory;
    try {
      code = take_resources(device);
    } catch (const std::exception&) {  // no host memory
    }
    if (code == kSuccess) {
      device.state.store(Device::State::kOpen, std::memory_order_release);
    } else {
      close_device(device, code, "setting the device up");
    }
  }
  switch (device.state.load(std::memory_order_acquire)) {
    case Device::State::kOpen:
      return StageResult::kStaged;
    case Device::State::kLost:
      return StageResult::kLost;
    default:
      return StageResult::kUnavailable;
  }
}

cuda::Result DeviceStager::take_resources(Device& device) {
  const cuda::Driver& driver = *driver_;
  void* word = nullptr;
  cuda::Result code = driver.stream_create(&device.stream, cuda::kStreamNonBlocking);
  if (code == kSuccess)
    code = driver.host_allocate(&word, sizeof(std::uint32_t),
                                cuda::kHostPortable | cuda::kHostDeviceMap);
  if (code != kSuccess) return code;
  device.word = static_cast<std::uint32_t*>(word);
  __atomic_store_n(device.word, 0, __ATOMIC_RELEASE);
  code = driver.host_device_pointer(&device.word_address, word, 0);
  if (code == kSuccess) code = device.make_events(driver, kFirstEvents);
  if (code != kSuccess) return code;
  take_device_ring(device);
  pin_arena();
  return kSuccess;
}

// Refused, it shrinks; without any, copies go over the compute stream.
void DeviceStager::take_device_ring(Device& device) const {
  std::size_t free_bytes = 0, total_bytes = 0;
  if (driver_->memory_get_info(&free_bytes, &total_bytes) != kSuccess) return;
  std::size_t bytes = std::min(options_.ring_bytes, total_bytes / 100) / kAlignment * kAlignment;
  while (bytes != 0) {
    if (driver_->memory_allocate(&device.ring, bytes) == kSuccess) break;
    device.ring = 0;
    bytes = bytes / 2 < kSmallestDeviceRing ? 0 : bytes / 2 / kAlignment * kAlignment;
  }
  device.ring_bytes = bytes;
}

// Once for all devices. Refused, copies still arrive, but the driver waits for each on the host.
void DeviceStager::pin_arena() {
  if (arena_tried_) return;
  arena_tried_ = true;
  const cuda::Result code =
      driver_->host_register(arena_, arena_bytes_, cuda::kHostPortable | cuda::kHostDeviceMap);
  pinned_.store(code == kSuccess, std::memory_order_relaxed);
  if (code == kSuccess) return;
  note("the ring of " + std::to_string(arena_bytes_) +
       " bytes could not be pinned: " + driver_->error_name(code) +
       "; copies from the GPU wait on the host. Lower TracerConfig.ring_bytes");
}

StageResult DeviceStager::stage(const DevicePlace& place, const std::byte* from, std::byte* to,
                                std::size_t bytes, std::uint64_t* sequence) noexcept {
  Device* device = find(place.device);
  if (device == nullptr || generation_ != process_generation()) return StageResult::kUnavailable;
  const auto compute = static_cast<cuda::Stream>(place.stream);
  if (is_broken(StagerMutation::kQueryInHook)) driver_->stream_query(device->stream);
  const Session session(*driver_, *device);
  const std::lock_guard<std::mutex> lock(device->mutex);
  if (device->state.load(std::memory_order_acquire) == Device::State::kOpen) {
    bool capturing = false;
    cuda::Result code = session.code();
    if (code == kSuccess) code = ask_capturing(*driver_, compute, &capturing);
    if (capturing) return StageResult::kCapturing;
    if (code == kSuccess) {
      code = enqueue(*device, compute, reinterpret_cast<cuda::DevicePointer>(from), to, bytes);
      if (code != kSuccess && !cuda::is_sticky(code)) code = drain(*device, compute, code);
    }
    if (code == kSuccess) {
      *sequence = device->last.load(std::memory_order_relaxed);
      copies_.fetch_add(1, std::memory_order_relaxed);
      return StageResult::kStaged;
    }
    close_device(*device, code, "copying a tensor");
  }
  return device->state.load(std::memory_order_acquire) == Device::State::kLost
             ? StageResult::kLost
             : StageResult::kUnavailable;
}

// REQUIRES: device.mutex; the stream is not being captured.
cuda::Result DeviceStager::enqueue(Device& device, cuda::Stream compute, cuda::DevicePointer from,
                                   std::byte* to, std::size_t bytes) noexcept {
  const cuda::Driver& driver = *driver_;
  cuda::Result code = kSuccess;
  const auto step = [&code](auto function, auto... arguments) {
    if (code == kSuccess) code = function(arguments...);
  };
  device.retire();
  if (device.flight_count == device.flights.size()) {
    try {
      step([&] { return device.make_events(driver, 2 * device.flights.size()); });
    } catch (const std::bad_alloc&) {
      code = cuda::kOutOfMemory;
    }
    if (code != kSuccess) return code;
  }
  const std::size_t place = (device.first_flight + device.flight_count) % device.flights.size();
  const cuda::Event event = device.events[place];
  std::uint64_t ring_end = 0;
  const cuda::DevicePointer room = device.find_room(bytes, &ring_end);
  const bool is_direct = room == 0;
  const bool waits = !is_broken(StagerMutation::kNoWait) &&
                     !(is_direct && is_broken(StagerMutation::kNoWaitForDirect));
  if (is_direct) {
    step(driver.copy_device_to_host, to, from, bytes, compute);
    compute_stream_copies_.fetch_add(1, std::memory_order_relaxed);
  } else if (!is_broken(StagerMutation::kNoSnapshot)) {
    step(driver.copy_device_to_device, room, from, bytes, compute);
  }
  if (is_broken(StagerMutation::kWaitBeforeRecord))
    step(driver.stream_wait_event, device.stream, event, 0u);
  if (!is_broken(StagerMutation::kNoRecord)) step(driver.event_record, event, compute);
  if (waits && !is_broken(StagerMutation::kWaitBeforeRecord))
    step(driver.stream_wait_event, device.stream, event, 0u);  // INVARIANT 1
  const std::uint64_t sequence = device.last.load(std::memory_order_relaxed) + 1;
  const auto write_word = [&] {
    if (is_broken(StagerMutation::kNoWord)) return;
    step(driver.stream_write_value, device.stream, device.word_address,
         static_cast<std::uint32_t>(sequence), 0u);
  };
  if (is_broken(StagerMutation::kWordFirst)) write_word();
  if (!is_direct)
    step(driver.copy_device_to_host, to, is_broken(StagerMutation::kNoSnapshot) ? from : room,
         bytes, device.stream);
  if (code != kSuccess) return code;
  device.flights[place] = {sequence, ring_end};
  ++device.flight_count;
  device.ring_head = ring_end;
  device.last.store(sequence, std::memory_order_release);
  if (!is_broken(StagerMutation::kWordFirst)) write_word();
  if (code != kSuccess) {  // nobody will ever write that number
    device.last.store(sequence - 1, std::memory_order_release);
    --device.flight_count;
  }
  return code;
}

// The path of a device ends here, said once. Copies that are enqueued still arrive, unless the
// context is lost.
void DeviceStager::close_device(Device& device, cuda::Result code, const char* what) noexcept {
  const auto state = cuda::is_sticky(code) ? Device::State::kLost : Device::State::kClosed;
  auto before = device.state.load(std::memory_order_acquire);
  while (before < state &&
         !device.state.compare_exchange_weak(before, state, std::memory_order_acq_rel,
                                             std::memory_order_acquire)) {
  }
  if (before >= state) return;
  try {
    const std::string name = driver_->error_name(code);
    note("CUDA device " + std::to_string(device.index) + ": " + what + " failed with " + name +
         (state == Device::State::kLost ? "; its tensors are not recorded any more"
                                        : "; its tensors are copied synchronously from now on"));
    const std::lock_guard<std::mutex> lock(notes_mutex_);
    ++errors_;
    last_error_ = name;
  } catch (const std::exception&) {  // no memory for words
  }
}

// INVARIANT 3, after a copy that was enqueued in part: no word tells when the part has ended. The
// one host wait of the path, once, where the driver has failed already.
cuda::Result DeviceStager::drain(const Device& device, cuda::Stream compute,
                                 cuda::Result code) const noexcept {
  if (is_broken(StagerMutation::kNoDrain)) return code;
  for (const cuda::Stream stream : {compute, device.stream}) {
    cuda::Result answer = cuda::kUnknown;
    for (int tries = 0; tries < 3 && answer != kSuccess; ++tries) {
      answer = driver_->stream_synchronize(stream);
      if (cuda::is_sticky(answer)) return answer;
    }
    if (answer != kSuccess) return cuda::kUnknown;
  }
  return code;
}

void DeviceStager::count_synchronous_copy() noexcept {
  synchronous_copies_.fetch_add(1, std::memory_order_relaxed);
}

bool DeviceStager::is_lost(int device) const noexcept {
  const Device* found = find(device);
  return found != nullptr && found->state.load(std::memory_order_acquire) == Device::State::kLost;
}

bool DeviceStager::has_arrived(int device, std::uint64_t sequence) const noexcept {
  const Device* found = find(device);
  return found != nullptr && found->word != nullptr && found->has_landed(sequence);
}

CopyState DeviceStager::state_of(const RecordHeader& header) noexcept {
  const int index = static_cast<int>(header.copy_device) - 1;
  if (has_arrived(index, header.copy_sequence)) return CopyState::kArrived;
  Device* device = find(index);
  if (device == nullptr) return CopyState::kLost;
  if (is_lost(index)) {
    // What arrived before counts.
    return has_arrived(index, header.copy_sequence) ? CopyState::kArrived : CopyState::kLost;
  }
  probe(*device);
  return CopyState::kPending;
}

// A lost context never writes the word, and perhaps no hook comes any more to hear of it. Asked by
// the writer alone, and only after a long silence, since the answer may wait for the context's
// lock. RELAXED mode makes the question legal beside a capture.
void DeviceStager::probe(Device& device) noexcept {
  const auto now = Clock::now();
  const std::uint64_t landed = device.landed();
  if (device.word_moved == Clock::time_point{} || landed != device.probed_at_copy) {
    device.probed_at_copy = landed;
    device.word_moved = now;
    return;
  }
  if (now - device.word_moved < kProbeAfter) return;
  device.word_moved = now;
  const std::uint64_t sent = device.last.load(std::memory_order_acquire);
  cuda::Result code = kSuccess;
  {
    const Session session(*driver_, device);
    code = session.code();
    if (code != kSuccess) return;  // asked again in a while, as after every answer that may pass
    code = driver_->stream_query(device.stream);
  }
  // A stream that has nothing left to do and has not written its word never will.
  if (code == kSuccess && !device.has_landed(sent)) code = cuda::kUnknown;
  if (cuda::is_sticky(code)) close_device(device, code, "waiting for a copy");
}

DeviceReport DeviceStager::report() const {
  DeviceReport result;
  result.copies = copies_.load(std::memory_order_relaxed);
  result.compute_stream_copies = compute_stream_copies_.load(std::memory_order_relaxed);
  result.synchronous_copies = synchronous_copies_.load(std::memory_order_relaxed);
  result.pinned = pinned_.load(std::memory_order_relaxed);
  const std::lock_guard<std::mutex> lock(notes_mutex_);
  result.errors = errors_;
  result.last_error = last_error_;
  return result;
}

void DeviceStager::note(const std::string& text) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(notes_mutex_);
    notice_ += (notice_.empty() ? "" : "; ") + text;
    has_notice_.store(true, std::memory_order_relaxed);
  } catch (const std::exception&) {  // no memory for words
  }
}

std::optional<std::string> DeviceStager::take_notice() {
  // relaxed: a hook's glance; the mutex orders.
  if (!has_notice_.load(std::memory_order_relaxed)) return std::nullopt;
  const std::lock_guard<std::mutex> lock(notes_mutex_);
  has_notice_.store(false, std::memory_order_relaxed);
  return std::exchange(notice_, {});
}

bool DeviceStager::shut_down(std::chrono::nanoseconds patience) noexcept {
  if (generation_ != process_generation()) return false;
  const auto deadline = Clock::now() + patience;
  for (auto& slot : devices_) {
    Device* device = slot.load(std::memory_order_acquire);
    if (device == nullptr || device->word == nullptr) continue;
    while (!device->has_landed(device->last.load(std::memory_order_acquire)) &&
           !is_lost(device->index)) {
      if (Clock::now() >= deadline) return false;
      std::this_thread::sleep_for(kPoll);
      probe(*device);
    }
  }
  for (auto& slot : devices_) {
    Device* device = slot.load(std::memory_order_acquire);
    if (device == nullptr || device->context == nullptr) continue;
    const Session session(*driver_, *device);
    // In any context that still works.
    if (pinned_.load(std::memory_order_relaxed) && driver_->host_unregister(arena_) == kSuccess)
      pinned_.store(false, std::memory_order_relaxed);
    release(*device);
  }
  return true;
}

// Whatever the driver answers: at the end of a process it may be gone already.
void DeviceStager::release(Device& device) noexcept {
  for (const cuda::Event event : device.events) driver_->event_destroy(event);
  if (device.stream != nullptr) driver_->stream_destroy(device.stream);
  if (device.ring != 0) driver_->memory_free(device.ring);
  if (device.word != nullptr) driver_->host_free(device.word);
  device.word = nullptr;
  driver_->primary_context_release(device.handle);
}

}  // namespace mld
