#include "fake_cuda/call.h"

namespace fake_cuda {

std::optional<CUresult> refuse(Call& call, const char* name, unsigned needs) {
  Driver& driver = call.driver;
  ++driver.calls[name];
  ++call.thread.calls[name];
  if (Scheduler::running_operation() != nullptr) {
    driver.report(Rule::kCallInHostFunction, name);
    return kNotPermitted;
  }
  driver.scheduler.interleave(call.lock);
  if (driver.shut_down) return kDeinitialized;
  if (!driver.initialised && (needs & kAlways) == 0) return kNotInitialized;
  call.context = call.thread.current();
  if (const auto fault = driver.take_fault(name)) {
    if (fault->sticky && call.context != nullptr) {
      driver.scheduler.break_context(*call.context, fault->code);
    }
    return fault->code;
  }
  if ((needs & (kAlways | kManages)) != 0) return std::nullopt;
  if (call.context == nullptr && (needs & kContext) != 0) {
    driver.report(Rule::kNoContext, name);
    return kInvalidContext;
  }
  if (call.context != nullptr && call.context->error != kSuccess) return call.context->error;
  if ((needs & kUnsafe) != 0) {
    const CUresult refused = driver.refuse_unsafe(name, call.thread);
    if (refused != kSuccess) return refused;
  }
  if ((needs & kHostWaits) != 0 && call.thread.callee) {
    driver.report(Rule::kHostWaitInCallee, name);
  }
  return std::nullopt;
}

}  // namespace fake_cuda
