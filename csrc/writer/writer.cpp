#include "writer/writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <thread>

#include "store/crc32c.h"
#include "store/files.h"

namespace mld {
namespace {

// Each open environment takes two descriptors and a map; epochs beyond these are reopened when
// their turn comes.
constexpr std::size_t kMaxOpenPartitions = 8;
constexpr std::uint64_t kGroupBytes = std::uint64_t{32} << 20;
// A copy waits for the GPU's work before it and for nothing of ours.
constexpr auto kCopyPatience = std::chrono::seconds(10);
constexpr auto kCopyPoll = std::chrono::milliseconds(1);
constexpr auto kSyncInterval = std::chrono::seconds(60);
constexpr auto kSealInterval = std::chrono::seconds(1);
constexpr auto kIdleBeforeSeal = std::chrono::seconds(5);

std::string status_json(std::uint32_t attempt, const Counters& counters) {
  const auto field = [](const char* name, std::uint64_t value) {
    return ", \"" + std::string(name) + "\": " + std::to_string(value);
  };
  return "{\"attempt\": " + std::to_string(attempt) +
         field("rows_submitted", counters.rows_submitted) +
         field("rows_committed", counters.rows_committed) +
         field("rows_discarded", counters.rows_discarded) +
         field("rows_failed", counters.rows_failed) +
         field("rows_in_flight", counters.rows_in_flight) +
         field("bytes_submitted", counters.bytes_submitted) +
         field("bytes_committed", counters.bytes_committed) +
         field("bytes_discarded", counters.bytes_discarded) +
         field("bytes_failed", counters.bytes_failed) +
         field("bytes_in_flight", counters.bytes_in_flight) + field("commits", counters.commits) +
         field("stalls", counters.stalls) + field("stall_ns", counters.stall_ns) +
         field("write_ns", counters.write_ns) + field("written_bytes", counters.written_bytes) +
         "}";
}

}  // namespace

template <class Visit>
void Writer::for_each_of(const StoreState& store, Visit visit) {
  for (auto& [id, track] : tracks_) {
    if (&track.attempt->store() == &store) visit(track);
  }
}

void Writer::attach(std::shared_ptr<AttemptState> attempt) {
  const std::uint32_t id = attempt->id();
  attempt->set_settled(ring_.read_position());
  tracks_[id].attempt = std::move(attempt);
}

void Writer::detach(std::uint32_t attempt_id) {
  drain_all();
  const auto found = tracks_.find(attempt_id);
  if (found == tracks_.end()) return;
  Track& track = found->second;
  const StoreState& store = track.attempt->store();
  std::size_t attempts_of_store = 0;
  for_each_of(store, [&](Track&) { ++attempts_of_store; });
  std::optional<StoreError> first_error;
  for (const auto& [epoch, partition] : track.partitions) {
    open_.erase(std::remove(open_.begin(), open_.end(), partition.get()), open_.end());
    const Tally left = partition->discard_pending();  // its disk never came back
    track.attempt->ledger().fail(left.rows, left.bytes);
    try {
      partition->seal();
    } catch (const StoreError& error) {
      if (!first_error && !track.attempt->is_failed())
        first_error = error;  // a failure was told already
    }
    partition->close_environment();
  }
  // A close() that was interrupted comes again, and what others publish meanwhile is not ours.
  track.attempt->set_settled(std::numeric_limits<std::uint64_t>::max());
  write_status(store, attempts_of_store > 1);
  tracks_.erase(found);
  if (first_error) throw StoreError(*first_error);
}

bool Writer::drain_group(Clock::time_point now, std::uint64_t group_bytes) {
  const bool read_some = read_group(group_bytes);
  collect_losses();
  const bool committed_some = commit_due(now);
  release_committed();
  return read_some || committed_some;
}

void Writer::drain_all() {
  const std::uint64_t target = ring_.head();  // producers may go on; they do not hold us
  const auto deadline = Clock::now() + kCopyPatience;
  for (;;) {
    const bool did_some = drain_group(Clock::now(), kGroupBytes);
    if (ring_.read_position() >= target) return;
    if (did_some) continue;
    if (!waits_for_copy_ || Clock::now() >= deadline) return;
    std::this_thread::sleep_for(kCopyPoll);
  }
}

bool Writer::read_group(std::uint64_t group_bytes) {
  Ring::Slot slot;
  std::uint64_t bytes = 0;
  bool read_some = false;
  waits_for_copy_ = false;
  while (bytes < group_bytes && ring_.peek(&slot)) {
    const CopyState copy = state_of(slot);
    if (copy == CopyState::kPending) {
      waits_for_copy_ = true;
      break;
    }
    if (!slot.abandoned) {
      const auto* header = reinterpret_cast<const RecordHeader*>(slot.data);
      try {
        take({slot.position, header}, copy);
      } catch (const std::bad_alloc&) {
        break;  // it stays in the ring, as does all behind it, until there is memory
      }
      bytes += header->payload_bytes;
    }
    ring_.advance(slot);
    read_some = true;
  }
  return read_some;
}

CopyState Writer::state_of(const Ring::Slot& slot) const noexcept {
  if (slot.abandoned) return CopyState::kArrived;
  const auto* header = reinterpret_cast<const RecordHeader*>(slot.data);
  if (header->copy_device == 0) return CopyState::kArrived;
  return copies_ == nullptr ? CopyState::kLost : copies_->state_of(*header);
}

void Writer::take(const PendingRecord& record, CopyState copy) {
  const auto found = tracks_.find(record.header->attempt);
  if (found == tracks_.end())
    return;  // its attempt is closed: it came from a call that raced with close()
  Track& track = found->second;
  if (track.attempt->is_failed()) {
    if (record.header->kind == RecordKind::kCall) {
      track.attempt->ledger().fail(record.header->rows, record.header->call_bytes);
    }
    return;
  }
  if (is_of_lost_call(track, *record.header, copy)) return;
  partition_of(track, record.header->epoch).add(record);
}

bool Writer::is_of_lost_call(Track& track, const RecordHeader& header, CopyState copy) {
  if (copy == CopyState::kLost) track.lost_calls.insert(header.call);
  if (track.lost_calls.empty() || track.lost_calls.count(header.call) == 0) return false;
  if (header.kind == RecordKind::kCall) {
    // Counted last: without memory for the rest the record is taken again.
    Partition& partition = partition_of(track, header.epoch);
    partition.forget_call(header.call);
    partition.add_gap(
        {header.call, header.call, header.rows, header.call_bytes, kDeviceErrorCause});
    track.lost_calls.erase(header.call);
    track.attempt->ledger().fail(header.rows, header.call_bytes);
  }
  return true;
}

void Writer::collect_losses() {
  for (auto& [id, each] : tracks_) {
    Track& track = each;
    track.attempt->take_losses(ring_.read_position(), [&](const LossNote& note) {
      Partition& partition = partition_of(track, note.epoch);
      for (std::uint64_t call = note.gap.first_call; call <= note.gap.last_call; ++call)
        partition.forget_call(call), track.lost_calls.erase(call);
      if (note.gap.rows != 0 && !track.attempt->is_failed()) partition.add_gap(note.gap);
    });
  }
}

bool Writer::commit_due(Clock::time_point now) {
  struct Due {
    std::uint64_t position;
    Track* track;
    Partition* partition;
  };
  std::vector<Due> due;
  for (auto& [id, track] : tracks_) {
    for (auto& [epoch, partition] : track.partitions) {
      if (!partition->has_pending() || partition->retry_at() > now) continue;
      due.push_back(
          {partition->oldest_position().value_or(ring_.read_position()), &track, partition.get()});
    }
  }
  // Oldest first, so that the tail can follow soonest.
  std::sort(due.begin(), due.end(),
            [](const Due& a, const Due& b) { return a.position < b.position; });
  for (const Due& item : due) commit(*item.track, *item.partition, now);
  return !due.empty();
}

void Writer::commit(Track& track, Partition& partition, Clock::time_point now) {
  if (!partition.has_pending()) return;  // its attempt failed with an earlier one
  make_room_for(partition);
  const auto begin = Clock::now();
  const CommitResult result = partition.commit(now);
  Ledger& ledger = track.attempt->ledger();
  if (result.outcome == CommitOutcome::kRetryLater) return;
  if (result.outcome == CommitOutcome::kFailed) return fail_track(track, &*partition.failure());
  track.attempt->store().add_disk_bytes(result.grown_bytes);
  ledger.commit(result.committed.rows, result.committed.bytes);
  if (result.dropped.rows != 0) ledger.drop(result.dropped.rows, result.dropped.bytes);
  ledger.add_commit(result.written_bytes,
                    static_cast<std::uint64_t>((Clock::now() - begin).count()));
}

// One partition's storage is beyond hope, so its attempt cannot be complete: the attempt ends here,
// counted.
void Writer::fail_track(Track& track, const StoreError* error) noexcept {
  for (const auto& [epoch, partition] : track.partitions) {
    const Tally tally = partition->discard_pending();
    track.attempt->ledger().fail(tally.rows, tally.bytes);
    partition->close_environment();
  }
  track.attempt->fail(error);
}

void Writer::give_up(const char* why) noexcept {
  std::optional<StoreError> error;
  try {
    error.emplace(EIO, std::string("the writer failed: ") + why);
  } catch (const std::bad_alloc&) {
    // Then without words.
  }
  for (auto& [id, track] : tracks_) fail_track(track, error ? &*error : nullptr);
  release_committed();
}

void Writer::release_committed() {
  std::uint64_t tail = ring_.read_position();
  for (auto& [id, track] : tracks_) {
    std::uint64_t settled = ring_.read_position();
    for (const auto& [epoch, partition] : track.partitions) {
      if (const auto oldest = partition->oldest_position()) settled = std::min(settled, *oldest);
    }
    track.attempt->set_settled(settled);
    tail = std::min(tail, settled);
  }
  ring_.release(tail);
}

Partition& Writer::partition_of(Track& track, std::int64_t epoch) {
  if (const auto found = track.partitions.find(epoch); found != track.partitions.end())
    return *found->second;
  const AttemptState& attempt = *track.attempt;
  const StoreOptions& store = attempt.store().options();
  // Made before it has a place: without memory there must not be an empty place.
  auto partition = std::make_unique<Partition>(PartitionOptions{
      attempt.store().partition_directory(epoch), store.rank, attempt.options().attempt, epoch,
      store.sync, store.segment_bytes, attempt.options().stall_timeout,
      attempt.store().is_staged() ? attempt.store().home_directory(epoch) : std::string()});
  return *track.partitions.emplace(epoch, std::move(partition)).first->second;
}

void Writer::make_room_for(Partition& partition) {
  open_.erase(std::remove(open_.begin(), open_.end(), &partition), open_.end());
  while (open_.size() >= kMaxOpenPartitions) {
    open_.front()->close_environment();
    open_.erase(open_.begin());
  }
  open_.push_back(&partition);
}

void Writer::seal_staged(Clock::time_point now) {
  if (now - last_seal_ < kSealInterval) return;
  last_seal_ = now;
  for (auto& [id, track] : tracks_) {
    if (!track.attempt->store().is_staged()) continue;
    for (auto& [epoch, partition] : track.partitions) partition->seal_if_idle(now, kIdleBeforeSeal);
  }
}

void Writer::maintain(Clock::time_point now) {
  seal_staged(now);
  if (now - last_sync_ < kSyncInterval) return;
  last_sync_ = now;
  for (auto& [id, track] : tracks_) {
    for (auto& [epoch, partition] : track.partitions) {
      const bool was_open = partition->is_open();
      partition->sync();
      if (!was_open) partition->close_environment();
    }
  }
}

std::optional<Clock::time_point> Writer::next_retry() const {
  std::optional<Clock::time_point> earliest;
  for (const auto& [id, track] : tracks_) {
    for (const auto& [epoch, partition] : track.partitions) {
      if (!partition->has_pending()) continue;
      if (!earliest || partition->retry_at() < *earliest) earliest = partition->retry_at();
    }
  }
  return earliest;
}

DroppedRows Writer::drop_epoch(StoreState& store, std::int64_t epoch,
                               std::optional<std::uint32_t> attempt) {
  const auto is_meant = [&](const Track& track, std::int64_t of_partition) {
    return of_partition == epoch && (!attempt || track.attempt->options().attempt == *attempt);
  };
  drop_partitions(store, is_meant);
  const DroppedRows dropped = store.drop_epoch(epoch, attempt);
  forget_blank_partitions(store, is_meant);
  return dropped;
}

void Writer::drop_all_epochs(StoreState& store) {
  const auto is_meant = [](const Track&, std::int64_t) { return true; };
  drop_partitions(store, is_meant);
  store.drop_all();
  forget_blank_partitions(store, is_meant);
}

template <class IsMeant>
void Writer::drop_partitions(const StoreState& store, IsMeant is_meant) {
  drain_all();
  for_each_of(store, [&](Track& track) {
    for (const auto& [epoch, partition] : track.partitions) {
      if (!is_meant(track, epoch)) continue;
      const Tally tally = partition->drop();
      if (tally.rows != 0) track.attempt->ledger().drop(tally.rows, tally.bytes);
    }
  });
  release_committed();
}

// After their files are gone: a partition that could not be deleted goes on with its next segment.
// So does one of which calls are open now, since it must remember that these lost chunks.
template <class IsMeant>
void Writer::forget_blank_partitions(const StoreState& store, IsMeant is_meant) {
  for_each_of(store, [&](Track& track) {
    for (auto it = track.partitions.begin(); it != track.partitions.end();) {
      const auto here = it++;
      if (!is_meant(track, here->first) || !here->second->is_blank()) continue;
      open_.erase(std::remove(open_.begin(), open_.end(), here->second.get()), open_.end());
      track.partitions.erase(here);
    }
  });
}

bool Writer::read_piece(std::uint32_t attempt_id, std::int64_t epoch, std::uint64_t call,
                        std::uint32_t capture, std::size_t piece, const CapturePiece& where,
                        void* out) {
  if (where.position >=
      ring_.tail()) {  // only this thread releases, so it stays there while we copy
    std::memcpy(out, ring_.at(where.position) + sizeof(RecordHeader), where.bytes);
    return true;
  }
  const auto track = tracks_.find(attempt_id);
  if (track == tracks_.end()) return false;
  const auto partition = track->second.partitions.find(epoch);
  if (partition == track->second.partitions.end()) return false;
  const bool was_open = partition->second->is_open();
  const bool found = partition->second->read_piece(call, capture, piece, out, where.bytes);
  if (!was_open) partition->second->close_environment();
  return found;
}

bool Writer::write_status(const StoreState& store, bool recording) noexcept try {
  std::string attempts;
  for_each_of(store, [&](Track& track) {
    if (!attempts.empty()) attempts += ", ";
    attempts += status_json(track.attempt->options().attempt, track.attempt->ledger().snapshot());
  });
  std::string text = "{\"format_version\": " + std::to_string(kFormatVersion) +
                     ", \"pid\": " + std::to_string(getpid()) +
                     ", \"recording\": " + (recording ? "true" : "false") + ", \"attempts\": [" +
                     attempts + "]";
  text += ", \"crc32c\": " + std::to_string(crc32c(text.data(), text.size())) + "}";
  // Written in place and padded: one small write into the page cache, where a rename would cost the
  // journal each time. A reader that meets a half-written one sees it by the checksum and reads
  // again.
  text.resize((text.size() + 4096) / 4096 * 4096, ' ');
  text.back() = '\n';
  const std::string path = store.directory() + "/" + kStatusFile;
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  if (file < 0) return false;
  // An earlier one may have been longer.
  const bool is_written =
      pwrite(file, text.data(), text.size(), 0) == static_cast<ssize_t>(text.size()) &&
      ftruncate(file, static_cast<off_t>(text.size())) == 0;
  close(file);
  return is_written;
} catch (const std::bad_alloc&) {
  return false;
}

bool Writer::answer_requests() noexcept {
  bool answered = false;
  try {
    for (auto& [id, track] : tracks_) {
      const StoreState& store = track.attempt->store();
      const std::string request = store.directory() + "/" + kFlushRequestFile;
      const std::string taken = store.directory() + "/" + kTakenRequestFile;
      // A request that comes from here on is another one; one that was taken, and whose status
      // could not be written, is still there.
      if (rename(request.c_str(), taken.c_str()) != 0 && access(taken.c_str(), F_OK) != 0) continue;
      if (!write_status(store, true)) continue;
      unlink(taken.c_str());
      answered = true;
    }
  } catch (const std::bad_alloc&) {
    // As above: it was not taken.
  }
  return answered;
}

void Writer::write_changed_status() noexcept {
  for (auto& [id, track] : tracks_) {
    const Counters counters = track.attempt->ledger().snapshot();
    const std::uint64_t rows = counters.rows_submitted + counters.rows_committed +
                               counters.rows_discarded + counters.rows_failed;
    if (rows == track.rows_in_status) continue;
    if (write_status(track.attempt->store(), true)) track.rows_in_status = rows;
  }
}

}  // namespace mld
