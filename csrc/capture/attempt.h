// What producers and the writer share of one attempt: its options, its counts, what was lost, how
// far it is settled, why it failed. It moves no bytes.
//
// Thread safety: all methods from any thread, except those marked "writer".
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "device/device_stager.h"
#include "errors.h"
#include "ledger.h"
#include "store/record_format.h"
#include "store/store.h"

namespace mld {

enum class OverflowPolicy { kBlock, kDiscard, kRaise };
enum class OnError { kRaise, kWarn };

struct RecorderOptions {
  std::uint32_t attempt = 0;
  OverflowPolicy overflow = OverflowPolicy::kBlock;
  OnError on_error = OnError::kRaise;
  std::size_t ring_bytes = std::size_t{256} << 20;
  DeviceOptions device;
  std::size_t commit_bytes = std::size_t{32} << 20;
  std::chrono::nanoseconds commit_interval = std::chrono::milliseconds(500);
  std::chrono::nanoseconds stall_timeout = std::chrono::seconds(300);
};

// A call that left no header in the ring: a loss to be marked, or (rows == 0) one to be forgotten.
struct LossNote {
  std::uint64_t
      position;  // ring head when it was noted: past it, the writer has read the call's chunks
  std::int64_t epoch;
  Gap gap;
};

class AttemptState {
 public:
  AttemptState(std::uint32_t id, const StoreUse& store, const RecorderOptions& options)
      : id_(id), options_(options), store_(store.state()), use_(store) {}
  AttemptState(const AttemptState&) = delete;
  AttemptState& operator=(const AttemptState&) = delete;

  // Names the attempt in the ring; unique in the process.
  [[nodiscard]] std::uint32_t id() const noexcept { return id_; }
  [[nodiscard]] const RecorderOptions& options() const noexcept { return options_; }
  [[nodiscard]] StoreState& store() const noexcept { return *store_; }
  [[nodiscard]] std::shared_ptr<StoreState> shared_store() const noexcept { return store_; }
  [[nodiscard]] Ledger& ledger() noexcept { return ledger_; }
  [[nodiscard]] const Ledger& ledger() const noexcept { return ledger_; }

  void note_loss(const LossNote& note);
  // Ring position before which everything of this attempt is committed or counted as lost.
  [[nodiscard]] std::uint64_t settled() const noexcept {
    return settled_.load(
        std::memory_order_acquire);  // PAIRS WITH set_settled(): the counts that go with it
  }
  [[nodiscard]] bool is_failed() const noexcept { return failed_.load(std::memory_order_acquire); }
  // Throws the failure if there is one.
  void raise_failure() const;
  // Gives the share in the store back: the last one of the process unlocks the trace.
  void release_store();

  // --- writer ---
  void set_settled(std::uint64_t position) noexcept {
    settled_.store(position, std::memory_order_release);
  }
  // `error` is null where there was no memory for one.
  void fail(const StoreError* error) noexcept;
  // Gives out the notes that lie before `position` of the ring, in order. One that `take` throws at
  // stays, with those behind it.
  void take_losses(std::uint64_t position, const std::function<void(const LossNote&)>& take);

 private:
  // constant after construction
  const std::uint32_t id_;
  const RecorderOptions options_;
  const std::shared_ptr<StoreState> store_;
  // shared
  Ledger ledger_;
  std::atomic<std::uint64_t> settled_{0};
  std::atomic<bool> failed_{false};
  mutable std::mutex mutex_;
  std::vector<LossNote> losses_;       // protected by mutex_
  std::optional<StoreError> failure_;  // protected by mutex_; set before failed_
  StoreUse use_;                       // protected by mutex_
};

}  // namespace mld
