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

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) std::uint32_t crc32c_hardware(const unsigned char* data,
                                                                std::size_t bytes,
                                                                std::uint32_t crc) noexcept {
  std::uint64_t state = ~crc;
  for (; bytes >= 8; bytes -= 8, data += 8) {
    std::uint64_t word;
    std::memcpy(&word, data, 8);
    state = _mm_crc32_u64(state, word);
  }
  auto tail = static_cast<std::uint32_t>(state);
  for (; bytes > 0; --bytes, ++data) tail = _mm_crc32_u8(tail, *data);
  return ~tail;
}
bool has_hardware() noexcept {
  __builtin_cpu_init();
  return __builtin_cpu_supports("sse4.2") != 0;
}
#elif defined(__aarch64__)
__attribute__((target("+crc"))) std::uint32_t crc32c_hardware(const unsigned char* data,
                                                              std::size_t bytes,
                                                              std::uint32_t crc) noexcept {
  std::uint32_t state = ~crc;
  for (; bytes >= 8; bytes -= 8, data += 8) {
    std::uint64_t word;
    std::memcpy(&word, data, 8);
    state = __crc32cd(state, word);
  }
  for (; bytes > 0; --bytes, ++data) state = __crc32cb(state, *data);
  return ~state;
}
bool has_hardware() noexcept { return (getauxval(AT_HWCAP) & (1UL << 7)) != 0; }  // HWCAP_CRC32
#else
std::uint32_t crc32c_hardware(const unsigned char* data, std::size_t bytes,
                              std::uint32_t crc) noexcept {
  return crc32c_portable(data, bytes, crc);
}
bool has_hardware() noexcept { return false; }
#endif

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
