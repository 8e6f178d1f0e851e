// For the stager's tests: each order that it keeps, by the name of its absence. In a test program
// built with MLD_STAGER_MUTATIONS one of them can be broken at run time, to show that the fake
// driver sees it; everywhere else none is, and the compiler takes the questions away.
#pragma once

namespace mld {

enum class StagerMutation {
  kNone,
  kNoWait,             // our stream does not wait for the snapshot
  kWaitBeforeRecord,   // it waits for an event that is not recorded yet
  kNoRecord,           // the event is never recorded
  kReuseAtOnce,        // a device slot is free as soon as its copy is enqueued
  kArrivedAtOnce,      // a copy counts as arrived when it is enqueued
  kWordFirst,          // the word is written before the copy
  kNoWord,             // it is never written
  kQueryInHook,        // the hook asks whether our stream has caught up
  kNoSnapshot,         // our stream reads the tensor itself
  kNoRelaxedMode,      // calls run in the capture mode that the thread happens to have
  kNoContext,          // calls run in whatever context is current
  kContextStays,       // the context is not taken back
  kModeStays,          // the capture mode is not taken back
  kNoCaptureQuestion,  // operations go to a stream that is being captured
  kNoWaitForDirect,    // our stream does not wait for a copy on the compute stream
  kNoDrain,            // a copy that was enqueued in part is not waited for
  kCounterLate,        // without memory operations: the counter is copied before it is set
  kCount,
};

#ifdef MLD_STAGER_MUTATIONS
extern StagerMutation stager_mutation;
inline bool is_broken(StagerMutation order) noexcept { return stager_mutation == order; }
#else
constexpr bool is_broken(StagerMutation) noexcept { return false; }
#endif

}  // namespace mld
