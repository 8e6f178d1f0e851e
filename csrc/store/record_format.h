// What writer and reader share: names, keys and the header of a call. The prose is
// docs/record_format.md; a change here changes kFormatVersion, that page and a golden file
// together.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mld {

inline constexpr std::uint32_t kFormatVersion = 1;

inline constexpr const char* kChunksDatabase = "chunks";
inline constexpr const char* kHeadersDatabase = "headers";
inline constexpr std::string_view kMetaKey = "meta";
inline constexpr const char* kSegmentFile = "segment.json";
inline constexpr const char* kSealedFile = "sealed.json";
inline constexpr const char* kDataFile = "data.mdb";
inline constexpr const char* kLockFile = "writer.lock";
inline constexpr const char* kStatusFile = "status.json";
inline constexpr const char* kFlushRequestFile = "flush.request";
inline constexpr const char* kTakenRequestFile = "flush.taken";

inline constexpr std::int64_t kNoEpoch = -1;

// row_id = rank | attempt | number of the row in the attempt.
inline constexpr unsigned kRankBits = 14, kAttemptBits = 13, kRowBits = 36;
inline constexpr std::uint64_t kMaxRanks = std::uint64_t{1} << kRankBits;
inline constexpr std::uint64_t kMaxAttempts = std::uint64_t{1} << kAttemptBits;
static_assert(kRankBits + kAttemptBits + kRowBits == 63, "row_id is a non-negative int64");

// Keys sort as numbers when their bytes are compared.
using Key = std::array<unsigned char, 8>;
[[nodiscard]] inline Key encode_key(std::uint64_t number) noexcept {
  Key key;
  for (std::size_t i = 0; i < key.size(); ++i)
    key[i] = static_cast<unsigned char>(number >> (56 - 8 * i));
  return key;
}
[[nodiscard]] inline std::uint64_t decode_key(const void* key) noexcept {
  std::uint64_t number = 0;
  for (std::size_t i = 0; i < 8; ++i)
    number = number << 8 | static_cast<const unsigned char*>(key)[i];
  return number;
}

// Where one piece of a capture lies.
struct ChunkRef {
  static constexpr std::int32_t kInline = -1;
  std::uint32_t capture;
  std::int32_t segment;  // sequence number, or kInline
  std::uint64_t key;     // ring position, or offset in the inline bytes
  std::uint64_t bytes;
  std::uint32_t crc;
};

struct CallIdentity {
  std::uint32_t rank, attempt;
  std::uint64_t call;
  std::int64_t epoch;
  std::uint32_t rows, ground_truth_rows;
  std::int64_t first_row;
};

struct Gap {
  std::uint64_t first_call, last_call;
  std::uint64_t rows, bytes;
  const char* cause;  // the name of a LossCause, or the next

  // Takes `next` in if it is of the same kind and follows.
  bool append(const Gap& next) noexcept {
    if (cause != next.cause || last_call + 1 != next.first_call || (rows == 0) != (next.rows == 0))
      return false;
    last_call = next.last_call;
    rows += next.rows;
    bytes += next.bytes;
    return true;
  }
};
// Rows whose device failed on the way. Discarded rows are counted by cause, these as failed.
inline constexpr const char* kDeviceErrorCause = "device_error";

enum class HeaderKind : std::uint8_t { kCall = 0, kGap = 1 };

inline constexpr std::size_t kChecksumBytes = 5;  // 0xce and the CRC-32C of all before it

// Replaces *out by the stored value of a call's header; `description` is msgpack already.
void encode_call(const CallIdentity& identity, const std::vector<ChunkRef>& chunks,
                 std::string_view description, std::string_view inline_bytes, std::string* out);

// Replaces *out by the stored value of a gap's header.
void encode_gap(const Gap& gap, std::string* out);

// Whether a stored header's last five bytes are the checksum of the rest.
[[nodiscard]] bool header_is_sound(std::string_view value) noexcept;

struct DecodedHeader {
  HeaderKind kind = HeaderKind::kCall;
  CallIdentity identity{};       // of a call
  std::vector<ChunkRef> chunks;  // of a call
  std::string_view description;  // of a call, msgpack
  std::string_view inline_bytes;
};

// What the core itself needs of a stored header. Throws Error(kCorruptData) on anything but what
// encode_* writes.
[[nodiscard]] DecodedHeader decode_header(std::string_view value);

// Totals of a segment, in the same transaction as the rows they count.
struct SegmentTotals {
  std::uint64_t rows = 0, ground_truth_rows = 0, calls = 0, payload_bytes = 0, discarded_rows = 0;
};

void encode_meta(const SegmentTotals& totals, std::string* out);

}  // namespace mld
