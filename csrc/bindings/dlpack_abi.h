// The few structures of DLPack's C exchange API that we read, declared from its specification
// (https://dmlc.github.io/dlpack/latest/c_api.html, version 1.x). Layout only; no behaviour.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mld::dlpack {

inline constexpr const char* kExchangeCapsule = "dlpack_exchange_api";
inline constexpr std::uint32_t kMajorVersion = 1;

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };

struct Device {
  DeviceType type;
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null when contiguous
  std::uint64_t byte_offset;
};

struct ExchangeHeader {
  std::uint32_t major, minor;
  ExchangeHeader* previous;
};

struct ExchangeApi {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*borrow)(void* object, Tensor* out);  // may be null: a producer need not offer it
  int (*current_work_stream)(DeviceType type, std::int32_t index, void** stream);
};

static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24 &&
              offsetof(Tensor, byte_offset) == 40);

}  // namespace mld::dlpack
