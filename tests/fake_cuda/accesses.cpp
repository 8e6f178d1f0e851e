#include "fake_cuda/accesses.h"

#include <utility>

namespace fake_cuda {
namespace {

bool happened_before(const RecordedAccess& earlier, const VectorClock& clock) {
  return clock.of(earlier.actor) >= earlier.count;
}

}  // namespace

std::optional<RecordedAccess> AccessLog::conflict(const Range& range, bool reads_conflict,
                                                  const VectorClock& seen) const {
  for (const RecordedAccess& earlier : accesses_) {
    if (!earlier.access.range.overlaps(range)) continue;
    if (!earlier.access.writes && !reads_conflict) continue;
    if (!happened_before(earlier, seen)) return earlier;
  }
  return std::nullopt;
}

void AccessLog::add(const RecordedAccess& added, const VectorClock& clock,
                    const VectorClock& host) {
  const Range& covered = added.access.range;
  std::vector<RecordedAccess> kept;
  kept.reserve(accesses_.size() + 2);
  for (RecordedAccess& earlier : accesses_) {
    if (happened_before(earlier, host)) continue;
    const bool redundant = (added.access.writes || !earlier.access.writes) &&
                           earlier.access.range.overlaps(covered) &&
                           happened_before(earlier, clock);
    if (!redundant) {
      kept.push_back(std::move(earlier));
      continue;
    }
    const Range whole = earlier.access.range;
    if (whole.begin < covered.begin) {
      kept.push_back(earlier);
      kept.back().access.range.end = covered.begin;
    }
    if (covered.end < whole.end) {
      kept.push_back(earlier);
      kept.back().access.range.begin = covered.end;
    }
  }
  kept.push_back(added);
  accesses_ = std::move(kept);
}

}  // namespace fake_cuda
