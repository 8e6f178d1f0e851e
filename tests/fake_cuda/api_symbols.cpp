// cuGetProcAddress, and the old functions that still have the plain names.
#include <cstring>

#include "fake_cuda/call.h"

namespace fake_cuda {
namespace {

CUresult old_abi(const char* name) {
  return run_call(name, kAlways, [&](Call& call) -> CUresult {
    call.driver.report(Rule::kOldAbi, name);
    return kInvalidValue;
  });
}

}  // namespace

// Their parameters differ (32-bit addresses and sizes, or the meaning), so they take none here.
#define FAKE_CUDA_OLD(name) \
  FAKE_CUDA_EXPORT CUresult name() { return old_abi(__func__); }
FAKE_CUDA_OLD(cuCtxPopCurrent)
FAKE_CUDA_OLD(cuCtxPushCurrent)
FAKE_CUDA_OLD(cuDevicePrimaryCtxRelease)
FAKE_CUDA_OLD(cuEventDestroy)
FAKE_CUDA_OLD(cuMemAlloc)
FAKE_CUDA_OLD(cuMemFree)
FAKE_CUDA_OLD(cuMemGetInfo)
FAKE_CUDA_OLD(cuMemHostGetDevicePointer)
FAKE_CUDA_OLD(cuMemHostRegister)
FAKE_CUDA_OLD(cuMemcpyDtoDAsync)
FAKE_CUDA_OLD(cuMemcpyDtoHAsync)
FAKE_CUDA_OLD(cuMemcpyHtoDAsync)
FAKE_CUDA_OLD(cuStreamBeginCapture)
FAKE_CUDA_OLD(cuStreamDestroy)
FAKE_CUDA_OLD(cuStreamWriteValue32)
#undef FAKE_CUDA_OLD

namespace {

struct Symbol {
  const char* name;  // as asked for, without a version
  int since;         // CUDA version * 1000, as in cudaTypedefs.h
  void* function;
};

template <class Function>
Symbol symbol(const char* name, int since, Function* function) {
  return {name, since, reinterpret_cast<void*>(function)};
}

// Of several with one name the last that is old enough is taken.
const Symbol kSymbols[] = {
    symbol("cuInit", 2000, cuInit),
    symbol("cuDriverGetVersion", 2020, cuDriverGetVersion),
    symbol("cuGetProcAddress", 11030, cuGetProcAddress),
    symbol("cuGetProcAddress", 12000, cuGetProcAddress_v2),
    symbol("cuGetErrorName", 6000, cuGetErrorName),
    symbol("cuGetErrorString", 6000, cuGetErrorString),
    symbol("cuDeviceGet", 2000, cuDeviceGet),
    symbol("cuDeviceGetCount", 2000, cuDeviceGetCount),
    symbol("cuDevicePrimaryCtxRetain", 7000, cuDevicePrimaryCtxRetain),
    symbol("cuDevicePrimaryCtxRelease", 7000, cuDevicePrimaryCtxRelease),
    symbol("cuDevicePrimaryCtxRelease", 11000, cuDevicePrimaryCtxRelease_v2),
    symbol("cuDevicePrimaryCtxGetState", 7000, cuDevicePrimaryCtxGetState),
    symbol("cuCtxGetCurrent", 4000, cuCtxGetCurrent),
    symbol("cuCtxSetCurrent", 4000, cuCtxSetCurrent),
    symbol("cuCtxPushCurrent", 2000, cuCtxPushCurrent),
    symbol("cuCtxPushCurrent", 4000, cuCtxPushCurrent_v2),
    symbol("cuCtxPopCurrent", 2000, cuCtxPopCurrent),
    symbol("cuCtxPopCurrent", 4000, cuCtxPopCurrent_v2),
    symbol("cuCtxGetDevice", 2000, cuCtxGetDevice),
    symbol("cuCtxSynchronize", 2000, cuCtxSynchronize),
    symbol("cuStreamCreate", 2000, cuStreamCreate),
    symbol("cuStreamCreateWithPriority", 5050, cuStreamCreateWithPriority),
    symbol("cuStreamDestroy", 2000, cuStreamDestroy),
    symbol("cuStreamDestroy", 4000, cuStreamDestroy_v2),
    symbol("cuStreamWaitEvent", 3020, cuStreamWaitEvent),
    symbol("cuStreamSynchronize", 2000, cuStreamSynchronize),
    symbol("cuStreamQuery", 2000, cuStreamQuery),
    symbol("cuStreamIsCapturing", 10000, cuStreamIsCapturing),
    symbol("cuStreamBeginCapture", 10000, cuStreamBeginCapture),
    symbol("cuStreamBeginCapture", 10010, cuStreamBeginCapture_v2),
    symbol("cuStreamEndCapture", 10000, cuStreamEndCapture),
    symbol("cuThreadExchangeStreamCaptureMode", 10010, cuThreadExchangeStreamCaptureMode),
    symbol("cuEventCreate", 2000, cuEventCreate),
    symbol("cuEventRecord", 2000, cuEventRecord),
    symbol("cuEventQuery", 2000, cuEventQuery),
    symbol("cuEventSynchronize", 2000, cuEventSynchronize),
    symbol("cuEventDestroy", 2000, cuEventDestroy),
    symbol("cuEventDestroy", 4000, cuEventDestroy_v2),
    symbol("cuMemAlloc", 2000, cuMemAlloc),
    symbol("cuMemAlloc", 3020, cuMemAlloc_v2),
    symbol("cuMemFree", 2000, cuMemFree),
    symbol("cuMemFree", 3020, cuMemFree_v2),
    symbol("cuMemGetInfo", 2000, cuMemGetInfo),
    symbol("cuMemGetInfo", 3020, cuMemGetInfo_v2),
    symbol("cuMemHostAlloc", 2020, cuMemHostAlloc),
    symbol("cuMemFreeHost", 2000, cuMemFreeHost),
    symbol("cuMemHostRegister", 4000, cuMemHostRegister),
    symbol("cuMemHostRegister", 6050, cuMemHostRegister_v2),
    symbol("cuMemHostUnregister", 4000, cuMemHostUnregister),
    symbol("cuMemHostGetDevicePointer", 2020, cuMemHostGetDevicePointer),
    symbol("cuMemHostGetDevicePointer", 3020, cuMemHostGetDevicePointer_v2),
    symbol("cuPointerGetAttribute", 4000, cuPointerGetAttribute),
    symbol("cuMemcpyDtoDAsync", 3000, cuMemcpyDtoDAsync),
    symbol("cuMemcpyDtoDAsync", 3020, cuMemcpyDtoDAsync_v2),
    symbol("cuMemcpyDtoHAsync", 2000, cuMemcpyDtoHAsync),
    symbol("cuMemcpyDtoHAsync", 3020, cuMemcpyDtoHAsync_v2),
    symbol("cuMemcpyHtoDAsync", 2000, cuMemcpyHtoDAsync),
    symbol("cuMemcpyHtoDAsync", 3020, cuMemcpyHtoDAsync_v2),
    symbol("cuMemsetD8Async", 3020, cuMemsetD8Async),
    symbol("cuMemsetD32Async", 3020, cuMemsetD32Async),
    symbol("cuStreamWriteValue32", 8000, cuStreamWriteValue32),
    symbol("cuStreamWriteValue32", 11070, cuStreamWriteValue32_v2),
    symbol("cuLaunchHostFunc", 10000, cuLaunchHostFunc),
};

// 0 found, 1 not found, 2 too new for `version`: cuda.h 2420-2422.
int look_up(const Driver& driver, const char* name, int version, void** function) {
  *function = nullptr;
  int status = 1;
  if (driver.hidden_symbols.contains(std::string_view(name))) return status;
  for (const Symbol& symbol : kSymbols) {
    if (std::strcmp(symbol.name, name) != 0) continue;
    if (symbol.since > version) {
      if (*function == nullptr) status = 2;
      continue;
    }
    *function = symbol.function;
    status = 0;
  }
  return status;
}

CUresult get_proc_address(const char* caller, const char* name, void** function, int version,
                          int* status) {
  return run_call(caller, kAlways, [&](Call& call) -> CUresult {
    if (name == nullptr || version > kDriverVersion) return kInvalidValue;
    const int found = look_up(call.driver, name, version, function);
    if (status != nullptr) *status = found;
    return kSuccess;  // also when there is none: only the pointer tells (cuda.h 24303)
  });
}

}  // namespace

FAKE_CUDA_EXPORT CUresult cuGetProcAddress(const char* name, void** function, int version,
                                           std::uint64_t) {
  return get_proc_address(__func__, name, function, version, nullptr);
}

FAKE_CUDA_EXPORT CUresult cuGetProcAddress_v2(const char* name, void** function, int version,
                                              std::uint64_t, int* status) {
  return get_proc_address(__func__, name, function, version, status);
}

}  // namespace fake_cuda
