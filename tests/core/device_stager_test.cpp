// The stager on the fake driver: right bytes in every schedule, no rule of the driver broken, and
// every broken order found.
#include <sys/wait.h>

#include <cstdlib>
#include <string>

#include "check.h"
#include "device_scenarios.h"
#include "process.h"
#include "support.h"

namespace {

using namespace device_scenarios;
using mld::StageResult;

void check_sound(const Findings& findings) {
  CHECK_EQ(findings.wrong, "");
  CHECK_EQ(findings.broken, "");
}

struct WithoutMemoryOperations {
  WithoutMemoryOperations() { set_memory_operations(false); }
  ~WithoutMemoryOperations() { set_memory_operations(true); }
};

constexpr std::uint64_t kSeeds = kUnderTsan || kUnderAsan ? 100 : 500;

}  // namespace

TEST(device_copies_are_right_in_every_schedule) {
  std::uint64_t direct = 0, all = 0;
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const Findings findings = train(seed);
    check_sound(findings);
    direct += findings.report.compute_stream_copies;
    all += findings.report.copies;
  }
  CHECK_EQ(all, 24 * kSeeds);
  // The device ring was full at times, and not always.
  CHECK(direct > all / 100);
  CHECK(direct < all / 2);
}

TEST(device_copies_without_a_device_ring_go_over_the_compute_stream) {
  for (std::uint64_t seed = 1; seed <= kSeeds / 10; ++seed) {
    const Findings findings = train_without_device_ring(seed);
    check_sound(findings);
    CHECK_EQ(findings.report.compute_stream_copies, findings.report.copies);
  }
}

TEST(device_copies_leave_a_capture_of_another_thread_alone) {
  for (std::uint64_t seed = 1; seed <= kSeeds / 10; ++seed) check_sound(capture_elsewhere(seed));
}

TEST(device_copies_are_refused_on_a_stream_that_is_captured) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) check_sound(capture_here(seed));
}

TEST(device_legacy_stream_beside_a_capture_on_a_blocking_stream_counts_as_captured) {
  const Machine machine(1);
  Rig rig(4096);
  void* const blocking = FAKE(fake_cuda_stream)(0, 0);
  FAKE(fake_cuda_begin_capture)(blocking);
  CHECK(rig.stage(Tensor({0, nullptr}, "12345678")) == StageResult::kCapturing);
  void* graph = nullptr;
  CHECK_EQ(FAKE(fake_cuda_end_capture)(blocking, &graph), fake_cuda::kSuccess);
  check_sound(rig.finish());
}

TEST(device_copies_arrive_where_streams_have_no_memory_operations) {
  const WithoutMemoryOperations limited;
  for (std::uint64_t seed = 1; seed <= kSeeds / 2; ++seed) {
    const Findings findings = train(seed);
    check_sound(findings);
    CHECK_EQ(findings.report.copies, 24);
    CHECK_EQ(findings.report.errors, 0);
    check_sound(train_without_device_ring(seed));
    if (seed <= 20) check_sound(capture_elsewhere(seed)), check_sound(capture_here(seed));
  }
  // Asked once a device, at its set-up.
  const Machine machine(1);
  Rig rig(std::size_t{1} << 20);
  const Tensor tensor({0, FAKE(fake_cuda_stream)(0, 1)}, "1234");
  for (int i = 0; i < 3; ++i) CHECK(rig.stage(tensor) == StageResult::kStaged);
  CHECK_EQ(FAKE(fake_cuda_calls)("cuStreamWriteValue32_v2"), 1);
  CHECK_EQ(FAKE(fake_cuda_calls)("cuMemsetD32Async"), 4);
  check_sound(rig.finish());
}

// Whatever fails, and when: no wrong byte, no slot given up under a copy, nothing left behind.
void fail_each_call() {
  std::uint64_t errors = 0;
  for (const char* function : driver_functions()) {
    for (std::uint64_t nth = 1; nth <= 12; nth = nth < 4 ? nth + 1 : nth + 4) {
      for (const bool sticky : {false, true}) {
        const int code = sticky ? fake_cuda::kIllegalAddress : fake_cuda::kNotPermitted;
        const Findings findings = fail_call(nth, function, nth, code, sticky);
        check_sound(findings);
        errors += findings.report.errors;
        if (check::failures.load(std::memory_order_relaxed) != 0) {
          std::fprintf(stderr, "%s, call %d, %s\n", function, static_cast<int>(nth),
                       sticky ? "sticky" : "once");
          return;
        }
      }
    }
  }
  CHECK(errors > 100);
}

TEST(device_path_ends_in_order_whichever_call_fails) { fail_each_call(); }

TEST(device_path_without_memory_operations_ends_in_order_whichever_call_fails) {
  const WithoutMemoryOperations limited;
  fail_each_call();
}

TEST(device_ring_shrinks_until_the_device_has_room) {
  const Machine machine(1);
  FAKE(fake_cuda_fail)("cuMemAlloc_v2", 1, fake_cuda::kOutOfMemory, 0);
  Rig rig(std::size_t{8} << 20);
  const Tensor tensor({0, FAKE(fake_cuda_stream)(0, 1)}, support::pattern(1, 5000));
  CHECK(rig.stage(tensor) == StageResult::kStaged);
  CHECK_EQ(FAKE(fake_cuda_alive_bytes)(0), std::size_t{4} << 20);
  tensor.overwrite(0);
  const Findings findings = rig.finish();
  check_sound(findings);
  CHECK_EQ(findings.report.compute_stream_copies, 0);
}

TEST(device_ring_takes_at_most_a_hundredth_of_the_device) {
  const Machine machine(1);
  Rig rig(std::size_t{1} << 30);
  CHECK(rig.stage(Tensor({0, nullptr}, "1234")) == StageResult::kStaged);
  CHECK(FAKE(fake_cuda_alive_bytes)(0) <= Machine::kMemoryBytes / 100);
  CHECK(FAKE(fake_cuda_alive_bytes)(0) > Machine::kMemoryBytes / 101);
  check_sound(rig.finish());
}

TEST(device_copies_arrive_without_pinned_memory) {
  const Machine machine(1);
  FAKE(fake_cuda_fail)("cuMemHostRegister_v2", 1, fake_cuda::kOutOfMemory, 0);
  Rig rig(std::size_t{1} << 20);
  const Tensor tensor({0, FAKE(fake_cuda_stream)(0, 1)}, support::pattern(1, 5000));
  CHECK(mld::StageSession(rig.stager(), tensor.place).enter() == StageResult::kStaged);
  CHECK(!rig.stager().report().pinned);
  const auto notice = rig.stager().take_notice();
  CHECK(notice && notice->find("CUDA_ERROR_OUT_OF_MEMORY") != std::string::npos);
  CHECK(!rig.stager().take_notice());
  CHECK(rig.stage(tensor) == StageResult::kStaged);
  tensor.overwrite(0);
  CHECK_EQ(rig.finish().wrong, "");
}

TEST(device_stager_without_a_driver_is_unavailable_and_says_so_once) {
  mld::Arena arena(65536);
  mld::DeviceStager stager(arena.data(), arena.bytes(), {"/nowhere/libcuda.so.1", 4096});
  for (const int device : {0, 0, -1, mld::DeviceStager::kMaxDevices}) {
    mld::StageSession session(stager, {device, nullptr});
    CHECK(session.enter() == StageResult::kUnavailable);
  }
  CHECK(stager.take_notice().has_value());
  CHECK(!stager.take_notice());
  CHECK(stager.shut_down(std::chrono::seconds(0)));
}

TEST(device_stager_of_a_forked_child_calls_no_driver) {
  mld::process();  // as a runtime does: forks are counted from here on
  const Machine machine(1);
  Rig rig(4096);
  const Tensor tensor({0, nullptr}, "1234");
  CHECK(rig.stage(tensor) == StageResult::kStaged);
  const int status = support::in_child([&] {
    mld::StageSession session(rig.stager(), tensor.place);
    if (session.enter() != StageResult::kUnavailable) return 1;
    return rig.stager().shut_down(std::chrono::seconds(0)) ? 2 : 0;
  });
  CHECK_EQ(status, 0);
  CHECK_EQ(FAKE(fake_cuda_child_calls)(), 0);
  check_sound(rig.finish());
}

TEST(device_that_stays_behind_keeps_what_it_writes_to) {
  const Machine machine(1);
  Rig rig(4096);
  const Tensor tensor({0, FAKE(fake_cuda_stream)(0, 1)}, support::pattern(1, 1000));
  FAKE(fake_cuda_hold_stream)(tensor.place.stream, 1);
  CHECK(rig.stage(tensor) == StageResult::kStaged);
  CHECK(!rig.stager().shut_down(std::chrono::milliseconds(5)));
  CHECK_EQ(FAKE(fake_cuda_calls)("cuMemHostUnregister"), 0);
  FAKE(fake_cuda_hold_stream)(tensor.place.stream, 0);
  check_sound(rig.finish());
}

// Each wait, event, record and question that is taken out of the stager is found by a scenario.
TEST(every_broken_order_of_the_stager_is_found) {
  const int status = std::system(MLD_STAGER_MUTATIONS_PROGRAM);
  CHECK(WIFEXITED(status));
  CHECK_EQ(WEXITSTATUS(status), 0);
}
