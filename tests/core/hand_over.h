// One producer and one consumer over a ring type: the consumer reads what was published. Returns 0
// if it was right.
#pragma once

#include <cstddef>
#include <cstring>
#include <thread>
#include <vector>

template <class Ring>
int hand_over(int slots) {
  std::vector<std::byte> memory(16 * Ring::kGranuleBytes);
  Ring ring(memory.data(), 16);
  std::thread producer([&] {
    for (int i = 0; i < slots; ++i) {
      typename Ring::Slot slot;
      while (!ring.try_reserve(sizeof i, &slot)) std::this_thread::yield();
      std::memcpy(slot.data, &i, sizeof i);
      ring.publish(slot);
    }
  });
  int wrong = 0;
  for (int expected = 0; expected < slots;) {
    typename Ring::Slot slot;
    if (!ring.read(&slot)) {
      std::this_thread::yield();
      continue;
    }
    int value = 0;
    std::memcpy(&value, slot.data, sizeof value);
    if (value != expected++) ++wrong;
    ring.release(slot.end());
  }
  producer.join();
  return wrong == 0 ? 0 : 1;
}
