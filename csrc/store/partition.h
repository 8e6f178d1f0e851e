// The write side of one partition of one attempt: pending records in, committed segments out.
//
// Used by the writer thread only. A partition is a row of segments; full, failed or spoiled, the
// step is always the same: a successor segment.
//
// INVARIANT 1: a pending record leaves `pending_` only after the commit that holds it returned, or
// when it is given up
//              and counted. Its ring slot is alive as long as it is pending, so a failed commit is
//              written again from it.
// INVARIANT 2: what open_calls_ remembers of a call is committed; what a running batch adds is
// staged apart and merged
//              after its commit, so a failed batch leaves nothing behind.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "clock.h"
#include "errors.h"
#include "ring/record.h"
#include "store/record_format.h"
#include "store/segment.h"

namespace mld {

// Rows and bytes of calls, to be counted by whoever asked.
struct Tally {
  std::uint64_t rows = 0, bytes = 0;
};

enum class CommitOutcome {
  kCommitted,   // nothing is pending any more
  kRetryLater,  // the disk is full or descriptors are short: ask again at retry_at()
  kFailed,      // given up; failure() says why
};

struct CommitResult {
  CommitOutcome outcome = CommitOutcome::kCommitted;
  Tally committed, dropped;
  std::uint64_t written_bytes = 0;  // payload
  std::uint64_t grown_bytes = 0;    // on disk
};

struct PartitionOptions {
  std::string directory;  // of the partition
  std::uint32_t rank, attempt;
  std::int64_t epoch;
  Sync sync;
  std::size_t map_bytes;
  std::chrono::nanoseconds give_up_after;  // of waiting for a full disk
  std::string home = {};                   // where sealed segments are moved to; empty: they stay
};

class Partition {
 public:
  explicit Partition(PartitionOptions options) : options_(std::move(options)) {}

  void add(const PendingRecord& record) { pending_.push_back(record); }
  void add_gap(const Gap& gap);
  // The call ends without a header: its chunks are dead weight.
  void forget_call(std::uint64_t call) {
    open_calls_.erase(call);
    doomed_calls_.erase(call);
    if (!pending_.empty()) forgotten_calls_.insert(call);  // its chunks may be among them
  }

  // Whether anything is left here that a later record may depend on.
  [[nodiscard]] bool is_blank() const noexcept {
    return segment_ == nullptr && retired_.empty() && !has_pending() && doomed_calls_.empty();
  }
  [[nodiscard]] bool has_pending() const noexcept { return !pending_.empty() || !gaps_.empty(); }
  // Ring position that must not be released yet; nullopt when nothing is pending.
  [[nodiscard]] std::optional<std::uint64_t> oldest_position() const noexcept;

  // Writes and commits all that is pending. Does not throw for reasons of storage.
  CommitResult commit(Clock::time_point now);
  [[nodiscard]] Clock::time_point retry_at() const noexcept { return retry_at_; }
  [[nodiscard]] const std::optional<StoreError>& failure() const noexcept { return failure_; }

  // Forgets what is pending and returns what was in it.
  Tally discard_pending();
  // Forgets every segment (their directory is being deleted) and what is pending. A call that is
  // open now has lost chunks; when its header comes it is counted as dropped.
  Tally drop();
  // Forces to disk what durability="process" has left in the page cache; after a failure the next
  // commit goes to a successor, since the kernel may have marked the lost pages clean.
  void sync() noexcept;
  // Seals every segment; the next record begins a new one. Throws StoreError.
  void seal();
  // The same for a partition that has committed nothing for so long, and is not in trouble.
  void seal_if_idle(Clock::time_point now, Clock::duration idle) noexcept;
  // Lets go of descriptors; the next commit takes them again.
  void close_environment() noexcept;
  [[nodiscard]] bool is_open() const noexcept { return segment_ != nullptr && segment_->is_open(); }
  [[nodiscard]] bool is_dirty() const noexcept { return is_dirty_; }

  // Copies one committed piece of a capture to `out`; false if it is not here.
  bool read_piece(std::uint64_t call, std::uint32_t capture, std::size_t piece, void* out,
                  std::size_t bytes);

 private:
  struct StagedChunk {
    ChunkRef ref;
    const PendingRecord* inlined;  // not null: goes inline if its call's header comes in this batch
  };
  // What one batch is about to make true.
  struct Staging {
    std::unordered_map<std::uint64_t, std::vector<StagedChunk>> calls;
    std::vector<std::uint64_t> finished_calls;
    std::string header_scratch, inline_scratch;  // reused from call to call
    CommitResult result;
  };

  CommitResult write_batch();
  void stage_chunk(const PendingRecord& record, Segment::Batch& batch, Staging& staging);
  void write_call(const RecordHeader& record, Segment::Batch& batch, Staging& staging);
  void write_leftovers(Segment::Batch& batch, Staging& staging);
  void make_room_to_merge(const Staging& staging);
  void merge(const Staging& staging) noexcept;  // REQUIRES: make_room_to_merge()
  [[nodiscard]] std::uint64_t pending_page_bytes() const noexcept;
  void begin_segment();
  void retire_segment() noexcept;
  void set_aside() noexcept;  // segment_, closed or sealed
  // Notes that it has to wait; false when it has waited long enough.
  bool waits_longer(Clock::time_point now) noexcept;
  CommitResult handle_failure(const StoreError& error, Clock::time_point now);
  [[nodiscard]] bool is_full(const StoreError& error) const;
  [[nodiscard]] bool is_temporary(const StoreError& error) const;
  [[nodiscard]] Segment* find_segment(std::int32_t sequence) noexcept;

  const PartitionOptions options_;
  std::vector<PendingRecord> pending_;
  std::vector<Gap> gaps_;
  std::unordered_map<std::uint64_t, std::vector<ChunkRef>> open_calls_;
  std::unordered_set<std::uint64_t> doomed_calls_;     // open when the partition was dropped
  std::unordered_set<std::uint64_t> forgotten_calls_;  // not to be written; emptied with pending_
  std::unique_ptr<Segment> segment_;  // the one written to; null before the first batch
  std::vector<std::unique_ptr<Segment>>
      retired_;  // earlier ones of this attempt, sealed if that went well
  std::uint32_t next_sequence_ = 0;
  std::uint64_t segment_disk_bytes_ = 0;  // of segment_, after its last commit
  Clock::time_point committed_at_{};      // the last time
  bool is_dirty_ = false;                 // commits that are not forced to disk yet
  // trouble
  int failures_ = 0;  // in a row
  std::optional<Clock::time_point> waiting_since_;
  Clock::time_point retry_at_{};
  std::optional<StoreError> failure_;
};

}  // namespace mld
