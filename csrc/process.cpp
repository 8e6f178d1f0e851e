#include "process.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <new>
#include <vector>

namespace mld {
namespace {

std::atomic<std::uint64_t> g_generation{0};
std::atomic<Process*> g_process{nullptr};
std::once_flag g_install_once;

// Leaked on purpose, as is Process: static destructors run while the writer thread may still be at
// work.
std::mutex& lock_descriptors_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}
std::vector<int>& lock_descriptors() {
  static auto* descriptors = new std::vector<int>;
  return *descriptors;
}

void before_fork() { lock_descriptors_mutex().lock(); }
void after_fork_in_parent() { lock_descriptors_mutex().unlock(); }
void after_fork_in_child() {
  // Rebuilt in place: the thread that might have owned another mutex of the old state is not here
  // to release it.
  new (&lock_descriptors_mutex()) std::mutex;
  for (const int descriptor : lock_descriptors())
    close(descriptor);  // never LOCK_UN: that would unlock the parent
  lock_descriptors().clear();
  g_generation.fetch_add(1, std::memory_order_relaxed);
  g_process.store(new Process, std::memory_order_release);
}

}  // namespace

Process& process() {
  std::call_once(g_install_once, [] {
    lock_descriptors_mutex();
    lock_descriptors();
    // Now, not when the writer thread first asks: a fork in the middle of that would leave the
    // child waiting for a thread that it does not have.
    boot_id();
    g_process.store(new Process, std::memory_order_release);
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  });
  return *g_process.load(std::memory_order_acquire);
}

std::uint64_t process_generation() noexcept { return g_generation.load(std::memory_order_relaxed); }

void guard_lock_descriptor(int descriptor) {
  process();
  const std::lock_guard<std::mutex> lock(lock_descriptors_mutex());
  lock_descriptors().push_back(descriptor);
}

void unguard_lock_descriptor(int descriptor) {
  const std::lock_guard<std::mutex> lock(lock_descriptors_mutex());
  auto& descriptors = lock_descriptors();
  descriptors.erase(std::remove(descriptors.begin(), descriptors.end(), descriptor),
                    descriptors.end());
}

const std::string& boot_id() {
  static const auto* id = [] {
    std::ifstream file("/proc/sys/kernel/random/boot_id");
    auto* text = new std::string;
    std::getline(file, *text);
    return text;
  }();
  return *id;
}

}  // namespace mld
