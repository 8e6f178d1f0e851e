// Stream capture: what it records, what it forbids, and how a forbidden call ends it.
#include "fake_cuda/driver.h"

namespace fake_cuda {

CUresult Driver::begin_capture(Stream& stream, int mode) {
  if (stream.is_legacy) return kCaptureUnsupported;
  if (stream.capture != nullptr) return kInvalidValue;
  auto capture = std::make_unique<Capture>();
  capture->mode = mode;
  capture->owner = std::this_thread::get_id();
  capture->origin = &stream;
  stream.capture = capture.get();
  captures.push_back(std::move(capture));
  return kSuccess;
}

CUresult Driver::end_capture(Stream& stream, Capture** graph) {
  *graph = nullptr;
  Capture* const capture = stream.capture;
  if (capture == nullptr || capture->origin != &stream) return kCaptureUnmatched;
  if (capture->mode != kRelaxed && capture->owner != std::this_thread::get_id()) {
    return kCaptureWrongThread;
  }
  capture->ended = true;
  for (const auto& other : scheduler.streams()) {
    if (other->capture == capture) other->capture = nullptr;
  }
  if (capture->invalid) return kCaptureInvalidated;
  if (!capture->unjoined.empty()) return kCaptureUnjoined;
  *graph = capture;
  return kSuccess;
}

CUresult Driver::refuse_unsafe(const char* name, const ThreadState& thread) {
  if (thread.capture_mode == kRelaxed) return kSuccess;
  CUresult result = kSuccess;
  for (const auto& capture : captures) {
    if (capture->ended) continue;
    const bool forbidden = capture->owner == std::this_thread::get_id()
                               ? capture->mode != kRelaxed
                               : thread.capture_mode == kGlobal && capture->mode == kGlobal;
    if (!forbidden) continue;
    report(Rule::kUnsafeWhileCapturing, name);
    capture->invalid = true;
    result = kCaptureUnsupported;
  }
  return result;
}

CUresult Driver::refuse_query(const char* name, Stream& stream) {
  Capture* const behind = capture_behind_legacy(stream);
  Capture* const capture = stream.capture != nullptr ? stream.capture : behind;
  if (capture == nullptr) return kSuccess;
  report(behind != nullptr ? Rule::kLegacyWhileCapturing : Rule::kQueryOfCaptured, name);
  capture->invalid = true;
  return behind != nullptr ? kCaptureImplicit : kCaptureUnsupported;
}

Capture* Driver::capture_behind_legacy(const Stream& stream) {
  if (!stream.is_legacy) return nullptr;
  for (const auto& other : scheduler.streams()) {
    if (other->capture != nullptr && other->is_blocking && other->context == stream.context) {
      return other->capture;
    }
  }
  return nullptr;
}

}  // namespace fake_cuda
