#include "device/cuda_driver.h"

#include <dlfcn.h>

#include <type_traits>
#include <utility>

namespace mld::cuda {
namespace {

std::string last_dl_error(const char* otherwise) {
  const char* text = dlerror();
  return text == nullptr ? otherwise : text;
}

}  // namespace

bool is_sticky(Result code) noexcept {
  switch (code) {
    case kDeinitialized:
    case 214:  // ECC_UNCORRECTABLE
    case 220:  // NVLINK_UNCORRECTABLE
    case 700:  // ILLEGAL_ADDRESS
    case 702:  // LAUNCH_TIMEOUT
    case 709:  // CONTEXT_IS_DESTROYED
    case 710:  // ASSERT
    case 714:  // HARDWARE_STACK_ERROR
    case 715:  // ILLEGAL_INSTRUCTION
    case 716:  // MISALIGNED_ADDRESS
    case 717:  // INVALID_ADDRESS_SPACE
    case 718:  // INVALID_PC
    case 719:  // LAUNCH_FAILED
    case 721:  // TENSOR_MEMORY_LEAK
    case kUnknown:
      return true;
    default:
      return false;
  }
}

std::unique_ptr<Driver> Driver::load(const std::string& library, std::string* why) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    *why = last_dl_error("dlopen failed");
    return nullptr;
  }
  std::unique_ptr<Driver> driver(new Driver);
  const auto look_up = [&](auto* member, const char* symbol) {
    *member = reinterpret_cast<std::remove_pointer_t<decltype(member)>>(dlsym(handle, symbol));
    if (*member == nullptr && why->empty())
      *why = library + " has no " + symbol + ": the NVIDIA driver is older than CUDA 11.7";
    return *member != nullptr;
  };
  why->clear();
  bool complete = true;
#define MLD_LOOK_UP(member, symbol, ...) complete = look_up(&driver->member, symbol) && complete;
  MLD_CUDA_FUNCTIONS(MLD_LOOK_UP)
#undef MLD_LOOK_UP
  return complete ? std::move(driver) : nullptr;
}

std::string Driver::error_name(Result code) const {
  const char* name = nullptr;
  if (get_error_name(code, &name) == kSuccess && name != nullptr) return name;
  return "CUDA error " + std::to_string(code);
}

}  // namespace mld::cuda
