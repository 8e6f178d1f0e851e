// The ring stepped on one thread: every move of head, tail and marks, in order. The same law with
// threads stands in byte_ring_stress_test.cpp.
#include "ring/byte_ring.h"

#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "check.h"
#include "support.h"

namespace {

using mld::MpscByteRing;
using mld::Reservation;
using support::pattern;
using support::Random;

constexpr std::size_t kGranule = MpscByteRing<>::kGranuleBytes;

template <class Index>
struct Fixture {
  using Ring = MpscByteRing<Index>;
  using Slot = typename Ring::Slot;

  explicit Fixture(std::size_t granules)
      : memory(granules * kGranule), ring(memory.data(), granules) {}

  // Takes a slot and fills all of it.
  Slot reserve(std::size_t bytes, std::uint64_t seed) {
    Slot slot;
    REQUIRE(ring.try_reserve(bytes, &slot));
    const std::string text = pattern(seed, bytes);
    std::memcpy(slot.data, text.data(), bytes);
    return slot;
  }
  Slot publish(std::size_t bytes, std::uint64_t seed) {
    const Slot slot = reserve(bytes, seed);
    ring.publish(slot);
    return slot;
  }
  bool holds(const Slot& slot, std::size_t bytes, std::uint64_t seed) {
    return std::string(reinterpret_cast<const char*>(slot.data), bytes) == pattern(seed, bytes);
  }
  // Moves head, tail and read position of an empty ring on by `granules`.
  void advance(std::size_t granules) {
    while (granules > 0) {
      const std::size_t step = std::min(granules, ring.max_slot_bytes() / kGranule);
      const Slot slot = publish(step * kGranule, 1);
      Slot read;
      REQUIRE(ring.read(&read));
      REQUIRE(read.position == slot.position);
      ring.release(read.end());
      granules -= step;
    }
  }

  std::vector<std::byte> memory;
  Ring ring;
};

}  // namespace

TEST(ring_hands_out_reads_and_takes_back_in_order) {
  Fixture<std::uint64_t> f(8);
  CHECK_EQ(f.ring.capacity_bytes(), 8 * kGranule);
  CHECK_EQ(f.ring.max_slot_bytes(), 4 * kGranule);
  CHECK_EQ(f.ring.used_bytes(), 0);
  MpscByteRing<>::Slot read;
  CHECK(!f.ring.read(&read));

  const auto first = f.reserve(700, 1);   // 2 granules
  const auto second = f.reserve(512, 2);  // 1
  const auto third = f.reserve(1, 3);     // 1
  CHECK_EQ(f.ring.used_bytes(), 4 * kGranule);
  f.ring.publish(second);
  CHECK(!f.ring.read(&read));  // the first is still being filled
  f.ring.publish(first);
  REQUIRE(f.ring.read(&read));
  CHECK_EQ(read.position, 0);
  CHECK_EQ(read.granules, 2);
  CHECK(!read.abandoned);
  CHECK(f.holds(read, 700, 1));
  REQUIRE(f.ring.read(&read));
  CHECK_EQ(read.position, 2);
  CHECK(f.holds(read, 512, 2));
  CHECK(!f.ring.read(&read));
  f.ring.abandon(third);
  REQUIRE(f.ring.read(&read));
  CHECK(read.abandoned);
  CHECK_EQ(read.end(), 4);

  CHECK_EQ(f.ring.tail(), 0);  // reading gives nothing back
  CHECK_EQ(f.ring.used_bytes(), 4 * kGranule);
  f.ring.release(2);
  CHECK_EQ(f.ring.used_bytes(), 2 * kGranule);
  f.ring.release(f.ring.read_position());
  CHECK_EQ(f.ring.used_bytes(), 0);
}

TEST(ring_pads_the_end_so_that_a_slot_stays_whole) {
  Fixture<std::uint64_t> f(8);
  f.advance(6);
  const auto slot = f.publish(3 * kGranule, 7);
  CHECK_EQ(slot.position, 8);  // two granules of padding
  CHECK(slot.data == f.memory.data());
  CHECK_EQ(f.ring.used_bytes(), 5 * kGranule);
  MpscByteRing<>::Slot read;
  REQUIRE(f.ring.read(&read));  // steps over the padding by itself
  CHECK_EQ(read.position, 8);
  CHECK(f.holds(read, 3 * kGranule, 7));
  f.ring.release(read.end());
  CHECK_EQ(f.ring.used_bytes(), 0);
}

TEST(ring_that_is_full_refuses_and_takes_nothing) {
  Fixture<std::uint64_t> f(8);
  f.publish(4 * kGranule, 1);
  f.publish(3 * kGranule, 2);
  MpscByteRing<>::Slot slot;
  CHECK(!f.ring.try_reserve(kGranule + 1, &slot));
  CHECK_EQ(f.ring.head(), 7);
  CHECK(f.ring.try_reserve(kGranule, &slot));  // exact fit
  f.ring.publish(slot);
  CHECK_EQ(f.ring.used_bytes(), f.ring.capacity_bytes());
  CHECK(!f.ring.try_reserve(1, &slot));

  MpscByteRing<>::Slot read;
  REQUIRE(f.ring.read(&read));
  CHECK(!f.ring.try_reserve(1, &slot));  // read is not released
  REQUIRE(f.ring.read(&read));
  REQUIRE(f.ring.read(&read));
  CHECK(!f.ring.read(&read));  // the mark of this lap's first slot is not met a second time
  f.ring.release(4);
  CHECK(f.ring.try_reserve(4 * kGranule, &slot));
  CHECK_EQ(slot.position, 8);
}

TEST(ring_takes_its_largest_slot_at_every_head_offset) {
  for (const std::size_t capacity : {2, 7, 8, 13, 64}) {
    for (std::size_t offset = 0; offset < capacity; ++offset) {
      Fixture<std::uint64_t> f(capacity);
      f.advance(offset);
      const std::size_t largest = f.ring.max_slot_bytes();
      const auto slot = f.publish(largest, offset);
      CHECK(slot.data >= f.memory.data());
      CHECK(slot.data + largest <= f.memory.data() + f.memory.size());
      MpscByteRing<>::Slot read;
      REQUIRE(f.ring.read(&read));
      CHECK(f.holds(read, largest, offset));
    }
  }
}

TEST(ring_keeps_a_released_region_free_of_marks) {
  // INVARIANT 1 seen from outside: in a ring that was used at every offset, a reserved and
  // unpublished slot hides all.
  Fixture<std::uint64_t> f(16);
  Random random(3);
  for (int round = 0; round < 2000; ++round) {
    const std::size_t granules = 1 + random.below(8);
    const auto slot = f.reserve(granules * kGranule, 1);
    MpscByteRing<>::Slot read;
    CHECK(!f.ring.read(&read));
    random.below(2) == 0 ? f.ring.publish(slot) : f.ring.abandon(slot);
    REQUIRE(f.ring.read(&read));
    CHECK_EQ(read.position, slot.position);
    CHECK(!f.ring.read(&read));
    f.ring.release(read.end());
  }
}

TEST(ring_finds_bytes_again_by_position_until_they_are_released) {
  Fixture<std::uint64_t> f(8);
  f.advance(5);
  const auto slot = f.publish(3 * kGranule, 4);
  MpscByteRing<>::Slot read;
  REQUIRE(f.ring.read(&read));
  CHECK(f.ring.at(slot.position) == slot.data);
  CHECK(f.holds({const_cast<std::byte*>(f.ring.at(slot.position)), 0, 0, false}, 3 * kGranule, 4));
}

TEST(reservation_abandons_what_is_not_published) {
  Fixture<std::uint64_t> f(8);
  MpscByteRing<>::Slot slot;
  try {
    REQUIRE(f.ring.try_reserve(100, &slot));
    const Reservation<std::uint64_t> reservation(f.ring, slot);
    throw std::runtime_error("a hook that fails");
  } catch (const std::runtime_error&) {
  }
  {
    REQUIRE(f.ring.try_reserve(100, &slot));
    Reservation<std::uint64_t> reservation(f.ring, slot);
    reservation.publish();
  }
  MpscByteRing<>::Slot read;
  REQUIRE(f.ring.read(&read));
  CHECK(read.abandoned);
  REQUIRE(f.ring.read(&read));
  CHECK(!read.abandoned);
  CHECK(!f.ring.read(&read));
}

namespace {

// A model beside the ring: what was published and not yet read, and what was read and not yet
// released.
template <class Index>
void check_against_a_model(std::size_t capacity, std::uint64_t seed, int steps) {
  struct Known {
    typename MpscByteRing<Index>::Slot slot;
    std::size_t bytes;
    std::uint64_t seed;
    bool abandoned;
  };
  Fixture<Index> f(capacity);
  Random random(seed);
  std::deque<Known> published, kept;
  std::uint64_t laps = 0;
  Index last_head = 0;
  for (int step = 0; step < steps; ++step) {
    typename MpscByteRing<Index>::Slot slot;
    switch (random.below(3)) {
      case 0: {
        const std::size_t bytes = 1 + random.below(f.ring.max_slot_bytes());
        if (!f.ring.try_reserve(bytes, &slot)) {
          CHECK(!published.empty() || !kept.empty());  // an empty ring takes every slot
          break;
        }
        const std::string text = pattern(static_cast<std::uint64_t>(step), bytes);
        std::memcpy(slot.data, text.data(), bytes);
        const bool abandoned = random.below(4) == 0;
        abandoned ? f.ring.abandon(slot) : f.ring.publish(slot);
        published.push_back({slot, bytes, static_cast<std::uint64_t>(step), abandoned});
        break;
      }
      case 1: {
        const bool some = f.ring.read(&slot);
        CHECK_EQ(some, !published.empty());
        if (!some || published.empty()) break;
        CHECK_EQ(slot.position, published.front().slot.position);
        CHECK_EQ(slot.abandoned, published.front().abandoned);
        kept.push_back(published.front());
        published.pop_front();
        break;
      }
      default:
        if (kept.empty()) break;
        CHECK(f.holds(kept.front().slot, kept.front().bytes,
                      kept.front().seed));  // nobody wrote over it
        f.ring.release(kept.front().slot.end());
        kept.pop_front();
    }
    CHECK(f.ring.used_bytes() <= f.ring.capacity_bytes());
    if (f.ring.head() < last_head) ++laps;
    last_head = f.ring.head();
  }
  if (sizeof(Index) < 4) CHECK(laps > 3);  // the index itself has wrapped
}

}  // namespace

TEST(ring_wraps_its_uint8_index) {
  for (const std::size_t capacity : {8, 32, 128})
    check_against_a_model<std::uint8_t>(capacity, capacity, 20000);
}

TEST(ring_wraps_its_uint16_index) { check_against_a_model<std::uint16_t>(1024, 5, 20000); }

TEST(ring_of_any_capacity_agrees_with_a_model) {
  for (const std::size_t capacity : {2, 5, 31, 100})
    check_against_a_model<std::uint64_t>(capacity, capacity, 5000);
}
