// The clock of every deadline and interval: it never jumps.
#pragma once

#include <chrono>

namespace mld {

using Clock = std::chrono::steady_clock;

}  // namespace mld
