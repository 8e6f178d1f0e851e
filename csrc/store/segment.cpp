#include "store/segment.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <cstdio>
#include <cstring>
#include <optional>
#include <utility>

#include "ring/record.h"
#include "store/early_write_back.h"
#include "store/files.h"

namespace mld {
namespace {

MDB_val value_of(std::string_view bytes) { return {bytes.size(), const_cast<char*>(bytes.data())}; }
MDB_val value_of(Key& key) { return {key.size(), key.data()}; }
std::string_view view_of(const MDB_val& value) {
  return {static_cast<const char*>(value.mv_data), value.mv_size};
}

std::string segment_json(const SegmentIdentity& identity, Sync sync) {
  const std::string epoch = identity.epoch == kNoEpoch ? "null" : std::to_string(identity.epoch);
  return "{\"format_version\": " + std::to_string(kFormatVersion) +
         ", \"rank\": " + std::to_string(identity.rank) + ", \"epoch\": " + epoch +
         ", \"attempt\": " + std::to_string(identity.attempt) +
         ", \"sequence\": " + std::to_string(identity.sequence) + ", \"durability\": \"" +
         (sync == Sync::kEveryCommit ? "power" : "process") + "\", \"boot_id\": \"" + boot_id() +
         "\"}\n";
}

std::string sealed_json(const SegmentTotals& totals) {
  return "{\"format_version\": " + std::to_string(kFormatVersion) +
         ", \"rows\": " + std::to_string(totals.rows) +
         ", \"ground_truth_rows\": " + std::to_string(totals.ground_truth_rows) +
         ", \"calls\": " + std::to_string(totals.calls) + "}\n";
}

}  // namespace

std::string segment_name(std::uint32_t attempt, std::uint32_t sequence) {
  char name[40];
  std::snprintf(name, sizeof name, "a%05u-s%05u", attempt, sequence);
  return name;
}

std::string partition_name(std::int64_t epoch) {
  return epoch == kNoEpoch ? std::string("epoch-none") : "epoch-" + std::to_string(epoch);
}

Segment::Segment(std::string directory, const SegmentIdentity& identity, Sync sync,
                 std::size_t map_bytes, std::string home)
    : directory_(std::move(directory)),
      home_(std::move(home)),
      identity_(identity),
      sync_(sync),
      map_bytes_(map_bytes) {
  make_directories(directory_);
  // The environment comes first: a directory with segment.json is always one that can be opened.
  environment_ = Environment::open(directory_, Access::kCreate, sync_, map_bytes_);
  map_bytes_ = environment_->map_bytes();
  // In both modes: a sealed segment survives a power cut, so what leads to it must.
  replace_file(path(kSegmentFile), segment_json(identity_, sync_));
  // LMDB never syncs directories; until every level is, a power cut may take the whole segment.
  const std::string partition = directory_.substr(0, directory_.rfind('/'));
  sync_directory(partition);
  sync_directory(partition.substr(0, partition.rfind('/')));
}

bool Segment::has_room_for(std::uint64_t bytes) const noexcept {
  const std::uint64_t margin = map_bytes_ / 16;
  return used_bytes_ + bytes + margin <= map_bytes_;
}

std::uint64_t Segment::disk_bytes() const noexcept {
  int descriptor = -1;
  struct stat status{};
  if (mdb_env_get_fd(environment_->get(), &descriptor) != MDB_SUCCESS ||
      fstat(descriptor, &status) != 0)
    return 0;
  return static_cast<std::uint64_t>(status.st_blocks) * 512;
}

void Segment::open() {
  if (is_open()) return;
  if (!is_sealed_ || home_.empty()) {
    environment_ = Environment::open(directory_, Access::kWrite, sync_, map_bytes_);
    return;
  }
  if (!path_exists(path(kDataFile))) directory_ = home_;
  environment_ = Environment::open(directory_, Access::kReadSealed, sync_, 0);
}

void Segment::sync() {
  open();
  check_lmdb(mdb_env_sync(environment_->get(), 1), "cannot sync");
}

void Segment::seal() {
  if (sync_ == Sync::kOnRequest) sync();
  close();
  replace_file(path(kSealedFile), sealed_json(totals_));
  is_sealed_ = true;
}

// Nobody reads what was just appended, and a container's memory limit counts it: clean pages go. It
// is advice; pages of the trees are mapped, which keeps them.
void Segment::give_back_page_cache(std::uint64_t used_before) noexcept {
  int descriptor = -1;
  if (mdb_env_get_fd(environment_->get(), &descriptor) != MDB_SUCCESS || used_bytes_ <= used_before)
    return;
  const auto begin = static_cast<off_t>(used_before);
  const auto length = static_cast<off_t>(used_bytes_ - used_before);
  posix_fadvise(descriptor, begin, length, POSIX_FADV_DONTNEED);
}

bool Segment::read_chunk(std::uint64_t key, void* out, std::size_t bytes) {
  open();
  const Transaction transaction(*environment_, true);
  Key encoded = encode_key(key);
  MDB_val key_value = value_of(encoded);
  MDB_val value{};
  const int code = mdb_get(transaction.get(), environment_->chunks(), &key_value, &value);
  if (code == MDB_NOTFOUND || (code == MDB_SUCCESS && value.mv_size != bytes)) return false;
  check_lmdb(code, "cannot read a chunk");
  std::memcpy(out, value.mv_data, bytes);
  return true;
}

std::string Segment::read_header(std::uint64_t call) {
  open();
  const Transaction transaction(*environment_, true);
  Key encoded = encode_key(call);
  MDB_val key_value = value_of(encoded);
  MDB_val value{};
  const int code = mdb_get(transaction.get(), environment_->headers(), &key_value, &value);
  if (code == MDB_NOTFOUND) return {};
  check_lmdb(code, "cannot read a header");
  return std::string(view_of(value));
}

Segment::Batch::Batch(Segment& segment)
    : segment_(segment),
      transaction_((segment.open(), *segment.environment_), false),
      totals_(segment.totals_) {}

void Segment::Batch::put_chunk(std::uint64_t key, std::string_view value, unsigned flags) {
  Key encoded = encode_key(key);
  MDB_val key_value = value_of(encoded);
  // MDB_RESERVE: the bytes go straight into the page, without the copy that a put of a temporary
  // would need.
  MDB_val reserved{value.size(), nullptr};
  check_lmdb(mdb_put(transaction_.get(), segment_.environment_->chunks(), &key_value, &reserved,
                     flags | MDB_RESERVE),
             "cannot write a chunk");
  if (reserved.mv_data != value.data()) std::memcpy(reserved.mv_data, value.data(), value.size());
}

void Segment::Batch::append_run(std::uint64_t key, std::string_view value) {
  // Larger pages, of another kernel, have other runs; then the value is copied.
  if (segment_.environment_->page_bytes() != kPageBytes) return append_chunk(key, value);
  char* const run = const_cast<char*>(value.data()) - kPageHeaderBytes;
  const std::uint64_t run_bytes = run_bytes_of(value.size());
  std::memset(run, 0, kPageHeaderBytes);
  const std::uint64_t used_bytes = kPageHeaderBytes + value.size();
  std::memset(run + used_bytes, 0, run_bytes - used_bytes);
  loans_.offer(reinterpret_cast<std::byte*>(run), run_bytes);
  append_chunk(key, value);
  loans_.withdraw();
}

void Segment::Batch::put_header(std::uint64_t call, std::string_view value) {
  Key encoded = encode_key(call);
  MDB_val key_value = value_of(encoded);
  MDB_val header = value_of(value);
  check_lmdb(mdb_put(transaction_.get(), segment_.environment_->headers(), &key_value, &header, 0),
             "cannot write a header");
}

void Segment::Batch::commit() {
  std::string meta;
  encode_meta(totals_, &meta);
  MDB_val key_value = value_of(kMetaKey);
  MDB_val value = value_of(meta);
  check_lmdb(mdb_put(transaction_.get(), segment_.environment_->main(), &key_value, &value, 0),
             "cannot write totals");
  std::optional<EarlyWriteBack> early;
  if (segment_.sync_ == Sync::kEveryCommit) early.emplace();
  transaction_.commit();
  segment_.environment_->complete_file();
  segment_.totals_ = totals_;
  MDB_envinfo info{};
  mdb_env_info(segment_.environment_->get(), &info);
  const std::uint64_t used_before = segment_.used_bytes_;
  segment_.used_bytes_ = (info.me_last_pgno + 1) * segment_.environment_->page_bytes();
  segment_.give_back_page_cache(used_before);
}

}  // namespace mld
