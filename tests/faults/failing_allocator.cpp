// Preloaded: malloc, operator new and pthread_create that fail on request, for the core alone.
//
// `starve(begin, end, nth, ever)`: of the allocations whose caller lies in [begin, end), or with 0,
// 0 of those on the thread mld-writer, the nth fails, and all after it if `ever`. `starve_threads`
// does the same to pthread_create. `feed` ends both and returns how many were counted; `failed` how
// many failed. The loader always gets what it asks for.
#include <dlfcn.h>
#include <execinfo.h>
#include <pthread.h>
#include <sys/prctl.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {

struct Shortage {
  std::atomic<bool> on{false}, ever{false};
  std::atomic<std::uintptr_t> begin{0}, end{0};
  std::atomic<long> nth{0}, seen{0}, failed{0};

  void start(std::uintptr_t first, std::uintptr_t last, long number, bool for_ever) {
    begin = first, end = last, nth = number, ever = for_ever, seen = 0, failed = 0;
    on = true;
  }
  bool strikes() {
    const long number = ++seen;
    const bool fails = number == nth || (ever && nth > 0 && number > nth);
    failed += fails;
    return fails;
  }
};
Shortage g_memory, g_threads;

bool is_writer() {
  char name[16] = {};
  return prctl(PR_GET_NAME, name) == 0 && std::strcmp(name, "mld-writer") == 0;
}

// glibc ends the process when a thread's first use of a library's thread-locals finds no memory.
bool is_of_loader(const void* caller) {
  Dl_info info{};
  return dladdr(caller, &info) != 0 && std::strstr(info.dli_fname, "/ld-") != nullptr;
}

bool fails(const void* caller) {
  if (!g_memory.on.load(std::memory_order_relaxed)) return false;
  const auto address = reinterpret_cast<std::uintptr_t>(caller);
  const bool is_meant = g_memory.end == 0
                            ? is_writer()
                            : address >= g_memory.begin && address < g_memory.end && !is_writer();
  return is_meant && !is_of_loader(caller) && g_memory.strikes();
}

void* refuse() {
  errno = ENOMEM;
  return nullptr;
}

// For the report of a failed test: who let an exception escape.
[[noreturn]] void show_stack() {
  g_memory.on = false;
  void* frames[40];
  backtrace_symbols_fd(frames, backtrace(frames, 40), 2);
  std::abort();
}
const auto g_before = std::set_terminate(show_stack);

}  // namespace

extern "C" {
void starve(unsigned long begin, unsigned long end, long nth, int ever) {
  g_memory.start(begin, end, nth, ever != 0);
}
void starve_threads(long nth, int ever) { g_threads.start(0, 0, nth, ever != 0); }
int feed() {
  g_memory.on = g_threads.on = false;
  return static_cast<int>(g_memory.seen + g_threads.seen);
}
int failed() { return static_cast<int>(g_memory.failed + g_threads.failed); }

void* malloc(size_t bytes) {
  return fails(__builtin_return_address(0)) ? refuse() : __libc_malloc(bytes);
}
void* calloc(size_t count, size_t bytes) {
  return fails(__builtin_return_address(0)) ? refuse() : __libc_calloc(count, bytes);
}
void* realloc(void* memory, size_t bytes) {
  return fails(__builtin_return_address(0)) ? refuse() : __libc_realloc(memory, bytes);
}
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  if (fails(__builtin_return_address(0))) return ENOMEM;
  *out = __libc_memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*),
                   void* argument) {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  if (g_threads.on && g_threads.strikes()) return EAGAIN;
  return create(thread, attributes, run, argument);
}
}

void* operator new(std::size_t bytes) {
  void* memory =
      fails(__builtin_return_address(0)) ? nullptr : __libc_malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new[](std::size_t bytes) {
  void* memory =
      fails(__builtin_return_address(0)) ? nullptr : __libc_malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
