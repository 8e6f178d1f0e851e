// What the tests of the core share: temporary directories, disks that are full, a seeded generator,
// counts of what the process holds, and the oracle that reads a rank's directory back as a stranger
// would.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "capture/recorder.h"
#include "check.h"
#include "errors.h"
#include "ledger.h"
#include "ring/arena.h"
#include "ring/byte_ring.h"
#include "ring/record.h"
#include "store/record_format.h"
#include "store/store.h"

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kUnderAsan = true;
#else
inline constexpr bool kUnderAsan = false;
#endif
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kUnderTsan = true;
#else
inline constexpr bool kUnderTsan = false;
#endif

namespace support {

using namespace std::chrono_literals;
using mld::Clock;

// Says on stderr that the running test was left out, and why.
void skipped(const char* why);

// splitmix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014): the same
// numbers everywhere.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t value = (state_ += 0x9E3779B97F4A7C15);
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
    return value ^ (value >> 31);
  }
  std::uint64_t below(std::uint64_t bound) { return next() % bound; }

 private:
  std::uint64_t state_;
};

// `bytes` bytes that depend on `seed` and their place, so that a shifted or torn copy differs.
std::string pattern(std::uint64_t seed, std::size_t bytes);

class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// A tmpfs of its own that can be filled and emptied; `mounted()` is false where that needs more
// rights than we have.
class SmallDisk {
 public:
  explicit SmallDisk(std::size_t bytes);
  ~SmallDisk();
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  [[nodiscard]] bool mounted() const { return mounted_; }
  [[nodiscard]] std::string operator/(const std::string& name) const { return directory_ / name; }
  void fill();            // until not one byte more fits
  void empty();           // takes the ballast away
  bool make_read_only();  // nothing may be open for writing

 private:
  TempDir directory_;
  bool mounted_ = false;
};

std::size_t open_descriptors();
// Threads of this process whose name begins with `mld-`.
std::size_t core_threads();

std::string read_file(const std::string& path);
void write_file(const std::string& path, std::string_view content);

// Runs `body` in a forked child; returns its exit status, 128 + the signal if one ended it. `body`
// returns the status.
int in_child(const std::function<int()>& body);

// Polls until `condition` holds, up to `patience`: for what another thread does in its own time.
bool eventually(const std::function<bool()>& condition, std::chrono::nanoseconds patience = 10s);

// The kind of mld::Error that `body` throws; nullopt if none.
template <class Body>
std::optional<mld::ErrorKind> kind_of(Body body) {
  try {
    body();
  } catch (const mld::Error& error) {
    return error.kind();
  }
  return std::nullopt;
}

// rows and bytes: submitted == committed + discarded + failed + in flight.
bool is_conserved(const mld::Counters& counters);

// Bytes for Recorder::capture.
class StringSource final : public mld::ByteSource {
 public:
  explicit StringSource(std::string_view bytes) : bytes_(bytes) {}
  const std::byte* borrow() override { return reinterpret_cast<const std::byte*>(bytes_.data()); }

 private:
  std::string_view bytes_;
};

inline void capture(mld::Recorder& recorder, std::uint32_t column, std::string_view bytes) {
  StringSource source(bytes);
  mld::WaitHooks hooks;
  const auto length = static_cast<std::int64_t>(bytes.size());
  recorder.capture(*recorder.current_call(), column, "uint8", &length, 1, bytes.size(), source,
                   hooks);
}
inline bool end_call(mld::Recorder& recorder, std::uint32_t rows,
                     std::uint32_t ground_truth_rows = 0) {
  mld::WaitHooks hooks;
  return recorder.end_call("\xC0", rows, ground_truth_rows,
                           hooks);  // nil: the core does not look into it
}
// A whole call with one capture a string; returns its number.
std::uint64_t record_call(mld::Recorder& recorder, std::int64_t epoch, std::uint32_t rows,
                          const std::vector<std::string>& captures);
inline void flush(mld::Recorder& recorder,
                  std::optional<std::chrono::nanoseconds> timeout = std::nullopt) {
  mld::WaitHooks hooks;
  recorder.flush(timeout, hooks);
}
inline bool close(mld::Recorder& recorder, std::chrono::nanoseconds timeout = 20s) {
  mld::WaitHooks hooks;
  return recorder.close(timeout, hooks);
}
inline std::string read_back(mld::Recorder& recorder, std::uint32_t capture_number) {
  mld::WaitHooks hooks;
  return recorder.read_back(capture_number, hooks);
}

// What lies on disk, found by nothing but docs/record_format.md.
struct StoredCall {
  mld::CallIdentity identity{};
  std::map<std::uint32_t, std::string> captures;  // joined pieces
  std::vector<mld::ChunkRef> chunks;
};
struct StoredGap {
  std::uint64_t first_call, last_call, rows, bytes;
  std::string cause;
};
struct StoredPartition {
  std::map<std::pair<std::uint32_t, std::uint64_t>, StoredCall>
      calls;  // by (attempt, call), each once
  std::vector<StoredGap> gaps;
  std::size_t headers = 0;  // with repetitions
  std::size_t segments = 0;
  std::size_t sealed = 0;
  std::uint64_t meta_rows = 0, meta_calls = 0, meta_payload_bytes = 0, meta_discarded_rows = 0;
};
// Checks every checksum on the way; what is wrong fails the running test.
StoredPartition read_partition(const std::string& directory);
// By name of the partition.
std::map<std::string, StoredPartition> read_rank(const std::string& directory);

// A field of a msgpack map of unsigned integers, as `meta` and a gap's core are; 0 if it is not
// there.
std::uint64_t msgpack_field(std::string_view map, std::string_view name);

// A Writer's surroundings without a thread: a ring, and records put into it by hand.
class Bench {
 public:
  using Ring = mld::MpscByteRing<std::uint64_t>;
  explicit Bench(std::size_t ring_bytes = std::size_t{1} << 20)
      : arena_(ring_bytes), ring_(arena_.data(), arena_.bytes() / Ring::kGranuleBytes) {}
  [[nodiscard]] Ring& ring() { return ring_; }

  std::uint64_t chunk(std::uint32_t recorder, std::int64_t epoch, std::uint64_t call,
                      std::uint32_t capture, std::string_view bytes);
  std::uint64_t call(std::uint32_t recorder, std::int64_t epoch, std::uint64_t call,
                     std::uint32_t rows, std::uint64_t call_bytes,
                     std::uint32_t ground_truth_rows = 0);
  // The next record in the ring, as Partition::add takes it.
  mld::PendingRecord take();

 private:
  std::uint64_t put(const mld::RecordHeader& fields, std::string_view payload);

  mld::Arena arena_;
  Ring ring_;
};

}  // namespace support
