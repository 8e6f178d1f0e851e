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

namespace mld {

struct ChunkRequest {
  std::uint64_t key;
  std::uint64_t offset;  // in the output
  std::uint64_t bytes;
  std::uint32_t crc;
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
  // Copies chunks to `out`. REQUIRES: each offset + bytes lies in it. Throws Error(kCorruptData).
  void read(const std::vector<ChunkRequest>& requests, std::byte* out) const;

 private:
  [[nodiscard]] std::string read_meta() const;
  [[nodiscard]] std::vector<std::pair<std::uint64_t, std::string>> read_headers(
      std::optional<std::uint64_t> after, std::size_t limit) const;
  void read_chunks(const std::vector<ChunkRequest>& requests, std::byte* out) const;

  std::string directory_;
  std::shared_ptr<Environment> environment_;
};

}  // namespace mld
