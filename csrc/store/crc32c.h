// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), as in iSCSI (RFC 3720, B.4). Hardware
// where the CPU has it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mld {

// Checksum of `bytes` at `data`, continued from `crc` (0 to begin).
[[nodiscard]] std::uint32_t crc32c(const void* data, std::size_t bytes,
                                   std::uint32_t crc = 0) noexcept;

// The portable path, for tests to compare the hardware's with.
[[nodiscard]] std::uint32_t crc32c_portable(const void* data, std::size_t bytes,
                                            std::uint32_t crc = 0) noexcept;

}  // namespace mld
