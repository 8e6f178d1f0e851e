// Happens-before as vector clocks (Mattern, "Virtual Time and Global States of Distributed
// Systems", 1989): one component for each stream, counting the operations enqueued on it. A clock
// names a set of operations that is closed under "must have finished before".
//
// Not a lock and not atomic: every clock is read and written under the driver's mutex.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fake_cuda {

class VectorClock {
 public:
  [[nodiscard]] std::uint64_t of(std::size_t actor) const {
    return actor < counts_.size() ? counts_[actor] : 0;
  }
  void set(std::size_t actor, std::uint64_t count) {
    if (actor >= counts_.size()) counts_.resize(actor + 1);
    counts_[actor] = count;
  }
  void join(const VectorClock& other) {
    if (other.counts_.size() > counts_.size()) counts_.resize(other.counts_.size());
    for (std::size_t i = 0; i < other.counts_.size(); ++i) {
      counts_[i] = std::max(counts_[i], other.counts_[i]);
    }
  }
  [[nodiscard]] bool includes(const VectorClock& other) const {
    for (std::size_t i = 0; i < other.counts_.size(); ++i) {
      if (of(i) < other.counts_[i]) return false;
    }
    return true;
  }

 private:
  std::vector<std::uint64_t> counts_;
};

}  // namespace fake_cuda
