// A borrowed look at a dense tensor: no reference, valid until control returns to Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mld {

struct TensorView {
  const std::byte* data = nullptr;
  const std::int64_t* dims = nullptr;
  std::uint32_t ndim = 0;
  std::uint64_t bytes = 0;
  const char* dtype = nullptr;  // torch's name, static text
};

}  // namespace mld
