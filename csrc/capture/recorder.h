// The producer side of one attempt: what a hook calls. It turns a call into ring records and keeps
// the attempt's counts.
//
//   begin_call -> capture, capture, ... -> end_call | abort_call          each thread has its own
//   current call
//
// Thread safety: all methods from any thread, except those marked "writer". A hook takes no lock
// that the writer takes and, once a thread's vectors are warm, allocates nothing.
//
// A capture is copied in pieces of at most Runtime::max_piece_bytes(), each in a ring slot of its
// own, so that a tensor larger than the ring passes through it. A call becomes visible by its last
// record, which carries its description.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "errors.h"
#include "ledger.h"
#include "ring/byte_ring.h"
#include "store/partition.h"
#include "store/record_format.h"
#include "store/store.h"

namespace mld {

class Runtime;

enum class OverflowPolicy { kBlock, kDiscard, kRaise };
enum class OnError { kRaise, kWarn };

struct RecorderOptions {
  std::uint32_t attempt = 0;
  OverflowPolicy overflow = OverflowPolicy::kBlock;
  OnError on_error = OnError::kRaise;
  std::size_t ring_bytes = std::size_t{256} << 20;
  std::size_t commit_bytes = std::size_t{32} << 20;
  std::chrono::nanoseconds commit_interval = std::chrono::milliseconds(500);
  std::chrono::nanoseconds stall_timeout = std::chrono::seconds(300);
};

// What a blocking wait does around its slices of at most 50 ms: the bindings give the GIL away and
// look for signals.
class WaitHooks {
 public:
  virtual ~WaitHooks() = default;
  virtual void before_slice() {}
  virtual void after_slice() {}  // may throw; the wait ends then
};

// Bytes to copy. They are borrowed anew before each piece, since a wait may lie between two.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  [[nodiscard]] virtual const std::byte* borrow() = 0;
};

struct CaptureInfo {
  std::uint32_t column;
  const char* dtype;              // static text: the torch name
  std::uint32_t first_dim, ndim;  // in ThreadCall::dims
  std::uint32_t first_piece, pieces;
  std::uint64_t bytes;
};

struct CapturePiece {
  std::uint64_t position;  // in the ring
  std::uint64_t bytes;
};

// A thread's current call, or the last one it ended (for reading back).
struct ThreadCall {
  enum class State { kNone, kOpen, kEnded };
  enum class Fate { kStored, kDiscarded, kFailed };

  State state = State::kNone;
  Fate fate = Fate::kStored;
  LossCause cause = LossCause::kRingFull;  // when discarded
  std::uint64_t number = 0;
  std::int64_t epoch = kNoEpoch;
  std::uint32_t batch_size = 0;
  std::uint64_t bytes = 0;
  std::shared_ptr<Runtime> runtime;  // while open: another thread may close the recorder meanwhile
  std::vector<CaptureInfo> captures;
  std::vector<std::int64_t> dims;
  std::vector<CapturePiece> pieces;

  void begin(std::shared_ptr<Runtime> new_runtime, std::uint64_t new_number, std::int64_t new_epoch,
             std::uint32_t new_batch_size);
  void end(State new_state);
};

// A call that left no header in the ring: a loss to be marked, or (rows == 0) one to be forgotten.
struct LossNote {
  std::uint64_t position;  // ring head when it was noted: the writer has read the call's chunks
                           // when it is past this
  std::int64_t epoch;
  Gap gap;
};

class Recorder : public std::enable_shared_from_this<Recorder> {
 public:
  // Opens the recording side of an attempt; starts the process's runtime when it is the first.
  // Throws Error.
  static std::shared_ptr<Recorder> open(const StoreUse& store, const RecorderOptions& options);
  Recorder(std::uint32_t id, std::shared_ptr<Runtime> runtime, const StoreUse& store,
           const RecorderOptions& options);
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  [[nodiscard]] std::uint32_t id() const noexcept { return id_; }
  [[nodiscard]] const RecorderOptions& options() const noexcept { return options_; }
  [[nodiscard]] StoreState& store() const noexcept { return *store_; }
  [[nodiscard]] const Ledger& ledger() const noexcept { return ledger_; }
  [[nodiscard]] bool is_inert() const noexcept { return generation_ != process_generation(); }
  [[nodiscard]] bool is_failed() const noexcept { return failed_.load(std::memory_order_acquire); }
  [[nodiscard]] std::size_t ring_high_water_bytes() const noexcept;

  // The calling thread's open call; null when it has none. This is all that a hook outside of a
  // traced call costs.
  [[nodiscard]] ThreadCall* current_call() noexcept;
  [[nodiscard]] ThreadCall* last_call() noexcept;

  std::uint64_t begin_call(std::int64_t epoch, std::uint32_t batch_size);
  // Copies `bytes` from `source`. Throws Error(kRingOverflow, kTraceStall), and what
  // hooks.after_slice() throws.
  void capture(ThreadCall& call, std::uint32_t column, const char* dtype, const std::int64_t* dims,
               std::uint32_t ndim, std::uint64_t bytes, ByteSource& source, WaitHooks& hooks);
  // False when the call was lost (and counted). Throws as capture(), Error(kDiskBudget), and
  // Error(kTracerClosed) when close() has begun; the call stays open then.
  bool end_call(std::string_view description, std::uint32_t rows, std::uint32_t ground_truth_rows,
                WaitHooks& hooks);
  void abort_call();
  // One capture's bytes, of the thread's open or last ended call. Throws Error(kNotFound).
  std::string read_back(std::uint32_t capture, WaitHooks& hooks);

  // Waits until all calls ended before are committed. Throws Error(kTraceStall), StoreError.
  void flush(std::optional<std::chrono::nanoseconds> timeout, WaitHooks& hooks);
  // Flushes, seals, detaches. False when the deadline passed: the core is left behind then, never
  // freed.
  bool close(std::chrono::nanoseconds timeout, WaitHooks& hooks);
  // Throws the writer's failure if there is one.
  void raise_failure() const;

  // --- writer ---
  [[nodiscard]] Ledger& mutable_ledger() noexcept { return ledger_; }
  void fail(const StoreError& error);
  // Notes that lie before `position` of the ring, in order.
  void take_losses(std::uint64_t position, std::vector<LossNote>* notes);
  // Everything of this recorder before `position` is committed or counted as lost.
  void set_settled(std::uint64_t position) noexcept {
    settled_.store(position, std::memory_order_release);
  }

 private:
  using Ring = MpscByteRing<std::uint64_t>;

  // False when the call was lost instead, by the overflow policy or with its storage.
  [[nodiscard]] bool reserve(ThreadCall& call, std::size_t slot_bytes, Ring::Slot* slot,
                             WaitHooks& hooks);
  [[nodiscard]] bool reserve_slow(ThreadCall& call, std::size_t slot_bytes, Ring::Slot* slot,
                                  WaitHooks& hooks);
  void count_lost(ThreadCall& call, std::uint64_t rows);
  [[nodiscard]] bool lose(ThreadCall& call, LossCause cause) noexcept;
  void let_go();
  void wait_for_ending_calls(Clock::time_point deadline, WaitHooks& hooks);
  void check_budget(const ThreadCall& call) const;
  void note_loss(const ThreadCall& call, std::uint64_t rows);
  void note_high_water(Ring& ring) noexcept;
  // The runtime; throws Error(kTracerClosed) when there is none any more.
  [[nodiscard]] std::shared_ptr<Runtime> runtime() const;

  // constant after construction
  const std::uint32_t id_;
  const RecorderOptions options_;
  const std::uint64_t generation_ = process_generation();
  const std::shared_ptr<StoreState> store_;
  // shared
  Ledger ledger_;
  std::atomic<std::uint64_t> next_call_{0};
  std::atomic<std::uint64_t> next_row_{0};
  std::atomic<std::uint64_t> high_water_bytes_{0};
  std::atomic<std::uint64_t> settled_{0};
  std::atomic<bool> failed_{false};
  std::atomic<bool> closed_{false};
  std::atomic<std::uint32_t> ending_{
      0};  // calls between their look at closed_ and their last record
  mutable std::mutex mutex_;
  std::vector<LossNote> losses_;       // protected by mutex_
  std::optional<StoreError> failure_;  // protected by mutex_; set before failed_
  std::shared_ptr<Runtime> runtime_;   // protected by mutex_; null when closed
  StoreUse use_;                       // protected by mutex_; released when closed
};

}  // namespace mld
