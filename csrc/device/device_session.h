// Our calls on a thread of the user's: while a session lives, the device's context is current there
// and the thread's capture mode is RELAXED, so that our calls never invalidate a graph capture of
// another thread. Afterwards both are as they were: torch's current device never changes.
//
// Thread safety: a session belongs to the thread that made it.
#pragma once

#include "device/cuda_driver.h"

namespace mld {

class DeviceSession {
 public:
  DeviceSession(const cuda::Driver& driver, cuda::Context context) noexcept;
  ~DeviceSession();
  DeviceSession(const DeviceSession&) = delete;
  DeviceSession& operator=(const DeviceSession&) = delete;

  // What the driver said to it; no call may follow unless kSuccess.
  [[nodiscard]] cuda::Result code() const noexcept { return code_; }
  // Whether `stream` is being captured into a graph. Asked before anything else.
  [[nodiscard]] cuda::Result ask_capturing(cuda::Stream stream, bool* capturing) const noexcept;

 private:
  const cuda::Driver& driver_;
  cuda::Result code_ = cuda::kSuccess;
  int mode_ = cuda::kCaptureModeRelaxed;  // ours, then what the thread had
  bool has_mode_ = false, has_context_ = false;
};

}  // namespace mld
