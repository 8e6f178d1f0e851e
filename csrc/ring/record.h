// What lies in a ring slot: this header, then the payload. Shared by the recorder (producers) and
// the writer (consumer).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

namespace mld {

enum class RecordKind : std::uint32_t {
  kChunk,  // a piece of a capture
  kCall,   // the end of a call; the payload is its msgpack description
};

struct alignas(64) RecordHeader {
  RecordKind kind;
  std::uint32_t attempt;  // id, not a pointer: it may be closed when the writer gets here
  std::uint64_t call;
  std::int64_t epoch;
  std::uint64_t payload_bytes;
  // kChunk
  std::uint32_t capture;
  // Whose copy fills the payload: the device's index + 1, or 0 when the bytes came with the header.
  // A record may be published before its copy has arrived; `copy_sequence` tells when it has.
  std::uint32_t copy_device;
  // kCall
  std::uint32_t rows, ground_truth_rows;
  std::int64_t first_row;
  union {
    std::uint64_t call_bytes;     // kCall: payload of all the call's captures
    std::uint64_t copy_sequence;  // kChunk: number of the copy on its device, from 1
  };

  [[nodiscard]] std::string_view payload() const noexcept {
    return {reinterpret_cast<const char*>(this + 1), payload_bytes};
  }
};
static_assert(sizeof(RecordHeader) == 64);
static_assert(std::is_trivially_copyable_v<RecordHeader>);

// A record that the writer has read from the ring and not committed yet.
struct PendingRecord {
  std::uint64_t position;  // of its slot
  const RecordHeader* header;
};

}  // namespace mld
