// Values that lie, by mutation of sound ones: the decoders of the core end in our errors, whatever
// a header says, and read nothing that is not theirs (`make fuzz` runs this at length under ASan).
// FUZZ_SECONDS prolongs it, FUZZ_SEED repeats a run.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "store/crc32c.h"
#include "store/record_format.h"
#include "store/segment.h"
#include "store/segment_reader.h"
#include "support.h"

namespace {

using support::Random;
using support::TempDir;

std::uint64_t number_from(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

// So many rounds, or for so long.
class Rounds {
 public:
  explicit Rounds(std::uint64_t least) : least_(least) {}
  bool go_on() { return ++done_ <= least_ || std::chrono::steady_clock::now() - begin_ < seconds_; }

 private:
  const std::uint64_t least_;
  const std::chrono::seconds seconds_{number_from("FUZZ_SECONDS", 0)};
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  std::uint64_t done_ = 0;
};

// Values of integers and lengths that break arithmetic, as msgpack writes them.
std::string evil_number(Random& random) {
  static const std::vector<std::string> kNumbers{
      std::string("\xCF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", 9),
      std::string("\xCF\x80\x00\x00\x00\x00\x00\x00\x00", 9),
      std::string("\xD3\x80\x00\x00\x00\x00\x00\x00\x00", 9),
      std::string("\xCE\xFF\xFF\xFF\xFF", 5),
      std::string("\xDD\xFF\xFF\xFF\xFF", 5),
      std::string("\xDF\xFF\xFF\xFF\xFF", 5),
      std::string("\xC6\xFF\xFF\xFF\xFF", 5),
      std::string("\xDB\x7F\xFF\xFF\xFF", 5),
      std::string("\xFF", 1),
      std::string("\xC0", 1),
      std::string("\x00", 1)};
  return kNumbers[random.below(kNumbers.size())];
}

std::string mutated(std::string value, const std::string& other, Random& random) {
  for (std::uint64_t times = 1 + random.below(4); times > 0; --times) {
    const std::size_t at = random.below(value.size() + 1);
    switch (random.below(7)) {
      case 0:
        if (at < value.size()) value[at] = static_cast<char>(random.next());
        break;
      case 1:
        if (at < value.size()) value[at] = static_cast<char>(value[at] ^ (1 << random.below(8)));
        break;
      case 2:
        value.erase(at, 1 + random.below(12));
        break;
      case 3:
        value.insert(at, evil_number(random));
        break;
      case 4:
        value.replace(at, std::min<std::size_t>(value.size() - at, 1 + random.below(9)),
                      evil_number(random));
        break;
      case 5:
        value.resize(at);
        break;
      default:
        value = value.substr(0, at) + other.substr(random.below(other.size() + 1));
    }
  }
  return value;
}

// Most mutants get a right checksum: else nothing behind it is ever reached.
std::string sealed(std::string value, Random& random) {
  if (value.size() < mld::kChecksumBytes || random.below(8) == 0) return value;
  value.resize(value.size() - mld::kChecksumBytes);
  const std::uint32_t crc = mld::crc32c(value.data(), value.size());
  value.push_back('\xCE');
  for (int shift = 24; shift >= 0; shift -= 8) value.push_back(static_cast<char>(crc >> shift));
  return value;
}

std::vector<std::string> sound_headers(Random& random) {
  std::vector<std::string> headers;
  for (std::uint64_t call = 0; call < 24; ++call) {
    std::vector<mld::ChunkRef> chunks;
    std::string inline_bytes;
    for (std::uint32_t capture = 0; capture < random.below(5); ++capture) {
      const std::string bytes = support::pattern(call + capture, random.below(300));
      const std::uint32_t crc = mld::crc32c(bytes.data(), bytes.size());
      if (random.below(2) == 0) {
        chunks.push_back({capture, mld::ChunkRef::kInline, inline_bytes.size(), bytes.size(), crc});
        inline_bytes += bytes;
      } else {
        chunks.push_back({capture, 0, random.below(20) * 8, bytes.size(), crc});
      }
    }
    std::string header;
    mld::encode_call({0, 0, call, 0, 3, 1, static_cast<std::int64_t>(call * 3)}, chunks,
                     "\x82\xA7"
                     "columns\x90\xA1x\x01",
                     inline_bytes, &header);
    headers.push_back(header);
  }
  std::string gap;
  mld::encode_gap({3, 9, 17, 400, "ring_full"}, &gap);
  headers.push_back(gap);
  return headers;
}

bool lies_within(const mld::DecodedHeader& header, const std::string& value) {
  const auto is_part = [&](std::string_view part) {
    return part.empty() || (part.data() >= value.data() &&
                            part.data() + part.size() <= value.data() + value.size());
  };
  for (const mld::ChunkRef& chunk : header.chunks) {
    if (chunk.segment != mld::ChunkRef::kInline) continue;
    if (chunk.bytes > header.inline_bytes.size() ||
        chunk.key > header.inline_bytes.size() - chunk.bytes)
      return false;
  }
  return is_part(header.description) && is_part(header.inline_bytes);
}

}  // namespace

TEST(fuzz_decode_header_refuses_or_stays_within_the_value) {
  const std::uint64_t seed = number_from("FUZZ_SEED", 7);
  Random random(seed);
  const std::vector<std::string> sound = sound_headers(random);
  std::uint64_t refused = 0, taken = 0;
  for (Rounds rounds(60000); rounds.go_on();) {
    const std::string value = sealed(
        mutated(sound[random.below(sound.size())], sound[random.below(sound.size())], random),
        random);
    // On the heap with nothing behind it, so that ASan sees a byte too far.
    const std::string exact(value.data(), value.size());
    try {
      const mld::DecodedHeader header = mld::decode_header(exact);
      ++taken;
      if (!lies_within(header, exact))
        check::fail(__FILE__, __LINE__, "seed " + std::to_string(seed));
    } catch (const mld::Error& error) {
      ++refused;
      if (error.kind() != mld::ErrorKind::kCorruptData)
        check::fail(__FILE__, __LINE__, std::string("another error: ") + error.what());
    }
  }
  CHECK(refused > 1000);
  CHECK(taken > 1000);
}

TEST(fuzz_segment_reader_of_headers_that_lie_ends_in_our_errors) {
  Random random(number_from("FUZZ_SEED", 8));
  const std::vector<std::string> sound = sound_headers(random);
  std::uint64_t refused = 0, gathered = 0;
  for (Rounds rounds(40); rounds.go_on();) {
    const TempDir directory;
    const mld::SegmentIdentity identity{0, 0, 0, 0};
    {
      mld::Segment segment(directory / "s", identity, mld::Sync::kOnRequest, std::size_t{16} << 20);
      mld::Segment::Batch batch(segment);
      for (std::uint64_t key = 0; key < 20; ++key)
        batch.append_chunk(key * 8, support::pattern(key, random.below(5000)));
      for (std::uint64_t call = 0; call < sound.size(); ++call) {
        const std::string& other = sound[random.below(sound.size())];
        batch.put_header(call, random.below(3) == 0
                                   ? sound[call]
                                   : sealed(mutated(sound[call], other, random), random));
      }
      batch.commit();
    }
    const mld::SegmentReader reader(directory / "s", false);
    for (std::uint64_t call = 0; call < sound.size(); ++call) {
      const std::optional<std::uint64_t> after =
          call == 0 ? std::nullopt : std::optional<std::uint64_t>(call - 1);
      std::vector<char> out(4096);
      try {
        const mld::HeaderScan scan = reader.scan(after, 1, identity);
        CHECK_EQ(scan.keys.size(), 1);
        mld::GatherTarget target{};
        target.capture = static_cast<std::uint32_t>(random.below(4));
        target.out = reinterpret_cast<std::byte*>(out.data());
        const auto length = static_cast<std::uint64_t>(scan.lengths[target.capture]);
        target.bytes = length <= out.size() ? length : random.below(out.size());
        reader.gather({call}, {target});
        ++gathered;
      } catch (const mld::Error&) {
        ++refused;
      }
    }
  }
  CHECK(refused > 100);
  CHECK(gathered > 100);
}
