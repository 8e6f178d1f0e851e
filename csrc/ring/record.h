// What lies in a ring slot: this header, then the payload. Shared by the recorder (producers) and
// the writer (consumer).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

namespace mld {

// A payload up to this size rides in its call's header when both come in one batch: as a value of
// its own it would take a page for itself, which at small batches doubles the store.
inline constexpr std::uint64_t kInlineBytes = 4096;
// LMDB keeps a larger one as a run of pages: a page header, the value, and zeros to the end.
inline constexpr std::uint64_t kPageBytes = 4096;
inline constexpr std::uint64_t kPageHeaderBytes = 16;

enum class RecordKind : std::uint32_t {
  kChunk,  // a piece of a capture
  kCall,   // the end of a call; the payload is its msgpack description
};

// A slot with a large payload is laid out so that the writer can lend it to LMDB as that run: the
// end of the header is the page header's place, and room follows to the end of the last page.
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
  // The last kPageHeaderBytes. Of a chunk they are LMDB's from its first commit on, by when its
  // copy has arrived.
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
static_assert(offsetof(RecordHeader, first_row) == sizeof(RecordHeader) - kPageHeaderBytes);

// Bytes of the run of pages that holds a payload as one value.
[[nodiscard]] constexpr std::uint64_t run_bytes_of(std::uint64_t payload_bytes) noexcept {
  return (kPageHeaderBytes + payload_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

// What a chunk with such a payload takes of the ring.
[[nodiscard]] constexpr std::uint64_t chunk_slot_bytes(std::uint64_t payload_bytes) noexcept {
  if (payload_bytes <= kInlineBytes) return sizeof(RecordHeader) + payload_bytes;
  return sizeof(RecordHeader) - kPageHeaderBytes + run_bytes_of(payload_bytes);
}

// A record that the writer has read from the ring and not committed yet.
struct PendingRecord {
  std::uint64_t position;  // of its slot
  const RecordHeader* header;
};

}  // namespace mld
