// Which bytes the enqueued operations touch, and which of them are not ordered with each other: the
// data races of the device, found from the order that was asked for, not from the order in which a
// schedule happened to run things. A race is therefore seen in every schedule.
//
// Works as FastTrack does for threads (Flanagan, Freund, PLDI 2009): an access remembers its stream
// and its number there, and happened before a later one exactly if that one's clock counts so far.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "fake_cuda/vector_clock.h"

namespace fake_cuda {

struct Range {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  [[nodiscard]] bool overlaps(const Range& other) const {
    return begin < other.end && other.begin < end;
  }
};

struct Access {
  Range range;
  bool writes = false;
};

struct RecordedAccess {
  Access access;
  std::size_t actor = 0;
  std::uint64_t count = 0;
  std::string operation;
};

class AccessLog {
 public:
  // The first earlier access that conflicts with this one (they overlap, and one of them writes)
  // and is not in `seen`; `reads_conflict` is false for one that only reads.
  [[nodiscard]] std::optional<RecordedAccess> conflict(const Range& range, bool reads_conflict,
                                                       const VectorClock& seen) const;
  // Adds an access and drops what it makes redundant: parts of earlier accesses that happened
  // before it and that it covers, since whoever is ordered after it is ordered after them; and all
  // that the host has seen, since every later operation is enqueued by the host.
  void add(const RecordedAccess& added, const VectorClock& clock, const VectorClock& host);
  void clear() { accesses_.clear(); }

 private:
  std::vector<RecordedAccess> accesses_;
};

}  // namespace fake_cuda
