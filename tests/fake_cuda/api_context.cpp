// The driver API: initialisation, errors, devices, contexts, streams, events, capture.
#include "fake_cuda/call.h"

namespace fake_cuda {
namespace {

CUresult wait_for(Call& call, const VectorClock& target, const char* name) {
  const CUresult result = call.driver.scheduler.wait_for(target, call.lock);
  if (result == kUnknown) call.driver.report(Rule::kEndlessWait, name);
  return result;
}

CUresult create_stream(Call& call, CUstream* stream, unsigned flags) {
  if (flags > kStreamNonBlocking) return kInvalidValue;
  if (flags != kStreamNonBlocking) {
    call.driver.report(Rule::kBlockingStream, "cuStreamCreate without CU_STREAM_NON_BLOCKING");
  }
  Stream& made = call.driver.scheduler.add_stream(*call.context, flags != kStreamNonBlocking);
  made.by_api = true;
  *stream = reinterpret_cast<CUstream>(call.driver.stream_handles.add(&made));
  return kSuccess;
}

// The primary context behind a handle, active or not; nullptr: reported.
Context* context_of(Driver& driver, CUcontext handle) {
  Context* const found = driver.context_handles.find(handle);
  if (found == nullptr) {
    driver.report(Rule::kUnknownHandle, "context " + hex(reinterpret_cast<std::uintptr_t>(handle)));
  }
  return found;
}

CUcontext handle_of(const Driver& driver, const Context* context) {
  return reinterpret_cast<CUcontext>(driver.context_handles.handle_of(context));
}

}  // namespace

FAKE_CUDA_EXPORT CUresult cuInit(unsigned flags) {
  return run_call(__func__, kAlways, [&](Call& call) -> CUresult {
    call.driver.report(Rule::kInitCalled, "cuInit");
    if (flags != 0) return kInvalidValue;
    call.driver.initialised = true;
    return call.driver.contexts.empty() ? kNoDevice : kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuDriverGetVersion(int* version) {
  return run_call(__func__, kAlways, [&](Call&) -> CUresult {
    *version = kDriverVersion;
    return kSuccess;
  });
}

// Of the codes that a test is likely to inject.
FAKE_CUDA_EXPORT CUresult cuGetErrorName(CUresult code, const char** name) {
  static const std::map<CUresult, const char*> names = {
      {kSuccess, "CUDA_SUCCESS"},
      {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
      {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"},
      {kDeinitialized, "CUDA_ERROR_DEINITIALIZED"},
      {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
      {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
      {kNotReady, "CUDA_ERROR_NOT_READY"},
      {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED"},
      {kNotPermitted, "CUDA_ERROR_NOT_PERMITTED"},
      {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED"},
      {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
      {kUnknown, "CUDA_ERROR_UNKNOWN"},
  };
  const auto found = names.find(code);
  *name = found == names.end() ? nullptr : found->second;
  return *name == nullptr ? kInvalidValue : kSuccess;
}

FAKE_CUDA_EXPORT CUresult cuGetErrorString(CUresult code, const char** text) {
  return cuGetErrorName(code, text);
}

FAKE_CUDA_EXPORT CUresult cuDeviceGetCount(int* count) {
  return run_call(__func__, 0, [&](Call& call) -> CUresult {
    *count = static_cast<int>(call.driver.contexts.size());
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  return run_call(__func__, 0, [&](Call& call) -> CUresult {
    if (call.driver.context_of_device(ordinal) == nullptr) return kInvalidDevice;
    *device = ordinal;
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return run_call(__func__, kManages, [&](Call& call) -> CUresult {
    Context* const found = call.driver.context_of_device(device);
    if (found == nullptr) return kInvalidDevice;
    if (!found->active) {
      call.driver.report(Rule::kContextCreated, "on device " + std::to_string(device));
    }
    found->active = true;
    ++found->retains_by_api;
    *context = handle_of(call.driver, found);
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  return run_call(__func__, kManages, [&](Call& call) -> CUresult {
    Context* const found = call.driver.context_of_device(device);
    if (found == nullptr) return kInvalidDevice;
    if (found->retains_by_api == 0) {
      call.driver.report(Rule::kOverRelease, "of device " + std::to_string(device));
      return kInvalidContext;
    }
    --found->retains_by_api;
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags,
                                                     int* active) {
  return run_call(__func__, kManages, [&](Call& call) -> CUresult {
    const Context* const found = call.driver.context_of_device(device);
    if (found == nullptr) return kInvalidDevice;
    *flags = 0;
    *active = found->active ? 1 : 0;
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  return run_call(__func__, kManages, [&](Call& call) -> CUresult {
    *context = handle_of(call.driver, call.context);
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  return run_call(__func__, kManages, [&](Call& call) -> CUresult {
    Context* const found = context == nullptr ? nullptr : context_of(call.driver, context);
    if (found == nullptr && context != nullptr) return kInvalidContext;
    if (!call.thread.contexts.empty()) call.thread.contexts.pop_back();
    if (found != nullptr) call.thread.contexts.push_back(found);
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
  return run_call(__func__, kManages, [&](Call& call) -> CUresult {
    Context* const found = context_of(call.driver, context);
    if (found == nullptr) return kInvalidContext;
    call.thread.contexts.push_back(found);
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  return run_call(__func__, kManages, [&](Call& call) -> CUresult {
    if (call.context == nullptr) {
      call.driver.report(Rule::kNoContext, "cuCtxPopCurrent_v2");
      return kInvalidContext;
    }
    if (context != nullptr) *context = handle_of(call.driver, call.context);
    call.thread.contexts.pop_back();
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
  return run_call(__func__, kContext, [&](Call& call) -> CUresult {
    *device = call.context->device;
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuCtxSynchronize() {
  return run_call(__func__, kContext | kUnsafe | kHostWaits, [&](Call& call) -> CUresult {
    VectorClock all;
    for (const auto& stream : call.driver.scheduler.streams()) {
      if (stream->context != call.context) continue;
      if (stream->capture != nullptr) return call.driver.refuse_query("cuCtxSynchronize", *stream);
      all.join(stream->clock);
    }
    return wait_for(call, all, "cuCtxSynchronize");
  });
}

FAKE_CUDA_EXPORT CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  return run_call(__func__, kContext | kUnsafe,
                  [&](Call& call) -> CUresult { return create_stream(call, stream, flags); });
}

FAKE_CUDA_EXPORT CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) {
  return run_call(__func__, kContext | kUnsafe,
                  [&](Call& call) -> CUresult { return create_stream(call, stream, flags); });
}

// What is still queued executes all the same.
FAKE_CUDA_EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
  return run_call(__func__, kContext | kUnsafe, [&](Call& call) -> CUresult {
    Stream* const found = call.driver.stream(stream, call.context);
    if (found == nullptr) return kInvalidHandle;
    found->destroyed = true;
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
  return run_call(__func__, kContext, [&](Call& call) -> CUresult {
    Stream* const waiting = call.driver.stream(stream, call.context);
    Event* const awaited = call.driver.event(event);
    if (waiting == nullptr || awaited == nullptr) return kInvalidHandle;
    return call.driver.wait(*waiting, *awaited, true);
  });
}

FAKE_CUDA_EXPORT CUresult cuStreamSynchronize(CUstream stream) {
  return run_call(__func__, kContext | kUnsafe | kHostWaits, [&](Call& call) -> CUresult {
    Stream* const found = call.driver.stream(stream, call.context);
    if (found == nullptr) return kInvalidHandle;
    const CUresult refused = call.driver.refuse_query("cuStreamSynchronize", *found);
    if (refused != kSuccess) return refused;
    return wait_for(call, call.driver.scheduler.order_of(*found), "cuStreamSynchronize");
  });
}

FAKE_CUDA_EXPORT CUresult cuStreamQuery(CUstream stream) {
  return run_call(__func__, kContext | kUnsafe, [&](Call& call) -> CUresult {
    Driver& driver = call.driver;
    Stream* const found = driver.stream(stream, call.context);
    if (found == nullptr) return kInvalidHandle;
    const CUresult refused = driver.refuse_query("cuStreamQuery", *found);
    if (refused != kSuccess) return refused;
    if (found->context->error != kSuccess) return found->context->error;
    const VectorClock all = driver.scheduler.order_of(*found);
    if (!driver.scheduler.has_executed(all)) return kNotReady;
    driver.scheduler.host().join(all);
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuStreamIsCapturing(CUstream stream, int* status) {
  return run_call(__func__, 0, [&](Call& call) -> CUresult {
    const Stream* const found = call.driver.stream(stream, call.context);
    if (found == nullptr) return call.context == nullptr ? kInvalidContext : kInvalidHandle;
    if (call.driver.capture_behind_legacy(*found) != nullptr) return kCaptureImplicit;
    const Capture* const capture = found->capture;
    *status = capture == nullptr ? kNone : capture->invalid ? kInvalidated : kActive;
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuStreamBeginCapture_v2(CUstream stream, int mode) {
  return run_call(__func__, kContext, [&](Call& call) -> CUresult {
    Stream* const found = call.driver.stream(stream, call.context);
    return found == nullptr ? kInvalidHandle : call.driver.begin_capture(*found, mode);
  });
}

FAKE_CUDA_EXPORT CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  return run_call(__func__, kContext, [&](Call& call) -> CUresult {
    Stream* const found = call.driver.stream(stream, call.context);
    if (found == nullptr) return kInvalidHandle;
    Capture* made = nullptr;
    const CUresult result = call.driver.end_capture(*found, &made);
    *graph =
        made == nullptr ? nullptr : reinterpret_cast<CUgraph>(call.driver.graph_handles.add(made));
    return result;
  });
}

FAKE_CUDA_EXPORT CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  return run_call(__func__, kManages, [&](Call& call) -> CUresult {
    if (*mode < kGlobal || *mode > kRelaxed) return kInvalidValue;
    std::swap(*mode, call.thread.capture_mode);
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuEventCreate(CUevent* event, unsigned) {
  return run_call(__func__, kContext, [&](Call& call) -> CUresult {
    Driver& driver = call.driver;
    driver.events.push_back(std::make_unique<Event>());
    driver.events.back()->context = call.context;
    *event = reinterpret_cast<CUevent>(driver.event_handles.add(driver.events.back().get()));
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
  return run_call(__func__, kContext, [&](Call& call) -> CUresult {
    Stream* const recording = call.driver.stream(stream, call.context);
    Event* const recorded = call.driver.event(event);
    if (recording == nullptr || recorded == nullptr) return kInvalidHandle;
    return call.driver.record(*recorded, *recording, true);
  });
}

FAKE_CUDA_EXPORT CUresult cuEventQuery(CUevent event) {
  return run_call(__func__, kUnsafe, [&](Call& call) -> CUresult {
    const Event* const asked = call.driver.event(event);
    if (asked == nullptr) return kInvalidHandle;
    if (asked->context->error != kSuccess) return asked->context->error;
    if (asked->capture != nullptr) {
      call.driver.report(Rule::kQueryOfCaptured, "cuEventQuery");
      asked->capture->invalid = true;
      return kCapturedEvent;
    }
    if (!call.driver.scheduler.has_executed(asked->clock)) return kNotReady;
    call.driver.scheduler.host().join(asked->clock);
    return kSuccess;
  });
}

FAKE_CUDA_EXPORT CUresult cuEventSynchronize(CUevent event) {
  return run_call(__func__, kContext | kUnsafe | kHostWaits, [&](Call& call) -> CUresult {
    const Event* const awaited = call.driver.event(event);
    if (awaited == nullptr) return kInvalidHandle;
    if (awaited->capture != nullptr) {
      call.driver.report(Rule::kQueryOfCaptured, "cuEventSynchronize");
      awaited->capture->invalid = true;
      return kCapturedEvent;
    }
    const VectorClock target = awaited->clock;
    return wait_for(call, target, "cuEventSynchronize");
  });
}

FAKE_CUDA_EXPORT CUresult cuEventDestroy_v2(CUevent event) {
  return run_call(__func__, kContext, [&](Call& call) -> CUresult {
    Event* const found = call.driver.event(event);
    if (found == nullptr) return kInvalidHandle;
    found->destroyed = true;
    return kSuccess;
  });
}

}  // namespace fake_cuda
