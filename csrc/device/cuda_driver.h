// The functions of the CUDA driver that we call, found in libcuda.so.1 at run time: building needs
// no CUDA toolkit, and a process without a GPU never opens the library.
//
// It declares and looks up, and calls nothing: never cuInit, since CUDA tensors exist only where
// torch has initialised the driver. The types are our own declarations of the driver's binary
// interface. Symbols carry their version: the plain names of several functions are those of an
// older interface (cuda.h maps them to `_v2` by macros).
//
// Thread safety: immutable once loaded. The library is never closed, since the driver outlives us.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace mld::cuda {

using Result = int;
using Device = int;
using DevicePointer = unsigned long long;
using Context = struct ContextTag*;
using Stream = struct StreamTag*;
using Event = struct EventTag*;

inline constexpr Result kSuccess = 0;
inline constexpr Result kOutOfMemory = 2;
inline constexpr Result kDeinitialized = 4;
inline constexpr Result kNotReady = 600;
inline constexpr Result kNotSupported = 801;
inline constexpr Result kStreamCaptureImplicit = 906;
inline constexpr Result kUnknown = 999;

inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kHostPortable = 1;
inline constexpr unsigned kHostDeviceMap = 2;
inline constexpr int kCaptureModeRelaxed = 2;

// Whether `code` means that the context is lost: every later call of it fails, and no copy of it
// runs any more.
[[nodiscard]] bool is_sticky(Result code) noexcept;

// member, symbol, signature
#define MLD_CUDA_FUNCTIONS(F)                                                                 \
  F(get_error_name, "cuGetErrorName", Result (*)(Result, const char**))                       \
  F(device_get, "cuDeviceGet", Result (*)(Device*, int))                                      \
  F(primary_context_retain, "cuDevicePrimaryCtxRetain", Result (*)(Context*, Device))         \
  F(primary_context_release, "cuDevicePrimaryCtxRelease_v2", Result (*)(Device))              \
  F(context_get_current, "cuCtxGetCurrent", Result (*)(Context*))                             \
  F(context_push, "cuCtxPushCurrent_v2", Result (*)(Context))                                 \
  F(context_pop, "cuCtxPopCurrent_v2", Result (*)(Context*))                                  \
  F(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode", Result (*)(int*))             \
  F(stream_is_capturing, "cuStreamIsCapturing", Result (*)(Stream, int*))                     \
  F(stream_create, "cuStreamCreate", Result (*)(Stream*, unsigned))                           \
  F(stream_destroy, "cuStreamDestroy_v2", Result (*)(Stream))                                 \
  F(stream_wait_event, "cuStreamWaitEvent", Result (*)(Stream, Event, unsigned))              \
  F(stream_synchronize, "cuStreamSynchronize", Result (*)(Stream))                            \
  F(stream_query, "cuStreamQuery", Result (*)(Stream))                                        \
  F(stream_write_value, "cuStreamWriteValue32_v2",                                            \
    Result (*)(Stream, DevicePointer, std::uint32_t, unsigned))                               \
  F(event_create, "cuEventCreate", Result (*)(Event*, unsigned))                              \
  F(event_record, "cuEventRecord", Result (*)(Event, Stream))                                 \
  F(event_destroy, "cuEventDestroy_v2", Result (*)(Event))                                    \
  F(memory_get_info, "cuMemGetInfo_v2", Result (*)(std::size_t*, std::size_t*))               \
  F(memory_allocate, "cuMemAlloc_v2", Result (*)(DevicePointer*, std::size_t))                \
  F(memory_free, "cuMemFree_v2", Result (*)(DevicePointer))                                   \
  F(memory_set, "cuMemsetD32Async", Result (*)(DevicePointer, unsigned, std::size_t, Stream)) \
  F(host_allocate, "cuMemHostAlloc", Result (*)(void**, std::size_t, unsigned))               \
  F(host_free, "cuMemFreeHost", Result (*)(void*))                                            \
  F(host_register, "cuMemHostRegister_v2", Result (*)(void*, std::size_t, unsigned))          \
  F(host_unregister, "cuMemHostUnregister", Result (*)(void*))                                \
  F(host_device_pointer, "cuMemHostGetDevicePointer_v2",                                      \
    Result (*)(DevicePointer*, void*, unsigned))                                              \
  F(copy_device_to_device, "cuMemcpyDtoDAsync_v2",                                            \
    Result (*)(DevicePointer, DevicePointer, std::size_t, Stream))                            \
  F(copy_device_to_host, "cuMemcpyDtoHAsync_v2",                                              \
    Result (*)(void*, DevicePointer, std::size_t, Stream))

class Driver {
 public:
  static constexpr const char* kLibrary = "libcuda.so.1";

  // Null when the library or one of its symbols is missing; `why` says which.
  static std::unique_ptr<Driver> load(const std::string& library, std::string* why);

  // "CUDA_ERROR_..."; the number where the driver has no name for it.
  [[nodiscard]] std::string error_name(Result code) const;

#define MLD_DECLARE(member, symbol, ...) \
  using member##_function = __VA_ARGS__; \
  member##_function member = nullptr;
  MLD_CUDA_FUNCTIONS(MLD_DECLARE)
#undef MLD_DECLARE

 private:
  Driver() = default;
};

}  // namespace mld::cuda
