// The write side of one segment: an LMDB environment with its two databases, from creation to seal.
//
// Used by the writer thread only. A segment is written by the process that made it and by nobody
// after it; what an earlier process left is sealed, never appended to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "store/environment.h"
#include "store/page_loan.h"
#include "store/record_format.h"

namespace mld {

struct SegmentIdentity {
  std::uint32_t rank, attempt, sequence;
  std::int64_t epoch;
};

// `a00000-s00000`
std::string segment_name(std::uint32_t attempt, std::uint32_t sequence);
// `epoch-3` or `epoch-none`
std::string partition_name(std::int64_t epoch);

class Segment {
 public:
  // Makes the directory and the environment in it, durable as a whole.
  // Sealed, it may be moved into `home`, from where it is read then; empty: it stays.
  Segment(std::string directory, const SegmentIdentity& identity, Sync sync, std::size_t map_bytes,
          std::string home = {});

  [[nodiscard]] const std::string& directory() const noexcept { return directory_; }
  [[nodiscard]] std::uint32_t sequence() const noexcept { return identity_.sequence; }
  [[nodiscard]] const SegmentTotals& totals() const noexcept { return totals_; }
  [[nodiscard]] bool is_open() const noexcept { return environment_ != nullptr; }
  // Whether `bytes` more (values and their pages) fit the map with a margin for the trees.
  [[nodiscard]] bool has_room_for(std::uint64_t bytes) const noexcept;
  // REQUIRES: is_open()
  [[nodiscard]] std::uint64_t disk_bytes() const noexcept;

  void open();  // after close(); nothing to do when it is open
  void close() noexcept {
    environment_.reset();
  }  // lets go of the descriptors; the segment can be opened again
  void sync();  // durability="process": forces commits to disk
  void seal();  // syncs, writes sealed.json, closes

  // Copies the value stored in `chunks` under `key` to `out` if it has that size; false if there is
  // none.
  bool read_chunk(std::uint64_t key, void* out, std::size_t bytes);
  // The stored header of a call; empty if it is not here.
  std::string read_header(std::uint64_t call);

  // One write transaction. Nothing of it is visible, and totals() is unchanged, until commit() has
  // returned.
  class Batch {
   public:
    explicit Batch(Segment& segment);
    // REQUIRES: keys of append_chunk and append_run rise over the life of the segment.
    void append_chunk(std::uint64_t key, std::string_view value) {
      put_chunk(key, value, MDB_APPEND);
    }
    // The same without a copy. REQUIRES: `value` has more than kInlineBytes; the kPageHeaderBytes
    // before it and the bytes behind it, to the end of its run, are there to be written to, and all
    // of it stays until the batch is committed or gone.
    void append_run(std::uint64_t key, std::string_view value);
    void insert_chunk(std::uint64_t key, std::string_view value) { put_chunk(key, value, 0); }
    void put_header(std::uint64_t call, std::string_view value);
    [[nodiscard]] SegmentTotals& totals() noexcept { return totals_; }
    void commit();

   private:
    void put_chunk(std::uint64_t key, std::string_view value, unsigned flags);

    Segment& segment_;
    PageLoans loans_;  // before the transaction, which gives them back
    Transaction transaction_;
    SegmentTotals totals_;
  };

 private:
  void give_back_page_cache(std::uint64_t used_before) noexcept;
  [[nodiscard]] std::string path(const char* name) const { return directory_ + "/" + name; }

  std::string directory_;
  const std::string home_;
  bool is_sealed_ = false;
  const SegmentIdentity identity_;
  const Sync sync_;
  std::size_t map_bytes_;
  std::shared_ptr<Environment> environment_;
  SegmentTotals totals_;
  std::uint64_t used_bytes_ = 0;  // of the map, after the last commit
};

}  // namespace mld
