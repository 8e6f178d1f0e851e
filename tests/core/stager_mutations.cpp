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

Findings fail_in_the_middle(std::uint64_t seed) {
  return fail_call(seed, "cuStreamWriteValue32_v2", 1 + seed % 4, fake_cuda::kNotPermitted, false);
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
};

constexpr std::uint64_t kSeeds = 10;

}  // namespace

int main() {
  static_assert(static_cast<int>(StagerMutation::kCount) == 17, "list the new one above");
  int unexpected = 0;
  for (const Entry& entry : kEntries) {
    for (const bool broken : {false, true}) {
      mld::stager_mutation = broken ? entry.broken : StagerMutation::kNone;
      int found = 0;
      for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) found += !entry.scenario(seed).none();
      if (broken ? found != 0 : found == 0) continue;
      ++unexpected;
      std::fprintf(stderr, "%s: %s\n", entry.name, broken ? "not found" : "a false alarm");
    }
  }
  return unexpected == 0 ? 0 : 1;
}
