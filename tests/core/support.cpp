#include "support.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "store/files.h"
#include "store/segment_reader.h"

namespace support {

void skipped(const char* why) { std::fprintf(stderr, "skipped a test: %s\n", why); }

std::string pattern(std::uint64_t seed, std::size_t bytes) {
  Random random(seed);
  std::string text(bytes, '\0');
  for (std::size_t i = 0; i < bytes; i += 8) {
    const std::uint64_t word = random.next();
    std::memcpy(text.data() + i, &word, std::min<std::size_t>(8, bytes - i));
  }
  return text;
}

TempDir::TempDir() {
  const char* base = std::getenv("TMPDIR");
  std::string name = std::string(base == nullptr ? "/tmp" : base) + "/mld-core-XXXXXX";
  if (mkdtemp(name.data()) == nullptr)
    throw std::runtime_error("mkdtemp " + name + ": " + std::strerror(errno));
  path_ = name;
}

TempDir::~TempDir() {
  try {
    mld::remove_tree(path_);
  } catch (const mld::Error& error) {
    std::fprintf(stderr, "left behind: %s\n", error.what());
  }
}

SmallDisk::SmallDisk(std::size_t bytes) {
  const std::string options = "mode=0700,size=" + std::to_string(bytes);
  mounted_ = mount("mld-test", directory_.path().c_str(), "tmpfs", 0, options.c_str()) == 0;
}

SmallDisk::~SmallDisk() {
  if (mounted_) umount2(directory_.path().c_str(), MNT_DETACH);
}

void SmallDisk::fill() {
  const int file =
      open((directory_ / "ballast").c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  const std::array<char, 4096> block{};
  while (write(file, block.data(), block.size()) > 0) {
  }
  ::close(file);
}

void SmallDisk::empty() { unlink((directory_ / "ballast").c_str()); }

bool SmallDisk::make_read_only() {
  return mount("mld-test", directory_.path().c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr) ==
         0;
}

std::size_t open_descriptors() {
  return mld::list_directory("/proc/self/fd").size() - 1;
}  // less the listing's own

std::size_t core_threads() {
  std::size_t found = 0;
  for (const std::string& thread : mld::list_directory("/proc/self/task")) {
    if (read_file("/proc/self/task/" + thread + "/comm").rfind("mld-", 0) == 0) ++found;
  }
  return found;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

void write_file(const std::string& path, std::string_view content) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << content;
}

int in_child(const std::function<int()>& body) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // a child that hangs ends, and fails its test
    int status = 125;
    try {
      status = body();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "in the child: %s\n", error.what());
    }
    _exit(status);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

bool eventually(const std::function<bool()>& condition, std::chrono::nanoseconds patience) {
  const auto deadline = Clock::now() + patience;
  while (!condition()) {
    if (Clock::now() > deadline) return false;
    std::this_thread::sleep_for(1ms);
  }
  return true;
}

bool is_conserved(const mld::Counters& c) {
  std::uint64_t by_cause = 0;
  for (const std::uint64_t rows : c.rows_discarded_by_cause) by_cause += rows;
  // Sums wrap around, so more that landed than was submitted shows only in what is in flight.
  if (c.rows_in_flight > c.rows_submitted || c.bytes_in_flight > c.bytes_submitted) return false;
  return c.rows_submitted ==
             c.rows_committed + c.rows_discarded + c.rows_failed + c.rows_in_flight &&
         c.bytes_submitted ==
             c.bytes_committed + c.bytes_discarded + c.bytes_failed + c.bytes_in_flight &&
         by_cause == c.rows_discarded;
}

std::uint64_t record_call(mld::Recorder& recorder, std::int64_t epoch, std::uint32_t rows,
                          const std::vector<std::string>& captures) {
  const std::uint64_t number = recorder.begin_call(epoch, rows);
  for (std::uint32_t column = 0; column < captures.size(); ++column)
    capture(recorder, column, captures[column]);
  CHECK(end_call(recorder, rows));
  return number;
}

namespace {

std::uint64_t unsigned_at(std::string_view bytes) {
  const auto tag = static_cast<unsigned char>(bytes.at(0));
  if (tag < 0x80) return tag;
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < std::size_t{1} << (tag - 0xCC); ++i) {
    value = value << 8 | static_cast<unsigned char>(bytes.at(1 + i));
  }
  return value;
}

std::string text_field(std::string_view map, std::string_view name) {
  const std::size_t at =
      map.find(std::string(1, static_cast<char>(0xA0 | name.size())).append(name));
  if (at == std::string_view::npos) return {};
  const std::string_view value = map.substr(at + 1 + name.size());
  return std::string(value.substr(1, static_cast<unsigned char>(value.at(0)) & 0x1F));
}

// Of one segment into `found`; chunks are looked up afterwards, since they may lie in a later
// segment.
void read_headers(const mld::SegmentReader& reader, StoredPartition* found) {
  std::optional<std::uint64_t> after;
  for (;;) {
    const auto page = reader.headers(after, 7);  // a small page, so that paging is exercised
    if (page.empty()) return;
    for (const auto& [key, value] : page) {
      after = key;
      ++found->headers;
      const mld::DecodedHeader header = mld::decode_header(value);
      if (header.kind == mld::HeaderKind::kGap) {
        found->gaps.push_back({msgpack_field(value, "first_call"),
                               msgpack_field(value, "last_call"), msgpack_field(value, "rows"),
                               msgpack_field(value, "bytes"), text_field(value, "cause")});
        CHECK_EQ(key, found->gaps.back().first_call);
        continue;
      }
      CHECK_EQ(key, header.identity.call);
      StoredCall call{header.identity, {}, header.chunks};
      for (const mld::ChunkRef& chunk : header.chunks) {
        if (chunk.segment == mld::ChunkRef::kInline) {
          call.captures[chunk.capture].append(header.inline_bytes.substr(chunk.key, chunk.bytes));
        } else {
          call.captures[chunk.capture].append(chunk.bytes, '\0');
        }
      }
      found->calls.emplace(std::make_pair(header.identity.attempt, header.identity.call),
                           std::move(call));
    }
  }
}

// Fills in what lies in `chunks` of the segment `sequence` of `attempt`.
void read_chunks(const mld::SegmentReader& reader, std::uint32_t attempt, std::int32_t sequence,
                 StoredPartition* found) {
  for (auto& [key, call] : found->calls) {
    if (key.first != attempt) continue;
    std::map<std::uint32_t, std::uint64_t> offsets;
    for (const mld::ChunkRef& chunk : call.chunks) {
      const std::uint64_t offset = offsets[chunk.capture];
      offsets[chunk.capture] += chunk.bytes;
      if (chunk.segment != sequence) continue;
      reader.read({{chunk.key, offset, chunk.bytes, chunk.crc}},
                  reinterpret_cast<std::byte*>(call.captures[chunk.capture].data()));
    }
  }
}

}  // namespace

std::uint64_t msgpack_field(std::string_view map, std::string_view name) {
  const std::size_t at =
      map.find(std::string(1, static_cast<char>(0xA0 | name.size())).append(name));
  return at == std::string_view::npos ? 0 : unsigned_at(map.substr(at + 1 + name.size()));
}

StoredPartition read_partition(const std::string& directory) {
  StoredPartition found;
  struct Open {
    std::uint32_t attempt;
    std::int32_t sequence;
    std::unique_ptr<mld::SegmentReader> reader;
  };
  std::vector<Open> segments;
  for (const std::string& name : mld::list_directory(directory)) {
    const std::string path = directory + "/" + name;
    if (!mld::path_exists(path + "/" + mld::kSegmentFile)) continue;  // still being made
    Open open{};
    CHECK_EQ(std::sscanf(name.c_str(), "a%u-s%d", &open.attempt, &open.sequence), 2);
    const bool sealed = mld::path_exists(path + "/" + mld::kSealedFile);
    open.reader = std::make_unique<mld::SegmentReader>(path, sealed);
    ++found.segments;
    if (sealed) ++found.sealed;
    segments.push_back(std::move(open));
  }
  for (const Open& open : segments) {
    const std::string meta = open.reader->meta();
    found.meta_rows += msgpack_field(meta, "rows");
    found.meta_calls += msgpack_field(meta, "calls");
    found.meta_payload_bytes += msgpack_field(meta, "payload_bytes");
    found.meta_discarded_rows += msgpack_field(meta, "discarded_rows");
    read_headers(*open.reader, &found);
  }
  for (const Open& open : segments) read_chunks(*open.reader, open.attempt, open.sequence, &found);
  return found;
}

std::map<std::string, StoredPartition> read_rank(const std::string& directory) {
  std::map<std::string, StoredPartition> found;
  for (const std::string& name : mld::list_directory(directory)) {
    if (name.rfind("epoch-", 0) == 0) found.emplace(name, read_partition(directory + "/" + name));
  }
  return found;
}

std::uint64_t Bench::chunk(std::uint32_t recorder, std::int64_t epoch, std::uint64_t call,
                           std::uint32_t capture, std::string_view bytes) {
  mld::RecordHeader header{};
  header.kind = mld::RecordKind::kChunk;
  header.attempt = recorder;
  header.call = call;
  header.epoch = epoch;
  header.capture = capture;
  return put(header, bytes);
}

std::uint64_t Bench::call(std::uint32_t recorder, std::int64_t epoch, std::uint64_t call,
                          std::uint32_t rows, std::uint64_t call_bytes,
                          std::uint32_t ground_truth_rows) {
  mld::RecordHeader header{};
  header.kind = mld::RecordKind::kCall;
  header.attempt = recorder;
  header.call = call;
  header.epoch = epoch;
  header.rows = rows;
  header.ground_truth_rows = ground_truth_rows;
  header.first_row = static_cast<std::int64_t>(call) * 1000;
  header.call_bytes = call_bytes;
  return put(header, "\xC0");
}

std::uint64_t Bench::put(const mld::RecordHeader& fields, std::string_view payload) {
  mld::RecordHeader header = fields;
  header.payload_bytes = payload.size();
  Ring::Slot slot;
  REQUIRE(ring_.try_reserve(mld::chunk_slot_bytes(payload.size()), &slot));
  std::memcpy(slot.data, &header, sizeof header);
  std::memcpy(slot.data + sizeof header, payload.data(), payload.size());
  ring_.publish(slot);
  return slot.position;
}

mld::PendingRecord Bench::take() {
  Ring::Slot slot;
  REQUIRE(ring_.read(&slot));
  return {slot.position, reinterpret_cast<const mld::RecordHeader*>(slot.data)};
}

}  // namespace support
