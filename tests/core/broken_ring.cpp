#include "broken_ring.h"

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

#include "hand_over.h"

// The standard headers came first, so that only ours is bent.
#define mld mld_broken
#define memory_order_release memory_order_relaxed
#include "ring/byte_ring.h"
#undef memory_order_release
#undef mld

int hand_over_broken_ring(int slots) { return hand_over<mld_broken::MpscByteRing<>>(slots); }
