// Lends memory of ours to LMDB as a dirty page, so that a large value is written to disk from where
// it lies instead of being copied into a page of LMDB's own first.
//
// LMDB keeps a value of several pages as one run: 16 bytes of page header, the value, and the rest
// of the last page. It takes the run by one malloc and frees it once it is written or given up.
// mdb.c is compiled with both calls renamed to the two functions below; they take and know again
// what is on loan, and go to the heap otherwise. With a system's LMDB no loan is ever taken.
//
// The heap pages are zeroed here and not by LMDB (MDB_NOMEMINIT), which would clear the last page
// of a run that it is lent. So heap bytes never reach a file either way.
//
// Thread safety: a PageLoans serves its own thread, as a write transaction does.
#pragma once

#include <cstddef>
#include <vector>

extern "C" {
void* mld_lmdb_malloc(std::size_t bytes);
void mld_lmdb_free(void* memory);
}

namespace mld {

// The loans of one write transaction. It outlives the transaction; one a thread at a time.
class PageLoans {
 public:
  PageLoans() noexcept;
  ~PageLoans();
  PageLoans(const PageLoans&) = delete;
  PageLoans& operator=(const PageLoans&) = delete;

  // The next run of exactly `bytes` that LMDB takes on this thread is `run`. It is LMDB's until the
  // transaction ends: of it, LMDB writes the first 16 bytes only.
  void offer(std::byte* run, std::size_t bytes) noexcept { offered_ = run, offered_bytes_ = bytes; }
  void withdraw() noexcept { offered_ = nullptr; }

 private:
  friend void* ::mld_lmdb_malloc(std::size_t bytes);
  friend void ::mld_lmdb_free(void* memory);
  [[nodiscard]] void* take(std::size_t bytes) noexcept;
  [[nodiscard]] bool give_back(const void* memory) noexcept;

  std::byte* offered_ = nullptr;
  std::size_t offered_bytes_ = 0;
  std::vector<const void*> lent_;
  std::size_t returned_ = 0;  // LMDB frees in the order in which it took: the next one, mostly
};

}  // namespace mld
