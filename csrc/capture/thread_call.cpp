#include "capture/thread_call.h"

#include <algorithm>
#include <cstddef>
#include <new>
#include <utility>

namespace mld {
namespace {

struct ThreadEntry {
  std::uint32_t recorder_id;
  std::weak_ptr<const void> recorder;
  std::unique_ptr<ThreadCall> call;
};

// What broke a call may be a Python exception, and the main thread's entries outlive the
// interpreter: what is left of them when a thread ends is leaked.
struct ThreadEntries : std::vector<ThreadEntry> {
  ~ThreadEntries() {
    for (const ThreadEntry& entry : *this) leak(std::move(entry.call->trouble));
  }
  static void leak(std::exception_ptr trouble) noexcept {
    if (trouble == nullptr) return;
    alignas(std::exception_ptr) std::byte place[sizeof trouble];
    new (place) std::exception_ptr(std::move(trouble));  // never destroyed
  }
};

// One or two entries: the tracers that this thread has called and that still live.
thread_local ThreadEntries t_entries;

}  // namespace

void ThreadCall::begin(std::shared_ptr<Runtime> new_runtime, std::uint64_t new_number,
                       std::int64_t new_epoch, std::uint32_t new_batch_size) {
  state = State::kOpen;
  fate = Fate::kStored;
  runtime = std::move(new_runtime);
  number = new_number;
  epoch = new_epoch;
  batch_size = new_batch_size;
  bytes = 0;
  captures.clear();
  dims.clear();
  pieces.clear();
}

void ThreadCall::end(State new_state) {
  state = new_state;
  trouble = nullptr;
  runtime.reset();
}

ThreadCall* find_thread_call(std::uint32_t recorder_id) noexcept {
  for (ThreadEntry& entry : t_entries) {
    if (entry.recorder_id == recorder_id) return entry.call.get();
  }
  return nullptr;
}

ThreadCall& make_thread_call(std::uint32_t recorder_id,
                             const std::shared_ptr<const void>& recorder) {
  if (ThreadCall* call = find_thread_call(recorder_id)) return *call;
  t_entries.erase(std::remove_if(t_entries.begin(), t_entries.end(),
                                 [](const ThreadEntry& entry) { return entry.recorder.expired(); }),
                  t_entries.end());
  t_entries.push_back({recorder_id, recorder, std::make_unique<ThreadCall>()});
  return *t_entries.back().call;
}

}  // namespace mld
