// The ring's memory: anonymous, prefaulted, not inherited by forked children. It knows nothing of
// slots.
#pragma once

#include <cstddef>

namespace mld {

class Arena {
 public:
  // Maps and prefaults `bytes`, rounded up to huge pages when that is little. Throws Error when
  // memory is refused.
  explicit Arena(std::size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
  // The memory stays until the process ends: somebody may still write to it.
  void leak() noexcept { is_leaked_ = true; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  bool is_leaked_ = false;
};

}  // namespace mld
