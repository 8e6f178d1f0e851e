#include "store/record_format.h"

#include <limits>
#include <utility>

#include "errors.h"
#include "store/crc32c.h"
#include "store/msgpack_writer.h"

namespace mld {
namespace {

void seal_value(MsgpackWriter& writer, std::string* out) {
  writer.uint32(crc32c(out->data(), out->size()));
}

std::uint32_t stored_checksum(std::string_view value) noexcept {
  const auto* tail = reinterpret_cast<const unsigned char*>(value.data() + value.size() - 4);
  return static_cast<std::uint32_t>(tail[0]) << 24 | static_cast<std::uint32_t>(tail[1]) << 16 |
         static_cast<std::uint32_t>(tail[2]) << 8 | static_cast<std::uint32_t>(tail[3]);
}

// Length of the description, of which `rest` holds all, then the inline bytes with their msgpack
// tag, and the checksum. The three forms of the tag cannot be taken for one another: each holds the
// length, which only one of them can.
std::size_t description_bytes(std::string_view rest, std::size_t inline_bytes) {
  for (const auto& [tag, length_bytes] : {std::pair{0xC4U, 1U}, {0xC5U, 2U}, {0xC6U, 4U}}) {
    const std::size_t behind = 1 + length_bytes + inline_bytes + kChecksumBytes;
    if (rest.size() < behind || inline_bytes >> (8 * length_bytes) != 0) continue;
    const std::size_t start = rest.size() - behind;
    bool matches = static_cast<unsigned char>(rest[start]) == tag;
    for (std::size_t i = 0; i < length_bytes; ++i) {
      const auto expected =
          static_cast<unsigned char>(inline_bytes >> (8 * (length_bytes - 1 - i)));
      matches = matches && static_cast<unsigned char>(rest[start + 1 + i]) == expected;
    }
    if (matches) return start;
  }
  throw Error(ErrorKind::kCorruptData, "a stored header does not end in its inline bytes");
}

// Reads back the few msgpack types that encode_* writes; anything else is damage.
class HeaderReader {
 public:
  explicit HeaderReader(std::string_view bytes) : bytes_(bytes) {}

  std::uint64_t unsigned_integer() {
    const unsigned tag = byte();
    if (tag < 0x80) return tag;
    if (tag < 0xCC || tag > 0xCF) damaged();
    return big_endian(1U << (tag - 0xCC));
  }
  std::int64_t integer_or_nil(std::int64_t nil_value) {
    if (peek() == 0xC0) return byte(), nil_value;
    return integer();
  }
  std::int64_t integer() {
    const unsigned tag = peek();
    if (tag >= 0xE0) return static_cast<std::int8_t>(byte());
    if (tag == 0xD3) return byte(), static_cast<std::int64_t>(big_endian(8));
    return static_cast<std::int64_t>(unsigned_integer());
  }
  std::size_t array() { return sized(0x90, 0xDD); }
  std::size_t map() { return sized(0x80, 0xDF); }
  void key(std::string_view expected) {
    if (byte() != (0xA0U | expected.size()) || bytes_.substr(0, expected.size()) != expected)
      damaged();
    bytes_.remove_prefix(expected.size());
  }
  template <class Integer>
  Integer field(std::string_view name) {
    key(name);
    const std::uint64_t value = unsigned_integer();
    if (value > static_cast<std::uint64_t>(std::numeric_limits<Integer>::max())) damaged();
    return static_cast<Integer>(value);
  }

  [[nodiscard]] std::string_view rest() const noexcept { return bytes_; }

  [[noreturn]] static void damaged() {
    throw Error(ErrorKind::kCorruptData, "a stored header is not what the writer writes",
                "restore the segment from a copy, or drop its epoch");
  }

 private:
  unsigned peek() const {
    if (bytes_.empty()) damaged();
    return static_cast<unsigned char>(bytes_.front());
  }
  unsigned byte() {
    const unsigned value = peek();
    bytes_.remove_prefix(1);
    return value;
  }
  std::uint64_t big_endian(unsigned bytes) {
    std::uint64_t value = 0;
    for (; bytes > 0; --bytes) value = value << 8 | byte();
    return value;
  }
  std::size_t sized(unsigned fix_tag, unsigned tag32) {
    const unsigned tag = byte();
    if ((tag & 0xF0U) == fix_tag) return tag & 0x0FU;
    if (tag == tag32 - 1)
      return big_endian(2);  // other writers of the format use the shortest form
    if (tag != tag32) damaged();
    return big_endian(4);
  }

  std::string_view bytes_;
};

}  // namespace

void encode_call(const CallIdentity& identity, const std::vector<ChunkRef>& chunks,
                 std::string_view description, std::string_view inline_bytes, std::string* out) {
  out->clear();
  MsgpackWriter writer(out);
  writer.array(5);
  writer.unsigned_integer(static_cast<std::uint64_t>(HeaderKind::kCall));
  writer.map(8);
  writer.string("rank"), writer.unsigned_integer(identity.rank);
  writer.string("attempt"), writer.unsigned_integer(identity.attempt);
  writer.string("call"), writer.unsigned_integer(identity.call);
  writer.string("epoch"),
      identity.epoch == kNoEpoch ? writer.nil() : writer.integer(identity.epoch);
  writer.string("rows"), writer.unsigned_integer(identity.rows);
  writer.string("ground_truth_rows"), writer.unsigned_integer(identity.ground_truth_rows);
  writer.string("first_row"), writer.integer(identity.first_row);
  writer.string("chunks"), writer.array(chunks.size());
  for (const ChunkRef& chunk : chunks) {
    writer.array(5);
    writer.unsigned_integer(chunk.capture);
    writer.integer(chunk.segment);
    writer.unsigned_integer(chunk.key);
    writer.unsigned_integer(chunk.bytes);
    writer.unsigned_integer(chunk.crc);
  }
  writer.raw(description);
  writer.binary(inline_bytes);
  seal_value(writer, out);
}

void encode_gap(const Gap& gap, std::string* out) {
  out->clear();
  MsgpackWriter writer(out);
  writer.array(5);
  writer.unsigned_integer(static_cast<std::uint64_t>(HeaderKind::kGap));
  writer.map(5);
  writer.string("first_call"), writer.unsigned_integer(gap.first_call);
  writer.string("last_call"), writer.unsigned_integer(gap.last_call);
  writer.string("rows"), writer.unsigned_integer(gap.rows);
  writer.string("bytes"), writer.unsigned_integer(gap.bytes);
  writer.string("cause"), writer.string(gap.cause);
  writer.nil();
  writer.binary({});
  seal_value(writer, out);
}

bool header_is_sound(std::string_view value) noexcept {
  if (value.size() <= kChecksumBytes) return false;
  const std::size_t body = value.size() - kChecksumBytes;
  return static_cast<unsigned char>(value[body]) == 0xCE &&
         stored_checksum(value) == crc32c(value.data(), body);
}

DecodedHeader decode_header(std::string_view value) {
  HeaderReader reader(value);
  DecodedHeader header;
  if (reader.array() != 5)
    throw Error(ErrorKind::kCorruptData, "a stored header has not five parts");
  const std::uint64_t kind = reader.unsigned_integer();
  if (kind > static_cast<std::uint64_t>(HeaderKind::kGap)) HeaderReader::damaged();
  header.kind = static_cast<HeaderKind>(kind);
  if (header.kind != HeaderKind::kCall) return header;
  reader.map();
  CallIdentity& identity = header.identity;
  identity.rank = reader.field<std::uint32_t>("rank");
  identity.attempt = reader.field<std::uint32_t>("attempt");
  identity.call = reader.field<std::uint64_t>("call");
  reader.key("epoch");
  identity.epoch = reader.integer_or_nil(kNoEpoch);
  identity.rows = reader.field<std::uint32_t>("rows");
  identity.ground_truth_rows = reader.field<std::uint32_t>("ground_truth_rows");
  identity.first_row = reader.field<std::int64_t>("first_row");
  reader.key("chunks");
  std::size_t inline_total = 0;
  for (std::size_t left = reader.array(); left > 0; --left) {
    reader.array();
    ChunkRef chunk{};
    chunk.capture = static_cast<std::uint32_t>(reader.unsigned_integer());
    chunk.segment = static_cast<std::int32_t>(reader.integer());
    chunk.key = reader.unsigned_integer();
    chunk.bytes = reader.unsigned_integer();
    chunk.crc = static_cast<std::uint32_t>(reader.unsigned_integer());
    if (chunk.segment == ChunkRef::kInline) {
      // Inline pieces follow one another; the second condition keeps the sum from overflowing.
      if (chunk.key != inline_total || chunk.bytes > value.size()) HeaderReader::damaged();
      inline_total += chunk.bytes;
    }
    header.chunks.push_back(chunk);
  }
  // The inline bytes lie right before the checksum, whatever the description before them holds.
  if (inline_total + kChecksumBytes > value.size())
    throw Error(ErrorKind::kCorruptData, "a stored header is cut off");
  header.inline_bytes = value.substr(value.size() - kChecksumBytes - inline_total, inline_total);
  const std::string_view rest = reader.rest();
  header.description = rest.substr(0, description_bytes(rest, inline_total));
  return header;
}

void encode_meta(const SegmentTotals& totals, std::string* out) {
  out->clear();
  MsgpackWriter writer(out);
  writer.map(6);
  writer.string("format_version"), writer.unsigned_integer(kFormatVersion);
  writer.string("rows"), writer.unsigned_integer(totals.rows);
  writer.string("ground_truth_rows"), writer.unsigned_integer(totals.ground_truth_rows);
  writer.string("calls"), writer.unsigned_integer(totals.calls);
  writer.string("payload_bytes"), writer.unsigned_integer(totals.payload_bytes);
  writer.string("discarded_rows"), writer.unsigned_integer(totals.discarded_rows);
}

}  // namespace mld
