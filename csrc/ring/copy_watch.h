// What the ring's consumer asks about records whose bytes are still on their way from a device.
#pragma once

#include "ring/record.h"

namespace mld {

enum class CopyState {
  kArrived,  // the payload is there
  kPending,
  kLost,  // it never comes: its device failed
};

class CopyWatch {
 public:
  virtual ~CopyWatch() = default;
  // Consumer only. REQUIRES: header.copy_device != 0.
  [[nodiscard]] virtual CopyState state_of(const RecordHeader& header) noexcept = 0;
};

}  // namespace mld
