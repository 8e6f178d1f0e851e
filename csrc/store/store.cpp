#include "store/store.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <set>
#include <sstream>
#include <string_view>
#include <thread>
#include <vector>

#include "errors.h"
#include "store/files.h"
#include "store/record_format.h"
#include "store/segment.h"

namespace mld {
namespace {

constexpr const char* kTrashPrefix = "trash-";
constexpr const char* kPartitionPrefix = "epoch-";
// A reader of this process holds an environment for one batch; after this long it is left to close
// it by itself.
constexpr auto kReaderPatience = std::chrono::seconds(2);

bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

std::string read_text(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// Whether LMDB may open the segment: not after a power cut went over commits that were never
// synced.
bool is_usable(const std::string& segment) {
  if (path_exists(segment + "/" + kSealedFile)) return true;
  const std::string identity = read_text(segment + "/" + kSegmentFile);
  if (identity.empty()) return false;  // died while it was made: holds no row
  const bool synced = identity.find("\"durability\": \"power\"") != std::string::npos;
  return synced || identity.find("\"boot_id\": \"" + boot_id() + "\"") != std::string::npos;
}

// A slice is a file that an upload has brought (docs/record_format.md); its name tells its rows.
// The core deletes slices with their epoch and otherwise leaves them alone.
bool is_slice(const std::string& name) {
  constexpr std::string_view kEnd = ".zip";
  return name.size() > kEnd.size() &&
         name.compare(name.size() - kEnd.size(), kEnd.size(), kEnd) == 0;
}

void count_slice_rows(const std::string& path, DroppedRows* rows) {
  unsigned long long slice_rows = 0, ground_truth_rows = 0;
  const std::string name = path.substr(path.rfind('/') + 1);
  if (std::sscanf(name.c_str(), "a%*u-c%*u-r%llu-g%llu-", &slice_rows, &ground_truth_rows) != 2)
    return;
  rows->rows += slice_rows;
  rows->ground_truth_rows += ground_truth_rows;
}

// Feature and ground-truth rows of a segment; each call counts once, however many segments hold it.
void count_rows(const std::string& segment, std::set<std::pair<std::uint32_t, std::uint64_t>>* seen,
                DroppedRows* rows) {
  if (!is_usable(segment)) return;
  const auto environment = Environment::open(segment, Access::kReadSealed, Sync::kEveryCommit, 0);
  const Transaction transaction(*environment, true);
  MDB_cursor* cursor = nullptr;
  check_lmdb(mdb_cursor_open(transaction.get(), environment->headers(), &cursor),
             "cannot read headers");
  const std::unique_ptr<MDB_cursor, decltype(&mdb_cursor_close)> guard(cursor, &mdb_cursor_close);
  MDB_val key{}, value{};
  while (mdb_cursor_get(cursor, &key, &value, MDB_NEXT) == MDB_SUCCESS) {
    const DecodedHeader header =
        decode_header({static_cast<const char*>(value.mv_data), value.mv_size});
    if (header.kind != HeaderKind::kCall) continue;
    if (!seen->emplace(header.identity.attempt, header.identity.call).second) continue;
    rows->rows += header.identity.rows;
    rows->ground_truth_rows += header.identity.ground_truth_rows;
  }
}

// Waits until no reader of this process has the environment open, so that unlinking gives the space
// back.
void wait_for_readers(const std::string& segment) {
  const std::string data = segment + "/" + kDataFile;
  if (!path_exists(data)) return;
  const FileId id = file_id(data);
  const auto deadline = std::chrono::steady_clock::now() + kReaderPatience;
  Process& registry = process();
  while (std::chrono::steady_clock::now() < deadline) {
    {
      const std::lock_guard<std::mutex> lock(registry.environments_mutex);
      if (registry.environments.count(id) == 0) return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace

LockFile::LockFile(const std::string& path, std::string_view owner)
    : descriptor_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)) {
  if (descriptor_ < 0) throw_store_error(errno, "cannot open", path);
  // Somebody who only asks (is_held) has it for an instant; a writer has it for long.
  for (int tries = 0; flock(descriptor_, LOCK_EX | LOCK_NB) != 0; ++tries) {
    const int code = errno;
    if (code == EINTR) continue;
    if (code == EWOULDBLOCK && tries < 5) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      continue;
    }
    close(descriptor_);
    if (code != EWOULDBLOCK) throw_store_error(code, "cannot lock", path);
    throw Error(ErrorKind::kTraceInUse, "another process is recording this trace: it holds " + path,
                "end that process, or record under another version_name");
  }
  try {
    guard_lock_descriptor(descriptor_);
  } catch (...) {
    close(descriptor_);
    throw;
  }
  // On a full disk it tells nothing, which others take for an owner who does not say.
  if (ftruncate(descriptor_, 0) == 0) {
    const ssize_t written = pwrite(descriptor_, owner.data(), owner.size(), 0);
    static_cast<void>(written);
  }
}

LockFile::~LockFile() {
  if (generation_ != process_generation()) return;  // the fork handler has closed it
  unguard_lock_descriptor(descriptor_);
  close(descriptor_);
}

bool LockFile::is_held(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return false;
  const bool held = flock(descriptor, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
  close(descriptor);
  return held;
}

StoreUse::StoreUse(const std::string& directory, const StoreOptions& options) {
  make_directories(directory);
  const std::string& written = options.staging.empty() ? directory : options.staging;
  make_directories(written);
  if (const std::string network = network_filesystem_at(written); !network.empty()) {
    throw Error(ErrorKind::kStorage,
                written + " lies on a network filesystem (" + network +
                    "), where LMDB cannot be written to",
                "choose a local TracerConfig.data_dir, or name a local directory in staging_dir");
  }
  const FileId id = file_id(directory);
  {
    Process& registry = process();
    const std::lock_guard<std::mutex> lock(registry.stores_mutex);
    std::weak_ptr<StoreState>& entry = registry.stores[id];
    state_ = entry.lock();
    if (state_ == nullptr || state_->users_ == 0) {
      state_.reset(new StoreState(directory, options));
      entry = state_;
    } else if (state_->options_.sync != options.sync ||
               state_->options_.max_bytes != options.max_bytes ||
               state_->options_.staging != options.staging) {
      state_.reset();
      throw Error(ErrorKind::kInvalidInput,
                  "another tracer of this process records this trace with another durability, "
                  "max_bytes or staging_dir",
                  "give both tracers the same TracerConfig.durability, max_bytes and staging_dir");
    }
    ++state_->users_;
  }
  try {
    state_->take();
  } catch (...) {
    release();
    throw;
  }
}

StoreUse::StoreUse(const StoreUse& other) : state_(other.state_) {
  if (state_ == nullptr) return;
  const std::lock_guard<std::mutex> lock(process().stores_mutex);
  ++state_->users_;
}

StoreUse& StoreUse::operator=(StoreUse&& other) noexcept {
  release();
  state_ = std::move(other.state_);
  return *this;
}

void StoreUse::release() noexcept {
  if (state_ == nullptr) return;
  {
    const std::lock_guard<std::mutex> lock(process().stores_mutex);
    if (--state_->users_ == 0) state_->lock_.reset();
  }
  state_.reset();
}

bool StoreState::owns(const std::string& segment_directory) {
  const std::string partition = segment_directory.substr(0, segment_directory.rfind('/'));
  const std::string rank = partition.substr(0, partition.rfind('/'));
  if (!path_exists(rank)) return false;
  Process& registry = process();
  const std::lock_guard<std::mutex> lock(registry.stores_mutex);
  const FileId id = file_id(rank);
  for (const auto& [home, store] : registry.stores) {
    const auto state = store.lock();
    if (state == nullptr || state->lock_ == nullptr) continue;
    if (home == id || (state->is_staged() && state->options_.staging == rank)) return true;
  }
  return false;
}

void StoreState::take() {
  const std::lock_guard<std::mutex> alone(taking_);
  Process& registry = process();
  {
    const std::lock_guard<std::mutex> lock(registry.stores_mutex);
    if (lock_ != nullptr) return;
  }
  auto file = std::make_unique<LockFile>(directory_ + "/" + kLockFile, options_.owner);
  adopt_earlier_segments();
  const std::lock_guard<std::mutex> lock(registry.stores_mutex);
  lock_ = std::move(file);
}

std::string StoreState::partition_directory(std::int64_t epoch) const {
  return (is_staged() ? options_.staging : directory_) + "/" + partition_name(epoch);
}

std::string StoreState::home_directory(std::int64_t epoch) const {
  return directory_ + "/" + partition_name(epoch);
}

std::vector<std::string> StoreState::roots() const {
  if (!is_staged()) return {directory_};
  return {options_.staging, directory_};
}

// The last owner is dead or gone: finish its drops, seal what it left.
void StoreState::adopt_earlier_segments() {
  disk_bytes_.store(0, std::memory_order_relaxed);  // a taker before us may have failed half-way
  for (const std::string& name : list_directory(directory_)) {
    if (starts_with(name, kTrashPrefix)) remove_tree(directory_ + "/" + name);
    if (!starts_with(name, kPartitionPrefix)) continue;
    const std::string partition = directory_ + "/" + name;
    for (const std::string& segment_name : list_directory(partition)) {
      const std::string segment = partition + "/" + segment_name;
      if (is_slice(segment_name)) {
        add_disk_bytes(disk_bytes_of(segment));
        continue;
      }
      if (!path_exists(segment + "/" + kSegmentFile)) {
        remove_tree(segment);  // died before its first row
        continue;
      }
      add_disk_bytes(disk_bytes_of(segment + "/" + kDataFile));
      if (path_exists(segment + "/" + kSealedFile)) continue;
      if (is_usable(segment)) {
        sync_file(segment + "/" + kDataFile);
        replace_file(segment + "/" + kSealedFile,
                     "{\"format_version\": " + std::to_string(kFormatVersion) + "}\n");
      }
    }
  }
  if (!is_staged()) return;
  // What was left in staging is brought home by others; here it counts for the budget.
  for (const std::string& name : list_directory(options_.staging)) {
    if (!starts_with(name, kPartitionPrefix)) continue;
    const std::string partition = options_.staging + "/" + name;
    for (const std::string& segment : list_directory(partition))
      add_disk_bytes(disk_bytes_of(partition + "/" + segment + "/" + kDataFile));
  }
}

void StoreState::subtract_disk_bytes(std::uint64_t bytes) noexcept {
  disk_bytes_.store(disk_bytes() - std::min(bytes, disk_bytes()), std::memory_order_relaxed);
}

// Beside what is to be deleted, since a rename cannot leave its filesystem.
std::string StoreState::next_trash_name(const std::string& doomed) {
  const bool is_in_staging = is_staged() && doomed.rfind(options_.staging + "/", 0) == 0;
  return (is_in_staging ? options_.staging : directory_) + "/" + kTrashPrefix +
         std::to_string(getpid()) + "-" + std::to_string(trash_counter_++);
}

DroppedRows StoreState::drop_epoch(std::int64_t epoch, std::optional<std::uint32_t> attempt) {
  std::vector<std::string> partitions, doomed;
  bool some_stay = false;
  for (const std::string& root : roots()) {
    partitions.push_back(root + "/" + partition_name(epoch));
    for (const std::string& name : list_directory(partitions.back())) {
      if (attempt && !starts_with(name, segment_name(*attempt, 0).substr(0, 7).c_str())) {
        some_stay = true;
      } else {
        doomed.push_back(partitions.back() + "/" + name);
      }
    }
  }
  if (doomed.empty()) return {};
  if (some_stay) return delete_directories(doomed, true);
  partitions.erase(std::remove_if(partitions.begin(), partitions.end(),
                                  [](const std::string& path) { return !path_exists(path); }),
                   partitions.end());
  return delete_directories(partitions, true);
}

void StoreState::drop_all() {
  std::vector<std::string> doomed;
  for (const std::string& root : roots()) {
    for (const std::string& name : list_directory(root)) {
      if (starts_with(name, kPartitionPrefix)) doomed.push_back(root + "/" + name);
    }
  }
  delete_directories(doomed, false);
}

// Renaming is what makes the rows invisible, at once and whatever their size; the rest may take its
// time.
DroppedRows StoreState::delete_directories(const std::vector<std::string>& directories,
                                           bool count) {
  if (directories.empty()) return {};
  std::vector<std::string> trash;
  std::set<std::string> changed;  // a place each in the home and in staging
  DroppedRows rows;
  for (const std::string& directory : directories) {
    if (is_slice(directory)) {
      subtract_disk_bytes(disk_bytes_of(directory));
      count_slice_rows(directory, &rows);
    }
    trash.push_back(next_trash_name(directory));
    rename_path(directory, trash.back());
    changed.insert(trash.back().substr(0, trash.back().rfind('/')));
    changed.insert(directory.substr(0, directory.rfind('/')));
  }
  // Else a power cut brings the epoch back, whatever the durability.
  for (const std::string& place : changed) sync_directory(place);
  std::set<std::pair<std::uint32_t, std::uint64_t>> seen;
  for (const std::string& directory : trash) {
    std::vector<std::string> segments{directory};
    if (!path_exists(directory + "/" + kDataFile)) {
      segments.clear();
      for (const std::string& name : list_directory(directory))
        segments.push_back(directory + "/" + name);
    }
    for (const std::string& segment : segments) {
      if (is_slice(segment)) {
        subtract_disk_bytes(disk_bytes_of(segment));
        count_slice_rows(segment, &rows);
        continue;
      }
      const std::uint64_t bytes = disk_bytes_of(segment + "/" + kDataFile);
      try {
        if (count) count_rows(segment, &seen, &rows);
      } catch (const Error&) {
        // Damaged: the rows behind the damage cannot be counted, and the user wants them gone all
        // the same.
      }
      wait_for_readers(segment);
      subtract_disk_bytes(bytes);
    }
    remove_tree(directory);
  }
  return rows;
}

}  // namespace mld
