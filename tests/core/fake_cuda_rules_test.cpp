// The rules of the fake CUDA driver: each one sees the program that breaks it, and only that; a
// sound program breaks none, in any schedule.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "fake_cuda/accesses.h"
#include "fake_machine.h"

namespace {

using namespace fake_machine;

struct Outcome {
  bool right_bytes = true;
  std::set<std::string> rules;
  std::uint64_t schedule = 0;
};

// Snapshots, with an in-place operation after each one. The words come when the device likes.
Outcome run(std::uint64_t seed, Flaw flaw) {
  Machine machine(seed, FAKE_CUDA_INTERLEAVED);
  Snapshots snapshots(machine, flaw);
  Outcome outcome;
  std::vector<std::string> expected;
  for (std::uint32_t i = 0; i < Snapshots::kCount; ++i) {
    expected.push_back(i == 0 ? machine.content : std::string(kBytes, static_cast<char>(i)));
    snapshots.take(i);
    overwrite(machine, machine.compute, static_cast<unsigned char>(i + 1));
  }
  for (std::uint32_t i = 0; i < Snapshots::kCount; ++i) {
    outcome.right_bytes &= snapshots.wait(i) && snapshots.read(i) == expected[i];
  }
  FAKE(fake_cuda_run_until_idle)();
  outcome.rules = broken_rules();
  outcome.schedule = FAKE(fake_cuda_schedule_hash)();
  return outcome;
}

// How many of `seeds` schedules are found to break exactly `rule`, and how many go wrong unseen.
struct Tally {
  int found = 0;
  int wrong_bytes = 0;
  int wrong_bytes_unseen = 0;
};

Tally tally(Flaw flaw, const std::string& rule, std::uint64_t seeds) {
  Tally counted;
  for (std::uint64_t seed = 1; seed <= seeds; ++seed) {
    const Outcome outcome = run(seed, flaw);
    if (outcome.rules == std::set<std::string>{rule}) ++counted.found;
    if (!outcome.right_bytes) ++counted.wrong_bytes;
    if (!outcome.right_bytes && outcome.rules.empty()) ++counted.wrong_bytes_unseen;
  }
  return counted;
}

using Breaker = std::function<void(Machine&)>;

// The shortest program that breaks each rule.
const std::map<std::string, Breaker>& breakers() {
  static const std::map<std::string, Breaker> all = {
      {"unordered-read",
       [](Machine& m) {
         Pinned pinned;
         overwrite(m, m.compute, 1);
         CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, kBytes, new_stream());
       }},
      {"unordered-write",
       [](Machine& m) {
         Pinned pinned;
         CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, kBytes, new_stream());
         overwrite(m, m.compute, 1);
       }},
      {"host-read-too-early",
       [](Machine& m) {
         Pinned pinned;
         CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, kBytes, m.compute);
         FAKE(fake_cuda_step)(1);  // the bytes happen to be there: nobody could know
         CHECK_EQ(FAKE(fake_cuda_host_read)(pinned.bytes, 1), 0);
       }},
      {"host-write-too-early",
       [](Machine& m) {
         Pinned pinned;
         CUDA(cuMemcpyHtoDAsync_v2)(m.tensor, pinned.bytes, kBytes, m.compute);
         CHECK_EQ(FAKE(fake_cuda_host_read)(pinned.bytes, kBytes), 1);
         CHECK_EQ(FAKE(fake_cuda_host_write)(pinned.bytes, kBytes), 0);
       }},
      {"host-range-in-use",
       [](Machine& m) {
         Pinned pinned;
         FAKE(fake_cuda_host_use_begin)(pinned.bytes + 8, 8);
         CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, 8, m.compute);
         CHECK(broken_rules().empty());
         CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, 9, m.compute);
         FAKE(fake_cuda_host_use_end)(pinned.bytes + 8);
         CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, 9, m.compute);
         CHECK_EQ(FAKE(fake_cuda_violation_count)("host-range-in-use"), 1);
       }},
      {"host-release-pending",
       [](Machine& m) {
         Pinned pinned;
         CUDA(cuMemcpyDtoHAsync_v2)(pinned.bytes, m.tensor, kBytes, m.compute);
         CUDA(cuMemHostUnregister)(pinned.bytes);
         FAKE(fake_cuda_run_until_idle)();
         CHECK_EQ(pinned.text(), std::string(kBytes, '\0'));
       }},
      {"free-while-pending",
       [](Machine& m) {
         const CUdeviceptr slot = new_memory();
         CUDA(cuMemcpyDtoDAsync_v2)(slot, m.tensor, kBytes, m.compute);
         CUDA(cuMemFree_v2)(slot);
       }},
      {"use-after-free",
       [](Machine& m) {
         const CUdeviceptr slot = new_memory();
         CUDA(cuMemFree_v2)(slot);
         CHECK_EQ(CUDA(cuMemcpyDtoDAsync_v2)(slot, m.tensor, kBytes, m.compute), kInvalidValue);
       }},
      {"bad-address",
       [](Machine& m) {
         Pinned pinned;  // registered memory has a device address of its own
         const CUdeviceptr host = reinterpret_cast<std::uintptr_t>(pinned.bytes);
         CHECK_EQ(CUDA(cuStreamWriteValue32_v2)(m.compute, pinned.device, 1, 0), kSuccess);
         CHECK(broken_rules().empty());
         CHECK_EQ(CUDA(cuStreamWriteValue32_v2)(m.compute, host, 1, 0), kInvalidValue);
       }},
      {"unrecorded-event",
       [](Machine& m) { CHECK_EQ(CUDA(cuStreamWaitEvent)(m.compute, new_event(), 0), kSuccess); }},
      {"destroyed-handle",
       [](Machine&) {
         CUevent event = new_event();
         CUDA(cuEventDestroy_v2)(event);
         CHECK_EQ(CUDA(cuEventQuery)(event), kInvalidHandle);
       }},
      {"unknown-handle",
       [](Machine&) {
         CHECK_EQ(CUDA(cuStreamQuery)(reinterpret_cast<CUstream>(0x77)), kInvalidHandle);
       }},
      {"context-mismatch",
       [](Machine& m) {
         FAKE(fake_cuda_set_device_count)(2);
         FAKE(fake_cuda_enter_device)(1);
         CHECK_EQ(CUDA(cuEventRecord)(new_event(), m.compute), kInvalidHandle);
       }},
      {"no-context",
       [](Machine& m) {
         FAKE(fake_cuda_enter_device)(-1);
         CHECK_EQ(CUDA(cuStreamSynchronize)(m.compute), kInvalidContext);
       }},
      {"context-created",
       [](Machine&) {
         FAKE(fake_cuda_set_device_count)(2);
         CUcontext context = nullptr;
         CHECK_EQ(CUDA(cuDevicePrimaryCtxRetain)(&context, 0), kSuccess);
         CHECK(broken_rules().empty());
         CHECK_EQ(CUDA(cuDevicePrimaryCtxRetain)(&context, 1), kSuccess);
       }},
      {"over-release",
       [](Machine&) { CHECK_EQ(CUDA(cuDevicePrimaryCtxRelease_v2)(0), kInvalidContext); }},
      {"init-called", [](Machine&) { CHECK_EQ(CUDA(cuInit)(0), kSuccess); }},
      {"old-abi",
       [](Machine&) {
         CHECK_EQ(fake_cuda::function<CUresult()>("cuMemcpyDtoHAsync")(), kInvalidValue);
       }},
      {"call-in-host-function",
       [](Machine& m) {
         static CUresult result;
         const auto query = [](void* stream) {
           result = CUDA(cuStreamQuery)(static_cast<CUstream>(stream));
         };
         CUDA(cuLaunchHostFunc)(m.compute, query, m.compute);
         FAKE(fake_cuda_step)(1);
         CHECK_EQ(result, kNotPermitted);
       }},
      {"unsafe-while-capturing",
       [](Machine& m) {
         FAKE(fake_cuda_begin_capture)(m.compute);
         CHECK_EQ(CUDA(cuEventQuery)(new_event()), kCaptureUnsupported);
       }},
      {"enqueue-on-capturing",
       [](Machine& m) {
         FAKE(fake_cuda_begin_capture)(m.compute);
         CHECK_EQ(CUDA(cuMemsetD8Async)(m.tensor, 1, kBytes, m.compute), kSuccess);
       }},
      {"query-of-captured",
       [](Machine& m) {
         relax();  // does not help here
         FAKE(fake_cuda_begin_capture)(m.compute);
         CHECK_EQ(CUDA(cuStreamQuery)(m.compute), kCaptureUnsupported);
       }},
      {"legacy-while-capturing",
       [](Machine& m) {
         void* const blocking = FAKE(fake_cuda_stream)(0, 0);
         FAKE(fake_cuda_begin_capture)(blocking);
         CHECK_EQ(CUDA(cuMemsetD8Async)(m.tensor, 1, kBytes, nullptr), kCaptureImplicit);
       }},
      {"context-left-changed",
       [](Machine&) {
         FAKE(fake_cuda_callee_begin)();
         CUDA(cuCtxSetCurrent)(nullptr);
         CHECK(FAKE(fake_cuda_current_context_of_thread)() == nullptr);
         FAKE(fake_cuda_callee_end)();
       }},
      {"capture-mode-left-changed",
       [](Machine&) {
         FAKE(fake_cuda_callee_begin)();
         relax();
         CHECK_EQ(FAKE(fake_cuda_capture_mode_of_thread)(), kRelaxed);
         FAKE(fake_cuda_callee_end)();
       }},
      {"host-wait-in-callee",
       [](Machine& m) {
         FAKE(fake_cuda_callee_begin)();
         CUDA(cuStreamSynchronize)(m.compute);
         FAKE(fake_cuda_callee_end)();
         CUDA(cuStreamSynchronize)(m.compute);
       }},
      {"endless-wait",
       [](Machine& m) {
         FAKE(fake_cuda_hold_stream)(m.compute, 1);
         overwrite(m, m.compute, 1);
         CHECK_EQ(CUDA(cuStreamSynchronize)(m.compute), kUnknown);
       }},
      {"leak",
       [](Machine&) {
         new_memory();
         FAKE(fake_cuda_check_leaks)();
       }},
      {"pageable-copy",
       [](Machine& m) {
         std::string host(kBytes, '\0');
         CHECK_EQ(CUDA(cuMemcpyDtoHAsync_v2)(host.data(), m.tensor, kBytes, m.compute), kSuccess);
         CHECK_EQ(host, m.content);  // complete on return
       }},
      {"blocking-stream",
       [](Machine&) {
         CUstream stream = nullptr;
         CHECK_EQ(CUDA(cuStreamCreate)(&stream, 0), kSuccess);
       }},
  };
  return all;
}

}  // namespace

TEST(fake_cuda_sees_each_rule_broken_and_no_other) {
  int is_warning = 0;
  for (std::size_t i = 0; const char* id = FAKE(fake_cuda_rule)(i, &is_warning); ++i) {
    const auto breaker = breakers().find(id);
    if (breaker == breakers().end()) {
      check::fail(__FILE__, __LINE__, std::string("nothing breaks rule ") + id);
      continue;
    }
    Machine machine;
    breaker->second(machine);
    CHECK_EQ(broken_rules(), std::set<std::string>{id});
    const std::string text =
        is_warning != 0 ? FAKE(fake_cuda_warnings)() : FAKE(fake_cuda_violations)();
    CHECK(text.starts_with(std::string(id) + ": "));
    CHECK_EQ(
        std::string(is_warning != 0 ? FAKE(fake_cuda_violations)() : FAKE(fake_cuda_warnings)()),
        "");
  }
}

TEST(fake_cuda_finds_nothing_wrong_with_sound_snapshots) {
  const std::uint64_t seeds = kUnderTsan || kUnderAsan ? 400 : 2000;
  std::set<std::uint64_t> schedules;
  for (std::uint64_t seed = 1; seed <= seeds; ++seed) {
    const Outcome outcome = run(seed, Flaw::kNone);
    schedules.insert(outcome.schedule);
    if (outcome.right_bytes && outcome.rules.empty()) continue;
    check::fail(__FILE__, __LINE__, "seed " + std::to_string(seed));
    break;
  }
  CHECK(schedules.size() > seeds / 4);  // they really differ
}

TEST(fake_cuda_catches_a_missing_event_wait_in_every_schedule) {
  const Tally counted = tally(Flaw::kNoWait, "unordered-read", 100);
  CHECK_EQ(counted.wrong_bytes_unseen, 0);
  CHECK(counted.wrong_bytes > 0);
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    CHECK_EQ(run(seed, Flaw::kNoWait).rules.count("unordered-read"), 1);
  }
}

TEST(fake_cuda_catches_a_wait_for_an_event_never_recorded) {
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    CHECK_EQ(run(seed, Flaw::kNoRecord).rules.count("unrecorded-event"), 1);
  }
}

TEST(fake_cuda_catches_a_device_slot_used_again_too_early) {
  const Tally counted = tally(Flaw::kNoReuseWait, "unordered-write", 100);
  CHECK(counted.found >= 50);  // where the words came late; where they came early all was well
  CHECK(counted.wrong_bytes > 0);
  CHECK_EQ(counted.wrong_bytes_unseen, 0);
}

TEST(fake_cuda_catches_a_slot_published_before_its_copy_ended) {
  const Tally counted = tally(Flaw::kPublishedEarly, "host-read-too-early", 100);
  CHECK(counted.found >= 50);
  CHECK_EQ(counted.wrong_bytes_unseen, 0);
  CHECK(counted.wrong_bytes > 0);
}

TEST(fake_cuda_forgets_only_accesses_that_no_race_can_need) {
  for (std::uint64_t seed = 1; seed <= 500; ++seed) {
    support::Random random(seed);
    AccessLog log;
    std::vector<RecordedAccess> history;
    std::vector<VectorClock> streams(3);
    VectorClock host;
    for (bool race = false; !race && history.size() < 40;) {
      RecordedAccess next;
      next.actor = random.below(3);
      next.access.range.begin = random.below(20);
      next.access.range.end = next.access.range.begin + 1 + random.below(6);
      next.access.writes = random.below(2) == 0;
      VectorClock clock = streams[next.actor];
      clock.join(host);
      for (const VectorClock& other : streams) {
        if (random.below(3) != 0) clock.join(other);
      }
      race = std::any_of(history.begin(), history.end(), [&](const RecordedAccess& earlier) {
        return earlier.access.range.overlaps(next.access.range) &&
               (earlier.access.writes || next.access.writes) &&
               clock.of(earlier.actor) < earlier.count;
      });
      CHECK_EQ(log.conflict(next.access.range, next.access.writes, clock).has_value(), race);
      next.count = clock.of(next.actor) + 1;
      clock.set(next.actor, next.count);
      streams[next.actor] = clock;
      history.push_back(next);
      log.add(next, clock, host);
      if (random.below(8) == 0) host.join(streams[random.below(3)]);
    }
  }
}

TEST(fake_cuda_replays_a_schedule_by_its_seed) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const Outcome once = run(seed, Flaw::kNoReuseWait);
    const Outcome again = run(seed, Flaw::kNoReuseWait);
    CHECK_EQ(once.schedule, again.schedule);
    CHECK_EQ(once.right_bytes, again.right_bytes);
    CHECK_EQ(once.rules, again.rules);
  }
}
