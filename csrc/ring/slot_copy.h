// Copies a payload into a ring slot. A large one goes past the caches: the ring is larger than
// they are, so an ordinary copy would first read the old bytes of every line it writes, and drive
// out what the training needs (measured: 0.045 against 0.063 s/GB into a ring of 256 MiB).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace mld {

inline constexpr std::size_t kStreamedBytes = std::size_t{128} << 10;

#if defined(__x86_64__)
// REQUIRES: `to` is aligned to 16 bytes.
inline void copy_streamed(std::byte* to, const std::byte* from, std::size_t bytes) noexcept {
  constexpr std::size_t kLine = 64;
  std::size_t done = 0;
  for (; done + kLine <= bytes; done += kLine) {
    const auto* source = reinterpret_cast<const __m128i*>(from + done);
    auto* target = reinterpret_cast<__m128i*>(to + done);
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  std::memcpy(to + done, from + done, bytes - done);
  // Such stores are outside the order of all others; PAIRS WITH the ring's mark, which follows.
  _mm_sfence();
}
#endif

inline void copy_to_slot(std::byte* to, const std::byte* from, std::size_t bytes) noexcept {
#if defined(__x86_64__)
  if (bytes >= kStreamedBytes && reinterpret_cast<std::uintptr_t>(to) % 16 == 0)
    return copy_streamed(to, from, bytes);
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace mld
