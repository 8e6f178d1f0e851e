// What the CUDA path has to tell a user, kept until somebody asks: a hook never raises for it.
//
// Thread safety: all.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

namespace mld {

class DeviceNotes {
 public:
  void add(const std::string& text) noexcept;
  void add_error(const std::string& name) noexcept;
  // What is new since the last take; nullopt when there is nothing.
  [[nodiscard]] std::optional<std::string> take();
  [[nodiscard]] std::uint64_t errors() const;
  [[nodiscard]] std::string last_error() const;

 private:
  std::atomic<bool> is_new_{false};
  mutable std::mutex mutex_;
  std::string text_;  // protected by mutex_, as are the next two
  std::uint64_t errors_ = 0;
  std::string last_error_;
};

}  // namespace mld
