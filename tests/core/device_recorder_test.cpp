// CUDA tensors through the whole core, from hook to disk, on the fake driver with a thread of its
// own.
#include <atomic>
#include <string>
#include <thread>

#include "check.h"
#include "device_scenarios.h"
#include "support.h"
#include "trace_fixture.h"

namespace {

using namespace std::chrono_literals;
using device_scenarios::Machine;
using device_scenarios::Tensor;
using support::pattern;
using support::Trace;

mld::RecorderOptions with_fake(std::size_t device_ring_bytes = std::size_t{64} << 10) {
  mld::RecorderOptions options = Trace::eager();
  options.device = device_scenarios::options(device_ring_bytes);
  return options;
}

class AddressSource final : public mld::ByteSource {
 public:
  explicit AddressSource(const std::byte* address) : address_(address) {}
  const std::byte* borrow() override { return address_; }

 private:
  const std::byte* address_;
};

bool capture_device(mld::Recorder& recorder, std::uint32_t column, const Tensor& tensor,
                    mld::WaitHooks& hooks) {
  AddressSource source(tensor.data());
  const auto length = static_cast<std::int64_t>(tensor.content.size());
  return recorder.capture_device(*recorder.current_call(), column, "uint8", &length, 1,
                                 tensor.content.size(), tensor.place, source, hooks);
}

bool capture_device(mld::Recorder& recorder, std::uint32_t column, const Tensor& tensor) {
  mld::WaitHooks hooks;
  return capture_device(recorder, column, tensor, hooks);
}

mld::DevicePlace new_place(int device = 0) { return {device, FAKE(fake_cuda_stream)(device, 1)}; }

// A call with one device tensor that is overwritten at once, and one host column.
void record(Trace& trace, const Tensor& tensor, const std::string& host) {
  trace.recorder->begin_call(0, 1);
  CHECK(capture_device(*trace.recorder, 0, tensor));
  tensor.overwrite(0xEE);
  support::capture(*trace.recorder, 1, host);
  support::end_call(*trace.recorder, 1);
}

void check_law(const Trace& trace) { CHECK(support::is_conserved(trace.counters())); }

}  // namespace

TEST(device_tensors_are_stored_as_the_hook_saw_them) {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    const Machine machine(seed, FAKE_CUDA_WORKER);
    Trace trace(with_fake());
    const mld::DevicePlace places[] = {new_place(0), new_place(0), new_place(1)};
    for (std::uint64_t call = 0; call < 20; ++call) {
      const Tensor tensor(places[call % 3], pattern(seed * 100 + call, 1 + call * 1500));
      record(trace, tensor, pattern(call, 300));
    }
    support::flush(*trace.recorder);
    const auto stored = support::read_partition(trace.directory / "epoch-0");
    CHECK_EQ(stored.calls.size(), 20);
    for (const auto& [key, call] : stored.calls) {
      CHECK(call.captures.at(0) == pattern(seed * 100 + key.second, 1 + key.second * 1500));
      CHECK(call.captures.at(1) == pattern(key.second, 300));
    }
    check_law(trace);
    CHECK_EQ(std::string(FAKE(fake_cuda_violations)()), "");
  }
}

TEST(device_tensor_larger_than_both_rings_passes_through_them) {
  const Machine machine(3, FAKE_CUDA_WORKER);
  Trace trace(with_fake());
  const std::string content = pattern(1, std::size_t{3} << 20);
  const Tensor tensor(new_place(), content);
  record(trace, tensor, "x");
  support::flush(*trace.recorder);
  CHECK(support::read_partition(trace.directory / "epoch-0").calls.at({0, 0}).captures.at(0) ==
        content);
  CHECK_EQ(std::string(FAKE(fake_cuda_violations)()), "");
}

// What a capture costs in driver calls: the mode, the context and the question for a graph capture
// once, then the five operations of each piece's copy.
TEST(device_piece_costs_five_driver_calls) {
  const Machine machine(3);
  mld::RecorderOptions options = with_fake(std::size_t{8} << 20);
  options.ring_bytes = std::size_t{4} << 20;
  Trace trace(options);
  const mld::DevicePlace places[] = {new_place(0), new_place(1)};
  for (const mld::DevicePlace& place : places) record(trace, Tensor(place, "set-up"), "x");
  // The second device's context is not the current one, and is pushed and popped.
  const std::uint64_t around[] = {4, 6};
  for (const std::uint64_t pieces : {1, 4}) {
    for (int device = 0; device < 2; ++device) {
      const std::size_t bytes = mld::Runtime::current()->max_piece_bytes() * (pieces - 1) + 1;
      const Tensor tensor(places[device], pattern(pieces, bytes));
      trace.recorder->begin_call(0, 1);
      const std::uint64_t before = FAKE(fake_cuda_calls_of_thread)(nullptr);
      CHECK(capture_device(*trace.recorder, 0, tensor));
      CHECK_EQ(FAKE(fake_cuda_calls_of_thread)(nullptr) - before, around[device] + 5 * pieces);
      CHECK(support::end_call(*trace.recorder, 1));
    }
  }
  FAKE(fake_cuda_run_until_idle)();
  support::flush(*trace.recorder);
  CHECK_EQ(trace.counters().rows_committed, 6);
  CHECK_EQ(std::string(FAKE(fake_cuda_violations)()), "");
}

// While a hook waits for room in the ring, code of the user's may run in its thread.
TEST(device_capture_that_waits_gives_the_thread_back_and_asks_again) {
  const Machine machine(12, FAKE_CUDA_WORKER);
  Trace trace(with_fake());
  const Tensor tensor(new_place(1), pattern(1, std::size_t{3} << 20));
  FAKE(fake_cuda_hold_stream)(tensor.place.stream, 1);
  struct Hooks final : mld::WaitHooks {
    explicit Hooks(void* compute) : stream(compute) {}
    void before_slice() override {
      is_left = is_left && FAKE(fake_cuda_capture_mode_of_thread)() == fake_cuda::kGlobal &&
                FAKE(fake_cuda_current_context_of_thread)() == context;
      if (++slices != 2) return;
      FAKE(fake_cuda_hold_stream)(stream, 0);
      FAKE(fake_cuda_begin_capture)(stream);
    }
    void* const stream;
    void* const context = FAKE(fake_cuda_current_context_of_thread)();
    int slices = 0;
    bool is_left = true;
  } hooks(tensor.place.stream);
  trace.recorder->begin_call(0, 1);
  CHECK(support::kind_of([&] {
          static_cast<void>(capture_device(*trace.recorder, 0, tensor, hooks));
        }) == mld::ErrorKind::kStreamCapture);
  CHECK(hooks.is_left);
  CHECK(hooks.slices >= 2);
  CHECK(support::kind_of([&] { support::end_call(*trace.recorder, 1); }) ==
        mld::ErrorKind::kStreamCapture);
  trace.recorder->abort_call();
  void* graph = nullptr;
  CHECK_EQ(FAKE(fake_cuda_end_capture)(tensor.place.stream, &graph), fake_cuda::kSuccess);
  support::flush(*trace.recorder);
  CHECK_EQ(trace.counters().rows_submitted, 0);
  CHECK_EQ(std::string(FAKE(fake_cuda_violations)()), "");
}

TEST(device_capture_reads_back_once_it_has_arrived) {
  const Machine machine(4, FAKE_CUDA_WORKER);
  Trace trace(with_fake());
  const Tensor tensor(new_place(), pattern(1, 40000));
  trace.recorder->begin_call(0, 1);
  FAKE(fake_cuda_hold_stream)(tensor.place.stream, 1);
  CHECK(capture_device(*trace.recorder, 0, tensor));
  tensor.overwrite(0);
  std::thread later([&] {
    std::this_thread::sleep_for(30ms);
    FAKE(fake_cuda_hold_stream)(tensor.place.stream, 0);
  });
  CHECK(support::read_back(*trace.recorder, 0) == tensor.content);
  later.join();
  support::capture(*trace.recorder, 1, "x");
  CHECK_EQ(trace.recorder->last_call()->captures.at(0).device, 0);
  CHECK_EQ(trace.recorder->last_call()->captures.at(1).device, -1);
  CHECK(support::end_call(*trace.recorder, 1));
}

TEST(records_behind_a_copy_on_its_way_wait_for_it_and_keep_their_order) {
  const Machine machine(5, FAKE_CUDA_WORKER);
  Trace trace(with_fake());
  const Tensor tensor(new_place(), pattern(1, 5000));
  FAKE(fake_cuda_hold_stream)(tensor.place.stream, 1);
  record(trace, tensor, "first");
  support::record_call(*trace.recorder, 0, 1, {"second"});
  CHECK(support::kind_of([&] { support::flush(*trace.recorder, 100ms); }) ==
        mld::ErrorKind::kTraceStall);
  CHECK_EQ(trace.counters().rows_in_flight, 2);
  FAKE(fake_cuda_hold_stream)(tensor.place.stream, 0);
  support::flush(*trace.recorder);
  CHECK_EQ(trace.counters().rows_committed, 2);
  CHECK(support::read_partition(trace.directory / "epoch-0").calls.at({0, 0}).captures.at(0) ==
        tensor.content);
}

TEST(close_with_copies_in_flight_waits_for_them) {
  const Machine machine(6, FAKE_CUDA_WORKER);
  Trace trace(with_fake());
  const Tensor tensor(new_place(), pattern(1, 5000));
  FAKE(fake_cuda_hold_stream)(tensor.place.stream, 1);
  record(trace, tensor, "x");
  std::thread later([&] {
    std::this_thread::sleep_for(50ms);
    FAKE(fake_cuda_hold_stream)(tensor.place.stream, 0);
  });
  CHECK(support::close(*trace.recorder));
  later.join();
  CHECK_EQ(trace.counters().rows_committed, 1);
  CHECK_EQ(trace.counters().rows_in_flight, 0);
  trace.recorder.reset();
  FAKE(fake_cuda_check_leaks)();
  CHECK_EQ(std::string(FAKE(fake_cuda_violations)()), "");
  trace.recorder = mld::Recorder::open(trace.use, with_fake());  // for the fixture to close
}

TEST(dropping_an_epoch_takes_calls_whose_copies_are_on_their_way) {
  const Machine machine(7, FAKE_CUDA_WORKER);
  Trace trace(with_fake());
  const Tensor tensor(new_place(), pattern(1, 5000));
  FAKE(fake_cuda_hold_stream)(tensor.place.stream, 1);
  record(trace, tensor, "x");
  std::thread later([&] {
    std::this_thread::sleep_for(50ms);
    FAKE(fake_cuda_hold_stream)(tensor.place.stream, 0);
  });
  trace.drop(0);
  later.join();
  support::flush(*trace.recorder);
  CHECK(support::read_rank(trace.directory.path()).empty());
  check_law(trace);
}

// A kernel of the user's faults behind the hook, and no hook comes after it.
TEST(lost_device_fails_its_calls_and_leaves_the_rest_alone) {
  const Machine machine(8, FAKE_CUDA_WORKER);
  Trace trace(with_fake());
  const Tensor tensor(new_place(), pattern(1, 5000));
  record(trace, tensor, "before");
  support::flush(*trace.recorder);
  FAKE(fake_cuda_fault_kernel)(tensor.place.stream, fake_cuda::kIllegalAddress);
  trace.recorder->begin_call(0, 1);
  CHECK(capture_device(*trace.recorder, 0, tensor));
  static_cast<void>(support::end_call(*trace.recorder, 1));
  support::record_call(*trace.recorder, 0, 1, {"host"});
  support::flush(*trace.recorder);
  const mld::Counters counters = trace.counters();
  CHECK_EQ(counters.rows_failed, 1);
  CHECK_EQ(counters.rows_committed, 2);
  CHECK(support::is_conserved(counters));
  // From now on such a call fails at once, without an error of ours.
  trace.recorder->begin_call(0, 1);
  CHECK(capture_device(*trace.recorder, 0, tensor));
  CHECK(!support::end_call(*trace.recorder, 1));
  CHECK_EQ(trace.counters().rows_failed, 2);
  support::flush(*trace.recorder);
  CHECK(support::is_conserved(trace.counters()));
  CHECK_EQ(mld::Runtime::current()->stager().report().errors, 1);
  CHECK_EQ(mld::Runtime::current()->stager().report().last_error, "CUDA_ERROR_ILLEGAL_ADDRESS");
  CHECK(support::close(*trace.recorder));
  // Whoever opens the store sees what is missing and why: call 1 was in the ring, call 3 never was.
  const auto stored = support::read_partition(trace.directory / "epoch-0");
  CHECK_EQ(stored.calls.size(), 2);
  REQUIRE(stored.gaps.size() == 2);
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK_EQ(stored.gaps[i].first_call, 1 + 2 * i);
    CHECK_EQ(stored.gaps[i].last_call, 1 + 2 * i);
    CHECK_EQ(stored.gaps[i].rows, 1);
    CHECK_EQ(stored.gaps[i].bytes, tensor.content.size());
    CHECK_EQ(stored.gaps[i].cause, "device_error");
  }
  CHECK_EQ(stored.meta_discarded_rows, 2);
}

TEST(call_whose_later_piece_cannot_be_staged_fails_as_a_whole) {
  const Machine machine(9, FAKE_CUDA_WORKER);
  Trace trace(with_fake());
  const Tensor tensor(new_place(1), pattern(1, std::size_t{1} << 20));  // several pieces
  FAKE(fake_cuda_fail)("cuEventRecord", 3, fake_cuda::kNotPermitted, 0);
  trace.recorder->begin_call(0, 1);
  CHECK(capture_device(*trace.recorder, 0, tensor));
  CHECK(!support::end_call(*trace.recorder, 1));
  trace.recorder->begin_call(0, 1);
  CHECK(!capture_device(*trace.recorder, 0, tensor));  // closed: the caller copies synchronously
  AddressSource copy(reinterpret_cast<const std::byte*>(tensor.content.data()));
  mld::WaitHooks hooks;
  const std::int64_t length = 5;
  trace.recorder->capture(*trace.recorder->current_call(), 0, "uint8", &length, 1, 5, copy, hooks,
                          tensor.place.device);
  // Where the tensor lay is remembered whichever way its bytes came.
  CHECK_EQ(trace.recorder->last_call()->captures.at(0).device, tensor.place.device);
  CHECK(support::end_call(*trace.recorder, 1));
  support::flush(*trace.recorder);
  CHECK_EQ(trace.counters().rows_failed, 1);
  CHECK_EQ(trace.counters().rows_committed, 1);
  check_law(trace);
  const auto stored = support::read_partition(trace.directory / "epoch-0");
  CHECK_EQ(stored.calls.size(), 1);
  REQUIRE(stored.gaps.size() == 1);
  CHECK_EQ(stored.gaps[0].first_call, 0);
  CHECK_EQ(stored.gaps[0].rows, 1);
  CHECK_EQ(stored.gaps[0].cause, "device_error");
  CHECK_EQ(std::string(FAKE(fake_cuda_violations)()), "");
}

TEST(call_on_a_captured_stream_raises_and_leaves_nothing) {
  const Machine machine(10, FAKE_CUDA_WORKER);
  Trace trace(with_fake());
  const Tensor tensor(new_place(), pattern(1, 5000));
  FAKE(fake_cuda_begin_capture)(tensor.place.stream);
  trace.recorder->begin_call(0, 1);
  CHECK(support::kind_of([&] { static_cast<void>(capture_device(*trace.recorder, 0, tensor)); }) ==
        mld::ErrorKind::kStreamCapture);
  // A forward that swallows it does not get a call without that capture stored.
  CHECK(support::kind_of([&] { support::end_call(*trace.recorder, 1); }) ==
        mld::ErrorKind::kStreamCapture);
  trace.recorder->abort_call();
  void* graph = nullptr;
  CHECK_EQ(FAKE(fake_cuda_end_capture)(tensor.place.stream, &graph), fake_cuda::kSuccess);
  record(trace, tensor, "x");
  support::flush(*trace.recorder);
  CHECK_EQ(trace.counters().rows_submitted, 1);
  CHECK_EQ(trace.counters().rows_committed, 1);
}

TEST(child_of_a_process_with_copies_in_flight_is_inert) {
  if (kUnderTsan)
    return support::skipped("ThreadSanitizer cannot follow a fork of several threads");
  const Machine machine(11, FAKE_CUDA_STEPPED);
  mld::RecorderOptions options = with_fake();
  options.commit_interval = 3600s;
  Trace trace(options);
  const Tensor tensor(new_place(), pattern(1, 5000));
  record(trace, tensor, "x");
  const int status = support::in_child([&] {
    if (!support::close(*trace.recorder)) return 1;
    trace.recorder.reset();
    return 0;
  });
  CHECK_EQ(status, 0);
  CHECK_EQ(FAKE(fake_cuda_child_calls)(), 0);
  FAKE(fake_cuda_run_until_idle)();
  support::flush(*trace.recorder);
  CHECK_EQ(trace.counters().rows_committed, 1);
}
