// The core's exception family. Cold paths throw these; bindings/bind_errors.cpp alone turns them
// into `ml_debugger.errors`. The hot path returns enums and never throws.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace mld {

// One value for each class of `ml_debugger.errors` that the core may raise.
enum class ErrorKind {
  kInvalidInput,
  kInvalidType,
  kNotFound,
  kTracerClosed,
  kTraceInUse,
  kStorage,
  kDiskBudget,
  kCorruptData,
  kRingOverflow,
  kTraceStall,
  kStreamCapture,
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message, std::string hint = {})
      : std::runtime_error(message), kind_(kind), hint_(std::move(hint)) {}

  [[nodiscard]] ErrorKind kind() const noexcept { return kind_; }
  [[nodiscard]] const std::string& hint() const noexcept { return hint_; }

 private:
  ErrorKind kind_;
  std::string hint_;
};

// A failed call of LMDB or the filesystem. `code` is an errno or an MDB_* value, so that the writer
// can choose a remedy.
class StoreError : public Error {
 public:
  StoreError(int code, const std::string& message, std::string hint = {})
      : Error(ErrorKind::kStorage, message, std::move(hint)), code_(code) {}

  [[nodiscard]] int code() const noexcept { return code_; }

 private:
  int code_;
};

}  // namespace mld
