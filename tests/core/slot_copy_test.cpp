// The copy into a slot, of every length around its steps and from every alignment.
#include "ring/slot_copy.h"

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "support.h"

TEST(slot_copy_copies_every_byte_and_none_beside) {
  const std::string data = support::pattern(3, mld::kStreamedBytes + 4096);
  std::vector<std::byte> arena(mld::kStreamedBytes + 8192);
  for (const std::size_t around : {std::size_t{100}, mld::kStreamedBytes}) {
    for (std::size_t extra = 0; extra < 200; extra += 7) {
      for (const std::size_t offset : {64, 65, 72}) {
        const std::size_t bytes = around - 90 + extra;
        std::fill(arena.begin(), arena.end(), std::byte{0xA5});
        const auto* from = reinterpret_cast<const std::byte*>(data.data()) + extra % 17;
        mld::copy_to_slot(arena.data() + offset, from, bytes);
        REQUIRE(std::memcmp(arena.data() + offset, from, bytes) == 0);
        REQUIRE(arena[offset - 1] == std::byte{0xA5});
        REQUIRE(arena[offset + bytes] == std::byte{0xA5});
      }
    }
  }
}
