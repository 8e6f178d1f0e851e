#include "store/partition.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <new>

#include "store/crc32c.h"
#include "store/files.h"

namespace mld {
namespace {

constexpr int kMaxFailuresInARow = 3;
constexpr auto kRetryPause = std::chrono::milliseconds(100);
// Free beyond what was to be written, and a failed write is not taken for a full disk.
constexpr std::uint64_t kFullDiskSlackBytes = std::uint64_t{1} << 20;

bool is_permanent(int code) {
  return code == EROFS || code == EFBIG || code == EACCES || code == EPERM;
}

}  // namespace

void Partition::add_gap(const Gap& gap) {
  // Losses come in runs: a run is one gap, so an overrun of hours is one record.
  if (gaps_.empty() || !gaps_.back().append(gap)) gaps_.push_back(gap);
}

std::optional<std::uint64_t> Partition::oldest_position() const noexcept {
  if (pending_.empty()) return std::nullopt;
  return pending_.front().position;
}

CommitResult Partition::commit(Clock::time_point now) {
  for (;;) {
    try {
      CommitResult result = write_batch();
      failures_ = 0;
      waiting_since_.reset();
      committed_at_ = now;
      return result;
    } catch (const std::bad_alloc&) {
      if (CommitResult result; waits_longer(now)) {
        result.outcome = CommitOutcome::kRetryLater;
        return result;
      }
      return handle_failure(StoreError(ENOMEM, "out of memory while writing"), now);
    } catch (const StoreError& error) {
      const bool segment_was_full =
          error.code() == MDB_MAP_FULL && segment_ != nullptr && segment_->totals().calls != 0;
      if (segment_was_full) {
        retire_segment();
        continue;
      }
      CommitResult result = handle_failure(error, now);
      if (result.outcome != CommitOutcome::kCommitted) return result;
    }
  }
}

// kCommitted here means: write again, into a successor.
CommitResult Partition::handle_failure(const StoreError& error, Clock::time_point now) {
  CommitResult result;
  if (is_temporary(error)) {
    result.outcome = CommitOutcome::kRetryLater;
    if (waits_longer(now)) return result;
  } else if (!is_permanent(error.code()) && ++failures_ < kMaxFailuresInARow) {
    retire_segment();
    return result;
  }
  failure_ =
      is_full(error)
          ? StoreError(ENOSPC, "the disk of " + options_.directory + " is full: " + error.what(),
                       "free disk space, or choose another TracerConfig.data_dir")
          : error;
  result.outcome = CommitOutcome::kFailed;
  return result;
}

bool Partition::waits_longer(Clock::time_point now) noexcept {
  if (!waiting_since_) waiting_since_ = now;
  retry_at_ = now + kRetryPause;
  return now - *waiting_since_ < options_.give_up_after;
}

// LMDB reports a short write, which is what a full disk gives, as EIO; only the filesystem can tell
// the two apart.
bool Partition::is_full(const StoreError& error) const {
  if (error.code() == ENOSPC || error.code() == EDQUOT) return true;
  return error.code() == EIO &&
         free_bytes_at(options_.directory) < pending_page_bytes() + kFullDiskSlackBytes;
}

bool Partition::is_temporary(const StoreError& error) const {
  const int code = error.code();
  return code == EMFILE || code == ENFILE || code == ENOMEM || is_full(error);
}

std::uint64_t Partition::pending_page_bytes() const noexcept {
  std::uint64_t pages = 16 + gaps_.size();  // the trees' own
  for (const PendingRecord& record : pending_)
    pages += (record.header->payload_bytes + kPageHeaderBytes) / kPageBytes + 2;
  return pages * kPageBytes;
}

void Partition::begin_segment() {
  const SegmentIdentity identity{options_.rank, options_.attempt, next_sequence_, options_.epoch};
  const std::string directory =
      options_.directory + "/" + segment_name(options_.attempt, next_sequence_);
  // What has piled up behind a full disk may be more than an ordinary segment takes.
  const std::size_t map_bytes = std::max<std::size_t>(
      options_.map_bytes, pending_page_bytes() / kPageBytes * 5 / 4 * kPageBytes);
  try {
    std::string home;
    if (!options_.home.empty()) {
      make_directories(options_.home);  // readers begin there
      touch(options_.home);
      home = options_.home + directory.substr(directory.rfind('/'));
    }
    segment_ =
        std::make_unique<Segment>(directory, identity, options_.sync, map_bytes, std::move(home));
  } catch (...) {
    // Half a segment must not stay: the next try would find the name taken.
    try {
      remove_tree(directory);
    } catch (const StoreError&) {
      ++next_sequence_;
    }
    throw;
  }
  ++next_sequence_;
  segment_disk_bytes_ = 0;
}

void Partition::retire_segment() noexcept {
  if (segment_ == nullptr) return;
  try {
    segment_->seal();
  } catch (const std::exception&) {
    // It stays unsealed, which is true: readers take its lock file then.
    segment_->close();
  }
  set_aside();
}

void Partition::set_aside() noexcept {
  try {
    retired_.push_back(std::move(segment_));
  } catch (const std::bad_alloc&) {
    segment_.reset();  // then what is in it cannot be read back by the running call
  }
}

CommitResult Partition::write_batch() {
  if (segment_ != nullptr && !segment_->has_room_for(pending_page_bytes())) retire_segment();
  if (segment_ == nullptr) begin_segment();
  Staging staging;
  Segment::Batch batch(*segment_);
  for (const PendingRecord& record : pending_) {
    if (record.header->kind == RecordKind::kChunk) {
      stage_chunk(record, batch, staging);
    } else {
      write_call(*record.header, batch, staging);
    }
  }
  write_leftovers(batch, staging);
  for (const Gap& gap : gaps_) {
    encode_gap(gap, &staging.header_scratch);
    batch.put_header(gap.first_call, staging.header_scratch);
    batch.totals().discarded_rows += gap.rows;
  }
  make_room_to_merge(staging);
  batch.commit();
  // Nothing may fail from here on, or the batch would be written again.
  const std::uint64_t disk_bytes = segment_->disk_bytes();
  staging.result.grown_bytes = disk_bytes - std::min(disk_bytes, segment_disk_bytes_);
  segment_disk_bytes_ = disk_bytes;
  merge(staging);
  pending_.clear();
  forgotten_calls_.clear();
  gaps_.clear();
  is_dirty_ = options_.sync == Sync::kOnRequest;
  return staging.result;
}

void Partition::stage_chunk(const PendingRecord& record, Segment::Batch& batch, Staging& staging) {
  const RecordHeader& header = *record.header;
  if (doomed_calls_.count(header.call) != 0 || forgotten_calls_.count(header.call) != 0) return;
  const std::string_view payload = header.payload();
  const bool may_inline = payload.size() <= kInlineBytes;
  if (!may_inline) batch.append_run(record.position, payload);
  const ChunkRef ref{header.capture, static_cast<std::int32_t>(segment_->sequence()),
                     record.position, payload.size(), crc32c(payload.data(), payload.size())};
  staging.calls[header.call].push_back({ref, may_inline ? &record : nullptr});
  staging.result.written_bytes += payload.size();
}

void Partition::write_call(const RecordHeader& record, Segment::Batch& batch, Staging& staging) {
  const Tally tally{record.rows, record.call_bytes};
  staging.finished_calls.push_back(record.call);
  if (doomed_calls_.count(record.call) != 0) {
    staging.result.dropped.rows += tally.rows;
    staging.result.dropped.bytes += tally.bytes;
    return;
  }
  std::vector<ChunkRef> chunks;
  if (const auto open = open_calls_.find(record.call); open != open_calls_.end())
    chunks = open->second;
  staging.inline_scratch.clear();
  for (StagedChunk& staged : staging.calls[record.call]) {
    if (staged.inlined != nullptr) {
      staged.ref.segment = ChunkRef::kInline;
      staged.ref.key = staging.inline_scratch.size();
      staging.inline_scratch.append(staged.inlined->header->payload());
    }
    chunks.push_back(staged.ref);
  }
  staging.calls.erase(record.call);
  const CallIdentity identity{options_.rank,   options_.attempt, record.call,
                              record.epoch,    record.rows,      record.ground_truth_rows,
                              record.first_row};
  encode_call(identity, chunks, record.payload(), staging.inline_scratch, &staging.header_scratch);
  batch.put_header(record.call, staging.header_scratch);
  SegmentTotals& totals = batch.totals();
  totals.rows += record.rows;
  totals.ground_truth_rows += record.ground_truth_rows;
  totals.calls += 1;
  totals.payload_bytes += record.call_bytes;
  staging.result.committed.rows += tally.rows;
  staging.result.committed.bytes += tally.bytes;
}

// Small chunks whose call goes on: they become ordinary chunks, so that their ring slots can be
// released.
void Partition::write_leftovers(Segment::Batch& batch, Staging& staging) {
  for (auto& [call, chunks] : staging.calls) {
    for (StagedChunk& staged : chunks) {
      if (staged.inlined == nullptr) continue;
      batch.insert_chunk(staged.ref.key, staged.inlined->header->payload());
      staged.inlined = nullptr;
    }
  }
}

void Partition::make_room_to_merge(const Staging& staging) {
  for (const auto& [call, chunks] : staging.calls) {
    auto& open = open_calls_[call];
    open.reserve(open.size() + chunks.size());
  }
}

void Partition::merge(const Staging& staging) noexcept {
  for (const std::uint64_t call : staging.finished_calls) {
    open_calls_.erase(call);
    doomed_calls_.erase(call);
  }
  for (const auto& [call, chunks] : staging.calls) {
    auto& open = open_calls_.find(call)->second;
    for (const StagedChunk& staged : chunks) open.push_back(staged.ref);
  }
}

Tally Partition::discard_pending() {
  Tally tally;
  for (const PendingRecord& record : pending_) {
    if (record.header->kind != RecordKind::kCall) continue;
    tally.rows += record.header->rows;
    tally.bytes += record.header->call_bytes;
  }
  pending_.clear();
  forgotten_calls_.clear();
  gaps_.clear();
  return tally;
}

Tally Partition::drop() {
  for (const auto& [call, chunks] : open_calls_) doomed_calls_.insert(call);
  for (const PendingRecord& record : pending_) {
    if (record.header->kind == RecordKind::kChunk) doomed_calls_.insert(record.header->call);
  }
  for (const PendingRecord& record : pending_) {
    if (record.header->kind == RecordKind::kCall) doomed_calls_.erase(record.header->call);
  }
  for (const std::uint64_t call : forgotten_calls_) doomed_calls_.erase(call);
  open_calls_.clear();
  segment_.reset();
  retired_.clear();
  is_dirty_ = false;
  return discard_pending();
}

void Partition::sync() noexcept {
  if (!is_dirty_ || segment_ == nullptr) return;
  is_dirty_ = false;
  try {
    segment_->sync();
  } catch (const std::exception&) {
    segment_->close();
    set_aside();
  }
}

void Partition::seal() {
  if (segment_ == nullptr) return;
  segment_->seal();
  set_aside();
  is_dirty_ = false;
}

void Partition::seal_if_idle(Clock::time_point now, Clock::duration idle) noexcept {
  if (segment_ == nullptr || has_pending() || now - committed_at_ < idle) return;
  retire_segment();
  is_dirty_ = false;
}

void Partition::close_environment() noexcept {
  if (pending_.empty()) pending_.shrink_to_fit();  // it may be long until this epoch's next record
  if (segment_ != nullptr) segment_->close();
  for (const auto& segment : retired_) segment->close();
}

Segment* Partition::find_segment(std::int32_t sequence) noexcept {
  const auto matches = [sequence](const std::unique_ptr<Segment>& segment) {
    return segment != nullptr && static_cast<std::int32_t>(segment->sequence()) == sequence;
  };
  if (matches(segment_)) return segment_.get();
  const auto found = std::find_if(retired_.begin(), retired_.end(), matches);
  return found == retired_.end() ? nullptr : found->get();
}

bool Partition::read_piece(std::uint64_t call, std::uint32_t capture, std::size_t piece, void* out,
                           std::size_t bytes) {
  std::string stored;
  std::string_view inline_bytes;
  std::vector<ChunkRef> chunks;
  if (const auto open = open_calls_.find(call); open != open_calls_.end()) {
    chunks = open->second;
  } else {
    if (segment_ != nullptr) stored = segment_->read_header(call);
    for (auto it = retired_.rbegin(); stored.empty() && it != retired_.rend(); ++it)
      stored = (*it)->read_header(call);
    if (!header_is_sound(stored)) return false;
    DecodedHeader header = decode_header(stored);
    inline_bytes = header.inline_bytes;
    chunks = std::move(header.chunks);
  }
  for (const ChunkRef& chunk : chunks) {
    if (chunk.capture != capture || piece-- != 0) continue;
    if (chunk.bytes != bytes) return false;
    if (chunk.segment != ChunkRef::kInline) {
      Segment* segment = find_segment(chunk.segment);
      return segment != nullptr && segment->read_chunk(chunk.key, out, bytes);
    }
    std::memcpy(out, inline_bytes.data() + chunk.key, bytes);
    return true;
  }
  return false;
}

}  // namespace mld
