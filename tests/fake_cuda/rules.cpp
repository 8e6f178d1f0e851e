#include "fake_cuda/rules.h"

namespace fake_cuda {
namespace {

// Sources. "cuda.h N" is the comment at line N of CUDA 13.0's header; "Driver API, S" a section of
// the CUDA Driver API manual; "Guide, S" one of the CUDA C++ Programming Guide. Where the manual is
// silent and the rule is an inference or our own, it says so. In the order of `enum Rule`.
constexpr std::array<RuleText, static_cast<std::size_t>(Rule::kCount)> kRules = {{
    // Streams are the only order: a read needs a stream, an event or the host between it and the
    // write that it reads.
    {"unordered-read", false, "Guide, Streams; cuStreamWaitEvent, cuda.h 15236"},
    // A write needs the same between it and whatever still reads or writes those bytes.
    {"unordered-write", false, "Guide, Streams; cuStreamWaitEvent, cuda.h 15236"},
    // An asynchronous call may return before its copy is complete.
    {"host-read-too-early", false, "Driver API, API synchronization behavior: Asynchronous"},
    {"host-write-too-early", false, "Driver API, API synchronization behavior: Asynchronous"},
    // A copy into bytes that the host still uses may land at any time after its enqueue.
    {"host-range-in-use", false, "Driver API, API synchronization behavior: Asynchronous"},
    // Unregistering makes the range pageable at once, while DMA into it may be under way (inference
    // from the absence of any promise to wait).
    {"host-release-pending", false, "cuMemHostUnregister, cuda.h 9544; cuMemFreeHost, 8796"},
    // cuMemFree only *may* synchronise.
    {"free-while-pending", false, "cuMemFree, cuda.h 8684"},
    {"use-after-free", false, "cuMemFree, cuda.h 8674"},
    {"bad-address", false, "cuMemcpyDtoHAsync, cuda.h 10576: srcDevice is a device address"},
    // Before the first record an event is an empty set of work: the wait is a no-op.
    {"unrecorded-event", false, "cuEventRecord, cuda.h 15963"},
    {"destroyed-handle", false, "cuStreamDestroy, cuda.h 15798; cuEventDestroy, 16105"},
    // "Passing an invalid handle will result in undefined behavior."
    {"unknown-handle", false, "cuStreamGetCtx, cuda.h 15191"},
    // Event and stream of a record must belong to one context.
    {"context-mismatch", false, "cuEventRecord, cuda.h 15952"},
    // The call documents CUDA_ERROR_INVALID_CONTEXT.
    {"no-context", false, "cuMemcpyDtoHAsync, cuda.h 10585; cuCtxSetCurrent, 6396"},
    // Retaining creates the context where there is none: hundreds of MiB on a GPU nobody uses.
    {"context-created", false, "cuDevicePrimaryCtxRetain, cuda.h 5852"},
    {"over-release", false, "cuDevicePrimaryCtxRelease, cuda.h 5908"},
    // Our own rule: the embedding process decides whether and when CUDA starts.
    {"init-called", false, "cuInit, cuda.h 5187; our rule"},
    // cuda.h maps the plain name to a `_v2`; the plain symbol has another signature or meaning.
    {"old-abi", false, "cuda.h 89-174"},
    {"call-in-host-function", false, "cuLaunchHostFunc, cuda.h 18070"},
    // Which calls are "potentially unsafe" is not listed there; ours are those of NVIDIA's
    // checklist for graphs under PyTorch, and by inference all that allocate, pin, free or wait.
    {"unsafe-while-capturing", false, "cuThreadExchangeStreamCaptureMode, cuda.h 15442-15466"},
    // Legal, but every replay would copy into the one host slot of then; our rule.
    {"enqueue-on-capturing", false, "cuStreamBeginCapture, cuda.h 15348; our rule"},
    // RELAXED does not lift this one.
    {"query-of-captured", false, "cuda.h 15464; Guide, Prohibited and Unhandled Operations"},
    {"legacy-while-capturing", false, "cuStreamIsCapturing, cuda.h 15525-15533"},
    // Our rule: the caller's current context is the caller's.
    {"context-left-changed", false, "cuCtxSetCurrent, cuda.h 6396; our rule"},
    // "callers are encouraged to use this API in a push-pop fashion"
    {"capture-mode-left-changed", false, "cuThreadExchangeStreamCaptureMode, cuda.h 15435"},
    // Our rule: a hook never waits for the device.
    {"host-wait-in-callee", false, "Driver API, API synchronization behavior; our rule"},
    // Waited for work that nothing can finish (a held stream, an unfinished host function).
    {"endless-wait", false, "cuStreamSynchronize, cuda.h 15769"},
    {"leak", false, "cuMemHostRegister, cuda.h 9516: must be unregistered; our rule"},
    {"pageable-copy", true, "Driver API, API synchronization behavior: Asynchronous"},
    {"blocking-stream", true, "CU_STREAM_NON_BLOCKING, cuda.h 429"},
}};

}  // namespace

const RuleText& text_of(Rule rule) { return kRules[static_cast<std::size_t>(rule)]; }

void ViolationLog::report(Rule rule, const std::string& detail) {
  ++counts_[static_cast<std::size_t>(rule)];
  if (lines_.size() < kMaxLines) lines_.push_back({rule, detail});
}

std::string ViolationLog::text(bool warnings) const {
  std::string all;
  for (const Line& line : lines_) {
    const RuleText& rule = text_of(line.rule);
    if (rule.is_warning != warnings) continue;
    all += std::string(rule.id) + ": " + line.detail + " [" + rule.source + "]\n";
  }
  return all;
}

void ViolationLog::clear() {
  counts_ = {};
  lines_.clear();
}

}  // namespace fake_cuda
