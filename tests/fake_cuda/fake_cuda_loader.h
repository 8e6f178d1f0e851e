// How a C++ test calls into libfake_cuda.so, which it does not link: FAKE(fake_cuda_step)(3),
// CUDA(cuMemFree_v2)(address). Each symbol is looked up once.
#pragma once

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include "fake_cuda/cuda_abi.h"
#include "fake_cuda/fake_cuda.h"

namespace fake_cuda {

// Opened once and never closed: a worker thread or a thread's state may outlive a test.
inline void* library() {
  static void* const handle = dlopen(MLD_FAKE_CUDA_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::abort();
  }
  return handle;
}

template <class Function>
Function* function(const char* name) {
  void* const found = dlsym(library(), name);
  if (found == nullptr) {
    std::fprintf(stderr, "%s: %s\n", name, dlerror());
    std::abort();
  }
  return reinterpret_cast<Function*>(found);
}

}  // namespace fake_cuda

#define FAKE_CUDA_SYMBOL(scope, name)                                                    \
  ([]() -> decltype(&scope::name) {                                                      \
    static const auto symbol_##name = fake_cuda::function<decltype(scope::name)>(#name); \
    return symbol_##name;                                                                \
  }())
#define FAKE(name) FAKE_CUDA_SYMBOL(, name)
#define CUDA(name) FAKE_CUDA_SYMBOL(fake_cuda, name)
