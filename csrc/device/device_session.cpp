#include "device/device_session.h"

#include "device/stager_mutation.h"

namespace mld {
namespace {

using cuda::kSuccess;

// What is the caller's is given back, also by a driver that has refused once.
template <class Call>
void insist(Call call) noexcept {
  for (int tries = 0; tries < 3 && call() != kSuccess; ++tries) {
  }
}

}  // namespace

DeviceSession::DeviceSession(const cuda::Driver& driver, cuda::Context context) noexcept
    : driver_(driver) {
  if (!is_broken(StagerMutation::kNoRelaxedMode)) {
    code_ = driver_.exchange_capture_mode(&mode_);
    if (code_ != kSuccess) return;
    has_mode_ = true;
  }
  if (is_broken(StagerMutation::kNoContext)) return;
  cuda::Context current = nullptr;
  code_ = driver_.context_get_current(&current);
  if (code_ != kSuccess || current == context) return;
  code_ = driver_.context_push(context);
  has_context_ = code_ == kSuccess;
}

DeviceSession::~DeviceSession() {
  cuda::Context popped = nullptr;
  if (has_context_ && !is_broken(StagerMutation::kContextStays))
    insist([&] { return driver_.context_pop(&popped); });
  if (has_mode_ && !is_broken(StagerMutation::kModeStays))
    insist([&] { return driver_.exchange_capture_mode(&mode_); });
}

// The driver refuses to say for the legacy stream while a stream that synchronises with it is being
// captured, and that means yes.
cuda::Result DeviceSession::ask_capturing(cuda::Stream stream, bool* capturing) const noexcept {
  int status = 0;
  *capturing = false;
  if (is_broken(StagerMutation::kNoCaptureQuestion)) return kSuccess;
  const cuda::Result code = driver_.stream_is_capturing(stream, &status);
  *capturing = code == cuda::kStreamCaptureImplicit || (code == kSuccess && status != 0);
  return *capturing ? kSuccess : code;
}

}  // namespace mld
