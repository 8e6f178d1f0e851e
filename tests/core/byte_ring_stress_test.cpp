// Many producers and one consumer: nothing is lost, doubled, reordered within a producer, or torn,
// whatever is abandoned and however late the consumer gives back. And proof that this harness sees
// a broken protocol: see broken_ring.cpp.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#include "broken_ring.h"
#include "check.h"
#include "hand_over.h"
#include "ring/byte_ring.h"
#include "store/crc32c.h"
#include "support.h"

namespace {

using mld::MpscByteRing;
using support::Random;

struct Message {
  std::uint32_t producer;
  std::uint32_t crc;  // of the payload
  std::uint64_t sequence;
  std::uint64_t payload_bytes;
};

struct Load {
  std::size_t producers;
  std::uint64_t slots_each;
  std::size_t capacity_granules;
  std::size_t largest_payload;
  std::uint64_t seed;
};

// A broken ring makes somebody wait for ever: the wait ends here, and the test fails instead of
// hanging. A slow machine is no broken ring: what counts is time without a slot that is read.
class Patience {
 public:
  void note_slot() { last_slot_.store(mld::Clock::now(), std::memory_order_relaxed); }
  [[nodiscard]] bool is_over() {
    const auto last = last_slot_.load(std::memory_order_relaxed);
    if (mld::Clock::now() > last + std::chrono::seconds(30) && !over_.exchange(true))
      check::fail(__FILE__, __LINE__, "the ring is stuck");
    return over_;
  }
  void end() { over_ = true; }

 private:
  std::atomic<mld::Clock::time_point> last_slot_{mld::Clock::now()};
  std::atomic<bool> over_{false};
};

template <class Ring>
void produce(Ring& ring, const Load& load, std::uint32_t producer, std::uint64_t* abandoned,
             Patience& patience) {
  Random random(load.seed * 1000 + producer);
  std::uint64_t sequence = 0;
  while (sequence < load.slots_each) {
    Message message{producer, 0, sequence, random.below(load.largest_payload + 1)};
    typename Ring::Slot slot;
    while (!ring.try_reserve(sizeof message + message.payload_bytes, &slot)) {
      if (patience.is_over()) return;
      std::this_thread::yield();
    }
    std::byte* payload = slot.data + sizeof message;
    std::memset(payload, static_cast<int>(random.next() & 0xFF), message.payload_bytes);
    if (message.payload_bytes > 0) payload[random.below(message.payload_bytes)] = std::byte{0x5A};
    message.crc = mld::crc32c(payload, message.payload_bytes);
    std::memcpy(slot.data, &message, sizeof message);
    if (random.below(8) == 0) {
      ring.abandon(slot);  // the same sequence number goes into another slot
      ++*abandoned;
      continue;
    }
    ring.publish(slot);
    ++sequence;
  }
}

// Reads all; checks the bytes when the slot is given back, which is late: up to half of the ring is
// kept.
template <class Ring>
void consume(Ring& ring, const Load& load, std::uint64_t* abandoned, Patience& patience) {
  Random random(load.seed);
  std::vector<std::uint64_t> expected(load.producers, 0);
  std::deque<typename Ring::Slot> kept;
  const auto give_back = [&] {
    const auto slot = kept.front();
    kept.pop_front();
    if (!slot.abandoned) {
      Message message;
      std::memcpy(&message, slot.data, sizeof message);
      REQUIRE(message.producer < load.producers);
      REQUIRE(message.payload_bytes <= load.largest_payload);
      CHECK_EQ(message.sequence, expected[message.producer]);
      ++expected[message.producer];
      CHECK_EQ(mld::crc32c(slot.data + sizeof message, message.payload_bytes), message.crc);
    } else {
      ++*abandoned;
    }
    ring.release(slot.end());
  };
  std::uint64_t published = 0;
  while (published < load.producers * load.slots_each) {
    typename Ring::Slot slot;
    if (ring.read(&slot)) {
      patience.note_slot();
      kept.push_back(slot);
      if (!slot.abandoned) ++published;
      if (ring.used_bytes() < ring.capacity_bytes() / 2 && random.below(4) != 0) continue;
    } else if (kept.empty()) {
      if (patience.is_over()) return;
      std::this_thread::yield();
    }
    for (std::uint64_t left = random.below(4); left > 0 && !kept.empty(); --left) give_back();
  }
  while (!kept.empty()) give_back();
}

template <class Index>
void run_with_threads(const Load& load) {
  using Ring = MpscByteRing<Index>;
  std::vector<std::byte> memory(load.capacity_granules * Ring::kGranuleBytes);
  Ring ring(memory.data(), load.capacity_granules);
  std::vector<std::uint64_t> abandoned(load.producers, 0);
  Patience patience;
  std::vector<std::thread> threads;
  for (std::uint32_t producer = 0; producer < load.producers; ++producer) {
    threads.emplace_back(
        [&, producer] { produce(ring, load, producer, &abandoned[producer], patience); });
  }
  std::uint64_t abandoned_seen = 0, abandoned_sent = 0;
  try {
    consume(ring, load, &abandoned_seen, patience);
  } catch (const check::Stop&) {
    patience.end();
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::uint64_t count : abandoned) abandoned_sent += count;
  CHECK_EQ(abandoned_seen, abandoned_sent);
  CHECK_EQ(ring.used_bytes(), 0);
}

constexpr std::uint64_t kSlots = kUnderTsan ? 20000 : 60000;

}  // namespace

TEST(ring_loses_doubles_and_tears_nothing_with_four_producers) {
  run_with_threads<std::uint32_t>({4, kSlots, 512, 2000, 1});
}

TEST(ring_that_is_nearly_always_full_keeps_the_law) {
  run_with_threads<std::uint32_t>({3, kSlots / 2, 8, 1500, 2});
}

TEST(ring_of_odd_capacity_keeps_the_law) {
  run_with_threads<std::uint64_t>({4, kSlots / 4, 97, 6000, 3});
}

// 2^16 granules go by hundreds of times while threads compete for them.
TEST(ring_with_threads_wraps_its_uint16_index) {
  run_with_threads<std::uint16_t>({2, kSlots / 2, 256, 3000, 4});
}

// A consumer that releases a slot before it has read the bytes: on one thread, so that the outcome
// is certain.
TEST(releasing_before_reading_would_be_noticed) {
  std::vector<std::byte> memory(4 * MpscByteRing<>::kGranuleBytes);
  MpscByteRing<> ring(memory.data(), 4);
  const auto publish = [&](int fill) {
    MpscByteRing<>::Slot slot;
    REQUIRE(ring.try_reserve(1024, &slot));
    std::memset(slot.data, fill, 1024);
    ring.publish(slot);
  };
  publish(1);
  MpscByteRing<>::Slot read;
  REQUIRE(ring.read(&read));
  const std::uint32_t before = mld::crc32c(read.data, 1024);
  ring.release(read.end());
  for (int fill = 2; fill < 4; ++fill) publish(fill);
  CHECK(mld::crc32c(read.data, 1024) != before);
}

namespace {

// Exit status of `body` in a child whose stderr goes nowhere: the sanitizer's report is expected.
int quietly(int (*body)(int)) {
  return support::in_child([body] {
    const int nowhere = open("/dev/null", O_WRONLY);
    dup2(nowhere, STDERR_FILENO);
    return body(2000);
  });
}

}  // namespace

// The control of this file: with the releases taken away ThreadSanitizer must complain, and with
// them in place, run in just the same way, it must not. x86 keeps stores in order by itself, so
// without the sanitizer nothing can be seen.
TEST(sanitizer_sees_a_ring_that_publishes_relaxed) {
  if (!kUnderTsan) return;
  constexpr int kRaceFound = 66;  // ThreadSanitizer's exit status
  CHECK_EQ(quietly(&hand_over_broken_ring), kRaceFound);
  CHECK_EQ(quietly(&hand_over<MpscByteRing<>>), 0);
}
