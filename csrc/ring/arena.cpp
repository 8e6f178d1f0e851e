#include "ring/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "errors.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace mld {
namespace {

constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

// Touching every page now keeps page faults out of the hook. Kernels before 5.14 lack
// MADV_POPULATE_WRITE.
void prefault(std::byte* data, std::size_t bytes) {
  if (madvise(data, bytes, MADV_POPULATE_WRITE) == 0) return;
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (std::size_t offset = 0; offset < bytes; offset += page) {
    *const_cast<volatile std::byte*>(data + offset) = std::byte{0};
  }
}

}  // namespace

Arena::Arena(std::size_t bytes)
    : bytes_(bytes < 8 * kHugePageBytes
                 ? bytes
                 : (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error(ErrorKind::kStorage,
                "cannot map ring_bytes=" + std::to_string(bytes_) +
                    " bytes of memory: " + std::strerror(errno),
                "lower TracerConfig.ring_bytes or raise the process's memory limit");
  }
  data_ = static_cast<std::byte*>(memory);
  madvise(data_, bytes_, MADV_HUGEPAGE);  // a wish: without it the ring works, with more TLB misses
  // A child would copy-on-write every page that its parent goes on filling.
  madvise(data_, bytes_, MADV_DONTFORK);
  prefault(data_, bytes_);
}

Arena::~Arena() {
  if (!is_leaked_) munmap(data_, bytes_);
}

}  // namespace mld
