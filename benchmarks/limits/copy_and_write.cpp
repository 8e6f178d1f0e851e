// What any recorder pays that copies, checks and writes: one thread copies pieces into a ring of 256 MiB,
// another reads each once, as a checksum must, and writes it; beside it the same bytes from a warm buffer.
//   g++ -O3 -std=c++17 -pthread copy_and_write.cpp -o limit && ./limit FILE [MiB before each fdatasync]
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <thread>

constexpr std::size_t kPiece = 1 << 20, kRing = 256 << 20, kTotal = 512 << 20, kSource = 4 << 20;
unsigned long g_sum;  // keeps the reading from being optimised away

void write_piece(int file, const char* piece, std::size_t at, std::size_t group) {
  if (pwrite(file, piece, kPiece, at) != static_cast<ssize_t>(kPiece)) std::abort();
  if (group != 0 && (at + kPiece) % group == 0 && fdatasync(file) != 0) std::abort();
}

void write_bare(int file, char*, const char* source, std::size_t group) {
  for (std::size_t at = 0; at < kTotal; at += kPiece) write_piece(file, source + at % kSource, at, group);
}

void write_chain(int file, char* ring, const char* source, std::size_t group) {
  std::atomic<std::size_t> head{0}, tail{0};
  std::thread writer([&] {
    for (std::size_t at = 0; at < kTotal; tail = at += kPiece) {
      while (head <= at) std::this_thread::sleep_for(std::chrono::microseconds(50));
      const auto* words = reinterpret_cast<const unsigned long*>(ring + at % kRing);
      for (std::size_t word = 0; word < kPiece / 8; ++word) g_sum += words[word];
      write_piece(file, ring + at % kRing, at, group);
    }
  });
  for (std::size_t at = 0; at < kTotal; head = at += kPiece) {
    while (at + kPiece > tail + kRing) std::this_thread::sleep_for(std::chrono::microseconds(50));
    std::memcpy(ring + at % kRing, source + at % kSource, kPiece);
  }
  writer.join();
}

int main(int count, char** arguments) {
  auto* ring = static_cast<char*>(mmap(nullptr, kRing + kSource, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  std::memset(ring, 1, kRing + kSource);
  const std::size_t group = count > 2 ? std::atoi(arguments[2]) * kPiece : 0;
  for (int run = 0; run < 12; ++run) {
    const int file = open(arguments[1], O_CREAT | O_TRUNC | O_RDWR, 0600);
    const auto begin = std::chrono::steady_clock::now();
    const std::clock_t cpu = std::clock();
    (run % 2 == 0 ? write_bare : write_chain)(file, ring, ring + kRing, group);
    const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - begin;
    std::printf("%s %.3f s/GB, CPU %.3f s/GB\n", run % 2 == 0 ? "bare " : "chain", wall.count() / kTotal * 1e9,
                double(std::clock() - cpu) / CLOCKS_PER_SEC / kTotal * 1e9);
    close(file), unlink(arguments[1]);
  }
}
