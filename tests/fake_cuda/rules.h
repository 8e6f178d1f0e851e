// The rules that the fake checks, and the log of those that were broken. Ids are stable: tests name
// them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fake_cuda {

enum class Rule : std::size_t {
  kUnorderedRead,
  kUnorderedWrite,
  kHostReadTooEarly,
  kHostWriteTooEarly,
  kHostRangeInUse,
  kHostReleasePending,
  kFreeWhilePending,
  kUseAfterFree,
  kBadAddress,
  kUnrecordedEvent,
  kDestroyedHandle,
  kUnknownHandle,
  kContextMismatch,
  kNoContext,
  kContextCreated,
  kOverRelease,
  kInitCalled,
  kOldAbi,
  kCallInHostFunction,
  kUnsafeWhileCapturing,
  kEnqueueOnCapturing,
  kQueryOfCaptured,
  kLegacyWhileCapturing,
  kContextLeftChanged,
  kCaptureModeLeftChanged,
  kHostWaitInCallee,
  kEndlessWait,
  kLeak,
  kPageableCopy,    // warning
  kBlockingStream,  // warning
  kCount,
};

struct RuleText {
  const char* id;
  bool is_warning;     // legal, but slow
  const char* source;  // where NVIDIA says so
};

const RuleText& text_of(Rule rule);

class ViolationLog {
 public:
  void report(Rule rule, const std::string& detail);
  // One line each, "id: detail [source]"; the text stops after kMaxLines, the counts do not.
  [[nodiscard]] std::string text(bool warnings) const;
  [[nodiscard]] std::uint64_t count(Rule rule) const {
    return counts_[static_cast<std::size_t>(rule)];
  }
  void clear();

 private:
  static constexpr std::size_t kMaxLines = 50;
  struct Line {
    Rule rule;
    std::string detail;
  };
  std::array<std::uint64_t, static_cast<std::size_t>(Rule::kCount)> counts_{};
  std::vector<Line> lines_;
};

}  // namespace fake_cuda
