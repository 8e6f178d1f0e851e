// Read access to one segment: short transactions, copies out. Never holds anything between two
// calls but the handle.
//
// Thread safety: all methods, each with a transaction of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "store/environment.h"
#include "store/record_format.h"
#include "store/segment.h"

namespace mld {

struct ChunkRequest {
  std::uint64_t key;
  std::uint64_t offset;  // in the output
  std::uint64_t bytes;
  std::uint32_t crc;
};

// Headers of many calls as columns of numbers: what a reader needs of calls that are all alike.
struct HeaderScan {
  // Captures that `lengths` has room for; a call with more is among the others.
  static constexpr std::size_t kCaptures = 32;
  // A larger call is among the others, so that a run of calls can be read in one step.
  static constexpr std::uint64_t kMaxCallBytes = 1U << 20;

  std::vector<std::int64_t> keys, rows, ground_truth_rows, first_rows;
  std::vector<std::int64_t> description;  // index in `descriptions`; -1: the next of `others`
  std::vector<std::int64_t> chunk_bytes;  // outside of the header
  std::vector<std::int64_t> lengths;      // kCaptures a header: bytes of each capture
  std::vector<std::string> descriptions;  // each once
  std::vector<std::string> others;        // whole values: gaps, and calls of another kind
};

// The rows of one capture of many calls, one after the other.
struct GatherTarget {
  std::uint32_t capture;
  std::byte* out;
  std::uint64_t bytes;
};

class SegmentReader {
 public:
  // Throws Error(kNotFound) when the segment is gone, Error(kCorruptData) when it is not one.
  SegmentReader(const std::string& directory, bool sealed);

  [[nodiscard]] std::string meta() const;
  // Up to `limit` (call, value) pairs behind `after`. Throws Error(kCorruptData) on a wrong
  // checksum.
  [[nodiscard]] std::vector<std::pair<std::uint64_t, std::string>> headers(
      std::optional<std::uint64_t> after, std::size_t limit) const;
  // As `headers`, as columns. A call that is not `expected`'s (rank, attempt, epoch, and `sequence`
  // of all its chunks), or cannot be decoded here, is among the others.
  [[nodiscard]] HeaderScan scan(std::optional<std::uint64_t> after, std::size_t limit,
                                const SegmentIdentity& expected) const;
  // Copies captures of the calls `keys`, in that order, each target filled to its end. REQUIRES:
  // all chunks of the calls lie in this segment. Throws Error(kCorruptData).
  void gather(const std::vector<std::uint64_t>& keys, std::vector<GatherTarget> targets) const;
  // Copies chunks to `out`. REQUIRES: each offset + bytes lies in it. Throws Error(kCorruptData).
  void read(const std::vector<ChunkRequest>& requests, std::byte* out) const;

 private:
  template <class Visit>
  void for_headers(std::optional<std::uint64_t> after, std::size_t limit, Visit visit) const;
  void copy_chunk(MDB_txn* transaction, const ChunkRequest& request, std::byte* out) const;
  void check_copy(const std::byte* copy, std::uint64_t bytes, std::uint32_t crc,
                  std::uint64_t key) const;

  std::string directory_;
  std::shared_ptr<Environment> environment_;
};

}  // namespace mld
