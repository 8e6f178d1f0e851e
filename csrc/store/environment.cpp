#include "store/environment.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "errors.h"
#include "store/files.h"
#include "store/record_format.h"

namespace mld {
namespace {

// Of lock.mdb: LMDB's header and a little more than kMaxReaders slots of 64 bytes.
constexpr unsigned kMaxReaders = 510;
constexpr std::size_t kLockFileBytes = std::size_t{40} << 10;
constexpr std::size_t kSmallestMapBytes = std::size_t{64} << 20;

bool is_writable(Access access) { return access == Access::kCreate || access == Access::kWrite; }

unsigned flags_of(Access access, Sync sync) {
  unsigned flags = MDB_NOTLS;
  if (!is_writable(access)) flags |= MDB_RDONLY;
  if (access == Access::kReadSealed) flags |= MDB_NOLOCK;
  if (sync == Sync::kOnRequest) flags |= MDB_NOSYNC;
#ifndef MLD_LMDB_SYSTEM
  flags |= MDB_NOMEMINIT;  // page_loan.h has the heap's pages zeroed
#endif
  return flags;
}

// Of a meta page, as LMDB 0.9 lays it out where a word has 64 bits.
constexpr std::size_t kMetaPages = 2;
constexpr std::size_t kPageSizeOffset = 40, kLastPageOffset = 136;
constexpr std::uint32_t kLargestPageBytes = 65536;
constexpr std::uint64_t kMostPages = std::uint64_t{1} << 35;  // more than an address space holds

[[noreturn]] void throw_corrupted(const std::string& what) {
  throw StoreError(MDB_CORRUPTED, what, "restore the segment from a copy, or drop its epoch");
}

// LMDB divides by the page size that the file names, maps as much as it says, and reads both meta
// pages, unasked.
void require_sound_start(const std::string& path) {
  const Descriptor file(path, O_RDONLY);
  std::uint32_t page_bytes = 0;
  const auto read_at = [&](void* out, std::size_t bytes, std::uint64_t offset) {
    return pread(file.get(), out, bytes, static_cast<off_t>(offset)) == static_cast<ssize_t>(bytes);
  };
  if constexpr (sizeof(std::size_t) != 8) return;
  if (!read_at(&page_bytes, sizeof page_bytes, kPageSizeOffset) || page_bytes == 0 ||
      (page_bytes & (page_bytes - 1)) != 0 || page_bytes > kLargestPageBytes) {
    throw StoreError(MDB_INVALID, path + " is not an LMDB file: its first page is damaged");
  }
  for (std::uint64_t page = 0; page < kMetaPages; ++page) {
    std::uint64_t last_page = 0;
    const std::uint64_t begin = page * page_bytes;
    if (!read_at(&last_page, sizeof last_page, begin + kLastPageOffset) || last_page > kMostPages)
      throw_corrupted(path + " is damaged or cut off in its first pages");
  }
}

// Closes the handle unless it is released.
class HandleGuard {
 public:
  explicit HandleGuard(MDB_env* handle) : handle_(handle) {}
  ~HandleGuard() {
    if (handle_ != nullptr) mdb_env_close(handle_);
  }
  HandleGuard(const HandleGuard&) = delete;
  HandleGuard& operator=(const HandleGuard&) = delete;
  MDB_env* release() noexcept { return std::exchange(handle_, nullptr); }

 private:
  MDB_env* handle_;
};

int open_with_map(MDB_env** out, const std::string& directory, unsigned flags,
                  std::size_t map_bytes) {
  MDB_env* handle = nullptr;
  if (const int code = mdb_env_create(&handle); code != MDB_SUCCESS) return code;
  HandleGuard guard(handle);
  mdb_env_set_maxdbs(handle, 2);
  mdb_env_set_maxreaders(handle, kMaxReaders);
  if (map_bytes != 0) mdb_env_set_mapsize(handle, map_bytes);
  const int code = mdb_env_open(handle, directory.c_str(), flags, 0600);
  if (code == MDB_SUCCESS) *out = guard.release();
  return code;
}

}  // namespace

void check_lmdb(int code, const char* what) {
  if (code == MDB_SUCCESS) return;
  throw StoreError(code, std::string("LMDB: ") + what + ": " + mdb_strerror(code));
}

std::shared_ptr<Environment> Environment::open(const std::string& directory, Access access,
                                               Sync sync, std::size_t map_bytes) {
  const std::string data_path = directory + "/" + kDataFile;
  Process& registry = process();
  for (;;) {
    std::unique_lock<std::mutex> lock(registry.environments_mutex, std::defer_lock);
    // What is being made has no other handle, and making it may take for ever on a frozen disk.
    if (access != Access::kCreate) {
      lock.lock();
      const auto found = registry.environments.find(file_id(data_path));
      if (found != registry.environments.end()) {
        if (auto shared = found->second.lock()) return shared;
        // Its last owner is on the way to the destructor, which needs the mutex.
        lock.unlock();
        std::this_thread::yield();
        continue;
      }
    }
    std::shared_ptr<Environment> environment(new Environment);
    // Unregistered until it is whole: its destructor takes the mutex that we hold, so a failure
    // must not reach it.
    try {
      environment->open_handle(directory, access, sync, map_bytes);
      environment->id_ = file_id(data_path);
      if (!lock.owns_lock()) lock.lock();
      registry.environments[environment->id_] = environment;
    } catch (...) {
      if (lock.owns_lock()) lock.unlock();
      throw;
    }
    return environment;
  }
}

void Environment::open_handle(const std::string& directory, Access access, Sync sync,
                              std::size_t map_bytes) {
  const unsigned flags = flags_of(access, sync);
  // LMDB would make a sparse lock.mdb and write to it through a map: on a full disk that is a
  // SIGBUS, not an error.
  if (access == Access::kCreate) allocate_file(directory + "/lock.mdb", kLockFileBytes);
  // A writer's map is wide, since set_mapsize must not be called later; under a limit on address
  // space take what there is. What never grows again is mapped as long as it is; 0 takes the
  // writer's width.
  if (access != Access::kCreate) require_sound_start(directory + "/" + kDataFile);
  std::size_t wish = is_writable(access) ? map_bytes : 0;
  if (access == Access::kReadSealed) wish = file_bytes(directory + "/" + kDataFile);
  int code = open_with_map(&handle_, directory, flags, wish);
  while (code == ENOMEM && wish / 2 >= kSmallestMapBytes) {
    wish /= 2;
    code = open_with_map(&handle_, directory, flags, wish);
  }
  if (code != MDB_SUCCESS) throw_store_error(code, "cannot open the LMDB environment", directory);
  MDB_envinfo info{};
  mdb_env_info(handle_, &info);
  map_bytes_ = info.me_mapsize;
  MDB_stat stat{};
  mdb_env_stat(handle_, &stat);
  page_bytes_ = stat.ms_psize;
  int file = -1;
  struct stat status{};
  counts_links_ = mdb_env_get_fd(handle_, &file) == MDB_SUCCESS && fstat(file, &status) == 0 &&
                  status.st_nlink != 0;
  require_whole_file(is_writable(access));
  open_databases(directory, access == Access::kCreate);
}

void Environment::require_whole_file(bool to_write) const {
  int file = -1;
  struct stat status{};
  if (mdb_env_get_fd(handle_, &file) != MDB_SUCCESS || fstat(file, &status) != 0)
    throw StoreError(errno, std::string("cannot look at a segment: ") + std::strerror(errno));
  if (to_write && counts_links_ && status.st_nlink == 0)
    throw StoreError(ENOENT, "the segment was deleted while it was written");
  const auto held = [&] { return static_cast<std::uint64_t>(status.st_size) / page_bytes_; };
  std::uint64_t last = kMetaPages - 1;  // these two say how many there are
  if (held() > last) {
    MDB_envinfo info{};
    mdb_env_info(handle_, &info);
    last = info.me_last_pgno;
    fstat(file, &status);  // after it: a writer elsewhere writes pages before it names them
  }
  if (held() <= last) {
    throw_corrupted("a segment is cut off: its file holds " + std::to_string(held()) +
                    " pages and names page " + std::to_string(last));
  }
}

#ifdef MLD_LMDB_SYSTEM
void Environment::complete_file() const noexcept {
  int file = -1;
  struct stat status{};
  MDB_envinfo info{};
  if (mdb_env_get_fd(handle_, &file) != MDB_SUCCESS || mdb_env_info(handle_, &info) != MDB_SUCCESS)
    return;
  const auto bytes = static_cast<off_t>((info.me_last_pgno + 1) * page_bytes_);
  if (fstat(file, &status) != 0 || status.st_size >= bytes) return;
  // If it fails, the next look at the file tells.
  if (ftruncate(file, bytes) != 0) return;
}
#endif

void Environment::open_databases(const std::string& directory, bool create) {
  MDB_txn* transaction = nullptr;
  int code = mdb_txn_begin(handle_, nullptr, create ? 0 : MDB_RDONLY, &transaction);
  if (code != MDB_SUCCESS) throw_store_error(code, "cannot read the LMDB environment", directory);
  const unsigned flags = create ? MDB_CREATE : 0;
  code = mdb_dbi_open(transaction, nullptr, 0, &main_);
  if (code == MDB_SUCCESS) code = mdb_dbi_open(transaction, kChunksDatabase, flags, &chunks_);
  if (code == MDB_SUCCESS) code = mdb_dbi_open(transaction, kHeadersDatabase, flags, &headers_);
  if (code != MDB_SUCCESS) {
    mdb_txn_abort(transaction);
    throw_store_error(code, "not a segment of a trace:", directory);
  }
  code = mdb_txn_commit(transaction);  // a read-only commit is what keeps the database handles
  if (code != MDB_SUCCESS) throw_store_error(code, "cannot write", directory);
}

Environment::~Environment() {
  if (handle_ == nullptr || generation_ != process_generation())
    return;  // never opened, or inherited: inert
  Process& registry = process();
  const std::lock_guard<std::mutex> lock(registry.environments_mutex);
  mdb_env_close(handle_);
  const auto found = registry.environments.find(id_);
  if (found != registry.environments.end() && found->second.expired())
    registry.environments.erase(found);
}

Transaction::Transaction(const Environment& environment, bool read_only) {
  environment.require_whole_file(!read_only);
  check_lmdb(mdb_txn_begin(environment.get(), nullptr, read_only ? MDB_RDONLY : 0, &handle_),
             "cannot begin a transaction");
}

void Transaction::commit() {
  check_lmdb(mdb_txn_commit(std::exchange(handle_, nullptr)), "cannot commit");
}

}  // namespace mld
