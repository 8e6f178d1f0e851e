// The checksum against its published vectors, and its two implementations against each other.
#include "store/crc32c.h"

#include <string>

#include "check.h"
#include "support.h"

using mld::crc32c;
using mld::crc32c_portable;

namespace {

void check_vector(const std::string& data, std::uint32_t expected) {
  CHECK_EQ(crc32c(data.data(), data.size()), expected);
  CHECK_EQ(crc32c_portable(data.data(), data.size()), expected);
}

}  // namespace

// RFC 3720, B.4, read as little-endian words; and the check value of the catalogue of CRCs.
TEST(crc32c_of_the_published_vectors) {
  std::string rising(32, '\0'), falling(32, '\0');
  for (std::size_t i = 0; i < 32; ++i) {
    rising[i] = static_cast<char>(i);
    falling[i] = static_cast<char>(31 - i);
  }
  check_vector("", 0);
  check_vector(std::string(32, '\0'), 0x8A9136AA);
  check_vector(std::string(32, '\xFF'), 0x62A8AB43);
  check_vector(rising, 0x46DD794E);
  check_vector(falling, 0x113FDB5C);
  check_vector("123456789", 0xE3069283);
  const unsigned char scsi_read[48] = {0x01, 0xC0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,    0, 0, 0, 0,
                                       0x14, 0,    0, 0, 0, 0, 4, 0, 0, 0, 0, 0x14, 0, 0, 0, 0x18,
                                       0x28, 0,    0, 0, 0, 0, 0, 0, 2, 0, 0, 0,    0, 0, 0, 0};
  check_vector(std::string(reinterpret_cast<const char*>(scsi_read), sizeof scsi_read), 0xD9963A56);
}

TEST(crc32c_of_hardware_equals_the_portable_one_at_every_alignment) {
  support::Random random(11);
  const std::string data = support::pattern(12, 70000);
  for (int round = 0; round < 2000; ++round) {
    const std::size_t offset = random.below(64);
    const std::size_t bytes = random.below(round % 50 == 0 ? 65536 : 300);
    const auto begin = static_cast<std::uint32_t>(random.next());
    CHECK_EQ(crc32c(data.data() + offset, bytes, begin),
             crc32c_portable(data.data() + offset, bytes, begin));
  }
}

TEST(crc32c_goes_on_from_where_it_stopped) {
  const std::string data = support::pattern(13, 1000);
  const std::uint32_t whole = crc32c(data.data(), data.size());
  for (std::size_t split = 0; split <= data.size(); split += 37) {
    CHECK_EQ(crc32c(data.data() + split, data.size() - split, crc32c(data.data(), split)), whole);
    CHECK_EQ(crc32c_portable(data.data() + split, data.size() - split,
                             crc32c_portable(data.data(), split)),
             whole);
  }
}

TEST(crc32c_notices_every_flipped_bit) {
  std::string data = support::pattern(14, 200);
  const std::uint32_t sound = crc32c(data.data(), data.size());
  for (std::size_t bit = 0; bit < data.size() * 8; ++bit) {
    data[bit / 8] = static_cast<char>(data[bit / 8] ^ 1 << (bit % 8));
    CHECK(crc32c(data.data(), data.size()) != sound);
    data[bit / 8] = static_cast<char>(data[bit / 8] ^ 1 << (bit % 8));
  }
}
