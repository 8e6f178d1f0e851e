#include "store/meta_write.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace {

// What LMDB 0.9 writes of a meta page, from its map size on, where a word has 64 bits; everything
// else that it writes is whole pages.
constexpr std::size_t kMetaBytes = 120, kPageSizeAt = 8, kLastPageAt = 104;

bool is_long_enough(int file, const char* meta) {
  std::uint32_t page_bytes = 0;
  std::uint64_t last_page = 0;
  std::memcpy(&page_bytes, meta + kPageSizeAt, sizeof page_bytes);
  std::memcpy(&last_page, meta + kLastPageAt, sizeof last_page);
  const auto bytes = static_cast<off_t>((last_page + 1) * page_bytes);
  struct stat status{};
  if (fstat(file, &status) != 0) return false;
  if (status.st_size >= bytes) return true;
  // Rare, so the second sync costs nothing.
  return ftruncate(file, bytes) == 0 && fdatasync(file) == 0;
}

}  // namespace

ssize_t mld_lmdb_pwrite(int file, const void* bytes, std::size_t count, off_t offset) {
  if constexpr (sizeof(std::size_t) == 8) {
    if (count == kMetaBytes && !is_long_enough(file, static_cast<const char*>(bytes))) return -1;
  }
  return pwrite(file, bytes, count, offset);
}
