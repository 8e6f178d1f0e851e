#include "store/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#endif

namespace mld {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78;

// Slicing by 8 (Kounavis and Berry, "Novel Table Lookup-Based Algorithms for High-Performance CRC
// Generation", 2008).
constexpr auto kTables = [] {
  std::array<std::array<std::uint32_t, 256>, 8> tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (std::size_t slice = 1; slice < 8; ++slice) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t previous = tables[slice - 1][byte];
      tables[slice][byte] = (previous >> 8) ^ tables[0][previous & 0xFF];
    }
  }
  return tables;
}();

std::uint32_t step_byte(std::uint32_t crc, unsigned char byte) noexcept {
  return (crc >> 8) ^ kTables[0][(crc ^ byte) & 0xFF];
}

// The processor's own step, and whether it has one.
#if defined(__x86_64__)
#define MLD_CRC_TARGET __attribute__((target("sse4.2")))
MLD_CRC_TARGET inline std::uint32_t step_word(std::uint32_t crc, std::uint64_t word) noexcept {
  return static_cast<std::uint32_t>(_mm_crc32_u64(crc, word));
}
bool has_hardware() noexcept {
  __builtin_cpu_init();
  return __builtin_cpu_supports("sse4.2") != 0;
}
#elif defined(__aarch64__)
#define MLD_CRC_TARGET __attribute__((target("+crc")))
MLD_CRC_TARGET inline std::uint32_t step_word(std::uint32_t crc, std::uint64_t word) noexcept {
  return __crc32cd(crc, word);
}
bool has_hardware() noexcept { return (getauxval(AT_HWCAP) & (1UL << 7)) != 0; }  // HWCAP_CRC32
#else
#define MLD_CRC_TARGET
inline std::uint32_t step_word(std::uint32_t crc, std::uint64_t word) noexcept {
  for (int byte = 0; byte < 8; ++byte, word >>= 8)
    crc = step_byte(crc, static_cast<unsigned char>(word));
  return crc;
}
bool has_hardware() noexcept { return false; }
#endif

// A step takes three cycles and a new one may start in each, so three lanes run beside each other;
// a lane's state is moved over the next lane's bytes as if they were zeros. The method is that of
// Gopal et al., "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction" (Intel, 2011).
// Short, so that the processor's prefetcher takes them for one stream: of cold memory, 0.056 s/GB,
// against 0.154 with lanes of 1024 bytes (warm: 0.043 against 0.038).
constexpr std::size_t kLaneBytes = 256;  // a power of two

// tables[k][v]: where kLaneBytes of zeros move a state whose byte k is v and the rest zero.
constexpr auto kLaneShift = [] {
  std::array<std::uint32_t, 32> columns{};  // of the move's matrix over GF(2), first of one byte
  for (unsigned bit = 0; bit < 32; ++bit) {
    std::uint32_t crc = std::uint32_t{1} << bit;
    for (int step = 0; step < 8; ++step) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
    columns[bit] = crc;
  }
  const auto apply = [](const std::array<std::uint32_t, 32>& matrix, std::uint32_t vector) {
    std::uint32_t result = 0;
    for (unsigned bit = 0; bit < 32; ++bit) result ^= (vector >> bit & 1) != 0 ? matrix[bit] : 0;
    return result;
  };
  for (std::size_t bytes = 1; bytes < kLaneBytes; bytes *= 2) {
    std::array<std::uint32_t, 32> squared{};
    for (unsigned bit = 0; bit < 32; ++bit) squared[bit] = apply(columns, columns[bit]);
    columns = squared;
  }
  std::array<std::array<std::uint32_t, 256>, 4> tables{};
  for (unsigned place = 0; place < 4; ++place) {
    for (std::uint32_t value = 0; value < 256; ++value)
      tables[place][value] = apply(columns, value << (8 * place));
  }
  return tables;
}();

std::uint32_t shift_lane(std::uint32_t crc) noexcept {
  return kLaneShift[0][crc & 0xFF] ^ kLaneShift[1][crc >> 8 & 0xFF] ^
         kLaneShift[2][crc >> 16 & 0xFF] ^ kLaneShift[3][crc >> 24];
}

std::uint64_t word_at(const unsigned char* data) noexcept {
  std::uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

MLD_CRC_TARGET std::uint32_t crc32c_hardware(const unsigned char* data, std::size_t bytes,
                                             std::uint32_t crc) noexcept {
  std::uint32_t state = ~crc;
  for (; bytes >= 3 * kLaneBytes; bytes -= 3 * kLaneBytes, data += 3 * kLaneBytes) {
    std::uint32_t second = 0, third = 0;
    for (std::size_t at = 0; at < kLaneBytes; at += 8) {
      state = step_word(state, word_at(data + at));
      second = step_word(second, word_at(data + kLaneBytes + at));
      third = step_word(third, word_at(data + 2 * kLaneBytes + at));
    }
    state = shift_lane(shift_lane(state) ^ second) ^ third;
  }
  for (; bytes >= 8; bytes -= 8, data += 8) state = step_word(state, word_at(data));
  for (; bytes > 0; --bytes, ++data) state = step_byte(state, *data);
  return ~state;
}

// Found out when the library is loaded: a function-local static could be caught half-made by a
// fork.
const bool g_has_hardware = has_hardware();

}  // namespace

std::uint32_t crc32c_portable(const void* data, std::size_t bytes, std::uint32_t crc) noexcept {
  const auto* at = static_cast<const unsigned char*>(data);
  std::uint32_t state = ~crc;
  for (; bytes >= 8; bytes -= 8, at += 8) {
    state ^= static_cast<std::uint32_t>(at[0]) | static_cast<std::uint32_t>(at[1]) << 8 |
             static_cast<std::uint32_t>(at[2]) << 16 | static_cast<std::uint32_t>(at[3]) << 24;
    state = kTables[7][state & 0xFF] ^ kTables[6][(state >> 8) & 0xFF] ^
            kTables[5][(state >> 16) & 0xFF] ^ kTables[4][state >> 24] ^ kTables[3][at[4]] ^
            kTables[2][at[5]] ^ kTables[1][at[6]] ^ kTables[0][at[7]];
  }
  for (; bytes > 0; --bytes, ++at) state = step_byte(state, *at);
  return ~state;
}

std::uint32_t crc32c(const void* data, std::size_t bytes, std::uint32_t crc) noexcept {
  return g_has_hardware ? crc32c_hardware(static_cast<const unsigned char*>(data), bytes, crc)
                        : crc32c_portable(data, bytes, crc);
}

}  // namespace mld
