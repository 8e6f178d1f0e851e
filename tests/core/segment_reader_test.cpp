// Reading a segment, sound or damaged, beside its writer or long after it.
#include "store/segment_reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "check.h"
#include "store/crc32c.h"
#include "store/files.h"
#include "store/segment.h"
#include "support.h"

namespace {

using mld::ErrorKind;
using mld::SegmentReader;
using support::kind_of;
using support::pattern;
using support::TempDir;

constexpr mld::SegmentIdentity kIdentity{0, 0, 0, 0};

mld::Segment make_segment(const std::string& directory, mld::Sync sync = mld::Sync::kOnRequest) {
  return mld::Segment(directory, kIdentity, sync, std::size_t{16} << 20);
}

// Writes chunk 8*i and the header of call i, for i in [first, end).
void write_calls(mld::Segment& segment, std::uint64_t first, std::uint64_t end) {
  mld::Segment::Batch batch(segment);
  for (std::uint64_t call = first; call < end; ++call) {
    const std::string bytes = pattern(call, 5000);
    batch.append_chunk(call * 8, bytes);
    std::string header;
    mld::encode_call({0, 0, call, 0, 1, 0, 0},
                     {{0, 0, call * 8, bytes.size(), mld::crc32c(bytes.data(), bytes.size())}},
                     "\xC0", "", &header);
    batch.put_header(call, header);
    batch.totals().rows += 1;
  }
  batch.commit();
}

mld::ChunkRequest request_for(std::uint64_t call, std::uint64_t offset = 0) {
  const std::string bytes = pattern(call, 5000);
  return {call * 8, offset, bytes.size(), mld::crc32c(bytes.data(), bytes.size())};
}

}  // namespace

TEST(reader_pages_through_headers_in_order) {
  const TempDir directory;
  mld::Segment segment = make_segment(directory / "s");
  write_calls(segment, 0, 25);
  const SegmentReader reader(directory / "s", false);
  std::optional<std::uint64_t> after;
  std::uint64_t expected = 0;
  for (;;) {
    const auto page = reader.headers(after, 10);
    if (page.empty()) break;
    CHECK(page.size() <= 10);
    for (const auto& [key, value] : page) CHECK_EQ(key, expected++);
    after = page.back().first;
  }
  CHECK_EQ(expected, 25);
  CHECK_EQ(reader.headers(7, 1).at(0).first, 8);
  CHECK(reader.headers(std::nullopt, 0).empty());
  CHECK(reader.headers(~std::uint64_t{0}, 10).empty());
  CHECK_EQ(support::msgpack_field(reader.meta(), "rows"), 25);
}

TEST(reader_sees_each_commit_of_the_writer_that_shares_its_environment) {
  const TempDir directory;
  mld::Segment segment = make_segment(directory / "s");
  const SegmentReader reader(directory / "s", false);
  CHECK(reader.meta().empty());
  CHECK(reader.headers(std::nullopt, 100).empty());
  const std::size_t descriptors = support::open_descriptors();
  for (std::uint64_t round = 0; round < 5; ++round) {
    write_calls(segment, round * 10, round * 10 + 10);
    CHECK_EQ(reader.headers(std::nullopt, 1000).size(), round * 10 + 10);
  }
  CHECK_EQ(support::open_descriptors(), descriptors);
  segment.seal();  // the reader keeps it open
  CHECK_EQ(reader.headers(std::nullopt, 1000).size(), 50);
  const SegmentReader second(directory / "s", true);
  CHECK_EQ(support::open_descriptors(), descriptors);
  std::string out(15000, '\0');
  second.read({request_for(3), request_for(49, 5000), request_for(0, 10000)},
              reinterpret_cast<std::byte*>(out.data()));
  CHECK(out == pattern(3, 5000) + pattern(49, 5000) + pattern(0, 5000));
}

TEST(reader_of_a_segment_that_is_gone_says_not_found) {
  const TempDir directory;
  CHECK(kind_of([&] { SegmentReader(directory / "none", true); }) == ErrorKind::kNotFound);
  CHECK(kind_of([&] { SegmentReader(directory / "none", false); }) == ErrorKind::kNotFound);
  CHECK(!mld::path_exists(directory / "none"));
}

TEST(reader_keeps_what_it_has_open_when_the_segment_is_deleted) {
  const TempDir directory;
  mld::Segment segment = make_segment(directory / "s");
  write_calls(segment, 0, 3);
  segment.seal();
  const SegmentReader reader(directory / "s", true);
  mld::remove_tree(directory / "s");
  CHECK_EQ(reader.headers(std::nullopt, 10).size(), 3);
  CHECK(kind_of([&] { SegmentReader(directory / "s", true); }) == ErrorKind::kNotFound);
}

TEST(reader_refuses_garbage) {
  const TempDir directory;
  mld::make_directories(directory / "garbage");
  support::write_file(directory / "garbage/data.mdb", pattern(1, 100000));
  CHECK(kind_of([&] { SegmentReader(directory / "garbage", true); }) == ErrorKind::kCorruptData);
  support::write_file(directory / "garbage/data.mdb", "short");
  CHECK(kind_of([&] { SegmentReader(directory / "garbage", true); }) == ErrorKind::kCorruptData);
}

// LMDB has no checksums of its own: whatever byte of the payload or of a header flips must be
// noticed by ours.
TEST(reader_notices_flipped_bytes) {
  const TempDir directory;
  {
    mld::Segment segment = make_segment(directory / "s");
    write_calls(segment, 0, 4);
    segment.seal();
  }
  const std::string sound = support::read_file(directory / "s/data.mdb");
  const auto flip = [&](std::size_t at) {
    std::string damaged = sound;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x40);
    support::write_file(directory / "s/data.mdb", damaged);
  };
  std::string out(5000, '\0');
  const auto read = [&](std::uint64_t call) {
    return kind_of([&] {
      SegmentReader(directory / "s", true)
          .read({request_for(call)}, reinterpret_cast<std::byte*>(out.data()));
    });
  };
  const std::size_t payload = sound.find(pattern(2, 5000));
  REQUIRE(payload != std::string::npos);
  for (const std::size_t at : {payload, payload + 2500, payload + 4999}) {
    flip(at);
    CHECK(read(2) == ErrorKind::kCorruptData);
    CHECK(read(1) == std::nullopt);
  }
  std::string header;
  const std::uint32_t crc = request_for(2).crc;
  mld::encode_call({0, 0, 2, 0, 1, 0, 0}, {{0, 0, 16, 5000, crc}}, "\xC0", "", &header);
  const std::size_t header_at = sound.rfind(header);
  REQUIRE(header_at != std::string::npos);
  for (std::size_t at = 0; at < header.size(); ++at) {
    flip(header_at + at);
    CHECK(kind_of([&] { return SegmentReader(directory / "s", true).headers(std::nullopt, 10); }) ==
          ErrorKind::kCorruptData);
  }
}

TEST(reader_refuses_a_chunk_of_another_size_or_checksum) {
  const TempDir directory;
  mld::Segment segment = make_segment(directory / "s");
  write_calls(segment, 0, 2);
  const SegmentReader reader(directory / "s", false);
  std::string out(5000, '\0');
  const auto read = [&](mld::ChunkRequest request) {
    return kind_of([&] { reader.read({request}, reinterpret_cast<std::byte*>(out.data())); });
  };
  CHECK(read(request_for(1)) == std::nullopt);
  mld::ChunkRequest wrong = request_for(1);
  wrong.bytes -= 1;
  CHECK(read(wrong) == ErrorKind::kCorruptData);
  wrong = request_for(1);
  wrong.crc ^= 1;
  CHECK(read(wrong) == ErrorKind::kCorruptData);
  wrong = request_for(1);
  wrong.key = 5;
  CHECK(read(wrong) == ErrorKind::kCorruptData);
}

TEST(segment_batch_that_is_not_committed_leaves_nothing) {
  const TempDir directory;
  mld::Segment segment = make_segment(directory / "s", mld::Sync::kEveryCommit);
  write_calls(segment, 0, 2);
  {
    mld::Segment::Batch batch(segment);
    batch.append_chunk(1000, "lost");
    batch.put_header(50, "lost");
    batch.totals().rows = 99;
  }
  CHECK_EQ(segment.totals().rows, 2);
  const SegmentReader reader(directory / "s", false);
  CHECK_EQ(reader.headers(std::nullopt, 10).size(), 2);
  CHECK_EQ(support::msgpack_field(reader.meta(), "rows"), 2);
  char out[4];
  CHECK(!segment.read_chunk(1000, out, 4));
}

TEST(segment_describes_itself_in_json) {
  const TempDir directory;
  mld::Segment segment(directory / "s", {4, 3, 2, mld::kNoEpoch}, mld::Sync::kEveryCommit,
                       std::size_t{16} << 20);
  const std::string json = support::read_file(directory / "s/segment.json");
  for (const char* part :
       {"\"format_version\": 1", "\"rank\": 4", "\"attempt\": 3", "\"sequence\": 2",
        "\"epoch\": null", "\"durability\": \"power\"", "\"boot_id\": \""}) {
    CHECK(json.find(part) != std::string::npos);
  }
  CHECK(!mld::path_exists(directory / "s/sealed.json"));
  write_calls(segment, 0, 3);
  segment.seal();
  CHECK(support::read_file(directory / "s/sealed.json").find("\"rows\": 3") != std::string::npos);
}

TEST(reader_scans_headers_as_columns_and_leaves_other_calls_whole) {
  const TempDir directory;
  mld::Segment segment = make_segment(directory / "s");
  write_calls(segment, 0, 3);
  {
    mld::Segment::Batch batch(segment);
    std::string header;
    mld::encode_call({0, 0, 3, 0, 2, 2, 9}, {{1, -1, 0, 3, 0}, {1, -1, 3, 2, 0}}, "\xA1x", "abcde",
                     &header);
    batch.put_header(3, header);
    mld::encode_call({0, 0, 4, 0, 1, 0, 11}, {{0, 7, 64, 5000, 0}}, "\xC0", "", &header);
    batch.put_header(4, header);  // its bytes lie in segment 7
    mld::encode_gap({5, 6, 4, 40, "stall"}, &header);
    batch.put_header(5, header);
    batch.commit();
  }
  const SegmentReader reader(directory / "s", false);
  const mld::HeaderScan found = reader.scan(std::nullopt, 100, kIdentity);
  CHECK(found.keys == (std::vector<std::int64_t>{0, 1, 2, 3, 4, 5}));
  CHECK(found.description == (std::vector<std::int64_t>{0, 0, 0, 1, -1, -1}));
  CHECK(found.descriptions == (std::vector<std::string>{"\xC0", "\xA1x"}));
  CHECK_EQ(found.others.size(), 2);
  CHECK_EQ(found.rows.at(3), 2);
  CHECK_EQ(found.ground_truth_rows.at(3), 2);
  CHECK_EQ(found.first_rows.at(3), 9);
  CHECK_EQ(found.lengths.at(0), 5000);
  CHECK_EQ(found.lengths.at(3 * mld::HeaderScan::kCaptures + 1), 5);
  CHECK_EQ(found.chunk_bytes.at(0), 5000);
  CHECK_EQ(found.chunk_bytes.at(3), 0);
  CHECK_EQ(reader.scan(2, 2, kIdentity).keys.size(), 2);
  CHECK_EQ(reader.scan(std::nullopt, 9, {1, 0, 0, 0}).others.size(), 6);  // another rank's
}

TEST(reader_gathers_a_capture_of_many_calls) {
  const TempDir directory;
  mld::Segment segment = make_segment(directory / "s");
  write_calls(segment, 0, 4);
  const SegmentReader reader(directory / "s", false);
  std::string out(10000, '\0');
  auto* data = reinterpret_cast<std::byte*>(out.data());
  reader.gather({3, 1}, {{0, data, out.size()}});
  CHECK(out == pattern(3, 5000) + pattern(1, 5000));
  const auto wrong = [&](std::uint64_t call, std::size_t bytes) {
    return kind_of([&] { reader.gather({call}, {{0, data, bytes}}); });
  };
  CHECK(wrong(0, 4999) == ErrorKind::kCorruptData);  // more than there is room for
  CHECK(wrong(0, 5001) == ErrorKind::kCorruptData);  // less than was asked for
  CHECK(wrong(9, 5000) == ErrorKind::kCorruptData);  // no such call
}

TEST(reader_gathers_no_inline_bytes_that_are_not_what_was_written) {
  const TempDir directory;
  mld::Segment segment = make_segment(directory / "s");
  std::string header;
  mld::encode_call({0, 0, 0, 0, 1, 0, 0}, {{0, -1, 0, 3, mld::crc32c("abc", 3)}, {1, -1, 3, 3, 1}},
                   "\xC0", "abcdef", &header);
  mld::Segment::Batch batch(segment);
  batch.put_header(0, header);
  batch.commit();
  const SegmentReader reader(directory / "s", false);
  std::string out(3, '\0');
  auto* data = reinterpret_cast<std::byte*>(out.data());
  reader.gather({0}, {{0, data, 3}});
  CHECK(out == "abc");
  CHECK(kind_of([&] { reader.gather({0}, {{1, data, 3}}); }) == ErrorKind::kCorruptData);
}

namespace {

void cut_file(const std::string& directory, std::uint64_t bytes) {
  CHECK_EQ(truncate((directory + "/data.mdb").c_str(), static_cast<off_t>(bytes)), 0);
}

void poke(const std::string& directory, off_t offset, std::uint64_t value, std::size_t bytes) {
  const int file = open((directory + "/data.mdb").c_str(), O_RDWR | O_CLOEXEC);
  CHECK(file >= 0);
  CHECK_EQ(pwrite(file, &value, bytes, offset), static_cast<ssize_t>(bytes));
  close(file);
}

// Of a meta page where a word has 64 bits: page size, root of the unnamed database, last page.
constexpr off_t kPageSizeAt = 40, kRootAt = 16 + 24 + 48 + 40, kLastPageAt = 136;

}  // namespace

// LMDB maps the file: without a look at its length, each of these was a SIGBUS.
TEST(reader_of_a_file_that_was_cut_off_says_so_wherever_the_cut_is) {
  const TempDir directory;
  {
    mld::Segment segment = make_segment(directory / "s");
    write_calls(segment, 0, 25);
    segment.seal();
  }
  const std::uint64_t whole = mld::file_bytes(directory / "s/data.mdb");
  CHECK(whole > 30 * 4096);
  for (std::uint64_t bytes = whole - 1;; bytes -= std::min<std::uint64_t>(bytes, 4095)) {
    cut_file(directory / "s", bytes);
    for (const bool sealed : {true, false})
      CHECK(kind_of([&] { SegmentReader(directory / "s", sealed); }) == ErrorKind::kCorruptData);
    if (bytes == 0) break;
  }
}

TEST(reader_whose_file_is_cut_off_while_it_is_open_says_so) {
  const TempDir directory;
  {
    mld::Segment segment = make_segment(directory / "s");
    write_calls(segment, 0, 25);
    segment.seal();
  }
  const SegmentReader reader(directory / "s", true);
  CHECK_EQ(reader.headers(std::nullopt, 100).size(), 25);
  for (const std::uint64_t bytes :
       {std::uint64_t{20 * 4096}, std::uint64_t{4096}, std::uint64_t{0}}) {
    cut_file(directory / "s", bytes);
    std::string out(5000, '\0');
    auto* const data = reinterpret_cast<std::byte*>(out.data());
    CHECK(kind_of([&] { static_cast<void>(reader.headers(std::nullopt, 100)); }) ==
          ErrorKind::kCorruptData);
    CHECK(kind_of([&] { static_cast<void>(reader.meta()); }) == ErrorKind::kCorruptData);
    CHECK(kind_of([&] { reader.read({request_for(3)}, data); }) == ErrorKind::kCorruptData);
  }
}

TEST(reader_of_meta_pages_that_lie_says_so) {
  const TempDir directory;
  {
    mld::Segment segment = make_segment(directory / "s");
    write_calls(segment, 0, 25);
    segment.seal();
  }
  std::ifstream file(directory / "s/data.mdb", std::ios::binary);
  const std::string sound((std::istreambuf_iterator<char>(file)), {});
  struct Lie {
    off_t at;
    std::size_t bytes;
    std::uint64_t value;
  };
  std::vector<Lie> lies;
  for (const std::uint64_t size : {0ULL, 1ULL, 4097ULL, 1ULL << 31, 0xFFFFFFFFULL})
    lies.push_back({kPageSizeAt, 4, size});
  for (const std::uint64_t page :
       {std::uint64_t{1000000}, std::uint64_t{1} << 40, std::uint64_t{1} << 52,
        (std::uint64_t{1} << 52) + 4, ~std::uint64_t{0} - 1}) {
    lies.push_back({kRootAt, 8, page});
    lies.push_back({kLastPageAt, 8, page});
  }
  for (const Lie& lie : lies) {
    {
      std::ofstream copy(directory / "s/data.mdb", std::ios::binary | std::ios::trunc);
      copy << sound;
    }
    for (const off_t page : {0, 4096}) poke(directory / "s", page + lie.at, lie.value, lie.bytes);
    CHECK(kind_of([&] { SegmentReader(directory / "s", true); }) == ErrorKind::kCorruptData);
  }
}
