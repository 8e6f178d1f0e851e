// The ring's consumer: drain, group, commit, release. Plain functions without a thread of their
// own, so that a test can step them; Runtime calls them from its thread.
//
// INVARIANT: the ring's tail never passes a record that is pending in a partition. It moves over
// the contiguous prefix whose records are committed or counted as lost.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "capture/attempt.h"
#include "capture/thread_call.h"
#include "ring/byte_ring.h"
#include "ring/copy_watch.h"
#include "store/partition.h"

namespace mld {

class Writer {
 public:
  using Ring = MpscByteRing<std::uint64_t>;

  // Without a watch the ring holds no records that wait for a copy.
  explicit Writer(Ring& ring, CopyWatch* copies = nullptr) : ring_(ring), copies_(copies) {}

  void attach(std::shared_ptr<AttemptState> attempt);
  // Commits what there is, seals the attempt's segments and forgets it. Throws StoreError if
  // sealing failed.
  void detach(std::uint32_t attempt_id);
  [[nodiscard]] bool has_attempts() const noexcept { return !tracks_.empty(); }

  // Reads up to `group_bytes` from the ring and commits what is due. False when there was nothing
  // to do.
  bool drain_group(Clock::time_point now, std::uint64_t group_bytes);
  // Until all that is published now is read, and every partition is committed or waits for its
  // disk. Waits for copies that are on their way, but not for ever.
  void drain_all();
  // Whether the next record cannot be read before its copy has arrived.
  [[nodiscard]] bool waits_for_copy() const noexcept { return waits_for_copy_; }
  // Periodic work: durability="process" is synced every minute; what is staged is sealed when its
  // epoch rests, so that it can be moved.
  void maintain(Clock::time_point now);
  // When a partition wants to be tried again; nullopt when none waits.
  [[nodiscard]] std::optional<Clock::time_point> next_retry() const;

  DroppedRows drop_epoch(StoreState& store, std::int64_t epoch,
                         std::optional<std::uint32_t> attempt);
  void drop_all_epochs(StoreState& store);
  // Copies one piece of a capture, from the ring or from its segment; false if it is gone.
  bool read_piece(std::uint32_t attempt_id, std::int64_t epoch, std::uint64_t call,
                  std::uint32_t capture, std::size_t piece, const CapturePiece& where, void* out);
  // Ends every attempt, counted: the writer itself cannot go on with what is pending.
  void give_up(const char* why) noexcept;
  // The store's status file; whether it could be written. Never throws, since it only informs.
  bool write_status(const StoreState& store, bool recording) noexcept;
  // The same for every store whose counters have moved since.
  void write_changed_status() noexcept;
  // Whether somebody in another process asks a store for its counters and a commit. The request is
  // taken, the status written, and then the taken one deleted: who asked and finds neither knows
  // the status for a newer one.
  bool answer_requests() noexcept;

 private:
  using Partitions = std::map<std::int64_t, std::unique_ptr<Partition>>;  // by epoch
  // What the writer keeps of one attempt.
  struct Track {
    std::shared_ptr<AttemptState> attempt;
    Partitions partitions;
    std::set<std::uint64_t> lost_calls;  // open ones with a copy that never came
    std::uint64_t rows_in_status = 0;    // moved since, if it differs
  };

  bool read_group(std::uint64_t group_bytes);
  [[nodiscard]] CopyState state_of(const Ring::Slot& slot) const noexcept;
  void take(const PendingRecord& record, CopyState copy);
  // Whether the record belongs to a call that cannot be complete; when it ends, the call is counted
  // and leaves a gap.
  bool is_of_lost_call(Track& track, const RecordHeader& header, CopyState copy);
  void collect_losses();
  bool commit_due(Clock::time_point now);
  void commit(Track& track, Partition& partition, Clock::time_point now);
  void seal_staged(Clock::time_point now);
  void fail_track(Track& track, const StoreError* error) noexcept;
  void release_committed();
  Partition& partition_of(Track& track, std::int64_t epoch);
  template <class IsMeant>
  void drop_partitions(const StoreState& store, IsMeant is_meant);
  template <class IsMeant>
  void forget_blank_partitions(const StoreState& store, IsMeant is_meant);
  void make_room_for(Partition& partition);
  template <class Visit>
  void for_each_of(const StoreState& store, Visit visit);

  Ring& ring_;
  CopyWatch* const copies_;
  bool waits_for_copy_ = false;
  std::map<std::uint32_t, Track> tracks_;  // by attempt id
  std::vector<Partition*> open_;           // with open environments, least recently used first
  Clock::time_point last_sync_ = Clock::now();
  Clock::time_point last_seal_ = Clock::now();
};

}  // namespace mld
