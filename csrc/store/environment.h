// RAII over one LMDB environment, and the rule that a process never has the same one open twice.
//
// LMDB return codes become StoreError here and in segment.cpp only. An environment is identified by
// device and inode of its data.mdb, so a symlink or a bind mount cannot smuggle in a second handle.
// After a fork the inherited handles are inert: never used, never closed.
//
// LMDB reads through a map, so a file that is shorter than its pages say is a SIGBUS. Such a file
// is refused when it is opened and when a transaction begins; it is MDB_CORRUPTED then. Nobody
// shortens a file between that look and the read but somebody who does it on purpose.
//
// Thread safety: `open` from any thread. The handle itself: one write transaction at a time, on one
// thread; read transactions anywhere (MDB_NOTLS).
#pragma once

#include <lmdb.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "process.h"

namespace mld {

enum class Access {
  kCreate,      // read and write; the directory exists and is empty
  kWrite,       // read and write; made by this process before
  kReadLive,    // read beside a writer of another process
  kReadSealed,  // read what nobody writes any more: no lock file is touched
};

enum class Sync {
  kEveryCommit,
  kOnRequest,  // durability="process": the writer syncs when it seals, and now and then
};

class Environment {
 public:
  // The process's handle of the environment in `directory`; an open one is shared. Throws
  // StoreError; ENOENT if it is gone, MDB_INVALID or MDB_VERSION_MISMATCH if it is something else.
  static std::shared_ptr<Environment> open(const std::string& directory, Access access, Sync sync,
                                           std::size_t map_bytes);

  ~Environment();
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

  [[nodiscard]] MDB_env* get() const noexcept { return handle_; }
  [[nodiscard]] MDB_dbi main() const noexcept { return main_; }
  [[nodiscard]] MDB_dbi chunks() const noexcept { return chunks_; }
  [[nodiscard]] MDB_dbi headers() const noexcept { return headers_; }
  [[nodiscard]] std::size_t map_bytes() const noexcept { return map_bytes_; }
  [[nodiscard]] std::size_t page_bytes() const noexcept { return page_bytes_; }

  // Throws StoreError: MDB_CORRUPTED if the file lacks pages that it says it has; ENOENT if it is
  // to be written to and was deleted, so that rows in it could never be found.
  void require_whole_file(bool to_write) const;
#ifdef MLD_LMDB_SYSTEM
  // Makes the file as long as its pages say, after a commit; ours is before it (meta_write.h).
  void complete_file() const noexcept;
#else
  void complete_file() const noexcept {}
#endif

 private:
  Environment() = default;
  void open_handle(const std::string& directory, Access access, Sync sync, std::size_t map_bytes);
  void open_databases(const std::string& directory, bool create);

  MDB_env* handle_ = nullptr;
  MDB_dbi main_ = 0, chunks_ = 0, headers_ = 0;
  std::size_t map_bytes_ = 0, page_bytes_ = 0;
  bool counts_links_ = false;  // whether its filesystem says how many names a file has
  FileId id_{};
  std::uint64_t generation_ = process_generation();
};

// A transaction that aborts unless it is committed.
class Transaction {
 public:
  Transaction(const Environment& environment, bool read_only);
  ~Transaction() {
    if (handle_ != nullptr) mdb_txn_abort(handle_);
  }
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;

  [[nodiscard]] MDB_txn* get() const noexcept { return handle_; }
  void commit();

 private:
  MDB_txn* handle_ = nullptr;
};

// Throws StoreError unless `code` is MDB_SUCCESS.
void check_lmdb(int code, const char* what);

}  // namespace mld
