// Bounded, lock-free ring of variable-sized slots: many producers, one consumer. This header is the
// whole protocol.
//
// It is not a queue of objects: it hands out memory. A producer reserves a slot, fills it and
// publishes or abandons it; the consumer reads slots in order of reservation and gives memory back
// in order too, when *it* decides (after a commit), not when it has read.
//
//   positions (in granules, only grow)
//        tail_            read_position          head_
//          |                   |                   |
//   -------+-------------------+-------------------+--------------------->
//    free  | read, kept for    | reserved; some    | free (up to tail_ + capacity)
//          | replay            | published         |
//
// Thread safety: `try_reserve`, `publish`, `abandon` from any thread; `read`, `release` from one
// consumer thread; `head`, `tail` from anywhere.
//
// clang-format off
//   | atomic   | written by    | read by   | store   | load    | publishes                       |
//   | head_    | producers, by | anyone    | relaxed | relaxed | nothing: it owns a range, its   |
//   |          | CAS           |           |         |         | bytes travel by their mark      |
//   | tail_    | consumer      | producers | release | acquire | memory behind it was read, its  |
//   |          |               |           |         |         | marks are zero                  |
//   | marks_[] | producer      | consumer  | release | acquire | the bytes of the slot that      |
//   |          |               |           |         |         | starts here                     |
//   |          | consumer, to  |           | relaxed |         | nothing: tail_ passes only      |
//   |          | zero          |           |         |         | afterwards                      |
// clang-format on
//
// INVARIANT 1: every mark in the free region is zero. The consumer zeroes a mark when it reads the
// slot, and only then may tail_ pass it; so a nonzero mark at the read position is of this lap.
//
// INVARIANT 2: a slot is contiguous. One that would straddle the end of the arena is preceded by a
// padding slot, which the same producer reserves in the same step, so no slot can come between.
//
// INVARIANT 3: head_ - tail_ <= capacity, in the arithmetic of Index.
//
// INVARIANT 4: every reserved slot is published or abandoned in bounded time (`Reservation` does so
// in its destructor), so the consumer never waits for ever behind it.
//
// Ideas: positions that only grow and a templated index from Quill's BoundedSPSCQueue; per-slot
// state that the consumer resets from Vyukov's bounded MPMC queue. Differs from both: slots vary in
// size, and reading is apart from releasing.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

namespace mld {

template <class Index = std::uint64_t>
class MpscByteRing {
  static_assert(std::is_unsigned_v<Index>);

 public:
  static constexpr std::size_t kGranuleBytes = 512;

  struct Slot {
    std::byte* data = nullptr;
    Index position = 0;      // of its first granule
    Index granules = 0;      // of the slot alone
    bool abandoned = false;  // set by read() only
    [[nodiscard]] Index end() const noexcept { return static_cast<Index>(position + granules); }
  };

  // `arena` holds capacity_granules * kGranuleBytes bytes and outlives the ring.
  // REQUIRES: capacity_granules < 2^30, and at most half the range of Index; a power of two if
  // Index may wrap.
  MpscByteRing(std::byte* arena, std::size_t capacity_granules)
      : arena_(arena),
        capacity_(static_cast<Index>(capacity_granules)),
        marks_(new std::atomic<std::uint32_t>[capacity_granules]()) {}

  MpscByteRing(const MpscByteRing&) = delete;
  MpscByteRing& operator=(const MpscByteRing&) = delete;

  [[nodiscard]] static constexpr std::size_t granules_of(std::size_t bytes) noexcept {
    return (bytes + kGranuleBytes - 1) / kGranuleBytes;
  }

  // A slot of at most this size always fits an empty ring, wherever its head stands (INVARIANT 2
  // may cost as much again).
  [[nodiscard]] std::size_t max_slot_bytes() const noexcept {
    return std::size_t{capacity_} / 2 * kGranuleBytes;
  }
  [[nodiscard]] std::size_t capacity_bytes() const noexcept {
    return std::size_t{capacity_} * kGranuleBytes;
  }

  // Takes memory for `bytes`; false when the ring is full. REQUIRES: 0 < bytes <= max_slot_bytes().
  [[nodiscard]] bool try_reserve(std::size_t bytes, Slot* slot) noexcept {
    const auto need = static_cast<Index>(granules_of(bytes));
    Index head = head_.load(std::memory_order_relaxed);
    for (;;) {
      const auto offset = static_cast<Index>(head % capacity_);
      const auto room = static_cast<Index>(capacity_ - offset);
      const auto padding = need > room ? room : Index{0};
      const auto new_head = static_cast<Index>(head + padding + need);
      // acquire PAIRS WITH release(): what the consumer read and zeroed there happened before we
      // write.
      const Index tail = tail_.load(std::memory_order_acquire);
      // A head older than the tail just read makes this huge; the CAS below would fail too, so
      // reload instead.
      if (static_cast<Index>(new_head - tail) > capacity_) {
        const Index fresh = head_.load(std::memory_order_relaxed);
        if (fresh == head) return false;
        head = fresh;
        continue;
      }
      // relaxed: owning a range publishes nothing; its bytes travel by the mark.
      if (!head_.compare_exchange_weak(head, new_head, std::memory_order_relaxed,
                                       std::memory_order_relaxed))
        continue;
      if (padding != 0) mark(head, padding, kPadding);
      const auto position = static_cast<Index>(head + padding);
      *slot = Slot{arena_ + std::size_t{static_cast<Index>(position % capacity_)} * kGranuleBytes,
                   position, need, false};
      return true;
    }
  }

  // Hands the slot's bytes to the consumer.
  void publish(const Slot& slot) noexcept { mark(slot.position, slot.granules, kPublished); }
  // Gives the slot up; the consumer steps over it.
  void abandon(const Slot& slot) noexcept { mark(slot.position, slot.granules, kAbandoned); }

  // Consumer: the next published or abandoned slot; false when there is none yet.
  [[nodiscard]] bool read(Slot* slot) noexcept {
    if (!peek(slot)) return false;
    advance(*slot);
    return true;
  }

  // Consumer: the same slot, which stays the next one until advance().
  [[nodiscard]] bool peek(Slot* slot) noexcept {
    for (;;) {
      // acquire PAIRS WITH mark(): the slot's bytes are visible.
      const std::uint32_t value =
          marks_[read_position_ % capacity_].load(std::memory_order_acquire);
      if (value == 0) return false;
      const auto granules = static_cast<Index>(value >> kStateBits);
      *slot =
          Slot{arena_ + std::size_t{static_cast<Index>(read_position_ % capacity_)} * kGranuleBytes,
               read_position_, granules, (value & kStateMask) == kAbandoned};
      if ((value & kStateMask) != kPadding) return true;
      advance(*slot);
    }
  }
  // Consumer: steps over the slot that peek() has shown.
  void advance(const Slot& slot) noexcept {
    // INVARIANT 1; relaxed: producers see it through tail_.
    marks_[slot.position % capacity_].store(0, std::memory_order_relaxed);
    read_position_ = slot.end();
  }

  // Consumer: the bytes of a slot that was published and is not released.
  [[nodiscard]] const std::byte* at(Index position) const noexcept {
    return arena_ + std::size_t{static_cast<Index>(position % capacity_)} * kGranuleBytes;
  }
  // Consumer: gives all memory before `position` back. REQUIRES: tail() <= position <=
  // read_position().
  void release(Index position) noexcept { tail_.store(position, std::memory_order_release); }

  [[nodiscard]] Index read_position() const noexcept { return read_position_; }  // consumer only
  // relaxed: both are counts for decisions that tolerate lag; try_reserve does its own ordering.
  [[nodiscard]] Index head() const noexcept { return head_.load(std::memory_order_relaxed); }
  [[nodiscard]] Index tail() const noexcept { return tail_.load(std::memory_order_relaxed); }
  // For statistics. acquire PAIRS WITH release(): the head loaded after it is not behind that tail.
  // Both may move between the two loads, so the difference is cut to what the ring can hold.
  [[nodiscard]] std::size_t used_bytes() const noexcept {
    const Index tail = tail_.load(std::memory_order_acquire);
    const auto used = static_cast<Index>(head_.load(std::memory_order_relaxed) - tail);
    return std::size_t{used < capacity_ ? used : capacity_} * kGranuleBytes;
  }

 private:
  static constexpr unsigned kStateBits = 2;
  static constexpr std::uint32_t kStateMask = 3;
  static constexpr std::uint32_t kPublished = 1;
  static constexpr std::uint32_t kAbandoned = 2;
  static constexpr std::uint32_t kPadding = 3;

  void mark(Index position, Index granules, std::uint32_t state) noexcept {
    marks_[position % capacity_].store((static_cast<std::uint32_t>(granules) << kStateBits) | state,
                                       std::memory_order_release);
  }

  // constant after construction
  std::byte* const arena_;
  const Index capacity_;
  const std::unique_ptr<std::atomic<std::uint32_t>[]> marks_;
  // producers
  alignas(64) std::atomic<Index> head_{0};
  // consumer, read by producers
  alignas(64) std::atomic<Index> tail_{0};
  // consumer only
  alignas(64) Index read_position_ = 0;

  static_assert(std::atomic<Index>::is_always_lock_free);
  static_assert(std::atomic<std::uint32_t>::is_always_lock_free);
};

// A reserved slot that abandons itself unless it is published: INVARIANT 4 for code that may leave
// early.
template <class Index>
class Reservation {
 public:
  Reservation(MpscByteRing<Index>& ring, const typename MpscByteRing<Index>::Slot& slot) noexcept
      : ring_(&ring), slot_(slot) {}
  ~Reservation() {
    if (ring_ != nullptr) ring_->abandon(slot_);
  }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  [[nodiscard]] std::byte* data() const noexcept { return slot_.data; }
  [[nodiscard]] Index position() const noexcept { return slot_.position; }
  void publish() noexcept {
    ring_->publish(slot_);
    ring_ = nullptr;
  }

 private:
  MpscByteRing<Index>* ring_;
  typename MpscByteRing<Index>::Slot slot_;
};

}  // namespace mld
