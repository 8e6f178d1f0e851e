// Runs the scenarios on a stager that was compiled with one order at a time broken
// (device/stager_mutation.h). Exits with 0 if each one is found, and nothing in the sound one.
#include <cstdio>
#include <functional>
#include <vector>

#include "device/stager_mutation.h"
#include "device_scenarios.h"

namespace {

using namespace device_scenarios;
using mld::StagerMutation;

// How the word of a copy is set.
enum class Way { kOperation, kCounter };
Way g_way = Way::kOperation;

Findings fail_in_the_middle(std::uint64_t seed) {
  // The first one of each device is its set-up's.
  return fail_call(seed, g_way == Way::kOperation ? "cuStreamWriteValue32_v2" : "cuMemsetD32Async",
                   3 + seed % 4, fake_cuda::kNotPermitted, false);
}

// The scenario that is to find the broken order, and its name.
struct Entry {
  StagerMutation broken;
  const char* name;
  std::function<Findings(std::uint64_t)> scenario;
};

const std::vector<Entry> kEntries = {
    {StagerMutation::kNoWait, "no wait for the snapshot", train},
    {StagerMutation::kWaitBeforeRecord, "a wait for an event not recorded yet", train},
    {StagerMutation::kNoRecord, "an event never recorded", train},
    {StagerMutation::kReuseAtOnce, "a device slot reused too early", train},
    {StagerMutation::kArrivedAtOnce, "published before the copy ended", train},
    {StagerMutation::kWordFirst, "the word written before the copy", train},
    {StagerMutation::kNoWord, "no word", train},
    {StagerMutation::kQueryInHook, "a query during a capture", capture_elsewhere},
    {StagerMutation::kNoSnapshot, "no snapshot", train},
    {StagerMutation::kNoRelaxedMode, "not in RELAXED mode", capture_elsewhere},
    {StagerMutation::kNoContext, "no context of the device", train},
    {StagerMutation::kContextStays, "the context left behind", train},
    {StagerMutation::kModeStays, "the capture mode left behind", train},
    {StagerMutation::kNoCaptureQuestion, "no question for a capture", capture_here},
    {StagerMutation::kNoWaitForDirect, "no wait for a copy on the compute stream",
     train_without_device_ring},
    {StagerMutation::kNoDrain, "a copy enqueued in part not waited for", fail_in_the_middle},
    {StagerMutation::kCounterLate, "the counter copied before it is set", train},
};

constexpr std::uint64_t kSeeds = 10;

bool is_as_expected(const Entry& entry, bool broken) {
  mld::stager_mutation = broken ? entry.broken : StagerMutation::kNone;
  int found = 0;
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) found += !entry.scenario(seed).none();
  if (broken ? found != 0 : found == 0) return true;
  std::fprintf(stderr, "%s: %s, %s\n", entry.name, broken ? "not found" : "a false alarm",
               g_way == Way::kOperation ? "word by memory operation" : "word by counter");
  return false;
}

}  // namespace

int main() {
  static_assert(static_cast<int>(StagerMutation::kCount) == 18, "list the new one above");
  int unexpected = 0;
  for (const Way way : {Way::kOperation, Way::kCounter}) {
    g_way = way;
    set_memory_operations(way == Way::kOperation);
    for (const Entry& entry : kEntries) {
      // That order is there in one way only.
      if (entry.broken == StagerMutation::kCounterLate && way == Way::kOperation) continue;
      for (const bool broken : {false, true}) unexpected += !is_as_expected(entry, broken);
    }
  }
  return unexpected == 0 ? 0 : 1;
}
