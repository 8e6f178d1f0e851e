#include "capture/attempt.h"

#include <algorithm>
#include <cerrno>
#include <new>
#include <string>
#include <utility>

namespace mld {

void AttemptState::note_loss(const LossNote& note) {
  const std::lock_guard<std::mutex> lock(mutex_);
  // A writer that hangs takes none for hours, and the ring stands still.
  if (!losses_.empty() && losses_.back().position == note.position &&
      losses_.back().epoch == note.epoch && losses_.back().gap.append(note.gap))
    return;
  losses_.push_back(note);
}

void AttemptState::take_losses(std::uint64_t position,
                               const std::function<void(const LossNote&)>& take) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto end =
      std::stable_partition(losses_.begin(), losses_.end(),
                            [position](const LossNote& note) { return note.position <= position; });
  auto next = losses_.begin();
  try {
    for (; next != end; ++next) take(*next);
  } catch (...) {
    losses_.erase(losses_.begin(), next);
    throw;
  }
  losses_.erase(losses_.begin(), end);
}

void AttemptState::fail(const StoreError* error) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_ && error != nullptr) failure_ = *error;
  } catch (const std::bad_alloc&) {
    // Without words: raise_failure() has some.
  }
  failed_.store(true, std::memory_order_release);
}

void AttemptState::raise_failure() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_ && is_failed())
    throw StoreError(ENOMEM, "the trace cannot be written any more: out of memory while writing");
  if (!failure_) return;
  throw StoreError(failure_->code(),
                   std::string("the trace cannot be written any more: ") + failure_->what(),
                   failure_->hint());
}

void AttemptState::release_store() {
  StoreUse use;  // given back outside of our lock
  const std::lock_guard<std::mutex> lock(mutex_);
  use = std::move(use_);
}

}  // namespace mld
