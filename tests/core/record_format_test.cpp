// The bytes of a header: pinned, read back, and damaged in every place.
#include "store/record_format.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "store/crc32c.h"
#include "store/msgpack_writer.h"
#include "support.h"

namespace {

using mld::ChunkRef;
using mld::DecodedHeader;
using support::Random;

std::string hex(std::string_view bytes) {
  std::string text;
  char pair[3];
  for (const char byte : bytes) {
    std::snprintf(pair, sizeof pair, "%02x", static_cast<unsigned char>(byte));
    text += pair;
  }
  return text;
}

std::string text_as_hex(std::string_view text) {
  return hex(std::string(1, static_cast<char>(0xA0 | text.size())).append(text));
}

std::string sample_call() {
  const mld::CallIdentity identity{3, 2, 300, 7, 4, 4, std::int64_t{1} << 49};
  std::string out;
  mld::encode_call(identity, {{0, ChunkRef::kInline, 0, 5, 0xDEADBEEF}, {1, 2, 70000, 1048560, 17}},
                   "\x80", "abcde", &out);
  return out;
}

// Decodes a copy that ends exactly where its heap block ends, so that AddressSanitizer sees a byte
// read too much.
std::optional<DecodedHeader> decode_tight(std::string_view value) {
  const std::unique_ptr<char[]> block(new char[value.size()]);
  std::copy(value.begin(), value.end(), block.get());
  try {
    DecodedHeader header = mld::decode_header({block.get(), value.size()});
    // Whoever uses the inline bytes goes by the references: they must lie inside.
    for (const ChunkRef& chunk : header.chunks) {
      if (chunk.segment != ChunkRef::kInline) continue;
      CHECK(chunk.key <= header.inline_bytes.size());
      CHECK(chunk.bytes <= header.inline_bytes.size() - chunk.key);
      static_cast<void>(mld::crc32c(header.inline_bytes.data() + chunk.key, chunk.bytes));
    }
    header.inline_bytes = {};
    return header;
  } catch (const mld::Error& error) {
    CHECK(error.kind() == mld::ErrorKind::kCorruptData);
    return std::nullopt;
  }
}

}  // namespace

// Pinned: whoever changes these bytes changes kFormatVersion and docs/record_format.md too.
TEST(format_bytes_of_a_call_are_pinned) {
  const std::string value = sample_call();
  const std::string expected =
      "95"
      "00"
      "88" +
      text_as_hex("rank") + "03" + text_as_hex("attempt") + "02" + text_as_hex("call") + "cd012c" +
      text_as_hex("epoch") + "07" + text_as_hex("rows") + "04" + text_as_hex("ground_truth_rows") +
      "04" + text_as_hex("first_row") + "cf0002000000000000" + text_as_hex("chunks") +
      "92"
      "95"
      "00"
      "ff"
      "00"
      "05"
      "cedeadbeef"
      "95"
      "01"
      "02"
      "ce00011170"
      "ce000ffff0"
      "11"
      "80"
      "c405" +
      hex("abcde");
  CHECK_EQ(hex(value.substr(0, value.size() - 5)), expected);
  CHECK_EQ(hex(value.substr(value.size() - 5, 1)), "ce");
  CHECK(mld::header_is_sound(value));
}

TEST(format_bytes_of_a_gap_are_pinned) {
  std::string value;
  mld::encode_gap({5, 9, 160, 70000, "ring_full"}, &value);
  const std::string expected =
      "95"
      "01"
      "85" +
      text_as_hex("first_call") + "05" + text_as_hex("last_call") + "09" + text_as_hex("rows") +
      "cca0" + text_as_hex("bytes") + "ce00011170" + text_as_hex("cause") +
      text_as_hex("ring_full") +
      "c0"
      "c400";
  CHECK_EQ(hex(value.substr(0, value.size() - 5)), expected);
  CHECK(mld::header_is_sound(value));
  CHECK(mld::decode_header(value).kind == mld::HeaderKind::kGap);
}

TEST(format_bytes_of_the_totals_are_pinned) {
  std::string value;
  mld::encode_meta({256, 128, 8, 1 << 20, 3}, &value);
  CHECK_EQ(hex(value), "86" + text_as_hex("format_version") + "01" + text_as_hex("rows") +
                           "cd0100" + text_as_hex("ground_truth_rows") + "cc80" +
                           text_as_hex("calls") + "08" + text_as_hex("payload_bytes") +
                           "ce00100000" + text_as_hex("discarded_rows") + "03");
}

TEST(msgpack_integers_take_their_shortest_form) {
  const auto encoded = [](std::int64_t value) {
    std::string out;
    mld::MsgpackWriter(&out).integer(value);
    return hex(out);
  };
  CHECK_EQ(encoded(0), "00");
  CHECK_EQ(encoded(127), "7f");
  CHECK_EQ(encoded(128), "cc80");
  CHECK_EQ(encoded(255), "ccff");
  CHECK_EQ(encoded(256), "cd0100");
  CHECK_EQ(encoded(65536), "ce00010000");
  CHECK_EQ(encoded(std::int64_t{1} << 32), "cf0000000100000000");
  CHECK_EQ(encoded(-1), "ff");
  CHECK_EQ(encoded(-32), "e0");
  CHECK_EQ(encoded(-33), "d3ffffffffffffffdf");
}

TEST(msgpack_lengths_change_form_at_their_limits) {
  const auto head = [](auto write) {
    std::string out;
    mld::MsgpackWriter writer(&out);
    write(writer);
    return hex(out.substr(0, 6));
  };
  CHECK_EQ(head([](auto& w) { w.string(std::string(31, 'a')); }).substr(0, 4), "bf61");
  CHECK_EQ(head([](auto& w) { w.string(std::string(32, 'a')); }), "db0000002061");
  CHECK_EQ(head([](auto& w) { w.binary(std::string(255, 'a')); }).substr(0, 6), "c4ff61");
  CHECK_EQ(head([](auto& w) { w.binary(std::string(256, 'a')); }), "c60000010061");
  CHECK_EQ(head([](auto& w) { w.array(15); }), "9f");
  CHECK_EQ(head([](auto& w) { w.array(16); }), "dd00000010");
  CHECK_EQ(head([](auto& w) { w.map(16); }), "df00000010");
}

TEST(format_decodes_what_it_encodes) {
  Random random(21);
  for (int round = 0; round < 300; ++round) {
    const mld::CallIdentity identity{
        static_cast<std::uint32_t>(random.below(mld::kMaxRanks)),
        static_cast<std::uint32_t>(random.below(mld::kMaxAttempts)),
        random.next() >> random.below(64),
        round % 3 == 0 ? mld::kNoEpoch
                       : static_cast<std::int64_t>(random.next() >> (1 + random.below(63))),
        static_cast<std::uint32_t>(random.next()),
        static_cast<std::uint32_t>(random.next()),
        static_cast<std::int64_t>(random.next() >> 1)};
    std::vector<ChunkRef> chunks;
    std::string inline_bytes;
    for (std::uint64_t i = random.below(round % 20 == 0 ? 2000 : 20); i > 0; --i) {
      const auto capture = static_cast<std::uint32_t>(i);
      if (random.below(2) == 0) {
        chunks.push_back({capture, ChunkRef::kInline, inline_bytes.size(), random.below(300),
                          static_cast<std::uint32_t>(random.next())});
        inline_bytes += support::pattern(i, chunks.back().bytes);
      } else {
        chunks.push_back({capture, static_cast<std::int32_t>(random.below(1000)), random.next(),
                          random.next(), static_cast<std::uint32_t>(random.next())});
      }
    }
    std::string value;
    mld::encode_call(identity, chunks, support::pattern(1, random.below(500)), inline_bytes,
                     &value);
    REQUIRE(mld::header_is_sound(value));
    const DecodedHeader header = mld::decode_header(value);
    CHECK(header.kind == mld::HeaderKind::kCall);
    CHECK_EQ(header.identity.rank, identity.rank);
    CHECK_EQ(header.identity.attempt, identity.attempt);
    CHECK_EQ(header.identity.call, identity.call);
    CHECK_EQ(header.identity.epoch, identity.epoch);
    CHECK_EQ(header.identity.rows, identity.rows);
    CHECK_EQ(header.identity.ground_truth_rows, identity.ground_truth_rows);
    CHECK_EQ(header.identity.first_row, identity.first_row);
    CHECK(header.inline_bytes == inline_bytes);
    REQUIRE(header.chunks.size() == chunks.size());
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      CHECK_EQ(header.chunks[i].capture, chunks[i].capture);
      CHECK_EQ(header.chunks[i].segment, chunks[i].segment);
      CHECK_EQ(header.chunks[i].key, chunks[i].key);
      CHECK_EQ(header.chunks[i].bytes, chunks[i].bytes);
      CHECK_EQ(header.chunks[i].crc, chunks[i].crc);
    }
  }
}

TEST(format_refuses_every_truncation) {
  const std::string value = sample_call();
  for (std::size_t bytes = 0; bytes < value.size(); ++bytes) {
    CHECK(!mld::header_is_sound(std::string_view(value).substr(0, bytes)));
    static_cast<void>(decode_tight(
        std::string_view(value).substr(0, bytes)));  // an error, or nothing outside is read
  }
  CHECK(!decode_tight({}).has_value());
}

TEST(format_refuses_every_flipped_byte) {
  std::string value = sample_call();
  for (std::size_t at = 0; at < value.size(); ++at) {
    for (int flip = 1; flip < 256; ++flip) {
      value[at] = static_cast<char>(value[at] ^ flip);
      CHECK(!mld::header_is_sound(value));
      static_cast<void>(decode_tight(value));
      value[at] = static_cast<char>(value[at] ^ flip);
    }
  }
  CHECK(mld::header_is_sound(value));
}

TEST(format_reads_nothing_outside_of_random_bytes) {
  Random random(22);
  for (int round = 0; round < 20000; ++round) {
    std::string value = sample_call();
    for (std::uint64_t edits = 1 + random.below(6); edits > 0; --edits) {
      value[random.below(value.size())] = static_cast<char>(random.next());
    }
    static_cast<void>(
        decode_tight(std::string_view(value).substr(0, random.below(value.size() + 1))));
  }
}

// Two lengths that add up to nearly nothing in 64 bits.
TEST(format_refuses_inline_lengths_that_overflow) {
  std::string value;
  const std::uint64_t half = std::uint64_t{1} << 63;
  mld::encode_call({0, 0, 0, 0, 1, 0, 0},
                   {{0, ChunkRef::kInline, 0, half, 0}, {1, ChunkRef::kInline, half, half, 0}},
                   "\xC0", "", &value);
  CHECK(!decode_tight(value).has_value());
}

TEST(format_refuses_a_kind_that_no_writer_writes) {
  std::string value = sample_call();
  value[1] = 2;
  CHECK(!decode_tight(value).has_value());
}

TEST(keys_sort_as_numbers) {
  Random random(23);
  for (int round = 0; round < 1000; ++round) {
    const std::uint64_t a = random.next() >> random.below(64),
                        b = random.next() >> random.below(64);
    const mld::Key x = mld::encode_key(a), y = mld::encode_key(b);
    CHECK_EQ(mld::decode_key(x.data()), a);
    CHECK_EQ(std::memcmp(x.data(), y.data(), 8) < 0, a < b);
  }
}
